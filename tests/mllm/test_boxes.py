"""Boxes as text, there and back."""

import numpy as np
import pytest

from alto_jax.mllm import boxes


def test_there_and_back():
    text = boxes.format_boxes([(0, 0, 64, 32), (16, 8, 8, 4)], (32, 64))
    assert text == "<box>[[0,0,1000,1000],[250,250,375,375]]</box>"
    np.testing.assert_allclose(boxes.parse_boxes(text), [(0, 0, 1, 1), (0.25, 0.25, 0.375, 0.375)])
    assert boxes.format_boxes([(1, 1, 9, 9)], (30, 30), step=10) == "<box>[[30,30,330,330]]</box>"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[[1,2,3,4]]",
        "<box>[[1,2,3]]</box>",
        "<box>[[5,2,3,4]]</box>",
        "<box>[[1,2,3,4000]]</box>",
        "<box>[[1,2,3,4]]",
    ],
)
def test_no_box(text):
    assert boxes.parse_boxes(text) == []


def test_none_is_refused():
    with pytest.raises(ValueError, match="boxes: expected at least one"):
        boxes.format_boxes([], (4, 4))


def test_box_iou():
    assert boxes.box_iou((0, 0, 1, 1), (0.5, 0, 1.5, 1)) == pytest.approx(1 / 3)
    assert boxes.box_iou((0, 0, 1, 1), (2, 2, 3, 3)) == 0.0 == boxes.box_iou((0, 0, 0, 0), (0, 0, 0, 0))
