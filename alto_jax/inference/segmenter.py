"""A whole ALToLLM from a checkpoint: requests about images → masks.

model = alto_jax.load("alto-tiny")
image = model.encode_image("photo.jpg")                       # seen once
one = model.segment(image, "the red apple")                   # one.mask is bool, at the image's size
many = model.segment(image, ["the red apple", "the cup"])     # answered together
box = model.segment(image, boxes=[(12, 30, 55, 80)])          # what is in a box
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import math
import os
import time
from typing import Any

import jax
import numpy as np

from alto_jax import metrics
from alto_jax.batch import PromptBatch
from alto_jax.checkpoint import loading
from alto_jax.config import Quantize
from alto_jax.data import images, transforms
from alto_jax.inference.prediction import Prediction
from alto_jax.inference.tokenizer import TokenizerModel, is_whole, token_count
from alto_jax.layers import apply_module, told_precision
from alto_jax.mllm import boxes as box_text
from alto_jax.mllm import text as words
from alto_jax.mllm.alto_llm import ALToLLM, segment
from alto_jax.mllm.generate import GenerateConfig, bucket_length

_AT_ONCE = (1, 2, 4, 6, 8, 10, 12, 16, 24, 32)  # requests about an image; few numbers are ever compiled


@dataclasses.dataclass(frozen=True)
class EncodedImage:
    """An image that the model has seen: size (height, width), image_tokens float[I, D], features float[g, g, F]."""

    size: tuple[int, int]
    image_tokens: jax.Array = dataclasses.field(repr=False)
    features: jax.Array | None = dataclasses.field(repr=False)


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
        return self._encode([images.as_array(image)])[0]

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
          target: bool or uint8[H, W], the true mask of a single request, for `iou`.
          **options: those of `segment_batch`.

        Returns:
          Prediction; for several texts a list of them, in their order.

        Raises:
          ValueError: no object named, an image, box or target that does not fit, or a length out of range.
        """
        began = time.monotonic()
        if not isinstance(image, EncodedImage):
            image = images.as_array(image)
        size = image.size if isinstance(image, EncodedImage) else image.shape[:2]
        if sum(given is not None for given in (boxes, prompt, text or None)) > 1:
            raise ValueError("text, boxes, prompt: expected one of them")
        several = not isinstance(text, str)
        if boxes is not None:
            requests: list[str] = [self._box_phrase(boxes, size)]
        else:
            requests = list(text) if several else [str(text)]
        if several and (target is not None or not requests):
            raise ValueError("text: expected at least one request, and no target beside several")
        if target is not None and np.shape(target) != tuple(size):
            raise ValueError(f"target: expected the image's size {tuple(size)}, got {np.shape(target)}")
        settings = _Settings.of(self.cfg.tokenizer.num_latent_tokens, prompt, options)
        questions = [settings.question(request) if prompt is None else prompt for request in requests]
        found: dict[int, Prediction] = {}
        groups: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        for index, question in enumerate(questions):
            beginning, rest = self._prompt(question, settings)
            groups.setdefault(beginning, []).append((index, rest))
        encoded = image if isinstance(image, EncodedImage) else self._encode([image])[0]
        for beginning, asked in groups.items():
            for part in range(0, len(asked), _AT_ONCE[-1]):
                rows = asked[part : part + _AT_ONCE[-1]]
                answers = self._answer([encoded], beginning, [[ids for _, ids in rows]], settings)
                found |= {index: answer for (index, _), answer in zip(rows, answers[0], strict=True)}
        seconds = round((time.monotonic() - began) / len(found), 4)
        done = [dataclasses.replace(found[index], seconds=seconds) for index in range(len(found))]
        if target is not None:
            done[0] = dataclasses.replace(done[0], iou=_iou(done[0].mask, np.asarray(target) > 0))
        return done if several else done[0]

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
          pictures: as for `encode_image`; a file is opened when its batch comes.
          texts: the object of each.
          batch_size: images at once.
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
        if len(pictures) != len(texts):
            raise ValueError(f"texts: expected {len(pictures)}, one of each image, got {len(texts)}")
        if not is_whole(batch_size, 1, 1 << 16):
            raise ValueError(f"batch_size: expected a whole number of at least 1, got {batch_size!r}")
        options = {"length": length, "max_new_tokens": max_new_tokens, "min_length": min_length,
                   "max_length": max_length, "end_bias": end_bias, "forced_prefix": forced_prefix}  # fmt: skip
        settings = _Settings.of(self.cfg.tokenizer.num_latent_tokens, None, options)
        prompts = [self._prompt(settings.question(text), settings) for text in texts]
        for start in range(0, len(prompts), batch_size):
            began = time.monotonic()
            rows = prompts[start : start + batch_size]
            encoded = self._encode([images.as_array(p) for p in pictures[start : start + batch_size]], batch_size)
            answers = self._answer(encoded, rows[0][0], [[ids] for _, ids in rows], settings, batch_size)
            seconds = round((time.monotonic() - began) / len(rows), 4)
            yield from (dataclasses.replace(answer, seconds=seconds) for [answer] in answers)

    def growth(self, image: Any, prediction: Prediction) -> np.ndarray:
        """A prediction's mask after 1, 2, … of its codes, bool[length, H, W]; image: as for `segment`."""
        encoded = image if isinstance(image, EncodedImage) else self.encode_image(image)
        size = self.cfg.tokenizer
        if not prediction.length:
            return np.zeros((0, *encoded.size), bool)
        # Note: one program for all lengths.
        codes = np.zeros((size.num_latent_tokens, size.num_latent_tokens), np.int32)
        codes[:, : prediction.length] = prediction.codes
        count = np.arange(1, size.num_latent_tokens + 1, dtype=np.int32)
        features = None
        if encoded.features is not None:
            features = np.repeat(np.asarray(encoded.features)[None], len(codes), axis=0)
        logits = self.method("decode_codes")(self.params["tokenizer"], codes, count, features)
        probability = np.asarray(jax.nn.sigmoid(logits))[: prediction.length]
        return np.stack([metrics.resize_probability(p, *encoded.size) > 0.5 for p in probability])

    def _box_phrase(self, boxes: Sequence[Sequence[float]], size: tuple[int, int]) -> str:
        """Boxes (x1, y1, x2, y2) in pixels, as the model reads them."""
        height, width = size
        for box in boxes:
            x1, y1, x2, y2 = box if len(box) == 4 else (0, 0, 0, 0)
            if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
                raise ValueError(f"boxes: expected x1 < x2 <= {width} and y1 < y2 <= {height} in pixels, got {box!r}")
        corners = [(x1, y1, x2 - x1, y2 - y1) for x1, y1, x2, y2 in boxes]
        return box_text.format_boxes(corners, size, self._box_step)

    def _prompt(self, question: str, settings: "_Settings") -> tuple[tuple[int, ...], list[int]]:
        """The ids of a prompt, up to the end of its image and from there."""
        begin = words.FORCED_ANSWER_PREFIX if settings.forced else ""
        count = self.cfg.num_image_tokens
        ids = words.render_prompt(self.text, question, count, system=self.system, answer_prefix=begin)
        image = {self.text.ids.img_context, self.text.ids.img_end}
        cut = max(index for index, token in enumerate(ids) if token in image) + 1
        return tuple(ids[:cut]), ids[cut:]

    def _encode(self, pictures: Sequence[np.ndarray], rows: int = 1) -> list[EncodedImage]:
        """What the model sees of images uint8[H, W, 3], `rows` at most; fewer are filled up to as many."""
        filled = [*pictures, *[pictures[-1]] * (rows - len(pictures))]
        size = self.cfg.need_vision().image_size, self.cfg.tokenizer.image_size
        image, pixels = (np.stack([transforms.squash(p, s) for p in filled]) for s in size)
        cfg = self.cfg

        def run(params: dict, image: jax.Array, pixels: jax.Array) -> tuple[jax.Array, jax.Array | None]:
            with told_precision(cfg.matmul_precision):
                tokens = apply_module(ALToLLM(cfg), params, image, method="image_tokens")
                return tokens, apply_module(ALToLLM(cfg), params, image, pixels, method="image_features")

        tokens, features = self._compiled("encode", lambda: run)(self.params, image, pixels)
        at = lambda index: None if features is None else features[index]
        return [EncodedImage(p.shape[:2], tokens[i], at(i)) for i, p in enumerate(pictures)]

    def _answer(
        self,
        encoded: Sequence[EncodedImage],
        beginning: tuple[int, ...],
        asked: Sequence[Sequence[list[int]]],
        settings: "_Settings",
        rows: int = 1,
    ) -> list[list[Prediction]]:
        """Answers as many questions about each image, whose prompts begin alike; `rows` images at once."""
        count = len(asked[0])
        at_once = next(n for n in _AT_ONCE if n >= count)
        filled = [[*ids, *[ids[-1]] * (at_once - count)] for ids in asked]
        filled += [filled[-1]] * (rows - len(filled))
        seen = [*encoded, *[encoded[-1]] * (rows - len(encoded))]
        length = bucket_length(max(len(ids) for row in filled for ids in row))
        pad = lambda ids: [self.text.ids.pad] * (length - len(ids)) + ids
        questions = (
            np.array([[pad(ids) for ids in row] for row in filled], np.int32),
            np.array([[np.arange(length) >= length - len(ids) for ids in row] for row in filled]),
        )
        empty = np.zeros((rows, 0, 0, 3), np.uint8)  # Note: what is seen of the images is given.
        stacked = lambda parts: None if parts[0] is None else jax.numpy.stack(parts)
        prompt = np.tile(np.array(beginning, np.int32), (rows, 1))
        batch = PromptBatch(empty, empty, prompt, np.ones(prompt.shape, bool), np.zeros((rows, 0, 0), np.float32),
                            features=stacked([e.features for e in seen]))  # fmt: skip
        cfg, config, special = self.cfg, settings.generate, self.text.ids

        def run(
            params: dict, batch: PromptBatch, tokens: jax.Array, questions: tuple, key: jax.Array, controls: Any
        ) -> Any:
            found = segment(cfg, params, batch, config.static(), special, key, controls=controls, image_tokens=tokens,
                            questions=questions)  # fmt: skip
            return found.generated, found.codes, found.length, found.masks.num_masks, jax.nn.sigmoid(found.mask_logits)

        call = self._compiled(config.static(), lambda: run)
        tokens = stacked([e.image_tokens for e in seen])
        given = self.params, batch, tokens, questions, jax.random.key(0), config.controls()
        generated, codes, lengths, num_masks, probability = jax.device_get(call(*given))
        prefix = self.text.encode(words.FORCED_ANSWER_PREFIX) if settings.forced else []
        result = []
        for row, image in enumerate(encoded):
            answers = []
            for column in range(count):
                at = (row, column)
                chosen = generated.ids[at][generated.mask[at]].tolist()
                pixels = metrics.resize_probability(probability[at], *image.size)
                mask = (pixels > 0.5) & bool(lengths[at])
                answers.append(
                    Prediction(
                        mask=mask,
                        probability=pixels,
                        text=words.answer_text(self.text, prefix + chosen),
                        token_ids=prefix + chosen,
                        codes=codes[at][: lengths[at]].tolist(),
                        length=int(lengths[at]),
                        num_masks=int(num_masks[at]),
                        seconds=0.0,
                        token_probability=float(np.exp(generated.per_token_logps[at][generated.mask[at]]).mean()),
                        confidence=float(pixels[mask].mean()) if mask.any() else 0.0,
                    )
                )
            result.append(answers)
        return result

    def _compiled(self, name: Any, make: Callable[[], Callable]) -> Any:
        """The function `make()`, compiled once a shape; the first of each name is kept."""
        if name not in self._functions:
            self._functions[name] = jax.jit(make())
        return self._functions[name]


@dataclasses.dataclass(frozen=True)
class _Settings:
    """How a request is answered, whether the answer's start is forced, and whether all mask tokens are asked for."""

    generate: GenerateConfig
    forced: bool
    fixed: bool

    @classmethod
    def of(cls, num_tokens: int, prompt: str | None, options: dict[str, Any]) -> "_Settings":
        """The options of `Segmenter.segment_batch`, checked."""
        default = {"length": "adaptive", "max_new_tokens": None, "min_length": 1, "max_length": None, "end_bias": 0.0,
                   "forced_prefix": None}  # fmt: skip
        if unknown := options.keys() - default.keys():
            raise TypeError(f"segment() got an unexpected keyword argument {min(unknown)!r}")
        given = default | options
        if prompt is not None and not prompt.strip():
            raise ValueError(f"prompt: expected a question, got {prompt!r}")
        exact = token_count(given["length"], num_tokens)
        limits = {"max_new_tokens": 1 << 16, "min_length": num_tokens, "max_length": num_tokens}
        for name, most in limits.items():
            if given[name] is not None and not is_whole(given[name], 1, most):
                raise ValueError(f"{name}: expected a whole number in 1..{most}, got {given[name]!r}")
        if not math.isfinite(given["end_bias"]):
            raise ValueError(f"end_bias: expected a finite number, got {given['end_bias']!r}")
        forced = prompt is None if given["forced_prefix"] is None else bool(given["forced_prefix"])
        longest = num_tokens + (1 if forced else 32)
        generate = GenerateConfig(
            max_new_tokens=longest if given["max_new_tokens"] is None else int(given["max_new_tokens"]),
            grammar=True,
            min_length=int(given["min_length"]),
            max_length=num_tokens if given["max_length"] is None else int(given["max_length"]),
            forced_length=exact,
            end_logit_bias=given["end_bias"],
            stop_at_mask_end=forced,
        )
        return cls(generate, forced, given["length"] == "full")

    def question(self, phrase: str) -> str:
        """The built-in wording of a request.

        Raises:
          ValueError: no object named.
        """
        if not any(c.isalnum() for c in phrase):
            raise ValueError(f"text: expected the name or description of an object, got {phrase!r}")
        return words.question(phrase, adaptive=not self.fixed)


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
    if loaded.text is None:
        return TokenizerModel(loaded.cfg, loaded.params, str(directory))
    return Segmenter(loaded.cfg, loaded.params, str(directory), loaded.text, loaded.meta["data"])
