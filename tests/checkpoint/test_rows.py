"""Parameters written by themselves: a step has its name when it is complete, and not before."""

import shutil

import numpy as np
import pytest

from alto_jax.checkpoint import rows, runs

SHAPES = {"a/kernel": ((3, 2), np.float32), "b/bias": ((4,), np.float32)}


class Killed(BaseException):
    """As signal 9: nothing is cleared away."""


def save(folder, stop=None):
    def fill(sinks):
        sinks["a/kernel"][...] = np.arange(6, dtype=np.float32).reshape(3, 2)
        if stop is not None:
            raise stop
        sinks["b/bias"][...] = np.ones(4, np.float32)

    rows.save_params(folder, SHAPES, fill, {"stage": "stage1"})


def test_an_interrupted_write_is_no_checkpoint(tmp_path, monkeypatch):
    with pytest.raises(OSError, match="the disk is full"):
        save(tmp_path, OSError("the disk is full"))
    assert not list((tmp_path / "checkpoints").iterdir())  # and its room on the disk is free again
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        save(tmp_path, Killed())
    assert list((tmp_path / "checkpoints").iterdir()) and runs.complete_steps(tmp_path) == []
    with pytest.raises(FileNotFoundError, match="holds no complete step"):
        runs.find_run(tmp_path)
    save(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["0"]
    found = rows.open_params(tmp_path)
    np.testing.assert_array_equal(found["a/kernel"], np.arange(6).reshape(3, 2))
    np.testing.assert_array_equal(found["b/bias"], np.ones(4))
    with pytest.raises(FileExistsError, match="checkpoints/0: there is a checkpoint already"):
        save(tmp_path)
