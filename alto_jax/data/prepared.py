"""Prepared data sets: what `alto_jax.data.prepare` writes, and reading it back, without TensorFlow.

A prepared data set is a TFDS directory (array_record) with `manifest.json` beside. Its records are those of the raw
reader in the same order; with sizes in the manifest, images and masks are already as the model takes them.

Kinds and what a record holds: "masks" key, image, mask; "chat" key, image, pixel_image, masks, conversations;
"referring" key, image, pixel_image, mask, phrase, ignore.
"""

import io
import json
import os
import pathlib
from typing import Any

import numpy as np
from PIL import Image

KINDS = ("masks", "chat", "referring")
FORMATS = ("raw", "png", "jpeg")
MANIFEST = "manifest.json"


def features(kind: str, image_format: str) -> Any:
    """The TFDS features of a kind; images are arrays ("raw") or encoded files, masks PNG files."""
    import tensorflow_datasets as tfds

    def image():
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


def decode(value: Any) -> np.ndarray:
    """An image or mask as stored: bytes of a file, or {"shape", "value"} of an array."""
    if isinstance(value, dict):
        value, shape = value["value"], [int(s) for s in value["shape"]]
        value = value.item() if isinstance(value, np.ndarray) else value
        return np.frombuffer(value, np.uint8).reshape(shape)
    return np.asarray(Image.open(io.BytesIO(value)))


class Prepared:
    """Random access to the records of a prepared data set.

    Attributes:
      manifest: what prepare wrote: name, kind, sizes, counts, hashes.
      no_target: see refcoco.Referring.
    """

    def __init__(self, directory: str | os.PathLike, *, expect: str = "", kind: str = ""):
        """Opens a data set.

        Args:
          directory: the folder with `manifest.json`.
          expect: name the data set must have; kind: one of KINDS it must have.

        Raises:
          ValueError: not a complete prepared data set, or another one than expected.
        """
        self.directory = pathlib.Path(directory)
        try:
            self.manifest = json.loads((self.directory / MANIFEST).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{directory}: no complete prepared data set (expected {MANIFEST}): {error}") from error
        for what, wanted in (("name", expect), ("kind", kind)):
            if wanted and self.manifest[what] != wanted:
                raise ValueError(f"{directory}: prepared {what} is {self.manifest[what]!r}, expected {wanted!r}")
        self.no_target = self.manifest["no_target"]
        self._sized = any(self.manifest["sizes"].values())
        self._source = None
        self._open()

    def _open(self) -> Any:
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(self.directory)
        skip = tfds.decode.SkipDecoding()
        names = set(builder.info.features) & {"image", "pixel_image"}  # Note: decoded here, without OpenCV.
        self._source = builder.as_data_source(split=self.manifest["split"], decoders={name: skip for name in names})
        return self._source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        stored = self._source[int(index) % len(self)]
        record = {"key": stored["key"].decode(), "image": decode(stored["image"])}
        if "pixel_image" in stored and self._sized:
            record["pixel_image"] = decode(stored["pixel_image"])
        masks = [mask[..., 0] for mask in stored["masks"]]
        if self.manifest["kind"] == "chat":
            record |= {"masks": masks, "conversations": json.loads(stored["conversations"])}
        else:
            record["mask"] = masks[0]
        if self.manifest["kind"] == "referring":
            record["phrase"] = stored["phrase"].decode()
            if len(stored["ignore"]):
                record["ignore"] = stored["ignore"][0][..., 0]
        return record | ({"prepared": True} if self._sized else {})

    def texts(self):
        """The turns of every record of kind "chat"."""
        for i in range(len(self)):
            yield [turn["value"] for turn in json.loads(self._source[i]["conversations"])]
