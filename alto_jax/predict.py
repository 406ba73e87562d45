"""Prediction: image + phrase → mask, as a library call and as a command.

model = alto_jax.load("runs/quickstart/stage3")
result = model.segment(image, "the red apple")      # result.mask is bool, at the image's size

python -m alto_jax.predict --checkpoint DIR --image FILE --text "the red apple" --out mask.png
"""

import argparse
import dataclasses
import json
import math
import numbers
import os
import pathlib
import re
import time
from typing import Any

import numpy as np

from alto_jax import cli, metrics
from alto_jax.config import ConfigError

_MAX_SIDE = 1 << 14  # of a mask that codes are decoded to


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What `Segmenter.segment` gives.

    mask: bool[H, W] at the image's size (all False if the answer holds no mask). probability: float32[H, W].
    text: the answer, a forced prefix too, special tokens written out. token_ids: its ids. codes: the mask's codes.
    length: their number, 0 if the answer holds no well-formed mask. num_masks: how many the answer holds; mask, codes
    and length are those of the first. seconds: wall time. iou: with the target, if given.
    """

    mask: np.ndarray
    probability: np.ndarray
    text: str
    token_ids: list[int]
    codes: list[int]
    length: int
    seconds: float
    iou: float | None = None
    num_masks: int = 0

    def to_json(self) -> dict[str, Any]:
        """All but the arrays, JSON-compatible."""
        names = ("text", "token_ids", "codes", "length", "num_masks", "seconds", "iou")
        return {name: getattr(self, name) for name in names}


class TokenizerModel:
    """A mask tokenizer from a checkpoint: `encode` and `decode`."""

    def __init__(self, cfg: Any, params: dict, directory: str):
        self.cfg, self.params, self.directory = cfg, params, directory
        self._functions: dict = {}

    def _method(self, name: str) -> Any:
        """A method of the tokenizer as a function of (parameters, *arguments), compiled once per shape."""
        import jax  # late: keeps the start fast

        from alto_jax import layers
        from alto_jax.tokenizer.alto import ALTo

        if name not in self._functions:
            model, precision = ALTo(self.cfg.tokenizer), self.cfg.matmul_precision

            @jax.jit
            def run(params: dict, *args: Any) -> Any:
                with layers.told_precision(precision):
                    return model.apply({"params": params}, *args, method=name)

            self._functions[name] = run
        return self._functions[name]

    def encode(self, mask: np.ndarray, length: str | int = "adaptive") -> list[int]:
        """Codes of a mask.

        Args:
          mask: bool or uint8[H, W], not zero in the mask; any size.
          length: "adaptive" (the predictor's), "full", or a number of leading codes.

        Raises:
          ValueError: an empty mask, or a length out of range.
        """

        from alto_jax.data import transforms  # late: keeps the start fast

        tokenizer = self.cfg.tokenizer
        mask = np.asarray(mask)
        if mask.ndim != 2:
            raise ValueError(f"mask: expected an array [H, W], got shape {mask.shape}")
        if not mask.any():
            raise ValueError("mask: it is empty, there is nothing to encode")
        count = _token_count(length, tokenizer.num_latent_tokens)
        small = transforms.soft_mask((mask > 0).astype(np.uint8) * 255, tokenizer.mask_size)
        codes, predicted = self._method("tokenize")(self.params["tokenizer"], small[None])
        return np.asarray(codes)[0, : int(predicted[0]) if count is None else count].tolist()

    def decode(self, codes: list[int], size: tuple[int, int], image: Any = None) -> np.ndarray:
        """The mask bool[H, W] of `size` that codes stand for.

        Args:
          codes: 1..L codes.
          size: (height, width) of the result.
          image: as in `Segmenter.segment`; its features sharpen the mask; None: none.

        Raises:
          ValueError: too many or too few codes, or one out of range.
        """
        import jax  # late: keeps the start fast

        from alto_jax.data import images, transforms

        tokenizer = self.cfg.tokenizer
        if not 1 <= len(codes) <= tokenizer.num_latent_tokens:
            raise ValueError(f"codes: expected 1..{tokenizer.num_latent_tokens} codes, got {len(codes)}")
        bad = [c for c in codes if not _is_whole(c, 0, tokenizer.codebook_size - 1)]
        if bad:
            raise ValueError(f"codes: expected values in 0..{tokenizer.codebook_size - 1}, got {bad[0]!r}")
        if len(size) != 2 or not all(_is_whole(side, 1, _MAX_SIDE) for side in size):
            raise ValueError(f"size: expected height and width in 1..{_MAX_SIDE}, got {size!r}")
        params = self.params["tokenizer"]
        features = None
        if image is not None and tokenizer.sam is not None:
            pixels = transforms.squash(images.as_array(image), tokenizer.image_size)[None]
            features = self._method("image_features")(params, pixels)
        padded = np.zeros((1, tokenizer.num_latent_tokens), np.int32)
        padded[0, : len(codes)] = codes
        logits = self._method("decode_codes")(params, padded, np.array([len(codes)], np.int32), features)[0]
        probability = metrics.resize_probability(np.asarray(jax.nn.sigmoid(logits)), *size)
        return probability > 0.5


class Segmenter(TokenizerModel):
    """A whole ALToLLM from a checkpoint: `segment` answers a request about an image."""

    def __init__(self, cfg: Any, params: dict, directory: str, text: Any, system: str | None):
        super().__init__(cfg, params, directory)
        self.text, self.system = text, system

    def segment(
        self,
        image: Any,
        text: str = "",
        *,
        length: str | int = "adaptive",
        prompt: str | None = None,
        target: np.ndarray | None = None,
        max_new_tokens: int | None = None,
        min_length: int = 1,
        max_length: int | None = None,
        end_bias: float = 0.0,
        forced_prefix: bool | None = None,
    ) -> Prediction:
        """Segments what `text` names.

        Args:
          image: uint8[H, W, 3] RGB, a file or a Pillow image; these two are turned upright, as a viewer shows them.
          text: the object ("the red apple"); not used if `prompt` is given.
          length: "adaptive", "full" (all mask tokens), or an exact number of mask tokens.
          prompt: the whole question instead of the built-in wording.
          target: bool or uint8[H, W], the true mask, for `iou`.
          max_new_tokens: longest answer; None: enough for one mask and a sentence.
          min_length, max_length: limits of an adaptive number of mask tokens (None: all of them).
          end_bias: added to the logit of the mask's end; positive gives shorter, cheaper masks, negative longer ones.
          forced_prefix: the answer begins with a mask ("The mask appears at") and ends with that mask's end, which
            saves about ten tokens; but it cannot be "No", nor hold several masks. None: for `text`, not for `prompt`.

        Raises:
          ValueError: no object named, an image or target that does not fit, or a length out of range.
        """
        import jax  # late: keeps the start fast

        from alto_jax.batch import PromptBatch
        from alto_jax.data import images, transforms
        from alto_jax.mllm import text as words
        from alto_jax.mllm.generate import GenerateConfig, bucket_length

        began = time.monotonic()
        num_tokens = self.cfg.tokenizer.num_latent_tokens
        count = _token_count(length, num_tokens)
        limits = {"max_new_tokens": (max_new_tokens, 1 << 16), "min_length": (min_length, num_tokens),
                  "max_length": (max_length, num_tokens)}  # fmt: skip
        for name, (value, most) in limits.items():
            if value is not None and not _is_whole(value, 1, most):
                raise ValueError(f"{name}: expected a whole number in 1..{most}, got {value!r}")
        if not math.isfinite(end_bias):
            raise ValueError(f"end_bias: expected a finite number, got {end_bias!r}")
        by_name = prompt is None
        if prompt is None:
            if not any(c.isalnum() for c in text):
                raise ValueError(f"text: expected the name or description of an object, got {text!r}")
            prompt = words.question(text, adaptive=length != "full")
        elif not prompt.strip():
            raise ValueError(f"prompt: expected a question, got {prompt!r}")
        image = images.as_array(image)
        if target is not None and np.shape(target) != image.shape[:2]:
            raise ValueError(f"target: expected the image's size {image.shape[:2]}, got {np.shape(target)}")

        forced = by_name if forced_prefix is None else forced_prefix
        begin = words.FORCED_ANSWER_PREFIX if forced else ""
        ids = words.render_prompt(self.text, prompt, self.cfg.num_image_tokens, system=self.system, answer_prefix=begin)
        padding = bucket_length(len(ids)) - len(ids)  # Note: few lengths are ever compiled.
        size = self.cfg.tokenizer.mask_size
        batch = PromptBatch(
            image=transforms.squash(image, self.cfg.vision.image_size)[None],
            pixel_image=transforms.squash(image, self.cfg.tokenizer.image_size)[None],
            prompt_ids=np.array([self.text.ids.pad] * padding + ids, np.int32)[None],
            prompt_mask=(np.arange(padding + len(ids)) >= padding)[None],
            mask=np.zeros((1, size, size), np.float32),
        )
        config = GenerateConfig(
            max_new_tokens=num_tokens + 32 if max_new_tokens is None else int(max_new_tokens),
            grammar=True,
            min_length=int(min_length),
            max_length=num_tokens if max_length is None else int(max_length),
            forced_length=count,
            end_logit_bias=end_bias,
            stop_at_mask_end=forced,
        )
        found = self._compiled(config.static())(self.params, batch, jax.random.key(0), config.controls())
        tokens = np.asarray(found.generated.ids)[0][np.asarray(found.generated.mask)[0]].tolist()
        given = self.text.encode(begin)
        kept = int(found.length[0])
        probability = np.asarray(jax.nn.sigmoid(found.mask_logits))[0]
        probability = metrics.resize_probability(probability, *image.shape[:2])
        mask = (probability > 0.5) & (kept > 0)
        iou = None
        if target is not None:
            wanted = np.asarray(target) > 0
            union = np.sum(mask | wanted)
            iou = float(np.sum(mask & wanted) / union) if union else 1.0
        return Prediction(
            mask=mask,
            probability=probability,
            text=words.answer_text(self.text, given + tokens),
            token_ids=given + tokens,
            codes=np.asarray(found.codes)[0, :kept].tolist(),
            length=kept,
            num_masks=int(found.masks.num_masks[0]),
            seconds=round(time.monotonic() - began, 4),
            iou=iou,
        )

    def _compiled(self, config: Any) -> Any:
        """`segment` for a generation configuration, compiled once per shape; the controls are an argument."""
        import jax  # late: keeps the start fast

        from alto_jax.mllm.alto_llm import segment

        if config not in self._functions:
            cfg, special = self.cfg, self.text.ids
            self._functions[config] = jax.jit(
                lambda p, b, key, controls: segment(cfg, p, b, config, special, key, controls=controls)
            )
        return self._functions[config]


def _is_whole(value: Any, low: int, high: int) -> bool:
    """Whether a value is an integer of any type (NumPy's too, but no bool) in low..high."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and low <= int(value) <= high


def _token_count(length: Any, num_tokens: int) -> int | None:
    """Number of mask tokens of "full" or an integer of any type; None for "adaptive"."""
    if isinstance(length, str) and length in ("adaptive", "full"):
        return None if length == "adaptive" else num_tokens
    if _is_whole(length, 1, num_tokens):
        return int(length)
    raise ValueError(f"length: expected 'adaptive', 'full' or a whole number in 1..{num_tokens}, got {length!r}")


def parse_length(text: str) -> str | int:
    """The value of a flag --length; its upper limit is the model's.

    Raises:
      ConfigError: neither "adaptive" nor "full" nor a whole number of at least 1.
    """
    if text in ("adaptive", "full"):
        return text
    if re.fullmatch("[0-9]{1,9}", text) and int(text) >= 1:
        return int(text)
    raise ConfigError(f"--length={text}: expected adaptive, full or a whole number of at least 1")


def describe(checkpoint: str, step: int | None, length: str | int) -> dict[str, Any]:
    """What a checkpoint says of itself, before its parameters are read.

    Raises:
      FileNotFoundError: no complete checkpoint there.
      ConfigError: no such step, or a length that the model does not have.
    """
    from alto_jax.checkpoint import runs  # late: keeps the start fast

    runs.find_run(checkpoint, made_by=runs.MADE_BY)
    meta = runs.load_meta(checkpoint, step)
    most = meta["model"]["tokenizer"]["num_latent_tokens"]
    if isinstance(length, int) and length > most:
        raise ConfigError(f"--length={length}: the model of {checkpoint} has {most} mask tokens at most")
    return meta


def load(directory: str | os.PathLike, step: int | None = None) -> TokenizerModel:
    """Opens a run's directory: a `Segmenter` (stages 2 and 3), or a `TokenizerModel` (stages 1 and 1.5).

    Args:
      directory: of the run.
      step: of its checkpoints; None: the newest readable one.

    Raises:
      FileNotFoundError: no complete checkpoint there.
      ValueError: the checkpoint lacks parameters of its own model.
    """
    from alto_jax.checkpoint import loading  # late: keeps the start fast

    loaded = loading.load_model(directory, step=step, for_inference=True)
    if loaded.text is None:
        return TokenizerModel(loaded.cfg, loaded.params, str(directory))
    return Segmenter(loaded.cfg, loaded.params, str(directory), loaded.text, loaded.meta["data"]["system"])


def _check_request(options: argparse.Namespace, meta: dict[str, Any]) -> None:
    """Raises ConfigError for a request that the model could not answer, before its parameters are read."""
    if meta["stage"] in ("stage1", "stage1_5"):
        raise ConfigError(f"--checkpoint={options.checkpoint}: a mask tokenizer alone; predict needs stage 2 or 3")
    if meta["stage"] == "stage0":
        raise ConfigError(f"--checkpoint={options.checkpoint}: stage 0 answers in text; predict needs stage 2 or 3")
    most = meta["model"]["tokenizer"]["num_latent_tokens"]
    if options.max_length is not None and not 1 <= options.max_length <= most:
        raise ConfigError(f"--max_length={options.max_length}: expected 1..{most}, the mask tokens of the model")
    if not math.isfinite(options.end_bias):
        raise ConfigError(f"--end_bias={options.end_bias}: expected a finite number")
    if options.prompt is not None and not options.prompt.strip():
        raise ConfigError(f"--prompt={options.prompt!r}: expected a question")
    if options.prompt is None and not any(c.isalnum() for c in options.text):
        raise ConfigError(f"--text={options.text!r}: expected the name or description of an object")


def main() -> int:
    """The command; see the module's docstring."""
    from alto_jax.data.masks import AUTO, RULES, parse_rule  # late: keeps the start fast
    from alto_jax.data.reading import Reading

    parser = argparse.ArgumentParser(prog="python -m alto_jax.predict", description="Segment what a phrase names.")
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a run's directory (stage 2 or 3)")
    parser.add_argument("--step", type=int, metavar="N", help="of the run's checkpoints (default: the newest)")
    parser.add_argument("--image", required=True, metavar="FILE")
    parser.add_argument("--text", default="", help='the object, such as "the red apple"')
    parser.add_argument("--length", default="adaptive", help="adaptive, full, or a number of mask tokens")
    parser.add_argument("--max_length", type=int, metavar="N", help="at most so many mask tokens (adaptive)")
    parser.add_argument("--end_bias", type=float, default=0.0, metavar="X", help="> 0: fewer mask tokens; < 0: more")
    parser.add_argument(
        "--forced_prefix",
        action=argparse.BooleanOptionalAction,
        help="the answer is a mask and nothing else: faster, but never No (default: for --text, not for --prompt)",
    )
    parser.add_argument("--prompt", metavar="RAW", help="the whole question, instead of --text")
    parser.add_argument("--target", metavar="FILE", help="the true mask, to report the IoU")
    parser.add_argument("--exif", choices=("upright", "stored"), default="upright",
                        help="upright: turn the image as its EXIF orientation says (--target is of the turned image)",
    )  # fmt: skip
    parser.add_argument("--mask_rule", default=AUTO, metavar="RULE", help=f"of --target: {RULES} (docs/data.md)")
    parser.add_argument("--out", metavar="FILE", help="the mask as a PNG, 0 and 255, at the image's size")
    parser.add_argument("--overlay", metavar="FILE", help="the image with the mask drawn on it")
    parser.add_argument("--json", metavar="FILE", help="text, token_ids, codes, length, num_masks, iou, seconds")
    options = parser.parse_args()
    cli.check_paths({f"--{name}": getattr(options, name) for name in ("image", "target", "out", "overlay", "json")})
    outputs = {"--out": (options.out, cli.MASK_SUFFIXES), "--overlay": (options.overlay, cli.PICTURE_SUFFIXES),
               "--json": (options.json, (".json",))}  # fmt: skip
    cli.check_outputs(outputs, {"--image": options.image, "--target": options.target})
    length = parse_length(options.length)
    _check_request(options, describe(options.checkpoint, options.step, length))
    from PIL import Image  # late: keeps the start fast

    parse_rule(options.mask_rule, "--mask_rule")
    # Note: what people draw on their own photo they draw on what they see.
    reading = Reading("masks_upright" if options.exif == "upright" else "stored", options.mask_rule)
    photo = reading.photo(options.image)
    image, target = photo.image, photo.mask(options.target) if options.target else None
    model = load(options.checkpoint, options.step)
    assert isinstance(model, Segmenter)
    result = model.segment(
        image, options.text, length=length, prompt=options.prompt, target=target, max_length=options.max_length,
        end_bias=options.end_bias, forced_prefix=options.forced_prefix,
    )  # fmt: skip
    if options.out:
        Image.fromarray(result.mask.astype(np.uint8) * 255).save(options.out)
    if options.overlay:
        from alto_jax.report import save_overlay  # late: keeps the start fast

        save_overlay(options.overlay, image, result.mask)
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(result.to_json(), indent=2) + "\n")
    note = "" if result.length else "  (the answer holds no mask)"
    note = f"  (the first of {result.num_masks} masks)" if result.num_masks > 1 else note
    print(f"{result.text}\nmask tokens: {result.length}{note}  pixels: {int(result.mask.sum())}  {result.seconds:.2f} s"
          + (f"  IoU {result.iou:.3f}" if result.iou is not None else ""))  # fmt: skip
    return 0


if __name__ == "__main__":
    cli.run(main)
