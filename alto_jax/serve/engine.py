"""The model behind the service: a few batch sizes and question lengths, whose programs are compiled in a warm-up."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
import dataclasses
import threading

import jax
import numpy as np

from alto_jax.config import ConfigError
from alto_jax.inference.decoding import EncodedImage, ImageInputs
from alto_jax.inference.prediction import Answers
from alto_jax.inference.segmenter import Segmenter
from alto_jax.inference.settings import Settings
from alto_jax.inference.streaming import Grown, Growth, follow


@dataclasses.dataclass(frozen=True)
class Question:
    """One mask that is asked for: the prompt's ids behind the image, the bucket they are padded to, how to answer."""

    ids: list[int]
    width: int
    settings: Settings


def batch_size(waiting: int, sizes: Sequence[int]) -> int:
    """The batch size to run for so many: the next larger one if more than half of it is filled, else one that is full.

    Args:
      waiting: at least 1.
      sizes: ascending, from 1.
    """
    larger = next((size for size in sizes if size >= waiting), sizes[-1])
    return larger if 2 * waiting > larger else max(size for size in sizes if size <= waiting)


class Engine:
    """Runs batches of fixed sizes; after the warm-up any thread may use it."""

    def __init__(self, model: Segmenter, sizes: Sequence[int], widths: Sequence[int], cached_images: int = 64):
        """Takes batch sizes (ascending, from 1), lengths that questions are padded to (ascending), and
        how many images stay encoded.

        Raises:
          ConfigError: a length that no question fits into.
        """
        self.model, self.sizes, self.widths = model, tuple(sizes), tuple(widths)
        self._seen: OrderedDict[str, EncodedImage] = OrderedDict()
        self._cached_images = cached_images
        self._lock = threading.Lock()  # of the images that stay encoded
        # Note: the same for all, since the answer's start is forced for all.
        self.beginning, shortest = model.prompt(*self._any_question())
        if self.widths[0] < len(shortest):
            told = f"expected at least {len(shortest)}, the tokens of the shortest question"
            raise ConfigError(f"--question_buckets={','.join(map(str, self.widths))}: {told}")

    def _any_question(self) -> tuple[str, Settings]:
        settings = Settings.of(self.model.cfg.tokenizer.num_latent_tokens, None, {})
        return settings.question("a"), settings

    def warm_up(self, tell: Callable[[str], None]) -> None:
        """Compiles every program that a request may need, each by running it."""
        question, settings = self._any_question()
        _, ids = self.model.prompt(question, settings)
        blank = self.model.inputs(np.zeros((64, 64, 3), np.uint8))
        for size in self.sizes:
            encoded = self.encode([(f"warm-up {index}", blank) for index in range(size)])
            for width in self.widths:
                self.answer(encoded, [Question(ids, width, settings)] * size)
                tell(f"compiled: batches of {size}, questions of {width} tokens")
        self.model.drawn([[0]], encoded[0].features)  # Note: a stream's masks are decoded one at a time.
        self._seen.clear()

    def encode(self, images: Sequence[tuple[str, ImageInputs]]) -> list[EncodedImage]:
        """What the model sees of images, each with a key that is its own; those seen lately are not computed again."""
        with self._lock:
            found = {key: self._seen[key] for key, _ in images if key in self._seen}
        new = {key: inputs for key, inputs in images if key not in found}
        while new:
            size = batch_size(len(new), self.sizes)
            part = list(new)[:size]
            encoded = self.model.encode_inputs([new.pop(key) for key in part], size)
            found |= dict(zip(part, encoded, strict=True))
        with self._lock:
            for key in dict.fromkeys(key for key, _ in images):
                self._seen[key] = found[key]
                self._seen.move_to_end(key)
            while len(self._seen) > self._cached_images:
                self._seen.popitem(last=False)
        return [found[key] for key, _ in images]

    def has_seen(self, key: str) -> bool:
        """Whether an image is still encoded."""
        return key in self._seen

    def answer(
        self,
        encoded: Sequence[EncodedImage],
        questions: Sequence[Question],
        listeners: Sequence[Callable[[Grown], None] | None] = (),
    ) -> Answers:
        """Answers a question about each image; at most as many as the largest batch holds.

        If there are `listeners`, one or None of each question, they hear of each code as soon as the model has it.
        """
        rows = next(size for size in self.sizes if size >= len(questions))
        width = max(question.width for question in questions)
        asked = [[question.ids] for question in questions]
        settings = [question.settings for question in questions]
        decoding = self.model.asked(encoded, self.beginning, asked, settings, rows, width)
        special = self.model.text.ids
        growths = [
            None if tell is None else Growth(self.model, special, image.features, inside=True)
            for image, tell in zip(encoded, listeners)
        ]
        if any(growths):
            for row, _, grown in follow(decoding, growths):
                tell = listeners[row]
                if grown is not None and tell is not None:
                    tell(grown)
        return decoding.answers()

    @property
    def device(self) -> str:
        """The kind of device that computes."""
        return str(jax.devices()[0].device_kind)
