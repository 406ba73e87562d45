"""Which steps of a run stay."""

from collections.abc import Callable, Mapping
import dataclasses
import math
from typing import Any


@dataclasses.dataclass(frozen=True)
class Retention:
    """Which steps stay: the `newest` ones, and beside them the `best` by the metric that they were saved with.

    mode: "min" or "max" is best. metric: its name; "": any. Steps without it (or with NaN) are none of the best.
    """

    newest: int = 2
    best: int = 0
    mode: str = "min"
    metric: str = ""

    def value(self, meta: Mapping[str, Any]) -> float | None:
        """The metric that a step of this metadata was saved with; None also if it was saved with another one."""
        of_another = self.metric and meta.get("metric_name", self.metric) != self.metric
        return None if of_another else meta.get("metric")

    def ranked(self, metrics: Mapping[int, float | None]) -> list[int]:
        """The steps of {step: metric} that have one, the best first; of equal ones the newest."""
        known = {s: value for s, value in metrics.items() if value is not None and not math.isnan(value)}
        sign = 1 if self.mode == "min" else -1
        return sorted(known, key=lambda s: (sign * known[s], -s))

    def keep(self, metrics: Mapping[int, float | None]) -> set[int]:
        """The steps to keep of {step: metric}."""
        return {*sorted(metrics)[-self.newest :], *self.ranked(metrics)[: self.best]}


class Policy:
    """Orbax's form of `Retention`."""

    def __init__(self, keep: Callable[[list[int]], set[int]]):
        self._keep = keep

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        """Which of the checkpoints (with a `step` each) stay."""
        kept = self._keep([info.step for info in checkpoints])
        return [info.step in kept for info in checkpoints]
