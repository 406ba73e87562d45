"""Parameters as nested dicts of arrays, addressed by paths "a/b/c": joined, split, cast and rounded to 8 bits."""

from collections.abc import Iterable, Sequence
import re
from typing import Any

from flax import traverse_util
import jax
from jax.custom_derivatives import SymbolicZero
import jax.numpy as jnp

from alto_jax.config import ConfigError, Quantize


def split_params(params: dict, trainable: str) -> tuple[dict, dict]:
    """Splits a nested dict by a regex on "a/b/c" paths into (trainable, frozen).

    Raises:
      ValueError: the regex matches no parameter.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    chosen = {path for path in flat if re.search(trainable, path)}
    if not chosen:
        raise ValueError(f"config.optim.trainable: {trainable!r} matches no parameter; top level: {sorted(params)}")

    def pick(keep: bool) -> dict:
        return traverse_util.unflatten_dict({p: v for p, v in flat.items() if (p in chosen) == keep}, sep="/")

    return pick(True), pick(False)


def watched(params: dict, reached: set[str]) -> dict:
    """The same parameters, whose paths are added to `reached` when a gradient that arrives at them is traced.

    Known from the structure of the program, not from numbers: what is cut off (never read, or behind a stop_gradient)
    is not reached, whatever the data.
    """

    @jax.custom_vjp
    def mark(tree: Any) -> Any:
        return tree

    def forward(tree: Any) -> tuple[Any, None]:
        return jax.tree.map(lambda primal: primal.value, tree), None

    def backward(_: None, gradients: Any) -> tuple[Any]:
        is_cut = lambda gradient: isinstance(gradient, SymbolicZero)
        flat = traverse_util.flatten_dict(gradients, sep="/")
        reached.update(path for path, gradient in flat.items() if not is_cut(gradient))
        filled = lambda gradient: jnp.zeros(gradient.shape, gradient.dtype) if is_cut(gradient) else gradient
        return (jax.tree.map(filled, gradients),)

    mark.defvjp(forward, backward, symbolic_zeros=True)
    return mark(params)


def merge_params(*trees: Any) -> Any:
    """Joins nested dicts with disjoint leaves; where several have a tuple of dicts, these are joined one by one."""
    if isinstance(trees[0], tuple):
        return tuple(merge_params(*rows) for rows in zip(*trees, strict=True))
    names = dict.fromkeys(name for tree in trees for name in tree)
    found = {name: [tree[name] for tree in trees if name in tree] for name in names}
    return {name: values[0] if len(values) == 1 else merge_params(*values) for name, values in found.items()}


def cast(params: dict, dtype: str, *, keep: str = "^$") -> dict:
    """The parameters in `dtype` ("": as they are), but for paths that match the regex `keep`."""
    if not dtype:
        return params
    flat = traverse_util.flatten_dict(params, sep="/")
    return traverse_util.unflatten_dict(
        {p: v if re.search(keep, p) else v.astype(dtype) for p, v in flat.items()}, sep="/"
    )


def kernel_dims(path: str, shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """(layers, in, out) dimensions of a kernel of a matrix product; `layers` is empty outside of a stack."""
    lead = 1 if "/layers/" in f"/{path}" else 0
    inner = 2 if re.search("attn/out/kernel$", path) else 1
    return tuple(shape[:lead]), tuple(shape[lead : lead + inner]), tuple(shape[lead + inner :])


def to_8_bits(x: jax.Array, axes: int | tuple[int, ...], kind: Quantize = "int8") -> tuple[jax.Array, jax.Array]:
    """An array as (values of 8 bits, float32 scales), x ≈ values * scales, one scale for all elements along `axes`.

    Args:
      x: float array.
      axes: the dimensions that the scales do not have.
      kind: "int8" (-127..127) or "fp8" (float8_e4m3fn, up to 448).
    """
    x = x.astype(jnp.float32)
    largest = 127.0 if kind == "int8" else float(jnp.finfo(jnp.float8_e4m3fn).max)
    scale = jnp.max(jnp.abs(x), axis=axes, keepdims=True) / largest
    scaled = x / jnp.where(scale > 0, scale, 1)
    values = jnp.rint(scaled).astype(jnp.int8) if kind == "int8" else scaled.astype(jnp.float8_e4m3fn)
    return values, jnp.squeeze(scale, axes)


def quantized(params: Any, kernels: str, kind: Quantize) -> Any:
    """Parameters whose kernels on paths that match `kernels` have 8 bits and are called `kernel_t`, with
    `kernel_scale` beside them.

    Outputs come before inputs there, [layers, out..., in...], so that the numbers which are added up lie together. A
    scale belongs to one output (float32[layers, out...]): of all that is added up in it, the largest becomes the
    largest number of the type. Kernels that have 8 bits already stay as they are.

    Args:
      params: nested dict; layers may be a tuple of dicts instead of stacked.
      kernels: regex on "a/b/c".
      kind: "int8" or "fp8"; "": the parameters as they are.
    """

    def visit(tree: Any, path: str, stacked: bool) -> Any:
        if isinstance(tree, tuple):
            return tuple(visit(row, path, False) for row in tree)
        if not isinstance(tree, dict):
            return tree
        out = {name: visit(value, f"{path}{name}/", stacked) for name, value in tree.items()}
        name, kernel = f"{path}kernel", out.get("kernel")
        if kernel is not None and re.search(kernels, name):
            lead = len(kernel_dims(name, kernel.shape)[0]) if stacked else 0
            inner = len(kernel_dims(name, kernel.shape)[1])
            values, out["kernel_scale"] = to_8_bits(out.pop("kernel"), tuple(range(lead, lead + inner)), kind)
            order = *range(lead), *range(lead + inner, values.ndim), *range(lead, lead + inner)
            out["kernel_t"] = jnp.transpose(values, order)
        return out

    return visit(params, "", True) if kind else params


def refuse_quantized(paths: Iterable[str], where: str) -> None:
    """Raises ConfigError if parameters that are to be saved at `where`, by their paths, have kernels of 8 bits."""
    found = next((path for path in sorted(paths) if path.endswith("/kernel_scale")), None)
    if found is not None:
        kernel = found.removesuffix("_scale")
        raise ConfigError(
            f"{where}: {kernel} has 8 bits, which are for inference alone; expected the parameters it was made of"
        )
