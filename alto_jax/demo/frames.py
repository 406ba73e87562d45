"""What the page shows, without the page: answers as frames, boxes from clicks, files to take away."""

from collections.abc import Iterator, Sequence
import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from alto_jax import report
from alto_jax.data.composition import ScenesConfig
from alto_jax.data.scenes import ChatConfig, SceneChats
from alto_jax.evaluate.scene_answers import KINDS
from alto_jax.inference.prediction import Prediction
from alto_jax.inference.requests import parse_boxes
from alto_jax.inference.segmenter import Segmenter
from alto_jax.mllm import text

MAX_SIDE = 4096
_LARGER = 3  # than the built-in pictures are: those of the page
_BOX_COLOR = (255, 196, 0)


@dataclasses.dataclass(frozen=True)
class Frame:
    """One moment of an answer: picture uint8[H, W, 3] with the mask so far, words, and at the end the answer."""

    picture: np.ndarray
    words: str
    answer: Prediction | None = None


def examples(count: int = 6) -> list[tuple[np.ndarray, str, str]]:
    """Built-in pictures that training never showed, uint8[H, W, 3] each, enlarged, with a request: in turn a box, as
    `parse_boxes` takes it, and a phrase."""
    scene_options, chat_options = KINDS["names"]
    source = SceneChats(ScenesConfig(**scene_options, split="validation", seed=3), ChatConfig(**chat_options))
    found = []
    for index in range(count):
        record = source[index]
        height, width = record["image"].shape[:2]
        large = Image.fromarray(record["image"]).resize((_LARGER * width, _LARGER * height), Image.Resampling.BICUBIC)
        image = np.asarray(large)
        if index % 2 == 0:
            across, down = (np.flatnonzero((record["masks"][0] > 0).any(axis)) for axis in (0, 1))
            ends = np.array([across[0], down[0], across[-1] + 1, down[-1] + 1]) * _LARGER
            found.append((image, "", ",".join(map(str, ends))))
            continue
        phrase = text.find_reference(record["conversations"][0]["value"])
        assert phrase is not None  # Note: every one of these records asks for a mask.
        found.append((image, phrase.removeprefix(text.REF).removesuffix(text.REF_END), ""))
    return found


def add_corner(written: str, corner: tuple[int, int] | None, at: tuple[int, int]) -> tuple[str, tuple[int, int] | None]:
    """A click at (x, y): the first of a box is kept as its corner, the second writes the box behind the others."""
    if corner is None:
        return written, at
    (x1, x2), (y1, y2) = sorted((corner[0], at[0])), sorted((corner[1], at[1]))
    if x1 == x2 or y1 == y2:
        return written, at
    return "; ".join([*filter(None, [written.strip().rstrip(";")]), f"{x1},{y1},{x2},{y2}"]), None


def draw_boxes(image: np.ndarray, boxes: Sequence[Sequence[float]]) -> np.ndarray:
    """The image uint8[H, W, 3] with the outlines of boxes (x1, y1, x2, y2)."""
    drawn, (height, width) = image.copy(), image.shape[:2]
    thick = max(1, round(max(height, width) / 200))
    for x1, y1, x2, y2 in boxes:
        left, right = int(np.clip(x1, 0, width - 1)), int(np.clip(x2, 1, width))
        top, bottom = int(np.clip(y1, 0, height - 1)), int(np.clip(y2, 1, height))
        box = drawn[top:bottom, left:right]
        for side in (box[:thick], box[-thick:], box[:, :thick], box[:, -thick:]):
            side[:] = _BOX_COLOR
    return drawn


def answer(
    model: Segmenter, image: np.ndarray | None, phrase: str, written: str, *, length: str | int, end_bias: float
) -> Iterator[Frame]:
    """The mask as it grows, a frame a token while the model writes them; the last frame holds the answer.

    Args:
      model: answers.
      image: uint8[H, W, 3], or None: none was given.
      phrase: what to segment; not used if boxes are `written`.
      written: as `parse_boxes` takes it.
      length, end_bias: as of `Segmenter.segment`.

    Raises:
      ValueError: what is missing or wrong, in words for who asks.
    """
    if image is None:
        raise ValueError("Choose a picture first.")
    if max(image.shape[:2]) > MAX_SIDE:
        raise ValueError(
            f"The picture is {image.shape[1]} x {image.shape[0]} pixels; {MAX_SIDE} are the most on a side."
        )
    boxes = parse_boxes(written)
    if not boxes and not any(c.isalnum() for c in phrase):
        raise ValueError("Say what to segment, or draw a box: click two of its corners.")
    shown, found = draw_boxes(image, boxes), None
    options: dict[str, Any] = {"length": length, "end_bias": end_bias}
    for event in model.stream(image, "" if boxes else phrase, boxes=boxes or None, **options):
        found = event.answer
        if event.mask is not None:
            words = f"token {event.length} (code {event.code}): {event.change:.1%} of the pixels changed"
            yield Frame(report.overlay(shown, event.mask), words)
    assert found is not None  # Note: the last event has it.
    codes = " ".join(map(str, found.codes))
    words = f"{found.length} tokens, score {found.score:.2f}, {found.seconds:.2f} s: codes {codes}"
    if not found.mask.any():
        words = f"The answer holds no mask: {found.text}" if not found.length else f"{words}. The mask is empty."
    yield Frame(report.overlay(shown, found.mask), words, found)


def save(folder: pathlib.Path, image: np.ndarray, found: Prediction) -> list[str]:
    """Writes mask.png, overlay.png and answer.json (with the RLE) into the folder; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(found.mask.astype(np.uint8) * 255).save(folder / "mask.png")
    Image.fromarray(found.overlay(image)).save(folder / "overlay.png")
    (folder / "answer.json").write_text(json.dumps(found.to_json() | {"rle": found.rle}, indent=1) + "\n")
    return [str(folder / name) for name in ("mask.png", "overlay.png", "answer.json")]
