"""What a run records while it works: metrics.jsonl, TensorBoard files, other trackers, its speed.

Speed is under `perf/` in metrics.jsonl, means since the last record: step_seconds, data_seconds (waiting for the next
batch), images_per_second, tokens_per_second (positions of the language model, stages 2 and 3), and per device
tflops (the model's own operations, `alto_jax.train.flops`), mfu (share of the device's peak, where that is known) and
hbm_gib and hbm_peak_gib (memory in use, where the device says); of several processes also the slowest
(`alto_jax.train.stragglers`). goodput and badput/… are shares of the wall clock since the run's first start
(`alto_jax.train.goodput`).
"""

import json
import os
import pathlib
from typing import Any, TextIO

import jax

from alto_jax.config import naming, write_whole
from alto_jax.parallel.devices import find_device
from alto_jax.train import board, flops, trackers
from alto_jax.train.goodput import DEVICE, Account
from alto_jax.train.stragglers import Stragglers

NOTHING = -1  # the step after which a log keeps no record, not even of an evaluation before the first update


class MetricWriter:
    """Writes metrics to `metrics.jsonl` and TensorBoard files of a run's directory, and to the trackers that
    `train.writers` names; histograms to TensorBoard only.

    Reopened after a restart at step s, records after s (after `kept`, if that is given) are dropped, so that the file
    reads as if the run had never stopped.
    """

    def __init__(self, directory: str | os.PathLike, start_step: int, config: Any, kept: int | None = None):
        self._file = going_on(pathlib.Path(directory) / "metrics.jsonl", start_step if kept is None else kept)
        self._board = board.Board(pathlib.Path(directory) / "tensorboard", start_step)
        self._trackers = trackers.start(config.train.writers, directory, config, start_step)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Appends one record {"step": step, **metrics}."""
        with naming(self._file.name):
            self._file.write(json.dumps({"step": step, **metrics}) + "\n")
            self._file.flush()
        self._board.write(step, metrics)
        for tracker in self._trackers:
            tracker.write(step, metrics)

    def write_histograms(self, step: int, values: dict[str, Any]) -> None:
        """Adds a histogram of each array."""
        self._board.write_histograms(step, values)

    def close(self) -> None:
        self._board.close()
        for tracker in self._trackers:
            tracker.close()
        with naming(self._file.name):
            self._file.close()


def going_on(file: pathlib.Path, start_step: int) -> TextIO:
    """A log of lines with a "step" each, without those after `start_step`, opened to be gone on with."""
    if file.exists():
        kept = [line for line in _lines(file) if _step_of(line) <= start_step]
        write_whole(file, "".join(line + "\n" for line in kept))
    return file.open("a")


def _lines(file: pathlib.Path) -> list[str]:
    """Lines of a log, whose last one a crash may have cut anywhere, within a character too."""
    return file.read_text(errors="replace").split("\n")


def _step_of(line: str) -> float:
    """Step of a metrics line; a line cut short by a crash counts as after everything."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def read_metrics(directory: str | os.PathLike, name: str = "metrics.jsonl") -> list[dict]:
    """The records of a run's metrics.jsonl, or another of its logs; a line cut short by a crash is passed over."""
    lines = _lines(pathlib.Path(directory) / name)
    return [json.loads(line) for line in lines if _step_of(line) < float("inf")]


class Meter:
    """Measures the steps of a run; see the module's docstring.

    Attributes:
      news: what the last `flush` found that is worth a line ("": nothing).
    """

    def __init__(self, config: Any, account: Account):
        """account: of the run's time; what it does not count as step, device or data is no part of a step."""
        self._flops = flops.step_flops(config).total / jax.device_count()
        device = find_device(jax.devices()[0].device_kind)
        self._peak = None if device is None else device.flops
        self._rows, length = config.train.batch_size, config.data.max_length
        self._tokens = {"stage0": self._rows * length, "stage2": self._rows * length}.get(config.stage, 0)
        if config.stage == "stage3":
            self._tokens = self._rows * (length + config.grpo.num_generations * config.grpo.generate.max_new_tokens)
        self._account, self._stragglers, self.news = account, Stragglers(), ""
        self._spent: dict[str, float] = {}
        self.restart()

    def restart(self) -> None:
        """Leaves what came before (compilation) out."""
        self._mark, self._steps = self._account.snapshot(), 0

    def count(self, steps: int) -> None:
        """Counts steps that the device has done."""
        now = self._account.snapshot()
        self._steps, self._spent = steps, {part: now[part] - self._mark[part] for part in now}

    def flush(self) -> dict[str, float]:
        """The record of the steps counted since the last one; {} if there were none. All processes ask together."""
        self.news = ""
        if not self._steps:
            return {}
        waited, busy, device = (self._spent[part] / self._steps for part in ("data", "step", DEVICE))
        seconds = max(waited + busy + device, 1e-9)
        record = {
            "step_seconds": seconds,
            "data_seconds": waited,
            "images_per_second": self._rows / seconds,
            "tflops": self._flops / seconds / 1e12,
        }
        if self._tokens:
            record["tokens_per_second"] = self._tokens / seconds
        if self._peak is not None:
            record["mfu"] = self._flops / seconds / self._peak
        record |= self._stragglers.compare(seconds, waited + busy)
        self.news = self._stragglers.news
        self.restart()
        return {f"perf/{name}": value for name, value in (record | _memory()).items()}


def _memory() -> dict[str, float]:
    """Memory in use on this process's first device; {} where the device does not say (CPU)."""
    stats = jax.local_devices()[0].memory_stats() or {}
    names = {"hbm_gib": "bytes_in_use", "hbm_peak_gib": "peak_bytes_in_use"}
    return {name: stats[key] / 2**30 for name, key in names.items() if key in stats}


class Profiler:
    """Traces `count` steps from step `first` on into a directory, for xprof (TensorBoard's profile plugin)."""

    def __init__(self, directory: str | os.PathLike, first: int, count: int):
        self._directory, self._first, self._last, self._is_on = str(directory), first, first + count - 1, False

    def before(self, step: int) -> None:
        """Starts the trace if it begins with `step`."""
        if step == self._first and self._last >= self._first:
            jax.profiler.start_trace(self._directory)
            self._is_on = True

    def after(self, step: int, result: Any) -> None:
        """Ends the trace if `step`, which gives `result`, is its last one."""
        if self._is_on and step == self._last:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Ends the trace."""
        if self._is_on:
            self._is_on = False
            jax.profiler.stop_trace()
            print(f"trace of steps {self._first} to {self._last} in {self._directory}", flush=True)
