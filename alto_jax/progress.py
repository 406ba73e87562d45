"""What a run says while it works: a progress line with the time left, metrics.jsonl, TensorBoard files."""

import json
import os
import pathlib
import sys
import time
from typing import Any, TextIO


class MetricWriter:
    """Writes metrics to `metrics.jsonl` and TensorBoard files of a run's directory; histograms to the latter only.

    Reopened after a restart at step s, records after s are dropped, so that the file reads as if the run
    had never stopped.
    """

    def __init__(self, directory: str | os.PathLike, start_step: int = 0):
        from tensorboardX import SummaryWriter

        self._path = pathlib.Path(directory) / "metrics.jsonl"
        if self._path.exists():
            lines = self._path.read_text().splitlines()
            kept = [line for line in lines if _step_of(line) <= start_step]
            temporary = self._path.with_suffix(".tmp")
            temporary.write_text("".join(line + "\n" for line in kept))
            temporary.replace(self._path)
        self._file = self._path.open("a")
        self._board = SummaryWriter(str(pathlib.Path(directory) / "tensorboard"), purge_step=start_step + 1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Appends one record {"step": step, **metrics}."""
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def write_histograms(self, step: int, values: dict[str, Any]) -> None:
        """Adds a histogram of each array."""
        for name, array in values.items():
            self._board.add_histogram(name, array, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def _step_of(line: str) -> float:
    """Step of a metrics line; a line cut short by a crash counts as after everything."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return float("inf")


def read_metrics(directory: str | os.PathLike) -> list[dict]:
    """The records of a run's metrics.jsonl."""
    return [json.loads(line) for line in (pathlib.Path(directory) / "metrics.jsonl").read_text().splitlines()]


class Progress:
    """A progress line: step, share, metrics, speed and time left."""

    def __init__(self, name: str, total: int, start: int = 0, stream: TextIO | None = None):
        self._name, self._total, self._start = name, total, start
        self._stream = stream or sys.stdout
        self._began = time.monotonic()

    def restart_clock(self, step: int) -> None:
        """Leaves what came before `step` (compilation) out of the speed."""
        self._began, self._start = time.monotonic(), step

    def line(self, step: int, metrics: dict[str, float]) -> None:
        """Prints one line for `step` of the total."""
        values = "  ".join(f"{k} {v:.4g}" for k, v in metrics.items())
        text = f"[{self._name}] {step}/{self._total}  {values}"
        if step > self._start:
            rate = (step - self._start) / max(time.monotonic() - self._began, 1e-9)
            speed = f"{rate:.1f} steps/s" if rate >= 1 else f"{1 / rate:.1f} s/step"
            text += f"  {speed}  ETA {duration((self._total - step) / rate)}"
        print(text, file=self._stream, flush=True)


def duration(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    seconds = int(round(seconds))
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
