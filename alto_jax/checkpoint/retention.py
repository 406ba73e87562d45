"""Which steps of a run stay."""

from collections.abc import Callable, Mapping
import dataclasses
import math
from typing import Any


@dataclasses.dataclass(frozen=True)
class Retention:
    """Which steps stay: the `newest` ones, and beside them the `best` by the metric that they were saved with.

    mode: "min" or "max" is best. Steps without the metric (or with NaN) are none of the best.
    """

    newest: int = 2
    best: int = 0
    mode: str = "min"

    def keep(self, metrics: Mapping[int, float | None]) -> set[int]:
        """The steps to keep of {step: metric}."""
        known = {s: value for s, value in metrics.items() if value is not None and not math.isnan(value)}
        sign = 1 if self.mode == "min" else -1
        ranked = sorted(known, key=lambda s: (sign * known[s], -s))
        return {*sorted(metrics)[-self.newest :], *ranked[: self.best]}


class Policy:
    """Orbax's form of `Retention`."""

    def __init__(self, keep: Callable[[list[int]], set[int]]):
        self._keep = keep

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        """Which of the checkpoints (with a `step` each) stay."""
        kept = self._keep([info.step for info in checkpoints])
        return [info.step in kept for info in checkpoints]
