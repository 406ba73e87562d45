"""What a model answers."""

import dataclasses
from typing import Any

import numpy as np

from alto_jax import report
from alto_jax.data import rle


@dataclasses.dataclass(frozen=True)
class Prediction:
    """An answer with its mask.

    Attributes:
      mask: bool[H, W] at the image's size (all False if the answer holds no mask).
      probability: float32[H, W], of each pixel.
      text: the answer, a forced prefix too, special tokens written out.
      token_ids: its ids.
      codes: the mask's codes.
      length: their number, 0 if the answer holds no well-formed mask.
      seconds: wall time of the call, by the number of answers that it gave.
      iou: with the target, if one was given.
      num_masks: how many the answer holds; mask, codes and length are those of the first.
      token_probability: mean probability that the model gave the tokens that it chose, over its whole vocabulary.
      confidence: mean probability of the mask's pixels; 0 if it has none.
    """

    mask: np.ndarray = dataclasses.field(repr=False)
    probability: np.ndarray = dataclasses.field(repr=False)
    text: str
    token_ids: list[int] = dataclasses.field(repr=False)
    codes: list[int]
    length: int
    seconds: float
    iou: float | None = None
    num_masks: int = 0
    token_probability: float = 0.0
    confidence: float = 0.0

    @property
    def score(self) -> float:
        """`token_probability` times `confidence`, in 0..1; not calibrated: for sorting answers of one model."""
        return self.token_probability * self.confidence

    @property
    def rle(self) -> dict[str, Any]:
        """The mask as COCO's compressed run lengths, {"size": [H, W], "counts": str}."""
        return rle.encode(self.mask)

    def overlay(self, image: np.ndarray) -> np.ndarray:
        """The image uint8[H, W, 3] with the mask drawn on it, likewise."""
        return report.overlay(image, self.mask)

    def to_json(self) -> dict[str, Any]:
        """All but the arrays, JSON-compatible."""
        names = ("text", "token_ids", "codes", "length", "num_masks", "score", "token_probability", "confidence",
                 "seconds", "iou")  # fmt: skip
        return {name: getattr(self, name) for name in names}
