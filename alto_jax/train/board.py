"""TensorBoard's files of a run, which it does not need: what cannot be written is left out, and said once.

Note: tensorboardX's SummaryWriter writes in a thread, which a full disk ends; a few metrics later its queue is full,
and the run would wait for it for ever.
"""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import time
from typing import Any

import numpy as np

from alto_jax import cli

_ABOVE = 1e-12 * 1.1 ** np.arange(775)  # to 1e20
_EDGES = np.concatenate([-_ABOVE[::-1], [0.0], _ABOVE])  # of a histogram's bins


class Board:
    """Writes scalars and histograms to a new file of a folder, each record before the call returns."""

    def __init__(self, folder: str | os.PathLike, start_step: int):
        """folder: is made. start_step: what earlier files hold after it is not shown."""
        from tensorboardX import event_file_writer, summary  # late: slow to start, and only process 0 needs it
        from tensorboardX.proto import event_pb2  # late: as above

        self._folder, self._summary, self._proto = pathlib.Path(folder), summary, event_pb2
        self._file: event_file_writer.EventsWriter | None = None
        with self._told_once():
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = event_file_writer.EventsWriter(str(self._folder / "events"))
            begun = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._add(start_step + 1, session_log=begun)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """A scalar of each metric."""
        with self._told_once():
            for name, value in metrics.items():
                self._add(step, summary=self._summary.scalar(name, value))
            self._flush()

    def write_histograms(self, step: int, values: dict[str, Any]) -> None:
        """A histogram of each array."""
        with self._told_once():
            for name, array in values.items():
                self._add(step, summary=self._summary.histogram(name, np.ravel(array), _EDGES))
            self._flush()

    def close(self) -> None:
        with self._told_once():
            if self._file is not None:
                self._file.close()
                self._file = None

    def _add(self, step: int, **content: Any) -> None:
        if self._file is not None:
            self._file.write_event(self._proto.Event(wall_time=time.time(), step=step, **content))

    def _flush(self) -> None:
        if self._file is not None:
            self._file.flush()

    @contextlib.contextmanager
    def _told_once(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            broken, self._file = self._file, None
            with contextlib.suppress(OSError):
                if broken is not None:
                    broken.close()
            cli.tell(f"warning: {self._folder}: {error}; this run writes no more for TensorBoard")
