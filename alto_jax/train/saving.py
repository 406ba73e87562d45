"""When a run saves, what it does when that fails, and the end of a run whose updates are all skipped."""

from collections.abc import Sequence
import dataclasses
import time
from typing import Any

import jax

from alto_jax.checkpoint import loading, runs
from alto_jax.config import to_dict
from alto_jax.data import prefetch
from alto_jax.experiment import ExperimentConfig
from alto_jax.parallel import distributed
from alto_jax.storage import mirror
from alto_jax.train.logs import Logs
from alto_jax.train.state import TrainState


class Saver:
    """Saves; what fails on a full disk is tried again at the next save, but for the last one of a run."""

    def __init__(self, config: ExperimentConfig, checkpointer: runs.Checkpointer, iterator: prefetch.Ahead,
                 copy: mirror.Mirror | None = None):  # fmt: skip
        self._config, self._checkpointer, self._iterator, self._copy = config, checkpointer, iterator, copy
        data: dict[str, Any] = {"system": config.data.system}
        if config.data.source == "scenes":
            data["box_step"] = config.data.scene_chats.box_step
        self._meta = {"stage": config.stage, "model": to_dict(config.model), "data": data}
        self._meta |= loading.adapter_meta(config)
        self._repeats = config.grpo.updates_per_rollout if config.stage == "stage3" else 1
        self._last, self._has_begun = time.monotonic(), False

    def is_due(self, step: int) -> bool:
        """Whether `step` is to be saved: by `train.checkpoint_every`, or the time since the last save.

        The clock is process 0's. Several processes ask it together where they meet anyway, at the first step from each
        log step on that may be saved; one alone asks at every step.

        Args:
          step: updates done; one that may be saved (no rollout in progress).
        """
        cfg = self._config.train
        if cfg.checkpoint_every and step % cfg.checkpoint_every == 0:
            return True
        meets = jax.process_count() == 1 or step % cfg.log_every < self._repeats
        if not cfg.checkpoint_minutes or not meets:
            return False
        return distributed.from_first(lambda: time.monotonic() - self._last >= 60 * cfg.checkpoint_minutes)

    def is_local_due(self, step: int) -> bool:
        """Whether `step` is to be kept on each machine, by `train.checkpoint_local_every`; as of `is_due`."""
        every = self._config.train.checkpoint_local_every
        return bool(every) and step % every == 0

    def save(
        self, step: int, state: TrainState, logs: Logs, *, unlogged: Sequence[Any] = (), is_last: bool = False,
        is_local: bool = False,
    ) -> None:  # fmt: skip
        """Saves the state of `step`; the last one of a run also waits for it.

        Args:
          step, state, logs: of the run.
          unlogged: metrics of the updates that are in no record yet, which a run that goes on from here begins with.
          is_last: of the run, or of this start.
          is_local: on each machine alone; a run's first checkpoint is one of its directory all the same, without which
            no later start takes it for begun.

        Raises:
          OSError: files cannot be written, and this is the last save (or there are several processes).
        """
        self._has_begun = self._has_begun or self._checkpointer.latest_step() is not None
        is_local = is_local and self._has_begun
        if not is_local:
            self._last = time.monotonic()
        bad, wanted = int(state.guard["in_a_row"]), self._config.train.best_metric
        metric = logs.metric_of(step, wanted)
        # Note: what patience may give back is saved in any case; its parameters are those of the last good update.
        if bad and not is_last and not (self._config.train.patience and metric is not None):
            logs.say(f"[{self._config.stage}] step {step} is not saved: the last {bad} updates were skipped")
            return
        meta = {**self._meta, "step": step, "metric_name": wanted}
        meta["unlogged"] = [{name: float(v) for name, v in one.items()} for one in jax.device_get(list(unlogged))]
        if self._config.lora.rank:
            state = dataclasses.replace(state, frozen={})
        try:
            if is_local:
                self._checkpointer.save_local(step, state, self._iterator, meta)
                return
            self._checkpointer.wait()
            copy = self._copy
            # Note: the others wait here, not in a collective, for as long as it takes.
            distributed.from_first(lambda: copy.settle() if copy is not None else None)
            self._checkpointer.save(step, state, self._iterator, meta, metric=metric)
            if is_last:
                self._checkpointer.wait()
                self._checkpointer.drop_local()
        except OSError as error:
            # Note: several processes do not see the same files fail, and must not part.
            if is_last and jax.process_count() == 1:
                self._checkpointer.save(step, state, self._iterator, meta, metric=metric)
                self._checkpointer.wait()
            elif is_last or jax.process_count() > 1:
                raise
            else:
                logs.say(
                    f"[{self._config.stage}] warning: {error}; the checkpoints of before are kept, training goes on,"
                    f" next try {self._next(step)}"
                )

    def _next(self, step: int) -> str:
        """When the save after the one of `step` comes, in words."""
        every, minutes = self._config.train.checkpoint_every, self._config.train.checkpoint_minutes
        after = [f"at step {step - step % every + every}"] if every else []
        after += [f"after {minutes:g} minutes"] if minutes else []
        return " or ".join(after) or "at the end"


def check_bad(config: ExperimentConfig, checkpointer: runs.Checkpointer, step: int, counter: jax.Array) -> None:
    """Raises FloatingPointError if too many updates in a row were skipped, up to `step`."""
    bad = int(counter)
    if bad >= config.train.max_bad_steps:
        checkpointer.wait()
        last = checkpointer.latest_step()
        kept = f"the last good checkpoint is step {last}" if last is not None else "there is no checkpoint yet"
        raise FloatingPointError(
            f"config.train.max_bad_steps: {bad} updates in a row were skipped up to step {step}, since their loss or"
            f" gradient was not finite or their loss too high; {kept} of {checkpointer.directory}"
        )
