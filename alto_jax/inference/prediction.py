"""What a model answers."""

import dataclasses
from typing import Any

import numpy as np

from alto_jax import metrics, report
from alto_jax.data import images, rle
from alto_jax.mllm import text as words


@dataclasses.dataclass(frozen=True)
class AnswerMask:
    """One mask of an answer; `np.asarray` gives `mask`.

    Attributes:
      mask: bool[H, W] at the image's size.
      codes: its codes.
      confidence: mean probability of the mask's pixels; 0 if it has none.
    """

    mask: np.ndarray = dataclasses.field(repr=False)
    codes: list[int]
    confidence: float

    @property
    def length(self) -> int:
        """Number of codes."""
        return len(self.codes)

    @property
    def rle(self) -> dict[str, Any]:
        """The mask as COCO's compressed run lengths, {"size": [H, W], "counts": str}."""
        return rle.encode(self.mask)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.mask, dtype) if copy else np.asarray(self.mask, dtype)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """An answer with its masks.

    Attributes:
      mask: bool[H, W] at the image's size, the first one (all False if the answer holds no mask).
      probability: float32[H, W], of each pixel.
      text: the answer, a forced prefix too, special tokens written out.
      token_ids: its ids.
      codes: the mask's codes.
      length: their number, 0 if the answer holds no well-formed mask.
      seconds: wall time of the call, by the number of answers that it gave.
      iou: with the target, if one was given.
      num_masks: how many the answer holds; mask, probability, codes, length and confidence are those of the first.
      masks: all of them, in the order of the answer.
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
    masks: list[AnswerMask] = dataclasses.field(default_factory=list, repr=False)
    token_probability: float = 0.0
    confidence: float = 0.0

    @property
    def score(self) -> float:
        """`token_probability` times `confidence`, in 0..1; not calibrated: for sorting answers of one model."""
        return self.token_probability * self.confidence

    @property
    def rle(self) -> dict[str, Any]:
        """The (first) mask as COCO's compressed run lengths, {"size": [H, W], "counts": str}."""
        return rle.encode(self.mask)

    @property
    def message(self) -> dict[str, str]:
        """The answer as a message of a conversation, for `Segmenter.chat`: {"role": "assistant", "content": text}."""
        return {"role": "assistant", "content": self.text}

    def overlay(self, image: Any) -> np.ndarray:
        """The image (as for `Segmenter.encode_image`) with the masks drawn on it, uint8[H, W, 3].

        Raises:
          ValueError: no image, or one of another size.
        """
        image = images.as_array(image)
        for mask in [one.mask for one in self.masks] or [self.mask]:
            image = report.overlay(image, mask)
        return image

    def to_json(self) -> dict[str, Any]:
        """All of it but arrays, JSON-compatible; "masks" has codes, length, confidence and rle of each."""
        names = ("text", "token_ids", "codes", "length", "num_masks", "score", "token_probability", "confidence",
                 "seconds", "iou")  # fmt: skip
        each = [{name: getattr(one, name) for name in ("codes", "length", "confidence", "rle")} for one in self.masks]
        return {name: getattr(self, name) for name in names} | {"masks": each}


@dataclasses.dataclass(frozen=True)
class Answers:
    """Answers to G questions about each of B images, on the host, as the model gave them.

    tokenizer: of the text. prefix: ids of a forced start. ids, mask, logps [B, G, T]: the tokens, which of them are
    there, their log-probabilities. codes int32[B, G, L], length and num_masks int32[B, G]: of the first mask, and their
    number. probability float32[B, G, h, w]: its pixels, at the size of the de-tokenizer. further: by (b, g), codes and
    probability float32[h, w] of the masks after the first, where there are any.
    """

    tokenizer: words.TextTokenizer = dataclasses.field(repr=False)
    prefix: list[int]
    ids: np.ndarray
    mask: np.ndarray
    logps: np.ndarray
    codes: np.ndarray
    length: np.ndarray
    num_masks: np.ndarray
    probability: np.ndarray = dataclasses.field(repr=False)
    further: dict[tuple[int, int], list[tuple[list[int], np.ndarray]]] = dataclasses.field(repr=False)

    def at(self, row: int, column: int, size: tuple[int, int]) -> Prediction:
        """The answer to a question about image `row`, which has (height, width) `size`; its seconds are 0."""
        at = (row, column)
        chosen, length = self.ids[at][self.mask[at]].tolist(), int(self.length[at])
        pixels = metrics.resize_probability(self.probability[at], *size)
        codes = self.codes[at][:length].tolist()
        masks = [answer_mask(pixels, codes)] if length else []
        masks += [
            answer_mask(metrics.resize_probability(small, *size), found) for found, small in self.further.get(at, ())
        ]
        return Prediction(
            mask=masks[0].mask if masks else np.zeros(size, bool),
            probability=pixels,
            text=words.answer_text(self.tokenizer, self.prefix + chosen),
            token_ids=self.prefix + chosen,
            codes=codes,
            length=length,
            num_masks=int(self.num_masks[at]),
            masks=masks,
            seconds=0.0,
            token_probability=float(np.exp(self.logps[at][self.mask[at]]).mean()),
            confidence=masks[0].confidence if masks else 0.0,
        )


def answer_mask(probability: np.ndarray, codes: list[int]) -> AnswerMask:
    """The mask of its pixels' probability float32[H, W]."""
    mask = probability > 0.5
    return AnswerMask(mask, codes, float(probability[mask].mean()) if mask.any() else 0.0)
