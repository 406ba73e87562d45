"""Conversations with masks, as the reference's fine-tuning data are stored: a meta JSON and JSONL files.

In: `{name: {"root", "annotation", "data_augment", "repeat_time", "length"}}`, where `annotation` is a JSONL
of `{"image": path, "mask": path or [paths], "conversations": [{"from", "value"}, …]}`. Out: ChatRecords.
`root` is relative to the meta file, `annotation` to `root` or to the meta file, images and masks to `root`.
Records are weighted by `repeat_time`: 3 has each record three times, 0.5 a fixed half of them once.
"""

from collections.abc import Iterator
import copy
import dataclasses
import json
import logging
import os
import pathlib
from typing import Any

import numpy as np

from alto_jax.data import transforms
from alto_jax.data.split import ImageSplit, file_hash, image_name

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Part:
    """One data set of the meta file: where line i starts, which lines belong (rows), and which are used how often."""

    name: str
    root: pathlib.Path
    file: pathlib.Path
    augment: bool
    offsets: np.ndarray
    line_numbers: np.ndarray
    rows: np.ndarray
    chosen: np.ndarray

    def read(self, row: int) -> tuple[str, dict[str, Any]]:
        """Where used line `row` stands, for messages, and its checked content."""
        where = f"{self.file} line {self.line_numbers[row]}"
        with open(self.file, "rb") as file:
            file.seek(int(self.offsets[row]))
            return where, _parse(file.readline(), where)

    def images(self, row: int) -> tuple[tuple[int, ...], str]:
        """Hashes of the images of used line `row` (none if it is malformed), and the line's key."""
        key = f"{self.name}/{self.file.name}:{self.line_numbers[row]}"
        try:
            return (file_hash(self.read(row)[1]["image"]),), key
        except ValueError:  # Counted and reported where the record is read.
            return (), key


class Conversations:
    """Random access to ChatRecords {"key", "image", "masks", "conversations"} of a meta file.

    Lines are found when opening and parsed when read, so that large files cost little memory. A record is a
    function of (seed, index).
    """

    def __init__(self, meta: str | os.PathLike, *, seed: int = 0, once: bool = False):
        """Opens all data sets of a meta file.

        Args:
          meta: the meta JSON.
          seed: of the subsets that a fractional repeat_time takes, and of JPEG augmentation.
          once: every line once and as it is, whatever repeat_time and data_augment say.

        Raises:
          ValueError: a file that is missing or malformed; the message names file, data set and field.
        """
        meta = pathlib.Path(meta)
        try:
            content = json.loads(meta.read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(f"meta file {meta} cannot be read: {error}") from error
        if not isinstance(content, dict) or not content:
            raise ValueError(f"meta file {meta}: expected a non-empty object of data sets")
        self._seed = seed
        self._parts = [_open_part(meta, name, entry, seed) for name, entry in content.items()]
        if once:
            whole = lambda part: dataclasses.replace(part, augment=False, chosen=np.arange(len(part.offsets)))
            self._parts = [whole(part) for part in self._parts]
        self._ends = np.cumsum([len(part.chosen) for part in self._parts])

    def part(self, split: ImageSplit) -> "Conversations":
        """The records whose images are on one side of a split (each data set's may be none).

        Raises:
          EmptySplit: there is none at all.
        """
        found = copy.copy(self)
        found._parts = []
        for part in self._parts:
            on_side = np.zeros(len(part.offsets), bool)
            on_side[part.rows] = [split.has(*part.images(row)) for row in part.rows]
            changes = {"rows": part.rows[on_side[part.rows]], "chosen": part.chosen[on_side[part.chosen]]}
            found._parts.append(dataclasses.replace(part, **changes))
        found._ends = np.cumsum([len(part.chosen) for part in found._parts])
        split.require_some(len(found), len(self), ", ".join(str(part.file) for part in self._parts))
        return found

    def image_hashes(self, index: int) -> tuple[int, ...]:
        """Hashes of the images of record `index`, see split.py; reads its line alone."""
        part, row = self._find(index)
        return part.images(row)[0]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _find(self, index: int) -> tuple[_Part, int]:
        """The data set and line of record `index`, in 0..len-1."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        part = self._parts[number]
        return part, int(part.chosen[index - (self._ends[number - 1] if number else 0)])

    def conversation(self, index: int) -> dict[str, Any]:
        """Record `index` without its image and masks."""
        part, row = self._find(index)
        where, entry = part.read(row)
        return {"key": where, "conversations": entry["conversations"]}

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        index = int(index) % len(self)
        part, row = self._find(index)
        where, entry = part.read(row)
        try:
            image = transforms.open_image(part.root / entry["image"])
            masks = [transforms.open_mask(part.root / path) for path in entry["mask"]]
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if part.augment:
            image = transforms.jpeg_augment(image, np.random.default_rng((self._seed, index)))
        key = f"{part.name}/{part.file.name}:{part.line_numbers[row]}"
        record = {"key": key, "image": image, "image_name": image_name(entry["image"]), "masks": masks}
        return record | {"conversations": entry["conversations"]}

    def texts(self) -> Iterator[list[str]]:
        """The turns of every line, each line once, without reading images: text to train a tokenizer on.

        A malformed line has none; it is counted and reported where records are read.
        """
        for part in self._parts:
            for row in part.rows:
                try:
                    _, entry = part.read(row)
                except ValueError:
                    continue
                yield [turn["value"] for turn in entry["conversations"]]


def _open_part(meta: pathlib.Path, name: str, entry: Any, seed: int) -> _Part:
    """Checks an entry of the meta file and finds the lines of its JSONL."""

    def field(key: str, kinds: tuple[type, ...], default: Any = None) -> Any:
        value = entry.get(key, default) if isinstance(entry, dict) else None
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ValueError(f"meta file {meta}: {name}.{key} is missing or of a wrong type: {value!r}")
        return value

    root = meta.parent / field("root", (str,))
    annotation = field("annotation", (str,))
    repeat = field("repeat_time", (int, float), 1)
    augment = field("data_augment", (bool,), False)
    if not repeat > 0:
        raise ValueError(f"meta file {meta}: {name}.repeat_time must be above 0, got {repeat}")
    file = next((base / annotation for base in (root, meta.parent) if (base / annotation).is_file()), None)
    if file is None:
        raise ValueError(f"meta file {meta}: {name}.annotation {root / annotation} does not exist")
    offsets, line_numbers, position = [], [], 0
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                offsets.append(position)
                line_numbers.append(number)
            position += len(line)
    count = len(offsets)
    if count == 0:
        raise ValueError(f"{file} holds no line")
    declared = entry.get("length")
    if declared is not None and declared != count:
        _log.warning("meta file %s: %s.length is %s, but %s has %d lines", meta, name, declared, file, count)
    whole, total = int(repeat), max(1, round(count * repeat))
    rest = np.sort(np.random.default_rng((seed, count)).permutation(count)[: total - whole * count])
    chosen = np.concatenate([np.tile(np.arange(count), whole), rest])
    return _Part(name, root, file, augment, np.array(offsets), np.array(line_numbers), np.arange(count), chosen)


def _parse(line: bytes, where: str) -> dict[str, Any]:
    """One line as {"image": str, "mask": [str, …], "conversations": [{"from", "value"}, …]}, checked."""
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON: {error}") from error

    def refuse(field: str, expected: str) -> ValueError:
        value = entry.get(field) if isinstance(entry, dict) else entry
        return ValueError(f"{where}: field {field}: expected {expected}, got {value!r:.80}")

    if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
        raise refuse("image", "a path")
    masks = entry.get("mask") or []
    masks = [masks] if isinstance(masks, str) else masks
    if not isinstance(masks, list) or not all(isinstance(path, str) for path in masks):
        raise refuse("mask", "a path or a list of paths")
    turns = entry.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise refuse("conversations", "a list of turns")
    for turn in turns:
        if not isinstance(turn, dict) or not all(isinstance(turn.get(k), str) for k in ("from", "value")):
            raise refuse("conversations", 'turns {"from": text, "value": text}')
    conversations = [{"from": turn["from"], "value": turn["value"]} for turn in turns]
    return {"image": entry["image"], "mask": masks, "conversations": conversations}
