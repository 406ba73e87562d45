"""Prediction as a command: image + phrase → mask, image + question → words. In Python `alto_jax.load`, see inference/.

python -m alto_jax.predict --checkpoint DIR --image FILE --text "the red apple" --out mask.png
python -m alto_jax.predict --checkpoint DIR --image FILE --question "What is on the sign?" --max_tiles 12
python -m alto_jax.predict --checkpoint DIR --images DIR --text "the red apple" --out DIR
"""

import argparse
import json
import math
import pathlib
import re
from typing import Any

import numpy as np

from alto_jax import cli
from alto_jax.config import ConfigError, require

_EXAMPLES = """
One image; what is in two boxes; an answer that may also be "No":
  python -m alto_jax.predict --checkpoint alto-tiny --image photo.jpg --text "the red apple" --out mask.png
  python -m alto_jax.predict --checkpoint alto-tiny --image photo.jpg --box 12,30,55,80 --box 60,10,90,40 --json a.json
  python -m alto_jax.predict --checkpoint alto-tiny --image photo.jpg --text "the cup" --no-forced_prefix --json a.json

All images of a folder, or each line of a JSONL file, such as {"image": "a.jpg", "text": "the cup", "id": "a/cup"} or
{"image": "a.jpg", "boxes": [[12, 30, 55, 80]]}; the same command goes on where a killed one was:
  python -m alto_jax.predict --checkpoint alto-tiny --images photos --text "the red apple" --out answers --save_masks
  python -m alto_jax.predict --checkpoint alto-tiny --requests requests.jsonl --out answers --save_overlays

Exit codes: 0 all answered; 1 some requests left out, named in OUT/bad.jsonl; 2 bad input; 130 interrupted.
"""


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

    runs.find_run(checkpoint, made_by=runs.MADE_BY, step=step)
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
    given = [name for name in ("text", "box", "prompt") if getattr(options, name)]
    if len(given) > 1:
        raise ConfigError(f"--{given[0]}, --{given[1]}: expected one of them")
    if (options.text or not (given or options.requests)) and not any(c.isalnum() for c in options.text):
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
    of_masks = ("text", "box", "prompt", "target", "out", "overlay", "length", "max_length", "end_bias",
                "forced_prefix")  # fmt: skip
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


def _parser() -> argparse.ArgumentParser:
    from alto_jax.data.masks import AUTO, RULES  # late: keeps the start fast

    parser = argparse.ArgumentParser(
        prog="python -m alto_jax.predict", description="Segment what a phrase names.", epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a run's directory (stage 2 or 3)")
    parser.add_argument("--step", type=int, metavar="N", help="of the run's checkpoints (default: the newest)")
    cli.add_quantize(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--image", metavar="FILE")
    source.add_argument("--images", metavar="DIR", help="all pictures in a folder and those in it")
    source.add_argument("--requests", metavar="FILE", help="JSONL: image, text or box or boxes, id")
    parser.add_argument("--text", default="", help='the object, such as "the red apple"; of --requests: where a line '
                        "has none")  # fmt: skip
    parser.add_argument("--box", action="append", metavar="X1,Y1,X2,Y2", help="in pixels, instead of --text; several: "
                        "one mask of all that they mean")  # fmt: skip
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
    parser.add_argument("--out", metavar="FILE", help="the mask as a PNG, 0 and 255, at the image's size; further ones "
                        "of the answer beside it, as NAME_2.png … Of --images and --requests: a folder")  # fmt: skip
    parser.add_argument("--overlay", metavar="FILE", help="the image with the mask drawn on it")
    parser.add_argument("--json", metavar="FILE", help="text, token_ids, codes, length, masks (RLE), scores, iou …")
    many = parser.add_argument_group("of --images and --requests")
    many.add_argument("--batch_size", type=int, default=8, metavar="N", help="images at once (default: 8)")
    many.add_argument("--save_masks", action="store_true", help="OUT/masks/ID.png, 0 and 255")
    many.add_argument("--save_overlays", action="store_true", help="OUT/overlays/ID.png")
    return parser


def main() -> int:
    """The command; see the module's docstring."""
    options = _parser().parse_args()
    names = ("image", "images", "requests", "target", "out", "overlay", "json")
    cli.check_paths({f"--{name}": getattr(options, name) for name in names})
    return _one(options) if options.image is not None else _many(options)


def _boxes(options: argparse.Namespace) -> list[tuple[float, float, float, float]] | None:
    """Those of --box; ConfigError."""
    from alto_jax.inference.requests import parse_boxes  # late: keeps the start fast

    if options.box is None:
        return None
    if not all(map(str.strip, options.box)):
        raise ConfigError("--box='': expected x1,y1,x2,y2 in pixels")
    try:
        return [box for written in options.box for box in parse_boxes(written, "--box")]
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _one(options: argparse.Namespace) -> int:
    """One image into the files that were named."""
    from alto_jax.data.masks import parse_rule  # late: keeps the start fast
    from alto_jax.data.reading import Reading

    outputs = {"--out": (options.out, cli.MASK_SUFFIXES), "--overlay": (options.overlay, cli.PICTURE_SUFFIXES),
               "--json": (options.json, (".json",))}  # fmt: skip
    cli.check_outputs(outputs, {"--image": options.image, "--target": options.target})
    for name in ("save_masks", "save_overlays"):
        require(not getattr(options, name), f"--{name}", True, "it with --images or --requests alone")
    _check_question(options)
    length, boxes = parse_length(options.length), _boxes(options)
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
        image, options.text, boxes=boxes, length=length, prompt=options.prompt, target=target,
        max_length=options.max_length, end_bias=options.end_bias, forced_prefix=options.forced_prefix,
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


def _many(options: argparse.Namespace) -> int:
    """A folder of images, or a file of requests, into a folder."""
    from alto_jax.inference import requests  # late: keeps the start fast

    for name in ("target", "overlay", "json", "question"):
        require(getattr(options, name) is None, f"--{name}", getattr(options, name), "it with --image alone")
    _check_question(options)
    check_folder(options.out, options.batch_size)
    length, boxes = parse_length(options.length), _boxes(options)
    _check_request(options, describe(options.checkpoint, options.step, length))
    given = {"text": options.text, "prompt": options.prompt, "boxes": [list(box) for box in boxes or ()]}
    default = {name: value for name, value in given.items() if value}
    if options.images is not None:
        root, found = options.images, requests.of_folder(options.images, "--images", "image", default, options.out)
    else:
        root = pathlib.Path(options.requests).parent
        found = requests.of_jsonl(options.requests, "--requests", default)
    from alto_jax.inference import bulk, bulk_work  # late: --help needs no JAX
    from alto_jax.inference.segmenter import Segmenter, load

    model = load(options.checkpoint, options.step, options.quantize)
    assert isinstance(model, Segmenter)
    asked = {name: getattr(options, name) for name in ("max_length", "end_bias", "forced_prefix")} | {"length": length}
    work = bulk_work.SegmentWork(
        model, root, asked, prompt=options.prompt, exif=options.exif, batch_size=options.batch_size,
        save_masks=options.save_masks, save_overlays=options.save_overlays,
    )  # fmt: skip
    outcome = bulk.run(found, work, options.out)
    count = bulk_work.write_coco(options.out)
    print(f"{outcome.before + outcome.answered} answers, {count} masks: {options.out}/{bulk.RESULTS}, {bulk_work.COCO}")
    return outcome.exit_code


def check_folder(out: str | None, batch_size: int) -> None:
    """Raises ConfigError unless `out` is a folder, or can be made one, and the batch size is one."""
    require(out is not None, "--out", out, "a folder")
    path = pathlib.Path(out or "")
    require(path.is_dir() or not path.exists(), "--out", out, "a folder")
    require(path.exists() or path.parent.is_dir(), "--out", out, f"a folder in one that is there, {path.parent} is not")
    require(1 <= batch_size <= 1 << 12, "--batch_size", batch_size, f"1..{1 << 12}")


def command() -> None:
    """The installed command: `main`, with one line for bad input."""
    cli.run(main)


if __name__ == "__main__":
    command()
