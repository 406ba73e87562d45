"""Low-rank adapters: W' = W + alpha / rank * A B beside the kernels of matrix products, W frozen.

The adapters lie beside their kernel, `.../q/kernel`, `.../q/lora_a`, `.../q/lora_b`: A is [layers, in..., rank], B
(zero at the start) [layers, rank, out...], so that the scan over layers slices them too. In training `applied` adds
(x A) B to what the layer gives; W' is never built. Checkpoints of such a run hold adapters and their optimizer
state alone; the base is read again from `init_from`. `python -m alto_jax.lora merge` writes W' as a checkpoint like
any other. Source: LoRA (Hu et al., 2021).
"""

from collections.abc import Collection, Iterator
import contextlib
import dataclasses
import math
import re

from flax import traverse_util
import jax
import jax.numpy as jnp

from alto_jax import layers
from alto_jax.config import ConfigError, require
from alto_jax.params import kernel_dims

_CONVOLUTION = re.compile(r"(conv\w*|patch_embed|spatial_mapper|shortcut)/kernel$")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters W + alpha / rank * A B, which alone are trained (and saved) if rank > 0; see `alto_jax.lora`.

    targets: regex of the kernels that get one (matrix products; not convolutions, embeddings).
    """

    rank: int = 0
    alpha: float = 16.0
    targets: str = "^language_model/blocks/.*/(q|kv|out|gate|up|down)/kernel$"

    def __post_init__(self) -> None:
        require(self.rank >= 0, "rank", self.rank, "at least 0")
        require(self.alpha > 0, "alpha", self.alpha, "more than 0")
        try:
            re.compile(self.targets)
        except re.error as error:
            raise ConfigError(f"targets: {self.targets!r} is not a regular expression: {error}") from error


def make_adapters(params: dict, cfg: LoraConfig, key: jax.Array) -> dict:
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
    flat = traverse_util.flatten_dict(params, sep="/")
    paths = [p for p in sorted(flat) if p.endswith("/kernel") and re.search(cfg.targets, p)]
    if not paths:
        raise ValueError(f"config.lora.targets: {cfg.targets!r} names no kernel")
    convolutions = [p for p in paths if _CONVOLUTION.search(p)]
    if convolutions:
        raise ValueError(f"config.lora.targets: {cfg.targets!r} names a convolution, {convolutions[0]}")
    adapters = {}
    for index, path in enumerate(paths):
        lead, inner, outer = kernel_dims(path, flat[path].shape)
        scale = math.prod(inner) ** -0.5
        draw = jax.random.normal(jax.random.fold_in(key, index), (*lead, *inner, cfg.rank))
        adapters[path.removesuffix("kernel") + "lora_a"] = draw * scale
        adapters[path.removesuffix("kernel") + "lora_b"] = jnp.zeros((*lead, cfg.rank, *outer))
    return traverse_util.unflatten_dict(adapters, sep="/")


@contextlib.contextmanager
def applied(cfg: LoraConfig) -> Iterator[None]:
    """While a function is traced in this `with` block, layers with adapters add their part to what they give."""
    if not cfg.rank:
        yield
        return
    with layers.adapted(cfg.alpha / cfg.rank):
        yield


def without_adapters(params: dict) -> dict:
    """The base alone."""
    flat = traverse_util.flatten_dict(params, sep="/")
    return traverse_util.unflatten_dict({p: v for p, v in flat.items() if not re.search("/lora_[ab]$", p)}, sep="/")


def merged(params: dict, cfg: LoraConfig, *, exact: bool = True) -> dict:
    """Base and adapters → parameters of the plain model, W + alpha / rank * A B in W's type.

    exact: computed in float32, for what is saved; False: A B is computed in W's type, as a layer with adapters does.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    out = {p: v for p, v in flat.items() if not re.search("/lora_[ab]$", p)}
    for path in (p for p in flat if p.endswith("/lora_a")):
        kernel = path.removesuffix("lora_a") + "kernel"
        a, b, w = flat[path], flat[path.removesuffix("a") + "b"], flat[kernel]
        lead, inner, outer = kernel_dims(kernel, w.shape)
        dtype = jnp.float32 if exact else w.dtype
        a = a.astype(dtype).reshape(*lead, math.prod(inner), cfg.rank)
        b = b.astype(dtype).reshape(*lead, cfg.rank, math.prod(outer))
        delta = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST).reshape(w.shape)
        out[kernel] = (w.astype(jnp.float32) + cfg.alpha / cfg.rank * delta).astype(w.dtype)
    return traverse_util.unflatten_dict(out, sep="/")


def beside(adapters: dict, paths: Collection[str]) -> dict:
    """Those of the adapters that lie beside parameters with these paths."""
    flat = traverse_util.flatten_dict(adapters, sep="/")
    return traverse_util.unflatten_dict(
        {p: v for p, v in flat.items() if re.sub("lora_[ab]$", "kernel", p) in paths}, sep="/"
    )
