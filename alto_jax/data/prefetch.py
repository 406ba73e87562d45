"""Batches on the device before they are asked for, with an exact position for checkpoints."""

from collections import deque
from collections.abc import Callable
from typing import Any


class DevicePrefetch:
    """An iterator of device batches over an iterator of host batches.

    Up to `depth` batches are handed to the device ahead, where the copy runs beside the computation. `get_state` is the
    position after the last batch that was given out, not after the last one that was read; `set_state` goes there.
    """

    def __init__(self, iterator: Any, put: Callable[[Any], Any], depth: int = 2):
        """
        Args:
          iterator: host batches, with get_state and set_state.
          put: places a host batch on the devices (sharding.put_batch); must not wait for the copy.
          depth: batches ahead, at least 1.

        Raises:
          ValueError: depth below 1.
        """
        if depth < 1:
            raise ValueError(f"depth: expected at least 1, got {depth}")
        self._iterator, self._put, self._depth = iterator, put, depth
        self._ready: deque[tuple[Any, Any]] = deque()
        self._state, self._ended = iterator.get_state(), False

    def __iter__(self) -> "DevicePrefetch":
        return self

    def __next__(self) -> Any:
        while len(self._ready) < self._depth and not self._ended:
            try:
                batch = self._put(next(self._iterator))
            except StopIteration:
                self._ended = True
                break
            self._ready.append((batch, self._iterator.get_state()))
        if not self._ready:
            raise StopIteration
        batch, self._state = self._ready.popleft()
        return batch

    def get_state(self) -> Any:
        """Position after the last batch given out."""
        return self._state

    def set_state(self, state: Any) -> None:
        """Goes to a position; what was read ahead is dropped."""
        self._iterator.set_state(state)
        self._ready.clear()
        self._state, self._ended = state, False
