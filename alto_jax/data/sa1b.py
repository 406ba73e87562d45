"""Multi-Target-SA1B: unions of several SA-1B masks of an image, read from the published files.

In: a folder of SA-1B (sa1b_folder.py). Out: MaskRecords by the reference's rule (reference/NUMERICS.md §8):
1 to 20 large annotations merged; in training a square crop around them; at most 1024 pixels; padded to a square.
Record i of epoch e is a function of (seed, i, e), in any order: every epoch draws targets, crop and padding anew.
The same unions as conversations: sa1b_chats.py.
"""

from collections.abc import Iterable
import os
from typing import Any

import numpy as np

from alto_jax.data import transforms
from alto_jax.data.bad_data import RecordError
from alto_jax.data.reading import AS_STORED, Reading
from alto_jax.data.sa1b_folder import Annotated, Sa1bFolder, Sa1bRecords, most_targets
from alto_jax.data.source import place


class Sa1bMasks(Sa1bRecords):
    """Random access to MaskRecords {"key", "image", "mask"} of a SA-1B folder.

    `image` is uint8[S, S, 3] and `mask` uint8[S, S] in 0..255, S at most `max_side`; mask values between are
    the soft edge of the reference's bicubic shrinking.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        *,
        train: bool = True,
        seed: int = 0,
        draws_per_image: int = 1,
        max_side: int = 1024,
        min_area: float = 0.005,
        reading: Reading = AS_STORED,
    ):
        """Lists the folder.

        Args:
          root: the folder.
          train: random number and choice of annotations, random crop and random padding, of images that are not on the
            validation list; otherwise the first ones of all images, number by index, whole image, padding at the
            bottom and right.
          seed: of the random choices.
          draws_per_image: records made of each image (training): record i is of image i mod N.
          max_side: longest side kept, in pixels.
          min_area: smallest annotation used, as a fraction of the squared long side.
          reading: of the images (EXIF).

        Raises:
          ValueError: no such folder, or no annotation file in it.
        """
        folder = Sa1bFolder(root, train=train, min_area=min_area, reading=reading)
        super().__init__(folder, train=train, seed=seed, draws_per_image=draws_per_image, most=max_side)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.at_epoch(index, 0)

    def at_epoch(self, index: int, epoch: int) -> dict[str, Any]:
        """Record `index` as it is drawn in an epoch (without `train`, the same in all)."""
        index = place(index, self)
        rng = np.random.default_rng((self._seed, index, epoch if self._train else 0))
        annotated = self.folder.some(index % len(self.folder), rng)
        count = len(annotated.large)
        most = most_targets(count)
        if self._train:
            chosen = rng.permutation(count)[: int(rng.integers(1, min(most, count) + 1))].tolist()
        else:
            chosen = range(min(index % most + 1, count))
        mask = _union(annotated, chosen)
        photo = self.folder.photo(annotated)
        image, mask = photo.image, photo.turned(mask)
        if self._train:
            image, mask = transforms.crop_around(image, mask, rng)
        image, mask = (
            transforms.limit_side(image, self._most),
            transforms.keep_small(transforms.limit_side(mask, self._most), mask),
        )
        image, mask = transforms.pad_square(image, mask, rng if self._train else None)
        return {
            "key": self.folder.key(annotated, index), "image": image, "image_name": annotated.image_name, "mask": mask
        }  # fmt: skip


def _union(annotated: Annotated, chosen: Iterable[int]) -> np.ndarray:
    """The union of large annotations as uint8[H, W] in {0, 255}."""
    mask = np.zeros(annotated.size, bool)
    for which in chosen:
        mask |= annotated.mask(which)
    if not mask.any():
        raise RecordError(f"{annotated.file}: the chosen annotations have empty masks", "empty mask")
    return mask.astype(np.uint8) * np.uint8(255)
