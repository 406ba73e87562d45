"""Your own masks → the JSONL that stages 2 and 3 read.

    python -m alto_jax.data.convert coco    --annotations instances.json --images DIR --out DIR
    python -m alto_jax.data.convert pairs   --images DIR --masks DIR --label "the crack" --out DIR
    python -m alto_jax.data.convert labelme --annotations DIR --out DIR
    python -m alto_jax.data.convert yolo    --annotations DIR --images DIR --names data.yaml --out DIR
    python -m alto_jax.data.convert cvat    --annotations annotations.xml --images DIR --out DIR

Comes in: what the annotation tools write. Goes out, in the out folder: `data.jsonl`, `masks/*.png` (0 and 255, of the
image's size) and `meta.json`, for `--config.data.source=jsonl --config.data.meta=DIR/meta.json`. The images stay where
they are. All objects of one name in an image are one request and one mask ("all cats"; a single one: "the cat").
"""

import argparse
from collections.abc import Callable, Iterator
import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import sys
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from alto_jax import cli
from alto_jax.config import ConfigError, write_whole
from alto_jax.data import coco, images, masks, phrases, rle
from alto_jax.data.bad_data import RecordError, at, parse_json
from alto_jax.mllm import text

FORMS = ("coco", "pairs", "labelme", "yolo", "cvat")
_PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
_CIRCLE = 64  # corners of a circle's polygon


@dataclasses.dataclass(frozen=True)
class Annotated:
    """The objects of one name in one image.

    Attributes:
      image: the file.
      label: as the annotations have it.
      count: how many objects.
      draw: (height, width) → bool[H, W], all of them.
      size: (height, width) that the annotations are for, None if they do not say.
      where: file and entry, for messages.
    """

    image: pathlib.Path
    label: str
    count: int
    draw: Callable[[int, int], np.ndarray]
    size: tuple[int, int] | None
    where: str


def read_coco(annotations: pathlib.Path, folder: pathlib.Path) -> Iterator[Annotated | RecordError]:
    """COCO's instances: {"images", "annotations", "categories"}; crowds count where a name has nothing else.

    Args:
      annotations: the JSON file.
      folder: of the images.

    Raises:
      RecordError: the file is no such JSON; what is wrong with an entry is given in its place.
    """
    content = _json(annotations)
    if not isinstance(content, dict) or not all(isinstance(content.get(n), list) for n in ("images", "annotations")):
        raise RecordError(f"{annotations}: expected COCO's lists 'images' and 'annotations'")
    names = {c.get("id"): c.get("name") for c in content.get("categories") or () if isinstance(c, dict)}
    of_image: dict[Any, dict[Any, list]] = {}
    for entry in content["annotations"]:
        if isinstance(entry, dict):
            of_image.setdefault(entry.get("image_id"), {}).setdefault(entry.get("category_id"), []).append(entry)
    for number, info in enumerate(content["images"]):
        where = f"{annotations} image {number}"
        if not isinstance(info, dict) or not isinstance(info.get("file_name"), str):
            yield RecordError(f"{where}: expected an entry with file_name, got {info!r:.60}")
            continue
        for category, entries in sorted(of_image.get(info.get("id"), {}).items(), key=lambda item: str(item[0])):
            label = names.get(category)
            place = f"{where} ({info['file_name']}), category {category!r}"
            if not isinstance(label, str):
                yield RecordError(f"{place}: not among the categories")
                continue
            try:
                path, size = coco.find_image(folder / info["file_name"]), coco.stated_size(info, place)
                draw = coco.union(coco.of_target(entries))
            except (RecordError, TypeError, KeyError) as error:
                yield at(place, error)
                continue
            yield Annotated(path, label, len(entries), draw, size, place)


def read_pairs(
    folder: pathlib.Path, of_masks: pathlib.Path, label: str, rule: str
) -> Iterator[Annotated | RecordError]:
    """Mask files that are named as their images are, up to the ending.

    Args:
      folder: of the images.
      of_masks: the masks' folder.
      label: what they show.
      rule: which values are foreground (data/masks.py).

    Raises:
      RecordError: when a mask is drawn, that cannot be read or has another size than its image.
    """
    found = {path.stem: path for path in sorted(of_masks.iterdir()) if path.suffix.lower() in _PICTURES}
    for path in _pictures(folder):
        mask = found.get(path.stem)
        if mask is None:
            yield RecordError(f"{path}: no mask {path.stem}.* in {of_masks}")
            continue

        def draw(height: int, width: int, mask: pathlib.Path = mask) -> np.ndarray:
            drawn = masks.open_mask(mask, rule) > 0
            if drawn.shape != (height, width):
                raise RecordError(f"{mask}: {drawn.shape[1]}x{drawn.shape[0]}, but its image is {width}x{height}")
            return drawn

        yield Annotated(path, label, 1, draw, None, str(mask))


def read_labelme(folder: pathlib.Path) -> Iterator[Annotated | RecordError]:
    """LabelMe's JSON beside images, anywhere in `folder`: polygons, rectangles and circles, in pixels."""
    for file in sorted(folder.rglob("*.json")):
        try:
            content = _json(file)
            shapes, path = content["shapes"], file.parent / str(content["imagePath"]).replace("\\", "/")
            size = (content["imageHeight"], content["imageWidth"]) if content.get("imageHeight") else None
            found: dict[str, list[list[float]]] = {}
            for shape in shapes:
                points = np.array(shape["points"], float).reshape(-1, 2)
                found.setdefault(str(shape["label"]), []).append(_corners(shape.get("shape_type", "polygon"), points))
        except (RecordError, TypeError, KeyError, ValueError) as error:
            yield at(file, error)
            continue
        for label, polygons in sorted(found.items()):
            yield Annotated(path, label, len(polygons), _polygons(polygons, str(file)), size, f"{file}, {label!r}")


def read_yolo(folder: pathlib.Path, of_images: pathlib.Path, names: list[str]) -> Iterator[Annotated | RecordError]:
    """YOLO's segments: a text file an image, lines of a class and x y x y … in 0..1.

    Args:
      folder: of the text files.
      of_images: of the images, laid out as the text files.
      names: of the classes.

    Raises:
      RecordError: never; what is wrong with a file is given in its place.
    """
    for path in _pictures(of_images):
        file = folder / path.relative_to(of_images).with_suffix(".txt")
        if not file.exists():
            continue  # Note: that is how these data say that an image holds nothing.
        found: dict[str, list[np.ndarray]] = {}
        try:
            for number, line in enumerate(file.read_text().splitlines(), 1):
                values = [float(word) for word in line.split()]
                if not values:
                    continue
                if len(values) < 7 or len(values) % 2 == 0:
                    raise RecordError(f"line {number}: expected a class and three corners or more, got {line!r:.60}")
                if values[0] not in range(len(names)):
                    raise RecordError(f"line {number}: class {line.split()[0]} of {len(names)} names")
                corners = np.array(values[1:]).reshape(-1, 2)
                if not np.all((corners >= -0.01) & (corners <= 1.01)):
                    raise RecordError(f"line {number}: expected coordinates in 0..1, got {line!r:.60}")
                found.setdefault(names[int(values[0])], []).append(corners)
        except (RecordError, ValueError) as error:
            yield at(file, error)
            continue
        for label, parts in sorted(found.items()):

            def draw(height: int, width: int, parts: list = parts, file: pathlib.Path = file) -> np.ndarray:
                scaled = [(corners * (width, height)).reshape(-1).tolist() for corners in parts]
                return rle.decode(scaled, height, width, str(file))

            yield Annotated(path, label, len(parts), draw, None, f"{file}, {label!r}")


def read_cvat(file: pathlib.Path, folder: pathlib.Path) -> Iterator[Annotated | RecordError]:
    """CVAT's XML for images 1.1: polygons, boxes and masks.

    Args:
      file: the XML.
      folder: of the images.

    Raises:
      RecordError: it is no XML; what is wrong with an entry is given in its place.
    """
    try:
        root = ElementTree.parse(file).getroot()
    except (ElementTree.ParseError, OSError) as error:
        raise RecordError(f"{file}: expected CVAT's XML: {error}") from error
    for entry in root.iter("image"):
        where = f"{file} image {entry.get('name')!r}"
        try:
            path, height, width = folder / entry.attrib["name"], int(entry.attrib["height"]), int(entry.attrib["width"])
            rle.check_size(height, width, where)
            found: dict[str, list[np.ndarray]] = {}
            for shape in entry:
                if shape.tag in ("polygon", "box", "mask"):
                    drawn = _cvat_shape(shape, height, width, where)
                    found.setdefault(shape.attrib["label"], []).append(drawn)
        except (RecordError, KeyError, ValueError) as error:
            yield at(where, error)
            continue
        for label, parts in sorted(found.items()):
            whole = np.logical_or.reduce(parts)
            draw = functools.partial(_drawn, whole)
            yield Annotated(path, label, len(parts), draw, (height, width), f"{where}, {label!r}")


def _drawn(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """A mask that is drawn already; its size was compared with the image's."""
    assert mask.shape == (height, width)
    return mask


def _cvat_shape(shape: ElementTree.Element, height: int, width: int, where: str) -> np.ndarray:
    """One polygon, box or mask, bool[H, W]."""
    given = shape.attrib
    if shape.tag == "polygon":
        corners = [float(v) for point in given["points"].split(";") for v in point.split(",")]
        return rle.decode([corners], height, width, where)
    if shape.tag == "box":
        ends = np.array([float(given[name]) for name in ("xtl", "ytl", "xbr", "ybr")]).reshape(2, 2)
        return rle.decode([_corners("rectangle", ends)], height, width, where)
    left, top, w, h = (int(float(given[name])) for name in ("left", "top", "width", "height"))
    if left < 0 or top < 0 or w < 1 or h < 1 or left + w > width or top + h > height:
        raise RecordError(f"a mask of {w}x{h} at {left}, {top} lies outside of the {width}x{height} image")
    runs = [int(run) for run in given["rle"].split(",")]
    if min(runs) < 0 or sum(runs) != w * h:
        raise RecordError(f"a mask's run lengths sum to {sum(runs)}, expected {w}x{h} = {w * h}")
    part = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(h, w)  # Note: along rows, unlike COCO's.
    drawn = np.zeros((height, width), bool)
    drawn[top : top + h, left : left + w] = part
    return drawn


def _corners(kind: str, points: np.ndarray) -> list[float]:
    """A shape of LabelMe, given by points [n, 2], as a polygon x, y, x, y, …."""
    if kind == "rectangle" and len(points) == 2:
        (x1, y1), (x2, y2) = points
        points = np.array([(x1, y1), (x2, y1), (x2, y2), (x1, y2)])
    elif kind == "circle" and len(points) == 2:
        turn = np.linspace(0, 2 * math.pi, _CIRCLE, endpoint=False)
        radius = float(np.hypot(*(points[1] - points[0])))
        points = points[0] + radius * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    elif kind != "polygon" or len(points) < 3:
        raise RecordError(f"shape {kind!r} of {len(points)} points: expected a polygon, rectangle or circle")
    return points.reshape(-1).tolist()


def _polygons(polygons: list[list[float]], where: str) -> Callable[[int, int], np.ndarray]:
    return lambda height, width: rle.decode(polygons, height, width, where)


def _json(file: pathlib.Path) -> Any:
    try:
        return parse_json(file.read_bytes(), file)
    except OSError as error:
        raise RecordError(f"{file}: {error.strerror}") from error


def _pictures(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in _PICTURES)


def write(
    found: Iterator[Annotated | RecordError], out: pathlib.Path, *, adaptive: float, max_bad_fraction: float
) -> tuple[int, list[str]]:
    """Writes masks, data.jsonl and meta.json.

    Args:
      found: what a reader gives.
      out: the folder.
      adaptive: share of the requests for as many mask tokens as needed; the others ask for all. By the mask's name,
        so that it is the same in every run.
      max_bad_fraction: share of entries that may be bad.

    Returns:
      The number of records, and what was left out, a line each.

    Raises:
      ConfigError: more than that is bad, or nothing was found. Nothing is left behind.
    """
    lines, bad, names = [], [], set()
    (out / "masks").mkdir(parents=True, exist_ok=True)
    for entry in found:
        try:
            if isinstance(entry, RecordError):
                raise entry
            image = images.open_image(entry.image)
            coco.check_stated_size(image.shape[:2], entry.size)
            mask = entry.draw(*image.shape[:2])
            if not mask.any():
                raise RecordError(f"{entry.where}: an empty mask", "empty mask")
            if not entry.label.strip():
                raise RecordError(f"{entry.where}: an object without a name")
            phrase = f"the {entry.label}" if entry.count == 1 else f"all {phrases.plural(entry.label)}"
            phrase = entry.label if entry.label.startswith(("the ", "all ")) else phrase
            digest = hashlib.blake2b(f"{entry.image.name}|{entry.label}".encode(), digest_size=8).digest()
            name = f"{entry.image.stem}_{digest[:5].hex()}"
            is_adaptive = int.from_bytes(digest, "big") < adaptive * 2**64
            question = text.question(phrase, adaptive=is_adaptive)
        except ValueError as error:
            bad.append(str(error if isinstance(entry, RecordError) else at(entry.where, error)))
            continue
        if name in names:
            bad.append(f"{entry.where}: a second entry of this image and name")
            continue
        names.add(name)
        Image.fromarray(mask.astype(np.uint8) * 255).save(out / "masks" / f"{name}.png")
        turns = [{"from": "human", "value": f"{text.IMAGE}\n{question}"},
                 {"from": "gpt", "value": text.answer(adaptive=is_adaptive)}]  # fmt: skip
        place = os.path.relpath(entry.image.resolve(), out.resolve())
        lines.append(json.dumps({"image": place, "mask": f"masks/{name}.png", "conversations": turns}))
    total = len(lines) + len(bad)
    if not lines or len(bad) > max_bad_fraction * total:
        for name in names:
            (out / "masks" / f"{name}.png").unlink()
        first = f", such as {bad[0]}" if bad else ""
        if not any((out / "masks").iterdir()):
            (out / "masks").rmdir()
        limit = f"at most --max-bad-fraction={max_bad_fraction}"
        raise ConfigError(f"{len(bad)} of {total} entries are bad{first}; {limit}" if bad else "no entries were found")
    write_whole(out / "data.jsonl", "\n".join(lines) + "\n")
    about = {"root": ".", "annotation": "data.jsonl", "data_augment": False, "repeat_time": 1, "length": len(lines)}
    write_whole(out / "meta.json", json.dumps({out.resolve().name: about}, indent=1) + "\n")
    return len(lines), bad


def _names(file: str) -> list[str]:
    """The class names of a text file (a line each), or of `names:` in YOLO's data.yaml (a list, or numbers to names).

    Raises:
      ConfigError: no names there.
    """
    import yaml  # type: ignore[import-untyped]  # late: only these need it

    try:
        content = pathlib.Path(file).read_text()
        if not file.endswith((".yaml", ".yml")):
            found = [line.strip() for line in content.splitlines() if line.strip()]
        else:
            names = yaml.safe_load(content)["names"]
            found = [str(names[i]) for i in range(len(names))]
    except (OSError, yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--names={file}: expected class names, a line each, or a YAML's `names`: {error!r}"
        ) from error
    if not found:
        raise ConfigError(f"--names={file}: holds no names")
    return found


def main() -> int:
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m alto_jax.data.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("form", choices=FORMS)
    parser.add_argument("--annotations", metavar="PATH", help="the file (coco, cvat) or folder (labelme, yolo)")
    parser.add_argument("--images", metavar="DIR", help="(all but labelme)")
    parser.add_argument("--masks", metavar="DIR", help="(pairs)")
    parser.add_argument("--label", metavar="NAME", help="what the masks show (pairs)")
    parser.add_argument("--names", metavar="FILE", help="class names: a text file, or YOLO's data.yaml (yolo)")
    parser.add_argument("--mask-rule", default=masks.AUTO, help=f"(pairs) {masks.RULES} (docs/data.md)")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--adaptive", type=float, default=0.5, metavar="X", help="share of adaptive-length requests")
    parser.add_argument("--max-bad-fraction", type=float, default=0.0, metavar="X")
    options = parser.parse_args()
    needed = {"coco": ("annotations", "images"), "pairs": ("images", "masks", "label"), "labelme": ("annotations",),
              "yolo": ("annotations", "images", "names"), "cvat": ("annotations", "images")}[options.form]  # fmt: skip
    for name in needed:
        if not getattr(options, name):
            raise ConfigError(f"--{name} is required for {options.form}")
    cli.check_paths({f"--{name}": getattr(options, name) for name in ("annotations", "images", "masks", "out")})
    files = {"coco": ("annotations",), "cvat": ("annotations",)}.get(options.form, ())
    for name in ("annotations", "images", "masks"):
        given = getattr(options, name)
        if given and not (os.path.isfile if name in files else os.path.isdir)(given):
            raise ConfigError(f"--{name}={given}: no such {'file' if name in files else 'folder'}")
    for name in ("adaptive", "max_bad_fraction"):
        if not 0 <= getattr(options, name) <= 1:
            raise ConfigError(f"--{name.replace('_', '-')}={getattr(options, name)}: expected 0..1")
    masks.parse_rule(options.mask_rule, "--mask-rule")
    path = lambda name: pathlib.Path(getattr(options, name))
    if options.form == "coco":
        found = read_coco(path("annotations"), path("images"))
    elif options.form == "pairs":
        found = read_pairs(path("images"), path("masks"), options.label, options.mask_rule)
    elif options.form == "labelme":
        found = read_labelme(path("annotations"))
    elif options.form == "yolo":
        found = read_yolo(path("annotations"), path("images"), _names(options.names))
    else:
        found = read_cvat(path("annotations"), path("images"))
    out = pathlib.Path(options.out)
    if (out / "data.jsonl").exists():
        raise ConfigError(f"--out={options.out}: holds data.jsonl already")
    count, bad = write(found, out, adaptive=options.adaptive, max_bad_fraction=options.max_bad_fraction)
    for line in bad:
        sys.stderr.write(f"left out: {line}\n")
    print(f"{count} records in {out / 'data.jsonl'}, {len(bad)} left out; --config.data.meta={out / 'meta.json'}")
    return 0


def command() -> None:
    """The installed command: `main`, with one line for bad input."""
    cli.run(main)


if __name__ == "__main__":
    command()
