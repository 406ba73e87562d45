"""The tables of an evaluation in Markdown, laid out as the paper's, and its plots.

In: `metrics.json`'s tasks. Out: text; a column a benchmark, a row a model and protocol, values in percent with half
the width of the bootstrap 95 % interval. The paper's rows stand beside ours (paper/published.py); others can be given
as a file (--paper-rows), since no figure is ever filled in from memory.
"""

from collections.abc import Callable, Mapping, Sequence
import pathlib
from typing import Any

from alto_jax import figures
from alto_jax.config import write_whole
from alto_jax.data.masks import AUTO
from alto_jax.evaluate.paper import published

# family: (title, [(column title, metric)] for each benchmark, benchmark → heading)
LAYOUTS: dict[str, tuple[str, Sequence[tuple[str, str]], Mapping[str, str]]] = {
    "refcoco": (
        "Referring expression segmentation (RefCOCO, RefCOCO+, RefCOCOg)",
        (("cIoU", "ciou"),),
        {
            "refcoco_val": "RefCOCO val", "refcoco_testA": "RefCOCO testA", "refcoco_testB": "RefCOCO testB",
            "refcoco+_val": "RefCOCO+ val", "refcoco+_testA": "RefCOCO+ testA", "refcoco+_testB": "RefCOCO+ testB",
            "refcocog_val": "RefCOCOg val", "refcocog_test": "RefCOCOg test",
        },
    ),
    "grefcoco": (
        "Generalised referring expression segmentation (gRefCOCO)",
        (("cIoU", "ciou"), ("gIoU", "giou"), ("N-acc", "n_acc"), ("T-acc", "t_acc")),
        {"grefcoco_val": "val", "grefcoco_testA": "testA", "grefcoco_testB": "testB"},
    ),
    "refcocom": (
        "Parts and objects (RefCOCOm)",
        (("mIoU", "giou"), ("cIoU", "ciou")),
        {f"refcocom_{s}_{p}": f"{s} {w}" for s in ("val", "testA", "testB")
         for p, w in (("part_only", "part"), ("object_part", "object & part"))},
    ),
    "open_vocab": (
        "Open-vocabulary segmentation of several classes",
        (("gIoU", "giou"), ("cIoU", "ciou")),
        {"a150": "A-150", "pc59": "PC-59", "pas20": "PAS-20"},
    ),
    "multi_target_sa1b": (
        "Several targets named by their boxes (Multi-Target-SA1B)",
        (("gIoU", "giou"), ("cIoU", "ciou")),
        {"multi_target_sa1b_val": "val"},
    ),
    "scenes": ("Built-in held-out scenes", (("gIoU", "giou"), ("cIoU", "ciou")), {"scenes": "scenes"}),
    "reasonseg": (
        "Reasoning segmentation (ReasonSeg)",
        (("gIoU", "giou"), ("cIoU", "ciou")),
        {"reasonseg_val": "val", "reasonseg_test": "test"},
    ),
    "refcoco-m": (
        "RefCOCO val with exact masks (RefCOCO-M)",
        (("cIoU", "ciou"), ("gIoU", "giou")),
        {"refcoco-m_val": "val"},
    ),
    "rec": (
        "Referring comprehension (boxes of RefCOCO, RefCOCO+, RefCOCOg)",
        (("P@0.5", "box_precision@0.5"),),
        {f"rec_{d}_{s}": f"{n} {s}" for d, n, splits in (("refcoco", "RefCOCO", ("val", "testA", "testB")),
                                                         ("refcoco+", "RefCOCO+", ("val", "testA", "testB")),
                                                         ("refcocog", "RefCOCOg", ("val", "test"))) for s in splits},
    ),
    "mask_perception": ("Mask perception", (("accuracy", "accuracy"),), {"mask_perception": "Mask Perception"}),
    "pope": (
        "POPE",
        (("accuracy", "accuracy"), ("precision", "precision"), ("recall", "recall"), ("F1", "f1")),
        {"pope_random": "random", "pope_popular": "popular", "pope_adversarial": "adversarial"},
    ),
    "vqav2": ("VQAv2", (("VQA accuracy", "vqa_accuracy"),), {"vqav2_val": "val"}),
    "mme": ("MME", (("perception", "perception"), ("cognition", "cognition")), {"mme": "MME"}),
}  # fmt: skip
_POINTS = ("perception", "cognition")  # Sums of points, no fractions.
# A tokenizer is trained with image features or without; those of one that has them can be withheld when it decodes.
_PARTS = {
    "with_features": "with image features",
    "features_withheld": "image features withheld at inference (trained with them)",
    "without_features": "without image features",
}
TOKEN_COUNTS = (1, 2, 4, 8, 16, 24, 32)


def markdown(tasks: Mapping[str, Mapping[str, Any]], title: str, paper: Mapping[str, Sequence[Mapping]] = {}) -> str:  # noqa: B006
    """All tables for which there are results.

    Args:
      tasks: task name → family, benchmark, options and metrics.
      title: name of our rows.
      paper: family → rows {"row": name, "benchmark" or "benchmark metric": value in percent}.
    """
    parts = [f"# Evaluation of {title}\n", "Values in percent, ± half the width of the bootstrap 95 % interval.\n"]
    for family, (heading, columns, names) in LAYOUTS.items():
        mine = [t for t in tasks.values() if t["family"] == family]
        if mine:
            given = [{**row, "row": f"{row['row']} (given)"} for row in paper.get(family, ())]
            rows = [*published.family_rows(family), *given]
            parts.append(_family_table(heading, columns, names, mine, title, rows))
            parts += [f"{note}\n" for note in published.family_notes(family)]
    reconstruction = [t for t in tasks.values() if t["family"] == "tokenizer"]
    if reconstruction:
        parts.append(_reconstruction_table(reconstruction, title, paper.get("tokenizer", ())))
        printed = "; ".join(f"{name}, {values[0]}" for name, values in published.TABLES[7].rows())
        parts.append(f"The paper's Table 7 (gIoU; data and number of tokens not stated beside it): {printed}.\n")
    parts += [_classes_table(name, t, title) for name, t in tasks.items() if t.get("by_class")]
    masks = {
        name: t for name, t in tasks.items() if "precision@0.7" in t or "lengths" in t and t["family"] != "tokenizer"
    }
    if masks:
        parts.append(_details_table(masks))
    return "\n".join(parts)


def given_columns() -> dict[str, set[str]]:
    """Family → the names of values that a given row of its table may hold (`markdown`, paper)."""
    found = {"tokenizer": {*map(str, range(1, 1025)), "adaptive", "tokens"}}
    for family, (_, columns, names) in LAYOUTS.items():
        found[family] = {f"{name} {metric}" for name in names for _, metric in columns}
        found[family] |= set(names) if len(columns) == 1 else set()
    return found


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are numbers."""
    line = lambda cells: "| " + " | ".join(cells) + " |\n"
    return line(header) + line(["---", *["---:"] * (len(header) - 1)]) + "".join(map(line, rows))


def _cell(task: Mapping[str, Any] | None, metric: str) -> str:
    """A value with half its interval; "–" where there is none."""
    value = None if task is None else task.get(metric)
    if task is None or value is None:
        return "–"
    if metric in _POINTS:
        return f"{value:.1f}"
    interval = task.get("intervals", {}).get(metric)
    return f"{100 * value:.1f}" + (f" ± {50 * (interval[1] - interval[0]):.1f}" if interval else "")


def _row_name(task: Mapping[str, Any], title: str) -> str:
    """Our row's name, with everything that its numbers were made by."""
    mode = [f"{task['mode']} tokens" if task["mode"].isdigit() else task["mode"]] if "mode" in task else []
    named = [*mode, *([task["protocol"]] if "protocol" in task else []), *protocol_flags(task)]
    return f"{title} ({', '.join(named)})" if named else title


def grouped(
    tasks: Sequence[Mapping[str, Any]], name_of: Callable[[Mapping[str, Any]], str]
) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """Rows of tasks that were made in the same way, with their names.

    A limit is no difference where it leaves no sample out; it is named where it leaves some out of one of them.
    """
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for task in tasks:
        rows.setdefault(name_of({**task, "limit": 0}), []).append(task)
    limit = lambda group: max(task.get("limit", 0) for task in group)
    return [(name_of({**group[0], "limit": limit(group)}), group) for group in rows.values()]


def protocol_flags(task: Mapping[str, Any]) -> list[str]:
    """What of a task's protocol is not the plain one, in words."""
    flags = {
        "grammar": task.get("grammar"),
        "forced prefix": task.get("forced_prefix"),
        f"end bias {task.get('end_bias', 0):+g}": task.get("end_bias"),
        "reference scoring": task.get("scoring") == "reference",
        f"empty below {task.get('min_pixels')} px": task.get("min_pixels"),
        f"{task.get('quantize')} weights": task.get("quantize"),
        f"up to {task.get('max_tiles')} tiles": task.get("max_tiles"),
        f"first {task.get('limit')} samples": task.get("limit"),
        f"exif {task.get('exif')}": task.get("exif", "stored") != "stored",
        f"mask rule {task.get('mask_rule')}": task.get("mask_rule", AUTO) != AUTO,
    }
    return [name for name, is_set in flags.items() if is_set]


def _family_table(
    heading: str,
    columns: Sequence[tuple[str, str]],
    names: Mapping[str, str],
    tasks: Sequence[Mapping[str, Any]],
    title: str,
    paper: Sequence[Mapping[str, Any]],
) -> str:
    present = [name for name in names if any(t["benchmark"] == name for t in tasks)]
    header = ["model"] + [f"{names[n]} {c}" for n in present for c, _ in columns]
    rows = []
    for given in paper:
        values = [
            given.get(f"{n} {m}", given.get(n) if len(columns) == 1 else None) for n in present for _, m in columns
        ]
        if any(v is not None for v in values):
            rows.append([given["row"]] + ["–" if v is None else str(v) for v in values])
    for row, group in grouped(tasks, lambda task: _row_name(task, title)):
        by_name = {task["benchmark"]: task for task in group}
        rows.append([row] + [_cell(by_name.get(n), metric) for n in present for _, metric in columns])
    return f"## {heading}\n\n{table(header, rows)}"


def _reconstruction_table(tasks: Sequence[Mapping[str, Any]], title: str, paper: Sequence[Mapping[str, Any]]) -> str:
    counts = [k for k in TOKEN_COUNTS if any(str(k) in _first_part(t)["giou_by_tokens"] for t in tasks)]
    full = max(len(_first_part(t)["giou_by_tokens"]) for t in tasks)
    counts = sorted({*counts, full})
    rows = [[f"{given['row']} (given)"] + [str(given.get(str(k), "–")) for k in (*counts, "adaptive", "tokens")]
            for given in paper]  # fmt: skip
    for task in tasks:
        for part, words in _PARTS.items():
            if part in task:
                by = task[part]["giou_by_tokens"]
                name = ", ".join([title, task["benchmark"], words, *protocol_flags(task)])
                cells = [f"{100 * by[str(k)]:.1f}" if str(k) in by else "–" for k in counts]
                low, high = task[part]["intervals"]["adaptive"]
                adaptive = f"{100 * task[part]['giou_adaptive']:.1f} ± {50 * (high - low):.1f}"
                rows.append([name, *cells, adaptive, f"{task['lengths']['mean']:.1f}"])
    header = ["tokenizer alone (gIoU)", *[f"{k} tokens" for k in counts], "adaptive", "mean tokens"]
    return f"## Mask reconstruction (Table 7, Figure 8)\n\n{table(header, rows)}"


def _first_part(task: Mapping[str, Any]) -> Mapping[str, Any]:
    return task.get("with_features") or task["without_features"]


def _details_table(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    metrics = (("Pr@0.7", "precision@0.7"), ("Pr@0.8", "precision@0.8"), ("Pr@0.9", "precision@0.9"),
               ("boundary IoU", "biou"), ("well-formed", "format_rate"),
               ("several masks", "several_masks_rate"))  # fmt: skip
    header = ["task", "samples", "images", *[c for c, _ in metrics], "mean tokens", "std", "left out"]
    rows = []
    for name, task in tasks.items():
        lengths = task.get("lengths")
        tokens = [f"{lengths['mean']:.1f}", f"{lengths['std']:.1f}"] if lengths else ["–", "–"]
        cells = [_cell(task, metric) for _, metric in metrics]
        named = ", ".join([name, *protocol_flags(task)])
        counts = [f"{int(task['num_samples'])}", f"{task['num_images']}"]
        rows.append([named, *counts, *cells, *tokens, str(task["num_skipped"])])
    return f"## Details\n\n{table(header, rows)}"


def _classes_table(name: str, task: Mapping[str, Any], title: str) -> str:
    rows = [
        [label, str(numbers["num_samples"]), f"{100 * numbers['giou']:.1f}", f"{100 * numbers['ciou']:.1f}"]
        for label, numbers in task["by_class"].items()
    ]
    what = f"Over the samples that ask for a class, alone or with others: {_row_name(task, title)}."
    return f"## Classes of {name}\n\n{what}\n\n{table(['class', 'samples', 'gIoU', 'cIoU'], rows)}"


def timing_markdown(tasks: Mapping[str, Mapping], timing: Mapping[str, Mapping], title: str) -> str:
    """Mean tokens, seconds per sample (alone, in batches) and tokens per second, with the paper's beside ours."""
    rows = [
        [
            f"{method}, gRefCOCO {split}, paper",
            "A100 80GB",
            str(tokens),
            f"{seconds} s (batch not stated)",
            "–",
            "–",
            "–",
        ]
        for method, split, tokens, seconds in published.times()
    ]
    for name, times in timing.items():
        lengths, batch, single = tasks[name].get("lengths"), times.get("batch"), times.get("single")
        cells = [
            f"{', '.join([title, name, *protocol_flags(tasks[name])])}",
            times.get("device", "–"),
            f"{lengths['mean']:.1f}" if lengths else "–",
            f"{single['seconds_per_sample']:.4f} s" if single else "–",
            f"{batch['seconds_per_sample']:.4f} s" if batch else "–",
            f"{times['batch_size']}" if batch else "–",
            f"{batch['tokens_per_second']:.1f}" if batch and batch["tokens_per_second"] else "–",
        ]
        rows.append(cells)
    header = ["model", "device", "mean tokens", "one at a time", "in batches, per sample", "of", "tokens per second"]
    note = (
        "Seconds of the device from request to answer, compiled and warmed up before, without reading and scoring. One"
        " at a time: each device has one sample. In batches: the time of a batch over its samples."
    )
    return f"# Time of {title}\n\n{note}\n\n{table(header, rows)}"


def plots(tasks: Mapping[str, Mapping[str, Any]], max_length: int, out: pathlib.Path) -> list[pathlib.Path]:
    """IoU against tokens, histogram of lengths, IoU by length, as PNG files; none without matplotlib."""
    curves, points, by_length, lengths = {}, {}, {}, {}
    for name, task in tasks.items():
        if task["family"] == "tokenizer":
            for part, words in _PARTS.items():
                if part in task:
                    label = f"{name}, {words.partition(' at ')[0]}"
                    curves[label] = task[part]["giou_by_tokens"]
                    points[f"{label}, adaptive"] = (task["lengths"]["mean"], task[part]["giou_adaptive"])
        if task.get("giou_by_length"):
            by_length[name] = task["giou_by_length"]
            points[name] = (task["lengths"]["mean"], task["giou"])
        if task.get("lengths"):
            histogram = task["lengths"]["histogram"]
            lengths[name] = [k for k, count in enumerate(histogram) for _ in range(count)]
    try:
        drawn = {}
        if curves or points:
            drawn["iou_against_tokens.png"] = figures.iou_curve_figure(curves, points)
        if by_length:
            drawn["iou_by_length.png"] = figures.iou_curve_figure(by_length)
        if lengths:
            drawn["lengths.png"] = figures.length_histogram_figure(lengths, max_length)
    except ImportError as error:
        print(f"no plots: {error}")
        return []
    written = []
    for name, figure in drawn.items():
        write_whole(out / name, figures.figure_bytes(figure))
        written.append(out / name)
    return written
