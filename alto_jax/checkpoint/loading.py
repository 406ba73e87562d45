"""A checkpoint opened for use (prediction, evaluation, merging of adapters)."""

import dataclasses
import functools
import hashlib
import os
import pathlib
from typing import Any

import jax

from alto_jax.checkpoint import runs
from alto_jax.config import build, to_dict
from alto_jax.lora import adapters
from alto_jax.lora.adapters import LoraConfig
from alto_jax.mllm import language_model
from alto_jax.mllm.alto_llm import ModelConfig, init_params
from alto_jax.mllm.text import TextTokenizer
from alto_jax.parallel import sharding
from alto_jax.params import merge_params


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
) -> LoadedModel:
    """Opens a checkpoint of a run with its parameters placed on the mesh, adapters merged.

    Args:
      directory: of the run.
      mesh: where the parameters go; None: the first device.
      step: which one; None: the newest that can be read.
      for_inference: the language model's parameters in the type that it computes in and each layer's apart, as its loop
        of tokens wants them (`language_model.for_inference`); False: as they are saved.

    Raises:
      FileNotFoundError: no complete checkpoint there.
      ConfigError: there is no such step.
      ValueError: the checkpoint lacks parameters of its own model, or cannot be read.
    """
    root, _ = runs.find_run(directory, made_by=runs.MADE_BY)
    if mesh is None:
        mesh = sharding.make_mesh(sharding.MeshConfig(data=1), jax.devices()[:1])

    def read(folder: pathlib.Path) -> runs.Found:
        cfg, lora, abstract = _wanted(runs.read_meta(folder), root, mesh)
        return runs.read_params(str(directory), abstract["adapters" if lora else "model"], None, folder)

    found, step = runs.newest_readable(root, read, step)
    meta, params = runs.described(found), runs.joined(found)
    cfg, lora, abstract = _wanted(meta, root, mesh)
    if lora:
        base = load_base(meta, abstract["model"], str(directory))
        params = jax.jit(lambda b, a: adapters.merged(merge_params(b, a), lora))(base, params)
    else:
        runs.require_complete(params, abstract["model"], str(directory))
    if for_inference and cfg.language_model is not None:
        convert = jax.jit(functools.partial(language_model.for_inference, cfg.language_model))
        params = {**params, "language_model": convert(params["language_model"])}
    saved = (root / runs.CHECKPOINTS / str(step) / "_CHECKPOINT_METADATA").read_bytes()
    name = f"{meta['stage']} step {step} {hashlib.sha256(saved).hexdigest()[:12]}"
    text = TextTokenizer.load(root) if cfg.language_model is not None else None
    return LoadedModel(root, meta, cfg, params, text, name)


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
    base = str(runs.find_run(config.init_from)[0])
    return {"lora": to_dict(config.lora), "base": base, "base_identity": runs.identity(base)}


def load_base(meta: dict, abstract: dict, directory: str) -> dict:
    """The parameters that the adapters of a run were trained on.

    Raises:
      ValueError: they are not there any more, or have changed.
    """
    base = meta["base"]
    try:
        found = runs.identity(base)
    except FileNotFoundError as error:
        raise runs.Mismatch(f"{directory}: holds adapters alone, and their base is gone: {error}") from error
    if found != meta["base_identity"]:
        raise runs.Mismatch(
            f"{directory}: its adapters belong to {base} at {meta['base_identity']}, which is now at {found}"
        )
    params = runs.load_params(base, abstract)
    runs.require_complete(params, abstract, base)
    return params
