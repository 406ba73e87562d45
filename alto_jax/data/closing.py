"""Iterators that hold threads, and may be thrown away without being closed.

The garbage collector comes to them anywhere, even inside `ThreadPoolExecutor.submit`: ending a pool's threads there
waits for a lock that the same thread holds, for ever. What is left behind is therefore closed by a thread of its own.
"""

from collections.abc import Callable
import queue
import threading
from typing import Any
import weakref

import grain

Close = Callable[[], Any]
_abandoned: queue.SimpleQueue = queue.SimpleQueue()  # Note: of all queues the one that the collector may put into.
_lock = threading.Lock()
_thread: list[threading.Thread] = []


class ClosingIterator(grain.DatasetIterator):
    """A DatasetIterator whose `close`, explicit or by the collector, ends what it holds."""

    def holds(self, *closes: Close) -> None:
        """Says what closing means; to be called once, by __init__. The functions must not refer to this iterator."""
        with _lock:
            if not _thread:
                _thread.append(threading.Thread(target=_close_abandoned, name="closing", daemon=True))
                _thread[0].start()
        self._closes = closes
        self._finalizer = weakref.finalize(self, _abandoned.put, closes)
        self._finalizer.atexit = False  # Note: then nobody waits for the threads.

    def close(self) -> None:
        """Drops what is being read."""
        if self._finalizer.detach() is not None:
            _call(self._closes)
        super().close()

    def __del__(self) -> None:
        """Nothing: see `holds`. The base class would close here."""


def _close_abandoned() -> None:
    while True:
        _call(_abandoned.get())


def _call(closes: tuple[Close, ...]) -> None:
    for close in closes:
        close()
