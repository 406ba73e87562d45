"""COCO segmentations to masks, checked: run-length codes (compressed or lists) and polygons.

In: the `segmentation` field of a COCO annotation. Out: bool[H, W]. A code that does not describe a mask of
that size is refused with a message; pycocotools reads polygons alone, after everything that it would
trust has been checked: with a coordinate far outside of the image it takes all memory or ends the process. And masks
to run-length codes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from alto_jax.data.bad_data import RecordError, one_line
from alto_jax.data.images import MAX_PIXELS

_LARGEST_OUTLINE = 2_000_000  # pixels along a polygon; pycocotools takes 120 bytes for each


def decode(segmentation: Any, height: int, width: int, where: str) -> np.ndarray:
    """The mask of one annotation.

    Args:
      segmentation: {"size": [H, W], "counts": text, bytes or list}, or a list of polygons [x0, y0, x1, …].
      height, width: of the image, in pixels.
      where: file and entry, for messages.

    Returns:
      bool[H, W]; overlapping polygons are merged, what lies outside of the image is cut off.

    Raises:
      RecordError: neither of the two forms, a code that doesn't decode, one of another size, or a polygon with a
        coordinate further outside than the image is large.
    """
    check_size(height, width, where)
    if isinstance(segmentation, dict):
        return runs_to_mask(check_runs(segmentation, height, width, where), height, width)
    if isinstance(segmentation, list):
        return _polygons(segmentation, height, width, where)
    raise _error(where, f"segmentation: expected run lengths or polygons, got {segmentation!r:.60}")


def check_size(height: Any, width: Any, where: str) -> None:
    """Raises RecordError unless height and width, as an annotation file has them, are those of an image."""
    whole = all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in (height, width))
    if not whole:
        raise RecordError(
            f"{where}: height x width: expected whole numbers above 0, got {height!r:.20} x {width!r:.20}"
        )
    if height * width > MAX_PIXELS:
        message = f"{where}: height x width is {height!r:.20} x {width!r:.20}; at most {MAX_PIXELS} pixels can be read"
        raise RecordError(message, "image too large")


def _error(where: str, message: str) -> RecordError:
    return RecordError(f"{where}: {message}", "segmentation")


def encode(mask: np.ndarray) -> dict[str, Any]:
    """{"size": [H, W], "counts": text} of bool[H, W], as COCO stores it."""
    from pycocotools import mask as coco_mask  # late: keeps the start fast

    found = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    counts = found["counts"]
    text = counts if isinstance(counts, str) else counts.decode("ascii")
    return {"size": [int(side) for side in found["size"]], "counts": text}


def check_runs(rle: dict[str, Any], height: int, width: int, where: str) -> np.ndarray:
    """The run lengths int64[R] of {"size", "counts"}, which alternate 0 and 1 down the columns.

    Raises:
      RecordError: as `decode`.
    """
    size, counts = rle.get("size"), rle.get("counts")
    if not isinstance(size, list | tuple) or [*size] != [height, width]:
        message = f"{where}: segmentation.size differs from the image's {height}x{width} (h x w): {size!r:.40}"
        raise RecordError(message, "size of mask and image")
    try:
        runs = _whole_numbers(counts) if isinstance(counts, list) else _uncompress(counts)
    except (TypeError, ValueError, OverflowError) as error:
        raise _error(where, f"segmentation.counts does not decode: {one_line(error)}") from error
    total = height * width
    if not ((runs >= 0) & (runs <= total)).all():  # Note: first, so that the sum can't overflow.
        raise _error(where, f"segmentation.counts does not decode: a run is not in 0..{total}")
    if int(runs.sum()) != total:
        raise _error(where, f"segmentation.counts does not decode: runs add up to {runs.sum()} of {total} pixels")
    return runs


def _whole_numbers(values: list[Any]) -> np.ndarray:
    """A list of whole numbers (floats too, if they are whole) as int64[N]."""
    try:
        found = np.array(values)
    except ValueError:  # lists of different lengths in it
        found = np.array(None)
    if found.ndim != 1 or found.dtype.kind not in "iuf" or any(isinstance(value, bool) for value in values):
        raise ValueError("expected a list of numbers")
    if found.dtype.kind == "f" and not (np.isfinite(found) & (found == np.floor(found)) & (found < 2**53)).all():
        raise ValueError("a number is not whole")
    return found.astype(np.int64)


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

    if not polygons:
        raise _error(where, "segmentation: no polygon")
    checked: Any = [_polygon(polygon, height, width, where) for polygon in polygons]
    try:
        return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(checked, height, width))).astype(bool)
    except Exception as error:  # Note: pycocotools raises plain exceptions.
        raise _error(where, f"segmentation: the polygons cannot be drawn: {one_line(error)}") from error


def _polygon(polygon: Any, height: int, width: int, where: str) -> list[float]:
    """A polygon [x0, y0, x1, …] that pycocotools can be trusted with."""
    numbers = isinstance(polygon, list) and all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in polygon
    )
    if not numbers or len(polygon) < 6 or len(polygon) % 2:
        raise _error(where, f"segmentation: expected polygons of at least 3 points, got {polygon!r:.60}")
    try:
        points = np.array(polygon, np.float64).reshape(-1, 2)
    except OverflowError:  # a whole number of hundreds of digits
        points = np.full((1, 2), np.inf)
    if not np.isfinite(points).all():
        raise _error(where, "segmentation: a polygon's coordinate is not finite")
    sides = np.array([width, height])
    outside = (points < -sides) | (points > 2 * sides)
    if outside.any():
        value = points[outside][0]
        raise _error(where, f"segmentation: coordinate {value:g} lies far outside of the {width}x{height} image")
    outline = np.abs(np.roll(points, -1, axis=0) - points).max(-1).sum()
    if outline + len(points) > _LARGEST_OUTLINE:
        raise _error(where, f"segmentation: a polygon's outline is {outline:.0f} pixels, at most {_LARGEST_OUTLINE}")
    return points.ravel().tolist()
