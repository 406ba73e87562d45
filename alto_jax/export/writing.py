"""Writes programs as StableHLO for several platforms, their weights, a manifest and the loader into a folder."""

from collections.abc import Mapping, Sequence
import hashlib
import json
import os
import pathlib
import shutil
from typing import Any

import jax
import numpy as np

import alto_jax
from alto_jax.checkpoint.loading import LoadedModel
from alto_jax.config import ConfigError, write_whole
from alto_jax.export import loader, programs
from alto_jax.export.programs import Program
from alto_jax.inference.settings import Settings
from alto_jax.mllm import text as words
from alto_jax.mllm.generate import bucket_length
from alto_jax.mllm.image_text import place_images

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
LOADER = "alto_loader.py"
_NAMES = {np.dtype(dtype): name for name, dtype in loader.DTYPES.items()}


def export_model(
    model: LoadedModel,
    out: pathlib.Path,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    *,
    forced_prefix: bool = True,
    prompt_tokens: int = 32,
) -> dict[str, Any]:
    """Writes a model as programs that need no alto_jax.

    Args:
      model: opened for inference.
      out: a new folder.
      platforms: that the programs are for, of PLATFORMS; none of them has to be here.
      forced_prefix: answers begin with a mask and end with it; False: free ones, which may be "No".
      prompt_tokens: room for so many tokens of a phrase beside the built-in wording.

    Returns:
      The manifest.

    Raises:
      ConfigError: an unknown platform, `out` holds an export already, or `flatbuffers` is not installed.
    """
    wrong = [name for name in platforms if name not in PLATFORMS]
    if wrong or not platforms:
        got = wrong or "none"
        raise ConfigError(f"--platforms={','.join(platforms)}: expected some of {', '.join(PLATFORMS)}, got {got}")
    if (out / loader.MANIFEST).exists():
        raise ConfigError(f"--out={out}: holds {loader.MANIFEST} already")
    if prompt_tokens < 1:
        raise ConfigError(f"--prompt_tokens={prompt_tokens}: expected at least 1")
    try:
        import flatbuffers  # type: ignore[import-untyped]  # noqa: F401 - late: JAX writes its programs with it
    except ImportError as error:
        raise ConfigError("exporting needs flatbuffers: pip install 'alto_jax[export]'") from error
    cfg = programs.portable(model.cfg)
    wanted, prompt = programs.tokenizer_programs(cfg), None
    if model.text is not None:
        settings = Settings.of(cfg.tokenizer.num_latent_tokens, None, {"forced_prefix": forced_prefix})
        prompt = _prompt(model, settings.forced, prompt_tokens)
        wanted.append(programs.segment_program(cfg, settings.generate, model.text.ids, prompt["max_tokens"]))
    leaves, tree = jax.tree_util.tree_flatten_with_path(model.params)
    weights = {
        "/".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path): leaf for path, leaf in leaves
    }
    out.mkdir(parents=True, exist_ok=True)
    about = {program.name: _write_program(program, weights, tree, platforms, out) for program in wanted}
    used = dict.fromkeys(name for program in about.values() for name in program["weights"])
    _write_weights(out / loader.WEIGHTS, {name: weights[name] for name in used})
    tokenizer = cfg.tokenizer
    about_model: dict[str, Any] = {
        "mask_size": tokenizer.mask_size,
        "image_size": tokenizer.image_size,
        "num_latent_tokens": tokenizer.num_latent_tokens,
        "codebook_size": tokenizer.codebook_size,
        "has_image_features": tokenizer.sam is not None,
    }
    manifest = {
        "format": loader.FORMAT,
        "checkpoint": model.identity,
        "alto_jax": alto_jax.__version__,
        "jax": jax.__version__,
        "platforms": list(platforms),
        "model": about_model,
        "programs": about,
    }
    if prompt is not None:
        about_model["vision_size"] = cfg.need_vision().image_size
        manifest["prompt"] = prompt
        model.text.save(out)
    shutil.copyfile(loader.__file__, out / LOADER)
    # Note: last, since a folder with a manifest counts as whole.
    write_whole(out / loader.MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    return manifest


def _prompt(model: LoadedModel, forced: bool, room: int) -> dict[str, Any]:
    """How requests are worded: the turns' texts with "{}" for the phrase, and how many tokens fit."""
    system, text = model.meta["data"]["system"], model.text
    begin = words.FORCED_ANSWER_PREFIX if forced else ""

    def turns(adaptive: bool) -> list[str]:
        asked = words.question("{}", adaptive=adaptive).replace(words.reference("{}"), "{}")
        placed = place_images([{"from": "human", "value": asked}], model.cfg.num_image_tokens)
        found = words.template_text(placed, system)
        return [*found[:-1], found[-1] + begin]

    prompts = {"adaptive": turns(True), "full": turns(False)}
    start = [] if text.ids.bos is None else [text.ids.bos]
    longest = max(len(start) + sum(len(text.encode(turn)) for turn in found) for found in prompts.values())
    return prompts | {
        "begin": start,
        "pad": text.ids.pad,
        "reserved_ids": sorted(text.reserved_ids),
        "max_tokens": bucket_length(longest + room),
        "forced_prefix": forced,
    }


def _write_program(
    program: Program, weights: Mapping[str, Any], tree: Any, platforms: Sequence[str], out: pathlib.Path
) -> dict[str, Any]:
    """Writes a program's file; returns what the manifest says of it."""
    from jax import export  # late: not part of what `import jax` brings

    names = list(weights)

    def run(given: dict[str, Any], *arrays: Any) -> tuple[jax.Array, ...]:
        # Note: weights that are not given are not read.
        return program.function(jax.tree_util.tree_unflatten(tree, [given.get(name) for name in names]), *arrays)

    like = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in weights.items()}
    shapes = lambda rows: [jax.ShapeDtypeStruct((rows, *shape), dtype) for _, shape, dtype in program.inputs]
    traced = jax.make_jaxpr(run)(like, *shapes(1)).jaxpr
    read = {id(variable) for equation in traced.eqns for variable in equation.invars}
    kept = [name for name, variable in zip(sorted(names), traced.invars) if id(variable) in read]
    [rows] = export.symbolic_shape("b")
    exported = export.export(jax.jit(run), platforms=list(platforms))(
        {name: like[name] for name in kept}, *shapes(rows)
    )
    content = bytes(exported.serialize())
    file = f"{program.name}.stablehlo"
    write_whole(out / file, content)
    results = [
        {"name": name, "shape": ["b", *aval.shape[1:]], "dtype": str(aval.dtype)}
        for name, aval in zip(program.outputs, exported.out_avals, strict=True)
    ]
    inputs = [
        {"name": name, "shape": ["b", *shape], "dtype": str(np.dtype(dtype))} for name, shape, dtype in program.inputs
    ]
    return {
        "file": file,
        "sha256": hashlib.sha256(content).hexdigest(),
        "calling_convention": exported.calling_convention_version,
        "inputs": inputs,
        "outputs": results,
        "weights": kept,
    }


def _write_weights(file: pathlib.Path, weights: Mapping[str, Any]) -> None:
    """A safetensors file, an array at a time, so that a large model is never held twice."""
    header, end = {}, 0
    for name, array in weights.items():
        begin, end = end, end + array.size * array.dtype.itemsize
        dtype = _NAMES[np.dtype(array.dtype)]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    temporary = file.with_name(f".{file.name}.tmp")
    with temporary.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for array in weights.values():
            opened.write(np.ascontiguousarray(jax.device_get(array)).tobytes())
    os.replace(temporary, file)
