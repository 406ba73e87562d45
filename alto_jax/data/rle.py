"""COCO segmentations to masks, checked: run-length codes (compressed or lists) and polygons.

In: the `segmentation` field of a COCO annotation. Out: bool[H, W]. A code that does not describe a mask of
that size is refused with a message; pycocotools is used for polygons alone (it trusts what it is given).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np


def decode(segmentation: Any, height: int, width: int, where: str) -> np.ndarray:
    """The mask of one annotation.

    Args:
      segmentation: {"size": [H, W], "counts": text, bytes or list}, or a list of polygons [x0, y0, x1, …].
      height, width: of the image, in pixels.
      where: file and entry, for messages.

    Returns:
      bool[H, W]; overlapping polygons are merged.

    Raises:
      ValueError: neither of the two forms, a code that doesn't decode, or one of another size.
    """
    if isinstance(segmentation, dict):
        return runs_to_mask(check_runs(segmentation, height, width, where), height, width)
    if isinstance(segmentation, list):
        return _polygons(segmentation, height, width, where)
    raise ValueError(f"{where}: segmentation: expected run lengths or polygons, got {segmentation!r:.60}")


def check_runs(rle: dict[str, Any], height: int, width: int, where: str) -> np.ndarray:
    """The run lengths int64[R] of {"size", "counts"}, which alternate 0 and 1 down the columns.

    Raises:
      ValueError: as `decode`.
    """
    size, counts = rle.get("size"), rle.get("counts")
    if not isinstance(size, list | tuple) or [*size] != [height, width]:
        raise ValueError(f"{where}: segmentation.size differs from the image's {height}x{width} (h x w): {size!r:.40}")
    try:
        runs = np.array(counts, np.int64) if isinstance(counts, list) else _uncompress(counts)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{where}: segmentation.counts does not decode: {error}") from error
    total = int(runs.sum()) if runs.ndim == 1 else -1
    if runs.ndim != 1 or (runs < 0).any() or total != height * width:
        raise ValueError(
            f"{where}: segmentation.counts does not decode: runs add up to {total} of {height * width} pixels"
        )
    return runs


def _uncompress(counts: Any) -> np.ndarray:
    """COCO's text form: 6-bit digits from '0' on, five bits of value and one of continuation, low digits first;
    from the fourth number on as differences to the one before the last."""
    if not isinstance(counts, str | bytes):
        raise TypeError(f"expected text or a list, got {counts!r:.40}")
    digits = (
        np.frombuffer(counts.encode("ascii") if isinstance(counts, str) else counts, np.uint8).astype(np.int64) - 48
    )
    if not len(digits):
        raise ValueError("it is empty")
    if (digits < 0).any() or (digits > 63).any():
        raise ValueError("a character out of range")
    last = (digits & 32) == 0
    if not last[-1]:
        raise ValueError("it is cut short")
    starts = np.concatenate([[0], np.flatnonzero(last)[:-1] + 1])
    place = np.arange(len(digits)) - np.repeat(starts, np.diff(np.append(starts, len(digits))))
    if place.max() > 11:
        raise ValueError("a number is too long")
    values = np.add.reduceat((digits & 31) << (5 * place), starts)
    negative = (digits[last] & 16) != 0
    values -= negative * (np.int64(1) << (5 * (place[last] + 1)))
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def runs_to_mask(runs: np.ndarray, height: int, width: int) -> np.ndarray:
    """bool[H, W] of run lengths that add up to height * width."""
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return np.ascontiguousarray(flat.reshape(width, height).T)


def _polygons(polygons: Sequence[Any], height: int, width: int, where: str) -> np.ndarray:
    from pycocotools import mask as coco_mask  # late: keeps the start fast

    for polygon in polygons:
        numbers = isinstance(polygon, list) and all(isinstance(v, int | float) for v in polygon)
        if not numbers or len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(f"{where}: segmentation: expected polygons of at least 3 points, got {polygon!r:.60}")
        if not np.isfinite(polygon).all():
            raise ValueError(f"{where}: segmentation: a polygon's coordinate is not finite")
    if not polygons:
        raise ValueError(f"{where}: segmentation: no polygon")
    merged = coco_mask.merge(coco_mask.frPyObjects(list(polygons), height, width))
    return coco_mask.decode(merged).astype(bool)
