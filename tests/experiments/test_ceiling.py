"""The learnable ceiling: a regressor and a predictor find lengths where there is something to know."""

import numpy as np
import pytest

from experiments import ceiling, tokens


def known(count: int, seed: int) -> ceiling.Known:
    """Masks of which large ones need all four tokens, small ones the first."""
    rng = np.random.default_rng(seed)
    large = rng.random(count) < 0.5
    iou = np.where(large[:, None], [0.2, 0.3, 0.4, 0.9], [0.8, 0.81, 0.82, 0.83])
    pictures = np.zeros((count, 8, 8, 4), np.float32)
    pictures[large, :, :, 0] = 1
    latents = (3 * np.eye(4, 8) + 0.1 * rng.normal(size=(count, 4, 8))).astype(np.float32)
    cls = np.where(large[:, None, None], 4.0, -4.0) * np.ones((1, 1, 8), np.float32)
    numbers = rng.normal(size=(count, 3)).astype(np.float32)
    return ceiling.Known(pictures, latents, cls.astype(np.float32), numbers, np.full(count, 2), iou)


def test_regressor_and_predictor_find_what_decides():
    data, watched, asked = known(512, 1), known(64, 2), known(64, 3)
    expected = ceiling.regress(data, watched, asked, seed=0, epochs=3)
    by_regressor = ceiling.gain_row("r", asked.iou, tokens.best_lengths(expected, tokens.cost_of_mean(expected, 2.5)))
    assert by_regressor["gain"] > 0.15 and by_regressor["gain from"] > 0.1
    predicted = ceiling.predict_by_reward(data, watched, asked, 0.1, seed=0, epochs=60)
    large = asked.pictures[:, 0, 0, 0] == 1
    assert predicted[large].mean() > predicted[~large].mean() + 1.5


def test_gain_over_a_fixed_length():
    iou = np.array([[0.2, 0.9], [0.8, 0.8]])
    row = ceiling.gain_row("x", iou, np.array([2, 1]))
    assert (row["mean"], row["std"]) == (1.5, 0.5)
    assert row["giou"] == pytest.approx(0.85) and row["fixed"] == pytest.approx(0.675)
    assert row["gain"] == pytest.approx(0.175) and row["gain from"] < 0.175 < row["gain to"]
    assert ceiling.gain_row("x", iou, np.array([2, 2]))["gain"] == pytest.approx(0)
    assert ceiling.interval(np.full(10, 0.3)) == (pytest.approx(0.3), pytest.approx(0.3))
