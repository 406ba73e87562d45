"""Open-vocabulary segmentation of several classes at once: A-150, PC-59, PAS-20, and the command that builds them.

    python -m alto_jax.data.open_vocab a150 --images DIR --labels DIR --out DIR [--names FILE] [--seed 0]

In: the images and label maps of ADE20K (SceneParsing), PASCAL-Context-59 or VOC. Out: `{out}/{name}.jsonl` with lines
{"image", "mask", "description": [class, …], "ignore"?} and mask files; `OpenVocab` reads it as ReferringRecords.

A sample is the union of some classes of one image: of its n classes, a number in 1..min(n, max_classes) is drawn
and then that many classes (seeded by image name). Note: the paper's own draw is not published; the file keeps ours.
"""

import argparse
import json
import os
import pathlib
import re
from typing import Any
import zlib

import numpy as np

from alto_jax import cli
from alto_jax.config import write_whole
from alto_jax.data import bad_data
from alto_jax.data.fingerprint import Fingerprint
from alto_jax.data.images import open_image, open_labels
from alto_jax.data.masks import AUTO
from alto_jax.data.reading import AS_STORED, Reading
from alto_jax.data.split import image_name
from alto_jax.mllm import text

VOC_20 = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant "
    "sheep sofa train tvmonitor"
).split()
CONTEXT_59 = (
    "aeroplane bag bed bedclothes bench bicycle bird boat book bottle building bus cabinet car cat ceiling chair cloth "
    "computer cow cup curtain dog door fence floor flower food grass ground horse keyboard light motorbike mountain "
    "mouse person plate platform pottedplant road rock sheep shelves sidewalk sign sky snow sofa table track train "
    "tree truck tvmonitor wall water window wood"
).split()
# name: (class names or None if a file must give them, label values that are no class: {value: "background" | "ignore"})
LABEL_MAPS: dict[str, tuple[list[str] | None, dict[int, str]]] = {
    "a150": (None, {0: "ignore"}),
    "pc59": (CONTEXT_59, {0: "background", 255: "ignore"}),
    "pas20": (VOC_20, {0: "background", 255: "ignore"}),
}
MIN_PIXELS = 64  # Smaller regions of a class in an image are not asked for.


class OpenVocab:
    """Random access to ReferringRecords of a JSONL {"image", "mask", "description"}; paths are relative to it.

    Records have "ignore" uint8[H, W] in {0, 255} where the line names such a file: pixels without a label.
    """

    no_target = False

    def __init__(self, file: str | os.PathLike, *, reading: Reading = AS_STORED):
        self.file, self._reading = pathlib.Path(file), reading
        try:
            content = self.file.read_bytes()
        except OSError as error:
            raise ValueError(f"{file}: cannot be read: {error.strerror}") from error
        self._lines = [(n, line) for n, line in enumerate(content.splitlines(), 1) if line.strip()]
        if not self._lines:
            raise ValueError(f"{file} holds no line")

    def __len__(self) -> int:
        return len(self._lines)

    def fingerprint(self) -> str:
        """What the samples are, see fingerprint.py."""
        found, entries = Fingerprint(), []
        found.contents([self.file])
        for _, line in self._lines:
            try:
                entry = json.loads(line)
                entries.append({k: str(entry[k]) for k in ("image", "mask", "ignore") if entry.get(k)})
            except (ValueError, AttributeError):  # Counted and reported where the sample is read.
                continue
        found.sizes(self.file.parent / entry["image"] for entry in entries if "image" in entry)
        for name in ("mask", "ignore"):
            found.contents(self.file.parent / entry[name] for entry in entries if name in entry)
        return str(found)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, line = self._lines[index]
        where = f"{self.file} line {number}"
        try:
            entry = bad_data.parse_json(line, where)
            names = entry["description"]
            names = [names] if isinstance(names, str) else names
            paths = [str(self.file.parent / entry[field]) for field in ("image", "mask")]
            ignore = self.file.parent / entry["ignore"] if entry.get("ignore") else None
            if not names or not all(isinstance(name, str) and name.strip() for name in names):
                raise ValueError(f"description: expected class names, got {names!r:.60}")
        except bad_data.RecordError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise bad_data.RecordError(f"{where}: expected image, mask, description: {error!r}") from error
        try:
            photo = self._reading.photo(paths[0])
            record: dict[str, Any] = {"key": f"{self.file.stem}/{number}", "image": photo.image}
            record["phrase"] = text.join_classes(names)
            record["image_name"] = image_name(paths[0])
            record["mask"] = photo.mask(paths[1])
            if ignore is not None:
                record["ignore"] = photo.mask(ignore, AUTO)
        except ValueError as error:
            raise bad_data.at(where, error) from error
        return record


def read_names(path: str | os.PathLike) -> list[str]:
    """Class names, in order of label value: one a line, or ADE20K's objectInfo150.txt (the last column, its first
    synonym)."""
    lines = [line for line in pathlib.Path(path).read_text().splitlines() if line.strip()]
    if lines and "\t" in lines[0]:
        lines = [line.split("\t")[-1] for line in lines if line.split("\t")[0].strip().isdigit()]
    return [re.split(r"[,;]", line)[0].strip() for line in lines]


def build(
    name: str,
    images: str | os.PathLike,
    labels: str | os.PathLike,
    out: str | os.PathLike,
    *,
    names: list[str] | None = None,
    max_classes: int = 5,
    samples_per_image: int = 1,
    seed: int = 0,
    ids: list[str] | None = None,
) -> int:
    """Builds a merged multi-class set; the same arguments give the same files.

    Args:
      name: a150, pc59 or pas20.
      images, labels: folders of images (jpg or png) and label maps (png) with the same stems.
      out: folder that receives `{name}.jsonl` and `{name}/`.
      names: class names in order of label value 1, 2, …; required for a150.
      max_classes: most classes of a sample.
      samples_per_image: samples drawn of each image, with different classes where there are enough.
      seed: of the draws.
      ids: stems to use (a split file); None: all label maps.

    Returns:
      Number of samples.

    Raises:
      ValueError: missing folders or names, a label out of range or an image of another size; names the file.
    """
    from PIL import Image  # late: keeps the start fast

    images, labels, out = pathlib.Path(images), pathlib.Path(labels), pathlib.Path(out)
    default, special = LABEL_MAPS[name]
    names = names or default
    if not names:
        raise ValueError("--names: a150 needs the class names (ADE20K's objectInfo150.txt)")
    if max_classes < 1:
        raise ValueError(f"--max-classes: expected at least 1, got {max_classes}")
    maps = {path.stem: path for path in sorted(labels.glob("*.png"))}
    missing = [stem for stem in ids or () if stem not in maps]
    if missing:
        raise ValueError(f"--labels: {labels} lacks {len(missing)} label maps of the split, such as {missing[0]}.png")
    if not maps:
        raise ValueError(f"--labels: {labels} holds no label map (*.png)")
    (out / name).mkdir(parents=True, exist_ok=True)
    lines = []
    for stem in ids or maps:
        file = next((p for p in (images / f"{stem}.jpg", images / f"{stem}.png") if p.is_file()), None)
        if file is None:
            raise ValueError(f"--images: {images} holds no {stem}.jpg or .png for the label map {maps[stem]}")
        label = np.asarray(open_labels(maps[stem]))
        size = open_image(file).shape[:2]
        if size != label.shape:
            raise ValueError(
                f"{maps[stem]}: the label map is {label.shape[1]}x{label.shape[0]}, its image is {size[1]}x{size[0]}: "
                f"{file}"
            )
        values, counts = np.unique(label, return_counts=True)
        wrong = [int(v) for v in values if v > len(names) and int(v) not in special]
        if wrong:
            raise ValueError(f"{maps[stem]}: label {wrong[0]}, but there are {len(names)} classes")
        classes = [int(v) for v, n in zip(values, counts) if int(v) not in special and n >= MIN_PIXELS]
        if not classes:
            continue
        rng = np.random.default_rng((seed, zlib.crc32(stem.encode())))
        ignored = np.isin(label, [v for v, what in special.items() if what == "ignore"])
        drawn = set()
        for number in range(samples_per_image):
            count = int(rng.integers(1, min(len(classes), max_classes) + 1))
            chosen = tuple(sorted(rng.choice(classes, count, replace=False).tolist()))
            if chosen in drawn:
                continue
            drawn.add(chosen)
            mask = f"{name}/{stem}_{number}.png"
            Image.fromarray(np.isin(label, chosen)).save(out / mask)
            line: dict[str, Any] = {
                "image": os.path.relpath(file, out),
                "mask": mask,
                "description": [names[c - 1] for c in chosen],
            }
            if ignored.any():
                line["ignore"] = f"{name}/{stem}_ignore.png"
                Image.fromarray(ignored).save(out / line["ignore"])
            lines.append(json.dumps(line) + "\n")
    if not lines:
        raise ValueError(f"--labels: no class of at least {MIN_PIXELS} pixels in {labels}")
    write_whole(out / f"{name}.jsonl", "".join(lines))
    return len(lines)


def main() -> int:
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m alto_jax.data.open_vocab", description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=sorted(LABEL_MAPS))
    parser.add_argument("--images", required=True, metavar="DIR")
    parser.add_argument("--labels", required=True, metavar="DIR", help="label maps (png), same stems as the images")
    parser.add_argument("--out", required=True, metavar="DIR", help="e.g. DATA/open_vocab")
    parser.add_argument("--names", metavar="FILE", help="class names, one a line or objectInfo150.txt (a150: required)")
    parser.add_argument("--split", metavar="FILE", help="text file of the stems to use, one a line")
    parser.add_argument("--max-classes", type=int, default=5)
    parser.add_argument("--samples-per-image", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    cli.check_paths({f"--{name}": getattr(options, name) for name in ("images", "labels", "out", "names", "split")})
    count = build(
        options.name,
        options.images,
        options.labels,
        options.out,
        names=read_names(options.names) if options.names else None,
        max_classes=options.max_classes,
        samples_per_image=options.samples_per_image,
        seed=options.seed,
        ids=pathlib.Path(options.split).read_text().split() if options.split else None,
    )
    print(f"{count} samples in {pathlib.Path(options.out) / options.name}.jsonl")
    return 0


if __name__ == "__main__":
    cli.run(main)
