"""Which files of the paper's recipe are there, whole, and as many as they should be.

    python -m alto_jax.data.doctor --paper --data ROOT [--counts FILE] [--json FILE] [--mixture FILE]

Prints a table: a row for each data set with its state, its numbers beside the known ones, where it comes from and its
licence; then every file that is missing, cut or damaged, once. --mixture writes what is there as the mixture of
stages 2 and 3 (`--config.data.source=mixture --config.data.meta=FILE`), all with the same weight. Of a data set that is
there in part, --counts says what should be: JSON {data set: {unit: number, or null for any number}}.
Exit code 1 if a file that the recipe needs is missing, cut or damaged, or a number is wrong.
"""

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
import dataclasses
import json
import os
import pathlib
from typing import Any

from alto_jax import cli
from alto_jax.config import ConfigError, write_whole
from alto_jax.data import bad_data, coco, files, inspection, refcoco
from alto_jax.data.inspection import PICTURES, Findings, Problem
from alto_jax.data.recipe import RECIPE, DataSet

_FOLDERS = {"train2014": coco.IMAGE_FOLDERS, "val2014": coco.VAL_FOLDERS}
_OPTIONAL, _CONVERTED = "not there (optional)", "not needed: PSALM's files are there"


@dataclasses.dataclass
class Row:
    """What is known of a data set: where it lies ("" if it does not), and what was found there.

    wrong: the numbers that are not what they should be, {unit: (found, expected)}.
    """

    data: DataSet
    place: pathlib.Path | None
    found: Findings
    note: str = ""
    wrong: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)

    @property
    def state(self) -> str:
        """In words: "found", or what is not as it should be."""
        if self.note:
            return self.note
        kinds = Counter(problem.what.partition(":")[0] for problem in self.found.problems)
        if self.place is None:
            return "missing"
        told = [f"{count} {kind}" for kind, count in sorted(kinds.items())]
        return ", ".join([*told, *(["wrong count"] if self.wrong else [])]) or "found"

    @property
    def numbers(self) -> str:
        """What was counted, beside what should be."""
        told = [
            f"{count:,}{f' of {self.data.counts[unit]:,}' if unit in self.data.counts else ''} {unit}"
            for unit, count in self.found.counts.items()
        ]
        return ", ".join([*told, *([self.found.looked_into] if self.found.looked_into else [])])


def examine(root: pathlib.Path, recipe: Sequence[DataSet] = RECIPE) -> list[Row]:
    """Looks at all data sets of a recipe below a data folder, in order."""
    rows = [_row(root, data) for data in recipe]
    missing = {p.path for row in rows for p in row.found.problems if p.what == "missing"}
    for row in rows:
        # Note: what a file that is missing or damaged would have held is not told as a second fault.
        if row.place is None or any(p.path.suffix.lower() not in PICTURES for p in row.found.problems):
            continue
        for unit, expected in row.data.counts.items():
            count = row.found.counts.get(unit, 0)
            named = sum(path.is_relative_to(row.place) for path in missing) if unit == "images" else 0
            if count != expected and count + named != expected:
                row.wrong[unit] = (count, expected)
    return rows


def problems(rows: Sequence[Row]) -> list[Problem]:
    """All files that are not as they should be, each once."""
    return sorted({problem for row in rows for problem in row.found.problems})


def _row(root: pathlib.Path, data: DataSet) -> Row:
    places = [root / place for name in data.places for place in _FOLDERS.get(name, (name,))]
    place = next((place for place in places if place.exists()), None)
    if place is not None:
        return Row(data, place, inspection.inspect(data.kind, root, place))
    name = data.name.partition(" ")[0]
    converted = _converted(root, name) if data.kind in ("refer", "instances") else {}
    if data.kind == "instances" and converted:
        return Row(data, None, Findings(), _CONVERTED)
    if converted:
        return _converted_row(root, data, converted)
    if data.optional:
        return Row(data, None, Findings(), _OPTIONAL)
    return Row(data, None, Findings(problems=[Problem(root / _FOLDERS.get(data.places[0], data.places)[0], "missing")]))


def _converted(root: pathlib.Path, dataset: str) -> dict[str, pathlib.Path | None]:
    """The PSALM-converted JSON of each split of a data set; {} if there is none."""
    splits = ("train", "val", "test") if dataset == "refcocog" else ("train", "val", "testA", "testB")
    place = lambda split: next((root / f for f in refcoco.psalm_files(dataset, split) if (root / f).is_file()), None)
    found = {split: place(split) for split in splits}
    return found if any(found.values()) else {}


def _converted_row(root: pathlib.Path, data: DataSet, splits: Mapping[str, pathlib.Path | None]) -> Row:
    whole = Findings()
    for split, place in splits.items():
        if place is None:
            whole.problems.append(Problem(root / refcoco.psalm_files(data.name, split)[0], "missing"))
            continue
        found = inspection.inspect("psalm", root, place)
        whole.counts |= found.counts
        whole.problems += found.problems
    counts = {unit: count for unit, count in data.counts.items() if unit in whole.counts}
    return Row(dataclasses.replace(data, counts=counts), root / data.name, whole)


def markdown(rows: Sequence[Row]) -> str:
    """The table, and below it every problem."""
    lines = ["| data | state | numbers | for | from | licence |", "|---|---|---|---|---|---|"]
    for row in rows:
        data = row.data
        cells = (data.name, row.state, row.numbers or "–", data.needed, data.origin, data.licence)
        lines.append(f"| {' | '.join(cells)} |")
    found = problems(rows)
    told = [f"{problem.what}: {problem.path}" for problem in found]
    told += [f"wrong count: {row.data.name}: {count:,} {unit}, expected {expected:,}"
             for row in rows for unit, (count, expected) in row.wrong.items()]  # fmt: skip
    return "\n".join(
        [*lines, "", *map(bad_data.one_line, told), *(() if told else ("everything that the recipe needs is there",))]
    )


def mixture(rows: Sequence[Row], folder: pathlib.Path, root: pathlib.Path) -> dict[str, dict[str, Any]]:
    """What is there for stages 2 and 3 as a mixture with equal weights, with paths as seen from a folder.

    Raises:
      ConfigError: none of it is there.
    """
    known = {row.data.name: row.place for row in rows}
    seen_from = lambda place: os.path.relpath(place.resolve(), folder)
    found: dict[str, dict[str, Any]] = {}
    if (place := known.get("SA-1B")) is not None:
        found["boxes"] = {"weight": 1, "source": "sa1b_chats", "root": seen_from(place)}
    for name in ("refcoco", "refcoco+", "refcocog", "grefcoco"):
        if known.get(name) is not None:
            found[name] = {"weight": 1, "source": "referring", "root": seen_from(root), "meta": name}
    if (place := known.get("conversations")) is not None:
        found["conversations"] = {"weight": 1, "source": "jsonl", "meta": seen_from(place)}
    if not found:
        raise ConfigError(f"--mixture: {root} holds none of SA-1B, RefCOCO, RefCOCO+, RefCOCOg, gRefCOCO, meta.json")
    return found


def with_counts(recipe: Sequence[DataSet], given: Any, where: str) -> list[DataSet]:
    """The recipe with other numbers.

    Args:
      recipe: the data sets.
      given: {data set: {unit: number, or None for any}}.
      where: the option and file, for messages.

    Raises:
      ConfigError: another form, or an unknown data set.
    """
    names = {data.name: data for data in recipe}
    if not isinstance(given, dict) or not all(isinstance(counts, dict) for counts in given.values()):
        raise ConfigError(f"{where}: expected JSON {{data set: {{unit: number or null}}}}")
    for name, counts in given.items():
        if name not in names:
            raise ConfigError(f"{where}: unknown data set {name!r}; expected some of {', '.join(names)}")
        for unit, count in counts.items():
            if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 0):
                raise ConfigError(f"{where}: {name}: {unit}: expected a number or null, got {count!r}")
        merged = {unit: count for unit, count in {**names[name].counts, **counts}.items() if count is not None}
        names[name] = dataclasses.replace(names[name], counts=merged)
    return list(names.values())


def main() -> int:
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m alto_jax.data.doctor", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--paper", action="store_true", required=True, help="the recipe to look at; the only one so far"
    )
    parser.add_argument("--data", required=True, metavar="ROOT", help="the data folder")
    parser.add_argument("--counts", metavar="FILE", help="JSON of other numbers, for a part of the data")
    parser.add_argument("--json", metavar="FILE", help="the same as JSON")
    parser.add_argument("--mixture", metavar="FILE", help="write the mixture of stages 2 and 3")
    options = parser.parse_args()
    cli.check_paths({f"--{name}": getattr(options, name) for name in ("data", "counts", "json", "mixture")})
    written = {"--json": (options.json, (".json",)), "--mixture": (options.mixture, (".json",))}
    cli.check_outputs(written, {"--counts": options.counts})
    root = pathlib.Path(options.data)
    if not root.is_dir():
        raise ConfigError(f"--data: there is no folder {root}")
    recipe: Sequence[DataSet] = RECIPE
    if options.counts:
        recipe = with_counts(RECIPE, files.load_json(options.counts, dict), f"--counts {options.counts}")
    rows = examine(root, recipe)
    print(markdown(rows))
    if options.json:
        found = [{"data": row.data.name, "state": row.state, "place": str(row.place or ""), "counts": row.found.counts,
                  "expected": dict(row.data.counts), "from": row.data.origin, "licence": row.data.licence}
                 for row in rows]  # fmt: skip
        named = [{"path": str(problem.path), "what": problem.what} for problem in problems(rows)]
        write_whole(pathlib.Path(options.json), json.dumps({"data": found, "problems": named}, indent=1) + "\n")
    if options.mixture:
        file = pathlib.Path(options.mixture)
        write_whole(file, json.dumps(mixture(rows, file.resolve().parent, root.resolve()), indent=1) + "\n")
    return 1 if problems(rows) or any(row.wrong for row in rows) else 0


def command() -> None:
    """The installed command: `main`, with one line for bad input."""
    cli.run(main)


if __name__ == "__main__":
    command()
