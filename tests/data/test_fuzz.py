"""A short form of the fuzz run: damaged inputs of every kind give arrays or one error line."""

import numpy as np
from PIL import Image
import pytest

from alto_jax.data import images, reading
from tests import fuzz_readers


def test_damaged_inputs_give_arrays_or_one_error_line():
    found = fuzz_readers.fuzz(420, 2026, [])
    assert not found["failures"], found["failures"][0]
    assert sum(found["outcomes"].values()) == 420 and 0 < found["peak_bytes"] < fuzz_readers.MEMORY
    kinds = {outcome.rpartition(" ")[0] for outcome in found["outcomes"]}
    assert len(kinds) >= 12 and all(f"{kind} read" in found["outcomes"] for kind in kinds), found["outcomes"]
    assert sum(outcome.endswith("refused") for outcome in found["outcomes"]) >= 11


def test_a_reader_that_lets_something_through_is_found(tmp_path, monkeypatch):
    cases = fuzz_readers.Cases(tmp_path / "files")
    rng = np.random.default_rng(0)

    def fail(*arguments, **options):
        raise TypeError("x")

    monkeypatch.setattr(reading.images, "to_rgb", fail)
    with pytest.raises(TypeError):
        for _ in range(20):
            cases.run("image", rng)
    monkeypatch.undo()
    monkeypatch.setattr(images, "to_rgb", lambda image, path: np.zeros((9, 9)))
    with pytest.raises(AssertionError):
        for _ in range(20):
            cases.run("image", rng)
    assert Image.open(tmp_path / "files" / "images" / "a.jpg").size == (fuzz_readers.WIDTH, fuzz_readers.HEIGHT)
