"""The best evaluation of a run, and whether waiting for a better one has an end (`train.patience`).

Comes in: the records of metrics.jsonl, in order, so that a run that goes on knows what one that never stopped would.
Goes out: the best step, the end, and the table of what evaluation said before the first update and says now.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from alto_jax.experiment import TrainConfig


class Watch:
    """What the evaluations of a run have shown.

    Attributes:
      best, best_step: the best value of `train.best_metric` and its step (of equal ones the newest), or None.
      waited: evaluations since one was better than all before.
      found: all that the best evaluation gave; None: a process of before made it.
    """

    def __init__(self, cfg: TrainConfig, records: Iterable[Mapping[str, Any]] = ()):
        """Sees the records of a run so far, {"step", metric: value, …}."""
        self._cfg, self._seen = cfg, set[int]()
        self._at_start: dict[str, float] = {}
        self.best: float | None = None
        self.best_step: int | None = None
        self.waited = 0
        self.found: dict[str, Any] | None = None
        for record in records:
            self.see(record["step"], {name: value for name, value in record.items() if name.startswith("eval")})

    def see(self, step: int, metrics: Mapping[str, float], found: dict[str, Any] | None = None) -> None:
        """Takes the metrics of an evaluation at a step, and all that it gave; a step that it has seen is no news."""
        if not metrics or step in self._seen:
            return
        self._seen.add(step)
        if step == 0:
            self._at_start = dict(metrics)
        value = metrics.get(self._cfg.best_metric)
        if value is None:
            return
        sign = 1 if self._cfg.best_mode == "max" else -1
        self.waited += 1
        if value != value:  # Note: NaN is never the best.
            return
        if self.best is None or sign * value > sign * self.best:
            self.waited = 0
        if not self.waited or value == self.best:  # Note: of equal ones the newest, as the checkpoints are kept.
            self.best, self.best_step, self.found = value, step, found

    def take(self, step: int, value: float | None) -> None:
        """Another step, of this value, serves as the best one."""
        self.best, self.best_step, self.found = value, step, None

    def has(self, step: int) -> bool:
        """Whether an evaluation at a step was seen."""
        return step in self._seen

    def is_over(self) -> bool:
        """Whether the last `train.patience` evaluations were no better than the best before."""
        return 0 < self._cfg.patience <= self.waited

    def __str__(self) -> str:
        best = "no value yet" if self.best is None else f"best {self.best:.4g} at step {self.best_step}"
        return f"{self._cfg.best_metric} no better in the last {self.waited} evaluations, {best}"

    def result(self, measured: str) -> dict[str, Any]:
        """What result.json says of it: {"best_step"} with patience, {measured + "_before"} with `eval.at_start`."""
        found: dict[str, Any] = {"best_step": self.best_step} if self._cfg.patience else {}
        if self._at_start:
            found[f"{measured}_before"] = {n.removeprefix(f"{measured}/"): v for n, v in self._at_start.items()}
        return found

    def comparison(self, measured: str, evaluation: Mapping[str, Any]) -> str:
        """A table of the evaluation before the first update beside the one at the end; "" if there was none."""
        if not self._at_start:
            return ""
        lines = [f"{measured:<28}{'before':>10}{'after':>10}{'change':>10}"]
        for name, before in self._at_start.items():
            name = name.removeprefix(f"{measured}/")
            after = evaluation.get(name)
            if isinstance(after, (int, float)):
                lines.append(f"{name:<28}{before:>10.3f}{after:>10.3f}{after - before:>+10.3f}")
        return "\n".join(lines) + "\n"
