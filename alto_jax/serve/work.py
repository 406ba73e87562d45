"""What a request needs besides the model, in threads of their own: its image decoded, its questions, its answer."""

import base64
import binascii
from collections.abc import Callable
import hashlib
import io
import json
from typing import Any
import unicodedata

import numpy as np
from PIL import Image

from alto_jax import metrics, report
from alto_jax.data import images, rle
from alto_jax.data.bad_data import RecordError
from alto_jax.inference.prediction import Prediction
from alto_jax.inference.settings import Settings
from alto_jax.inference.streaming import Grown
from alto_jax.mllm import text as words
from alto_jax.serve.batcher import Job
from alto_jax.serve.engine import Engine, Question
from alto_jax.serve.limits import Fault, Limits
from alto_jax.serve.schema import Options, SegmentRequest, check, read_json, shown

_NAME = "of the request"


def parse_json(content: bytes) -> tuple[bytes, Options]:
    """A JSON body as (the image file's bytes, what is asked).

    Raises:
      Fault: bad_json, invalid_field.
    """
    asked = check(SegmentRequest, read_json(content))
    encoded = asked.image
    if encoded.startswith("data:"):
        encoded = encoded.partition(",")[2]
    try:
        image = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Fault("invalid_field", f"image: expected base64, got {shown(asked.image)}", "image") from error
    asked.image = ""  # Note: the text is not needed any more, and is large.
    return image, asked


def requests_of(asked: Options, limits: Limits) -> list[str]:
    """The phrases that are asked for; [] for boxes.

    Raises:
      Fault: invalid_field: too many, too long, or more than plain text.
    """
    if asked.boxes is not None:
        if not 1 <= len(asked.boxes) <= limits.max_boxes:
            message = f"boxes: expected 1..{limits.max_boxes}, got {len(asked.boxes)}"
            raise Fault("invalid_field", message, "boxes")
        return []
    if asked.phrase is not None:
        return [_phrase(asked.phrase, "phrase", limits)]
    phrases = asked.phrases or []
    if not 1 <= len(phrases) <= limits.max_phrases:
        raise Fault("invalid_field", f"phrases: expected 1..{limits.max_phrases}, got {len(phrases)}", "phrases")
    return [_phrase(phrase, f"phrases.{index}", limits) for index, phrase in enumerate(phrases)]


def _phrase(phrase: str, field: str, limits: Limits) -> str:
    """A phrase, checked."""

    def refuse(expected: str) -> Fault:
        return Fault("invalid_field", f"{field}: expected {expected}, got {shown(phrase)}", field)

    if len(phrase) > limits.max_phrase_chars:
        message = f"{field}: expected at most {limits.max_phrase_chars} characters, got {len(phrase)}"
        raise Fault("invalid_field", message, field)
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in phrase):
        raise refuse("text without control characters and lone surrogates")
    if not any(c.isalnum() for c in phrase):
        raise refuse("the name or description of an object")
    if any(token in phrase for token in (*words.MARKUP, words.IMAGE)):
        raise refuse("plain text without the markup of prompts")
    return phrase


def prepare(
    engine: Engine, limits: Limits, content: bytes, asked: Options, listener: Callable[[int, Grown], None] | None = None
) -> Job:
    """A request's job: the image decoded and brought to the model's sizes, the questions as token ids.

    Raises:
      Fault: bad_image, image_too_large, invalid_field.
    """
    phrases, model = requests_of(asked, limits), engine.model
    most = model.cfg.tokenizer.num_latent_tokens
    if isinstance(asked.length, int) and not 1 <= asked.length <= most:
        message = f"length: expected 'adaptive', 'full' or a whole number in 1..{most}, got {shown(asked.length)}"
        raise Fault("invalid_field", message, "length")
    settings = Settings.of(most, None, {"length": asked.length, "end_bias": asked.end_bias})
    image = decode(content, limits)
    if asked.boxes is not None:
        try:
            phrases = [model.box_phrase(asked.boxes, image.shape[:2])]
        except ValueError as error:
            raise Fault("invalid_field", str(error), "boxes") from error
    if "overlay" in asked.returns and image.shape[0] * image.shape[1] * len(phrases) > limits.max_pixels:
        message = f"returns: overlays of {len(phrases)} x {image.shape[1]}x{image.shape[0]} pixels are too many; "
        raise Fault("invalid_field", f"{message}at most {limits.max_pixels} together", "returns")
    questions = []
    for index, phrase in enumerate(phrases):
        field = "boxes" if asked.boxes is not None else "phrase" if asked.phrase is not None else f"phrases.{index}"
        try:
            _, ids = model.prompt(settings.question(phrase), settings)
        except ValueError as error:
            message = f"{field}: expected plain text without special tokens ({error})"
            raise Fault("invalid_field", message, field) from error
        if len(ids) > engine.widths[-1]:
            message = f"{field}: expected at most {engine.widths[-1]} tokens with the question, got {len(ids)}"
            raise Fault("invalid_field", message, field)
        width = next(w for w in engine.widths if w >= len(ids))
        questions.append(Question(ids, width, settings))
    return Job(hashlib.sha256(content).hexdigest(), model.inputs(image), questions, listener)


def decode(content: bytes, limits: Limits) -> np.ndarray:
    """An image file's bytes as uint8[H, W, 3], upright.

    Raises:
      Fault: bad_image, image_too_large.
    """
    try:
        return images.read_bytes(content, _NAME, limits.max_pixels)
    except RecordError as error:
        code = "image_too_large" if error.kind == "image too large" else "bad_image"
        raise Fault(code, str(error), "image") from error


def finish(model: str, limits: Limits, job: Job, content: bytes, asked: Options, seconds: float) -> bytes:
    """The response's JSON of a job that is done."""
    height, width = job.inputs.size
    image = decode(content, limits) if "overlay" in asked.returns else None
    phrases: list[str | None] = [None if asked.boxes is not None else asked.phrase]
    if asked.phrases is not None:
        phrases = [*asked.phrases]
    results = []
    for index, phrase in enumerate(phrases):
        found = job.found[index]
        prediction = found.answers.at(found.row, 0, (height, width))
        results.append({"phrase": phrase} | _forms(prediction, asked, image))
    return _dump({"model": model, "size": [height, width], "results": results, "seconds": round(seconds, 4)})


def grow(
    size: tuple[int, int], index: int, grown: Grown, before: np.ndarray | None, asked: Options
) -> tuple[bytes, np.ndarray]:
    """A code of question `index` as JSON, {"result", "index", "code", "change", "rle"}, and the mask so far bool[H, W].

    Args:
      size: (height, width) of the image. before: bool[H, W], the mask before this code; None: it is the first.
    """
    mask = metrics.resize_probability(grown.probability, *size) > 0.5
    change = float((mask if before is None else mask != before).mean())
    event: dict[str, Any] = {"result": index, "index": len(grown.codes), "code": grown.codes[-1],
                             "change": round(change, 6)}  # fmt: skip
    if "rle" in asked.returns:
        event["rle"] = rle.encode(mask)
    return _dump(event), mask


def _forms(found: Prediction, asked: Options, image: np.ndarray | None) -> dict[str, Any]:
    """An answer in the forms that were asked for."""
    forms: dict[str, Any] = {"text": found.text, "length": found.length}
    forms |= dict.fromkeys(("codes", "score", "token_probability", "confidence", "rle", "png", "overlay"))
    for name in asked.returns:
        if name == "score":
            forms |= {"score": found.score, "token_probability": found.token_probability,
                      "confidence": found.confidence}  # fmt: skip
        elif name == "png":
            forms[name] = _png(Image.fromarray(found.mask.astype(np.uint8) * 255))
        elif name == "overlay" and image is not None:
            forms[name] = _png(Image.fromarray(report.overlay(image, found.mask)))
        elif name == "rle":
            forms[name] = found.rle
        elif name == "codes":
            forms[name] = found.codes
    return forms


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=3)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _dump(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
