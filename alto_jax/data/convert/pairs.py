"""Folders of images and masks."""

from collections.abc import Callable, Iterator
import pathlib

import numpy as np

from alto_jax.data import images
from alto_jax.data.bad_data import RecordError
from alto_jax.data.convert.annotated import Annotated, Frame, file_mask, pictures


def match(folder: pathlib.Path, of_masks: pathlib.Path) -> Iterator[tuple[pathlib.Path, pathlib.Path | RecordError]]:
    """Each image and its mask: of the same path in its folder, up to the ending; else of a name that both have once.

    Args:
      folder, of_masks: of images and masks, with all folders in them.

    Yields:
      The image, and its mask or what is wrong: none, or several that it might be.
    """
    all_images, all_masks = _apart(folder, of_masks), _apart(of_masks, folder)
    place = lambda path, root: path.relative_to(root).with_suffix("").as_posix()
    by_place = _grouped(all_images, lambda path: place(path, folder)), _grouped(all_masks, lambda p: place(p, of_masks))
    by_stem = _grouped(all_images, lambda path: path.stem), _grouped(all_masks, lambda path: path.stem)
    for path in all_images:
        same, found = by_place[0][place(path, folder)], by_place[1].get(place(path, folder), [])
        if not found:
            same, found = by_stem[0][path.stem], by_stem[1].get(path.stem, [])
        if not found:
            yield path, RecordError(f"{path}: no mask {path.stem}.* in {of_masks}", "missing mask")
        elif len(same) > 1 or len(found) > 1:
            listed = " or ".join(map(str, found[:3])) + (f" or {len(found) - 3} more" if len(found) > 3 else "")
            others = [str(other) for other in same if other != path]
            too = f", which {others[0]} may have too" if others else ""
            yield path, RecordError(f"{path}: which mask is its own? {listed}{too}")
        else:
            yield path, found[0]


def _apart(folder: pathlib.Path, other: pathlib.Path) -> list[pathlib.Path]:
    """The pictures in a folder, but for those of another one that lies in it."""
    inside = other.resolve() if folder.resolve() in other.resolve().parents else None
    return [path for path in pictures(folder) if inside is None or inside not in path.resolve().parents]


def _grouped(paths: list[pathlib.Path], key: Callable[[pathlib.Path], str]) -> dict[str, list[pathlib.Path]]:
    found: dict[str, list[pathlib.Path]] = {}
    for path in paths:
        found.setdefault(key(path), []).append(path)
    return found


def read_pairs(
    folder: pathlib.Path, of_masks: pathlib.Path, label: str, rule: str, exif: Frame = None
) -> Iterator[Annotated | RecordError]:
    """Mask files that are named as their images are, up to the ending, see `match`.

    Args:
      folder: of the images.
      of_masks: the masks' folder; where one of the two lies in the other, its files belong to it alone.
      label: what they show.
      rule: which values are foreground (data/masks.py).
      exif: whether mask files are turned by an EXIF orientation of their own.

    Raises:
      RecordError: when a mask is drawn, that cannot be read or has another size than its image.
    """
    for path, mask in match(folder, of_masks):
        if isinstance(mask, RecordError):
            yield mask
            continue

        def draw(height: int, width: int, mask: pathlib.Path = mask) -> np.ndarray:
            drawn = file_mask(images.load(mask, "mask"), str(mask), rule, exif)
            if drawn.shape != (height, width):
                raise RecordError(f"{mask}: {drawn.shape[1]}x{drawn.shape[0]}, but its image is {width}x{height}")
            return drawn

        yield Annotated(path, label, 1, draw, None, str(mask))
