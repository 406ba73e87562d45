"""An answer as the model writes it: its tokens, and the mask of the codes so far."""

from collections.abc import Iterator, Sequence
import dataclasses

import numpy as np

from alto_jax import metrics
from alto_jax.inference.decoding import Decoding
from alto_jax.inference.prediction import Prediction
from alto_jax.inference.tokenizer import TokenizerModel
from alto_jax.mllm import text as words


@dataclasses.dataclass(frozen=True)
class StreamEvent:
    """A token of an answer; the last event has the answer instead.

    Attributes:
      token_id: of the token; None with the answer.
      text: the token, a special one written out.
      code: of the mask, if the token is one.
      mask_index: which mask of the answer, from 0 on, the code belongs to.
      length: codes of that mask so far.
      mask: bool[H, W] of the image's size, that these codes stand for; None without a code.
      change: share of the image's pixels, in 0..1, that the code changed.
      answer: the whole answer, as `segment` gives it.
    """

    token_id: int | None = None
    text: str = ""
    code: int | None = None
    mask_index: int | None = None
    length: int = 0
    mask: np.ndarray | None = dataclasses.field(default=None, repr=False)
    change: float = 0.0
    answer: Prediction | None = None


@dataclasses.dataclass(frozen=True)
class Grown:
    """A code of a mask: which mask of the answer, from 0 on; its codes so far; probability float32[h, w] of them."""

    mask_index: int
    codes: list[int]
    probability: np.ndarray


class Growth:
    """Follows the tokens of one answer, and decodes its masks as they grow."""

    def __init__(self, model: TokenizerModel, special: words.SpecialIds, features: object, *, inside: bool):
        """Takes what the mask tokenizer sees of the image, and whether the answer begins inside of a mask."""
        self._model, self._special, self._features = model, special, features
        self._index = 0 if inside else -1
        self._codes: list[int] | None = [] if inside else None

    def take(self, token: int) -> Grown | None:
        """The next token; what it adds to a mask, if it is a code."""
        special, code = self._special, token - self._special.code_0
        if token == special.mask_start:
            self._index, self._codes = self._index + 1, []
        elif self._codes is not None and 0 <= code < special.num_codes:
            self._codes.append(code)
            if len(self._codes) <= self._model.cfg.tokenizer.num_latent_tokens:
                [probability] = self._model.drawn([self._codes], self._features)
                return Grown(self._index, [*self._codes], probability)
        else:
            self._codes = None
        return None


def follow(decoding: Decoding, growths: Sequence[Growth | None]) -> Iterator[tuple[int, int, Grown | None]]:
    """Yields (row, token, what it adds to a mask) of the answers to one question an image, as they are written.

    Args:
      decoding: of as many images; it goes on a token at a time, and is done in the end.
      growths: of each; None: tokens of that answer are passed over.
    """
    seen = 0
    while True:
        for at in range(seen, decoding.num_tokens):
            for row, growth in enumerate(growths):
                if growth is not None and decoding.mask[row, 0, at]:
                    token = int(decoding.ids[row, 0, at])
                    yield row, token, growth.take(token)
        seen = decoding.num_tokens
        if decoding.is_done:
            return
        decoding.advance()


def events(
    decoding: Decoding, growth: Growth, tokenizer: words.TextTokenizer, size: tuple[int, int]
) -> Iterator[StreamEvent]:
    """Yields the events of one answer but the last, in (height, width) `size` of the image."""
    before, index = np.zeros(size, bool), -1
    for _, token, grown in follow(decoding, [growth]):
        text = tokenizer.decode([token])
        if grown is None:
            yield StreamEvent(token, text)
            continue
        if grown.mask_index != index:
            before, index = np.zeros(size, bool), grown.mask_index
        mask = metrics.resize_probability(grown.probability, *size) > 0.5
        change = float((mask != before).mean())
        yield StreamEvent(token, text, grown.codes[-1], index, len(grown.codes), mask, change)
        before = mask
