"""Requests of many: the files of a folder, or the lines of a JSONL file. What is no request is one with its error."""

from collections.abc import Callable, Mapping
import dataclasses
import math
import os
import pathlib
import re
from typing import Any

from alto_jax.config import ConfigError
from alto_jax.data import bad_data
from alto_jax.data.bad_data import RecordError

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".jp2", ".avif", ".ppm", ".pgm")
FIELDS = ("id", "image", "text", "box", "boxes")
_BOX = re.compile(r"\(?\s*(-?[\d.]+)\s*,\s*(-?[\d.]+)\s*,\s*(-?[\d.]+)\s*,\s*(-?[\d.]+)\s*\)?")
_LONGEST_ID = 200  # characters
_LONGEST_NAME = 255  # bytes of a part of a path, as most file systems have them


@dataclasses.dataclass(frozen=True)
class Request:
    """One of many.

    Attributes:
      id: its own, a relative name; what is written of it is named so.
      given: what is asked, as its line repeats it; JSON-compatible.
      error: why it is no request; None: it is one.
    """

    id: str
    given: dict[str, Any]
    error: RecordError | None = None


def of_folder(
    folder: str, option: str, field: str, given: Mapping[str, Any], out: str | os.PathLike | None = None
) -> list[Request]:
    """A request for each picture in a folder and those in it, by name; hidden files are passed over.

    Args:
      folder: given with `option`, for messages.
      field: of the request that gets the file's name, relative to the folder; it is the id as well.
      given: the other fields.
      out: the folder of results, which is passed over where it lies in that of pictures.

    Raises:
      ConfigError: no folder, no picture in it, or it is that of results.
    """
    root = pathlib.Path(folder)
    if not root.is_dir():
        raise ConfigError(f"{option}={folder}: expected a folder")
    own = None if out is None else pathlib.Path(os.path.relpath(os.path.realpath(out), os.path.realpath(root)))
    if own == pathlib.Path("."):
        raise ConfigError(f"--out={out}: expected another folder than that of {option}")
    names = (path.relative_to(root) for path in root.rglob("*") if path.suffix.lower() in PICTURES and path.is_file())
    seen = (name for name in names if own is None or not name.is_relative_to(own))
    found = sorted(name.as_posix() for name in seen if not any(part.startswith(".") for part in name.parts))
    if not found:
        raise ConfigError(f"{option}={folder}: no pictures there ({', '.join(PICTURES)})")
    return [Request(name, {field: name, **given}, _too_long(name, f"{option}={folder}: {field}")) for name in found]


def _too_long(name: str, where: str) -> RecordError | None:
    """Why no file can be named as an id and its ending; None: it can."""
    most = max(len(os.fsencode(part)) for part in f"{name}.png".split("/"))
    if most <= _LONGEST_NAME:
        return None
    return RecordError(f"{where}: expected names that end in .png in {_LONGEST_NAME} bytes, got {most}: {name!r:.60}")


def of_jsonl(file: str, option: str, default: Mapping[str, Any]) -> list[Request]:
    """A request for each line of a JSONL file: {"image", "text" or "box" or "boxes", "id"}.

    Args:
      file: given with `option`, for messages; blank lines are passed over. A line without an id has its number for one.
      default: what is asked of an image whose line does not say it; {}: each line must.

    Raises:
      ConfigError: the file cannot be read, or has no line.
    """
    return _of_lines(file, option, lambda value, where, number: _of_line(value, where, number, default))


def _of_lines(file: str, option: str, make: Callable[[Any, str, str], Request]) -> list[Request]:
    """The requests that `make` makes of (a line's value, where it stands, its number)."""
    try:
        content = pathlib.Path(file).read_bytes()
    except OSError as error:
        raise ConfigError(f"{option}={file}: cannot be read: {error.strerror}") from error
    found: list[Request] = []
    known: set[str] = set()
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{file} line {number}"
        try:
            request = make(bad_data.parse_json(line, where), where, str(number))
            if request.id in known:
                raise RecordError(f"{where}: id {request.id!r} stands in an earlier line, too")
        except RecordError as error:
            found.append(Request(f"line {number}", {}, error))
            continue
        known.add(request.id)
        found.append(request)
    if not found:
        raise ConfigError(f"{option}={file}: no lines there")
    return found


def _of_line(value: Any, where: str, number: str, default: Mapping[str, Any]) -> Request:
    """The request of a line's value; RecordError."""
    if not isinstance(value, dict):
        raise RecordError(f"{where}: expected an object with {', '.join(FIELDS)}, got {value!r:.60}")
    for name in value:
        if name not in FIELDS:
            raise RecordError(f"{where}: {name!r:.60}: unknown field; known: {', '.join(FIELDS)}")
    image = value.get("image")
    if not isinstance(image, str) or not image or "\0" in image:
        raise RecordError(f"{where}: image: expected a file's name, got {image!r:.60}")
    asked = {name: value[name] for name in ("text", "box", "boxes") if value.get(name) is not None}
    if len(asked) > 1:
        raise RecordError(f"{where}: {' and '.join(asked)}: expected one of them")
    if "text" in asked and not (isinstance(asked["text"], str) and any(c.isalnum() for c in asked["text"])):
        raise RecordError(f"{where}: text: expected the name or description of an object, got {asked['text']!r:.60}")
    if "box" in asked:
        asked = {"boxes": [_check_box(asked["box"], f"{where}: box")]}
    elif "boxes" in asked:
        boxes = asked["boxes"]
        if not isinstance(boxes, list) or not boxes:
            raise RecordError(f"{where}: boxes: expected a list of [x1, y1, x2, y2], got {boxes!r:.60}")
        asked = {"boxes": [_check_box(box, f"{where}: boxes[{index}]") for index, box in enumerate(boxes)]}
    if not asked and not default:
        raise RecordError(f"{where}: expected text, box or boxes (or --text for all lines), got none")
    own = value.get("id", number)
    own = str(own) if isinstance(own, int) and not isinstance(own, bool) else own
    return Request(check_id(own, f"{where}: id"), {"image": image, **(asked or default)})


def check_id(value: Any, where: str) -> str:
    """An id, of which names of files can be made; RecordError."""
    good = isinstance(value, str) and 0 < len(value) <= _LONGEST_ID and value.isprintable() and "\\" not in value
    if not good or any(part.strip() in ("", ".", "..") for part in value.split("/")):
        raise RecordError(f"{where}: expected a number, or a name such as 'a' or 'a/b', got {value!r:.60}")
    if error := _too_long(value, where):
        raise error
    return value


def _check_box(value: Any, where: str) -> list[float]:
    numbers = isinstance(value, list) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in value)
    if not numbers or len(value) != 4 or not all(map(math.isfinite, value)):
        raise RecordError(f"{where}: expected [x1, y1, x2, y2] in pixels, got {value!r:.60}")
    return value


def parse_boxes(written: str, name: str = "boxes") -> list[tuple[float, float, float, float]]:
    """Boxes "x1,y1,x2,y2; …" in pixels; `name` is for the message.

    Raises:
      ValueError: something else is written.
    """
    found = []
    for part in filter(str.strip, written.split(";")):
        match = _BOX.fullmatch(part.strip())
        try:
            x1, y1, x2, y2 = (float(number) for number in (match.groups() if match else ()))
        except ValueError:
            told = f"{name}: expected x1,y1,x2,y2 in pixels, several with ; between, got {part.strip()!r}"
            raise ValueError(told) from None
        found.append((x1, y1, x2, y2))
    return found


def of_codes(file: str, option: str, images: str | None, out: str | os.PathLike | None = None) -> list[Request]:
    """A request for each line that `tokenize encode` wrote of a folder: its codes, size, and image.

    Args:
      file: results.jsonl, given with `option`, for messages.
      images: the folder of images that are named as the masks were, up to the ending; None: masks without images.
      out: as for `of_folder`.

    Raises:
      ConfigError: the file or the folder cannot be read, or has no line.
    """
    beside: dict[str, str] = {}
    if images is not None:
        for request in of_folder(images, "--images", "image", {}, out):
            beside.setdefault(_stem(request.id), request.id)

    def make(value: Any, where: str, number: str) -> Request:
        if not isinstance(value, dict) or not {"id", "codes", "size"} <= value.keys():
            raise RecordError(
                f"{where}: expected id, codes and size, as tokenize encode writes them, got {value!r:.60}"
            )
        own = check_id(value["id"], f"{where}: id")
        given = {"codes": value["codes"], "size": value["size"]}
        if images is None:
            return Request(own, given)
        if _stem(own) not in beside:
            raise RecordError(f"{where}: no image {_stem(own)}.* in {images}", "missing image")
        return Request(own, {**given, "image": beside[_stem(own)]})

    return _of_lines(file, option, make)


def _stem(name: str) -> str:
    """A relative name without its last ending."""
    return pathlib.PurePosixPath(name).with_suffix("").as_posix()
