"""What is done with many requests: images are segmented, masks encoded, codes decoded; see bulk.py."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
import json
import pathlib
import threading
from typing import Any

import numpy as np
from PIL import Image

from alto_jax.config import write_whole
from alto_jax.data import images, masks, rle
from alto_jax.data.reading import Reading
from alto_jax.evaluate import coco
from alto_jax.inference.bulk import RESULTS
from alto_jax.inference.decoding import ImageInputs
from alto_jax.inference.prediction import Prediction
from alto_jax.inference.requests import Request
from alto_jax.inference.segmenter import Segmenter
from alto_jax.inference.settings import Settings
from alto_jax.inference.tokenizer import TokenizerModel

COCO, MASKS, OVERLAYS = "coco.json", "masks", "overlays"


def _save(folder: pathlib.Path, name: str, pixels: np.ndarray) -> str:
    """Writes ID.png below a folder; returns its name beside that folder."""
    path = folder / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, compress_level=3)
    return path.relative_to(folder.parent).as_posix()


class SegmentWork:
    """Requests {"image", and "text", "boxes" or "prompt"} → answers with run lengths; masks and overlays on request."""

    name = "predict"

    def __init__(
        self,
        model: Segmenter,
        root: str | pathlib.Path,
        asked: Mapping[str, Any],
        *,
        prompt: str | None,
        exif: str,
        batch_size: int,
        save_masks: bool,
        save_overlays: bool,
    ):
        """Takes where images lie, options of `Segmenter.segment_batch`, and the rest of the command's."""
        self._model, self._root, self.batch_size = model, pathlib.Path(root), batch_size
        of = lambda own: Settings.of(model.cfg.tokenizer.num_latent_tokens, own, dict(asked))
        self._settings = {False: of(None), True: of(prompt)}  # Note: a line with its own text has the built-in wording.
        # Note: what people draw on their own photo they draw on what they see.
        self._reading = Reading("masks_upright" if exif == "upright" else "stored")
        self._masks, self._overlays = save_masks, save_overlays
        self._photos: OrderedDict[pathlib.Path, Future] = OrderedDict()
        self._lock = threading.Lock()
        self.options = {"command": self.name, "checkpoint": model.identity, **asked, "exif": exif, "masks": save_masks,
                        "overlays": save_overlays}  # fmt: skip

    def source(self, request: Request) -> pathlib.Path:
        """The image's file."""
        return self._root / request.given["image"]

    def read(self, request: Request) -> Any:
        """The image at the model's sizes with the question's ids, and itself if it is drawn on."""
        given = request.given
        image, inputs = self._photo(self.source(request))
        phrase = self._model.box_phrase(given["boxes"], image.shape[:2]) if "boxes" in given else given.get("text")
        settings = self._settings[phrase is None]
        question = given["prompt"] if phrase is None else settings.question(phrase)
        return self._model.prepare(inputs, question, settings), image if self._overlays else None

    def _photo(self, path: pathlib.Path) -> tuple[np.ndarray, ImageInputs]:
        """An image uint8[H, W, 3], and itself at the model's sizes; one that was read lately is not read again."""
        with self._lock:
            found, is_new = self._photos.get(path, Future()), path not in self._photos
            self._photos[path] = found
            self._photos.move_to_end(path)
            if len(self._photos) > self.batch_size:
                self._photos.popitem(last=False)
        if is_new:  # Note: other threads wait for this one.
            try:
                image = self._reading.photo(path).image
                found.set_result((image, self._model.inputs(image)))
            except Exception as error:
                found.set_exception(error)
        return found.result()

    def answer(self, requests: Sequence[Request], items: Sequence[Any], folder: pathlib.Path) -> list[dict[str, Any]]:
        """The lines; each has the fields of `Prediction.to_json` (its "text" is "answer"), and "size"."""
        found: dict[int, Prediction] = {}
        for is_prompt, settings in self._settings.items():  # Note: a batch of the model has one of them.
            rows = [row for row, request in enumerate(requests) if ("prompt" in request.given) == is_prompt]
            prepared = [items[row][0] for row in rows]
            answers = self._model.answer_batch(prepared, settings, self.batch_size) if rows else []
            found |= dict(zip(rows, answers, strict=True))
        lines = []
        for row, (request, (_, image)) in enumerate(zip(requests, items, strict=True)):
            prediction = found[row]
            line = {"size": list(prediction.mask.shape), "answer": prediction.text} | prediction.to_json()
            for name in ("text", "seconds", "iou"):
                del line[name]
            if self._masks:
                line["files"] = list(_save_masks(folder, request.id, prediction))
            if image is not None:
                _save(folder / OVERLAYS, request.id, prediction.overlay(image))
            lines.append(line)
        return lines


def _save_masks(folder: pathlib.Path, name: str, prediction: Prediction) -> Iterator[str]:
    """Writes masks/ID.png, and masks_2/ID.png … of further masks; yields their names."""
    for number, mask in enumerate([one.mask for one in prediction.masks] or [prediction.mask], 1):
        # Note: in folders of their own, since any other name in this one may be another request's.
        yield _save(folder / (MASKS if number == 1 else f"{MASKS}_{number}"), name, mask.astype(np.uint8) * 255)


def write_coco(folder: str | pathlib.Path) -> int:
    """Writes coco.json of all lines of SegmentWork in a folder, one entry a mask; returns the number of entries."""
    lines: list[dict[str, Any]] = []
    with (pathlib.Path(folder) / RESULTS).open("rb") as file:
        for index, line in enumerate(map(json.loads, file)):
            asked = line["request"]
            common = {"index": index, "key": line["id"], "image": asked["image"], "mask": None,
                      "phrase": asked.get("text", asked.get("prompt", asked.get("boxes")))}  # fmt: skip
            lines += [common | {"mask": one["rle"], "score": line["token_probability"] * one["confidence"]}
                      for one in line["masks"]] or [common]  # fmt: skip
    stems = {line["image"]: pathlib.PurePosixPath(line["image"]).stem for line in lines}
    # Note: 7.png and 007.png are two images, but one number.
    by_stem = all(s.isascii() and s.isdigit() for s in stems.values()) and len(set(map(int, stems.values()))) == len(
        stems
    )
    names = [line | {"image": stems[line["image"]] if by_stem else line["image"], "file_name": line["image"]}
             for line in lines]  # fmt: skip
    write_whole(pathlib.Path(folder) / COCO, coco.coco_results(names))
    return sum(line["mask"] is not None for line in lines)


class EncodeWork:
    """Requests {"mask"} → codes."""

    name = "encode"

    def __init__(self, model: TokenizerModel, root: str, length: str | int, rule: str, batch_size: int):
        """Takes where masks lie, the length of their codes, and by which rule a file is a mask."""
        self._model, self._root, self._length, self._rule = model, pathlib.Path(root), length, rule
        self.batch_size = batch_size
        self.options = {"command": self.name, "checkpoint": model.identity, "length": length, "mask_rule": rule}

    def source(self, request: Request) -> pathlib.Path:
        """The mask's file."""
        return self._root / request.given["mask"]

    def read(self, request: Request) -> Any:
        """The mask at the model's size, and its own size."""
        mask = masks.open_mask(self.source(request), self._rule)
        return self._model.small_mask(mask), mask.shape

    def answer(self, requests: Sequence[Request], items: Sequence[Any], folder: pathlib.Path) -> list[dict[str, Any]]:
        """The lines: "codes", "length", "size"."""
        found = self._model.encode_batch([small for small, _ in items], self._length, self.batch_size)
        return [{"codes": codes, "length": len(codes), "size": list(size)} for codes, (_, size) in zip(found, items)]


class DecodeWork:
    """Requests {"codes", "size", "image"} → masks as PNG files and run lengths."""

    name = "decode"

    def __init__(self, model: TokenizerModel, root: str | None, exif: str, batch_size: int):
        """Takes where images lie; None: masks are decoded without."""
        self._model, self._root, self._exif, self.batch_size = model, root, exif, batch_size
        self.options = {"command": self.name, "checkpoint": model.identity, "images": root is not None, "exif": exif}

    def source(self, request: Request) -> pathlib.Path | None:
        """The image's file, if masks are decoded with images."""
        return None if self._root is None else pathlib.Path(self._root) / request.given["image"]

    def read(self, request: Request) -> Any:
        """The codes and size, checked, and the image at the model's size or None."""
        given = request.given
        self._model.check_codes(given["codes"], given["size"])
        path = self.source(request)
        if path is None:
            return None
        return self._model.small_image(images.open_image(path, upright=self._exif == "upright"))

    def answer(self, requests: Sequence[Request], items: Sequence[Any], folder: pathlib.Path) -> list[dict[str, Any]]:
        """The lines: "file" and "rle" of the mask."""
        codes, sizes = [r.given["codes"] for r in requests], [r.given["size"] for r in requests]
        found = self._model.decode_batch(codes, sizes, None if items[0] is None else items, self.batch_size)
        return [
            {"file": _save(folder / MASKS, request.id, mask.astype(np.uint8) * 255), "rle": rle.encode(mask)}
            for request, mask in zip(requests, found, strict=True)
        ]
