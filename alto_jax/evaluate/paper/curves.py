"""Figures 6, 7 and 8 of the paper, each of several runs: PNG, SVG, and the numbers as CSV.

6: entropy and length over the updates of stage 3, a line a run. 7: gIoU against mask tokens on three validation sets,
a point a run beside the curve of fixed lengths. 8: length penalty of stage 1.5 against gIoU, mean, standard deviation
and entropy of the predicted lengths. A run's penalty is read from its config.json.
"""

from collections.abc import Callable, Mapping, Sequence
import csv
import dataclasses
import io
import json
import pathlib
from typing import Any

from alto_jax import figures
from alto_jax.config import ConfigError, local_path, write_whole
from alto_jax.evaluate.options import EvaluateOptions, length_modes
from alto_jax.evaluate.paper.published import FIGURE_7_SETS, RECONSTRUCTION
from alto_jax.evaluate.tables import TOKEN_COUNTS
from alto_jax.train.progress import read_metrics

# Evaluates a checkpoint: what metrics.json holds; {} but in the first process.
Evaluate = Callable[[EvaluateOptions], dict[str, Any]]
_PENALTY = {"stage1_5": ("tokenizer", "loss", "length"), "stage3": ("grpo", "reward", "length_weight")}


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of a figure: its directory, a short name of its own, its stage and length penalty (None: not known)."""

    directory: str
    name: str
    stage: str | None
    penalty: float | None

    @property
    def label(self) -> str:
        """What a legend calls it."""
        return self.name if self.penalty is None else f"λ = {self.penalty:g}"


def open_runs(directories: Sequence[str], stage: str | None = None) -> list[Run]:
    """Runs with what their config.json says, in order of their penalties (those without one last).

    Args:
      directories: of the runs.
      stage: that they must be of; None: of any, also converted checkpoints without a config.json.

    Raises:
      ConfigError: named twice, not readable, or of another stage.
    """
    found: list[Run] = []
    for directory, name in zip(directories, _names(directories), strict=True):
        file, plain = local_path(directory, "--runs") / "config.json", {}
        if file.is_file():
            try:
                plain = json.loads(file.read_text())
            except ValueError as error:
                raise ConfigError(f"--runs: {file}: not readable as JSON: {error}") from error
        elif stage is not None:
            raise ConfigError(f"--runs: {directory}: expected the directory of a run of {stage}, with its config.json")
        own = plain.get("stage") if isinstance(plain, dict) else None
        if stage is not None and own != stage:
            raise ConfigError(f"--runs: {file}: stage: expected {stage!r}, got {own!r}")
        penalty: Any = plain
        for part in _PENALTY.get(own or "", ("",)):
            penalty = penalty.get(part) if isinstance(penalty, dict) else None
        found.append(Run(str(directory), name, own, None if penalty is None else float(penalty)))
    return sorted(found, key=lambda run: float("inf") if run.penalty is None else run.penalty)


def _names(directories: Sequence[str]) -> list[str]:
    """The last part of each path, with the part above it where that is not enough to tell them apart."""
    paths = [pathlib.Path(directory).absolute() for directory in directories]
    for parts in (1, 2):
        names = ["-".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise ConfigError(f"--runs: {next(n for n in names if names.count(n) > 1)} is named twice")


def figure_6(directories: Sequence[str], out: pathlib.Path) -> None:
    """Entropy and length over the updates of runs of stage 3; from their metrics.jsonl alone."""
    rows, panels = [], {"entropy": list[figures.Series](), "length": list[figures.Series]()}
    runs = open_runs(directories, "stage3")
    for run, label in zip(runs, _labels(runs), strict=True):
        file = pathlib.Path(run.directory) / "metrics.jsonl"
        if not file.is_file():
            raise ConfigError(f"--runs: {file} is not there")
        records = [r for r in read_metrics(run.directory) if "entropy" in r and "length" in r]
        if not records:
            raise ConfigError(f"--runs: {file}: expected records with entropy and length, got none")
        steps = [record["step"] for record in records]
        for name, drawn in panels.items():
            drawn.append(figures.Series(label, steps, [record[name] for record in records]))
        rows += [
            {"run": run.name, "penalty": run.penalty} | {n: r.get(n) for n in ("step", "entropy", "length", "iou")}
            for r in records
        ]
    titles = {"Entropy of the policy": panels["entropy"], "Mask tokens": panels["length"]}
    figure = figures.panels_figure(titles, "updates", ["entropy (nats)", "mean length"])
    save(figure, rows, out / "figure6")


def figure_7(options: EvaluateOptions, directories: Sequence[str], evaluate: Evaluate, out: pathlib.Path) -> None:
    """gIoU against mask tokens: a point a run by adaptive length, and the curve of fixed lengths of one checkpoint.

    Args:
      options: of the evaluations; `checkpoint` has the fixed lengths (none: the first run), `length` their numbers,
        `benchmarks` the validation sets (none: the paper's).
      directories: of the runs.
      evaluate: runs one evaluation; out: where the figure goes.
    """
    runs = open_runs(directories)
    sets = list(options.benchmarks or FIGURE_7_SETS)
    fixed = str(options.checkpoint or directories[0])
    counts = [mode for mode in length_modes(options.length) if mode.isdigit()]
    if not counts and not options.rescore:
        counts = token_counts(fixed)
    ask = lambda checkpoint, name, length: evaluate(
        options.replace(checkpoint=checkpoint, benchmarks=sets, out=out / "runs" / name, length=length)
    )
    curve = ask(fixed, "fixed", ",".join(counts) or options.length)
    answers = {run.name: ask(run.directory, run.name, "adaptive") for run in runs}
    if not curve:
        return
    rows, panels = [], {}
    for benchmark in sets:
        task_of = lambda found, mode, benchmark=benchmark: _task(found, benchmark, mode, options.protocol)
        points = {run: task_of(answers[run.name], "adaptive") for run in runs}
        modes = {task["mode"] for task in curve.values() if task.get("mode", "").isdigit()}
        measured = {count: task_of(curve, str(count)) for count in sorted(map(int, modes))}
        rows += [_row(benchmark, "fixed", None, task) for task in measured.values()]
        rows += [_row(benchmark, run.name, run.penalty, task) for run, task in points.items()]
        panels[FIGURE_7_SETS.get(benchmark, benchmark)] = [
            figures.Series("fixed length", [*measured], [task["giou"] for task in measured.values()], "both"),
            *(figures.Series(label, [task["lengths"]["mean"]], [task["giou"]], "marks")
              for task, label in zip(points.values(), _labels(runs), strict=True) if task["lengths"]),
        ]  # fmt: skip
    save(figures.panels_figure(panels, "mask tokens (mean)", ["gIoU"] * len(panels)), rows, out / "figure7")


def figure_8(options: EvaluateOptions, directories: Sequence[str], evaluate: Evaluate, out: pathlib.Path) -> None:
    """Length penalty of runs of stage 1.5 against gIoU, and mean, standard deviation and entropy of the lengths.

    Args:
      options: of the evaluations; `benchmarks` names what the masks are of (none: Multi-Target-SA1B's validation set).
      directories: of the runs.
      evaluate: runs one evaluation; out: where the figure goes.
    """
    runs = open_runs(directories, "stage1_5")
    benchmarks = options.benchmarks or (RECONSTRUCTION,)
    if len(benchmarks) != 1 or not benchmarks[0].startswith("tokenizer_"):
        raise ConfigError(f"--benchmark: expected one of tokenizer_NAME for figure 8, got {', '.join(benchmarks)}")
    rows = []
    for run in runs:
        ask = options.replace(checkpoint=run.directory, benchmarks=benchmarks, out=out / "runs" / run.name)
        for task in evaluate(ask).values():
            part, lengths = task.get("with_features") or task["without_features"], task["lengths"]
            numbers = {name: lengths[name] for name in ("mean", "std", "entropy")}
            rows.append({"run": run.name, "penalty": run.penalty, "samples": task["num_samples"],
                         "giou": part["giou_adaptive"], **numbers})  # fmt: skip
    if not rows:
        return
    shown = {"giou": "gIoU", "mean": "mean length", "std": "standard deviation", "entropy": "entropy (nats)"}
    by_penalty: dict[float, list[dict[str, Any]]] = {}
    for row in rows:
        by_penalty.setdefault(row["penalty"], []).append(row)
    save(penalty_figure(by_penalty, shown), rows, out / "figure8")


def penalty_figure(by_penalty: Mapping[float, Sequence[Mapping[str, Any]]], shown: Mapping[str, str]) -> Any:
    """A panel a number (key in the rows → title) against the penalty: the mean over runs, and a mark for each."""
    panels = {}
    for name, title in shown.items():
        mean = [sum(row[name] for row in rows) / len(rows) for rows in by_penalty.values()]
        marks = [(penalty, row[name]) for penalty, rows in by_penalty.items() for row in rows]
        panels[title] = [
            figures.Series("mean", [*by_penalty], mean),
            figures.Series("run", [x for x, _ in marks], [y for _, y in marks], "marks"),
        ]
    log_x = all(penalty > 0 for penalty in by_penalty)
    return figures.panels_figure(panels, "length penalty λ", [*shown.values()], log_x=log_x)


def save(figure: Any, rows: Sequence[Mapping[str, Any]], stem: pathlib.Path) -> None:
    """Writes a figure as STEM.png and STEM.svg, and its numbers as STEM.csv; their folder is created."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, [*rows[0]], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(stem.with_name(f"{stem.name}.csv"), buffer.getvalue())
    written = [*figures.save_figure(figure, stem), stem.with_name(f"{stem.name}.csv")]
    print(f"written: {', '.join(map(str, written))}")


def token_counts(checkpoint: str) -> list[str]:
    """The numbers of tokens of the curve of fixed lengths: TOKEN_COUNTS as far as a checkpoint has so many, and all."""
    # late: figures of finished evaluations need no checkpoint
    from alto_jax.checkpoint import runs

    most = runs.load_meta(checkpoint)["model"]["tokenizer"]["num_latent_tokens"]
    return [str(count) for count in sorted({*(c for c in TOKEN_COUNTS if c < most), most})]


def _labels(runs: Sequence[Run]) -> list[str]:
    """The label of each run, with its name where two have the same."""
    labels = [run.label for run in runs]
    return [f"{label}, {run.name}" if labels.count(label) > 1 else label for label, run in zip(labels, runs)]


def _task(found: Mapping[str, Mapping[str, Any]], benchmark: str, mode: str, protocol: str) -> Mapping[str, Any]:
    asked = {"benchmark": benchmark, "mode": mode, "protocol": protocol}
    for task in found.values():
        if all(task.get(name) == value for name, value in asked.items()):
            return task
    raise ConfigError(f"--out: no results of {', '.join(asked.values())} there")


def _row(benchmark: str, run: str, penalty: float | None, task: Mapping[str, Any]) -> dict[str, Any]:
    """A line of figure 7's CSV."""
    tokens = task["lengths"]["mean"] if task["lengths"] else None
    length = {"benchmark": benchmark, "run": run, "penalty": penalty, "length": task["mode"], "tokens": tokens}
    return length | {name: task[name] for name in ("giou", "ciou", "num_samples")}
