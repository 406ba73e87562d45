"""LabelMe's files."""

from collections.abc import Callable, Iterator
import pathlib
from typing import Any

import numpy as np

from alto_jax.data import coco, rle
from alto_jax.data.bad_data import RecordError, at
from alto_jax.data.convert.annotated import Annotated, as_polygon, field, read_json

_SIDES = ("imageHeight", "imageWidth")


def read_labelme(folder: pathlib.Path) -> Iterator[Annotated | RecordError]:
    """LabelMe's JSON beside images, anywhere in `folder`: polygons, rectangles and circles, in pixels."""
    for file in sorted(folder.rglob("*.json")):
        try:
            content = read_json(file)
            shapes, path = field(content, "shapes", (list,), file), field(content, "imagePath", (str,), file)
            size = None
            if content.get("imageHeight"):
                height, width = (coco.whole_number(content.get(name), f"{file}: {name}") for name in _SIDES)
                size = height, width
            found: dict[str, list[list[float]]] = {}
            for number, shape in enumerate(shapes):
                label, polygon = _shape(shape, f"{file} shape {number}")
                found.setdefault(label, []).append(polygon)
        except ValueError as error:
            yield error if isinstance(error, RecordError) else RecordError(str(error))
            continue
        path = file.parent / path.replace("\\", "/")
        for label, polygons in sorted(found.items()):
            yield Annotated(path, label, len(polygons), _polygons(polygons, str(file)), size, f"{file}, {label!r}")


def _shape(shape: Any, where: str) -> tuple[str, list[float]]:
    """Label and polygon of one shape; RecordError."""
    label, given = field(shape, "label", (str, int, float), where), field(shape, "points", (list,), where)
    try:
        points = np.array(given, float).reshape(-1, 2)
    except (TypeError, ValueError) as error:
        raise RecordError(f"{where}: expected points as [x, y], [x, y], …, got {given!r:.60}") from error
    try:
        return str(label), as_polygon(shape.get("shape_type", "polygon"), points)
    except RecordError as error:
        raise at(where, error) from error


def _polygons(polygons: list[list[float]], where: str) -> Callable[[int, int], np.ndarray]:
    return lambda height, width: rle.decode(polygons, height, width, where)
