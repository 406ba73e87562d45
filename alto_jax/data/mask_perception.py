"""Mask perception (HiMTok): a mask stands in the question as tokens, the answer names what it shows.

In: `{root}/mask_perception/mask_perception.json`, a list of {"image", "mask", "question", "answer"}. The question holds
a mask in the tokens of some tokenizer (`<|mt_start|>…<|mt_end|>` or `<ALTo_Start>…<ALTo_End>`), which mean nothing to
another one: they are replaced by MARK, for the codes of the file `mask`. Images are COCO's, by their names; masks are
looked for beside the JSON. Out: random access to {"key", "image", "image_name", "mask", "question", "label",
"category"}.

Note: the field `mask` follows from the mask.zip that is published beside the JSON; no source at hand states its name.
"""

import os
import pathlib
import re
from typing import Any

import numpy as np

from alto_jax.data import bad_data, coco, files
from alto_jax.data.bad_data import RecordError
from alto_jax.data.fingerprint import Fingerprint
from alto_jax.data.reading import AS_STORED, Reading
from alto_jax.data.split import image_name
from alto_jax.mllm import text

FOLDERS = ("mask_perception", "Mask_Perception")
MARK = "<mask>"  # Where the mask stands in a question; never a token.
_SPAN = re.compile(rf"<\|mt_start\|>.*?<\|mt_end\|>|{text.MASK_START}.*?{text.MASK_END}", re.DOTALL)


class MaskPerception:
    """Random access to the questions of a file; MARK stands once in each."""

    def __init__(self, file: pathlib.Path, images: pathlib.Path, reading: Reading = AS_STORED):
        """ValueError: the file can't be read, or holds no entry."""
        self._file, self._images, self._reading = file, images, reading
        self._entries = files.load_json(file)
        if not self._entries:
            raise ValueError(f"{file} holds no entry")

    def __len__(self) -> int:
        return len(self._entries)

    def fingerprint(self) -> str:
        """What the samples are, see fingerprint.py."""
        found = Fingerprint()
        found.contents([self._file])
        entries = [entry for entry in self._entries if isinstance(entry, dict)]
        found.contents(self._file.parent / str(entry["mask"]) for entry in entries if entry.get("mask"))
        found.sizes(self._image(str(entry["image"])) for entry in entries if entry.get("image"))
        return str(found)

    def _image(self, name: str) -> pathlib.Path:
        return coco.find_image(self._images / pathlib.PurePosixPath(name).name)

    def __getitem__(self, index: int) -> dict[str, Any]:
        entry, where = self._entries[index], f"{self._file} entry {index}"
        for name in ("image", "mask", "question", "answer"):
            value = entry.get(name) if isinstance(entry, dict) else None
            if not isinstance(value, str) or not value:
                raise RecordError(f"{where}: field {name}: expected a text, got {value!r:.60}")
        question, count = _SPAN.subn(MARK, entry["question"])
        if count != 1:
            raise RecordError(f"{where}: field question: expected one mask in tokens, got {count}: {question[:60]!r}")
        try:
            photo = self._reading.photo(self._image(entry["image"]))
            mask = photo.mask(self._file.parent / entry["mask"])
        except ValueError as error:
            raise bad_data.at(where, error) from error
        if not np.any(mask):
            raise RecordError(f"{where}: the mask {entry['mask']} is empty", "empty mask")
        named = {"key": f"mask_perception/{index}", "image": photo.image, "image_name": image_name(entry["image"])}
        return {**named, "mask": mask, "question": question, "label": entry["answer"], "category": "mask"}


def open_mask_perception(
    root: str | os.PathLike, images: str | os.PathLike | None = None, reading: Reading = AS_STORED
) -> MaskPerception:
    """The published set below a data folder; ValueError says what was expected where.

    `images`: of COCO train2014, if not at a usual place; `reading`: of images (EXIF) and mask files.
    """
    root = pathlib.Path(root)
    file = files.find(root, tuple(f"{f}/mask_perception.json" for f in FOLDERS), "mask perception")
    return MaskPerception(file, coco.image_folder(root, images), reading)
