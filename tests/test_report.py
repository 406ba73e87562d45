"""The report: overlays pixel by pixel, and a page that is complete, escaped and accessible."""

import base64
from html.parser import HTMLParser
import io
import sys

import numpy as np
from PIL import Image
import pytest

from alto_jax import figures, report

L = 8


def test_overlay_tints_inside_and_outlines():
    image = np.full((5, 5, 3), 100, np.uint8)
    mask = np.zeros((5, 5), bool)
    mask[1:4, 1:4] = True
    out = report.overlay(image, mask, color=(200, 0, 50), alpha=0.5)
    assert out[2, 2].tolist() == [150, 50, 75]
    assert out[1, 1].tolist() == [200, 0, 50]
    assert (out[~mask] == 100).all() and (image == 100).all()
    np.testing.assert_array_equal(out, report.overlay(image, mask * 0.9, color=(200, 0, 50), alpha=0.5))
    with pytest.raises(ValueError, match=r"\(5, 5\).*\(4, 5\)"):
        report.overlay(image, mask[:4])
    with pytest.raises(ValueError, match="alpha.*2"):
        report.overlay(image, mask, alpha=2)


def test_save_overlay(tmp_path):
    image, mask = np.full((6, 4, 3), 10, np.uint8), np.eye(6, 4) > 0
    report.save_overlay(tmp_path / "o.png", image, mask)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "o.png")), report.overlay(image, mask))


def test_figures_draw_the_values_given():
    figure = figures.iou_curve_figure({"fixed": {"16": 0.5, "1": 0.2, "4": 0.4}}, {"adaptive": (6.5, 0.45)})
    curve, point = figure.axes[0].lines
    assert curve.get_xydata().tolist() == [[1, 0.2], [4, 0.4], [16, 0.5]]
    assert point.get_xydata().tolist() == [[6.5, 0.45]]
    figure = figures.length_histogram_figure({"a": [1, 1, 3, 8], "b": [2]}, L)
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights == [0, 0.5, 0, 0.25, 0, 0, 0, 0, 0.25] + [0, 0, 1, 0, 0, 0, 0, 0, 0]
    assert [t.get_text() for t in figure.axes[0].get_legend().get_texts()] == ["a (mean 3.2)", "b (mean 2.0)"]


def test_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"alto_jax\[demo\]"):
        figures.iou_curve_figure({"a": {1: 0.5}})


def test_stage_rows_and_values():
    summary = {
        "tokenizer": {"giou": 0.5, "giou_by_tokens": {"1": 0.2}},
        "stage2": {"giou": 0.25, "loss_last": 1.5},
        "seconds": {"tokenizer": 12.0},
        "seed": 3,
    }
    assert report.stage_rows(summary) == [
        {"stage": "tokenizer", "giou": 0.5, "seconds": 12.0},
        {"stage": "stage2", "giou": 0.25, "loss_last": 1.5},
    ]
    values = [0.12345, 1e-5, 123.456, 0.0, 1234, None, float("nan"), True, "x"]
    expected = ["0.123", "1.00e-05", "123.5", "0.000", "1,234", "–", "–", "yes", "x"]
    assert [report.format_value(v) for v in values] == expected


class _Page(HTMLParser):
    """Collects tags with their attributes, and text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_report_is_one_complete_page(tmp_path):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (300, 400, 3), np.uint8)
    mask = np.zeros((300, 400), bool)
    mask[50:200, 100:300] = True
    sample = report.ReportSample(image, mask, "the <red> & round apple", 3, L, mask, 0.75, (5, 1, 2))
    bare = report.ReportSample(image[:40, :50], mask[:40, :50], "no target", 1, L)
    path = report.write_report(
        tmp_path / "new" / "report.html",
        "Run <1>",
        tables={"Stages": [{"stage": "one", "giou": 0.5}, {"stage": "two", "steps": 7}]},
        figures={
            "IoU against tokens": (
                figures.iou_curve_figure({"fixed": {1: 0.2, 4: 0.5}}),
                "Rises from 0.2 to 0.5",
            )
        },
        samples={"Predictions": [sample, bare]},
        notes=["First note & more."],
    )
    page = path.read_text(encoding="utf-8")
    parsed = _Page(page)
    assert not parsed.open
    text = " ".join(parsed.text)
    for expected in (
        "Run <1>",
        "First note & more.",
        "the <red> & round apple",
        "0.500",
        "–",
        "5 1 2",
        "0.75",
    ):
        assert expected in text, expected
    assert "http" not in page and "<script" not in page
    images = [attrs for tag, attrs in parsed.tags if tag == "img"]
    assert len(images) == 1 + 3 + 2 and all(attrs["alt"] for attrs in images)
    assert "Predicted mask with 3 tokens, IoU 0.75" in [attrs["alt"] for attrs in images]
    for attrs in images:
        prefix, data = attrs["src"].split(",")
        assert prefix == "data:image/png;base64"
        Image.open(io.BytesIO(base64.b64decode(data))).load()
    assert [c["scope"] for t, c in parsed.tags if t == "th"] == ["col"] * 3 + ["row"] * 2
    figure = Image.open(tmp_path / "new" / "iou_against_tokens.png")
    assert figure.size[0] > 600
    assert sorted(p.name for p in path.parent.iterdir()) == ["iou_against_tokens.png", "report.html"]
    assert report.write_report(tmp_path / "empty.html", "Empty").exists()
