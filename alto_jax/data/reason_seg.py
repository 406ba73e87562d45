"""ReasonSeg (LISA): questions that need thought, with polygons in files like LabelMe's.

In: `{root}/ReasonSeg/{train,val,test}/*.json` beside `*.jpg`: {"text": [question, …], "is_sentence", "shapes":
[{"label": "target" | "ignore" | "flag", "points": [[x, y], …]}, …]}. Out: `refcoco.Referring` whose records have
"ignore" where the file has such shapes.

Shapes are drawn as the data set's own script does: larger ones first, outline included, "flag" left out; what "ignore"
covers is neither target nor background. They are of the image turned upright, so exif "stored" is read as
"masks_upright". Evaluation takes the first question of a file, per_sentence and training each of them.
"""

import dataclasses
import math
import os
import pathlib
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from alto_jax.data import bad_data, files, refcoco
from alto_jax.data.bad_data import RecordError
from alto_jax.data.reading import AS_STORED, Reading

FOLDERS = ("reason_seg/ReasonSeg", "ReasonSeg", "reason_seg")
_TARGET, _IGNORE = 1, 255


def open_reason_seg(
    root: str | os.PathLike,
    split: str,
    *,
    protocol: refcoco.Protocol = "joined",
    reading: Reading = AS_STORED,
) -> refcoco.Referring:
    """A split of ReasonSeg, in the order of the files' names.

    Args:
      root: the data folder, with one of FOLDERS in it.
      split: train, val or test.
      protocol: "per_sentence": each question is a sample; "joined": the first one of each image.
      reading: of the images (EXIF), see the module.

    Raises:
      ValueError: a folder is missing, or holds no annotation file.
    """
    reading = dataclasses.replace(reading, exif="masks_upright") if reading.exif == "stored" else reading
    folder = files.find(pathlib.Path(root), tuple(f"{f}/{split}" for f in FOLDERS), f"ReasonSeg {split}")
    annotations = sorted(folder.glob("*.json"))
    if not annotations:
        raise ValueError(f"ReasonSeg {split}: {folder} holds no *.json")
    referents = [_referent(file, split, protocol) for file in annotations]
    return refcoco.Referring(referents, "per_sentence", reading=reading, annotations=annotations)


def read(file: pathlib.Path) -> dict[str, Any]:
    """The content of an annotation file, whose texts are UTF-8 or Windows' encoding."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise RecordError(f"{file}: cannot be read: {error.strerror}", "unreadable file") from error
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        text = content.decode("cp1252", "replace")
    found = bad_data.parse_json(text, file)
    if not isinstance(found, dict):
        raise RecordError(f"{file}: expected an object with text and shapes, got {found!r:.60}")
    return found


def _referent(file: pathlib.Path, split: str, protocol: refcoco.Protocol) -> refcoco.Referent:
    try:
        content = read(file)
        said = content["text"] if isinstance(content["text"], list) else [content["text"]]
        sentences = refcoco.sentences_of(said[:1] if protocol == "joined" else said)
        shapes = [_shape(shape, f"{file}: shapes[{n}]") for n, shape in enumerate(content["shapes"])]
    except (ValueError, KeyError, TypeError) as error:
        return refcoco.broken(str(file), error)
    drawn = [shape for shape in shapes if shape is not None]
    mask = lambda height, width: _draw(drawn, height, width, file) == _TARGET
    ignore = lambda height, width: _draw(drawn, height, width, file) == _IGNORE
    return refcoco.Referent(
        str(file), f"reasonseg/{split}/{file.stem}", file.with_suffix(".jpg"), sentences, mask,
        ignore=ignore if any(value == _IGNORE for value, _ in drawn) else None,
    )  # fmt: skip


def _shape(shape: Any, where: str) -> tuple[int, list[tuple[int, int]]] | None:
    """Value and corners of a shape, in whole pixels; None for a flag."""
    label = shape.get("label") if isinstance(shape, dict) else None
    if not isinstance(label, str):
        raise RecordError(f"{where}: field label is missing or no text")
    if label.lower() == "flag":
        return None
    points, numbers = shape.get("points"), (int, float)
    is_pair = lambda p: (
        isinstance(p, list) and len(p) == 2 and all(isinstance(c, numbers) and math.isfinite(c) for c in p)
    )
    if not isinstance(points, list) or not points or not all(map(is_pair, points)):
        raise RecordError(f"{where}: field points: expected [[x, y], …], got {points!r:.60}", "segmentation")
    return _IGNORE if "ignore" in label.lower() else _TARGET, [(int(x), int(y)) for x, y in points]


def _draw(shapes: list[tuple[int, list[tuple[int, int]]]], height: int, width: int, file: pathlib.Path) -> np.ndarray:
    """uint8[H, W]: 1 target, 255 ignored."""
    masks = []
    for value, points in shapes:
        if any(not (-width <= x <= 2 * width and -height <= y <= 2 * height) for x, y in points):
            raise RecordError(
                f"{file}: a corner lies further outside of the image than it is large ({width}x{height})",
                "segmentation",
            )
        image = Image.new("1", (width, height))
        draw = ImageDraw.Draw(image)
        # Note: with its outline, as OpenCV's fillPoly; of one corner it would draw nothing.
        draw.polygon(points, fill=1, outline=1) if len(points) > 2 else draw.line(points * 2, fill=1)
        masks.append((value, np.asarray(image)))
    drawn = np.zeros((height, width), np.uint8)
    for value, mask in sorted(masks, key=lambda each: -int(np.count_nonzero(each[1]))):
        drawn[mask] = value
    if not (drawn == _TARGET).any():
        raise RecordError(f"{file}: no pixel is target", "empty mask")
    return drawn
