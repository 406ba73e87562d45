"""The paper's printed numbers (assets/paper/tables.json) and the layout of its tables, as plain data.

ALTo, NeurIPS 2025, Tables 2 to 7: a column is a benchmark and a metric, a row a method. Nothing here is measured, and
nothing is filled in: a cell that the paper leaves empty is None.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import json
import pathlib
from typing import Any

FILE = pathlib.Path(__file__).parents[2] / "assets" / "paper" / "tables.json"
SECONDS = "seconds"  # "metric" of a column of times
FIXED, ADAPTIVE = "FL", "AL"  # The paper's words for the length of an answer.
MODES = {"fixed": FIXED, "adaptive": ADAPTIVE}
PIXELS = {True: "yes", False: "no"}
# The validation sets of Figures 4 and 7, and what the mask tokenizer alone is measured on (Table 7, Figure 8).
MULTI_TARGET = "multi_target_sa1b_val"
RECONSTRUCTION = f"tokenizer_{MULTI_TARGET}"
FIGURE_7_SETS = {MULTI_TARGET: "Multi-Target-SA1B", "grefcoco_val": "gRefCOCO", "a150": "A-150"}


@dataclasses.dataclass(frozen=True)
class Column:
    """A column: its heading, the benchmark and metric that fill it (as in metrics.json), its place in the paper's row.

    metric: a fraction that is shown in percent, "length" (mean tokens) or SECONDS (per sample).
    """

    heading: str
    benchmark: str
    metric: str
    place: tuple[str, ...]

    def published(self, row: Mapping[str, Any]) -> float | None:
        """The number of a row of the paper; None where it has none."""
        value: Any = row
        for name in self.place:
            value = value[name]
        return value


@dataclasses.dataclass(frozen=True)
class PaperTable:
    """A table of the paper: number, title, key in the file of numbers, family of its benchmarks (as in tables.py),
    columns, and remarks on what the paper does not say."""

    number: int
    title: str
    key: str
    family: str
    columns: tuple[Column, ...]
    notes: tuple[str, ...] = ()

    @property
    def benchmarks(self) -> tuple[str, ...]:
        """The benchmarks that fill it, in the order of its columns."""
        return tuple(dict.fromkeys(column.benchmark for column in self.columns))

    def rows(self) -> list[tuple[str, list[float | None]]]:
        """The paper's rows: (method, a number or None for each column)."""
        found = []
        for row in numbers()[self.key]:
            name = row["method"] if "method" in row else f"pixel encoder: {PIXELS[row['pixel_encoder']]}"
            found.append((name, [column.published(row) for column in self.columns]))
        return found


@functools.cache
def numbers() -> dict[str, Any]:
    """What the file of the paper's numbers holds."""
    return json.loads(FILE.read_text(encoding="utf-8"))


_SPLITS = ("val", "testA", "testB")
_REFERRING = (*(f"refcoco_{s}" for s in _SPLITS), *(f"refcoco+_{s}" for s in _SPLITS), "refcocog_val", "refcocog_test")
_PARTS = (("part", "part_only", "Part"), ("obj_part", "object_part", "Obj & Part"))
_SETS = {"A-150": "a150", "PC-59": "pc59", "PAS-20": "pas20"}
_UNSAID = "The paper does not name the metric of this table beside it; ours is {}."


def _heading(benchmark: str) -> str:
    name, _, split = benchmark.partition("_")
    return f"{name.replace('refcoco', 'RefCOCO')} {split}"


TABLES: dict[int, PaperTable] = {
    table.number: table
    for table in (
        PaperTable(
            2,
            "Generalised referring expression segmentation (gRefCOCO)",
            "table2_grefcoco",
            "grefcoco",
            tuple(
                Column(f"{split} {name}", f"grefcoco_{split}", metric, (split, name))
                for split in _SPLITS
                for name, metric in (("cIoU", "ciou"), ("gIoU", "giou"), ("length", "length"))
            ),
        ),
        PaperTable(
            3,
            "Seconds per sample (gRefCOCO)",
            "table3_seconds_per_sample_grefcoco",
            "grefcoco",
            tuple(Column(split, f"grefcoco_{split}", SECONDS, (split,)) for split in _SPLITS),
            ("The paper's batch is not stated; its hardware section names an A100 with 80 GB.",),
        ),
        PaperTable(
            4,
            "Referring expression segmentation, cIoU (RefCOCO, RefCOCO+, RefCOCOg)",
            "table4_referring_cIoU",
            "refcoco",
            tuple(Column(_heading(name), name, "ciou", (name,)) for name in _REFERRING),
        ),
        PaperTable(
            5,
            "Parts and objects (RefCOCOm)",
            "table5_refcocom",
            "refcocom",
            tuple(
                Column(f"{split} {words}", f"refcocom_{split}_{benchmark}", "giou", (f"{split}_{place}",))
                for split in _SPLITS
                for place, benchmark, words in _PARTS
            ),
            (_UNSAID.format("mIoU"),),
        ),
        PaperTable(
            6,
            "Open-vocabulary segmentation of several classes",
            "table6_open_vocabulary_multi_class",
            "open_vocab",
            tuple(Column(heading, benchmark, "giou", (heading,)) for heading, benchmark in _SETS.items()),
            (_UNSAID.format("gIoU"),),
        ),
        PaperTable(
            7,
            "Mask reconstruction with and without the pixel encoder",
            "table7_pixel_encoder_ablation_reconstruction_gIoU",
            "tokenizer",
            (Column("gIoU", RECONSTRUCTION, "giou", ("gIoU",)),),
            ("The number of tokens of the paper's rows is not stated; ours have all of them.",),
        ),
    )
}


def family_rows(family: str) -> list[dict[str, Any]]:
    """The paper's rows for the tables of an evaluation: {"row": method, "BENCHMARK METRIC": number in percent}."""
    found = []
    for table in TABLES.values():
        if table.family == family and table.number not in (3, 7):
            for method, values in table.rows():
                cells = {f"{c.benchmark} {c.metric}": v for c, v in zip(table.columns, values, strict=True)}
                found.append({"row": f"{method}, paper", **{name: v for name, v in cells.items() if v is not None}})
    return found


def family_notes(family: str) -> Sequence[str]:
    """What has to be said beside the paper's rows of a family."""
    return [note for table in TABLES.values() if table.family == family and table.number != 3 for note in table.notes]


def times() -> list[tuple[str, str, float | None, float]]:
    """(method, split, mean tokens, seconds per sample) of Table 3, with the tokens of Table 2."""
    lengths = {row["method"]: row for row in numbers()[TABLES[2].key]}
    return [
        (row["method"], split, lengths[row["method"]][split]["length"], row[split])
        for row in numbers()[TABLES[3].key]
        for split in _SPLITS
    ]
