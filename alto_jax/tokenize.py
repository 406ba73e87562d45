"""Masks to codes and back, from the command line.

    python -m alto_jax.tokenize encode --checkpoint DIR --mask mask.png --out codes.json [--length adaptive|full|N]
    python -m alto_jax.tokenize decode --checkpoint DIR --codes codes.json --out mask.png [--image FILE]
    python -m alto_jax.tokenize encode --checkpoint DIR --masks DIR --out DIR     # and decode --codes DIR/results.jsonl
    python -m alto_jax.tokenize check  --checkpoint DIR --meta meta.json --out DIR    # or --images DIR --masks DIR

The JSON file holds codes, length, and size ([height, width] of the mask). `check` says how well one's own masks come
back from their codes: IoU in summary.json (mean, quantiles, by number of tokens), the worst as pictures in worst.html.
"""

import argparse
import json
import pathlib
from typing import Any

import numpy as np

import alto_jax
from alto_jax import cli, predict
from alto_jax.config import ConfigError, require

_EXAMPLES = {
    "encode": """
One mask; all masks of a folder, eight tokens each (the same command goes on where a killed one was):
  python -m alto_jax.tokenize encode --checkpoint alto-tiny --mask mask.png --out codes.json
  python -m alto_jax.tokenize encode --checkpoint alto-tiny --masks masks --length 8 --out codes
""",
    "decode": """
One mask; all that encode wrote of a folder, with the images that are named as the masks are:
  python -m alto_jax.tokenize decode --checkpoint alto-tiny --codes codes.json --image photo.jpg --out again.png
  python -m alto_jax.tokenize decode --checkpoint alto-tiny --codes codes/results.jsonl --images images --out again
""",
    "check": """
How well masks come back from their codes:
  python -m alto_jax.tokenize check --checkpoint alto-tiny --images images --masks masks --out checked
""",
}
_EXIT = "\nExit codes: 0 done; 1 some masks left out, named in OUT/bad.jsonl; 2 bad input; 130 interrupted.\n"


def main() -> int:
    """The command; see the module's docstring."""
    from alto_jax.data.masks import AUTO, RULES  # late: keeps the start fast

    of: Any = lambda *texts: {"epilog": "".join(texts), "formatter_class": argparse.RawDescriptionHelpFormatter}
    described = of(*_EXAMPLES.values(), _EXIT) | {"description": "Masks to codes and back."}
    parser = argparse.ArgumentParser(prog="python -m alto_jax.tokenize", **described)
    actions = parser.add_subparsers(dest="action", required=True)
    encode = actions.add_parser("encode", help="mask files to codes", **of(_EXAMPLES["encode"], _EXIT))
    read = encode.add_mutually_exclusive_group(required=True)
    read.add_argument("--mask", metavar="FILE", help="a mask file, read as stored")
    read.add_argument("--masks", metavar="DIR", help="all pictures in a folder and those in it")
    encode.add_argument("--mask_rule", default=AUTO, metavar="RULE", help=f"of the masks: {RULES} (docs/data.md)")
    encode.add_argument("--length", default="adaptive", help="adaptive, full, or a number of mask tokens")
    decode = actions.add_parser("decode", help="codes to mask files", **of(_EXAMPLES["decode"], _EXIT))
    decode.add_argument("--codes", required=True, metavar="FILE", help="what encode wrote: a JSON file, or the "
                        "results.jsonl of a folder")  # fmt: skip
    image = decode.add_mutually_exclusive_group()
    image.add_argument("--image", metavar="FILE", help="the image, whose features sharpen the mask")
    image.add_argument("--images", metavar="DIR", help="of results.jsonl: images that are named as the masks are")
    decode.add_argument("--exif", choices=("upright", "stored"), default="upright", help="EXIF orientation of images")
    check = actions.add_parser("check", help="how well one's own masks come back from their codes",
                               **of(_EXAMPLES["check"]))  # fmt: skip
    check.add_argument("--meta", metavar="FILE", help="the meta.json of alto_jax.data.convert")
    check.add_argument("--images", metavar="DIR", help="in place of --meta, with --masks: files of equal names")
    check.add_argument("--masks", metavar="DIR")
    check.add_argument("--mask_rule", default=AUTO, metavar="RULE", help=f"of --masks: {RULES} (docs/data.md)")
    check.add_argument("--exif", choices=("stored", "masks_upright"), help="--images with an EXIF orientation have "
                       "--masks as stored, or upright; needed where both may be (docs/data.md)")  # fmt: skip
    check.add_argument("--samples", type=int, default=1000, metavar="N", help="the first N masks")
    check.add_argument("--worst", type=int, default=12, metavar="N", help="masks that are shown")
    for action in (encode, decode, check):
        action.add_argument("--checkpoint", required=True, metavar="DIR", help="a run's directory (any stage)")
        action.add_argument("--step", type=int, metavar="N", help="of the run's checkpoints (default: the newest)")
        action.add_argument("--out", required=True, metavar="DIR" if action is check else "FILE|DIR")
    for action in (encode, decode):
        action.add_argument("--batch_size", type=int, default=32, metavar="N", help="masks of folders at once")
    options = parser.parse_args()
    given = ("mask", "codes", "image", "out", "meta", "images", "masks")
    cli.check_paths({f"--{name}": getattr(options, name, None) for name in given})
    if options.action == "check":
        _check(options)
    elif options.action == "encode" and options.masks is not None:
        return _encode_many(options)
    elif options.action == "encode":
        _encode(options)
    elif options.codes.endswith(".jsonl"):
        return _decode_many(options)
    else:
        require(options.images is None, "--images", options.images, "--image with one mask's codes")
        _decode(options)
    return 0


def _encode_many(options: argparse.Namespace) -> int:
    # late: keeps the start fast
    from alto_jax.data import masks
    from alto_jax.inference import bulk, bulk_work, requests

    predict.check_folder(options.out, options.batch_size)
    masks.parse_rule(options.mask_rule, "--mask_rule")
    length = predict.parse_length(options.length)
    predict.describe(options.checkpoint, options.step, length)
    found = requests.of_folder(options.masks, "--masks", "mask", {}, options.out)
    model = alto_jax.load(options.checkpoint, step=options.step)
    work = bulk_work.EncodeWork(model, options.masks, length, options.mask_rule, options.batch_size)
    outcome = bulk.run(found, work, options.out)
    print(f"{outcome.before + outcome.answered} masks' codes: {options.out}/{bulk.RESULTS}")
    return outcome.exit_code


def _decode_many(options: argparse.Namespace) -> int:
    from alto_jax.inference import bulk, bulk_work, requests  # late: keeps the start fast

    predict.check_folder(options.out, options.batch_size)
    require(options.image is None, "--image", options.image, f"--images with {options.codes}")
    own = (pathlib.Path(options.out) / bulk.RESULTS).resolve() == pathlib.Path(options.codes).resolve()
    require(not own, "--out", options.out, "another folder than that of --codes")
    found = requests.of_codes(options.codes, "--codes", options.images, options.out)
    predict.describe(options.checkpoint, options.step, "adaptive")
    model = alto_jax.load(options.checkpoint, step=options.step)
    outcome = bulk.run(
        found, bulk_work.DecodeWork(model, options.images, options.exif, options.batch_size), options.out
    )
    print(f"{outcome.before + outcome.answered} masks: {options.out}/{bulk_work.MASKS}, {bulk.RESULTS}")
    return outcome.exit_code


def _encode(options: argparse.Namespace) -> None:
    from alto_jax.data import masks  # late: keeps the start fast

    cli.check_outputs({"--out": (options.out, (".json",))}, {"--mask": options.mask})
    masks.parse_rule(options.mask_rule, "--mask_rule")
    length = predict.parse_length(options.length)
    predict.describe(options.checkpoint, options.step, length)
    mask = masks.open_mask(options.mask, options.mask_rule)
    codes = alto_jax.load(options.checkpoint, step=options.step).encode(mask, length)
    result = {"codes": codes, "length": len(codes), "size": list(mask.shape)}
    pathlib.Path(options.out).write_text(json.dumps(result) + "\n")
    print(f"{len(codes)} codes: {' '.join(map(str, codes))}")


def _decode(options: argparse.Namespace) -> None:
    from PIL import Image  # late: keeps the start fast

    from alto_jax.data import images

    read = {"--codes": options.codes, "--image": options.image}
    cli.check_outputs({"--out": (options.out, cli.MASK_SUFFIXES)}, read)
    try:
        saved = json.loads(pathlib.Path(options.codes).read_text())
        codes, (height, width) = list(saved["codes"]), saved["size"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{options.codes}: expected the JSON that encode writes (codes, size): {error!r}") from error
    image = images.open_image(options.image, upright=options.exif == "upright") if options.image else None
    mask = alto_jax.load(options.checkpoint, step=options.step).decode(codes, (height, width), image)
    Image.fromarray(mask.astype(np.uint8) * 255).save(options.out)
    print(f"{int(mask.sum())} pixels of {width}x{height} in {options.out}")


def _check(options: argparse.Namespace) -> None:
    # late: keeps the start fast
    from alto_jax.data import masks
    from alto_jax.inference import shapes

    masks.parse_rule(options.mask_rule, "--mask_rule")
    for name, least in (("samples", 1), ("worst", 0)):
        require(getattr(options, name) >= least, f"--{name}", getattr(options, name), f"at least {least}")
    by_folders = bool(options.images and options.masks)
    if bool(options.meta) == by_folders or bool(options.images) != bool(options.masks):
        raise ConfigError("tokenize check: expected either --meta=FILE or both --images=DIR and --masks=DIR")
    require(by_folders or options.exif is None, "--exif", options.exif, "it with --images; --meta has its own")
    for name in ("images", "masks"):
        folder = getattr(options, name)
        require(not folder or pathlib.Path(folder).is_dir(), f"--{name}", folder, "a folder")
    out = pathlib.Path(options.out)
    require(not out.exists() or out.is_dir(), "--out", options.out, "a folder")
    source: shapes.OfFolders | shapes.OfConversations
    if by_folders:
        source = shapes.OfFolders(options.images, options.masks, options.mask_rule, options.samples, options.exif)
    else:
        source = shapes.OfConversations(options.meta, options.samples)
    model = alto_jax.load(options.checkpoint, step=options.step)
    lines = shapes.reconstruct(model, source)
    found = shapes.summarize(lines, shapes.token_counts(model.cfg.tokenizer.num_latent_tokens))
    out.mkdir(parents=True, exist_ok=True)
    (out / "summary.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "masks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shapes.write_worst(out / "worst.html", model, source, lines, options.worst)
    print("\n".join(f"{name:<20}{value:>10.3f}" for name, value in found.items()))
    print(f"summary.json, masks.jsonl, worst.html in {out}")


def command() -> None:
    """The installed command: `main`, with one line for bad input."""
    cli.run(main)


if __name__ == "__main__":
    command()
