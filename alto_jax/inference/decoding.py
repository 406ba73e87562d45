"""Questions about images while they are answered: all at once, or a token at a time.

`Segmenter.segment`, `Segmenter.stream`, `Segmenter.chat` and the service are this one piece, and so the same programs:
one that reads the questions, one that goes on for as many tokens as it is told, and one that reads the answers.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
import numpy as np

from alto_jax.inference.prediction import Answers
from alto_jax.inference.settings import Settings
from alto_jax.inference.tokenizer import TokenizerModel
from alto_jax.mllm import alto_llm
from alto_jax.mllm import text as words
from alto_jax.mllm.generate import bucket_length

AT_ONCE = (1, 2, 4, 6, 8, 10, 12, 16, 24, 32)  # requests about an image; few numbers are ever compiled


@dataclasses.dataclass(frozen=True)
class ImageInputs:
    """What of an image goes into the model: its size (height, width), image uint8[V, V, 3], pixels uint8[S, S, 3]."""

    size: tuple[int, int]
    image: np.ndarray = dataclasses.field(repr=False)
    pixels: np.ndarray = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class EncodedImage:
    """An image that the model has seen: size (height, width), image_tokens float[I, D], features float[g, g, F]."""

    size: tuple[int, int]
    image_tokens: jax.Array = dataclasses.field(repr=False)
    features: jax.Array | None = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A request ready for the model: the image at its sizes, or seen already, and the prompt's ids as
    `Segmenter.prompt` gives them."""

    inputs: ImageInputs | EncodedImage
    beginning: tuple[int, ...]
    ids: list[int]


class Decoding:
    """As many questions about each image, whose prompts begin alike, with the first token of each answer.

    Attributes:
      ids: int32[B, G, T], the answers so far. mask: bool[B, G, T], which tokens are there.
      num_tokens: of the longest answer so far, T at most. is_done: whether all answers are whole.
    """

    ids: np.ndarray
    mask: np.ndarray
    num_tokens: int
    is_done: bool

    def __init__(
        self,
        model: TokenizerModel,
        tokenizer: words.TextTokenizer,
        encoded: Sequence[EncodedImage],
        beginning: tuple[int, ...],
        asked: Sequence[Sequence[list[int]]],
        settings: Sequence[Settings],
        rows: int = 1,
        width: int = 0,
    ):
        """Reads the questions.

        Args:
          model: with the parameters of a whole ALToLLM.
          tokenizer: of the text.
          encoded: B images, `rows` at most; fewer are filled up to as many, so that one program serves.
          beginning, asked: of each prompt, as `Segmenter.prompt` gives them; asked has G of each image.
          settings: of each image; alike in what is compiled in (`GenerateConfig.static`) and in what is forced.
          width: the questions are padded to so many tokens; 0: to the bucket of the longest one.
        """
        self._model, self._tokenizer, self._encoded, self._count = model, tokenizer, encoded, len(asked[0])
        self._prefix = tokenizer.encode(words.FORCED_ANSWER_PREFIX) if settings[0].forced else []
        at_once = next(n for n in AT_ONCE if n >= self._count)
        filled = [[*ids, *[ids[-1]] * (at_once - self._count)] for ids in asked]
        filled += [filled[-1]] * (rows - len(filled))
        seen = [*encoded, *[encoded[-1]] * (rows - len(encoded))]
        length = width or bucket_length(max(len(ids) for row in filled for ids in row))
        pad = lambda ids: [tokenizer.ids.pad] * (length - len(ids)) + ids
        questions = (
            np.array([[pad(ids) for ids in row] for row in filled], np.int32),
            np.array([[np.arange(length) >= length - len(ids) for ids in row] for row in filled]),
        )
        prompt = np.tile(np.array(beginning, np.int32), (rows, 1))
        each = [s.generate.controls() for s in [*settings, *[settings[-1]] * (rows - len(settings))]]
        controls = jax.tree.map(lambda *values: np.stack(values), *each)  # of each image
        self._tokens = jax.numpy.stack([e.image_tokens for e in seen])
        features = [e.features for e in seen if e.features is not None]
        self._features = jax.numpy.stack(features) if features else None
        self._last_ids = questions[0]
        cfg, special, static = model.cfg, tokenizer.ids, settings[0].generate.static()
        self._static, self._special, self.max_new_tokens = static, special, static.max_new_tokens

        def begin(params: dict, prompts: tuple, questions: tuple, tokens: jax.Array, key: Any, controls: Any) -> Any:
            return alto_llm.begin(cfg, params, prompts, questions, tokens, static, special, key, controls)

        arrays = (prompt, np.ones(prompt.shape, bool)), questions, self._tokens, jax.random.key(0), controls
        self._given, self._state = model.compiled(("begin", static), lambda: begin)(model.params, *arrays)
        self._look()

    def _look(self) -> None:
        """Reads from the device what there is of the answers."""
        state = self._state
        ids, mask, done, step = jax.device_get((state.ids, state.mask, state.done, state.step))
        at = lambda a: a.reshape(len(self._tokens), -1, *a.shape[1:])[: len(self._encoded), : self._count]
        self.ids, self.mask, self.num_tokens = at(ids), at(mask), int(step)
        self.is_done = bool(done.all()) or self.num_tokens >= self.max_new_tokens

    def advance(self, count: int = 1) -> None:
        """Goes on for so many tokens of each answer that is not whole yet."""
        cfg, special, static = self._model.cfg, self._special, self._static

        def advance(params: dict, given: Any, state: Any, until: Any) -> Any:
            return alto_llm.advance(cfg, params, given, state, static, special, until)

        call = self._model.compiled(("advance", static), lambda: advance, donated="state")
        until = np.int32(min(self.num_tokens + count, self.max_new_tokens))
        self._state = call(self._model.params, self._given, self._state, until)
        self._look()

    def answers(self) -> Answers:
        """The whole answers."""
        if not self.is_done:
            self.advance(self.max_new_tokens)
        cfg, special, tokenizer = self._model.cfg, self._special, self._tokenizer
        # Note: no mask takes less than a start, a code and an end; a forced one is the answer's only one.
        most = 1 if self._static.stop_at_mask_end else max(1, self.max_new_tokens // 3)

        def finish(params: dict, generated: Any, last_ids: Any, features: Any, tokens: Any) -> Any:
            found = alto_llm.finish(cfg, params, generated, last_ids, features, tokens, special, most)
            return found.generated, found.masks, jax.nn.sigmoid(found.mask_logits)

        call = self._model.compiled(("finish", self._static), lambda: finish)
        arrays = self._state.generated, self._last_ids, self._features, self._tokens
        generated, masks, probability = jax.device_get(call(self._model.params, *arrays))
        further = {}
        for row, column in np.argwhere(masks.num_masks[: len(self._encoded), : self._count] > 1).tolist():
            rest = range(1, min(masks.num_masks[row, column], most))
            codes = [masks.codes[row, column, m, : masks.length[row, column, m]].tolist() for m in rest]
            further[row, column] = list(zip(codes, self._model.drawn(codes, self._encoded[row].features), strict=True))
        return Answers(tokenizer, self._prefix, generated.ids, generated.mask, generated.per_token_logps,
                       masks.codes[..., 0, :], masks.length[..., 0], masks.num_masks, probability, further)  # fmt: skip
