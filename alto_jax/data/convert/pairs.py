"""Folders of images and masks."""

from collections.abc import Iterator
import pathlib

import numpy as np

from alto_jax.data import images
from alto_jax.data.bad_data import RecordError
from alto_jax.data.convert.annotated import PICTURES, Annotated, Frame, file_mask, pictures


def read_pairs(
    folder: pathlib.Path, of_masks: pathlib.Path, label: str, rule: str, exif: Frame = None
) -> Iterator[Annotated | RecordError]:
    """Mask files that are named as their images are, up to the ending.

    Args:
      folder: of the images.
      of_masks: the masks' folder.
      label: what they show.
      rule: which values are foreground (data/masks.py).
      exif: whether mask files are turned by an EXIF orientation of their own.

    Raises:
      RecordError: when a mask is drawn, that cannot be read or has another size than its image.
    """
    found = {path.stem: path for path in sorted(of_masks.iterdir()) if path.suffix.lower() in PICTURES}
    for path in pictures(folder):
        mask = found.get(path.stem)
        if mask is None:
            yield RecordError(f"{path}: no mask {path.stem}.* in {of_masks}")
            continue

        def draw(height: int, width: int, mask: pathlib.Path = mask) -> np.ndarray:
            drawn = file_mask(images.load(mask, "mask"), str(mask), rule, exif)
            if drawn.shape != (height, width):
                raise RecordError(f"{mask}: {drawn.shape[1]}x{drawn.shape[0]}, but its image is {width}x{height}")
            return drawn

        yield Annotated(path, label, 1, draw, None, str(mask))
