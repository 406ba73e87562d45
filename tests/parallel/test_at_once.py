"""Batches at the same time: their order, their faults, and how many there are."""

import os
import threading

import jax
import pytest

from alto_jax.parallel.at_once import batches_at_once, in_order


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_results_keep_their_order_and_so_many_run_together(at_once):
    meet, taken, running, most = threading.Barrier(at_once, timeout=20), [], [], []
    lock = threading.Lock()

    def call(index):
        with lock:
            running.append(index)
            most.append(len(running))
        meet.wait()
        with lock:
            running.remove(index)
        return index

    def calls():
        for index in range(6):
            taken.append(index)
            yield lambda index=index: call(index)

    found = []
    for result in in_order(calls(), at_once):
        found.append(result)
        # What is taken is what runs, and one that is the next to; alone, nothing is taken too early.
        assert len(taken) <= len(found) + (at_once if at_once > 1 else 0)
    assert found == list(range(6)) and max(most) == at_once


def test_a_fault_comes_in_its_place_and_leaves_nothing_running():
    ended = threading.Event()

    def fails():
        raise ValueError("the second")

    def slow():
        threading.Event().wait(0.05)
        ended.set()

    found = in_order([lambda: "the first", fails, slow, lambda: "never"], 2)
    assert next(found) == "the first"
    with pytest.raises(ValueError, match="the second"):
        next(found)
    assert ended.is_set()


def test_one_on_an_accelerator_and_on_one_processor(monkeypatch):
    several = len(os.sched_getaffinity(0)) > 1
    assert (batches_at_once(), batches_at_once(2)) == ((4, 2) if several else (1, 1))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    assert batches_at_once() == 1
    monkeypatch.undo()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert batches_at_once() == 1
