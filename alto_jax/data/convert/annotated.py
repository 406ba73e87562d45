"""What every format's reader gives, and what several of them need."""

from collections.abc import Callable
import dataclasses
import math
import pathlib
from typing import Any

import numpy as np

from alto_jax.data.bad_data import RecordError, parse_json

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
_CIRCLE = 64  # corners of a circle's polygon


@dataclasses.dataclass(frozen=True)
class Annotated:
    """The objects of one name in one image.

    Attributes:
      image: the file; with `content`, the name that it had where the data come from, or nothing.
      label: as the annotations have it.
      count: how many objects.
      draw: (height, width) → bool[H, W], all of them.
      size: (height, width) that the annotations are for, None if they do not say.
      where: file and entry, for messages.
      content: of the image's file, where the annotations hold it.
      is_phrase: the label is a whole phrase ("the man on the left"), not a class.
    """

    image: pathlib.Path
    label: str
    count: int
    draw: Callable[[int, int], np.ndarray]
    size: tuple[int, int] | None
    where: str
    content: bytes | None = None
    is_phrase: bool = False


def as_polygon(kind: str, points: np.ndarray) -> list[float]:
    """A shape of LabelMe, given by points [n, 2], as a polygon x, y, x, y, …."""
    if kind == "rectangle" and len(points) == 2:
        (x1, y1), (x2, y2) = points
        points = np.array([(x1, y1), (x2, y1), (x2, y2), (x1, y2)])
    elif kind == "circle" and len(points) == 2:
        radius = float(np.hypot(*(points[1] - points[0])))
        points = points[0] + radius * unit_circle()
    elif kind != "polygon" or len(points) < 3:
        raise RecordError(f"shape {kind!r} of {len(points)} points: expected a polygon, rectangle or circle")
    return points.reshape(-1).tolist()


def unit_circle() -> np.ndarray:
    """Points [n, 2] around (0, 0) at a distance of 1."""
    turn = np.linspace(0, 2 * math.pi, _CIRCLE, endpoint=False)
    return np.stack([np.cos(turn), np.sin(turn)], axis=1)


def read_json(file: pathlib.Path) -> Any:
    """The JSON of a file; RecordError if there is none."""
    try:
        return parse_json(file.read_bytes(), file)
    except OSError as error:
        raise RecordError(f"{file}: {error.strerror}") from error


def pictures(folder: pathlib.Path) -> list[pathlib.Path]:
    """The image files anywhere in a folder, by name."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES)
