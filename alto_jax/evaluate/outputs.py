"""From result files to everything that is read: metrics, tables, plots, COCO results, worst cases. Needs no model."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import os
import pathlib
from typing import Any

from alto_jax.config import ConfigError, write_whole
from alto_jax.data.fingerprint import fingerprint_of
from alto_jax.data.source import Records
from alto_jax.evaluate import coco, gallery, questions, results, summaries, tables, timing
from alto_jax.evaluate.options import EvaluateOptions
from alto_jax.evaluate.tasks import Limited, mask_source

INDEX = "tasks.json"  # Which results the tables were made of, in their order.
# Options that only another evaluation could change, if they are not the default.
_FIXED = ("grammar", "forced_prefix", "end_bias", "protocol", "exif", "mask_rule")
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(EvaluateOptions)}


def write_outputs(options: EvaluateOptions, names: Sequence[str], title: str, open_records: Any) -> dict[str, Any]:
    """Writes all outputs of the results of some tasks.

    Args:
      options: out, min_pixels, paper_rows and worst are used.
      names: the tasks, in the order of the tables' rows; all of one checkpoint.
      title: name of our rows.
      open_records: `(task, header) -> Records or None` of a benchmark with masks, for the pictures.

    Returns:
      What `metrics.json` holds: task name → numbers.
    """
    out, found, times = pathlib.Path(options.out), {}, {}
    pictures: dict[str, tuple[dict[str, Any], list[dict[str, Any]], Records]] = {}
    (out / "coco").mkdir(parents=True, exist_ok=True)
    checkpoint, longest = "", 1
    for name in names:
        path = results.result_path(out, name)
        header, lines = results.read_results(path)
        found[name] = summaries.summarise(header, lines, options.min_pixels)
        times[name] = timing.summarise_timing(timing.timing_path(path))
        checkpoint, longest = header["checkpoint"], max(longest, header.get("num_latent_tokens", 1))
        if "scoring" in header:
            write_whole(out / "coco" / f"{name}.json", coco.coco_results(lines))
            records = open_records(name, header) if options.worst else None
            if records is not None:
                pictures[name] = (header, lines, records)
    paper = paper_rows(options.paper_rows)
    write_whole(out / INDEX, json.dumps({"title": title, "tasks": list(names)}, indent=1) + "\n")
    write_whole(out / "metrics.json", json.dumps({"checkpoint": checkpoint, "tasks": found}, indent=1) + "\n")
    write_whole(out / "tables.md", tables.markdown(found, title, paper))
    write_whole(out / "timing.json", json.dumps(times, indent=1) + "\n")
    write_whole(out / "timing.md", tables.timing_markdown(found, times, title))
    tables.plots(found, longest, out)
    if pictures:
        limits = {name: found[name]["min_pixels"] for name in pictures}
        gallery.write(out / "worst.html", title, pictures, options.worst, limits)
    return found


def rescore(options: EvaluateOptions) -> dict[str, Any]:
    """Makes all outputs again from the results in `options.out`, without a model.

    What may differ from the evaluation: title, paper_rows, min_pixels and worst. Benchmarks that are named are the
    only ones; the worst cases need the data.

    Returns:
      What `metrics.json` holds.

    Raises:
      ConfigError: no results there, none of those that were named, those of several checkpoints, or an option that
        would need the model.
    """
    out = pathlib.Path(options.out)
    paper_rows(options.paper_rows)
    there = task_names(out)
    index: dict[str, Any] = {"title": None, "tasks": there}  # Note: killed before its tables, an evaluation has none.
    if (out / INDEX).is_file():
        index = json.loads((out / INDEX).read_text())
    names = [name for name in index["tasks"] if name in there]
    wanted = [name for name in options.benchmarks if name != "all"]
    if options.benchmarks:
        names += [name for name in there if name not in names]
    headers = {name: results.read_header(results.result_path(out, name)) for name in names}
    if wanted:
        benchmark = lambda name: headers[name]["benchmark"]
        names = sorted((n for n in names if benchmark(n) in wanted), key=lambda n: wanted.index(benchmark(n)))
    if not names:
        which = f"of {', '.join(wanted)} " if wanted else ""
        raise ConfigError(f"--out: {out} holds no results {which}to compute tables from (results/*.jsonl)")
    for name in names:
        headers[name] = finished_header(results.result_path(out, name))
        first = headers[names[0]]["checkpoint"]
        if headers[name]["checkpoint"] != first:
            raise ConfigError(f"--out: {out} holds results of several checkpoints: {names[0]} of {first}, {name} of "
                              f"{headers[name]['checkpoint']}; choose those of one with --benchmark")  # fmt: skip
    for name in names:
        _check(options, headers[name], name)
    title = options.title or index["title"] or (pathlib.Path(options.checkpoint).name if options.checkpoint else "")
    return write_outputs(options, names, title or "model", records_of(options))


def paper_rows(file: str | os.PathLike | None) -> dict[str, list[dict[str, Any]]]:
    """The rows of a file that are added to the tables: family → rows; none without a file.

    Raises:
      ConfigError: no such file, or something in it that no table would show.
    """
    if not file:
        return {}
    where = f"--paper-rows: {file}"
    try:
        found = json.loads(pathlib.Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{where}: no such file") from error
    except ValueError as error:
        raise ConfigError(f"{where}: not readable as JSON: {error}") from error
    known = tables.given_columns()
    if not isinstance(found, dict) or not found.keys() <= known.keys():
        got = ", ".join(sorted(found.keys() - known.keys())) if isinstance(found, dict) else type(found).__name__
        raise ConfigError(f"{where}: expected rows by table, some of {', '.join(known)}, got {got}")
    for family, rows in found.items():
        for row in rows if isinstance(rows, list) else [rows]:
            if not (isinstance(rows, list) and isinstance(row, dict) and isinstance(row.get("row"), str)):
                raise ConfigError(f'{where}: {family}: expected a list of {{"row": name, …}}, got {row!r:.80}')
            if unknown := sorted(row.keys() - {"row"} - known[family]):
                some = ", ".join(sorted(known[family])[:6])
                raise ConfigError(f"{where}: {family}: {row['row']}: {unknown[0]} is no column; expected {some} …")
    return found


def task_names(out: pathlib.Path) -> list[str]:
    """The tasks whose results lie in an out directory, in order of their names."""
    return sorted(p.stem for p in (out / "results").glob("*.jsonl") if not p.stem.endswith(".timing"))


def finished_header(path: pathlib.Path) -> dict[str, Any]:
    """The header of a result file; ConfigError if samples are missing, or another version of this program wrote it."""
    header, lines = results.read_results(path)
    if header.get("version") != results.VERSION:
        raise ConfigError(f"{path}: results of another version of this program; evaluate again")
    if len(lines) != header["samples"]:
        raise ConfigError(f"{path}: {len(lines)} of {header['samples']} samples are there; finish the evaluation first")
    return header


def _check(options: EvaluateOptions, header: Mapping[str, Any], name: str) -> None:
    """Refuses options that are given and that the results were not made with."""
    asked = lambda option: getattr(options, option) != _DEFAULTS[option]
    given: dict[str, Any] = {option: getattr(options, option) for option in _FIXED if asked(option)}
    if options.limit and (header.get("limit") or header["samples"] > options.limit):  # else it left out nothing
        given["limit"] = options.limit
    if options.max_new_tokens and "scoring" in header:
        given["max_new_tokens"] = options.max_new_tokens
    if options.reference:
        given["scoring"] = "reference"
    if options.max_tiles > 1 and header["family"] in questions.TILED:
        given["max_tiles"], header = options.max_tiles, {"max_tiles": 1} | dict(header)
    for option, value in given.items():
        if header.get(option, value) != value:
            raise ConfigError(f"--rescore: {name} was evaluated with {option} {header[option]!r}, not {value!r}; only "
                              "--min-pixels, --title, --paper-rows and --worst may differ")  # fmt: skip


def records_of(options: EvaluateOptions) -> Callable[[str, Mapping[str, Any]], Records | None]:
    """Opens the data of results again, if they are there and the same."""

    def open_records(name: str, header: Mapping[str, Any]) -> Records | None:
        read = {name: header[name] for name in ("protocol", "exif", "mask_rule")}
        try:
            source = mask_source(header["benchmark"], options.replace(**read))
        except ValueError as error:
            print(f"[{name}] no pictures of the worst answers: {error}")
            return None
        if fingerprint_of(source) != header["data"]:
            print(f"[{name}] no pictures of the worst answers: {options.data} holds other data than were evaluated")
            return None
        return Limited(source, header["limit"]) if header["limit"] else source

    return open_records
