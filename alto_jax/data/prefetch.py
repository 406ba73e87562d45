"""One batch ahead, on a thread: the next batch is read and placed on the devices while the current one is used.

    iterator = prefetch.Ahead(stage.data(...), lambda batch: sharding.put_batch(batch, mesh, batch_size))

In: an iterator with get_state and set_state. Out: one with the same elements, transformed, and the same states.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
import functools
from typing import Any

from alto_jax.data.closing import ClosingIterator
from alto_jax.data.source import Batches


class Ahead(ClosingIterator):
    """Works one element ahead of its reader; its state is that of the element handed out last (exact checkpoints).

    The given iterator is used by one thread at a time, and by nobody else from now on.
    """

    def __init__(self, iterator: Batches[Any], transform: Callable[[Any], Any] = lambda element: element):
        """Reads nothing yet.

        Args:
          iterator: `next`, get_state and set_state.
          transform: applied to each element on the thread, such as placing it on the devices.
        """
        super().__init__()
        self._iterator, self._transform = iterator, transform
        self._state = iterator.get_state()
        self._pending: Future | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        # Note: the thread is not waited for; it ends when it is done with what it is doing.
        inner = (iterator.close,) if hasattr(iterator, "close") else ()
        self.holds(functools.partial(self._thread.shutdown, wait=False, cancel_futures=True), *inner)

    def _produce(self) -> tuple[Any, Any]:
        element = self._transform(next(self._iterator))
        return element, self._iterator.get_state()

    def start_prefetch(self) -> None:
        """Begins to work on the next element, if that has not begun."""
        if self._pending is None:
            self._pending = self._thread.submit(self._produce)

    def __next__(self) -> Any:
        """The next element; raises what reading it raised."""
        self.start_prefetch()
        assert self._pending is not None
        pending, self._pending = self._pending, None
        element, self._state = pending.result()
        self.start_prefetch()
        return element

    def get_state(self) -> dict[str, Any]:
        """The position after the element handed out last."""
        return self._state

    def set_state(self, state: dict[str, Any]) -> None:
        """Moves there; the element that was being worked on is dropped."""
        self._drop()
        self._iterator.set_state(state)
        self._state = state

    def _drop(self) -> None:
        if self._pending is not None:
            self._pending.exception()  # Note: waits; whether it failed does not matter any more.
            self._pending = None
