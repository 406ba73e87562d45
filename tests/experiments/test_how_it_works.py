"""The figures of docs/how_it_works.md come from any checkpoint."""

import numpy as np
from PIL import Image
import pytest

import alto_jax
from experiments import how_it_works


def test_both_figures(debug_model, tmp_path):
    model = alto_jax.load(debug_model.path)
    means = how_it_works.write(model, tmp_path / "out", samples=2)
    assert list(means) == ["1", "2", "4", "8", "adaptive", "length"]
    assert all(0 <= means[name] <= 1 for name in means if name != "length")
    assert 1 <= means["length"] <= 8
    sizes = [Image.open(tmp_path / "out" / name).size for name in ("growth.png", "tokens.png")]
    assert min(map(min, sizes)) > 100


def test_the_true_outline_is_white_and_the_rest_dark():
    image, mask, target = np.full((9, 9, 3), 200, np.uint8), np.zeros((9, 9), bool), np.zeros((9, 9), bool)
    mask[2:7, 2:7] = target[1:4, 1:4] = True
    shown = how_it_works._shown(image, mask, target)
    assert (shown[1, 1] == 255).all() and (shown[2, 2] == 200).all() and (shown[8, 8] == 50).all()
    assert how_it_works._iou(mask, mask) == 1 and how_it_works._iou(mask, target) == pytest.approx(4 / 30)
