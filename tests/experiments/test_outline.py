"""Where more tokens help: the outline's pixels, and the command."""

import json

import numpy as np

from experiments import outline
from tests.conftest import run_python


def test_pixels_near_an_outline():
    mask = np.zeros((1, 9, 9), bool)
    mask[0, :, 4:] = True  # Cut by the picture's border, which is no outline.
    for width in (0, 1, 2):
        expected = np.zeros(9, bool)
        expected[4 - width : 4 + width] = True
        assert (outline.near_outline(mask, width)[0] == expected).all()
    assert not outline.near_outline(np.ones((1, 4, 4), bool), 2).any()


def test_rise_of_each_width():
    iou = np.zeros((2, 3, 3))
    iou[:, :, 0], iou[:, :, 1], iou[:, :, 2] = [0.7, 0.8, 0.9], [0.8, 0.85, 0.9], 0.9
    rows = outline.summarize(iou, np.array([1, 1]), np.array([1.0, 1.2]), (4, 8, 16))
    assert [row["masks"] for row in rows] == ["all"] * 3 + ["one plain shape"] * 3
    np.testing.assert_allclose([row["from 4 to 16"] for row in rows[3:]], [0.2, 0.1, 0.0], atol=1e-12)


def test_command(debug_model, tmp_path):
    command = ["-m", "experiments.outline", "--checkpoint", debug_model.path, "--masks", 8, "--out"]
    rows = {}
    for name, more in {"given": (), "trained": ("--first_tokens_steps", 2)}.items():
        done = run_python(*command, tmp_path / name, *more)
        assert done.returncode == 0, done.stderr[-2000:]
        rows[name] = json.loads((tmp_path / name / "outline.json").read_text())["rows"]
        of_all = [row["4"] for row in rows[name] if row["masks"] == "all"]
        assert len(of_all) == 3 and of_all == sorted(of_all)  # more pixels that count as right
    assert rows["given"] != rows["trained"]
