"""Answers about built-in scenes beside their baselines."""

import json

import numpy as np
import pytest

from alto_jax.data.scenes import ChatConfig, SceneChats, ScenesConfig
from alto_jax.evaluate import scene_answers, scenes
from tests.conftest import run_python


@pytest.fixture(scope="module")
def made(debug_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("scenes")
    command = ["-m", "alto_jax.evaluate.scenes", "--checkpoint", debug_model.path, "--out", out]
    done = run_python(*command, "--scenes", 6, "--batch-size", 4)
    assert done.returncode == 0, done.stderr[-2000:]
    return out, done.stdout


def test_every_kind_has_its_baselines(made):
    out, printed = made
    rows = json.loads((out / "scenes.json").read_text())["rows"]
    assert list(rows) == list(scene_answers.KINDS) and printed.strip() == (out / "scenes.md").read_text().strip()
    for row in rows.values():
        assert row["samples"] == 6 and 0 < row["no_codes"] < 1 and 0 < row["tokenizer"] < 1
        # Chosen on other scenes, but it is a real mask: no worse than the worst that there is.
        assert 0 <= row["best_constant"] <= 1 and 1 / 6 <= row["distinct"] <= 1
    assert "right_object" in rows["names"] and "right_object" not in rows["boxes"]


def test_right_object():
    source = SceneChats(ScenesConfig(num_scenes=40, min_objects=2, max_objects=3), ChatConfig(**scene_answers._ONE))
    seen = 0
    for index in range(12):
        scene, record = source.with_scene(index)
        assert scene.key == source.scenes[index].key == record["key"]
        targets = scene.targets(record["masks"][0])
        if len(targets) != 1:
            continue
        seen += 1
        for i in range(len(scene.objects)):
            mask = scene_answers.transforms.soft_mask(scene.union([i]), 32) > 0.5
            assert scene_answers._is_right(mask, scene, targets[0]) == (i == targets[0])
        assert not scene_answers._is_right(np.zeros((32, 32), bool), scene, targets[0])
    assert seen >= 8


@pytest.fixture
def sample():
    """Makes a sample with some values of its own."""
    one = dict(iou=0.5, length=3, valid=True, codes=(1, 2, 3), mask=np.ones((2, 2), bool), right=True, no_codes=0.1,
               constant=0.2, tokenizer=0.6, tokenizer_full=0.7, tokenizer_length=4, num_targets=1,
               complexity=1.0)  # fmt: skip
    return lambda **changes: scene_answers.Sample(**one | changes)


def test_summary(sample):
    samples = [sample(), sample(valid=False, iou=0.0, right=False, length=0)]
    found = scene_answers.summarize(samples)
    assert found["giou"] == 0.25 and found["distinct"] == 0.5 and found["well_formed"] == 0.5
    assert found["mean_length"] == 3 and found["right_object"] == 0.5
    several = scene_answers.summarize([sample(right=None)])
    assert "right_object" not in several


def test_comparison_with_another_model(sample):
    half = np.array([[True, True], [False, False]])
    others = [sample(), sample(codes=(1, 9), mask=half, iou=0.1), sample(codes=(), mask=half & False, iou=0.0)]
    found = scene_answers.compare([sample(), sample(), sample()], others)
    # Of 3 + 3 + 3 codes: none, the second and the third, all.
    assert found["changed_codes"] == pytest.approx(5 / 9) and found["equal_answers"] == pytest.approx(1 / 3)
    assert found["iou_of_both"] == pytest.approx((1 + 0.5 + 0) / 3) and found["other_giou"] == pytest.approx(0.2)


@pytest.mark.parametrize(
    "flags, message",
    [(("--kinds", "x"), "--kinds: unknown 'x'"), (("--scenes", "0"), "--scenes: expected at least 1, got 0")],
)
def test_refused(debug_model, flags, message, refused):
    assert message in refused(scenes.main, "--checkpoint", debug_model.path, *flags)
