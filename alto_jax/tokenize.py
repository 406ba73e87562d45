"""Masks to codes and back, from the command line.

    python -m alto_jax.tokenize encode --checkpoint DIR --mask mask.png --out codes.json [--length adaptive|full|N]
    python -m alto_jax.tokenize decode --checkpoint DIR --codes codes.json --out mask.png [--image FILE]

The JSON file holds codes, length, and size ([height, width] of the mask).
"""

import argparse
import json
import pathlib

import numpy as np

import alto_jax
from alto_jax import cli, predict


def main() -> int:
    """The command; see the module's docstring."""
    from alto_jax.data.masks import AUTO, RULES  # late: keeps the start fast

    parser = argparse.ArgumentParser(prog="python -m alto_jax.tokenize", description="Masks to codes and back.")
    actions = parser.add_subparsers(dest="action", required=True)
    encode = actions.add_parser("encode", help="a mask file to codes")
    encode.add_argument("--mask", required=True, metavar="FILE", help="a mask file, read as stored")
    encode.add_argument("--mask_rule", default=AUTO, metavar="RULE", help=f"of --mask: {RULES} (docs/data.md)")
    encode.add_argument("--length", default="adaptive", help="adaptive, full, or a number of mask tokens")
    decode = actions.add_parser("decode", help="codes to a mask file")
    decode.add_argument("--codes", required=True, metavar="FILE", help="the JSON file that encode wrote")
    decode.add_argument("--image", metavar="FILE", help="the image, whose features sharpen the mask")
    decode.add_argument("--exif", choices=("upright", "stored"), default="upright", help="EXIF orientation of --image")
    for action in (encode, decode):
        action.add_argument("--checkpoint", required=True, metavar="DIR", help="a run's directory (any stage)")
        action.add_argument("--step", type=int, metavar="N", help="of the run's checkpoints (default: the newest)")
        action.add_argument("--out", required=True, metavar="FILE")
    options = parser.parse_args()
    cli.check_paths({f"--{name}": getattr(options, name, None) for name in ("mask", "codes", "image", "out")})
    if options.action == "encode":
        _encode(options)
    else:
        _decode(options)
    return 0


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


def command() -> None:
    """The installed command: `main`, with one line for bad input."""
    cli.run(main)


if __name__ == "__main__":
    command()
