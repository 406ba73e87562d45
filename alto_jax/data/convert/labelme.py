"""LabelMe's files."""

from collections.abc import Callable, Iterator
import pathlib

import numpy as np

from alto_jax.data import rle
from alto_jax.data.bad_data import RecordError, at
from alto_jax.data.convert.annotated import Annotated, as_polygon, read_json


def read_labelme(folder: pathlib.Path) -> Iterator[Annotated | RecordError]:
    """LabelMe's JSON beside images, anywhere in `folder`: polygons, rectangles and circles, in pixels."""
    for file in sorted(folder.rglob("*.json")):
        try:
            content = read_json(file)
            shapes, path = content["shapes"], file.parent / str(content["imagePath"]).replace("\\", "/")
            size = (content["imageHeight"], content["imageWidth"]) if content.get("imageHeight") else None
            found: dict[str, list[list[float]]] = {}
            for shape in shapes:
                points = np.array(shape["points"], float).reshape(-1, 2)
                found.setdefault(str(shape["label"]), []).append(as_polygon(shape.get("shape_type", "polygon"), points))
        except (RecordError, TypeError, KeyError, ValueError) as error:
            yield at(file, error)
            continue
        for label, polygons in sorted(found.items()):
            yield Annotated(path, label, len(polygons), _polygons(polygons, str(file)), size, f"{file}, {label!r}")


def _polygons(polygons: list[list[float]], where: str) -> Callable[[int, int], np.ndarray]:
    return lambda height, width: rle.decode(polygons, height, width, where)
