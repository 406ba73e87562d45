"""A checkpoint opened for use (prediction, evaluation, merging of adapters)."""

import dataclasses
import functools
import os
import pathlib
from typing import Any

from flax import traverse_util
import jax
import numpy as np

from alto_jax.checkpoint import runs
from alto_jax.checkpoint.agreement import newest_in_parts
from alto_jax.config import QUANTIZE, Quantize, build, require, to_dict
from alto_jax.lora import adapters
from alto_jax.lora.adapters import LoraConfig
from alto_jax.mllm import language_model
from alto_jax.mllm.alto_llm import ModelConfig, init_params
from alto_jax.mllm.text import TextTokenizer
from alto_jax.parallel import sharding
from alto_jax.params import merge_params
from alto_jax.storage import bucket

AT_ONCE = 1 << 28  # bytes of saved parameters that are read and converted at once


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A checkpoint opened for use: its directory, what it said of itself, model configuration, parameters and (with a
    language model) text tokenizer. `identity` changes when the checkpoint is saved anew."""

    directory: pathlib.Path
    meta: dict
    cfg: Any
    params: dict
    text: Any
    identity: str


def load_model(
    directory: str | os.PathLike,
    mesh: jax.sharding.Mesh | None = None,
    step: int | None = None,
    *,
    for_inference: bool = False,
    quantize: Quantize = "",
) -> LoadedModel:
    """Opens a checkpoint of a run with its parameters placed on the mesh, adapters merged.

    Args:
      directory: of the run.
      mesh: where the parameters go; None: the first device.
      step: which one; None: the newest that can be read.
      for_inference: the language model's parameters in the type that it computes in and each layer's apart, as its loop
        of tokens wants them (`language_model.for_inference`); False: as they are saved. What is saved is read and
        converted part by part, the largest arrays first, so that it is never all there beside the result.
      quantize: with `for_inference`, type of 8 bits of the language model's kernels, "int8" or "fp8"; "": none.

    Raises:
      FileNotFoundError: no complete checkpoint there.
      ConfigError: there is no such step, or no language model to quantise.
      ValueError: the checkpoint lacks parameters of its own model, or cannot be read.
    """
    root, _ = runs.find_run(directory, made_by=runs.MADE_BY, step=step)
    require(quantize in QUANTIZE, "quantize", quantize, f"one of {QUANTIZE}")
    require(for_inference or not quantize, "quantize", quantize, "'' without for_inference")
    if mesh is None:
        mesh = sharding.make_mesh(sharding.MeshConfig(data=1), jax.devices()[:1])
    meta = runs.load_meta(directory, step)
    cfg, lora, abstract = _wanted(meta, root, mesh)
    language = cfg.language_model
    require(language is not None or not quantize, "quantize", quantize, f"'', {directory} being a mask tokenizer alone")
    added: dict = {}
    if lora:
        read = functools.partial(runs.read_params, str(directory), abstract["adapters"], None)
        found, step = runs.newest_readable(root, read, step)
        meta, added = runs.described(found), runs.joined(found)

    def convert(params: dict) -> dict:
        params = adapters.merged(params, lora) if lora else params
        if for_inference and "language_model" in params:
            found = language_model.for_inference(language, params["language_model"], quantize)
            params = {**params, "language_model": found}
        return params

    def keep(found: runs.Found) -> tuple[dict, list[str], dict]:
        params = runs.joined(found)
        paths = list(runs.flat(params))
        params = merge_params(params, adapters.beside(added, paths))
        if lora or for_inference:
            places = sharding.tree_shardings(jax.eval_shape(convert, params), mesh)
            params = jax.jit(convert, out_shardings=places)(params)
        return params, paths, runs.described(found)

    place = base_of(meta, str(directory)) if lora else root
    found_in = runs.find_run(place)[0] if lora else root
    groups = _groups(abstract["model"]) if for_inference else [abstract["model"]]
    reads = [functools.partial(runs.read_params, str(place), group, None) for group in groups]
    parts, read_step = newest_in_parts(found_in, reads, keep, None if lora else step)
    have = {path: True for _, paths, _ in parts for path in paths}
    runs.require_complete(traverse_util.unflatten_dict(have, sep="/"), abstract["model"], str(place))
    params = merge_params(*(part for part, _, _ in parts))
    if not lora:
        meta, step = parts[0][2], read_step
    name = f"{meta['stage']} {runs.identity(root, step)}" + f" {quantize}".rstrip()
    text = TextTokenizer.load(root) if language is not None else None
    return LoadedModel(root, meta, cfg, params, text, name)


def load_in_parts(directory: str | os.PathLike, abstract: dict) -> dict:
    """`runs.load_params` that is never there in more than one part beside the result: each part is read as float32,
    compared with its checksums, and then cast.

    Args:
      directory: a run's.
      abstract: nested dict of ShapeDtypeStructs (with shardings), in the types wanted.
    """
    float32 = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, np.float32, sharding=leaf.sharding)
    if all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(abstract)):
        return runs.load_params(directory, abstract)
    wanted = traverse_util.flatten_dict(abstract, sep="/")

    def keep(found: runs.Found) -> dict:
        flat = traverse_util.flatten_dict(runs.joined(found), sep="/")
        return {path: value.astype(wanted[path].dtype) for path, value in flat.items()}

    groups = _groups(jax.tree.map(float32, abstract))
    reads = [functools.partial(runs.read_params, str(directory), group, None) for group in groups]
    parts, _ = newest_in_parts(runs.find_run(directory)[0], reads, keep)
    return traverse_util.unflatten_dict({path: value for part in parts for path, value in part.items()}, sep="/")


def _groups(abstract: dict) -> list[dict]:
    """Parameters in groups to be read at once, from the largest array on: of AT_ONCE bytes at most, or a single one."""
    flat = traverse_util.flatten_dict(abstract, sep="/")
    size = {path: leaf.size * leaf.dtype.itemsize for path, leaf in flat.items()}
    groups: list[dict] = []
    for path in sorted(flat, key=lambda path: -size[path]):
        if not groups or sum(size[other] for other in groups[-1]) + size[path] > AT_ONCE:
            groups.append({})
        groups[-1][path] = flat[path]
    return [traverse_util.unflatten_dict(group, sep="/") for group in groups]


def _wanted(meta: dict, root: pathlib.Path, mesh: jax.sharding.Mesh) -> tuple[Any, Any, dict[str, Any]]:
    """What a step's description asks for: the model's configuration, that of its adapters (None: without), and the
    shapes of "model" and "adapters", placed on the mesh."""
    cfg = build(ModelConfig, meta["model"], f"{root}: model")
    if meta["stage"] in ("stage1", "stage1_5"):
        cfg = dataclasses.replace(cfg, vision=None, language_model=None)
    if meta["stage"] == "stage0":
        raise ValueError(f"{root}: a run of stage 0 has no mask tokenizer yet; go on with stage 2, then open that")
    lora = build(LoraConfig, meta["lora"], f"{root}: lora") if meta.get("lora") else None
    shapes = {"model": jax.eval_shape(lambda key: init_params(cfg, key), jax.random.key(0))}
    if lora:
        draw = lambda params: adapters.make_adapters(params, lora, jax.random.key(0))
        shapes["adapters"] = jax.eval_shape(draw, shapes["model"])
    return cfg, lora, jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
        shapes,
        {name: sharding.tree_shardings(tree, mesh) for name, tree in shapes.items()},
    )  # fmt: skip


def adapter_meta(config: Any) -> dict:
    """What a run of adapters says of its base: {"lora", "base", "base_identity"}; {} without adapters."""
    if not config.lora.rank:
        return {}
    # Note: of a base in a bucket its URL, not the copy on this machine.
    start = config.init_from
    base = bucket.place(start) if bucket.is_url(start) else str(runs.find_run(start)[0])
    return {"lora": to_dict(config.lora), "base": base, "base_identity": runs.identity(base)}


def base_of(meta: dict, directory: str) -> str:
    """Where the parameters lie that the adapters of a run were trained on: ALTO_BASE, if they have moved there, else
    where they were.

    Raises:
      ValueError: they are not there any more, or have changed.
    """
    base = os.environ.get("ALTO_BASE") or meta["base"]
    try:
        found = runs.identity(base)
    except FileNotFoundError as error:
        raise runs.Mismatch(
            f"{directory}: holds adapters alone, and their base is gone (ALTO_BASE=DIR says where it is now): {error}"
        ) from error
    if found != meta["base_identity"]:
        raise runs.Mismatch(
            f"{directory}: its adapters belong to {meta['base']} at {meta['base_identity']}, {base} is at {found}"
        )
    return base


def load_base(meta: dict, abstract: dict, directory: str) -> dict:
    """The parameters that the adapters of a run were trained on.

    Raises:
      ValueError: they are not there any more, or have changed.
    """
    base = base_of(meta, directory)
    params = runs.load_params(base, abstract)
    runs.require_complete(params, abstract, base)
    return params
