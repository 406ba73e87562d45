"""What the loop needs of a stage of training.

A stage says how parameters begin, which batches come, what the loss is and how to evaluate; the loop in
`alto_jax.train` does the rest. Stage 3 adds a rollout between the batch and the loss.
"""

from collections.abc import Callable
import dataclasses
import pathlib
from typing import Any

import jax

from alto_jax.batch import Rollout
from alto_jax.data.source import Batches
from alto_jax.parallel.shares import BatchShare

# `Stage` says what the arguments are. Metrics are float32 scalars by name.
LossFn = Callable[..., tuple[jax.Array, tuple[dict[str, jax.Array], Any]]]
SampleWriter = Callable[[dict, Rollout, int, pathlib.Path], None]


@dataclasses.dataclass(frozen=True)
class Stage:
    """What the loop needs of a stage.

    Attributes:
      init: `init(key) -> params`, all parameters from scratch; traceable.
      data: `data(share) -> iterator` of host batches with get_state/set_state: the rows of a `BatchShare`.
      loss_fn: `loss_fn(params, batch, drawn, step[, totals]) -> (loss, (metrics, aux))`; metrics are float
        scalars, aux (arrays with a row per row of the batch) is handed to `after_update`.
      draw: `draw(rng, batch_size) -> drawn`, a tree with one row per row of the batch: what is random in the loss.
        Drawn for the whole batch, so that it depends neither on processes nor on micro-batches. None: nothing is.
      totals: `totals(params, batch) -> dict` of counts that the loss is a mean over where that is not the number
        of rows; under gradient accumulation loss_fn gets their sums over the whole batch, divided by the number of
        micro-batches. None: every loss is a mean over rows.
      inherits: top-level parameter names taken from the start checkpoint where it has them; () if the
        stage starts from nothing.
      requires: names among them that the start checkpoint must have.
      reset: regex of paths that keep their fresh values all the same.
      finish_init: `finish_init(params) -> params` after the start checkpoint is read; traceable.
      rollout: `rollout(params, batch, rng) -> batch` for the loss, or None; jitted by the loop.
      refill: `refill(batch, other) -> batch` moves what is worth learning from another rollout into places of the first
        that are not, or None; num_missing: `num_missing(batch) -> int` of places left; both jitted by the loop.
      histograms: `histograms(batch) -> dict` of arrays whose distribution is logged, or None; jitted by the loop.
      log_samples: `log_samples(params, batch, step, directory)` writes a table of samples, or None.
      init_stats: `init_stats() -> dict` of arrays kept between steps.
      after_update: `after_update(state, aux, rng) -> state`, inside the jitted step, or None.
      evaluate: `evaluate(params) -> dict` of floats (and lists) on held-out data, or None.
      previous: the command that makes the start checkpoint, for messages.
      headline: names of the metrics that the progress line shows (all go to metrics.jsonl).
      check: `check(metrics)` raises if the logged means show a misconfiguration, or None.
      save_files: `save_files(workdir)` writes what the checkpoint needs beside arrays.
    """

    init: Callable[[jax.Array], dict]
    data: Callable[[BatchShare], Batches[Any]]
    loss_fn: LossFn
    draw: Callable[[jax.Array, int], Any] | None = None
    totals: Callable[[dict, Any], dict[str, jax.Array]] | None = None
    inherits: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    reset: str | None = None
    finish_init: Callable[[dict], dict] | None = None
    rollout: Callable[[dict, Any, jax.Array], Rollout] | None = None
    refill: Callable[[Rollout, Rollout], Rollout] | None = None
    num_missing: Callable[[Rollout], jax.Array] | None = None
    histograms: Callable[[Rollout], dict[str, jax.Array]] | None = None
    log_samples: SampleWriter | None = None
    init_stats: Callable[[], dict] = dict
    after_update: Callable[[Any, Any, jax.Array], Any] | None = None
    evaluate: Callable[[dict], dict[str, Any]] | None = None
    previous: str = ""
    headline: tuple[str, ...] = ("loss",)
    check: Callable[[dict[str, float]], None] | None = None
    save_files: Callable[[pathlib.Path], Any] | None = None
