"""How a table of rules moves weights between a PyTorch state dict and our parameter tree, both ways.

A `Rule` says which source tensors make up which parameters, their shapes on both sides, and the two
transforms. Rules with `layers` repeat for every layer and meet a stacked parameter row by row. Importing
checks that every source key is used or ignored for a stated reason, that shapes and dtypes fit, and that
every parameter is filled; anything else is a `MappingError` that names it.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
import dataclasses
import functools
import math
import os
import re
from typing import Any

import numpy as np

Shape = tuple[int | None, ...]
Tensors = Mapping[str, np.ndarray]
Arrays = tuple[np.ndarray, ...]
_SQUARE = 256  # side of the squares in which large matrices are transposed


class MappingError(ValueError):
    """Weights that do not fit; the message names the keys or parameters."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """Source tensors ↔ parameters.

    Attributes:
      sources: (key, shape) of the PyTorch tensors; "{}" in a key stands for the layer's number and None in a
        shape for any size.
      targets: (path, shape) of our parameters, paths joined by "/", shapes without the stacking axis. Empty
        for a constant of the source (a buffer).
      forward: source arrays → target arrays.
      inverse: target arrays → source arrays.
      layers: the numbers of the source layers, in the order of the stacked axis; None: not stacked.
    """

    sources: tuple[tuple[str, Shape], ...]
    targets: tuple[tuple[str, Shape], ...]
    forward: Callable[..., Arrays]
    inverse: Callable[..., Arrays]
    layers: tuple[int, ...] | None = None

    def keys(self, row: int | None) -> list[str]:
        """The source keys of row `row` of the stack (None: not stacked)."""
        return [key if row is None else key.format(self.layers[row]) for key, _ in self.sources]

    def rows(self) -> list[int | None]:
        """The rows of the stack, or [None]."""
        return [None] if self.layers is None else list(range(len(self.layers)))

    def at(self, source: str = "", target: str = "", layers: tuple[int, ...] | None = None) -> "Rule":
        """The same rule with prefixes added to its keys and paths, and its layers set if given."""
        return dataclasses.replace(
            self,
            sources=tuple((source + key, shape) for key, shape in self.sources),
            targets=tuple((target + path, shape) for path, shape in self.targets),
            layers=self.layers if layers is None else layers,
        )


@dataclasses.dataclass(frozen=True)
class Table:
    """The rules of a kind of checkpoint.

    Attributes:
      rules: all of them.
      ignored: (regex of source keys, reason): not an error, and not used.
      unfilled: (regex of parameter paths, reason): parameters that this kind of checkpoint does not hold.
    """

    rules: tuple[Rule, ...]
    ignored: tuple[tuple[str, str], ...] = ()
    unfilled: tuple[tuple[str, str], ...] = ()

    def source_keys(self) -> set[str]:
        """Every source key that a rule uses."""
        return {key for rule in self.rules for row in rule.rows() for key in rule.keys(row)}

    def ignored_reason(self, key: str) -> str | None:
        """Why a source key is not used, or None."""
        return next((reason for pattern, reason in self.ignored if re.fullmatch(pattern, key)), None)

    def target_shapes(self) -> dict[str, Shape]:
        """Every parameter that a rule fills, with its shape (stacked axis included)."""
        shapes = {}
        for rule in self.rules:
            for path, shape in rule.targets:
                if path in shapes:
                    raise MappingError(f"two rules fill the parameter {path}")
                shapes[path] = shape if rule.layers is None else (len(rule.layers), *shape)
        return shapes


def permuted(key: str, path: str, source: Shape, split: Shape, order: tuple[int, ...], target: Shape) -> Rule:
    """One tensor: reshape `source` to `split`, transpose by `order`, reshape to `target`."""
    back = tuple(int(i) for i in np.argsort(order))
    moved = tuple(split[i] for i in order)
    return Rule(
        ((key, source),),
        ((path, target),),
        lambda x: (x.reshape(split).transpose(order).reshape(target),),
        lambda x: (x.reshape(moved).transpose(back).reshape(source),),
    )


def reshaped(key: str, path: str, source: Shape, target: Shape | None = None) -> Rule:
    """One tensor whose elements keep their order."""
    return permuted(key, path, source, source, tuple(range(len(source))), source if target is None else target)


def norm(key: str, path: str, dim: int, bias: bool = True) -> list[Rule]:
    """LayerNorm, GroupNorm or (without bias) RMSNorm."""
    rules = [reshaped(f"{key}.weight", f"{path}/scale", (dim,))]
    return rules + [reshaped(f"{key}.bias", f"{path}/bias", (dim,))] if bias else rules


def dense(
    key: str, path: str, inputs: Shape, outputs: Shape, bias: bool = True, *,
    trailing: int = 0, names: tuple[str, str] = (".weight", ".bias"),
) -> list[Rule]:  # fmt: skip
    """A linear layer: weight (out, in) ↔ kernel [*inputs, *outputs], bias (out) ↔ [*outputs].

    Args:
      key, path: prefixes of both sides.
      inputs, outputs: shape of the kernel's input and output axes.
      bias: whether there is one.
      trailing: axes of size 1 at the end of the weight (2 for a 1x1 convolution).
      names: what follows `key` for the weight and the bias.
    """
    num_in, num_out = int(np.prod(inputs)), int(np.prod(outputs))
    weight = permuted(
        key + names[0],
        f"{path}/kernel",
        (num_out, num_in) + (1,) * trailing,
        (num_out, num_in),
        (1, 0),
        inputs + outputs,
    )
    return [weight] + ([reshaped(key + names[1], f"{path}/bias", (num_out,), outputs)] if bias else [])


def conv(key: str, path: str, size: int, inputs: int, outputs: int, bias: bool = True) -> list[Rule]:
    """A square convolution: weight (out, in, h, w) ↔ kernel [h, w, in, out]."""
    source, target = (outputs, inputs, size, size), (size, size, inputs, outputs)
    weight = permuted(f"{key}.weight", f"{path}/kernel", source, source, (2, 3, 1, 0), target)
    return [weight] + ([reshaped(f"{key}.bias", f"{path}/bias", (outputs,))] if bias else [])


def constant(key: str, value: np.ndarray) -> Rule:
    """A buffer of the source with a known value: checked on import, written on export."""

    def check(x):
        if not np.array_equal(x, value):
            raise MappingError(f"{key}: holds other values than the ones that its configuration implies")
        return ()

    return Rule(((key, value.shape),), (), check, lambda: (value,))


def _few(names) -> str:
    names = sorted(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def check_keys(table: Table, keys) -> None:
    """Raises MappingError if a key is neither used nor ignored, or if a needed key is missing."""
    keys, needed = set(keys), table.source_keys()
    if missing := needed - keys:
        raise MappingError(f"missing in the source: {_few(missing)}")
    if extra := {key for key in keys - needed if table.ignored_reason(key) is None}:
        raise MappingError(f"not known in the source: {_few(extra)}")


def check_filled(table: Table, expected: Mapping[str, Shape]) -> None:
    """Raises MappingError unless the rules fill exactly the parameters `expected` (path → shape)."""
    filled = table.target_shapes()
    unfilled = {
        path for path in set(expected) - set(filled) if not any(re.fullmatch(p, path) for p, _ in table.unfilled)
    }
    if unfilled:
        raise MappingError(f"parameters that no rule fills: {_few(unfilled)}")
    if unknown := set(filled) - set(expected):
        raise MappingError(f"rules for parameters that the model lacks: {_few(unknown)}")
    for path, shape in filled.items():
        if tuple(expected[path]) != tuple(shape):
            raise MappingError(f"{path}: the rule gives shape {shape}, the model has {tuple(expected[path])}")


def _read(tensors: Tensors, key: str, shape: Shape) -> np.ndarray:
    """Loads a tensor and checks its shape."""
    array = np.asarray(tensors[key])
    if len(array.shape) != len(shape) or any(want not in (None, got) for want, got in zip(shape, array.shape)):
        raise MappingError(f"{key}: expected shape {shape}, got {array.shape}")
    return array


def import_tensors(
    table: Table, tensors: Tensors, allocate: Callable[[str, tuple, Any], np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """Applies a table to a source, one source tensor (of one layer) at a time.

    Args:
      table: the rules.
      tensors: key → array; may load lazily.
      allocate: (path, shape, dtype) → array to write a parameter into (default: in memory).

    Returns:
      Path → parameter, in the dtype of the source.
    """
    check_keys(table, tensors.keys())
    allocate = allocate or (lambda path, shape, dtype: np.empty(shape, dtype))
    params: dict[str, np.ndarray] = {}
    for rule in table.rules:
        for row in rule.rows():
            arrays = [_read(tensors, key, shape) for key, (_, shape) in zip(rule.keys(row), rule.sources)]
            for (path, shape), value in zip(rule.targets, rule.forward(*arrays)):
                if path not in params:
                    full = shape if row is None else (len(rule.layers), *shape)
                    params[path] = allocate(path, full, value.dtype)
                if {a.dtype for a in arrays} != {params[path].dtype}:
                    found = sorted({str(a.dtype) for a in arrays} | {str(params[path].dtype)})
                    raise MappingError(
                        f"{', '.join(rule.keys(row))}: dtypes differ within the parameter {path}: {found}"
                    )
                params[path][... if row is None else row] = value
    return params


def export_tensors(table: Table, params: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """The inverse: yields (source key, array) from path → parameter, one tensor at a time."""
    wanted = table.target_shapes()
    if missing := set(wanted) - set(params):
        raise MappingError(f"parameters missing for the export: {_few(missing)}")
    if extra := set(params) - set(wanted):
        raise MappingError(f"parameters that no rule exports: {_few(extra)}")
    for path, shape in wanted.items():
        if len(params[path].shape) != len(shape) or tuple(params[path].shape) != tuple(shape):
            raise MappingError(f"{path}: expected shape {shape}, got {tuple(params[path].shape)}")
    for rule in table.rules:
        for row in rule.rows():
            arrays = [np.asarray(params[path] if row is None else params[path][row]) for path, _ in rule.targets]
            for key, value in zip(rule.keys(row), rule.inverse(*arrays)):
                yield key, contiguous(value)


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count())


def contiguous(array: np.ndarray) -> np.ndarray:
    """The array in C order; a large transposed one is copied in squares on all cores, far faster than numpy does."""
    array = np.asarray(array)
    if array.flags.c_contiguous or array.nbytes < 1 << 20:
        return np.ascontiguousarray(array)
    for axis in range(1, array.ndim):
        try:
            matrix = array.reshape(math.prod(array.shape[:axis]), -1, copy=False)
        except ValueError:
            continue
        if matrix.strides[0] < matrix.strides[1]:
            out = np.empty(matrix.shape, array.dtype)

            def copy(i: int, out: np.ndarray = out, matrix: np.ndarray = matrix) -> None:
                for j in range(0, matrix.shape[1], _SQUARE):
                    square = (slice(i, i + _SQUARE), slice(j, j + _SQUARE))
                    out[square] = matrix[square]

            list(_threads().map(copy, range(0, len(matrix), _SQUARE)))
            return out.reshape(array.shape)
    return np.ascontiguousarray(array)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts → {"a/b/c": leaf}."""
    flat = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        flat.update(flatten(value, path + "/") if isinstance(value, Mapping) else {path: value})
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree
