"""Records of conversation files: found, brought into one form, and counted by what they can be used for.

A file is JSONL or one JSON list of {"image": path, "mask": path or [paths], "conversations": turns}. Turns are {"from",
"value"} or {"role", "content"}, `images` and `messages` other names of the fields; a record without an image is text,
and one without masks may have several images.
"""

import array
import codecs
from collections.abc import Iterator
import dataclasses
import functools
import json
import logging
import pathlib
import re
from typing import Any

import numpy as np

from alto_jax.data import bad_data, index, prompts
from alto_jax.data.split import file_hash
from alto_jax.mllm import text

_log = logging.getLogger(__name__)
_PARTS = {"image": text.IMAGE, "image_url": text.IMAGE}
_SPEAKERS = {"user": "human", "assistant": "gpt"}
GOOD, MALFORMED, UNSUPPORTED = range(3)
_FORM = 4  # Another number finds the records of all files anew: for changes of what is said of a record.


class Unsupported(ValueError):
    """A sound record that the model has no place for, such as a video."""


@dataclasses.dataclass
class Lines:
    """Where the records of a file stand, and what they are.

    The arrays are mapped from a kept index (index.py), for the next start and for other processes.

    Attributes:
      file: the file. digest: hash of its content.
      unit: what a record's number counts, "line" or "entry" of a list.
      starts, ends: int64[N], in bytes; numbers: int64[N].
      kinds: uint8[N], GOOD, MALFORMED or UNSUPPORTED.
      num_images, num_masks, num_prompts: uint16[N], see source.Chats.
      image_hashes: uint64[N], of the first image, see split.py; 0 without one.
      more_rows, more_hashes: int64[K] rising, uint64[K]: the rows of further images, and their hashes.
      problem: what is wrong with the first record that is not good, "" if all are.
    """

    file: pathlib.Path
    index: index.Index

    def __post_init__(self) -> None:
        about = self.index.about
        self.unit, self.digest, self.problem = str(about["unit"]), str(about["digest"]), str(about["problem"])
        arrays = self.index.arrays
        self.starts, self.ends, self.numbers = (arrays[name] for name in ("starts", "ends", "numbers"))
        self.kinds, self.num_masks, self.num_prompts = (arrays[n] for n in ("kinds", "num_masks", "num_prompts"))
        self.num_images, self.image_hashes = arrays["num_images"], arrays["image_hashes"]
        self.more_rows, self.more_hashes = arrays["more_rows"], arrays["more_hashes"]

    def __reduce__(self) -> tuple:
        return Lines, (self.file, self.index)

    def usable(self, max_masks: int | None = None, max_images: int | None = None) -> np.ndarray | range:
        """The rows of all records but the unsupported ones and those of more masks or images, int64[n].

        Malformed ones stay, to be reported when they are read.
        """
        rows = np.flatnonzero(self.kinds != UNSUPPORTED)
        if max_masks is not None:
            rows = self._few_masks(rows, max_masks)
        if max_images is not None:
            many = self.num_images[rows] > max_images
            if many.any():
                first = f"{self.file} {self.unit} {self.numbers[rows[many.argmax()]]}"
                _tell(f"{many.sum()} of {len(self.kinds)} records are passed over, as they have more images than "
                      f"config.data.max_images={max_images}, such as {first}")  # fmt: skip
            rows = rows[~many]
        return range(len(self.kinds)) if len(rows) == len(self.kinds) else rows

    def hashes(self, row: int) -> tuple[int, ...]:
        """Hashes of all images of record `row`; () without one."""
        first, more = int(self.image_hashes[row]), slice(*np.searchsorted(self.more_rows, [row, row + 1]))
        return (first, *map(int, self.more_hashes[more])) if first else ()

    def _few_masks(self, rows: np.ndarray, max_masks: int) -> np.ndarray:
        many = self.num_masks[rows] > max_masks
        if many.any():
            _log.warning(
                "%d of %d records have more masks than config.data.max_masks=%d and are passed over, such as %s %s %d",
                many.sum(), len(self.kinds), max_masks, self.file, self.unit, self.numbers[rows[many.argmax()]],
            )  # fmt: skip
        return rows[~many]

    def read(self, row: int) -> tuple[str, dict[str, Any]]:
        """Where record `row` stands, for messages, and its content, see `checked`."""
        where = f"{self.file} {self.unit} {self.numbers[row]}"
        with open(self.file, "rb") as file:
            file.seek(int(self.starts[row]))
            content = file.read(int(self.ends[row] - self.starts[row]))
        return where, checked(_loads(content, where), where)


def find_lines(file: pathlib.Path) -> Lines:
    """Finds the records of a file; all are parsed once to see what they are, and that is kept for an unchanged file.

    Raises:
      ValueError: the file can't be read, holds no record, or begins as a list and is none.
    """
    try:
        found = Lines(file, index.of_file("records", _FORM, file, lambda: _find_lines(file)))
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}") from error
    passed_over = int((found.kinds == UNSUPPORTED).sum())
    if passed_over:
        unsupported = found.index.about["unsupported"]
        _tell(f"{passed_over} of {len(found.kinds)} records are passed over, such as {unsupported}")
    return found


@functools.cache
def _tell(warning: str) -> None:
    """Logs a warning once, however often a file is opened."""
    _log.warning("%s", warning)


def _find_lines(file: pathlib.Path) -> index.Index:
    """What the records of a file are."""
    problems: dict[int, str] = {}
    with open(file, "rb") as stream:
        is_list = stream.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["
    unit = "entry" if is_list else "line"
    columns = [array.array(code) for code in "qqqqqqqQ"]  # Note: lists of Python's numbers take ten times as much.
    more: list[tuple[int, int]] = []
    for number, start, end, content in _list_entries(file) if is_list else _jsonl_lines(file):
        kind, masks, count, shown, hashes, where = GOOD, 0, 0, 0, [0], f"{file} {unit} {number}"
        try:
            entry = checked(_loads(content, where) if isinstance(content, bytes) else content, where)
            masks, shown = len(entry["mask"]), len(entry["images"])
            hashes = [file_hash(image) for image in entry["images"]] or [0]
            count = len(prompts.requests(entry["conversations"], masks, where))
        except Unsupported as error:
            kind = UNSUPPORTED
            problems.setdefault(kind, str(error))
        except ValueError as error:  # Counted and reported where the record is read.
            kind, masks, count = MALFORMED, 0, 1
            problems.setdefault(kind, str(error))
        more += [(len(columns[0]), image) for image in hashes[1:]]
        for column, value in zip(columns, (start, end, number, kind, shown, masks, count, hashes[0])):
            column.append(value)
    if len(columns[0]) == 0:
        raise ValueError(f"{file} holds no {unit}")
    names = ("starts", "ends", "numbers", "kinds", "num_images", "num_masks", "num_prompts", "image_hashes")
    arrays = {name: np.asarray(column) for name, column in zip(names, columns, strict=True)}
    arrays["kinds"] = arrays["kinds"].astype(np.uint8)
    arrays["more_rows"] = np.array([row for row, _ in more], np.int64)
    arrays["more_hashes"] = np.array([image for _, image in more], np.uint64)
    for name in ("num_images", "num_masks", "num_prompts"):
        arrays[name] = np.minimum(arrays[name], 65535).astype(np.uint16)
    about = {"unit": unit, "problem": next(iter(problems.values()), ""), "unsupported": problems.get(UNSUPPORTED, "")}
    return index.Index(about, arrays)


def _jsonl_lines(file: pathlib.Path) -> Iterator[tuple[int, int, int, bytes]]:
    """(number, start, end, content) of the lines that are not blank."""
    start = 0
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, start, start + len(line), line
            start += len(line)


def _list_entries(file: pathlib.Path) -> Iterator[tuple[int, int, int, Any]]:
    """(number, start, end, content) of the entries of a JSON list, numbered from 1.

    Note: as Latin-1 a character is a byte, so that places in the text are places in the file. Texts beyond ASCII come
    out wrong; what an entry is does not depend on them, and it is read again as UTF-8.
    """
    content = file.read_bytes().decode("latin-1")
    decoder, number, solid = json.JSONDecoder(), 0, re.compile(r"[^ \t\r\n]|$")
    skip = lambda at: next(solid.finditer(content, at)).start()
    position = skip(content.index("[") + 1)
    try:
        while content[position] != "]":
            value, end = decoder.raw_decode(content, position)
            number += 1
            yield number, position, end, value
            position = skip(end)
            if content[position] == ",":
                position = skip(position + 1)
            elif content[position] != "]":
                raise ValueError(f"expected , or ] after entry {number}")
        if content[position + 1 :].strip():
            raise ValueError("there is more after the list")
    except (IndexError, ValueError, RecursionError) as error:
        reason = "it is cut short" if isinstance(error, IndexError) else error
        raise ValueError(f"{file} is no JSON list, after entry {number}: {reason}") from error


def _loads(content: bytes, where: str) -> Any:
    return bad_data.parse_json(content, where)


def checked(entry: Any, where: str) -> dict[str, Any]:
    """A record as {"images": [path, …], "mask": [path, …], "conversations": [{"from", "value"}, …]}.

    Raises:
      Unsupported: several images and a mask, or a video.
      ValueError: malformed; the message names `where` and the field.
    """

    def refuse(field: str, expected: str) -> ValueError:
        value = entry.get(field) if isinstance(entry, dict) else entry
        return ValueError(f"{where}: field {field}: expected {expected}, got {value!r:.80}")

    def paths(*fields: str) -> list[str]:
        field = next((f for f in fields if entry.get(f)), fields[0])
        value = entry.get(field) or []
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(path, str) for path in value):
            raise refuse(field, "a path or a list of paths")
        return [path for path in value if path]

    if not isinstance(entry, dict):
        raise refuse("image", "a record")
    images, masks = paths("image", "images"), paths("mask", "masks")
    if masks and not images:
        raise refuse("image", "a path, as there is a mask")
    turns = entry.get("conversations") or entry.get("messages")
    if not isinstance(turns, list) or not turns:
        raise refuse("conversations", "a list of turns")
    if entry.get("video") or entry.get("videos"):
        raise Unsupported(f"{where}: a video")
    if masks and len(images) > 1:
        raise Unsupported(f"{where}: {len(images)} images in one record with a mask, which belongs to one image")
    conversations = []
    for turn in turns:
        speaker, said = _turn(turn)
        if not isinstance(speaker, str) or not isinstance(said, str):
            raise refuse("conversations" if entry.get("conversations") else "messages",
                         'turns {"from": text, "value": text} or {"role", "content"}')  # fmt: skip
        conversations.append({"from": _SPEAKERS.get(speaker, speaker), "value": said})
    return {"images": images, "mask": masks, "conversations": conversations}


def _turn(turn: Any) -> tuple[Any, Any]:
    """Speaker and text of a turn in either form, not yet checked; a content may be a list of texts and images."""
    if not isinstance(turn, dict):
        return None, None
    speaker, said = (turn.get("from"), turn.get("value")) if "from" in turn else (turn.get("role"), turn.get("content"))
    if isinstance(said, list) and all(isinstance(part, dict) for part in said):
        known = {
            "text": lambda part: part.get("text"),
            "image": lambda _: text.IMAGE,
            "image_url": lambda _: text.IMAGE,
        }
        texts = [known.get(part.get("type"), lambda _: None)(part) for part in said]
        said = "\n".join(texts) if all(isinstance(one, str) for one in texts) else None
    return speaker, said
