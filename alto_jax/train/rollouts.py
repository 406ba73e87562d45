"""What stands between the data and the update in stage 3: rollouts, their refilling, minibatches and logs.

Comes in: prompt batches on the devices and the training state. Goes out: the batch of each update.
"""

from collections.abc import Callable
import functools
import pathlib
from typing import Any

import jax
import numpy as np

from alto_jax.batch import PromptBatch
from alto_jax.experiment import GrpoStageConfig
from alto_jax.parallel import sharding
from alto_jax.stages.stage import Stage
from alto_jax.train.prompt_log import PromptLog


class Rollouts:
    """The batch of each update: a rollout, or its next minibatch.

    A rollout serves `updates_per_rollout` updates, the minibatches in turn. With `max_rollouts` > 1, groups that teach
    nothing are replaced by those of further rollouts from fresh prompts, until none is left or the limit is
    reached (DAPO's dynamic sampling); only then a number of the rollout is read by the host.

    Attributes:
      prompts: the log of the prompts that are taken.
    """

    def __init__(self, cfg: GrpoStageConfig, stage: Stage, rollout: Callable, next_batch: Callable[[], Any], mesh: Any,
                 log: PromptLog):  # fmt: skip
        """Args: cfg; stage (see `stages.Stage`); rollout: jitted `rollout(state, batch, attempt)`; next_batch: gives a
        prompt batch on the devices; mesh; log: of the prompts that are taken."""
        if stage.histograms is None or stage.num_missing is None or stage.refill is None:
            raise ValueError("stage: one with rollouts needs histograms, num_missing and refill")
        self._cfg, self._stage, self._rollout, self._next_batch = cfg, stage, rollout, next_batch
        self.prompts = log
        self._whole = whole = sharding.replicated(mesh)
        self._histograms = jax.jit(stage.histograms, out_shardings=whole)
        self._num_missing = jax.jit(stage.num_missing, out_shardings=whole)
        rows = jax.sharding.NamedSharding(mesh, sharding.batch_spec())
        self._refill = jax.jit(stage.refill, out_shardings=rows)
        self._current: Any = None

    def batch(self, state: Any, step: int) -> Any:
        """The batch of update `step` (from 1 on)."""
        cfg = self._cfg
        if self._current is None or (step - 1) % cfg.updates_per_rollout == 0:
            self._current = self._collect(state, step)
        if cfg.minibatches == 1:
            return self._current
        return minibatch(self._current, self._put((step - 1) % cfg.minibatches), cfg.minibatches)

    def _collect(self, state: Any, step: int) -> Any:
        drawn: list[PromptBatch] = []

        def roll(attempt: int) -> Any:
            drawn.append(self._next_batch())
            return self._rollout(state, drawn[-1], self._put(attempt))

        batch = roll(0)
        for attempt in range(1, self._cfg.max_rollouts):
            if int(self._num_missing(batch)) == 0:
                break
            batch = self._refill(batch, roll(attempt))
        self.prompts.take(step, drawn, batch.prompt)
        return batch

    def _put(self, number: int) -> jax.Array:
        """A number on the devices; an explicit transfer, so that the jitted calls make none."""
        return jax.device_put(np.int32(number), self._whole)

    def log_histograms(self, step: int, writer: Any) -> None:
        """Adds the distributions of the current rollout to the logs; `writer` is None where nothing is written."""
        values = jax.device_get(self._histograms(self._current))
        if writer is not None:
            writer.write_histograms(step, {f"rollout/{name}": value for name, value in values.items()})

    def log_samples(self, state: Any, step: int, directory: pathlib.Path) -> None:
        """Writes samples of the current rollout, every `log_samples_every` updates."""
        write = self._stage.log_samples
        if write is not None and self._cfg.log_samples_every and step % self._cfg.log_samples_every == 0:
            write(state.all_params(), self._current, step, directory)


@functools.partial(jax.jit, static_argnums=2)
def minibatch(batch: Any, index: jax.Array, count: int) -> Any:
    """Part `index` of `count` of a batch: every `count`-th row, so that each device keeps rows of its own."""
    return jax.tree.map(lambda a: a.reshape(a.shape[0] // count, count, *a.shape[1:])[:, index], batch)
