"""Conversations with masks, as the reference's fine-tuning data are stored: a meta JSON and JSONL files.

In: `{name: {"root", "annotation", "data_augment", "repeat_time", "length", "exif", "mask_rule"}}`, where `annotation`
is a JSONL or a JSON list of `{"image": path, "mask": path or [paths], "conversations": [{"from", "value"}, …]}`, see
chat_lines.py. Out: ChatRecords; a record without an image is text alone, one with several images has "images", too.
`root` is relative to the meta file, `annotation` to `root` or to the meta file, images and masks to `root`.
Records are weighted by `repeat_time`: 3 has each record three times, 0.5 a fixed half of them once.
"""

from collections.abc import Iterator
import copy
import dataclasses
import logging
import os
import pathlib
from typing import Any

import numpy as np

from alto_jax.config import ConfigError
from alto_jax.data import bad_data, chat_lines, identity, transforms
from alto_jax.data.reading import AS_STORED, Reading
from alto_jax.data.source import place
from alto_jax.data.split import ImageSplit, image_hash, image_name

_log = logging.getLogger(__name__)
_MOST_RECORDS = 10**8  # of a data set with its repetitions; each takes 8 bytes


@dataclasses.dataclass(frozen=True)
class _Chosen:
    """Which lines are used, in order: all of `usable` (row numbers) `whole` times, then its places `rest` once."""

    usable: np.ndarray | range
    whole: int
    rest: np.ndarray

    def __len__(self) -> int:
        return self.whole * len(self.usable) + len(self.rest)

    def __getitem__(self, index: int) -> int:
        over = index - self.whole * len(self.usable)
        return int(self.usable[index % len(self.usable) if over < 0 else int(self.rest[over])])

    def rows(self) -> np.ndarray:
        """All of them, int[N]."""
        usable = np.asarray(self.usable, np.int64)
        return np.concatenate([np.tile(usable, self.whole), usable[self.rest]])

    def part(self, on_side: np.ndarray) -> "_Chosen":
        """Those of the places bool[n] of `usable`."""
        places = np.cumsum(on_side) - 1
        return _Chosen(np.asarray(self.usable)[on_side], self.whole, places[self.rest[on_side[self.rest]]])


@dataclasses.dataclass(frozen=True)
class _Part:
    """One data set of the meta file: its lines, and which of them are used, how often."""

    name: str
    root: pathlib.Path
    lines: chat_lines.Lines
    augment: bool
    reading: Reading
    chosen: _Chosen

    def identity(self) -> dict[str, Any]:
        """Number of records and hash: of the lines and of how often each is used."""
        chosen = self.chosen
        usable = () if isinstance(chosen.usable, range) else (np.asarray(chosen.usable, np.int64).tobytes(),)
        used = (chosen.whole, chosen.rest.tobytes(), *usable)
        return {"records": len(chosen), "hash": identity.digest(self.lines.digest, *used)}

    def key(self, row: int) -> str:
        """The key of line `row`."""
        return f"{self.name}/{self.lines.file.name}:{self.lines.numbers[row]}"

    def on_side(self, split: ImageSplit, rows: np.ndarray) -> np.ndarray:
        """Whether all images of lines are on a side of a split, bool[n]; a line without an image goes by its key."""
        found = self.lines.image_hashes[rows]
        for i in np.flatnonzero(found == 0):
            found[i] = image_hash(self.key(int(rows[i])))
        elsewhere = self.lines.more_rows[~split.has_hashes(self.lines.more_hashes)]
        return split.has_hashes(found) & ~np.isin(rows, elsewhere)


class Conversations:
    """Random access to ChatRecords {"key", "image" (None: text alone), "masks", "conversations"} of a meta file.

    A record of several images has them all as "images"; its "image" is the first.

    Lines are found once (index.py) and parsed when read, so that large files cost little memory. A record is a
    function of (seed, index), with `data_augment` also of the epoch.
    """

    def __init__(
        self,
        meta: str | os.PathLike,
        *,
        seed: int = 0,
        once: bool = False,
        max_masks: int | None = None,
        max_images: int | None = 1,
        reading: Reading = AS_STORED,
    ):
        """Opens all data sets of a meta file.

        Args:
          meta: the meta JSON.
          seed: of the subsets that a fractional repeat_time takes, and of JPEG augmentation.
          max_masks, max_images: records of more are passed over, with a warning; None: none is.
          once: every line once and as it is, whatever repeat_time and data_augment say.
          reading: of images and masks, for data sets whose entry has no exif, mask_rule of its own.

        Raises:
          ValueError: a file that is missing or malformed, or no record that can be used; the message names file, data
            set and field.
        """
        meta = pathlib.Path(meta)
        try:
            content = bad_data.parse_json(meta.read_bytes(), f"meta file {meta}")
        except OSError as error:
            raise ValueError(f"meta file {meta} cannot be read: {error.strerror}") from error
        if not isinstance(content, dict) or not content:
            raise ValueError(f"meta file {meta}: expected a non-empty object of data sets")
        self._seed = seed
        limits = {"max_masks": max_masks, "max_images": max_images}
        self._parts = [_open_part(meta, name, entry, seed, limits, reading) for name, entry in content.items()]
        if once:
            each = lambda part: _Chosen(part.chosen.usable, 1, np.zeros(0, np.int64))
            self._parts = [dataclasses.replace(part, augment=False, chosen=each(part)) for part in self._parts]
        if not any((part.lines.kinds[part.chosen.rows()] == chat_lines.GOOD).any() for part in self._parts):
            problem = next((part.lines.problem for part in self._parts if part.lines.problem), "")
            problem = problem or "they have more than data.max_masks masks or data.max_images images"
            raise ValueError(f"meta file {meta}: none of its records can be used: {problem}")
        self._ends = np.cumsum([len(part.chosen) for part in self._parts])

    def part(self, split: ImageSplit) -> "Conversations":
        """The records whose images are on one side of a split (each data set's may be none).

        Raises:
          EmptySplit: there is none at all.
        """
        found = copy.copy(self)
        found._parts = []
        for part in self._parts:
            on_side = part.on_side(split, np.asarray(part.chosen.usable))
            found._parts.append(dataclasses.replace(part, chosen=part.chosen.part(on_side)))
        found._ends = np.cumsum([len(part.chosen) for part in found._parts])
        split.require_some(len(found), len(self), ", ".join(str(part.lines.file) for part in self._parts))
        return found

    def image_hashes(self, index: int) -> tuple[int, ...]:
        """Hashes of the images of record `index`, see split.py."""
        part, row = self._find(index)
        return part.lines.hashes(row)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _find(self, index: int) -> tuple[_Part, int]:
        """The data set and line of record `index`, in 0..len-1."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        part = self._parts[number]
        return part, part.chosen[index - int(self._ends[number - 1] if number else 0)]

    def num_prompts(self) -> np.ndarray:
        """How many requests for one mask each record has, see prompts.Chats; from what was seen when opening."""
        return np.concatenate([part.lines.num_prompts[part.chosen.rows()] for part in self._parts])

    def conversation(self, index: int) -> dict[str, Any]:
        """Record `index` without its masks and without its image, but for "image": None where it has none."""
        part, row = self._find(index)
        where, entry = part.lines.read(row)
        record = {"key": where, "conversations": entry["conversations"]}
        return record | ({} if entry["images"] else {"image": None})

    def identity(self) -> identity.Identity:
        """What the data are, see identity.py."""
        return {part.name: part.identity() for part in self._parts}

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.at_epoch(index, 0)

    def at_epoch(self, index: int, epoch: int) -> dict[str, Any]:
        """Record `index` as it is drawn in an epoch."""
        index = place(index, self)
        part, row = self._find(index)
        where, entry = part.lines.read(row)
        try:
            photos = [part.reading.photo(part.root / path) for path in entry["images"]]
            masks = [photos[0].mask(part.root / path) for path in entry["mask"]]
        except ValueError as error:
            raise bad_data.at(where, error) from error
        images = [photo.image for photo in photos]
        if part.augment:
            draws = [(self._seed, index, epoch), *((self._seed, index, epoch, k) for k in range(1, len(images)))]
            images = [transforms.jpeg_augment(i, np.random.default_rng(draw)) for i, draw in zip(images, draws)]
        record: dict[str, Any] = {"key": part.key(row), "image": images[0] if images else None}
        record |= {"image_name": image_name(entry["images"][0])} if images else {}
        record |= {"images": images} if len(images) > 1 else {}
        return record | {"masks": masks, "conversations": entry["conversations"]}

    def texts(self) -> Iterator[list[str]]:
        """The turns of every line, each line once, without reading images: text to train a tokenizer on.

        A malformed line has none; it is counted and reported where records are read.
        """
        for part in self._parts:
            for row in part.chosen.usable:
                try:
                    _, entry = part.lines.read(int(row))
                except ValueError:
                    continue
                yield [turn["value"] for turn in entry["conversations"]]


def _open_part(
    meta: pathlib.Path, name: str, entry: Any, seed: int, limits: dict[str, int | None], reading: Reading
) -> _Part:
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
    try:
        rules = {key: field(key, (str,), getattr(reading, key)) for key in ("exif", "mask_rule")}
        reading = Reading(**rules).announce()
    except ConfigError as error:
        raise ValueError(f"meta file {meta}: {name}.{error}") from error
    if not repeat > 0:
        raise ValueError(f"meta file {meta}: {name}.repeat_time must be above 0, got {repeat}")
    file = next((base / annotation for base in (root, meta.parent) if os.path.isfile(base / annotation)), None)
    if file is None:
        raise ValueError(f"meta file {meta}: {name}.annotation {root / annotation} does not exist")
    lines = chat_lines.find_lines(file)
    usable = lines.usable(**limits)
    declared, count = entry.get("length"), len(lines.kinds)
    if declared is not None and declared != count:
        _log.warning("meta file %s: %s.length is %s, but %s has %d records", meta, name, declared, file, count)
    count = len(usable)
    if count * repeat > _MOST_RECORDS:
        most = f"makes more than {_MOST_RECORDS} of {count} records"
        raise ValueError(f"meta file {meta}: {name}.repeat_time {most}, got {repeat:.4g}")
    whole, total = int(repeat), max(min(count, 1), round(count * repeat))
    rest = np.sort(np.random.default_rng((seed, count)).permutation(count)[: total - whole * count])
    return _Part(name, root, lines, augment, reading, _Chosen(usable, whole, rest))
