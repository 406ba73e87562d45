"""Asked to stop: SIGTERM, SIGINT or a preemption notice end a run after its step and a save.

Several processes must stop at the same step. They agree through JAX's preemption service (`jax.distributed` starts
it, and it takes over SIGTERM): whichever process is told, all of them stop at one step after that.
"""

import itertools
import signal
import threading
from types import FrameType

import jax

# Of the process, since JAX's service, which compares them, outlives a run.
_questions = itertools.count(1)


class StopSignals:
    """Takes SIGTERM and SIGINT while a `with` block runs; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self._name: str | None = None
        self._before: dict = {}
        self._is_joined = False

    def __enter__(self) -> "StopSignals":
        self._is_joined = jax.process_count() > 1
        if threading.current_thread() is threading.main_thread():
            # Note: among several processes SIGTERM belongs to JAX's preemption service.
            taken = (signal.SIGINT,) if self._is_joined else (signal.SIGTERM, signal.SIGINT)
            self._before = {number: signal.signal(number, self._handle) for number in taken}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._name is not None:
            raise KeyboardInterrupt
        self._name = signal.Signals(number).name
        print(f"{self._name}: stopping after this step and a save", flush=True)
        if self._is_joined:
            signal.raise_signal(signal.SIGTERM)

    def stop(self) -> str | None:
        """Why the run should stop here, or None; the same answer in every process. All ask equally often."""
        if not self._is_joined:
            return self._name
        from jax.experimental import multihost_utils  # late: only several processes need it

        # Note: by the number of the question, not by the step: JAX answers at the very number after the greatest that a
        # process has asked about, which steps that are not all asked about would pass over.
        return "SIGTERM" if multihost_utils.reached_preemption_sync_point(next(_questions)) else None
