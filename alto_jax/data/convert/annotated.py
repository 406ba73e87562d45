"""What every format's reader gives, and what several of them need."""

from collections.abc import Callable
import dataclasses
import math
import pathlib
from typing import Any, Literal

import numpy as np

from alto_jax.data import coco, images, masks
from alto_jax.data.bad_data import RecordError, parse_json
from alto_jax.data.reading import Photo, Reading

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
_CIRCLE = 64  # corners of a circle's polygon
# What annotations were drawn on, by data/reading.py; None: not said, so that only one of both may be possible.
Frame = Literal["stored", "masks_upright"] | None
_TYPES = {int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
FRAMES = ("stored", "masks_upright")


@dataclasses.dataclass(frozen=True)
class Annotated:
    """The objects of one name in one image.

    Attributes:
      image: the file; with `content`, the name that it had where the data come from, or nothing.
      label: as the annotations have it.
      count: how many objects; of a crowd, more than one.
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


def drawn(entry: Annotated, path: pathlib.Path, exif: Frame) -> tuple[Photo, np.ndarray]:
    """The picture as a reader with this `exif` gives it, and the entry's mask bool[H, W] of it.

    Args:
      entry: whose objects.
      path: the image's file.
      exif: of the annotations; None: of the picture as stored, if they fit no other.

    Raises:
      RecordError: the picture cannot be read, the annotations are no mask of it, or it has an EXIF orientation and
        nothing says whether they were drawn on it as stored or upright.
    """
    photo = Reading(exif or "stored").photo(path)
    size, turn = photo.annotated_size, f"{path} has the EXIF orientation {photo.orientation}"
    other = size[::-1] if photo.orientation >= 5 else size  # Shape: of the picture in the frame that is not read.
    try:
        coco.check_stated_size(size, entry.size)
        mask = entry.draw(*size)
    except RecordError as error:
        if other == size or not _fits(entry, other):
            raise
        frame = "stored" if exif == "masks_upright" else "masks_upright"
        raise RecordError(f"{error}: {turn}, see --exif={frame}", error.kind) from error
    if exif is None and photo.orientation != 1 and (other == size or _fits(entry, other)):
        raise RecordError(
            f"{turn}: were its annotations drawn on the picture as stored (--exif=stored) or upright "
            "(--exif=masks_upright)?",
            "size of mask and image",
        )
    return photo, mask


def _fits(entry: Annotated, size: tuple[int, int]) -> bool:
    """Whether annotations can be of a picture of (height, width)."""
    if entry.size is not None:
        return entry.size == size
    try:
        entry.draw(*size)
    except ValueError:
        return False
    return True


def file_mask(loaded: images.Loaded, name: str, rule: str, exif: Frame) -> np.ndarray:
    """The mask bool[H, W] of a mask file that is decoded.

    Args:
      loaded: the file; name: for messages.
      rule: which values are foreground (data/masks.py).
      exif: of the annotations.

    Raises:
      RecordError: as `masks.mask_of`, or the file has an EXIF orientation and `exif` does not say whether it counts.
    """
    if exif is None and loaded.orientation != 1:
        raise RecordError(
            f"mask {name} has the EXIF orientation {loaded.orientation}: is it to be read as stored (--exif=stored) or "
            "turned upright (--exif=masks_upright)?",
            "size of mask and image",
        )
    mask = masks.mask_of(loaded, name, rule) > 0
    return images.turn(mask, loaded.orientation) if exif == "masks_upright" else mask


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


def field(entry: Any, name: str, kinds: tuple[type, ...], where: object) -> Any:
    """The value of a field of a JSON object, of one of these types; RecordError, which names both, if there is none."""
    if not isinstance(entry, dict):
        raise RecordError(f"{where}: expected an entry with {name}, got {entry!r:.60}")
    value = entry.get(name)
    if not isinstance(value, kinds) or isinstance(value, bool):
        words = " or ".join(dict.fromkeys(_TYPES[kind] for kind in kinds))
        raise RecordError(f"{where}: expected {words} as {name}, got {value!r:.60}" if name in entry else
                          f"{where}: no field {name}, expected {words}")  # fmt: skip
    return value


def read_json(file: pathlib.Path) -> Any:
    """The JSON of a file; RecordError if there is none."""
    try:
        return parse_json(file.read_bytes(), file)
    except OSError as error:
        raise RecordError(f"{file}: {error.strerror}") from error


def pictures(folder: pathlib.Path) -> list[pathlib.Path]:
    """The image files anywhere in a folder, by name."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES)
