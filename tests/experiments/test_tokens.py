"""The table of prefix IoUs: groups, fixed and best lengths, and the command."""

import json

import numpy as np
import pytest

from experiments import tokens
from tests.conftest import run_python


def test_lengths_beside_each_other():
    # Two masks that are good at once, two that need all four tokens.
    iou = np.array([[0.9, 0.9, 0.9, 0.9], [0.8, 0.8, 0.8, 0.8], [0.1, 0.2, 0.3, 0.8], [0.1, 0.2, 0.3, 0.9]])
    assert tokens.at_length(iou, np.array([1, 1, 4, 4])) == pytest.approx(0.85)
    assert tokens.at_length(iou, 2.5) == pytest.approx((0.525 + 0.575) / 2)
    assert tokens.at_length(iou, 4.0) == pytest.approx(0.85)
    assert tokens.best_lengths(iou, 0.01).tolist() == [1, 1, 4, 4]
    assert tokens.best_lengths(iou, tokens.cost_of_mean(iou, 2.5)).mean() == 2.5
    table = tokens.Table(
        iou, iou / 2, np.array([1, 1, 4, 4]), np.array([1, 1, 5, 6]), np.array([1.1, 3.0, 9.0, 9.5]), np.full(4, 0.1)
    )
    found = tokens.summarize(table)
    assert [row["masks"] for row in found["rows"]] == [
        "all",
        "one plain shape",
        "one intricate shape",
        "4 to 8 targets",
    ]
    assert found["best_same_mean"] >= found["adaptive"] > found["fixed_same_mean"]
    assert found["rows"][3]["4"] == pytest.approx(0.85) and found["rows"][0]["1 withheld"] == pytest.approx(0.2375)
    assert found["spearman_predicted_targets"] > 0.7
    assert found["entropy_of_lengths"] == pytest.approx(np.log(2))


def test_partial_correlation():
    rng = np.random.default_rng(0)
    given = rng.normal(size=2000)
    x, y = given + rng.normal(size=2000), given + rng.normal(size=2000)
    assert abs(tokens.partial_spearman(x, y, given)) < 0.06 < 0.4 < tokens.metrics.spearman(x, y)


def test_command_gives_the_same_table_twice(debug_model, tmp_path):
    texts = []
    for name in ("a", "b"):
        command = ["-m", "experiments.tokens", "--checkpoint", debug_model.path, "--out", tmp_path / name]
        done = run_python(*command, "--masks", 12)
        assert done.returncode == 0, done.stderr[-2000:]
        texts.append((tmp_path / name / "tokens.json").read_bytes())
    assert texts[0] == texts[1] and (tmp_path / "a" / "tokens.png").stat().st_size > 1000
    found = json.loads(texts[0])
    assert found["rows"][0]["number"] == 12 and 0 <= found["adaptive"] <= 1
