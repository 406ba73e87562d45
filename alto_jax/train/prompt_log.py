"""Which prompts stage 3 has taken from the data: prompts.jsonl of the run's directory.

A line for each update that takes prompts, {"step", "records", "keys"}: their places in the data set and their names, in
the order of the data. With dynamic sampling these are the prompts of all rollouts that the update came to make, and
"kept" has the records of the groups that it, and those that share its rollout, learn from. A run that goes on from the
checkpoint of step s drops the lines after s, as of metrics.jsonl: what is there says what the parameters have seen.
"""

import json
import os
import pathlib
from typing import Any

import jax
import numpy as np

from alto_jax.batch import PromptBatch, key_of
from alto_jax.config import naming
from alto_jax.parallel import sharding
from alto_jax.train.progress import going_on

FILE = "prompts.jsonl"


class PromptLog:
    """Written by process 0, which sees the rows of all; a line is written when its numbers have come from the devices,
    which `flush` waits for."""

    def __init__(self, directory: str | os.PathLike, start_step: int, mesh: Any):
        """start_step: updates that the run goes on from."""
        is_first = jax.process_index() == 0
        self._file = going_on(pathlib.Path(directory) / FILE, start_step) if is_first else None
        self._whole = jax.jit(lambda arrays: arrays, out_shardings=sharding.replicated(mesh))
        self._pending: list[tuple[int, list[tuple], Any]] = []

    def take(self, step: int, drawn: list[PromptBatch], kept: PromptBatch) -> None:
        """Notes what update `step` has drawn, and what of it is in its rollout; writes what was noted before.

        All processes call this together, and none waits for the devices longer than for the update before.
        """
        self.flush()
        read = [self._whole((batch.record, batch.key)) for batch in drawn]
        self._pending.append((step, read, self._whole(kept.record) if len(drawn) > 1 else None))

    def flush(self) -> None:
        """Writes what was noted: before a checkpoint, which must not know of prompts that the log does not."""
        pending, self._pending = self._pending, []
        for step, read, kept in pending:
            if self._file is None:
                continue
            found = jax.device_get(read)
            line = {"step": step, "records": np.concatenate([records for records, _ in found]).tolist()}
            line["keys"] = [key_of(row) for _, keys in found for row in keys]
            line |= {} if kept is None else {"kept": jax.device_get(kept).tolist()}
            with naming(self._file.name):
                self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
                self._file.flush()

    def close(self) -> None:
        """Writes what is left."""
        self.flush()
        if self._file is not None:
            self._file.close()
