"""COCO's images and annotations, as other data sets refer to them: names of files, sizes, segmentations."""

from collections.abc import Callable, Sequence
import os
import pathlib
import re
from typing import Any

import numpy as np

from alto_jax.data import files, rle
from alto_jax.data.bad_data import RecordError

# Where the COCO images of the referring data sets usually lie, below the data folder.
_ROOTS = ("images/mscoco/images/", "coco/", "", "images/")
IMAGE_FOLDERS = (*(root + split for split in ("train2014", "train2017") for root in _ROOTS), "images")
VAL_FOLDERS = ("coco/val2014", "val2014", "images/val2014", "images/mscoco/images/val2014", "coco/val2017", "val2017")
_SPLIT_FOLDERS = ("train2014", "val2014", "train2017", "val2017")
_NAME = re.compile(r"(?:COCO_(?:train|val|test)\d{4}_)?(\d{12}\.\w+)")


def image_folder(root: pathlib.Path, images: str | os.PathLike | None) -> pathlib.Path:
    """The folder of the images: `images` if given, else the first of IMAGE_FOLDERS below `root`; ValueError if none."""
    if images is not None:
        if not pathlib.Path(images).is_dir():
            raise ValueError(f"image folder {images} does not exist")
        return pathlib.Path(images)
    return files.find(root, IMAGE_FOLDERS, "COCO train2014 images")


def find_image(path: pathlib.Path) -> pathlib.Path:
    """The file of an image that may lie under another of COCO's names; `path` itself if there is none.

    COCO_train2014_000000000009.jpg of 2014 is 000000000009.jpg in 2017, where it may have moved from train to val, and
    a file_name may begin with its folder (`train2014/COCO_…`). Other names are looked for in the folder alone.
    """
    if os.path.isfile(path):  # Note: unlike Path.is_file it raises for no name at all, such as one that is too long.
        return path
    folders = [path.parent]
    while folders[-1].name in _SPLIT_FOLDERS and len(folders) < 3:
        folders.append(folders[-1].parent)
    found, names = _NAME.fullmatch(path.name), [path.name]
    if found:
        names += [found[1], *(f"COCO_{split}_{found[1]}" for split in ("train2014", "val2014"))]
        folders += [folder / split for folder in folders[1:] for split in _SPLIT_FOLDERS]
    candidates = (folder / name for folder in folders for name in names)
    return next((file for file in candidates if os.path.isfile(file)), path)


def whole_number(value: Any, what: str) -> int:
    """A whole number above 0 of a JSON file, also one that is written 640.0; ValueError: "{what} is missing or …"."""
    if isinstance(value, int | float) and not isinstance(value, bool) and value > 0 and value == value // 1:
        return int(value)
    raise ValueError(f"{what} is missing or of a wrong type: expected a whole number above 0, got {value!r:.60}")


def stated_size(info: dict[str, Any], where: str) -> tuple[int, int] | None:
    """(height, width) that an image's entry states; None if it states none.

    Raises:
      ValueError: one of them alone, or a value that is no size.
    """
    if info.get("height") is None and info.get("width") is None:
        return None
    height, width = (whole_number(info.get(name), f"{where}: field {name}") for name in ("height", "width"))
    return height, width


def check_stated_size(found: tuple[int, int], stated: tuple[int, int] | None) -> None:
    """RecordError, which names both, if an image's (height, width) is not as its annotations state."""
    if stated is not None and found != stated:
        raise RecordError(
            f"the annotations are for {stated[1]}x{stated[0]} pixels (width x height), but its image is "
            f"{found[1]}x{found[0]}",
            "size of mask and image",
        )


def of_target(annotations: Sequence[dict[str, Any]]) -> list[Any]:
    """The segmentations of what is referred to: without crowds, as gRefCOCO has it; crowds if there is nothing else.

    Raises:
      KeyError, TypeError, AttributeError: malformed annotations.
    """
    single = [annotation for annotation in annotations if not annotation.get("iscrowd")]
    return [annotation["segmentation"] for annotation in single or annotations]


def box_of(annotations: Sequence[dict[str, Any]]) -> tuple[float, ...] | None:
    """`bbox` (x, y, width, height) of the only annotation; None if there are several, or it has no such field."""
    box = annotations[0].get("bbox") if len(annotations) == 1 else None
    is_box = isinstance(box, list) and len(box) == 4 and all(isinstance(b, int | float) for b in box)
    return tuple(map(float, box)) if is_box and box is not None else None


def union(segmentations: Sequence[Any]) -> Callable[[int, int], np.ndarray]:
    """Reads the union of COCO segmentations as bool[height, width]; none: an empty mask."""

    def read(height: int, width: int) -> np.ndarray:
        mask = np.zeros((height, width), bool)
        for segmentation in segmentations:
            mask |= rle.decode(segmentation, height, width, "annotation")
        if segmentations and not mask.any():
            raise RecordError("the mask is empty, but the entry names a target", "empty mask")
        return mask

    return read


class Instances:
    """COCO's `instances.json`: images with their sizes, and annotations by id."""

    def __init__(self, path: pathlib.Path):
        content = files.load_json(path, dict)
        self.path = path
        try:
            self._images = {image["id"]: image for image in content["images"]}
            self._names = {image["id"]: str(image["file_name"]) for image in content["images"]}
            self._annotations = {annotation["id"]: annotation for annotation in content["annotations"]}
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: expected images and annotations with id, file_name: {error!r}") from error

    def image(self, image_id: Any) -> tuple[str, tuple[int, int] | None]:
        """File name of an image, and its (height, width) if stated."""
        if image_id not in self._names:
            raise ValueError(f"image_id {image_id!r} is not in {self.path}")
        return self._names[image_id], stated_size(self._images[image_id], f"{self.path}: image {image_id}")

    def annotations(self, ids: Sequence[Any]) -> list[dict[str, Any]]:
        """The annotations of ids that `target` took."""
        return [self._annotations[annotation_id] for annotation_id in ids]

    def target(self, ids: Sequence[Any]) -> list[Any]:
        """The segmentations of annotations, see `of_target`; ValueError: no id, or one that is not there."""
        if not ids:
            raise ValueError("ann_id is empty: no annotation is named, and no target is written [-1]")
        for annotation_id in ids:
            annotation = self._annotations.get(annotation_id)
            if not annotation or not annotation.get("segmentation"):
                raise ValueError(f"ann_id {annotation_id!r} is not in {self.path}, or has no segmentation there")
        return of_target([self._annotations[annotation_id] for annotation_id in ids])
