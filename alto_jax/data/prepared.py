"""Prepared data sets: what `alto_jax.data.prepare` writes, and reading it back, without TensorFlow.

A prepared data set is a TFDS directory (array_record) with `manifest.json` beside. Its records are those of the raw
reader in the same order; with sizes in the manifest, images and masks are already as the model takes them.

Kinds and what a record holds: "masks" key, image, mask; "chat" key, image (None: text alone, stored as an image of one
pixel), pixel_image, masks, conversations;
"referring" key, image, pixel_image, mask, phrase, ignore. With caches (caches.py) also features (then without the image
of the SAM encoder), codes and code_lengths.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
import copy
import io
import json
import logging
import os
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from alto_jax.config import local_path
from alto_jax.data import identity, prompts
from alto_jax.data.fingerprint import Fingerprint
from alto_jax.data.shards import Shards
from alto_jax.data.source import place
from alto_jax.data.split import ImageSplit, image_hash
from alto_jax.storage import fetched
from alto_jax.storage.bucket import checked, is_url

_log = logging.getLogger(__name__)
KINDS = ("masks", "chat", "referring")
FORMATS = ("raw", "png", "jpeg")
MANIFEST = "manifest.json"
IMAGES = "images.npy"  # What image each record shows: its name and its hash (split.py), so that no record need be read.
REQUESTS = "requests.npy"  # uint16[N, 2]: requests for one mask (prompts.py) and masks of each record of kind "chat"


def check_root(source: str, root: str | os.PathLike, field: str) -> None:
    """Raises ConfigError if a data folder is a URL that cannot be used, or of another source than "prepared"."""
    if source == "prepared":
        checked(root, field)
    elif is_url(root):
        local_path(root, f"{field} (source {source!r}; a bucket may hold prepared data alone)")


def features(kind: str, image_format: str, caches: Mapping[str, Any] | None = None) -> Any:
    """The TFDS features of a kind; images are arrays ("raw") or encoded files, masks PNG files.

    Args:
      kind, image_format: of KINDS and FORMATS.
      caches: what is cached, as caches.CacheMaker.manifest has it; None: nothing.
    """
    import tensorflow_datasets as tfds  # late: only prepared sets need it, and it is slow to start

    def image() -> Any:
        if image_format == "raw":
            return tfds.features.Tensor(shape=(None, None, 3), dtype=np.uint8, encoding="bytes")
        return tfds.features.Image(shape=(None, None, 3), encoding_format=image_format)

    fields = {"key": tfds.features.Text(), "image": image()}
    masks = tfds.features.Sequence(tfds.features.Image(shape=(None, None, 1), encoding_format="png"))
    if kind in ("chat", "referring"):
        fields["pixel_image"] = image()
    fields["masks"] = masks
    if kind == "chat":
        fields["conversations"] = tfds.features.Text()
    if kind == "referring":
        fields |= {"phrase": tfds.features.Text(), "ignore": masks}
    caches = caches or {}
    if "features" in caches:  # The bits of bfloat16, which TFDS does not know without TensorFlow.
        fields["features"] = tfds.features.Tensor(shape=(None, None, None), dtype=np.uint16, encoding="bytes")
    if "tokens" in caches:
        shape = (None, caches["tokens"]["settings"]["num_latent_tokens"])
        fields["codes"] = tfds.features.Tensor(shape=shape, dtype=np.int32, encoding="bytes")
        fields["code_lengths"] = tfds.features.Tensor(shape=(None,), dtype=np.int32, encoding="bytes")
    return tfds.features.FeaturesDict(fields)


def encode_image(array: np.ndarray, image_format: str) -> Any:
    """An image for `features`: the array, or the bytes of a PNG (exact) or JPEG (quality 95) file."""
    if image_format == "raw":
        return array
    buffer = io.BytesIO()
    options = {"compress_level": 1} if image_format == "png" else {"quality": 95, "subsampling": 0}
    Image.fromarray(array).save(buffer, format=image_format.upper(), **options)
    return buffer.getvalue()


def encode_mask(mask: np.ndarray) -> bytes:
    """uint8[H, W] as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def encode_names(names: Iterable[str]) -> bytes:
    """The content of IMAGES for the records' image names."""
    encoded = [name.encode("utf-8", "surrogateescape") for name in names]
    size = max(map(len, encoded), default=1) or 1
    table = np.zeros(len(encoded), [("hash", "<u8"), ("name", f"S{size}")])
    table["hash"] = [image_hash(name.decode("utf-8", "surrogateescape")) for name in encoded]
    table["name"] = encoded
    buffer = io.BytesIO()
    np.save(buffer, table)
    return buffer.getvalue()


def decode(value: Any, dtype: Any = np.uint8) -> np.ndarray:
    """An image or mask as stored: bytes of a file, or {"shape", "value"} of an array."""
    if isinstance(value, dict):
        return np.frombuffer(value["value"], dtype).reshape([int(side) for side in value["shape"]])
    return np.asarray(Image.open(io.BytesIO(value)))


def _is_one_pixel(example: bytes) -> bool:
    """Whether the image of a serialised record is the one of a single pixel, which stands for none."""
    found, _ = take_fields(example, {"image", "image/value"})
    if "image" in found:
        return Image.open(io.BytesIO(found["image"])).size == (1, 1)
    return len(found["image/value"]) == 3


def take_fields(example: bytes, names: Collection[str]) -> tuple[dict[str, memoryview], bytes]:
    """Takes the named fields, each one string of bytes, out of a serialised tf.Example without copying them.

    Protobuf's parser copies a field twice, which for images costs more than reading them from the file.

    Returns:
      The values found, and the serialised tf.Example of the other fields.

    Raises:
      ValueError: not a tf.Example, or a named field that is not one string of bytes.
    """
    view, found = memoryview(example), {}
    others: list[bytes | memoryview] = []
    for features in _messages(view):  # Example: {1: Features}; Features: {1: map entry}; entry: {1: key, 2: Feature}
        for entry in _messages(features):
            key, feature = _messages(entry)
            name = str(key, "utf-8")
            if name in names:
                # Feature: {1: BytesList}; BytesList: {1: bytes}
                values = [value for values in _messages(feature) for value in _messages(values)]
                if len(values) != 1:
                    raise ValueError(f"tf.Example: expected one string of bytes in {name!r}, got {len(values)}")
                found[name] = values[0]
            else:
                others += [b"\x0a", _varint(len(entry)), entry]
    rest = b"".join(others)
    return found, b"\x0a" + _varint(len(rest)) + rest


def _messages(message: memoryview) -> Iterator[memoryview]:
    """The fields of a protobuf message that has none but length-delimited ones, in order."""
    at = 0
    while at < len(message):
        if message[at] & 7 != 2:
            raise ValueError(f"tf.Example: expected a length-delimited field at byte {at} of a message")
        at, size, shift = at + 1, 0, 0
        while at < len(message):
            size |= (message[at] & 127) << shift
            at, shift = at + 1, shift + 7
            if message[at - 1] < 128:
                break
        if at + size > len(message):
            raise ValueError(f"tf.Example: a field of {size} bytes at byte {at} of a message of {len(message)}")
        yield message[at : at + size]
        at += size


def _varint(value: int) -> bytes:
    """A number as protobuf writes it."""
    groups = [value >> shift & 127 for shift in range(0, max(value.bit_length(), 1), 7)]
    return bytes([group | 128 for group in groups[:-1]] + groups[-1:])


class Prepared:
    """Random access to the records of a prepared data set.

    Attributes:
      manifest: what prepare wrote: name, kind, sizes, counts, hashes.
      caches: what is cached and read, of what identity, see caches.CacheMaker.
      no_target: see refcoco.Referring.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        expect: str = "",
        kind: str = "",
        use_caches: bool = False,
        max_masks: int | None = None,
    ):
        """Opens a data set.

        Args:
          directory: the folder with `manifest.json`, or its URL, which is fetched whole to the cache folder.
          expect: name the data set must have; kind: one of KINDS it must have.
          use_caches: whether to read what is cached.
          max_masks: records of more are passed over, with a warning; None: none is.

        Raises:
          ValueError: not a complete prepared data set, or another one than expected.
        """
        if is_url(directory):
            directory = fetched.data(os.fspath(directory), "root", MANIFEST, "a prepared data set")
        self.directory = pathlib.Path(directory)
        try:
            self.manifest = json.loads((self.directory / MANIFEST).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{directory}: no complete prepared data set (expected {MANIFEST}): {error}") from error
        for what, wanted in (("name", expect), ("kind", kind)):
            if wanted and self.manifest[what] != wanted:
                raise ValueError(f"{directory}: prepared {what} is {self.manifest[what]!r}, expected {wanted!r}")
        self.no_target = self.manifest["no_target"]
        self.caches = self.manifest.get("caches", {}) if use_caches else {}
        self._sized = any(self.manifest["sizes"].values())
        self._rows: np.ndarray | None = None
        self._open()
        if max_masks is not None and self._requests is not None:
            many = self._requests[:, 1] > max_masks
            if many.any():
                _log.warning("%s: %d of %d records have more masks than config.data.max_masks=%d and are passed over",
                             self.directory, many.sum(), len(many), max_masks)  # fmt: skip
                self._rows = np.flatnonzero(~many)

    def image_hashes(self, index: int) -> tuple[int, ...]:
        """Hash of the image of record `index`, see split.py; () if the set was prepared before these were kept."""
        return () if self._images is None else (int(self._images["hash"][self._row(index)]),)

    def fingerprint(self) -> str:
        """What the samples are, see fingerprint.py: as the raw data say it where they are stored as they are."""
        manifest = self.manifest
        is_exact = not any(manifest["sizes"].values()) and manifest["format"] != "jpeg"
        if is_exact and manifest.get("fingerprint"):
            return str(manifest["fingerprint"])
        found = Fingerprint()
        found.values(manifest["kind"], [shard["sha256"] for shard in manifest["shards"]])
        return str(found)

    def left_out(self, count: int) -> list[dict[str, Any]]:
        """The records, {"index", "kind", "message"}, that preparation left out of those up to the `count`-th kept."""
        bad = sorted(self.manifest["bad"], key=lambda entry: entry["index"])
        return [b for number, b in enumerate(bad) if b["index"] - number < count or count >= self.manifest["written"]]

    def part(self, split: ImageSplit) -> "Prepared":
        """The records whose images are on one side of a split.

        Raises:
          EmptySplit: there is none. ValueError: the data set was prepared before hashes of images were kept.
        """
        if self._images is None:
            raise ValueError(
                f"{self.directory}: prepared before {IMAGES} was written, which says what image each record shows; "
                "prepare it again, or give an evaluation set of its own (config.eval.source)"
            )
        found = copy.copy(self)
        on_side = split.has_hashes(np.array(self._images["hash"]))
        found._rows = np.flatnonzero(on_side) if self._rows is None else self._rows[on_side[self._rows]]
        split.require_some(len(found), len(self), self.directory)
        return found

    def _read_images(self) -> np.ndarray:
        file, count = self.directory / IMAGES, self.manifest["written"]
        try:
            images = np.load(file, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{file}: cannot be read: {error}") from error
        if images.shape != (count,) or images.dtype.names != ("hash", "name"):
            raise ValueError(f"{file}: expected hash and name of {count} images, got {images.dtype}{images.shape}")
        return images

    def _read_requests(self) -> np.ndarray:
        file, count = self.directory / REQUESTS, self.manifest["written"]
        try:
            requests = np.load(file, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{file}: cannot be read: {error}") from error
        if requests.shape != (count, 2):
            raise ValueError(f"{file}: expected two numbers of {count} records, got {requests.dtype}{requests.shape}")
        return requests

    def _row(self, index: int) -> int:
        """Where record `index` is stored."""
        index = place(index, self)
        return index if self._rows is None else int(self._rows[index])

    def _open(self) -> None:
        import tensorflow_datasets as tfds  # late: only prepared sets need it, and it is slow to start

        self._images = self._read_images() if (self.directory / IMAGES).is_file() else None
        self._requests = self._read_requests() if (self.directory / REQUESTS).is_file() else None
        builder = tfds.builder_from_directory(self.directory)
        shards = builder.info.splits[self.manifest["split"]].file_instructions
        self._source = Shards([shard.filename for shard in shards], [shard.take for shard in shards])
        fields = dict(builder.info.features.items())
        self._large = [name for name in ("image", "pixel_image", "features") if name in fields]
        self._small = tfds.features.FeaturesDict({k: v for k, v in fields.items() if k not in self._large})
        texts = {name: tfds.features.Text() for name in ("key", "conversations") if name in fields}
        self._texts = tfds.features.FeaturesDict(texts)

    def __getstate__(self) -> dict[str, Any]:
        """Another process opens the data set for itself."""
        opened = ("_source", "_large", "_small", "_texts", "_images", "_requests")
        return {name: value for name, value in vars(self).items() if name not in opened}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    def __copy__(self) -> "Prepared":
        found = object.__new__(type(self))
        vars(found).update(vars(self))
        return found

    def identity(self) -> identity.Identity:
        """What the data are, see identity.py: by the hashes of the shards."""
        shards = [shard["sha256"] for shard in self.manifest["shards"]]
        rows = () if self._rows is None else (self._rows.tobytes(),)
        return {"": {"records": len(self), "hash": identity.digest(self.manifest["kind"], shards, *rows)}}

    def _stored(self, index: int) -> dict[str, Any]:
        """A record's fields; images and their features not decoded, see `decode`."""
        from tensorflow_datasets.proto import (
            tf_example_pb2,
        )  # late: only prepared sets need it, and it is slow to start

        names = {key for name in self._large for key in (name, f"{name}/value")}
        values, rest = take_fields(self._source[index], names)
        fields, large = tf_example_pb2.Example.FromString(rest).features.feature, {}
        for name in self._large:
            shape = fields[f"{name}/shape"].int64_list.value
            large[name] = values[name] if name in values else {"shape": shape, "value": values[f"{name}/value"]}
        return self._small.deserialize_example_np(rest) | large

    def __len__(self) -> int:
        return len(self._source) if self._rows is None else len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, kind = self._row(index), self.manifest["kind"]
        stored = self._stored(row)
        record = {"key": stored["key"].decode()}
        if self._images is not None:
            record["image_name"] = bytes(self._images["name"][row]).decode("utf-8", "surrogateescape")
        sam_image = "image" if kind == "masks" else "pixel_image"  # Not needed beside its features.
        for name in ("image", "pixel_image") if self._sized else ("image",):
            if name in stored and not (name == sam_image and "features" in self.caches):
                record[name] = decode(stored[name])
        if kind == "chat" and record["image"].shape[:2] == (1, 1):
            record = {"key": record["key"], "image": None}
        if "features" in self.caches:
            import ml_dtypes  # late: keeps the start fast

            record["features"] = decode(stored["features"], ml_dtypes.bfloat16)
        if "tokens" in self.caches:
            record |= {name: stored[name] for name in ("codes", "code_lengths")}
        masks = [mask[..., 0] for mask in stored["masks"]]
        if kind == "chat":
            record |= {"masks": masks, "conversations": json.loads(stored["conversations"])}
        else:
            record["mask"] = masks[0]
        if kind == "referring":
            record["phrase"] = stored["phrase"].decode()
            if len(stored["ignore"]):
                record["ignore"] = stored["ignore"][0][..., 0]
        return record | ({"prepared": True} if self._sized else {})

    def conversation(self, index: int) -> dict[str, Any]:
        """Record `index` of kind "chat" without its images and masks, but for "image": None where it has none."""
        example = self._source[self._row(index)]
        stored = self._texts.deserialize_example_np(example)
        record = {"key": stored["key"].decode(), "conversations": json.loads(stored["conversations"])}
        return record | ({"image": None} if _is_one_pixel(example) else {})

    def num_prompts(self) -> np.ndarray:
        """How many requests for one mask each record has, see source.Chats."""
        if self._requests is not None:
            return self._requests[:, 0] if self._rows is None else self._requests[self._rows, 0]
        _log.warning("%s: prepared before %s was written: all texts are read to find prompts", self.directory, REQUESTS)
        said = (self.conversation(index)["conversations"] for index in range(len(self)))
        return np.array([prompts.count_requests(conversations) for conversations in said], np.uint16)

    def texts(self) -> Iterator[list[str]]:
        """The turns of every record of kind "chat"."""
        for i in range(len(self)):
            yield [turn["value"] for turn in self.conversation(i)["conversations"]]
