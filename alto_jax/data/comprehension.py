"""Referring comprehension: a phrase is answered with the box of what it names, as text in InternVL's form.

In: a split of RefCOCO, RefCOCO+ or RefCOCOg (refcoco.py), published or PSALM-converted. Out: `Comprehension`, records
{"key", "image", "image_name", "phrase", "box"}, each expression by itself, which `BoxQuestions` asks as a benchmark and
`ComprehensionChats` as ChatRecords without masks. A box is the annotation's `bbox`, else that of its mask.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from alto_jax.data import bad_data, coco
from alto_jax.data.bad_data import RecordError
from alto_jax.data.reading import Photo
from alto_jax.data.refcoco import Referent, Referring
from alto_jax.data.source import OneForOne
from alto_jax.data.split import image_name
from alto_jax.mllm import boxes, text

DATASETS = ("refcoco", "refcoco+", "refcocog")
QUESTION = "Please provide the bounding box coordinate of the region this sentence describes: {}"  # InternVL's


class Comprehension(OneForOne):
    """Random access to records with "phrase" and "box" (x, y, width, height) in pixels of "image"."""

    def __init__(self, source: Referring):
        """ValueError: the source joins sentences, or some of its samples have no target."""
        if source.protocol != "per_sentence" or source.no_target:
            raise ValueError("comprehension: expected the sentences of RefCOCO, RefCOCO+ or RefCOCOg one by one")
        self.source = source

    def fingerprint(self) -> str:
        """What the samples are, see fingerprint.py."""
        return self.source.fingerprint()

    def phrases(self) -> Iterator[str]:
        """The sentences of all referents."""
        return self.source.phrases()

    def __getitem__(self, index: int) -> dict[str, Any]:
        referent, key, phrase = self.source.sample(index)
        photo = self.source.photo(referent)
        try:
            box = _box_of(referent, photo)
        except ValueError as error:
            raise bad_data.at(referent.where, error) from error
        return {
            "key": key,
            "image": photo.image,
            "image_name": image_name(referent.image),
            "phrase": phrase,
            "box": box,
        }


class BoxQuestions(OneForOne):
    """Random access to QuestionRecords {"key", "image", "image_name", "question", "label", "category"}.

    label: (x1, y1, x2, y2) in 0..1; category: the data set and split.
    """

    def __init__(self, source: Comprehension, category: str):
        self.source, self._category = source, category

    def fingerprint(self) -> str:
        """What the samples are, see fingerprint.py."""
        return self.source.fingerprint()

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.source[index]
        x, y, width, height = record.pop("box")
        tall, wide = record["image"].shape[:2]
        label = [x / wide, y / tall, (x + width) / wide, (y + height) / tall]
        question = QUESTION.replace("{}", text.reference(record.pop("phrase")))
        return {**record, "question": question, "label": label, "category": self._category}


class ComprehensionChats(OneForOne):
    """ChatRecords of Comprehension, without masks."""

    def __init__(self, source: Comprehension):
        self.source = source

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.source[index]
        asked = QUESTION.replace("{}", text.reference(record.pop("phrase")))
        answer = boxes.format_boxes([record.pop("box")], record["image"].shape[:2])
        turns = [{"from": "human", "value": f"{text.IMAGE}\n{asked}"}, {"from": "gpt", "value": answer}]
        return {**record, "masks": [], "conversations": turns}

    def texts(self) -> Iterator[list[str]]:
        """What is asked of every phrase, and made-up boxes, without reading images."""
        rng = np.random.default_rng(0)
        for phrase in self.source.phrases():
            x, y, width, height = rng.integers(1, boxes.SCALE // 2, 4).tolist()
            box = boxes.format_boxes([(x, y, width, height)], (boxes.SCALE, boxes.SCALE))
            yield [QUESTION.replace("{}", text.reference(phrase)), box]


def _box_of(referent: Referent, photo: Photo) -> tuple[float, ...]:
    """(x, y, width, height) of a referent in the frame of its image."""
    height, width = photo.annotated_size
    coco.check_stated_size((height, width), referent.size)
    is_turned = photo.reading.exif == "upright" and photo.orientation != 1
    if referent.box is not None and not is_turned:
        x, y, w, h = referent.box
        # Note: some boxes of COCO end a fraction of a pixel outside.
        if not (0 <= x < x + w <= width + 1 and 0 <= y < y + h <= height + 1):
            raise RecordError(f"bbox {list(referent.box)} is not inside of the image, which is {width}x{height}")
        return referent.box
    mask = photo.turned(referent.mask(height, width))
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        raise RecordError("the mask is empty, it has no box", "empty mask")
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1 - columns[0]), float(rows[-1] + 1 - rows[0])
