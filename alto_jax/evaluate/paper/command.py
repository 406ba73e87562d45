"""What `python -m alto_jax.evaluate --table`, `--figure` and `--card` run."""

from collections.abc import Sequence
import json
import pathlib
from typing import Any

from alto_jax.config import ConfigError, local_path
from alto_jax.data.benchmarks import BENCHMARKS, MASK_FAMILIES
from alto_jax.evaluate import outputs
from alto_jax.evaluate.options import EvaluateOptions
from alto_jax.evaluate.paper import card, curves, pages, tables
from alto_jax.evaluate.paper.published import RECONSTRUCTION, TABLES
from alto_jax.evaluate.runner import evaluate

CURVES = (6, 7, 8)
FIGURES = (*CURVES, *pages.PAGES)


def write_tables(options: EvaluateOptions, numbers: Sequence[int]) -> None:
    """Evaluates what Tables `numbers` need, by fixed and adaptive length, and writes them to the out directory.

    Args:
      options: of the evaluation. benchmarks: columns of the tables (none: all of them); for Table 7 the masks,
        tokenizer_NAME. checkpoint: for Table 7 two with a comma between, trained with image features and without.
      numbers: of the tables.

    Raises:
      ConfigError: no such table, a benchmark that is no column of it, other checkpoints than it needs.
    """
    for number in numbers:
        if number not in TABLES:
            raise ConfigError(f"--table: expected some of {', '.join(map(str, TABLES))}, got {number}")
    if 7 in numbers:
        if len(numbers) > 1:
            raise ConfigError("--table: 7 takes two checkpoints of its own; give it by itself")
        _write_table_7(options)
        return
    known = list(dict.fromkeys(name for number in numbers for name in TABLES[number].benchmarks))
    for name in options.benchmarks:
        if name not in known:
            which = ", ".join(map(str, numbers))
            raise ConfigError(f"--benchmark: {name} is no column of table {which}; expected some of {', '.join(known)}")
    found = evaluate(options.replace(benchmarks=options.benchmarks or known))
    out = pathlib.Path(options.out)
    for number in numbers if found else ():
        print(tables.write(number, found, _read(out, "timing.json"), _read(out, outputs.INDEX)["title"], out), end="")


def _write_table_7(options: EvaluateOptions) -> None:
    names = options.benchmarks or (RECONSTRUCTION,)
    if len(names) != 1 or not names[0].startswith("tokenizer_"):
        raise ConfigError(f"--benchmark: expected one of tokenizer_NAME for table 7, got {', '.join(names)}")
    checkpoints = [part for part in str(options.checkpoint).split(",") if part.strip()]
    folders = {True: "with_pixels", False: "without_pixels"}
    if options.rescore:
        given = dict.fromkeys(folders, "")
    else:
        given = {_has_pixels(name): name for name in checkpoints}
        if len(checkpoints) != 2 or len(given) != 2:
            raise ConfigError("--checkpoint: table 7 takes two with a comma between, one trained with the pixel "
                              f"encoder, one without (SIZE, SIZE_no_pixels), got {options.checkpoint!s}")  # fmt: skip
    parts = {}
    for has_pixels, folder in folders.items():
        out = pathlib.Path(options.out) / folder
        found = evaluate(options.replace(checkpoint=given[has_pixels], benchmarks=names, out=out))
        for name, task in found.items():
            if ("without_features" in task) == has_pixels:
                raise ConfigError(f"--out: {out} holds results of a checkpoint of the other kind")
            parts[has_pixels] = task, _read(out, "timing.json")[name], _read(out, outputs.INDEX)["title"]
    if parts:
        print(tables.write_table_7(parts, pathlib.Path(options.out)), end="")


def _has_pixels(checkpoint: str) -> bool:
    """Whether a checkpoint's mask tokenizer has an image encoder."""
    from alto_jax.checkpoint import runs  # late: tables of finished evaluations need no checkpoint

    return runs.load_meta(checkpoint)["model"]["tokenizer"]["sam"] is not None


def write_figure(options: EvaluateOptions, number: int, directories: Sequence[str]) -> None:
    """Writes Figure `number` to the out directory, and evaluates what it needs before.

    Args:
      options: of the evaluations; see curves.py and pages.py for what they take of them.
      number: of the figure.
      directories: the runs of figures 6, 7 and 8.

    Raises:
      ConfigError: no such figure, no runs for one that needs some, or a benchmark that it cannot show.
    """
    out = pathlib.Path(options.out)
    if number not in FIGURES:
        raise ConfigError(f"--figure: expected one of {', '.join(map(str, sorted(FIGURES)))}, got {number}")
    if (number in CURVES) != bool(directories):
        needs = "the runs that it compares" if number in CURVES else f"nothing for figure {number}, but --checkpoint"
        raise ConfigError(f"--runs: expected {needs}, got {', '.join(directories) or 'nothing'}")
    if not (directories or options.checkpoint or options.rescore):
        raise ConfigError("--checkpoint is required (see --help)")
    if number == 7 or number in pages.PAGES:
        for name in options.benchmarks:
            asked = BENCHMARKS.get(name)
            if asked is None or asked.family not in (*MASK_FAMILIES, "scenes"):
                raise ConfigError(f"--benchmark: {name}: figure {number} is of masks that are asked for; expected some "
                                  "such as refcoco_val")  # fmt: skip
    if number == 6:
        curves.figure_6(directories, out)
    elif number in CURVES:
        draw = curves.figure_7 if number == 7 else curves.figure_8
        draw(options, directories, evaluate, out)
    else:
        limit = options.limit or (0 if options.rescore else pages.LIMIT)
        options = options.replace(benchmarks=options.benchmarks or pages.PAGES[number], limit=limit, length="both",
                                  out=out / f"figure{number}")  # fmt: skip
        found = evaluate(options)
        if found:
            pages.write(out / f"figure{number}", pathlib.Path(options.out), found, outputs.records_of(options))


def write_card(options: EvaluateOptions, results: Sequence[str]) -> None:
    """Writes the card of a model, one Markdown file, from finished evaluations.

    Args:
      options: checkpoint, step, title, and out: the file.
      results: directories of evaluations.
    """
    for name in results:
        local_path(name, "--results")
    card.write(pathlib.Path(options.out), str(options.checkpoint), results, title=options.title, step=options.step)
    print(f"written: {options.out}")


def _read(out: pathlib.Path, name: str) -> dict[str, Any]:
    return json.loads((out / name).read_text())
