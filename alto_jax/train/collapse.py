"""Warnings of a run that has stopped learning what it is for: how each collapse shows in the metrics.

In: the metrics of a log line or of an evaluation. Out: sentences, each once until the metric recovers. What cured each
is in docs/training.md.
"""

from collections.abc import Mapping
import dataclasses


@dataclasses.dataclass(frozen=True)
class Sign:
    """A metric that says that something has collapsed: below or above a limit, from a share of the run's updates on."""

    stages: tuple[str, ...]
    metric: str
    limit: float
    text: str
    above: bool = False
    after: float = 0.1

    def shows(self, value: float) -> bool:
        """Whether the value is beyond the limit."""
        return value > self.limit if self.above else value < self.limit


SIGNS = (
    Sign(("stage1",), "codes_in_batch", 0.02, "the codebook collapses: nearly all tokens take the same few codes"),
    Sign(("stage1_5",), "length_std", 0.2, "the lengths collapse: every mask gets the same number of tokens"),
    Sign(("stage2", "stage3"), "distinct", 0.1, "the answers collapse: nearly every request gets the same codes"),
    Sign(("stage2", "stage3"), "format_rate", 0.5, "most answers hold no well-formed mask"),
    Sign(("stage3",), "format", 0.5, "most sampled answers hold no well-formed mask"),
    Sign(("stage3",), "informative_groups", 0.05, "nearly all groups have equal rewards: nothing to learn from"),
    Sign(("stage3",), "entropy", 0.01, "the policy gives one answer: no entropy is left to explore with"),
    Sign(("stage3",), "kl", 1.0, "the policy is far from its reference: raise beta or lower the rate", above=True),
)


class Watch:
    """Tells of the signs of a stage's run, each once until it is gone."""

    def __init__(self, stage: str, steps: int):
        self._signs = [sign for sign in SIGNS if stage in sign.stages]
        self._steps, self._told = steps, set[Sign]()

    def warnings(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """Sentences about the metrics of a step; names may have a prefix, such as "eval/"."""
        plain = {name.rpartition("/")[2]: value for name, value in metrics.items()}
        found = []
        for sign in self._signs:
            if sign.metric not in plain or step < sign.after * self._steps:
                continue
            value = plain[sign.metric]
            if not sign.shows(value):
                self._told.discard(sign)
            elif sign not in self._told:
                self._told.add(sign)
                found.append(f"{sign.text} ({sign.metric} {value:.3g}); see docs/training.md")
        return found
