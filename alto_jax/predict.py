"""Prediction as a command: image + phrase → mask, image + question → words. In Python `alto_jax.load`, see inference/.

python -m alto_jax.predict --checkpoint DIR --image FILE --text "the red apple" --out mask.png
python -m alto_jax.predict --checkpoint DIR --image FILE --question "What is on the sign?" --max_tiles 12
"""

import argparse
import json
import math
import pathlib
import re
from typing import Any

import numpy as np

from alto_jax import cli
from alto_jax.config import ConfigError


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
    if options.question is not None:
        return
    if options.prompt is not None and not options.prompt.strip():
        raise ConfigError(f"--prompt={options.prompt!r}: expected a question")
    if options.prompt is None and not any(c.isalnum() for c in options.text):
        raise ConfigError(f"--text={options.text!r}: expected the name or description of an object")


def _check_question(options: argparse.Namespace) -> None:
    """Raises ConfigError if a question to be answered in words stands beside what asks for a mask, or tiles without."""
    if options.max_tiles < 1:
        raise ConfigError(f"--max_tiles={options.max_tiles}: expected at least 1")
    if options.question is None:
        if options.max_tiles > 1:
            raise ConfigError(f"--max_tiles={options.max_tiles}: expected 1 without --question; masks have one tile")
        return
    if not options.question.strip():
        raise ConfigError(f"--question={options.question!r}: expected some text")
    of_masks = ("text", "prompt", "target", "out", "overlay", "length", "max_length", "end_bias", "forced_prefix")
    for name in of_masks:
        value = getattr(options, name)
        if value not in ("", None, 0.0, "adaptive"):
            raise ConfigError(f"--{name}={value}: does not go with --question, whose answer has no mask")


def _answer(model: Any, image: np.ndarray, options: argparse.Namespace) -> int:
    """Prints the answer to --question, and writes --json."""
    reply = model.answer(image, options.question, max_tiles=options.max_tiles)
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(reply.to_json(), indent=2) + "\n")
    print(f"{reply.text}\ntiles: {sum(reply.num_tiles)}  {reply.seconds:.2f} s")
    return 0


def main() -> int:
    """The command; see the module's docstring."""
    from alto_jax.data.masks import AUTO, RULES, parse_rule  # late: keeps the start fast
    from alto_jax.data.reading import Reading

    parser = argparse.ArgumentParser(prog="python -m alto_jax.predict", description="Segment what a phrase names.")
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a run's directory (stage 2 or 3)")
    parser.add_argument("--step", type=int, metavar="N", help="of the run's checkpoints (default: the newest)")
    cli.add_quantize(parser)
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
    parser.add_argument("--question", metavar="TEXT", help="answered in words, without a mask, instead of --text")
    parser.add_argument("--max_tiles", type=int, default=1, metavar="N",
                        help="with --question: the image in up to so many tiles (InternVL 2.5: 12)")  # fmt: skip
    parser.add_argument("--target", metavar="FILE", help="the true mask, to report the IoU")
    parser.add_argument("--exif", choices=("upright", "stored"), default="upright",
                        help="upright: turn the image as its EXIF orientation says (--target is of the turned image)",
    )  # fmt: skip
    parser.add_argument("--mask_rule", default=AUTO, metavar="RULE", help=f"of --target: {RULES} (docs/data.md)")
    parser.add_argument("--out", metavar="FILE", help="the mask as a PNG, 0 and 255, at the image's size; "
                        "further ones of the answer beside it, as NAME_2.png …")  # fmt: skip

    parser.add_argument("--overlay", metavar="FILE", help="the image with the mask drawn on it")
    parser.add_argument(
        "--json", metavar="FILE", help="text, token_ids, codes, length, masks with run lengths, scores, iou …"
    )
    options = parser.parse_args()
    cli.check_paths({f"--{name}": getattr(options, name) for name in ("image", "target", "out", "overlay", "json")})
    outputs = {"--out": (options.out, cli.MASK_SUFFIXES), "--overlay": (options.overlay, cli.PICTURE_SUFFIXES),
               "--json": (options.json, (".json",))}  # fmt: skip
    cli.check_outputs(outputs, {"--image": options.image, "--target": options.target})
    _check_question(options)
    length = parse_length(options.length)
    _check_request(options, describe(options.checkpoint, options.step, length))
    from PIL import Image  # late: keeps the start fast

    parse_rule(options.mask_rule, "--mask_rule")
    # Note: what people draw on their own photo they draw on what they see.
    reading = Reading("masks_upright" if options.exif == "upright" else "stored", options.mask_rule)
    photo = reading.photo(options.image)
    image, target = photo.image, photo.mask(options.target) if options.target else None
    from alto_jax.inference.segmenter import Segmenter, load  # late: --help needs no JAX

    model = load(options.checkpoint, options.step, options.quantize)
    assert isinstance(model, Segmenter)
    if options.question is not None:
        return _answer(model, image, options)
    result = model.segment(
        image, options.text, length=length, prompt=options.prompt, target=target, max_length=options.max_length,
        end_bias=options.end_bias, forced_prefix=options.forced_prefix,
    )  # fmt: skip
    if options.out:
        for number, mask in enumerate([one.mask for one in result.masks] or [result.mask], 1):
            path = pathlib.Path(options.out)
            path = path if number == 1 else path.with_name(f"{path.stem}_{number}{path.suffix}")
            Image.fromarray(mask.astype(np.uint8) * 255).save(path)
    if options.overlay:
        Image.fromarray(result.overlay(image)).save(options.overlay)
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(result.to_json(), indent=2) + "\n")
    note = "" if result.length else "  (the answer holds no mask)"
    note = f"  (of the first of {result.num_masks} masks)" if result.num_masks > 1 else note
    print(f"{result.text}\nmask tokens: {result.length}{note}  pixels: {int(result.mask.sum())}  {result.seconds:.2f} s"
          + (f"  IoU {result.iou:.3f}" if result.iou is not None else ""))  # fmt: skip
    return 0


def command() -> None:
    """The installed command: `main`, with one line for bad input."""
    cli.run(main)


if __name__ == "__main__":
    command()
