"""CVAT's XML for images."""

from collections.abc import Iterator
import functools
import math
import pathlib
from xml.etree import ElementTree

import numpy as np

from alto_jax.data import rle
from alto_jax.data.bad_data import RecordError, at
from alto_jax.data.convert.annotated import Annotated, as_polygon, unit_circle


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
            path, height, width = folder / entry.attrib["name"], int(entry.attrib["height"]), int(entry.attrib["width"])
            rle.check_size(height, width, where)
            found: dict[str, list[np.ndarray]] = {}
            for shape in entry:
                if "label" in shape.attrib and shape.tag != "tag":
                    drawn = _cvat_shape(shape, height, width, where)
                    found.setdefault(shape.attrib["label"], []).append(drawn)
        except (RecordError, KeyError, ValueError) as error:
            yield at(where, error)
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
    given = shape.attrib
    if shape.tag == "polygon":
        corners = [float(v) for point in given["points"].split(";") for v in point.split(",")]
        return rle.decode([corners], height, width, where)
    if shape.tag == "box":
        ends = np.array([float(given[name]) for name in ("xtl", "ytl", "xbr", "ybr")]).reshape(2, 2)
        box = np.array(as_polygon("rectangle", ends)).reshape(4, 2)
        return rle.decode([_turned(box, ends.mean(axis=0), given)], height, width, where)
    if shape.tag == "ellipse":
        centre, radii = np.array([float(given[name]) for name in ("cx", "cy", "rx", "ry")]).reshape(2, 2)
        return rle.decode([_turned(centre + radii * unit_circle(), centre, given)], height, width, where)
    if shape.tag != "mask":
        raise RecordError(f"shape {shape.tag!r} of {given['label']!r}: expected a polygon, box, ellipse or mask")
    left, top, w, h = (int(float(given[name])) for name in ("left", "top", "width", "height"))
    if left < 0 or top < 0 or w < 1 or h < 1 or left + w > width or top + h > height:
        raise RecordError(f"a mask of {w}x{h} at {left}, {top} lies outside of the {width}x{height} image")
    runs = [int(run) for run in given["rle"].split(",")]
    if min(runs) < 0 or sum(runs) != w * h:
        raise RecordError(f"a mask's run lengths sum to {sum(runs)}, expected {w}x{h} = {w * h}")
    part = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(h, w)  # Note: along rows, unlike COCO's.
    drawn = np.zeros((height, width), bool)
    drawn[top : top + h, left : left + w] = part
    return drawn


def _turned(points: np.ndarray, centre: np.ndarray, given: dict[str, str]) -> list[float]:
    """Points [n, 2] turned about `centre` by the shape's `rotation` (degrees, clockwise on the picture): x, y, x, …."""
    turn = math.radians(float(given.get("rotation", 0)))
    cos, sin = math.cos(turn), math.sin(turn)
    return (centre + (points - centre) @ np.array([[cos, sin], [-sin, cos]])).reshape(-1).tolist()
