"""Referring segmentation: RefCOCO/+/g, gRefCOCO and RefCOCOm, from their published files.

In: refer's pickles with `instances.json`, gRefCOCO's JSON, the PSALM-converted JSON, RefCOCOm's folders. Out:
random access to ReferringRecords {"key", "image" uint8[H, W, 3], "mask" uint8[H, W] in {0, 255} (empty: no
target), "phrase"}, and with `ReferringChats` ChatRecords to train on.

A referent has several sentences. `protocol` "joined" makes them one request (Compat: what the reference
evaluates), "per_sentence" makes each its own sample (what most papers report).
"""

from collections.abc import Callable, Iterator, Sequence
import copy
import dataclasses
import logging
import os
import pathlib
from typing import Any, Literal

import numpy as np

from alto_jax.data import bad_data, coco, files, identity, masks
from alto_jax.data.bad_data import RecordError
from alto_jax.data.fingerprint import Fingerprint
from alto_jax.data.prompts import NoPrompts
from alto_jax.data.reading import AS_STORED, Photo, Reading
from alto_jax.data.source import OneForOne, place
from alto_jax.data.split import ImageSplit, file_hash, image_name
from alto_jax.mllm import text

Protocol = Literal["joined", "per_sentence"]
Dataset = Literal["refcoco", "refcoco+", "refcocog", "grefcoco"]
PROTOCOLS = ("joined", "per_sentence")
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Referent:
    """What is referred to: where it stands (for messages), its key, image file, sentences, and its mask.

    `mask(height, width)` reads the mask at the annotated size as bool[H, W]. no_target: it is all False. size: (height,
    width) that the annotations are for, if they say so. error: why the entry can't be used (its record raises this).
    mask_path: the file that `mask` reads, if it is one. ignore: as `mask`, pixels that do not count. box: (x, y, width,
    height) in pixels as annotated, if there is one.
    """

    where: str
    key: str
    image: pathlib.Path
    sentences: tuple[str, ...]
    mask: Callable[[int, int], np.ndarray]
    no_target: bool = False
    size: tuple[int, int] | None = None
    error: str = ""
    mask_path: pathlib.Path | None = None
    ignore: Callable[[int, int], np.ndarray] | None = None
    box: tuple[float, ...] | None = None

    @property
    def image_hashes(self) -> tuple[int, ...]:
        """Hash of its image, see split.py; none if the entry can't be used."""
        return (file_hash(self.image),) if self.image.name else ()


class Referring:
    """Random access to ReferringRecords of a list of referents, by protocol.

    Attributes:
      no_target: whether the data set has samples without a target (the model is asked first whether there is one).
    """

    def __init__(
        self,
        referents: Sequence[Referent],
        protocol: Protocol = "joined",
        *,
        no_target: bool = False,
        reading: Reading = AS_STORED,
        annotations: Sequence[pathlib.Path] = (),
    ):
        """`annotations`: the files that say what is referred to. ValueError: an unknown protocol, or no referent."""
        self._reading = reading
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol: expected one of {', '.join(PROTOCOLS)}, got {protocol!r}")
        self.protocol, self.no_target, self._annotations = protocol, no_target, tuple(annotations)
        self._samples = [
            (referent, number)
            for referent in referents
            for number in (range(max(len(referent.sentences), 1)) if protocol == "per_sentence" else (None,))
        ]
        if not self._samples:
            raise ValueError("referring data: no sample in this split")

    def part(self, split: ImageSplit) -> "Referring":
        """The samples whose images are on one side of a split; EmptySplit if there is none."""
        found = copy.copy(self)
        found._samples = [(r, n) for r, n in self._samples if split.has(r.image_hashes, r.key)]
        split.require_some(len(found), len(self), f"this split (such as {self._samples[0][0].where})")
        return found

    def image_hashes(self, index: int) -> tuple[int, ...]:
        """Hash of the image of record `index`, see split.py."""
        return self._samples[index][0].image_hashes

    def with_targets(self) -> "Referring":
        """The samples that name a target, by their annotations alone; NoPrompts if there is none."""
        found = copy.copy(self)
        found._samples = [(referent, number) for referent, number in self._samples if not referent.no_target]
        if not found._samples:
            raise NoPrompts(
                f"referring data: none of the {len(self)} samples has a target, there is no mask to ask for"
            )
        return found

    def __len__(self) -> int:
        return len(self._samples)

    def sample(self, index: int) -> tuple[Referent, str, str]:
        """The referent, key and phrase of record `index`; ValueError if its entry can't be used."""
        referent, number = self._samples[place(index, self)]
        key = referent.key if number is None else f"{referent.key}/{number}"
        said = [sentence for sentence in referent.sentences if sentence]
        if referent.error or not said:
            raise ValueError(f"{referent.where}: {referent.error or 'no sentence, or none but empty ones'}")
        phrase = text.join_descriptions(said) if number is None else referent.sentences[number]
        if not phrase:
            raise ValueError(f"{referent.where}: sentence {number} is an empty one")
        return referent, key, phrase

    def photo(self, referent: Referent) -> Photo:
        """The image of a referent, of the size that its annotations state; RecordError names the entry."""
        try:
            photo = self._reading.photo(coco.find_image(referent.image))
            coco.check_stated_size(photo.annotated_size, referent.size)
        except ValueError as error:
            raise bad_data.at(referent.where, error) from error
        return photo

    def __getitem__(self, index: int) -> dict[str, Any]:
        referent, key, phrase = self.sample(index)
        photo = self.photo(referent)
        read = lambda of: photo.turned(of(*photo.annotated_size)).astype(np.uint8) * np.uint8(255)
        record = {"key": key, "image": photo.image, "image_name": image_name(referent.image), "phrase": phrase}
        try:
            record["mask"] = read(referent.mask)
            return record | ({"ignore": read(referent.ignore)} if referent.ignore is not None else {})
        except ValueError as error:
            raise bad_data.at(referent.where, error) from error

    def identity(self) -> identity.Identity:
        """What the data are, see identity.py: by keys, images and sentences in their order."""
        named = ((r.key, r.image.name, r.sentences, number) for r, number in self._samples)
        return {"": {"records": len(self), "hash": identity.digest(*named)}}

    def fingerprint(self) -> str:
        """What the samples are, see fingerprint.py."""
        found, referents = Fingerprint(), [referent for referent, _ in self._samples]
        found.values(self.protocol, self.no_target, [(r.key, number, r.error) for r, number in self._samples])
        found.contents(self._annotations)
        found.contents(dict.fromkeys(r.mask_path for r in referents if r.mask_path is not None))
        found.sizes(coco.find_image(image) for image in dict.fromkeys(r.image for r in referents))
        return str(found)

    def phrases(self) -> Iterator[str]:
        """The sentences of all referents."""
        for referent in dict.fromkeys(referent for referent, _ in self._samples):
            yield from filter(None, referent.sentences)


class ReferringChats(OneForOne):
    """ChatRecords of ReferringRecords: fixed and adaptive requests half and half, drawn by (seed, index, epoch).

    Samples without a target become the question whether there is one, answered "No"; where there may be none,
    `yes_fraction` of the others become the same question, answered "Yes".
    """

    def __init__(self, source: Referring, *, seed: int = 0, adaptive_fraction: float = 0.5, yes_fraction: float = 0.1):
        self.source, self._seed = source, seed
        self._no_target = getattr(source, "no_target", False)
        self._adaptive, self._yes = adaptive_fraction, yes_fraction if self._no_target else 0.0

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.at_epoch(index, 0)

    def at_epoch(self, index: int, epoch: int) -> dict[str, Any]:
        """Record `index` as it is asked in an epoch."""
        index = place(index, self)
        record = self.source[index]
        adaptive, yes = np.random.default_rng((self._seed, index, epoch)).random(2) < (
            self._adaptive,
            self._yes,
        )
        has_target = bool(record["mask"].any())
        if not has_target and not self._no_target:  # Note: "No" would be wrong: the data name an object in the image.
            message = f"record {record['key']}: the mask is empty, in a data set without no-target samples"
            raise RecordError(message, "empty mask")
        if not has_target or yes:
            question, answer, masks = text.no_target_question(record["phrase"]), text.YES if has_target else text.NO, []
        else:
            question = text.question(record["phrase"], adaptive=bool(adaptive))
            answer, masks = text.answer(adaptive=bool(adaptive)), [record["mask"]]
        turns = [{"from": "human", "value": f"{text.IMAGE}\n{question}"}, {"from": "gpt", "value": answer}]
        return {**{k: record[k] for k in ("key", "image", "image_name") if k in record}, "masks": masks,
                "conversations": turns}  # fmt: skip

    def texts(self) -> Iterator[list[str]]:
        """What is asked of every record, and the answers, without reading images."""
        for phrase in self.source.phrases():
            yield [text.question(phrase, adaptive=adaptive) for adaptive in (False, True)]
            yield [text.answer(adaptive=False), text.no_target_question(phrase), text.YES, text.NO]


# --- files ------------------------------------------------------------------------------------------


def broken(where: str, error: Exception) -> Referent:
    """Stands for an entry that can't be used; its record raises the reason."""
    reason = str(error) if isinstance(error, ValueError) else f"a field is missing or malformed: {error!r}"
    return Referent(
        where, where, pathlib.Path(), (), lambda height, width: np.zeros((height, width), bool), error=reason
    )


def sentences_of(entries: list[Any]) -> tuple[str, ...]:
    """The sentences of an entry, as texts or {"sent": text}; one that is missing or no text is ""."""
    if not isinstance(entries, list):
        raise TypeError(f"expected a list of sentences, got {entries!r:.60}")
    found = [entry.get("sent") if isinstance(entry, dict) else entry for entry in entries]
    return tuple(sentence if isinstance(sentence, str) and sentence.strip() else "" for sentence in found)


def open_refer(
    root: str | os.PathLike,
    dataset: Dataset,
    split: str,
    *,
    split_by: str = "",
    images: str | os.PathLike | None = None,
    protocol: Protocol = "joined",
    reading: Reading = AS_STORED,
) -> Referring:
    """RefCOCO/+/g or gRefCOCO as published: `{root}/{dataset}/refs({split_by}).p` or `grefs(unc).json`.

    Args:
      root: the folder that holds `{dataset}/` with `instances.json`, and the COCO images.
      dataset: which.
      split: train, val, testA, testB; for refcocog train, val, test.
      split_by: "unc", "google" or "umd"; by default "umd" for refcocog, "unc" for the others.
      images: folder of the COCO images; by default one of coco.IMAGE_FOLDERS.
      protocol: see the module.
      reading: of images (EXIF) and mask files.

    Raises:
      ValueError: a file is missing or is not what it should be; the message says what was expected where.
    """
    root = pathlib.Path(root)
    split_by = split_by or ("umd" if dataset == "refcocog" else "unc")
    folder, general = root / dataset, dataset == "grefcoco"
    file = folder / (f"grefs({split_by}).json" if general else f"refs({split_by}).p")
    if not file.is_file():
        raise ValueError(f"{dataset} {split}: expected {file} (with instances.json beside it), or the PSALM-converted "
                         f"JSON {psalm_files(dataset, split)[0]} in {root}")  # fmt: skip
    entries = files.load_json(file) if general else files.load_pickle(file)
    instances = coco.Instances(folder / "instances.json")
    image_folder = coco.image_folder(root, images)
    referents = []
    for number, entry in enumerate(entries if isinstance(entries, list) else ()):
        where = f"{file} entry {number}"
        if not isinstance(entry, dict) or "split" not in entry:
            raise ValueError(f"{where}: expected a dict with split, image_id, ann_id, sentences, got {entry!r:.60}")
        if entry["split"] != split:
            continue
        try:
            sentences = sentences_of(entry["sentences"])
            ids = entry["ann_id"] if isinstance(entry["ann_id"], list) else [entry["ann_id"]]
            key, (name, size) = f"{dataset}/{split}/{entry['ref_id']}", instances.image(entry["image_id"])
            no_target = general and ids == [-1]
            if general and entry.get("no_target", no_target) != no_target:
                raise ValueError(f"no_target is {entry['no_target']!r}, but ann_id is {ids!r:.60}")
            target = [] if no_target else instances.target(ids)
            mask, box = coco.union(target), coco.box_of(instances.annotations(ids)) if len(target) == 1 else None
        except (KeyError, TypeError, ValueError) as error:
            referents.append(broken(where, error))
            continue
        referents.append(Referent(where, key, image_folder / name, sentences, mask, no_target, size, box=box))
    if not referents:
        raise ValueError(f"{file}: no entry of split {split!r}")
    annotations = (file, instances.path)
    return Referring(referents, protocol, no_target=general, reading=reading, annotations=annotations)


def psalm_files(dataset: str, split: str) -> tuple[str, ...]:
    """Where the PSALM-converted JSON of a split may lie, below the data folder."""
    return (f"{dataset}/{dataset}_{split}.json", f"{dataset}/{split}_psalm.json", f"{dataset}_{split}.json")


def open_psalm(
    file: str | os.PathLike,
    name: str,
    *,
    root: str | os.PathLike,
    images: str | os.PathLike | None = None,
    protocol: Protocol = "joined",
    no_target: bool = False,
    reading: Reading = AS_STORED,
) -> Referring:
    """The PSALM-converted JSON of one split: [{image_info, instruction: [{sent}], anns}].

    As in the loader it was made for, entries without instructions are dropped, and `segmentation: []` is an empty mask.

    Args:
      file: the JSON; name: of the split, for keys ("refcoco/val").
      root, images: as in `open_refer`.
      protocol: see the module.
      no_target: see `Referring`; reading: as in `open_refer`.

    Raises:
      ValueError: as `open_refer`.
    """
    image_folder = coco.image_folder(pathlib.Path(root), images)
    referents, dropped = [], 0
    for number, entry in enumerate(files.load_json(file)):
        where = f"{file} entry {number}"
        try:
            sentences, info = sentences_of(entry["instruction"]), entry["image_info"]
            if not sentences:
                dropped += 1
                continue
            image, size = image_folder / info["file_name"], coco.stated_size(info, "image_info")
            if not no_target and not entry["anns"]:
                raise ValueError("anns is empty, in a data set without no-target samples")
            segmentations = [s for s in coco.of_target(entry["anns"]) if s != []]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            referents.append(broken(where, error))
            continue
        key, mask = f"{name}/{entry.get('new_img_id', number)}", coco.union(segmentations)
        box = coco.box_of(entry["anns"]) if len(segmentations) == 1 else None
        referents.append(Referent(where, key, image, sentences, mask, not segmentations, size, box=box))
    if dropped:
        _log.warning(
            "%s: %d of %d entries have no instruction and are left out", file, dropped, len(referents) + dropped
        )
    if not referents:
        raise ValueError(f"{file}: no entry with an instruction")
    annotations = (pathlib.Path(file),)
    return Referring(referents, protocol, no_target=no_target, reading=reading, annotations=annotations)


def open_refcocom(
    root: str | os.PathLike,
    split: str,
    *,
    images: str | os.PathLike | None = None,
    protocol: Protocol = "joined",
    reading: Reading = AS_STORED,
) -> Referring:
    """RefCOCOm (parts of objects): `{root}/refcocom/annotations/{split}.json` and `masks/{segment_id}.png`.

    Args:
      root, images, protocol, reading: as in `open_refer`.
      split: such as val_part_only, val_object_part, testA_part_only.

    Raises:
      ValueError: as `open_refer`.
    """
    root = pathlib.Path(root)
    folder = files.find(root, ("refcocom", "RefCOCOm"), "RefCOCOm")
    file = files.find(folder, (f"annotations/{split}.json",), f"RefCOCOm {split}")
    image_folder = coco.image_folder(root, images)
    referents = []
    for number, entry in enumerate(files.load_json(file)):
        where = f"{file} entry {number}"
        try:
            image, segment = image_folder / entry["img_name"], entry["segment_id"]
            sentences = sentences_of(entry["sentences"])
        except (KeyError, TypeError) as error:
            referents.append(broken(where, error))
            continue
        path, key = folder / "masks" / f"{segment}.png", f"refcocom/{split}/{segment}"
        mask = _mask_file(path, reading.mask_rule)
        referents.append(Referent(where, key, image, sentences, mask, mask_path=path))
    if not referents:
        raise ValueError(f"{file}: no entry")
    return Referring(referents, protocol, reading=reading, annotations=(file,))


def _mask_file(path: pathlib.Path, rule: str) -> Callable[[int, int], np.ndarray]:
    """Reads a mask file by a rule (masks.py); it must be of its image's size."""

    def read(height: int, width: int) -> np.ndarray:
        mask = masks.open_mask(path, rule)
        if mask.shape != (height, width):
            message = f"mask {path} is {mask.shape[1]}x{mask.shape[0]}, its image is {width}x{height}"
            raise RecordError(message, "size of mask and image")
        return mask > 0

    return read
