"""CVAT's XML for images."""

from collections.abc import Iterator
import functools
import math
import pathlib
from xml.etree import ElementTree

import numpy as np

from alto_jax.data import rle
from alto_jax.data.bad_data import RecordError
from alto_jax.data.convert.annotated import Annotated, as_polygon, unit_circle

_KINDS = ("polygon", "box", "ellipse", "mask")


def read_cvat(file: pathlib.Path, folder: pathlib.Path) -> Iterator[Annotated | RecordError]:
    """CVAT's XML for images 1.1: polygons, boxes, ellipses and masks; tags draw nothing.

    Args:
      file: the XML.
      folder: of the images.

    Raises:
      RecordError: it is no XML; what is wrong with an entry is given in its place.
    """
    try:
        root = ElementTree.parse(file).getroot()
    except (ElementTree.ParseError, OSError) as error:
        raise RecordError(f"{file}: expected CVAT's XML: {error}") from error
    for entry in root.iter("image"):
        where = f"{file} image {entry.get('name')!r}"
        try:
            path, (height, width) = (
                folder / _said(entry, "name", where),
                map(int, _numbers(entry, "height", "width", where=where)),
            )
            rle.check_size(height, width, where)
            found: dict[str, list[np.ndarray]] = {}
            for number, shape in enumerate(entry):
                if shape.tag in _KINDS or ("label" in shape.attrib and shape.tag != "tag"):
                    part = f"{where}: shape {number} ({shape.tag})"
                    found.setdefault(_said(shape, "label", part), []).append(_cvat_shape(shape, height, width, part))
        except RecordError as error:
            yield error
            continue
        for label, parts in sorted(found.items()):
            whole = np.logical_or.reduce(parts)
            draw = functools.partial(_drawn, whole)
            yield Annotated(path, label, len(parts), draw, (height, width), f"{where}, {label!r}")


def _drawn(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """A mask that is drawn already; its size was compared with the image's."""
    assert mask.shape == (height, width)
    return mask


def _cvat_shape(shape: ElementTree.Element, height: int, width: int, where: str) -> np.ndarray:
    """One polygon, box, ellipse or mask, bool[H, W]; RecordError for any other kind."""
    if shape.tag == "polygon":
        corners = _list(shape, "points", where)
        return rle.decode([corners], height, width, where)
    if shape.tag == "box":
        ends = np.array(_numbers(shape, "xtl", "ytl", "xbr", "ybr", where=where)).reshape(2, 2)
        box = np.array(as_polygon("rectangle", ends)).reshape(4, 2)
        return rle.decode([_turned(box, ends.mean(axis=0), shape, where)], height, width, where)
    if shape.tag == "ellipse":
        centre, radii = np.array(_numbers(shape, "cx", "cy", "rx", "ry", where=where)).reshape(2, 2)
        return rle.decode([_turned(centre + radii * unit_circle(), centre, shape, where)], height, width, where)
    if shape.tag != "mask":
        raise RecordError(f"{where} of {shape.get('label')!r}: expected a polygon, box, ellipse or mask")
    left, top, w, h = map(int, _numbers(shape, "left", "top", "width", "height", where=where))
    if left < 0 or top < 0 or w < 1 or h < 1 or left + w > width or top + h > height:
        raise RecordError(f"{where}: a mask of {w}x{h} at {left}, {top} lies outside of the {width}x{height} image")
    runs = [int(run) for run in _list(shape, "rle", where)]
    if min(runs) < 0 or sum(runs) != w * h:
        raise RecordError(f"{where}: a mask's run lengths sum to {sum(runs)}, expected {w}x{h} = {w * h}")
    part = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(h, w)  # Note: along rows, unlike COCO's.
    drawn = np.zeros((height, width), bool)
    drawn[top : top + h, left : left + w] = part
    return drawn


def _said(element: ElementTree.Element, name: str, where: str) -> str:
    """An attribute; RecordError if there is none."""
    if (value := element.get(name)) is None:
        raise RecordError(f"{where}: no attribute {name!r}")
    return value


def _numbers(element: ElementTree.Element, *names: str, where: str) -> list[float]:
    """Attributes as finite numbers; RecordError."""
    return [value for name in names for value in _list(element, name, where)]


def _list(element: ElementTree.Element, name: str, where: str) -> list[float]:
    """The finite numbers of an attribute, between commas and semicolons; RecordError."""
    value = _said(element, name, where)
    try:
        found = [float(number) for number in value.replace(";", ",").split(",")]
    except ValueError:
        found = []
    if not found or not np.isfinite(found).all():
        raise RecordError(f"{where}: expected numbers as {name!r}, got {value!r:.60}")
    return found


def _turned(points: np.ndarray, centre: np.ndarray, shape: ElementTree.Element, where: str) -> list[float]:
    """Points [n, 2] turned about `centre` by the shape's `rotation` (degrees, clockwise on the picture): x, y, x, …."""
    turn = math.radians(_numbers(shape, "rotation", where=where)[0]) if "rotation" in shape.attrib else 0.0
    cos, sin = math.cos(turn), math.sin(turn)
    return (centre + (points - centre) @ np.array([[cos, sin], [-sin, cos]])).reshape(-1).tolist()
