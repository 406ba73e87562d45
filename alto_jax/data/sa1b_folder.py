"""A folder of SA-1B: its annotation files, what is large enough in them, and which images are for validation.

In: a folder with `sa_*.json` beside `sa_*.jpg`, flat or in sub-folders (`sa_000000/`). Out: the large annotations of an
image (reference/NUMERICS.md §8: an area above 0.5 % of the squared long side), its photo, and masks.

An image is for validation if the hash of its name, `sa_` with the image's id, is below VALIDATION (split.py says how):
a list that is the same for everyone, whatever part of SA-1B is there. Training never reads these images.
"""

import copy
import dataclasses
import os
import pathlib
from typing import Any, Self

import numpy as np

from alto_jax.data import bad_data, coco, identity, images, rle
from alto_jax.data.bad_data import RecordError
from alto_jax.data.fingerprint import Fingerprint
from alto_jax.data.index import FileNames
from alto_jax.data.reading import AS_STORED, Photo, Reading
from alto_jax.data.split import ImageSplit, file_hash, image_name

VALIDATION = 0.002  # share of the images; 22,371 of the 11,185,362
MAX_TARGETS = 20  # of a union, paper section 4.1
_FOLDERS = ("sa1b", "SA-1B", "sa-1b", "SA1B", "sam1b")


@dataclasses.dataclass(frozen=True)
class Annotated:
    """The annotations of an image.

    file: that states them. size: (height, width) that they are for. image: the image's file name. large: (number in the
    file, annotation) of those that are used.
    """

    file: pathlib.Path
    size: tuple[int, int]
    image: str
    large: list[tuple[int, dict[str, Any]]]

    @property
    def image_name(self) -> str:
        """The name by which the image is known, see split.py."""
        return image_name(self.file)

    def mask(self, which: int) -> np.ndarray:
        """Mask bool[H, W] of the large annotation `which`; RecordError names file and annotation."""
        number, annotation = self.large[which]
        segmentation = _field(self.file, annotation, "segmentation", dict, f"annotations[{number}].")
        return rle.decode(segmentation, *self.size, f"{self.file}: annotations[{number}]")


class Sa1bFolder:
    """The annotation files of a folder, without those of validation where it is for training.

    Attributes:
      root: the folder. files: the annotation files.
    """

    def __init__(self, root: str | os.PathLike, *, train: bool, min_area: float = 0.005, reading: Reading = AS_STORED):
        """Lists the folder.

        Args:
          root: the folder.
          train: without the images of the validation list.
          min_area: smallest annotation used, as a fraction of the squared long side.
          reading: of the images (EXIF).

        Raises:
          ValueError: no such folder, or no annotation file in it that may be used.
        """
        self.root, self.min_area, self.reading = pathlib.Path(root), min_area, reading
        if not self.root.is_dir():
            raise ValueError(f"SA-1B folder {self.root} does not exist")
        self.files = FileNames(self.root, "sa_", ".json")
        if not self.files:
            raise ValueError(f"SA-1B folder {self.root} holds no sa_*.json")
        if train:
            kept = ImageSplit(VALIDATION, held_out=False).has_hashes(self.files.hashes())
            if not kept.any():
                raise ValueError(f"SA-1B folder {self.root}: all of its images are on the validation list")
            self.files = self.files if kept.all() else self.files.take(np.flatnonzero(kept))

    def part(self, split: ImageSplit) -> "Sa1bFolder":
        """The images on one side of a split (an annotation file has its image's name); EmptySplit if there is none."""
        found = copy.copy(self)
        found.files = self.files.take(np.flatnonzero(split.has_hashes(self.files.hashes())))
        split.require_some(len(found.files), len(self.files), self.root)
        return found

    def __len__(self) -> int:
        return len(self.files)

    def image_hash(self, number: int) -> int:
        """Hash of the image of file `number`, see split.py."""
        return file_hash(self.files.name(number))

    def key(self, annotated: Annotated, index: int) -> str:
        """The key of record `index`, made of an image."""
        return f"{annotated.file.relative_to(self.root)}#{index}"

    def add_to(self, found: Fingerprint) -> None:
        """Adds what the files are, see fingerprint.py; of many files the sizes of a thousand, evenly spread."""
        step = max(1, len(self.files) // 1000)
        found.values(self.files.digest)
        found.sizes(self.files[::step])
        found.sizes(file.with_suffix(".jpg") for file in self.files[::step])

    def annotated(self, number: int, *, or_largest: bool = False) -> Annotated:
        """The annotations of a file; `large` are those above `min_area`, which may be none.

        `or_largest`: where none is, the largest one; a file without annotations is an error then.

        Raises:
          RecordError: names file and field.
        """
        file = self.files[number]
        content = _read(file)
        info = _field(file, content, "image", dict)
        height, width = _sides(file, info)
        name = _field(file, info, "file_name", str, "image.")
        smallest = self.min_area * max(height, width) ** 2
        annotations = list(enumerate(_field(file, content, "annotations", list)))
        area = lambda i, annotation: _field(file, annotation, "area", (int, float), f"annotations[{i}].")
        large = [(i, annotation) for i, annotation in annotations if area(i, annotation) > smallest]
        if or_largest and not large:
            if not annotations:
                raise RecordError(f"{file}: field annotations: the image has none", "empty mask")
            large = [max(annotations, key=lambda each: area(*each))]
        return Annotated(file, (height, width), name, large)

    def some(self, number: int, rng: np.random.Generator) -> Annotated:
        """The annotations of a file; where it has no large one, those of another random file, and the log says so."""
        for _ in range(100):
            found = self.annotated(number)
            if found.large:
                return found
            images.note(found.file, "no annotation is large enough, another image takes its place")
            number = int(rng.integers(len(self.files)))
        raise ValueError(f"SA-1B folder {self.root}: no annotation above {self.min_area} of the squared long side")

    def photo(self, annotated: Annotated) -> Photo:
        """The image beside an annotation file, which states its size; RecordError names both."""
        try:
            photo = self.reading.photo(annotated.file.with_name(annotated.image))
            coco.check_stated_size(photo.annotated_size, annotated.size)
        except ValueError as error:
            raise bad_data.at(annotated.file, error) from error
        return photo

    def problems(self, number: int) -> list[ValueError]:
        """Everything that is wrong with an image and its annotations, also with those that may never be drawn."""
        file = self.files[number]
        try:
            content = _read(file)
            info = _field(file, content, "image", dict)
            size = _sides(file, info)
            annotations = _field(file, content, "annotations", list)
        except ValueError as error:
            return [error]
        found: list[ValueError] = []
        try:
            self.photo(Annotated(file, size, _field(file, info, "file_name", str, "image."), []))
        except ValueError as error:
            found.append(error)
        for at, annotation in enumerate(annotations):
            where = f"annotations[{at}]."
            try:
                _field(file, annotation, "area", (int, float), where)
                segmentation = _field(file, annotation, "segmentation", dict, where)
                if not rle.check_runs(segmentation, *size, f"{file}: {where[:-1]}")[1::2].any():
                    raise RecordError(f"{file}: {where}segmentation is an empty mask", "empty mask")
            except ValueError as error:
                found.append(error)
        return found


class Sa1bRecords:
    """What Sa1bMasks and Sa1bTargets have in common: records that are drawn of the images of a folder."""

    def __init__(self, folder: Sa1bFolder, *, train: bool, seed: int, draws_per_image: int, most: int):
        """ValueError: `draws_per_image` is below 1. most: the limit that a record keeps to, of sides or of targets."""
        if draws_per_image < 1:
            raise ValueError(f"draws_per_image: expected at least 1, got {draws_per_image}")
        self.folder = folder
        self._train, self._seed, self._draws, self._most = train, seed, draws_per_image if train else 1, most

    def part(self, split: ImageSplit) -> Self:
        """The images on one side of a split; EmptySplit if there is none."""
        found = copy.copy(self)
        found.folder = self.folder.part(split)
        return found

    def image_hashes(self, index: int) -> tuple[int, ...]:
        """Hash of the image of record `index`, see split.py; in training another may take its place (`some`)."""
        return (self.folder.image_hash(index % len(self.folder)),)

    def __len__(self) -> int:
        return len(self.folder) * self._draws

    def identity(self) -> identity.Identity:
        """What the data are, see identity.py: by the names of the files."""
        return {"": {"records": len(self), "hash": identity.digest(*self._known())}}

    def _known(self) -> tuple[Any, ...]:
        """What decides which record a number means."""
        return self.folder.files.digest, self._train, self._draws

    def fingerprint(self) -> str:
        """What the samples are, see fingerprint.py."""
        found = Fingerprint()
        found.values(self._train, self._seed, self._draws, self._most, self.folder.min_area)
        self.folder.add_to(found)
        return str(found)

    def problems(self, index: int) -> list[ValueError]:
        """Everything that is wrong with image `index` and its annotations, also with those that may never be drawn."""
        return self.folder.problems(index % len(self.folder))


def most_targets(num_large: int) -> int:
    """Most targets of a union, of an image with so many large annotations."""
    return min(MAX_TARGETS, max(3, num_large // 2))


def find_folder(root: pathlib.Path) -> pathlib.Path:
    """The SA-1B folder of a data folder: one of the usual names in it, or itself; ValueError says what was expected."""
    for name in _FOLDERS:
        if (root / name).is_dir():
            return root / name
    with os.scandir(root) as entries:
        if any(entry.name.startswith("sa_") for entry in entries):
            return root
    raise ValueError(f"SA-1B: expected one of {', '.join(f'{n}/' for n in _FOLDERS)} in {root}, or sa_* there")


def _read(file: pathlib.Path) -> dict[str, Any]:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise RecordError(f"{file} cannot be read: {error.strerror}", "unreadable file") from error
    return bad_data.parse_json(content, file)


def _field(file: pathlib.Path, mapping: Any, name: str, kind: Any, where: str = "") -> Any:
    """A checked field of the JSON; raises ValueError naming file and field."""
    value = mapping.get(name) if isinstance(mapping, dict) else None
    if not isinstance(value, kind):
        raise RecordError(f"{file}: field {where}{name} is missing or of a wrong type: {value!r:.60}")
    return value


def _sides(file: pathlib.Path, info: dict[str, Any]) -> tuple[int, int]:
    """Height and width as the annotation file states them."""
    height, width = (coco.whole_number(info.get(name), f"{file}: field image.{name}") for name in ("height", "width"))
    rle.check_size(height, width, str(file))
    return height, width
