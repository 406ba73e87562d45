"""Predicted masks as COCO results, one JSON a benchmark, which pycocotools' `COCO.loadRes` takes."""

from collections.abc import Mapping, Sequence
import json
from typing import Any

_BESIDE = ("index", "key", "phrase", "file_name")
_LARGEST = 2**53  # JSON's whole numbers, as most readers keep them.


def image_ids(lines: Sequence[Mapping[str, Any]]) -> list[int]:
    """A number for the image of each sample: COCO's own where all images have one for a name, else 1, 2, … in order.

    Names that differ and are one number ("7", "007") are counted, too.
    """
    names = [str(line["image"]) for line in lines]
    if all(name.isascii() and name.isdigit() and int(name) < _LARGEST for name in names):
        found = [int(name) for name in names]
        if len(set(found)) == len(set(names)):
            return found
    numbers: dict[str, int] = {}
    return [numbers.setdefault(name, len(numbers) + 1) for name in names]


def coco_results(lines: Sequence[Mapping[str, Any]]) -> str:
    """The text of a COCO-results JSON: an entry a predicted mask, none for samples whose answer has none.

    Entries have image_id (see `image_ids`), category_id 1, segmentation and score (the line's, else 1), and beside
    these the sample's "index", "key", "phrase" and, where it has one, "file_name", since several may be of one image.
    """
    entries, good = [], [line for line in lines if "error" not in line]
    for line, image_id in zip(good, image_ids(good)):
        if line["mask"] is not None:
            entry = {"image_id": image_id, "category_id": 1, "segmentation": line["mask"],
                     "score": line.get("score", 1.0)}  # fmt: skip
            entries.append(json.dumps(entry | {k: line[k] for k in _BESIDE if k in line}))
    return "[\n" + ",\n".join(entries) + "\n]\n" if entries else "[]\n"
