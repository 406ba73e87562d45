"""Parameters as nested dicts of arrays, addressed by paths "a/b/c": joined, split and cast."""

import re
from typing import Any

from flax import traverse_util
import jax
from jax.custom_derivatives import SymbolicZero
import jax.numpy as jnp


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


def merge_params(*trees: dict) -> dict:
    """Joins nested dicts with disjoint leaves."""
    flat: dict = {}
    for tree in trees:
        flat.update(traverse_util.flatten_dict(tree, sep="/"))
    return traverse_util.unflatten_dict(flat, sep="/")


def cast(params: dict, dtype: str, *, keep: str = "^$") -> dict:
    """The parameters in `dtype` ("": as they are), but for paths that match the regex `keep`."""
    if not dtype:
        return params
    flat = traverse_util.flatten_dict(params, sep="/")
    return traverse_util.unflatten_dict(
        {p: v if re.search(keep, p) else v.astype(dtype) for p, v in flat.items()}, sep="/"
    )
