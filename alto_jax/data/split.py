"""Which images are held out of training: a hash of each image's name decides, whatever the data set.

An image's name is its file's name without folder and ending, and without COCO's `COCO_train2014_`: copies of one image
in several data sets, folders and formats fall on the same side, on every machine and in every order of the files. Its
place in 0..1 is the BLAKE2b-64 digest of the name (UTF-8), read as a big-endian number, over 2^64; it is held out if
that is below the fraction. So a larger fraction holds out the same images and more.
"""

from collections.abc import Sequence
import dataclasses
import hashlib
import os
import re
from typing import Any

import numpy as np

_COCO = re.compile(r"^COCO_(train|val|test)\d{4}_")
_HASHES = 2.0**64


class EmptySplit(ValueError):
    """No record of a data set lies on the side that was asked for."""


def image_name(path: str | os.PathLike) -> str:
    """The name by which an image is known, see the module."""
    file = re.split(r"[/\\]", os.fspath(path))[-1]
    return _COCO.sub("", file.rsplit(".", 1)[0] if "." in file[1:] else file)


def file_hash(path: str | os.PathLike) -> int:
    """The `image_hash` of an image file's name."""
    return image_hash(image_name(path))


def image_hash(name: str) -> int:
    """A number below 2^64 of an image's name."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


@dataclasses.dataclass(frozen=True)
class ImageSplit:
    """One side of a data set.

    fraction: share of the images that are held out, in 0..1. held_out: this is their side.
    """

    fraction: float
    held_out: bool

    def has_hashes(self, hashes: np.ndarray) -> np.ndarray:
        """Whether the images of uint64[N] hashes are on this side, bool[N]."""
        return (hashes.astype(np.float64) < self.fraction * _HASHES) == self.held_out

    def has(self, hashes: Sequence[int], key: str) -> bool:
        """Whether a record is on this side: all of its images are (by their hashes), or its key if it has no image.

        A record with images of both sides is on neither.
        """
        return bool(self.has_hashes(np.array(hashes or [image_hash(key)], np.uint64)).all())

    def require_some(self, count: int, total: int, where: Any) -> None:
        """Raises EmptySplit if `count` of `total` records is 0."""
        if count == 0:
            side = "in" if self.held_out else "outside"
            raise EmptySplit(
                f"config.data.validation_fraction: none of the {total} records of {where} has its image {side} the "
                f"fraction {self.fraction}, which goes by the images' file names; choose another one, or give a set of "
                "its own (config.eval.source)"
            )
