"""Low-rank adapters: W' = W + alpha / rank * A B beside the kernels of matrix products, W frozen.

    python -m alto_jax.main --config=configs/stage2.py:8b --config.lora.rank=16 --config.init_from=BASE --workdir=RUN
    python -m alto_jax.lora merge RUN OUT

The adapters lie beside their kernel, `.../q/kernel`, `.../q/lora_a`, `.../q/lora_b`: A is [layers, in..., rank], B
(zero at the start) [layers, rank, out...], so that the scan over layers slices them too. In training `applied` adds
(x A) B to what the layer gives; W' is never built. Checkpoints of such a run hold adapters and their optimizer
state alone; the base is read again from `init_from`. `merge` writes W' as a checkpoint like any other.
Source: LoRA (Hu et al., 2021).
"""

import argparse
import contextlib
import math
import pathlib
import re
import shutil
from typing import Any

from alto_jax import cli

_CONVOLUTION = re.compile(r"(conv\w*|patch_embed|spatial_mapper|shortcut)/kernel$")


def _dims(path: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """(layers, in, out) dimensions of a kernel."""
    layers = 1 if "/layers/" in path else 0
    inner = 2 if re.search("attn/out/kernel$", path) else 1
    return shape[:layers], shape[layers : layers + inner], shape[layers + inner :]


def make_adapters(params: dict, cfg: Any, key: Any) -> dict:
    """New adapters for all kernels that `cfg.targets` names, float32, with B = 0.

    Args:
      params: nested dict of the base's parameters (or their shapes).
      cfg: LoraConfig.
      key: random key.

    Returns:
      A nested dict with `lora_a` and `lora_b` beside each kernel; leaves of `params` are not in it.

    Raises:
      ValueError: the regex names no kernel, or a convolution's.
    """
    from flax import traverse_util
    import jax
    import jax.numpy as jnp

    flat = traverse_util.flatten_dict(params, sep="/")
    paths = [p for p in sorted(flat) if p.endswith("/kernel") and re.search(cfg.targets, p)]
    if not paths:
        raise ValueError(f"config.lora.targets: {cfg.targets!r} names no kernel")
    convolutions = [p for p in paths if _CONVOLUTION.search(p)]
    if convolutions:
        raise ValueError(f"config.lora.targets: {cfg.targets!r} names a convolution, {convolutions[0]}")
    adapters = {}
    for index, path in enumerate(paths):
        layers, inner, outer = _dims(path, flat[path].shape)
        scale = math.prod(inner) ** -0.5
        draw = jax.random.normal(jax.random.fold_in(key, index), (*layers, *inner, cfg.rank))
        adapters[path.removesuffix("kernel") + "lora_a"] = draw * scale
        adapters[path.removesuffix("kernel") + "lora_b"] = jnp.zeros((*layers, cfg.rank, *outer))
    return traverse_util.unflatten_dict(adapters, sep="/")


@contextlib.contextmanager
def applied(cfg: Any):
    """While a function is traced in this `with` block, layers with adapters add their part to what they give."""
    if not cfg.rank:
        yield
        return
    from alto_jax import layers

    with layers.adapted(cfg.alpha / cfg.rank):
        yield


def without_adapters(params: dict) -> dict:
    """The base alone."""
    from flax import traverse_util

    flat = traverse_util.flatten_dict(params, sep="/")
    return traverse_util.unflatten_dict({p: v for p, v in flat.items() if not re.search("/lora_[ab]$", p)}, sep="/")


def merged(params: dict, cfg: Any) -> dict:
    """Base and adapters → parameters of the plain model, W + alpha / rank * A B, computed in float32."""
    from flax import traverse_util
    import jax
    import jax.numpy as jnp

    flat = traverse_util.flatten_dict(params, sep="/")
    out = {p: v for p, v in flat.items() if not re.search("/lora_[ab]$", p)}
    for path in (p for p in flat if p.endswith("/lora_a")):
        kernel = path.removesuffix("lora_a") + "kernel"
        a, b, w = flat[path], flat[path.removesuffix("a") + "b"], flat[kernel]
        layers, inner, outer = _dims(kernel, w.shape)
        a = a.astype(jnp.float32).reshape(*layers, math.prod(inner), cfg.rank)
        b = b.astype(jnp.float32).reshape(*layers, cfg.rank, math.prod(outer))
        delta = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST).reshape(w.shape)
        out[kernel] = (w.astype(jnp.float32) + cfg.alpha / cfg.rank * delta).astype(w.dtype)
    return traverse_util.unflatten_dict(out, sep="/")


def merge(run: str, out: str) -> pathlib.Path:
    """Writes base plus adapters of a run as a checkpoint of parameters alone, for any command.

    Raises:
      FileNotFoundError: no checkpoint in `run`.
      ValueError: `run` has no adapters, or `out` already holds a checkpoint.
    """
    from flax import traverse_util
    import jax
    import numpy as np

    from alto_jax.checkpoint import loading, runs
    from alto_jax.parallel import sharding

    meta, target = runs.load_meta(run), pathlib.Path(out)
    if not meta.get("lora"):
        raise ValueError(f"{run}: its checkpoint has no adapters (config.lora.rank was 0)")
    if (target / runs.CHECKPOINTS).exists():
        raise ValueError(f"{out}: holds a checkpoint already")
    model = loading.load_model(run, sharding.make_mesh(sharding.MeshConfig(), jax.devices()))
    flat = traverse_util.flatten_dict(model.params, sep="/")

    def fill(sinks):
        for path, sink in sinks.items():
            sink[...] = np.asarray(flat[path])

    dropped = ("lora", "base", "base_identity", "checksums", "metric")
    plain = {name: value for name, value in model.meta.items() if name not in dropped}
    target.mkdir(parents=True, exist_ok=True)
    runs.save_params(target, {p: (v.shape, v.dtype) for p, v in flat.items()}, fill, plain)
    if (model.directory / "tokenizer.json").exists():
        shutil.copy(model.directory / "tokenizer.json", target / "tokenizer.json")
    return target


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m alto_jax.lora", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("merge", help="base + adapters of a run → a checkpoint like any other")
    command.add_argument("run", help="the run's directory")
    command.add_argument("out", help="a new directory")
    arguments = parser.parse_args()
    print(f"merged into {merge(arguments.run, arguments.out)}")
    return 0


if __name__ == "__main__":
    cli.run(main)
