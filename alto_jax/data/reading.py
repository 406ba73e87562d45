"""How the files of a data set are read: in which frame (EXIF) and by which rule a mask file is a mask.

In: `data.exif` and `data.mask_rule` of a configuration, or their flags. Out: `Photo`s, images with what brings their
annotations into the same frame.

COCO, SA-1B and the fine-tuning files are annotated on the pixels as stored, whatever the EXIF orientation says:
  stored         images as stored, and so masks, polygons and run lengths (the default)
  upright        images turned upright, and their masks, which were drawn on the stored pixels, with them
  masks_upright  images turned upright; their masks were drawn on the upright image and stay as they are
"""

import dataclasses
import logging
import os
from typing import Literal

import numpy as np

from alto_jax.config import require
from alto_jax.data import images, masks
from alto_jax.data.bad_data import RecordError

Exif = Literal["stored", "upright", "masks_upright"]
EXIF = ("stored", "upright", "masks_upright")
_log = logging.getLogger(__name__)
_announced: set["Reading"] = set()


@dataclasses.dataclass(frozen=True)
class Reading:
    """The frame of images and annotations (one of EXIF), and the rule of mask files (see masks.py)."""

    exif: Exif = "stored"
    mask_rule: str = masks.AUTO

    def __post_init__(self) -> None:
        require(self.exif in EXIF, "exif", self.exif, f"one of {', '.join(EXIF)}")
        masks.parse_rule(self.mask_rule)

    def announce(self) -> "Reading":
        """Logs, once, what is not the default."""
        if self != Reading() and self not in _announced:
            _announced.add(self)
            what = {"stored": "images and masks as stored", "upright": "images and their masks turned upright",
                    "masks_upright": "images turned upright, masks as stored"}[self.exif]  # fmt: skip
            _log.warning("exif %r: %s; mask_rule %r", self.exif, what, self.mask_rule)
        return self

    def photo(self, path: str | os.PathLike) -> "Photo":
        """Reads an image file; RecordError as `images.open_image`."""
        loaded = images.load(path)
        image = images.to_rgb(loaded.image, path)
        if loaded.orientation != 1:
            turned = {"stored": "read as stored", "upright": "turned upright, and its masks with it"}
            images.note(path, f"EXIF orientation, {turned.get(self.exif, 'turned upright')}")
        image = image if self.exif == "stored" else images.turn(image, loaded.orientation)
        return Photo(images.check_size(image, path), os.fspath(path), loaded.orientation, self)


AS_STORED = Reading()  # The default of every reader.


@dataclasses.dataclass(frozen=True)
class Photo:
    """An image of a data set.

    image: uint8[H, W, 3], as the model gets it. path: its file. orientation: of the file (EXIF, 1..8; 1: none).
    """

    image: np.ndarray
    path: str
    orientation: int
    reading: Reading

    @property
    def annotated_size(self) -> tuple[int, int]:
        """(height, width) of what the annotations were drawn on."""
        height, width = self.image.shape[:2]
        return (width, height) if self.reading.exif == "upright" and self.orientation >= 5 else (height, width)

    def turned(self, mask: np.ndarray) -> np.ndarray:
        """An annotation [H, W] of `annotated_size` in the frame of `image`."""
        return images.turn(mask, self.orientation) if self.reading.exif == "upright" else mask

    def mask(self, path: str | os.PathLike, rule: str = "") -> np.ndarray:
        """The mask uint8[H, W] in {0, 255} of a file, in the frame of `image`, by a rule ("": that of the data set).

        Raises:
          RecordError: as `masks.open_mask`, or it is not of the image's size.
        """
        loaded, exif = images.load(path, "mask"), self.reading.exif
        mask = masks.mask_of(loaded, path, rule or self.reading.mask_rule)
        own, frame = loaded.orientation, self.annotated_size
        if exif == "masks_upright":
            mask = images.turn(mask, own)
        elif exif == "upright" and own not in (1, self.orientation):
            raise RecordError(
                f"mask {os.fspath(path)} has the EXIF orientation {own}, its image {self.path} {self.orientation}: "
                "which pixels belong together can't be told; store the mask without one",
                "size of mask and image",
            )
        if mask.shape != frame:
            message = f"mask {os.fspath(path)} is {mask.shape[1]}x{mask.shape[0]}, "
            message += f"but its image {self.path} is {frame[1]}x{frame[0]}"
            if mask.shape == frame[::-1] and max(self.orientation, own) >= 5:
                other = "upright" if exif == "masks_upright" else "masks_upright"
                message += f": one of them is turned (EXIF orientation {self.orientation}); see exif {other!r}"
            raise RecordError(message, "size of mask and image")
        return self.turned(mask)
