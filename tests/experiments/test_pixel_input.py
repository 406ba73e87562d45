"""The experiment on the SAM encoder's picture, a step of it."""

import json

import numpy as np
import pytest

from alto_jax.checkpoint import loading
from experiments import pixel_input
from tests.experiments.commands import run_command


def test_enlarged_pictures_lose_what_is_fine():
    rng = np.random.default_rng(0)
    fine = rng.integers(0, 256, (2, 32, 32, 3), np.uint8)
    assert np.array_equal(pixel_input.enlarged(fine, 1.0), fine)
    assert pixel_input.enlarged(fine, 0.25).std() < fine.std() / 2  # antialiased on the way down
    smooth = np.broadcast_to(np.linspace(0, 255, 32)[:, None, None], (1, 32, 32, 3)).astype(np.uint8)
    assert np.abs(pixel_input.enlarged(smooth, 0.5) - smooth).mean() < 2


def test_command(debug_model, monkeypatch, tmp_path):
    monkeypatch.setattr(pixel_input.fixed_adaptive, "KINDS", ("box",))
    monkeypatch.setattr(pixel_input, "SHARES", (1.0, pixel_input.SHARE))
    options = ["--seeds", "0", "--steps", 1, "--batch_size", 2, "--masks", 8, "--scenes", 2]
    found = json.loads(run_command(pixel_input, monkeypatch, tmp_path / "a", debug_model.path, *options))
    assert [row["pixels"] for row in found["as_it_is"]] == [64, 28]
    names = [row["trained on, asked with"] for row in found["adapted"]]
    assert names == ["64, 64", "64, 28", "28, 64", "28, 28"]
    assert len(found["answers"]) == 2
    model = loading.load_model(debug_model.path)
    assert pixel_input.measure(model, model.params, 8, list(pixel_input.SHARES)) == found["as_it_is"]
    assert found["as_it_is"][0]["8"] == pytest.approx(found["adapted"][0]["8"], abs=0.2)
