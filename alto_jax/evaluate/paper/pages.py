"""Pages of answers like Figures 4, 5 and 9 of the paper: image, target, the mask of all tokens, the adaptive one.

What the paper's pages show is pictures without numbers; ours take samples by the lengths of their answers, from the
shortest to the longest, whatever their IoU.
"""

from collections.abc import Callable, Mapping, Sequence
import pathlib
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from alto_jax import figures, report
from alto_jax.config import ConfigError
from alto_jax.data.source import Records
from alto_jax.evaluate import gallery, results
from alto_jax.evaluate.paper.curves import save
from alto_jax.evaluate.paper.published import MULTI_TARGET
from alto_jax.mllm.boxes import parse_boxes

# Figure → benchmarks whose answers it shows.
PAGES = {
    4: (MULTI_TARGET,),
    5: ("refcoco_val", "grefcoco_val"),
    9: ("refcocom_val_object_part", "a150", "pc59", "pas20"),
}
ROWS = 6  # of a page, shared among its benchmarks (at least two each)
LIMIT = 64  # answers of a benchmark among which its rows are chosen, where --limit does not say
_SIDE = 320  # pixels of the longer side of a picture
_BOX_COLOR = (230, 159, 0)


def write(
    stem: pathlib.Path,
    out: pathlib.Path,
    tasks: Mapping[str, Mapping[str, Any]],
    open_records: Callable[[str, Mapping[str, Any]], Records | None],
) -> None:
    """Writes a page from finished evaluations by fixed and adaptive length.

    Args:
      stem: of the page's files, STEM.png, STEM.svg and STEM.csv.
      out: the directory of the evaluation.
      tasks: task name → what metrics.json says of it; those by fixed and adaptive length are shown.
      open_records: (task, header) → the records of its benchmark; None: they are not there, and left out.

    Raises:
      ConfigError: a benchmark has answers of one length alone.
    """
    by_mode: dict[str, dict[str, str]] = {}
    for name, task in tasks.items():
        by_mode.setdefault(task["benchmark"], {})[task["mode"]] = name
    each = max(2, ROWS // max(len(by_mode), 1))
    strips, captions, rows = [], [], []
    for benchmark, names in by_mode.items():
        if lacking := {"fixed", "adaptive"} - names.keys():
            raise ConfigError(f"--out: {out} has no results of {benchmark} by {lacking.pop()} length; finish the "
                              "evaluation first")  # fmt: skip
        read = {mode: results.read_results(results.result_path(out, name)) for mode, name in names.items()}
        header, lines = read["adaptive"]
        records = open_records(names["adaptive"], header)
        if records is None:
            continue
        fixed = {line["index"]: line for line in read["fixed"][1] if "error" not in line}
        for line in by_length([line for line in lines if line.get("index") in fixed and "error" not in line], each):
            record = records[line["index"]]
            shown = [(mode, one, gallery.sample(one, one["iou"], record, header["num_latent_tokens"]))
                     for mode, one in (("fixed", fixed[line["index"]]), ("adaptive", line))]  # fmt: skip
            strips.append(_cells(line["phrase"], [sample for _, _, sample in shown]))
            captions.append(f"{benchmark}: {_caption(line['phrase'])}")
            numbers = {f"{mode} {name}": one[key] for mode, one, _ in shown
                       for name, key in (("tokens", "length"), ("iou", "iou"))}  # fmt: skip
            rows.append({"benchmark": benchmark, "index": line["index"], "key": line["key"],
                         "phrase": line["phrase"], **numbers})  # fmt: skip
    if rows:
        save(figures.strip_figure(strips, captions), rows, stem)


def by_length(lines: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """`count` lines from the shortest answer to the longest, evenly spaced; those with a well-formed mask first."""
    good = [line for line in lines if line["valid"] and line["target_pixels"]] or list(lines)
    ordered = sorted(good, key=lambda line: (line["length"], line["index"]))
    places = np.unique(np.linspace(0, len(ordered) - 1, min(count, len(ordered))).round().astype(int))
    return [ordered[place] for place in places]


def _cells(phrase: str, samples: Sequence[report.ReportSample]) -> list[tuple[str, np.ndarray]]:
    """Image (with the boxes of the request), target, and the answers of a sample as titled pictures."""
    first = samples[0]
    assert first.target is not None  # Note: `gallery.sample` always gives one.
    cells = [("image", _with_boxes(first.image, parse_boxes(phrase)))]
    cells.append(("target", report.overlay(first.image, first.target, report.TARGET_COLOR)))
    for sample in samples:
        title = f"{sample.length} token{'s' * (sample.length != 1)}, IoU {sample.iou:.2f}"
        cells.append((title, report.overlay(sample.image, sample.prediction)))
    return [(title, _small(pixels)) for title, pixels in cells]


def _with_boxes(image: np.ndarray, boxes: Sequence[tuple[float, float, float, float]]) -> np.ndarray:
    picture = Image.fromarray(image)
    width, height = picture.size
    for x1, y1, x2, y2 in boxes:
        corners = [round(c) for c in (x1 * (width - 1), y1 * (height - 1), x2 * (width - 1), y2 * (height - 1))]
        ImageDraw.Draw(picture).rectangle(corners, outline=_BOX_COLOR, width=max(1, max(width, height) // 120))
    return np.asarray(picture)


def _small(pixels: np.ndarray) -> np.ndarray:
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    return np.asarray(image)


def _caption(phrase: str) -> str:
    """A request in a few words."""
    boxes = parse_boxes(phrase)
    words = f"{len(boxes)} box{'es' * (len(boxes) != 1)}" if boxes else phrase
    return words if len(words) <= 90 else f"{words[:89]}…"
