"""Masks to codes and back, from the command line.

    python -m alto_jax.tokenize encode --checkpoint DIR --mask mask.png --out codes.json [--length adaptive|full|N]
    python -m alto_jax.tokenize decode --checkpoint DIR --codes codes.json --out mask.png [--image FILE]
    python -m alto_jax.tokenize check  --checkpoint DIR --meta meta.json --out DIR    # or --images DIR --masks DIR

The JSON file holds codes, length, and size ([height, width] of the mask). `check` says how well one's own masks come
back from their codes: IoU in summary.json (mean, quantiles, by number of tokens), the worst as pictures in worst.html.
"""

import argparse
import json
import pathlib

import numpy as np

import alto_jax
from alto_jax import cli, predict
from alto_jax.config import ConfigError, require


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
    check = actions.add_parser("check", help="how well one's own masks come back from their codes")
    check.add_argument("--meta", metavar="FILE", help="the meta.json of alto_jax.data.convert")
    check.add_argument("--images", metavar="DIR", help="in place of --meta, with --masks: files of equal names")
    check.add_argument("--masks", metavar="DIR")
    check.add_argument("--mask_rule", default=AUTO, metavar="RULE", help=f"of --masks: {RULES} (docs/data.md)")
    check.add_argument("--samples", type=int, default=1000, metavar="N", help="the first N masks")
    check.add_argument("--worst", type=int, default=12, metavar="N", help="masks that are shown")
    for action in (encode, decode, check):
        action.add_argument("--checkpoint", required=True, metavar="DIR", help="a run's directory (any stage)")
        action.add_argument("--step", type=int, metavar="N", help="of the run's checkpoints (default: the newest)")
        action.add_argument("--out", required=True, metavar="DIR" if action is check else "FILE")
    options = parser.parse_args()
    given = ("mask", "codes", "image", "out", "meta", "images", "masks")
    cli.check_paths({f"--{name}": getattr(options, name, None) for name in given})
    if options.action == "encode":
        _encode(options)
    elif options.action == "check":
        _check(options)
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
    for name in ("images", "masks"):
        folder = getattr(options, name)
        require(not folder or pathlib.Path(folder).is_dir(), f"--{name}", folder, "a folder")
    out = pathlib.Path(options.out)
    require(not out.exists() or out.is_dir(), "--out", options.out, "a folder")
    source: shapes.OfFolders | shapes.OfConversations
    if by_folders:
        source = shapes.OfFolders(options.images, options.masks, options.mask_rule, options.samples)
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
