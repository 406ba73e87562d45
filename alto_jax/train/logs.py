"""The log of a run: metrics.jsonl, TensorBoard and the progress line, with warnings about answers that collapse."""

import pathlib

import jax

from alto_jax.cli import Progress
from alto_jax.experiment import ExperimentConfig
from alto_jax.train import collapse
from alto_jax.train.progress import NOTHING, MetricWriter


class Logs:
    """Written by process 0 alone, known to all.

    Attributes:
      latest: the last value of every metric.
      writer: of process 0; None in the others.
    """

    def __init__(self, config: ExperimentConfig, path: pathlib.Path, start: int, *, is_resumed: bool = True):
        """start: updates that the run begins after. is_resumed: with a checkpoint; else no record there is its own."""
        kept = start if is_resumed else NOTHING
        self.writer = MetricWriter(path, start, config, kept) if jax.process_index() == 0 else None
        self.progress = Progress(config.stage, config.train.steps, start)
        self.latest: dict[str, float] = {}
        self._steps: dict[str, int] = {}
        self._watch = collapse.Watch(config.stage, config.train.steps)
        self._name = f"[{config.stage}]"

    def write(self, step: int, metrics: dict[str, float], headline: tuple[str, ...] = ()) -> None:
        """Records metrics and prints a line with those of the headline (if it names any)."""
        self.know(step, metrics)
        if self.writer is not None:
            self.writer.write(step, metrics)
        if self.writer is not None and headline:
            self.progress.line(step, {name: metrics[name] for name in headline if name in metrics})
        for warning in self._watch.warnings(step, metrics):
            self.say(f"{self._name} warning: {warning}")

    def know(self, step: int, metrics: dict[str, float]) -> None:
        """Takes metrics for the latest without recording them."""
        self.latest |= metrics
        self._steps |= dict.fromkeys(metrics, step)

    def metric_of(self, step: int, name: str) -> float | None:
        """The value that a checkpoint of `step` is kept by: as last logged, but an evaluation's of that step alone.

        Else a checkpoint that was never evaluated would push the one out that was.
        """
        if name.startswith("eval") and self._steps.get(name) != step:
            return None
        return self.latest.get(name)

    def say(self, text: str) -> None:
        """Prints a line, once for all processes."""
        if self.writer is not None:
            print(text, flush=True)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
