"""Batches that are computed at the same time."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
import os
from typing import TypeVar

import jax

T = TypeVar("T")


def batches_at_once(on_a_cpu: int = 4) -> int:
    """How many batches a model computes at the same time unless it is told: some on a CPU of several processors, of
    which one batch leaves a part idle (in small products, and while it is read and written); else 1.

    Args:
      on_a_cpu: as many there (two cores, 64 images in batches of 16: four at once take a tenth less than two).
    """
    return on_a_cpu if jax.default_backend() == "cpu" and len(os.sched_getaffinity(0)) > 1 else 1


def in_order(calls: Iterable[Callable[[], T]], at_once: int) -> Iterator[T]:
    """The results of calls, in the order of the calls, of which `at_once` run at the same time.

    A call is taken from `calls` when it may begin, or with several at once when it is the next that may. What two of
    them compile, the first of them compiles, and the other waits for it.

    Raises:
      Whatever a call raises, in its place; the ones behind it that have begun are ended first.
    """
    if at_once == 1:
        for call in calls:
            yield call()
        return
    with ThreadPoolExecutor(at_once, thread_name_prefix="alto-batch") as pool:
        running: deque[Future[T]] = deque()
        try:
            for call in calls:
                running.append(pool.submit(call))
                if len(running) > at_once:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for one in running:
                one.cancel()
