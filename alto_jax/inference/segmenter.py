"""A whole ALToLLM from a checkpoint: requests about images → masks.

model = alto_jax.load("alto-tiny")
image = model.encode_image("photo.jpg")                       # seen once
one = model.segment(image, "the red apple")                   # one.mask is bool, at the image's size
many = model.segment(image, ["the red apple", "the cup"])     # answered together
box = model.segment(image, boxes=[(12, 30, 55, 80)])          # what is in a box
for event in model.stream(image, "the red apple"): ...        # event.mask grows; the last one has the answer
said = model.chat([{"role": "user", "content": "What is it?", "image": image}])    # said.text, said.masks
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import functools
import os
import time
from typing import Any

import jax
import numpy as np

from alto_jax import metrics
from alto_jax.checkpoint import loading
from alto_jax.config import Quantize
from alto_jax.data import images, transforms
from alto_jax.inference.answering import Reply, reply
from alto_jax.inference.chat import read_messages
from alto_jax.inference.decoding import AT_ONCE, Decoding, EncodedImage, ImageInputs, Prepared
from alto_jax.inference.prediction import Answers, Prediction
from alto_jax.inference.settings import Settings, box_phrase
from alto_jax.inference.streaming import Growth, StreamEvent, events
from alto_jax.inference.tokenizer import TokenizerModel, as_mask, is_whole
from alto_jax.layers import apply_module, told_precision
from alto_jax.mllm import text as words
from alto_jax.mllm.alto_llm import ALToLLM
from alto_jax.parallel.at_once import batches_at_once, in_order

_ENCODED_ON_A_CPU = 4


class Segmenter(TokenizerModel):
    """Answers requests about images; masks of one's own go through `encode` and `decode`."""

    def __init__(self, cfg: Any, params: dict, directory: str, text: Any, data: dict[str, Any]):
        """Takes what a checkpoint holds; data: its "system" message, and "box_step" of the boxes that it was taught."""
        super().__init__(cfg, params, directory)
        self.text, self.system, self._box_step = text, data["system"], data.get("box_step", 1)

    def encode_image(self, image: Any) -> EncodedImage:
        """An image, seen once for many calls of `segment`.

        Args:
          image: uint8[H, W, 3] RGB, a file or a Pillow image; these two are turned upright, as a viewer shows them.

        Raises:
          ValueError: it is no such image.
        """
        return self.encoded(self.seen_or_array(image))

    def segment(
        self,
        image: Any,
        text: str | Sequence[str] = "",
        *,
        boxes: Sequence[Sequence[float]] | None = None,
        prompt: str | None = None,
        target: np.ndarray | None = None,
        **options: Any,
    ) -> Any:
        """Segments what `text` names, or what is in boxes.

        Args:
          image: as for `encode_image`, or what that gave.
          text: the object ("the red apple"); several, in a list, are answered together, each with a mask of its own.
          boxes: (x1, y1, x2, y2) in pixels, instead of `text`: all that is meant, as one mask.
          prompt: the whole question instead of the built-in wording.
          target: bool[H, W], or non-negative integers, the true mask of a single request, for `iou`.
          **options: those of `segment_batch`.

        Returns:
          Prediction; for several texts a list of them, in their order.

        Raises:
          ValueError: no object named, an image, box or target that does not fit, or a length out of range.
        """
        began = time.monotonic()
        image = self.seen_or_array(image)
        size = image.size if isinstance(image, EncodedImage) else image.shape[:2]
        several = not isinstance(text, str)
        questions, settings = self._questions(size, text, boxes, prompt, options)
        if several and (target is not None or not questions):
            raise ValueError("text: expected at least one request, and no target beside several")
        if target is not None and np.shape(target) != tuple(size):
            raise ValueError(f"target: expected the image's size {tuple(size)}, got {np.shape(target)}")
        truth = None if target is None else as_mask(target, "target")
        found: dict[int, Prediction] = {}
        groups: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        for index, question in enumerate(questions):
            beginning, rest = self.prompt(question, settings)
            groups.setdefault(beginning, []).append((index, rest))
        encoded = self.encoded(image)
        for beginning, asked in groups.items():
            for part in range(0, len(asked), AT_ONCE[-1]):
                rows = asked[part : part + AT_ONCE[-1]]
                answers = self.ask([encoded], beginning, [[ids for _, ids in rows]], [settings])
                found |= {index: answers.at(0, column, size) for column, (index, _) in enumerate(rows)}
        seconds = round((time.monotonic() - began) / len(found), 4)
        done = [dataclasses.replace(found[index], seconds=seconds) for index in range(len(found))]
        if truth is not None:
            done[0] = dataclasses.replace(done[0], iou=_iou(done[0].mask, truth))
        return done if several else done[0]

    def stream(
        self,
        image: Any,
        text: str = "",
        *,
        boxes: Sequence[Sequence[float]] | None = None,
        prompt: str | None = None,
        **options: Any,
    ) -> Iterator[StreamEvent]:
        """`segment` of one request, told while the model writes: each token as it comes, with the mask so far.

        Args:
          image, text, boxes, prompt: as of `segment`.
          **options: likewise.

        Returns:
          An iterator of StreamEvent: one for each token that the model chooses, then one with the whole answer.

        Raises:
          ValueError: as for `segment`, before anything is computed.
        """
        began = time.monotonic()
        if not isinstance(text, str):
            raise ValueError(f"text: expected one request, got {text!r:.80}")
        image = self.seen_or_array(image)
        size = image.size if isinstance(image, EncodedImage) else image.shape[:2]
        [question], settings = self._questions(size, text, boxes, prompt, options)
        beginning, rest = self.prompt(question, settings)

        def run() -> Iterator[StreamEvent]:
            encoded = self.encoded(image)
            decoding = self.asked([encoded], beginning, [[rest]], [settings])
            growth = Growth(self, self.text.ids, encoded.features, inside=settings.forced)
            yield from events(decoding, growth, self.text, encoded.size)
            answer = decoding.answers().at(0, 0, encoded.size)
            seconds = round(time.monotonic() - began, 4)
            yield StreamEvent(answer=dataclasses.replace(answer, seconds=seconds))

        return run()

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        length: str | int = "adaptive",
        max_new_tokens: int | None = None,
        min_length: int = 1,
        max_length: int | None = None,
        end_bias: float = 0.0,
    ) -> Prediction:
        """The answer to the last message of a conversation, in text, which may hold masks.

        Args:
          messages: {"role": "system" | "user" | "assistant", "content": text, "image": …} each, users and assistants
            in turn, the last one a user's. One of the users' messages may have an image (as for `encode_image`, or
            what that gave), which stands at `<image>` in its content, or in front. A first message of the role system
            replaces the model's own. Earlier answers are `Prediction.message`, their masks as mask tokens.
          length, min_length, max_length, end_bias: of each mask, as for `segment_batch`.
          max_new_tokens: longest answer; None: enough for two masks and 64 tokens of text.

        Returns:
          Prediction; `text` and `masks` are the answer. Its masks have the image's size; without an image that of the
          mask tokenizer.

        Raises:
          ValueError: a message that does not fit (the error names it), or an option out of range.
        """
        began = time.monotonic()
        turns, image = read_messages(self.text, messages)
        longest = 2 * self.cfg.tokenizer.num_latent_tokens + 64 if max_new_tokens is None else max_new_tokens
        options = {"length": length, "max_new_tokens": longest, "min_length": min_length, "max_length": max_length,
                   "end_bias": end_bias}  # fmt: skip
        settings = Settings.of(self.cfg.tokenizer.num_latent_tokens, turns[-1]["value"], options)
        count = 0 if image is None else self.cfg.num_image_tokens
        ids, _ = words.render_conversation(self.text, turns, count, self.system)
        encoded = self.no_image() if image is None else self.encoded(self.seen_or_array(image))
        beginning, rest = self._cut(ids)
        answer = self.ask([encoded], beginning, [[rest]], [settings]).at(0, 0, encoded.size)
        return dataclasses.replace(answer, seconds=round(time.monotonic() - began, 4))

    def segment_batch(
        self,
        pictures: Sequence[Any],
        texts: Sequence[str],
        *,
        batch_size: int = 8,
        length: str | int = "adaptive",
        max_new_tokens: int | None = None,
        min_length: int = 1,
        max_length: int | None = None,
        end_bias: float = 0.0,
        forced_prefix: bool | None = None,
    ) -> Iterator[Prediction]:
        """Segments one object in each of many images, in batches.

        Args:
          pictures: as for `segment`; a file is opened when its batch comes.
          texts: the object of each.
          batch_size: images of a program; on a CPU four batches are computed at once (see parallel/at_once.py).
          length: "adaptive", "full" (all mask tokens), or an exact number of mask tokens.
          max_new_tokens: longest answer; None: enough for one mask and a sentence.
          min_length, max_length: limits of an adaptive number of mask tokens (None: all of them).
          end_bias: added to the logit of the mask's end; positive gives shorter, cheaper masks, negative longer ones.
          forced_prefix: the answer begins with a mask ("The mask appears at") and ends with that mask's end, which
            saves about ten tokens; but it cannot be "No", nor hold several masks. None: for texts and boxes, not for a
            `prompt`.

        Yields:
          Prediction of each, in order.

        Raises:
          ValueError: as for `segment`.
        """
        if isinstance(texts, str) or len(pictures) != len(texts):
            got = repr(texts) if isinstance(texts, str) else len(texts)
            raise ValueError(f"texts: expected {len(pictures)}, one of each image, got {got}")
        if not is_whole(batch_size, 1, 1 << 16):
            raise ValueError(f"batch_size: expected a whole number of at least 1, got {batch_size!r}")
        options = {"length": length, "max_new_tokens": max_new_tokens, "min_length": min_length,
                   "max_length": max_length, "end_bias": end_bias, "forced_prefix": forced_prefix}  # fmt: skip
        settings = Settings.of(self.cfg.tokenizer.num_latent_tokens, None, options)
        questions = [settings.question(text) for text in texts]
        for question in questions:
            self.prompt(question, settings)  # Note: what is wrong is told before anything is computed.

        def answer(start: int) -> list[Prediction]:
            rows = range(start, min(start + batch_size, len(questions)))
            seen = [self.seen_or_array(pictures[row]) for row in rows]
            seen = [one if isinstance(one, EncodedImage) else self.inputs(one) for one in seen]
            prepared = [self.prepare(image, questions[row], settings) for image, row in zip(seen, rows)]
            return self.answer_batch(prepared, settings, batch_size)

        calls = (functools.partial(answer, start) for start in range(0, len(questions), batch_size))
        for answers in in_order(calls, batches_at_once()):
            yield from answers

    def prepare(self, inputs: ImageInputs | EncodedImage, question: str, settings: Settings) -> Prepared:
        """A question about an image, for `answer_batch`; ValueError as `prompt`."""
        return Prepared(inputs, *self.prompt(question, settings))

    def answer_batch(self, prepared: Sequence[Prepared], settings: Settings, batch_size: int) -> list[Prediction]:
        """The answers to `batch_size` questions at most, which were prepared with the settings and begin alike.

        An image that several have (the same `inputs`) is encoded once.
        """
        began = time.monotonic()
        given = {id(one.inputs): one.inputs for one in prepared}
        seen = {key: image for key, image in given.items() if isinstance(image, EncodedImage)}
        if new := {key: image for key, image in given.items() if not isinstance(image, EncodedImage)}:
            rows = next(n for n in sorted({1, -(-batch_size // 4), batch_size}) if n >= len(new))
            seen |= dict(zip(new, self.encode_inputs(list(new.values()), rows)))
        encoded = [seen[id(one.inputs)] for one in prepared]
        asked = [[one.ids] for one in prepared]
        answers = self.ask(encoded, prepared[0].beginning, asked, [settings] * len(asked), batch_size)
        done = [answers.at(row, 0, image.size) for row, image in enumerate(encoded)]
        seconds = round((time.monotonic() - began) / len(done), 4)
        return [dataclasses.replace(answer, seconds=seconds) for answer in done]

    def decode(self, codes: list[int], size: tuple[int, int], image: Any = None) -> np.ndarray:
        """`TokenizerModel.decode`, whose image may be an EncodedImage, too."""
        if not isinstance(image, EncodedImage):
            return super().decode(codes, size, image)
        self.check_codes(codes, size)
        return metrics.resize_probability(self.drawn([codes], image.features)[0], *size) > 0.5

    def answer(
        self,
        pictures: Any,
        question: str | Sequence[Mapping[str, str]],
        *,
        max_tiles: int = 1,
        max_new_tokens: int = 128,
    ) -> Reply:
        """Answers a question in words.

        Args:
          pictures: an image as for `encode_image`, a list of them, or () for a question about none; no EncodedImage,
            since it holds no tiles.
          question: about them, or turns {"from": "human" | "gpt", "value"} that end with one. Each `<image>` in it is
            the next picture; without any, the pictures come first.
          max_tiles: up to so many tiles of all pictures together and a thumbnail of each, as InternVL 2.5 sees them (it
            was trained with up to 12); questions with `<ref>` or `<box>`, or after a mask, have one tile a picture.
          max_new_tokens: longest answer.

        Raises:
          ValueError: no such image, a number that is not at least 1, or a question that does not fit.
        """
        several = list(pictures) if isinstance(pictures, Sequence) and not isinstance(pictures, str) else [pictures]
        return reply(self.cfg, self.params, self.text, self.system, several, question, max_tiles=max_tiles,
                     max_new_tokens=max_new_tokens)  # fmt: skip

    def growth(self, image: Any, prediction: Prediction) -> np.ndarray:
        """A prediction's mask after 1, 2, … of its codes, bool[length, H, W]; image: as for `segment`."""
        encoded, codes = self.encoded(self.seen_or_array(image)), prediction.codes
        small = self.drawn([codes[:count] for count in range(1, len(codes) + 1)], encoded.features) if codes else ()
        grown = [metrics.resize_probability(p, *encoded.size) > 0.5 for p in small]
        return np.stack(grown) if grown else np.zeros((0, *encoded.size), bool)

    def seen_or_array(self, image: Any) -> Any:
        """An image as for `encode_image` as uint8[H, W, 3]; an EncodedImage as it is. ValueError: it is no image."""
        return image if isinstance(image, EncodedImage) else images.as_array(image)

    def encoded(self, image: Any) -> EncodedImage:
        """What the model sees of an image uint8[H, W, 3]; an EncodedImage as it is."""
        return image if isinstance(image, EncodedImage) else self.encode_inputs([self.inputs(image)])[0]

    def no_image(self) -> EncodedImage:
        """What stands for an image in a conversation that has none; masks have the mask tokenizer's size."""
        side, width = self.cfg.tokenizer.mask_size, self.cfg.need_language_model().embed_dim
        return EncodedImage((side, side), jax.numpy.zeros((self.cfg.num_image_tokens, width)), None)

    def _questions(
        self, size: tuple[int, int], text: str | Sequence[str], boxes: Any, prompt: str | None, options: dict[str, Any]
    ) -> tuple[list[str], Settings]:
        """The questions of a call of `segment` about an image of (height, width), and how they are answered."""
        if sum(given is not None for given in (boxes, prompt, text or None)) > 1:
            raise ValueError("text, boxes, prompt: expected one of them")
        settings = Settings.of(self.cfg.tokenizer.num_latent_tokens, prompt, options)
        if boxes is not None:
            return [settings.question(self.box_phrase(boxes, size))], settings
        if not isinstance(text, Iterable):
            raise ValueError(f"text: expected an object or a list of them, got {text!r:.80}")
        requests = [text] if isinstance(text, str) else list(text)
        return [settings.question(request) if prompt is None else prompt for request in requests], settings

    def box_phrase(self, boxes: Sequence[Sequence[float]], size: tuple[int, int]) -> str:
        """Boxes (x1, y1, x2, y2) in pixels of an image of (height, width), as the model reads them.

        Raises:
          ValueError: none, or one that is not inside of the image.
        """
        return box_phrase(boxes, size, self._box_step)

    def prompt(self, question: str, settings: Settings) -> tuple[tuple[int, ...], list[int]]:
        """The ids of a prompt, up to the end of its image and from there.

        Raises:
          ValueError: a special token is written out in the question.
        """
        begin = words.FORCED_ANSWER_PREFIX if settings.forced else ""
        count = self.cfg.num_image_tokens
        ids = words.render_prompt(self.text, question, count, system=self.system, answer_prefix=begin)
        return self._cut(ids)

    def _cut(self, ids: list[int]) -> tuple[tuple[int, ...], list[int]]:
        """A prompt's ids up to the end of its image (without one: its first token), and from there."""
        image = {self.text.ids.img_context, self.text.ids.img_end}
        cut = max((index for index, token in enumerate(ids) if token in image), default=0) + 1
        return tuple(ids[:cut]), ids[cut:]

    def inputs(self, image: np.ndarray) -> ImageInputs:
        """An image uint8[H, W, 3] at the model's sizes."""
        sizes = self.cfg.need_vision().image_size, self.cfg.tokenizer.image_size
        made = {side: transforms.squash(image, side) for side in dict.fromkeys(sizes)}
        return ImageInputs(image.shape[:2], *(made[side] for side in sizes))

    def encode_inputs(self, given: Sequence[ImageInputs], rows: int = 1) -> list[EncodedImage]:
        """What the model sees of images, `rows` at most; fewer are filled up to as many, so that one program serves.

        On a CPU four at a time are encoded: what a layer makes of more of them does not stay in the processor's caches.
        """
        most = _ENCODED_ON_A_CPU if jax.default_backend() == "cpu" else rows
        parts = (given[start : start + most] for start in range(0, len(given), most))
        return [one for part in parts for one in self._encode_inputs(part, min(rows, most))]

    def _encode_inputs(self, given: Sequence[ImageInputs], rows: int) -> list[EncodedImage]:
        """`encode_inputs` by one program."""
        filled = [*given, *[given[-1]] * (rows - len(given))]
        image, pixels = np.stack([one.image for one in filled]), np.stack([one.pixels for one in filled])
        cfg = self.cfg

        def run(params: dict, image: jax.Array, pixels: jax.Array) -> tuple[jax.Array, jax.Array | None]:
            with told_precision(cfg.matmul_precision):
                tokens = apply_module(ALToLLM(cfg), params, image, method="image_tokens")
                return tokens, apply_module(ALToLLM(cfg), params, image, pixels, method="image_features")

        tokens, features = self.compiled("encode", lambda: run)(self.params, image, pixels)
        at = lambda index: None if features is None else features[index]
        return [EncodedImage(one.size, tokens[i], at(i)) for i, one in enumerate(given)]

    def asked(self, encoded: Sequence[EncodedImage], *prompts: Any) -> Decoding:
        """Questions about images that begin to be answered; `prompts`: the further arguments of `Decoding`."""
        return Decoding(self, self.text, encoded, *prompts)

    def ask(self, encoded: Sequence[EncodedImage], *prompts: Any) -> Answers:
        """Answers of `asked`."""
        return self.asked(encoded, *prompts).answers()


def _iou(mask: np.ndarray, target: np.ndarray) -> float:
    """Of bool[H, W]; 1.0 where both are empty."""
    union = np.sum(mask | target)
    return float(np.sum(mask & target) / union) if union else 1.0


def load(directory: str | os.PathLike, step: int | None = None, quantize: Quantize = "") -> TokenizerModel:
    """Opens a run's directory: a `Segmenter` (stages 2 and 3), or a `TokenizerModel` (stages 1 and 1.5).

    Args:
      directory: of the run.
      step: of its checkpoints; None: the newest readable one.
      quantize: the language model's kernels in 8 bits, "int8" or "fp8" (docs/running.md); "": as they are.

    Raises:
      FileNotFoundError: no complete checkpoint there.
      ConfigError: no such step, another `quantize`, or no language model for it.
      ValueError: the checkpoint lacks parameters of its own model.
    """
    loaded = loading.load_model(directory, step=step, for_inference=True, quantize=quantize)
    given = loaded.cfg, loaded.params, str(directory)
    whole = loaded.text is not None
    model = Segmenter(*given, loaded.text, loaded.meta["data"]) if whole else TokenizerModel(*given)
    model.identity = loaded.identity
    return model
