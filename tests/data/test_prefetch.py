"""One batch ahead: the same elements and states as without, also through a checkpoint."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alto_jax.checkpoint.runs import Checkpointer
from alto_jax.data.prefetch import Ahead
from alto_jax.parallel import sharding
from alto_jax.train.state import TrainState
from tests.data.test_pipeline import numbers


class Counting:
    """0, 1, 2, … up to `stop`; waits for `gate` before each."""

    def __init__(self, stop: int = 10**9):
        self.position, self.stop, self.gate = 0, stop, threading.Semaphore(10**6)

    def __next__(self):
        self.gate.acquire()
        if self.position == self.stop:
            raise StopIteration
        self.position += 1
        return self.position - 1

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def test_state_is_that_of_the_element_handed_out():
    source = Counting()
    ahead = Ahead(source, lambda n: 10 * n)
    assert ahead.get_state() == {"position": 0} and source.position == 0
    for n in range(4):
        assert next(ahead) == 10 * n
        assert ahead.get_state() == {"position": n + 1}
    ahead.set_state({"position": 2})
    assert [next(ahead) for _ in range(3)] == [20, 30, 40]
    ahead.close()


def test_the_next_element_is_made_while_the_current_one_is_used():
    source, made = Counting(), threading.Semaphore(0)

    def transform(n):
        made.release()
        return n

    ahead = Ahead(source, transform)
    assert next(ahead) == 0
    assert made.acquire(timeout=10) and made.acquire(timeout=10)  # 0, and 1 without being asked for
    source.gate = threading.Semaphore(0)  # 2 never comes, which does not keep 1 from being handed out
    assert next(ahead) == 1 and ahead.get_state() == {"position": 2}
    source.gate.release()
    ahead.close()


def test_the_end_and_errors_reach_the_reader():
    ahead = Ahead(Counting(2))
    assert list(ahead) == [0, 1] and ahead.get_state() == {"position": 2}
    broken = Ahead(Counting(), lambda n: 1 // (1 - n))
    assert next(broken) == 1
    with pytest.raises(ZeroDivisionError):
        next(broken)
    assert broken.get_state() == {"position": 1}
    broken.set_state({"position": 2})
    assert next(broken) == -1
    for iterator in (ahead, broken):
        iterator.close()


def test_checkpoints_are_exact(tmp_path):
    """Saved between two batches while the next one is ready, restored into a new iterator, on a mesh."""
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    place = lambda batch: sharding.put_batch(batch, mesh, len(batch.image))
    state = TrainState(jnp.zeros((), jnp.int32), {"w": jnp.ones(3)}, {}, {}, {})
    plain, ahead = numbers(), Ahead(numbers(), place)
    whole = [next(plain) for _ in range(8)]
    for _ in range(3):
        batch = next(ahead)
    assert isinstance(batch.image, jax.Array) and batch.image.sharding.mesh == mesh
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(3, state, ahead, {})
    next(ahead)
    checkpointer.close()
    ahead.close()
    checkpointer, resumed = Checkpointer(tmp_path), Ahead(numbers(), place)
    next(resumed)  # on its way somewhere else
    restored = checkpointer.restore(state, resumed)
    np.testing.assert_array_equal(restored.params["w"], state.params["w"])
    for expected in whole[3:]:
        batch = next(resumed)
        np.testing.assert_array_equal(batch.image, expected.image)
        np.testing.assert_array_equal(batch.mask, expected.mask)
    checkpointer.close()
    resumed.close()
