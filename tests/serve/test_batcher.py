"""The queue and the model's threads, with a model that is none."""

import threading
import types

import numpy as np
import pytest

from alto_jax.serve.batcher import Batcher, Job
from alto_jax.serve.engine import Question
from tests.serve.serving import wait_until


def test_two_batches_at_once():
    """Two threads of the model, each with a batch of its own, also of one job, answer and end together."""
    meet, fails = threading.Barrier(2, timeout=20), threading.Event()

    def answer(encoded, questions):
        meet.wait()
        if fails.is_set():
            raise RuntimeError(f"a fault of the device at {questions[0].ids}")
        return types.SimpleNamespace(length=np.array([questions[0].ids[0]]))

    engine = types.SimpleNamespace(
        sizes=(1,), warm_up=lambda tell: None, has_seen=lambda key: False, answer=answer,
        encode=lambda images: [None] * len(images),
    )  # fmt: skip
    batcher, states = Batcher(engine, 8, window=0.0, at_once=2), []
    batcher.start(states.append)
    job = lambda: Job("image", None, [Question([n], 40, None) for n in (5, 6, 7, 8)])
    good = job()
    batcher.submit(good).result(20)
    assert [int(good.found[index].answers.length[0]) for index in range(4)] == [5, 6, 7, 8]
    assert good.batches == [1] * 4 and states == ["ready"]
    fails.set()
    with pytest.raises(RuntimeError, match="a fault of the device at"):
        batcher.submit(job()).result(20)
    wait_until(lambda: not batcher._waiting)
    meet.abort()
    assert batcher.stop() and not batcher.is_alive
    with pytest.raises(RuntimeError, match="have ended"):
        batcher.submit(job()).result(20)
