"""Iterators that hold threads, thrown away where closing them would wait for ever."""

from concurrent.futures import thread as futures_thread
import gc
import threading
import time

import numpy as np
import pytest

from alto_jax.data import pipeline, prefetch
from tests.data import replicas


def masks(num_threads):
    records = [{"key": str(i), "image": s.image, "mask": s.union([0])} for i, s in enumerate(replicas.scenes(4))]
    options = {"image_size": 32, "mask_size": 16, "batch_size": 2, "seed": 0, "num_threads": num_threads}
    return iter(pipeline.mask_batches(records, **options))


def reading_threads():
    return {t for t in threading.enumerate() if t.name.startswith(("reading", "prefetch", "grain-prefetch"))}


def ended(before, seconds=20):
    """Whether the threads that were not there before end."""
    deadline = time.monotonic() + seconds
    while reading_threads() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    return not reading_threads() - before


@pytest.mark.parametrize("ahead", [False, True])
def test_collected_inside_of_submit(ahead):
    """The collector may come while this very thread holds the locks of the pools that it would end."""
    gc.collect()
    before = reading_threads()
    iterator = prefetch.Ahead(masks(2)) if ahead else masks(2)
    assert np.asarray(next(iterator).mask).shape == (2, 16, 16)
    assert reading_threads() - before
    cycle = [iterator]
    cycle.append(cycle)
    done = threading.Event()

    def submit_and_collect(cycle):
        pools = [o for o in gc.get_objects() if isinstance(o, futures_thread.ThreadPoolExecutor)]
        locks = [futures_thread._global_shutdown_lock, *(pool._shutdown_lock for pool in pools)]
        for lock in locks:
            lock.acquire()
        try:
            cycle.clear()
            gc.collect()
            done.set()
        finally:
            for lock in locks:
                lock.release()

    del iterator
    worker = threading.Thread(target=submit_and_collect, args=(cycle,), daemon=True)
    worker.start()
    assert done.wait(20)
    worker.join()
    assert ended(before)


def test_closed_and_then_collected():
    gc.collect()
    before = reading_threads()
    iterator = masks(2)
    next(iterator)
    iterator.close()
    iterator.close()
    assert ended(before)
    del iterator
    gc.collect()


def test_used_up():
    gc.collect()
    before = reading_threads()
    records = [{"key": str(i), "image": s.image, "mask": s.union([0])} for i, s in enumerate(replicas.scenes(4))]
    batches = pipeline.mask_batches(
        records, image_size=32, mask_size=16, batch_size=2, seed=0, num_epochs=1, shuffle=False, num_threads=2
    )
    assert len(list(batches)) == 2
    assert ended(before)
