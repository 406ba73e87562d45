"""What the experiments with runs of their own share: seeds and steps from the command line, results that are kept, and
tables of means over seeds."""

import argparse
from collections.abc import Callable, Mapping, Sequence
import json
import pathlib
from typing import Any

import numpy as np

from alto_jax import cli, figures
from alto_jax.config import ConfigError, write_whole
from experiments import tokens


def parser(name: str, doc: str, *, steps: int | None, seeds: str = "0,1,2") -> argparse.ArgumentParser:
    """--checkpoint and --out, and where something is trained --seeds and --steps."""
    found = argparse.ArgumentParser(prog=f"python -m experiments.{name}", description=doc.splitlines()[0])
    found.add_argument("--checkpoint", required=True, metavar="DIR", help="a run's directory, or alto-tiny")
    found.add_argument("--out", required=True, metavar="DIR", help="for the table, the plot, and the runs")
    if steps is not None:
        found.add_argument("--seeds", default=seeds, help=f"with commas between (default: {seeds})")
        found.add_argument("--steps", type=int, default=steps, help=f"updates of a run (default: {steps})")
    return found


def parse(parser: argparse.ArgumentParser, may_be_zero: Sequence[str] = ()) -> argparse.Namespace:
    """The options, with the seeds as numbers and `out` as a path; whole numbers are at least 1, or 0 for some names.

    Raises:
      ConfigError: an option has a value that cannot be used.
    """
    options = parser.parse_args()
    cli.check_paths({"checkpoint": options.checkpoint, "out": options.out})
    options.out = pathlib.Path(options.out)
    for name, value in vars(options).items():
        least = 0 if name in may_be_zero else 1
        if isinstance(value, int) and value < least:
            raise ConfigError(f"--{name}: expected at least {least}, got {value}")
    if hasattr(options, "seeds"):
        options.seeds = numbers("--seeds", options.seeds, int)
    return options


def numbers(option: str, text: str, kind: Callable[[str], Any] = float) -> list[Any]:
    """The numbers of "0,1,2".

    Raises:
      ConfigError: something else.
    """
    try:
        return [kind(value) for value in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{option}: expected numbers with commas between, got {text!r}") from error


def once(path: pathlib.Path, settings: Mapping[str, Any], measure: Callable[[], Any]) -> Any:
    """What `measure` gives, as JSON has it; from the file if it was measured before, under the same settings.

    Raises:
      ConfigError: the file has results of other settings.
    """
    plain = json.loads(json.dumps(settings))
    if path.is_file():
        saved = json.loads(path.read_text())
        if saved["settings"] != plain:
            had = saved["settings"]
            name = next(name for name in {**plain, **had} if plain.get(name) != had.get(name))
            why = f"made with {name} {had.get(name)!r}, not {plain.get(name)!r}"
            raise ConfigError(f"--out: {path}: {why}; choose another directory")
        return saved["found"]
    found = json.loads(json.dumps(measure()))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({"settings": plain, "found": found}) + "\n")
    return found


def means(rows: Sequence[Mapping[str, Any]], by: str, spread: Sequence[str] = ("gain",)) -> list[dict[str, Any]]:
    """Means over seeds of the rows that agree in `by`, in order, with the standard deviations of `spread`."""
    found = []
    for name in dict.fromkeys(row[by] for row in rows):
        same = [row for row in rows if row[by] == name]
        mean = {key: float(np.mean([row[key] for row in same])) for key in same[0] if key not in (by, "seed")}
        spreads = {f"std_of_{key}": float(np.std([row[key] for row in same])) for key in spread}
        found.append({by: name, **mean, **spreads, "seeds": len(same)})
    return found


def write(
    out: pathlib.Path, found: Mapping[str, Any], tables: Mapping[str, Sequence[dict[str, Any]]], figure: Any
) -> None:
    """Writes NAME.json, NAME.md (a table under each title; "": none) and NAME.png for `out`, DIR/NAME, and prints the
    tables."""
    out.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(f"{title}\n\n{tokens.table_of(list(rows))}".lstrip() for title, rows in tables.items())
    write_whole(out / f"{out.name}.json", json.dumps(found, indent=2) + "\n")
    write_whole(out / f"{out.name}.md", text + "\n")
    write_whole(out / f"{out.name}.png", figures.figure_bytes(figure, dpi=80))
    print(text)
