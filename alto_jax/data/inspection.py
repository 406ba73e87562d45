"""Looks at the files of a data set as it is published: what is there, and which files are missing or cut.

In: the place of a data set and its kind. Out: `Findings`: numbers by unit, and `Problem`s, each of one file. Annotation
files are parsed; every file that they name is looked for and seen to be whole by its end (a file that does not end as
its format does is decoded).
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
import dataclasses
import os
import pathlib
from typing import Any

import numpy as np

from alto_jax.data import bad_data, coco, files, images, reason_seg, refcoco_m
from alto_jax.data.chat_lines import find_lines
from alto_jax.data.index import FileNames

MOST_LOOKED_INTO = 200_000  # images of a data set that are opened; of more, as many evenly spread
_ENDS = {".jpg": b"\xff\xd9", ".jpeg": b"\xff\xd9", ".png": b"IEND"}
_TAIL = 4096  # bytes; some writers add to a JPEG's end
PICTURES = (".jpg", ".jpeg", ".png")


@dataclasses.dataclass(frozen=True, order=True)
class Problem:
    """A file that is not as it should be. what: "missing", "cut" or "damaged", with the reason."""

    path: pathlib.Path
    what: str


@dataclasses.dataclass
class Findings:
    """What is there: numbers by unit, the problems, and how many of the files that are named were looked into."""

    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    problems: list[Problem] = dataclasses.field(default_factory=list)
    looked_into: str = ""

    def look_into(self, paths: Iterable[pathlib.Path]) -> None:
        """Looks for files, each once; COCO's images under all of their names."""
        wanted = sorted(set(paths))
        some = wanted[:: max(1, -(-len(wanted) // MOST_LOOKED_INTO))]
        with ThreadPoolExecutor(8) as pool:
            found = pool.map(_problem_of, some)
        self.problems += [problem for problem in found if problem is not None]
        if len(some) < len(wanted):
            self.looked_into = f"{len(some):,} of {len(wanted):,} files looked into"


def _problem_of(path: pathlib.Path) -> Problem | None:
    found = coco.find_image(path)
    try:
        reason = cut(found)
    except FileNotFoundError:
        return Problem(path, "missing")
    except OSError as error:
        return Problem(path, f"damaged: {error.strerror}")
    return Problem(found, reason) if reason else None


def cut(path: pathlib.Path) -> str:
    """Why an image or mask file is not whole, "" if it is."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - _TAIL, 0))
        tail = file.read()
    if not size:
        return "cut: a file of 0 bytes"
    if _ENDS.get(path.suffix.lower(), b"") in tail:
        return ""
    try:
        images.load(path).image.load()
    except ValueError as error:
        return f"cut: {bad_data.one_line(error)}"
    return ""


def inspect(kind: str, root: pathlib.Path, place: pathlib.Path) -> Findings:
    """Looks at a data set of a kind (one of KINDS) that lies at `place`, below the data folder `root`."""
    found = Findings()
    try:
        KINDS[kind](root, place, found)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = bad_data.one_line(error) if isinstance(error, ValueError) else f"not as published: {error!r}"
        found.problems.append(Problem(place, f"damaged: {reason}"))
    return found


def _count(found: Findings, unit: str, of: Iterable[Any]) -> None:
    found.counts[unit] = found.counts.get(unit, 0) + sum(1 for _ in of)


def _train2014(root: pathlib.Path) -> pathlib.Path | None:
    """The folder of COCO's training images; None: it is missed where it is listed itself."""
    try:
        return coco.image_folder(root, None)
    except ValueError:
        return None


def _val2014(root: pathlib.Path) -> pathlib.Path | None:
    return next((root / folder for folder in coco.VAL_FOLDERS if (root / folder).is_dir()), None)


def _images(root: pathlib.Path, place: pathlib.Path, found: Findings) -> None:
    with os.scandir(place) as entries:
        _count(found, "images", (entry for entry in entries if entry.name.lower().endswith(PICTURES)))


def _refer(root: pathlib.Path, place: pathlib.Path, found: Findings) -> None:
    entries = files.load_json(place) if place.suffix == ".json" else files.load_pickle(place)
    images_of: dict[str, set[Any]] = {}
    for entry in entries:
        split = entry["split"]
        _count(found, f"{split} expressions", entry["sentences"])
        _count(found, f"{split} referents", (entry,))
        images_of.setdefault(split, set()).add(entry["image_id"])
    found.counts |= {f"{split} images": len(ids) for split, ids in images_of.items()}


def _instances(root: pathlib.Path, place: pathlib.Path, found: Findings) -> None:
    content, folder = files.load_json(place, dict), _train2014(root)
    _count(found, "annotations", content["annotations"])
    _count(found, "images", content["images"])
    if folder is not None:
        found.look_into(folder / image["file_name"] for image in content["images"])


def _refcocom(root: pathlib.Path, place: pathlib.Path, found: Findings) -> None:
    entries, folder = files.load_json(place), _train2014(root)
    _count(found, "referents", entries)
    masks = place.parents[1] / "masks"
    found.look_into(masks / f"{entry['segment_id']}.png" for entry in entries)
    if folder is not None:
        found.look_into(folder / entry["img_name"] for entry in entries)


def _open_vocab(root: pathlib.Path, place: pathlib.Path, found: Findings) -> None:
    lines = [bad_data.parse_json(line, f"{place} line {n}") for n, line in _lines(place)]
    _count(found, "samples", lines)
    found.look_into(
        place.parent / line[name] for line in lines for name in ("image", "mask", "ignore") if line.get(name)
    )


def _lines(place: pathlib.Path) -> Iterator[tuple[int, bytes]]:
    return ((number, line) for number, line in enumerate(place.read_bytes().splitlines(), 1) if line.strip())


def _pope(root: pathlib.Path, place: pathlib.Path, found: Findings) -> None:
    lines, folder = [bad_data.parse_json(line, f"{place} line {n}") for n, line in _lines(place)], _val2014(root)
    _count(found, "questions", lines)
    if folder is not None:
        found.look_into(folder / line["image"] for line in lines)


def _vqa_questions(root: pathlib.Path, place: pathlib.Path, found: Findings) -> None:
    questions, folder = files.load_json(place, dict)["questions"], _val2014(root)
    _count(found, "questions", questions)
    if folder is not None:
        found.look_into(folder / f"COCO_val2014_{question['image_id']:012d}.jpg" for question in questions)


def _vqa_annotations(root: pathlib.Path, place: pathlib.Path, found: Findings) -> None:
    _count(found, "answers", files.load_json(place, dict)["annotations"])


def _mme(root: pathlib.Path, place: pathlib.Path, found: Findings) -> None:
    categories = {text.parent if text.parent.name != "questions_answers_YN" else text.parents[1]
                  for text in place.rglob("*.txt") if not text.name.startswith(".")}  # fmt: skip
    _count(found, "categories", categories)
    for category in sorted(categories):
        folder = category / "images" if (category / "images").is_dir() else category
        pictures = {file.stem: file for file in folder.iterdir() if file.suffix.lower() in PICTURES}
        texts = {file.stem: file for file in category.rglob("*.txt") if not file.name.startswith(".")}
        suffix = next(iter(pictures.values())).suffix if pictures else ".jpg"
        found.look_into(pictures.get(stem, folder / f"{stem}{suffix}") for stem in texts)
        beside = next(iter(texts.values())).parent
        found.problems += [
            Problem(beside / f"{stem}.txt", "missing") for stem in sorted(pictures.keys() - texts.keys())
        ]
        for text in texts.values():
            _count(found, "questions", _lines(text))


def _pairs(place: pathlib.Path, prefix: str, found: Findings) -> None:
    """Images and annotation files of the same names, in folders of any depth."""
    annotations, pictures = FileNames(place, prefix, ".json"), FileNames(place, prefix, ".jpg")
    _count(found, "images", range(len(pictures)))
    # Note: by their hashes, since the paths of 11 million files would take gigabytes.
    for names, others, suffix in ((annotations, pictures, ".jpg"), (pictures, annotations, ".json")):
        alone = np.flatnonzero(~np.isin(names.hashes(), others.hashes()))
        found.problems += [Problem(names[int(i)].with_suffix(suffix), "missing") for i in alone]
    step = max(1, -(-len(pictures) // MOST_LOOKED_INTO))
    found.look_into(pictures[::step])
    for file in annotations[::step]:
        try:
            reason_seg.read(file)
        except ValueError as error:
            found.problems.append(Problem(file, f"damaged: {bad_data.one_line(error)}"))
    if step > 1:
        found.looked_into = f"one in {step} files looked into"


def _conversations(root: pathlib.Path, place: pathlib.Path, found: Findings) -> None:
    for name, entry in files.load_json(place, dict).items():
        folder = place.parent / entry["root"]
        candidates = (folder / entry["annotation"], place.parent / entry["annotation"])
        file = next((candidate for candidate in candidates if candidate.is_file()), None)
        if file is None:
            found.problems.append(Problem(candidates[0], "missing"))
            continue
        lines, named = find_lines(file), []
        found.counts[f"{name} records"] = len(lines.kinds)
        if entry.get("length") not in (None, len(lines.kinds)):
            found.problems.append(Problem(file, f"wrong count: {len(lines.kinds):,} records, length {entry['length']}"))
        for row in lines.usable():
            try:
                record = lines.read(int(row))[1]
            except ValueError as error:
                found.problems.append(Problem(file, f"damaged: {bad_data.one_line(error)}"))
                continue
            named += [folder / path for path in (*record["images"], *record["mask"])]
        found.look_into(named)


def _refcoco_m(root: pathlib.Path, place: pathlib.Path, found: Findings) -> None:
    folder, tables = _train2014(root), refcoco_m.tables_of(place)
    for table in tables:
        rows = refcoco_m.read_rows(table)
        _count(found, "images", rows)
        samples = [sample for row in rows for sample in row["samples"] or ()]
        _count(found, "referents", samples)
        _count(found, "expressions", [sentence for sample in samples for sentence in sample["sentences"]])
        if folder is not None:
            found.look_into(folder / row["file_name"] for row in rows)


def _mask_perception(root: pathlib.Path, place: pathlib.Path, found: Findings) -> None:
    entries, folder = files.load_json(place), _train2014(root)
    _count(found, "questions", entries)
    found.look_into(place.parent / entry["mask"] for entry in entries)
    if folder is not None:
        found.look_into(folder / pathlib.PurePosixPath(entry["image"]).name for entry in entries)


def _psalm(root: pathlib.Path, place: pathlib.Path, found: Findings) -> None:
    entries, folder = files.load_json(place), _train2014(root)
    split = place.stem.removesuffix("_psalm").rpartition("_")[2]
    for entry in entries:
        _count(found, f"{split} expressions", entry["instruction"])
    if folder is not None:
        found.look_into(folder / entry["image_info"]["file_name"] for entry in entries)


KINDS: dict[str, Callable[[pathlib.Path, pathlib.Path, Findings], None]] = {
    "images": _images,
    "refer": _refer,
    "psalm": _psalm,
    "instances": _instances,
    "refcocom": _refcocom,
    "open_vocab": _open_vocab,
    "pope": _pope,
    "vqa_questions": _vqa_questions,
    "vqa_annotations": _vqa_annotations,
    "mme": _mme,
    "sa1b": lambda root, place, found: _pairs(place, "sa_", found),
    "reason_seg": lambda root, place, found: _pairs(place, "", found),
    "refcoco_m": _refcoco_m,
    "mask_perception": _mask_perception,
    "conversations": _conversations,
}
