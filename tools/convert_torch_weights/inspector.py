"""What is in a checkpoint: its parameter tree with shapes, dtypes and sizes; and how two checkpoints differ."""

from collections.abc import Mapping
import math
from pathlib import Path
from typing import Any

import numpy as np

from alto_jax.checkpoint import rows, runs

from .sources import open_source


def tensors_of(path: Path, step: int | None = None) -> dict[str, Any]:
    """Name → lazy array (shape, dtype, np.asarray) of one of our checkpoints (of a step) or of a PyTorch one."""
    if (path / runs.CHECKPOINTS).is_dir() or path.name == runs.CHECKPOINTS:
        return dict(rows.open_params(path, step))
    source = open_source(path)
    return {key: _Tensor(entry) for key, entry in source.entries.items()}


class _Tensor:
    """An entry of a PyTorch checkpoint as a lazy array."""

    def __init__(self, entry: Any):
        self._entry, self.shape, self.dtype, self.nbytes = entry, entry.shape, entry.dtype, entry.nbytes

    def __getitem__(self, row: int) -> np.ndarray:
        if row == 0:
            self._whole = self._entry.load()
        return self._whole[row]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self._entry.load()
        return array if dtype is None else array.astype(dtype)


def size_text(nbytes: int) -> str:
    """ "805 MB" """
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.{0 if nbytes >= 10 * factor else 1}f} {unit}"
    return f"{nbytes} B"


def tree_lines(tensors: Mapping[str, Any], separator: str = "/", depth: int | None = None) -> list[str]:
    """One line per parameter (or, below `depth` levels, per group), with a total at the end."""
    groups: dict[str, list[Any]] = {}
    for name in sorted(tensors):
        parts = name.split(separator)
        label = name if depth is None or len(parts) <= depth else separator.join([*parts[:depth], "*"])
        groups.setdefault(label, []).append(tensors[name])
    width = max((len(label) for label in groups), default=0)
    lines = []
    for label, members in groups.items():
        dtypes = ", ".join(sorted({str(t.dtype) for t in members}))
        what = str(list(members[0].shape)) if len(members) == 1 else f"{len(members)} parameters"
        lines.append(f"{label:{width}}  {what:24}  {dtypes:10}  {size_text(sum(t.nbytes for t in members)):>8}")
    count = sum(math.prod(t.shape) for t in tensors.values())
    nbytes = sum(t.nbytes for t in tensors.values())
    return [*lines, f"{len(tensors)} parameters, {count:,} values, {size_text(nbytes)}"]


def difference_lines(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """How two checkpoints differ: names, shapes, dtypes, and the largest difference of values."""
    lines = [f"only in the first:  {name}" for name in sorted(first.keys() - second.keys())]
    lines += [f"only in the second: {name}" for name in sorted(second.keys() - first.keys())]
    same, largest = 0, 0.0
    for name in sorted(first.keys() & second.keys()):
        a, b = first[name], second[name]
        if tuple(a.shape) != tuple(b.shape):
            lines.append(f"{name}: shape {list(a.shape)} and {list(b.shape)}")
            continue
        notes = [f"dtype {a.dtype} and {b.dtype}"] if a.dtype != b.dtype else []
        difference = _largest_difference(a, b)
        if difference != 0:
            notes.append(f"largest difference {difference:.3g}")
            largest = max(largest, difference) if not math.isnan(difference) else math.nan
        same += not notes
        lines += [f"{name}: {', '.join(notes)}"] if notes else []
    total = len(first.keys() | second.keys())
    return [*lines, f"{same} of {total} parameters are equal bit for bit"
            + ("" if same == total else f"; largest difference {largest:.3g}")]  # fmt: skip


def _largest_difference(first: Any, second: Any) -> float:
    """Maximum of |a - b|, layer by layer; NaN where a NaN stands."""
    if len(first.shape) > 2:
        pairs = ((np.asarray(first[row]), np.asarray(second[row])) for row in range(first.shape[0]))
    else:
        pairs = ((np.asarray(first), np.asarray(second)) for _ in range(1))
    largest = 0.0
    for a, b in pairs:
        if a.dtype == b.dtype and a.tobytes() == b.tobytes():
            continue
        difference = np.max(np.abs(a.astype(np.float32) - b.astype(np.float32)), initial=0.0)
        largest = float(np.maximum(largest, difference))  # Note: numpy's maximum hands a NaN on.
    return largest
