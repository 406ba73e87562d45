"""The tour of a checkpoint, with a tiny random one: files, numbers, and a second run that only reports."""

import contextlib
import io
import json
import sys

from absl.testing import flagsaver
from PIL import Image
import pytest

from alto_jax import main

CONFIG = '''
"""A tour of few steps."""
import ml_collections
from configs import stage3

def get_config(size=None):
    config = ml_collections.ConfigDict({"checkpoint": CHECKPOINT, "num_scenes": 4, "kinds": ("box",)})
    config.stages = ("low", "high")
    for name, weight in zip(config.stages, (0.0, 0.1)):
        config[name] = stage3.get_config("debug")
        config[name].train.update({"steps": 1, "checkpoint_every": 0})
        config[name].eval.num_samples = 0
        config[name].grpo.reward.length_weight = weight
    return config
'''


def printed_by(*arguments) -> str:
    """What the command prints; in this process, so that a second run has the programs of the first one."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, flagsaver.flagsaver(), contextlib.redirect_stdout(said):
        patch.setattr(sys, "argv", ["main", *arguments])
        assert main.main() == 0
    return said.getvalue()


@pytest.fixture(scope="module")
def tour(debug_model, tmp_path_factory):
    root = tmp_path_factory.mktemp("tour")
    (root / "config.py").write_text(CONFIG.replace("CHECKPOINT", repr(str(debug_model.path))))
    command = [f"--config={root / 'config.py'}", f"--workdir={root / 'out'}"]
    return root / "out", printed_by(*command), command


def test_pictures_come_first_and_the_summary_has_all_numbers(tour):
    out, printed, _ = tour
    assert printed.index("first mask after ") < printed.index("[stage3] ")
    assert {Image.open(out / "pictures" / f"{i}.png").size for i in range(3)} == {(128, 128)}
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary["scenes"]) == {"names", "unseen", "box", "boxes"} and set(summary["stage3"]) == {"low", "high"}
    for row in (*summary["scenes"].values(), *(run["box"] for run in summary["stage3"].values())):
        assert row["samples"] == 4 and 0 <= row["giou"] <= 1 and 0 < row["tokenizer"] < 1
    assert set(summary["lengths"]) == {
        f"{w}_{x}" for w in ("answers", "tokenizer") for x in ("num_targets", "complexity")
    }


def test_report_shows_pictures_baselines_and_both_penalties(tour):
    page = (tour[0] / "report.html").read_text()
    for text in ("best constant", "no codes", "right object", "length penalty", "Masks after their first tokens"):
        assert text in page
    assert page.count("<img ") == 3 * 3 + 3 and not any(f' src="{scheme}' in page for scheme in ("http", "/"))


def test_running_it_again_trains_nothing(tour):
    out, _, command = tour
    before = json.loads((out / "summary.json").read_text())
    assert printed_by(*command).count("is already complete") == 2
    after = json.loads((out / "summary.json").read_text())
    assert after["scenes"] == before["scenes"] and after["stage3"] == before["stage3"]
