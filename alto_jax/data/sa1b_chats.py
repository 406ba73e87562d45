"""Multi-Target-SA1B as conversations (paper section 4.1): requests that name the targets of a mask by their boxes.

In: a folder of SA-1B (sa1b_folder.py). Out: `Sa1bTargets`, ReferringRecords whose phrase is
`<box>[[x1,y1,x2,y2],…]</box>` in thousandths of the image's sides, one box for each target of the mask, and
`Sa1bChats`, ChatRecords that ask for it, by fixed length or by adaptive length in one of its wordings (mllm/text.py).
The image is the whole one.

In training targets, wording and kind are drawn anew in every epoch, a function of (seed, index, epoch). On the
validation list (`validation_targets`) they are a function of the image's name: the same for everyone, whatever part of
SA-1B is there.
"""

from collections.abc import Iterator
import copy
import os
from typing import Any

import numpy as np

from alto_jax.data.bad_data import RecordError
from alto_jax.data.reading import AS_STORED, Photo, Reading
from alto_jax.data.sa1b_folder import MAX_TARGETS, VALIDATION, Annotated, Sa1bFolder, Sa1bRecords, most_targets
from alto_jax.data.source import OneForOne, place
from alto_jax.data.split import EmptySplit, ImageSplit, file_hash
from alto_jax.mllm import boxes, text

_NUM_TEXTS = 1000  # made-up requests that a text tokenizer is trained on


class Sa1bTargets(Sa1bRecords):
    """Random access to ReferringRecords {"key", "image", "image_name", "mask", "phrase"} of a SA-1B folder.

    `mask` is the union of 1 to `max_targets` of an image's large annotations, `phrase` their boxes.
    """

    no_target = False

    def __init__(
        self,
        root: str | os.PathLike,
        *,
        train: bool = True,
        seed: int = 0,
        draws_per_image: int = 1,
        max_targets: int = MAX_TARGETS,
        reading: Reading = AS_STORED,
    ):
        """Lists the folder.

        Args:
          root: the folder.
          train: targets drawn anew in every epoch, of images that are not on the validation list; an image without a
            large annotation is replaced by another one. Otherwise targets drawn of the image's name, in all epochs the
            same, of all images; an image without a large annotation asks for its largest one.
          seed: of the random choices in training.
          draws_per_image: records made of each image (training): record i is of image i mod N.
          max_targets: most targets of a union.
          reading: of the images (EXIF).

        Raises:
          ValueError: no such folder, no annotation file in it, or an argument below 1.
        """
        if max_targets < 1:
            raise ValueError(f"max_targets: expected at least 1, got {max_targets}")
        folder = Sa1bFolder(root, train=train, reading=reading)
        super().__init__(folder, train=train, seed=seed, draws_per_image=draws_per_image, most=max_targets)

    def _known(self) -> tuple[Any, ...]:
        return "boxes", *super()._known(), self._most

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.at_epoch(index, 0)

    def at_epoch(self, index: int, epoch: int) -> dict[str, Any]:
        """Record `index` as it is drawn in an epoch (without `train`, the same in all)."""
        index = place(index, self)
        number = index % len(self.folder)
        if self._train:
            rng = np.random.default_rng((self._seed, index, epoch))
            annotated = self.folder.some(number, rng)
        else:
            annotated = self.folder.annotated(number, or_largest=True)
            rng = np.random.default_rng(file_hash(annotated.file))
        count = len(annotated.large)
        most = min(most_targets(count), self._most, count)
        chosen = rng.permutation(count)[: int(rng.integers(1, most + 1))].tolist()
        photo = self.folder.photo(annotated)
        mask, found = _union(annotated, photo, chosen)
        key = self.folder.key(annotated, index) if self._train else annotated.image_name
        return {
            "key": key, "image": photo.image, "image_name": annotated.image_name,
            "mask": mask.astype(np.uint8) * np.uint8(255), "phrase": boxes.format_boxes(found, mask.shape),
        }  # fmt: skip


def validation_targets(root: str | os.PathLike, *, reading: Reading = AS_STORED) -> Sa1bTargets:
    """The validation list of a SA-1B folder: the images whose names' hash is below VALIDATION.

    Raises:
      ValueError: no such folder, or none of its images is on the list.
    """
    try:
        return Sa1bTargets(root, train=False, reading=reading).part(ImageSplit(VALIDATION, held_out=True))
    except EmptySplit as error:
        raise ValueError(
            f"SA-1B folder {root}: none of its images is on the validation list, which has {VALIDATION:.1%} of them all"
        ) from error


class Sa1bChats(OneForOne):
    """ChatRecords of Sa1bTargets: fixed and adaptive requests half and half, adaptive ones in all their wordings."""

    def __init__(self, source: Sa1bTargets, *, seed: int = 0, adaptive_fraction: float = 0.5):
        self.source, self._seed, self._adaptive = source, seed, adaptive_fraction

    def part(self, split: ImageSplit) -> "Sa1bChats":
        """The images on one side of a split; EmptySplit if there is none."""
        found = copy.copy(self)
        found.source = self.source.part(split)
        return found

    def problems(self, index: int) -> list[ValueError]:
        """See `Sa1bTargets.problems`."""
        return self.source.problems(index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.at_epoch(index, 0)

    def at_epoch(self, index: int, epoch: int) -> dict[str, Any]:
        """Record `index` as it is asked in an epoch."""
        record = self.source.at_epoch(index, epoch)
        # Note: another stream than that of the targets, which begins with (seed, index, epoch) alone.
        rng = np.random.default_rng((self._seed, int(index) % len(self), epoch, 1))
        adaptive, template = bool(rng.random() < self._adaptive), int(rng.integers(len(text.ADAPTIVE_TEMPLATES)))
        question = text.question(record["phrase"], adaptive=adaptive, template=template)
        turns = [
            {"from": "human", "value": f"{text.IMAGE}\n{question}"},
            {"from": "gpt", "value": text.answer(adaptive=adaptive)},
        ]
        shared = {name: record[name] for name in ("key", "image", "image_name")}
        return shared | {"masks": [record["mask"]], "conversations": turns}

    def texts(self) -> Iterator[list[str]]:
        """Requests as they are asked, of made-up boxes (no file is read), and the answers: for a text tokenizer."""
        rng = np.random.default_rng(0)
        for number in range(_NUM_TEXTS):
            corners = np.sort(rng.integers(0, boxes.SCALE + 1, (int(rng.integers(1, 4)), 2, 2)), axis=1)
            some = [(x1, y1, x2 - x1, y2 - y1) for (x1, y1), (x2, y2) in corners.tolist()]
            phrase = boxes.format_boxes(some, (boxes.SCALE, boxes.SCALE))
            yield [text.question(phrase, adaptive=bool(number % 2), template=number), text.answer(adaptive=False)]


def _union(annotated: Annotated, photo: Photo, chosen: list[int]) -> tuple[np.ndarray, list[tuple[int, ...]]]:
    """The union bool[H, W] of large annotations in the image's frame, and (x, y, width, height) of each."""
    union: np.ndarray = np.zeros(photo.image.shape[:2], bool)
    found: list[tuple[int, ...]] = []
    for which in chosen:
        mask = photo.turned(annotated.mask(which))
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if not len(rows):
            number = annotated.large[which][0]
            raise RecordError(f"{annotated.file}: annotations[{number}].segmentation is an empty mask", "empty mask")
        x, y = int(columns[0]), int(rows[0])
        found.append((x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y))
        union |= mask
    return union, found
