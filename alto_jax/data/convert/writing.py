"""Masks, data.jsonl, meta.json, and images that no file held, of what was found."""

from collections.abc import Collection, Iterator
import hashlib
import json
import os
import pathlib
import re

import numpy as np
from PIL import Image

from alto_jax.config import ConfigError, write_whole
from alto_jax.data import phrases
from alto_jax.data.bad_data import RecordError, at
from alto_jax.data.convert.annotated import PICTURES, Annotated, Frame, drawn
from alto_jax.mllm import text

# Of image files that have no name; Pillow tells all others by their content too.
_BEGINNINGS = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"RIFF": ".webp"}
_TOKENS = (
    *text.MASK_TOKENS,
    *text.PAD_CANDIDATES,
    text.IMAGE,
    text.IMG,
    text.IMG_END,
    text.IMG_CONTEXT,
    text.BOS,
    "<unk>",
)
# Those of the template, of masks, and the like of other vocabularies (<|im_end|>, <|eot_id|>).
_SPECIAL = re.compile(rf"{'|'.join(map(re.escape, _TOKENS))}|<TOK_\d+>|<\|[^<>|\s]+\|>")


def write(
    found: Iterator[Annotated | RecordError],
    out: pathlib.Path,
    *,
    adaptive: float,
    max_bad_fraction: float,
    exif: Frame = None,
    root: pathlib.Path = pathlib.Path(),
) -> tuple[int, list[str]]:
    """Writes masks, data.jsonl and meta.json; and images, where the annotations hold them.

    Args:
      found: what a reader gives.
      out: the folder.
      adaptive: share of the requests for as many mask tokens as needed; the others ask for all. By the mask's name,
        so that it is the same in every run.
      max_bad_fraction: share of entries that may be bad.
      exif: what pictures with an EXIF orientation were annotated on, for meta.json; None: see `annotated.drawn`.
      root: of the images; of those that have one name, all but the first are told apart by their paths below it.

    Returns:
      The number of records, and what was left out, a line each.

    Raises:
      ConfigError: more than that is bad, or nothing was found. Nothing is left behind.
    """
    lines, bad = [], []
    names: dict[str, tuple[pathlib.Path, str]] = {}
    held = _HeldImages(out / "images")
    (out / "masks").mkdir(parents=True, exist_ok=True)
    for entry in found:
        try:
            if isinstance(entry, RecordError):
                raise entry
            path = entry.image if entry.content is None else held.write(entry.image.name, entry.content)
            _, mask = drawn(entry, path, exif)
            if not mask.any():
                raise RecordError(f"{entry.where}: an empty mask", "empty mask")
            if not entry.label.strip():
                raise RecordError(f"{entry.where}: an object without a name")
            phrase = f"the {entry.label}" if entry.count == 1 else f"all {phrases.plural(entry.label)}"
            is_phrase = entry.is_phrase or entry.label.startswith(("the ", "all "))
            phrase = entry.label if is_phrase else phrase
            name, digest = _name(path, path.name, entry.label)
            if names.get(name, (path, entry.label)) != (path, entry.label):
                name, digest = _name(path, pathlib.Path(os.path.relpath(path, root)).as_posix(), entry.label)
            is_adaptive = int.from_bytes(digest, "big") < adaptive * 2**64
            _check_name(phrase, text.MARKUP if not entry.is_phrase else ())
            question = text.question(phrase, adaptive=is_adaptive)
        except ValueError as error:
            bad.append(str(error if isinstance(entry, RecordError) else at(entry.where, error)))
            continue
        if name in names:
            bad.append(f"{entry.where}: a second entry of this image and name")
            continue
        names[name] = path, entry.label
        held.used.add(path)
        Image.fromarray(mask.astype(np.uint8) * 255).save(out / "masks" / f"{name}.png")
        turns = [{"from": "human", "value": f"{text.IMAGE}\n{question}"},
                 {"from": "gpt", "value": text.answer(adaptive=is_adaptive)}]  # fmt: skip
        place = os.path.relpath(path.resolve(), out.resolve())
        lines.append(json.dumps({"image": place, "mask": f"masks/{name}.png", "conversations": turns}))
    total = len(lines) + len(bad)
    refused = not lines or len(bad) > max_bad_fraction * total
    held.clear(keep=() if refused else held.used)
    if refused:
        for name in names:
            (out / "masks" / f"{name}.png").unlink()
        first = f", such as {bad[0]}" if bad else ""
        if not any((out / "masks").iterdir()):
            (out / "masks").rmdir()
        limit = f"at most --max-bad-fraction={max_bad_fraction}"
        raise ConfigError(f"{len(bad)} of {total} entries are bad{first}; {limit}" if bad else "no entries were found")
    write_whole(out / "data.jsonl", "\n".join(lines) + "\n")
    about = {"root": ".", "annotation": "data.jsonl", "data_augment": False, "repeat_time": 1, "length": len(lines)}
    about["exif"] = exif or "stored"
    write_whole(out / "meta.json", json.dumps({out.resolve().name: about}, indent=1) + "\n")
    return len(lines), bad


def _check_name(phrase: str, also: Collection[str]) -> None:
    """Refuses a name with special tokens, those in `also`, or marks that do not enclose a reference; RecordError.

    Which tokens a model has is known in training alone, where such a record is bad (mllm/literals.py): so all of every
    vocabulary that is read.
    """
    found = _SPECIAL.search(phrase) or next((token for token in also if token in phrase), None)
    if found:
        token = found if isinstance(found, str) else found[0]
        raise RecordError(f"the name {phrase!r:.80} holds {token!r}, which the model reads as more than text")
    marks = re.findall("|".join((text.REF, text.REF_END, text.BOX, text.BOX_END)), text.reference(phrase))
    if [begin.replace("<", "</") for begin in marks[::2]] != marks[1::2]:
        raise RecordError(f"the phrase {phrase!r:.80}: expected whole {text.REF}…{text.REF_END} or none")


def _name(path: pathlib.Path, known_as: str, label: str) -> tuple[str, bytes]:
    """The name of a mask's file, and the hash in it."""
    digest = hashlib.blake2b(f"{known_as}|{label}".encode(), digest_size=8).digest()
    return f"{path.stem}_{digest[:5].hex()}", digest


class _HeldImages:
    """Image files whose content the annotations hold, written once each.

    used: of these and other files, those that a record names.
    """

    def __init__(self, folder: pathlib.Path):
        self.used: set[pathlib.Path] = set()
        self._folder, self._written = folder, dict[pathlib.Path, bytes]()

    def write(self, name: str, content: bytes) -> pathlib.Path:
        """The file of an image: by the name that it had, since that is how images are known (data/split.py); by its
        content if it had none, or another one has that name."""
        digest, given = hashlib.blake2b(content, digest_size=8).digest(), pathlib.PurePath(name)
        by_content = next((end for begin, end in _BEGINNINGS.items() if content.startswith(begin)), ".img")
        ending = given.suffix if given.suffix.lower() in PICTURES else by_content
        stem = re.sub(r"[^\w.-]", "_", given.stem)[:100]
        path = self._folder / f"{stem or digest.hex()}{ending}"
        if self._written.get(path, digest) != digest:
            path = self._folder / f"{stem}_{digest.hex()}{ending}"
        if path not in self._written:
            self._folder.mkdir(exist_ok=True)
            write_whole(path, content)
            self._written[path] = digest
        return path

    def clear(self, keep: Collection[pathlib.Path]) -> None:
        """Removes all that were written but some."""
        for path in self._written.keys() - set(keep):
            path.unlink()
        if self._folder.is_dir() and not any(self._folder.iterdir()):
            self._folder.rmdir()
