"""The paper's tables with our rows below its own, as Markdown, JSON and CSV.

In: the tasks of `metrics.json` and their times. Out: `tableN.md`, `tableN.json`, `tableN.csv`; a row of ours
says by its name how it was made: length, protocol, device, batch, and every flag that is not the plain one.
"""

from collections.abc import Iterator, Mapping, Sequence
import csv
import dataclasses
import io
import json
import pathlib
from typing import Any

from alto_jax.config import write_whole
from alto_jax.evaluate import tables
from alto_jax.evaluate.paper.published import MODES, PIXELS, SECONDS, TABLES, Column, PaperTable

_KINDS = {"single": "one at a time", "batch": "in batches of {}"}  # of times, as in timing.json
_DIGITS = {SECONDS: 3}


@dataclasses.dataclass(frozen=True)
class Row:
    """A row: its name, a number or None for each column, and (ours) what stands beside them in the JSON file."""

    method: str
    cells: Sequence[float | None]
    details: Mapping[str, Any] | None = None


def write(
    number: int,
    tasks: Mapping[str, Mapping[str, Any]],
    times: Mapping[str, Mapping[str, Any]],
    title: str,
    out: pathlib.Path,
) -> str:
    """Writes one of Tables 2 to 6.

    Args:
      number: of the table.
      tasks: task name → options and metrics, as in metrics.json; those of other tables are passed over.
      times: task name → times, as in timing.json.
      title: name of our rows.
      out: an existing directory.

    Returns:
      The Markdown text.
    """
    table = TABLES[number]
    order = {mode: place for place, mode in enumerate(MODES)}  # fixed before adaptive, as the paper has them
    mine = [{**task, "times": times[name]} for name, task in tasks.items() if task["benchmark"] in table.benchmarks]
    mine.sort(key=lambda task: order.get(task["mode"], len(order)))
    if number == 3:
        return _write(table, [row for kind in _KINDS for row in _rows_of_times(table, mine, title, kind)], out, "")
    return _write(table, _rows(table, mine, title), out, _beside(mine, title))


def write_table_7(parts: Mapping[bool, tuple[Mapping[str, Any], Mapping[str, Any], str]], out: pathlib.Path) -> str:
    """Writes Table 7 from two evaluations of a mask tokenizer alone.

    Args:
      parts: whether it was trained with image features → (task, times, title) of its evaluation.
      out: an existing directory.

    Returns:
      The Markdown text.
    """
    ours = []
    for has_pixels, (task, times, title) in parts.items():
        found = task["with_features" if has_pixels else "without_features"]
        count = max(map(int, found["giou_by_tokens"]))
        made = [task["benchmark"], f"{count} tokens", *_machine(times), *tables.protocol_flags(task)]
        name = f"pixel encoder: {PIXELS[has_pixels]}, {title} ({', '.join(made)})"
        ours.append(Row(name, [100 * found["giou_by_tokens"][str(count)]], {**task, "times": times}))
    return _write(TABLES[7], ours, out, "")


def _rows(table: PaperTable, tasks: Sequence[Mapping[str, Any]], title: str) -> list[Row]:
    """A row for all tasks that were made in the same way."""
    found = []
    for method, group in tables.grouped(tasks, lambda task: _name(task, title)):
        by = {task["benchmark"]: task for task in group}
        cells = [_cell(by[c.benchmark], c) if c.benchmark in by else None for c in table.columns]
        found.append(Row(method, cells, by))
    return found


def _rows_of_times(table: PaperTable, tasks: Sequence[Mapping[str, Any]], title: str, kind: str) -> list[Row]:
    """Our rows of a table of times, of one kind of them."""
    found = []
    timed = [task for task in tasks if task["times"].get(kind)]
    for method, group in tables.grouped(timed, lambda task: _name(task, title, kind)):
        by = {task["benchmark"]: task for task in group}
        seconds = {benchmark: task["times"][kind]["seconds_per_sample"] for benchmark, task in by.items()}
        found.append(Row(method, [seconds.get(c.benchmark) for c in table.columns], by))
    return found


def _name(task: Mapping[str, Any], title: str, kind: str = "") -> str:
    """The name of our row; kind: of its times, if it shows these."""
    mode, times = MODES.get(task["mode"], f"{task['mode']} tokens"), task["times"]
    machine = [_KINDS[kind].format(times["batch_size"]), *_machine(times)[:1]] if kind else _machine(times)
    return f"{title} ({', '.join([mode, task['protocol'], *machine, *tables.protocol_flags(task)])})"


def _machine(times: Mapping[str, Any]) -> list[str]:
    """Device and batch of a task, in words."""
    return [str(times["device"]), f"batch {times['batch_size']}"] if times else ["device not recorded"]


def _cell(task: Mapping[str, Any], column: Column) -> float | None:
    if column.metric == "length":
        return task["lengths"]["mean"] if task["lengths"] else None
    value = task.get(column.metric)
    return None if value is None else 100 * value


def _beside(tasks: Sequence[Mapping[str, Any]], title: str) -> str:
    """Tokens and seconds of our rows by split, which the paper's layout has no columns for."""
    rows = []
    for task in tasks:
        lengths = task["lengths"]
        cells = [task["benchmark"], MODES.get(task["mode"], f"{task['mode']} tokens"), f"{int(task['num_samples'])}"]
        cells += [f"{lengths['mean']:.1f} ± {lengths['std']:.1f}" if lengths else "–"]
        for kind in _KINDS:
            found = task["times"].get(kind)
            cells.append(f"{found['seconds_per_sample']:.4f}" if found else "–")
        rows.append(cells)
    header = ["benchmark", "length", "samples", "tokens (mean ± std)", "seconds, one at a time",
              "seconds per sample, in batches"]  # fmt: skip
    return f"\nTokens and seconds of {title} by split:\n\n{tables.table(header, rows)}"


def _write(table: PaperTable, ours: Sequence[Row], out: pathlib.Path, beside: str) -> str:
    """Writes the three files; returns the Markdown text."""
    heading = f"Table {table.number}: {table.title}"
    header = ["method", *(column.heading for column in table.columns)]
    printed = [Row(method, cells) for method, cells in table.rows()]
    digits = [_DIGITS.get(column.metric, 1) for column in table.columns]
    shown = [[f"{row.method}, paper", *(_shown(v) for v in row.cells)] for row in printed]
    shown += [[row.method, *(_shown(v, d) for v, d in zip(row.cells, digits, strict=True))] for row in ours]
    percent = [] if table.number == 3 else ["Values in percent, lengths in mask tokens."]
    notes = [*percent, *table.notes]
    text = f"# {heading}\n\n{tables.table(header, shown)}{beside}\n" + "".join(f"{note}\n" for note in notes)
    write_whole(out / f"table{table.number}.md", text)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["source", *header])
    writer.writerows([source, row.method, *row.cells] for source, row in _both(printed, ours))
    write_whole(out / f"table{table.number}.csv", buffer.getvalue())
    rows = [
        {"source": source, "method": row.method, "cells": dict(zip(header[1:], row.cells, strict=True))}
        | ({"details": row.details} if row.details else {})
        for source, row in _both(printed, ours)
    ]
    content = {"table": table.number, "title": table.title, "columns": header[1:], "rows": rows, "notes": notes}
    write_whole(out / f"table{table.number}.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return text


def _both(printed: Sequence[Row], ours: Sequence[Row]) -> Iterator[tuple[str, Row]]:
    yield from (("paper", row) for row in printed)
    yield from (("ours", row) for row in ours)


def _shown(value: float | None, digits: int | None = None) -> str:
    """A number; the paper's as it is printed there, ours to so many digits."""
    if value is None:
        return "–"
    return str(value) if digits is None else f"{value:.{digits}f}"
