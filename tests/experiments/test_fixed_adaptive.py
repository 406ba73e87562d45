"""Answers by fixed and adaptive prompts, on scenes."""

import json

import numpy as np

from alto_jax.checkpoint import loading
from experiments import answers, fixed_adaptive
from experiments.answers import Answers, Requests
from tests.experiments.commands import run_command


def test_first_tokens_are_answers_of_that_length():
    model = loading.load_model("alto-tiny", for_inference=True)  # one that answers with masks
    requests = Requests(model, ["box"], 3, batch_size=2)
    for count, found in requests.first_tokens(model.params, "box", [2, 8]).items():
        asked = requests.ask(model.params, "box", adaptive=False, forced_length=count)
        assert found.length.tolist() == asked.length.tolist() == [count] * 3
        assert found.iou.mean() > 0.3
        np.testing.assert_array_equal(found.shared, asked.shared)
        np.testing.assert_array_equal(found.union, asked.union)
    shorter = requests.ask(model.params, "box", end_logit_bias=100.0)
    assert shorter.length.tolist() == [1] * 3


def test_beside_a_fixed_length():
    whole = np.full(2, 10)
    fixed = {2: Answers(np.array([2, 4]), whole, np.full(2, 2)), 4: Answers(np.array([4, 8]), whole, np.full(2, 4))}
    adaptive = Answers(np.array([4, 6]), whole, np.array([4, 2]))
    row = fixed_adaptive.beside_fixed(adaptive, fixed)
    assert np.allclose([row["fixed_same_mean"], row["gain"]], [0.45, 0.05])
    assert np.isclose(fixed_adaptive.at_mean(fixed, 9.0).mean(), 0.6)
    row = adaptive.row()
    assert list(row.values()) == [0.5, 0.5, 3.0, 1.0]


def test_command(debug_model, monkeypatch, tmp_path):
    monkeypatch.setattr(answers, "_WIDTHS", 128)  # all kinds of requests by one program
    found = json.loads(run_command(fixed_adaptive, monkeypatch, tmp_path / "a", debug_model.path, "--scenes", 4))
    assert [row["prompt"] for row in found["rows"][:5]] == [*(f"fixed, {k}" for k in (1, 2, 4, 8)), "adaptive"]
    assert {row["requests"] for row in found["gains"]} == {"names", "box", "boxes"}
    assert all(0 <= row["giou"] <= 1 and row["tokens"] <= 8 for row in found["rows"])
    assert all(row["cpu_seconds"] > 0 for row in found["seconds"])
