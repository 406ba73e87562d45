"""Multi-Target-SA1B: unions of several SA-1B masks of an image, read from the published files.

In: a folder with `sa_*.json` beside `sa_*.jpg`, flat or in sub-folders (`sa_000000/`). Out: MaskRecords by
the reference's rule (reference/NUMERICS.md §8): annotations larger than 0.5 % of the squared long side,
1 to 20 of them merged; in training a square crop around them; at most 1024 pixels; padded to a square.
Record i of epoch e is a function of (seed, i, e), in any order: every epoch draws targets, crop and padding anew.
"""

import copy
import os
import pathlib
from typing import Any

import numpy as np

from alto_jax.data import bad_data, coco, identity, rle, transforms
from alto_jax.data.bad_data import RecordError
from alto_jax.data.fingerprint import Fingerprint
from alto_jax.data.index import FileNames
from alto_jax.data.reading import AS_STORED, Photo, Reading
from alto_jax.data.split import ImageSplit, file_hash, image_name

_MAX_TARGETS = 20


class Sa1bMasks:
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
          train: random number and choice of annotations, random crop and random padding; otherwise the
            first ones, number by index, whole image, padding at the bottom and right.
          seed: of the random choices.
          draws_per_image: records made of each image (training): record i is of image i mod N.
          max_side: longest side kept, in pixels.
          min_area: smallest annotation used, as a fraction of the squared long side.
          reading: of the images (EXIF).

        Raises:
          ValueError: no such folder, or no annotation file in it.
        """
        self.root = pathlib.Path(root)
        if not self.root.is_dir():
            raise ValueError(f"SA-1B folder {self.root} does not exist")
        if draws_per_image < 1:
            raise ValueError(f"draws_per_image: expected at least 1, got {draws_per_image}")
        self.files = FileNames(self.root, "sa_", ".json")
        if not self.files:
            raise ValueError(f"SA-1B folder {self.root} holds no sa_*.json")
        self._train, self._seed, self._draws = train, seed, draws_per_image if train else 1
        self._max_side, self._min_area, self._reading = max_side, min_area, reading

    def part(self, split: ImageSplit) -> "Sa1bMasks":
        """The images on one side of a split (an annotation file has its image's name); EmptySplit if there is none."""
        found = copy.copy(self)
        hashes = np.fromiter((file_hash(self.files.name(i)) for i in range(len(self.files))), np.uint64)
        found.files = self.files.take(np.flatnonzero(split.has_hashes(hashes)))
        split.require_some(len(found.files), len(self.files), self.root)
        return found

    def image_hashes(self, index: int) -> tuple[int, ...]:
        """Hash of the image of record `index`, see split.py; if it has no large annotation, another is taken."""
        return (file_hash(self.files.name(index % len(self.files))),)

    def __len__(self) -> int:
        return len(self.files) * self._draws

    def identity(self) -> identity.Identity:
        """What the data are, see identity.py: by the names of the files."""
        return {"": {"records": len(self), "hash": identity.digest(self.files.digest, self._train, self._draws)}}

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.at_epoch(index, 0)

    def at_epoch(self, index: int, epoch: int) -> dict[str, Any]:
        """Record `index` as it is drawn in an epoch (without `train`, the same in all)."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        index = int(index) % len(self)
        rng = np.random.default_rng((self._seed, index, epoch if self._train else 0))
        file, (height, width), file_name, annotations = self._annotations(index % len(self.files), rng)
        count = len(annotations)
        most = min(_MAX_TARGETS, max(3, count // 2))
        if self._train:
            chosen = rng.permutation(count)[: int(rng.integers(1, min(most, count) + 1))].tolist()
        else:
            chosen = range(min(index % most + 1, count))
        mask = _union(file, [annotations[c] for c in chosen], height, width)
        photo = self._photo(file, file_name, height, width)
        image, mask = photo.image, photo.turned(mask)
        if self._train:
            image, mask = transforms.crop_around(image, mask, rng)
        image, mask = (
            transforms.limit_side(image, self._max_side),
            transforms.keep_small(transforms.limit_side(mask, self._max_side), mask),
        )
        image, mask = transforms.pad_square(image, mask, rng if self._train else None)
        key = f"{file.relative_to(self.root)}#{index}"
        return {"key": key, "image": image, "image_name": image_name(file), "mask": mask}

    def fingerprint(self) -> str:
        """What the samples are, see fingerprint.py; of many files the sizes of a thousand, evenly spread."""
        found, step = Fingerprint(), max(1, len(self.files) // 1000)
        found.values(self._train, self._seed, self._draws, self._max_side, self._min_area)
        found.values(self.files.digest)
        found.sizes(self.files[::step])
        found.sizes(file.with_suffix(".jpg") for file in self.files[::step])
        return str(found)

    def problems(self, index: int) -> list[ValueError]:
        """Everything that is wrong with image `index` and its annotations, also with those that may never be drawn."""
        file = self.files[index % len(self.files)]
        try:
            content = _read(file)
            info = _field(file, content, "image", dict)
            height, width = _sides(file, info)
            annotations = _field(file, content, "annotations", list)
        except ValueError as error:
            return [error]
        found: list[ValueError] = []
        try:
            self._photo(file, _field(file, info, "file_name", str, "image."), height, width)
        except ValueError as error:
            found.append(error)
        for number, annotation in enumerate(annotations):
            where = f"annotations[{number}]."
            try:
                _field(file, annotation, "area", (int, float), where)
                segmentation = _field(file, annotation, "segmentation", dict, where)
                if not rle.check_runs(segmentation, height, width, f"{file}: {where[:-1]}")[1::2].any():
                    raise RecordError(f"{file}: {where}segmentation is an empty mask", "empty mask")
            except ValueError as error:
                found.append(error)
        return found

    def _photo(self, file: pathlib.Path, name: str, height: int, width: int) -> Photo:
        """The image beside an annotation file, which states its size; RecordError names both."""
        try:
            photo = self._reading.photo(file.with_name(name))
            coco.check_stated_size(photo.annotated_size, (height, width))
        except ValueError as error:
            raise bad_data.at(file, error) from error
        return photo

    def _annotations(
        self, number: int, rng: np.random.Generator
    ) -> tuple[Any, tuple[int, int], str, list[tuple[int, dict]]]:
        """The large annotations of a file; where it has none, those of another random file.

        Returns: file, (height, width), image file name, [(number in the file, annotation), …].
        """
        for _ in range(100):
            file = self.files[number]
            content = _read(file)
            info = _field(file, content, "image", dict)
            height, width = _sides(file, info)
            name = _field(file, info, "file_name", str, "image.")
            smallest = self._min_area * max(height, width) ** 2
            large = []
            for i, annotation in enumerate(_field(file, content, "annotations", list)):
                if _field(file, annotation, "area", (int, float), f"annotations[{i}].") > smallest:
                    large.append((i, annotation))
            if large:
                return file, (height, width), name, large
            number = int(rng.integers(len(self.files)))
        raise ValueError(f"SA-1B folder {self.root}: no annotation above {self._min_area} of the squared long side")


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


def _union(file: pathlib.Path, annotations: list[tuple[int, dict[str, Any]]], height: int, width: int) -> np.ndarray:
    """The union of numbered annotations as uint8[H, W] in {0, 255}."""
    mask = np.zeros((height, width), bool)
    for number, annotation in annotations:
        segmentation = _field(file, annotation, "segmentation", dict, f"annotations[{number}].")
        mask |= rle.decode(segmentation, height, width, f"{file}: annotations[{number}]")
    if not mask.any():
        raise RecordError(f"{file}: the chosen annotations have empty masks", "empty mask")
    return mask.astype(np.uint8) * np.uint8(255)
