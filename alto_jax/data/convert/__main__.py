"""Your own masks → the JSONL that stages 2 and 3 read.

    python -m alto_jax.data.convert coco    --annotations instances.json --images DIR --out DIR
    python -m alto_jax.data.convert pairs   --images DIR --masks DIR --label "the crack" --out DIR
    python -m alto_jax.data.convert labelme --annotations DIR --out DIR
    python -m alto_jax.data.convert yolo    --annotations DIR --images DIR --names data.yaml --out DIR
    python -m alto_jax.data.convert cvat    --annotations annotations.xml --images DIR --out DIR
    python -m alto_jax.data.convert parquet --annotations DIR --columns image=img,mask=mask,label=label --out DIR

Comes in: what the annotation tools write, or Hugging Face's tables. Goes out, in the out folder: `data.jsonl`,
`masks/*.png` (0 and 255, of the image's size) and `meta.json`, for `--config.data.source=jsonl
--config.data.meta=DIR/meta.json`. The images stay where they are; those that a table holds are written to `images/`.
All objects of one name in an image are one request and one mask ("all cats"; a single one: "the cat").
"""

import argparse
from collections.abc import Callable, Iterator
import os
import pathlib
import sys

from alto_jax import cli
from alto_jax.config import ConfigError
from alto_jax.data import masks
from alto_jax.data.bad_data import RecordError
from alto_jax.data.convert.annotated import FRAMES, Annotated
from alto_jax.data.convert.coco import read_coco
from alto_jax.data.convert.cvat import read_cvat
from alto_jax.data.convert.labelme import read_labelme
from alto_jax.data.convert.pairs import read_pairs
from alto_jax.data.convert.parquet import read_parquet
from alto_jax.data.convert.writing import write
from alto_jax.data.convert.yolo import read_names, read_yolo

# What each format needs; paths that are files, all others are folders (a table is either).
_NEEDED = {
    "coco": ("annotations", "images"),
    "pairs": ("images", "masks", "label"),
    "labelme": ("annotations",),
    "yolo": ("annotations", "images", "names"),
    "cvat": ("annotations", "images"),
    "parquet": ("annotations",),
}
_EXISTS: dict[tuple[str, str], tuple[str, Callable[[str], bool]]] = {
    ("coco", "annotations"): ("file", os.path.isfile),
    ("cvat", "annotations"): ("file", os.path.isfile),
    ("parquet", "annotations"): ("file or folder", os.path.exists),
}


def main() -> int:
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m alto_jax.data.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("form", choices=tuple(_NEEDED))
    parser.add_argument(
        "--annotations", metavar="PATH", help="the file (coco, cvat, parquet) or folder (labelme, yolo, parquet)"
    )
    parser.add_argument("--images", metavar="DIR", help="(all but labelme; parquet: of files that it names, not holds)")
    parser.add_argument("--masks", metavar="DIR", help="(pairs)")
    parser.add_argument("--label", metavar="NAME", help="what the masks show (pairs; parquet, if no column says it)")
    parser.add_argument("--names", metavar="FILE", help="class names: a text file, or YOLO's data.yaml (yolo, parquet)")
    parser.add_argument(
        "--columns", default="", metavar="KEY=NAME,…", help="(parquet) of image, mask, label or caption"
    )
    parser.add_argument("--mask-rule", default=masks.AUTO, help=f"(pairs, parquet) {masks.RULES} (docs/data.md)")
    parser.add_argument("--exif", choices=FRAMES, help="pictures with an EXIF orientation were annotated as stored, or "
                        "upright; if not said, a picture that may be either is left out (docs/data.md)")  # fmt: skip
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--adaptive", type=float, default=0.5, metavar="X", help="share of adaptive-length requests")
    parser.add_argument("--max-bad-fraction", type=float, default=0.0, metavar="X")
    options = parser.parse_args()
    for name in _NEEDED[options.form]:
        if not getattr(options, name):
            raise ConfigError(f"--{name} is required for {options.form}")
    cli.check_paths({f"--{name}": getattr(options, name) for name in ("annotations", "images", "masks", "out")})
    for name in ("annotations", "images", "masks"):
        kind, exists = _EXISTS.get((options.form, name), ("folder", os.path.isdir))
        if (given := getattr(options, name)) and not exists(given):
            raise ConfigError(f"--{name}={given}: no such {kind}")
    for name in ("adaptive", "max_bad_fraction"):
        if not 0 <= getattr(options, name) <= 1:
            raise ConfigError(f"--{name.replace('_', '-')}={getattr(options, name)}: expected 0..1")
    masks.parse_rule(options.mask_rule, "--mask-rule")
    if options.columns and options.form != "parquet":
        raise ConfigError(f"--columns={options.columns}: only for parquet, not for {options.form}")
    out = pathlib.Path(options.out)
    if (out / "data.jsonl").exists():
        raise ConfigError(f"--out={options.out}: holds data.jsonl already")
    found = _read(options)
    shares = {"adaptive": options.adaptive, "max_bad_fraction": options.max_bad_fraction}
    root = pathlib.Path(options.images or options.annotations)
    count, bad = write(found, out, **shares, exif=options.exif, root=root)
    for line in bad:
        sys.stderr.write(f"left out: {line}\n")
    print(f"{count} records in {out / 'data.jsonl'}, {len(bad)} left out; --config.data.meta={out / 'meta.json'}")
    return 0


def _read(options: argparse.Namespace) -> Iterator[Annotated | RecordError]:
    """What the format's reader finds."""
    path = lambda name: pathlib.Path(getattr(options, name))
    if options.form == "coco":
        return read_coco(path("annotations"), path("images"))
    if options.form == "pairs":
        return read_pairs(path("images"), path("masks"), options.label, options.mask_rule, options.exif)
    if options.form == "labelme":
        return read_labelme(path("annotations"))
    if options.form == "yolo":
        return read_yolo(path("annotations"), path("images"), read_names(options.names))
    if options.form == "cvat":
        return read_cvat(path("annotations"), path("images"))
    return read_parquet(
        path("annotations"),
        options.columns,
        label=options.label or "",
        names=read_names(options.names) if options.names else (),
        folder=path("images") if options.images else None,
        rule=options.mask_rule,
        exif=options.exif,
    )


def command() -> None:
    """The installed command: `main`, with one line for bad input."""
    cli.run(main)


if __name__ == "__main__":
    command()
