"""POPE, VQAv2 and MME with tiles: the answers that the model gives by itself, in a row that says so."""

import json

import numpy as np
from PIL import Image
import pytest

import alto_jax
from alto_jax.config import ConfigError
from alto_jax.data import images
from alto_jax.evaluate import options, outputs, results, runner, tasks
from alto_jax.evaluate.questions import SUFFIX


@pytest.fixture(scope="module")
def pope(tmp_path_factory):
    """Questions about a wide image and a square one, and the files' folder."""
    root = tmp_path_factory.mktemp("pope")
    folder, rng = root / "coco" / "val2014", np.random.default_rng(0)
    folder.mkdir(parents=True)
    for name, shape in (("wide", (56, 168)), ("square", (60, 60))):
        Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    lines = [{"question_id": i, "image": f"{name}.png", "text": "Is there a dog?", "label": "no"}
             for i, name in enumerate(("wide", "square", "wide"))]  # fmt: skip
    (root / "pope").mkdir()
    (root / "pope" / "coco_pope_random.json").write_text("\n".join(map(json.dumps, lines)))
    return root


def ask(debug_model, pope, out, **changes):
    return options.EvaluateOptions(debug_model.path, ["pope_random"], out, pope, batch_size=2, title="debug",
                                   timed_samples=0, **changes)  # fmt: skip


def test_a_row_with_tiles_is_its_own(debug_model, pope, tmp_path):
    found = runner.evaluate(ask(debug_model, pope, tmp_path, max_tiles=4))
    assert [*found] == ["pope_random.tiles4"] and found["pope_random.tiles4"]["max_tiles"] == 4
    assert "| debug (up to 4 tiles) |" in (tmp_path / "tables.md").read_text()
    header, lines = results.read_results(tmp_path / "results" / "pope_random.tiles4.jsonl")
    assert header["max_tiles"] == 4
    model = alto_jax.load(debug_model.path)
    for line, name, number in zip(lines, ("wide", "square", "wide"), ([4], [1], [4]), strict=True):
        image = images.open_image(pope / "coco" / "val2014" / f"{name}.png")
        alone = model.answer(image, "Is there a dog?" + SUFFIX, max_tiles=4, max_new_tokens=10)
        assert alone.num_tiles == number and line["answer"] == alone.text


def test_without_tiles_nothing_is_said_of_them(debug_model, pope, tmp_path):
    from alto_jax.data import benchmarks
    from alto_jax.evaluate import questions

    asked = questions.open_questions("pope", "random", pope)
    task = tasks.QuestionTask(None, benchmarks.benchmark("pope_random"), asked, {"limit": 0}, 1)
    assert task.name == "pope_random" and task.options == {"max_new_tokens": 10, "limit": 0}
    with pytest.raises(ConfigError, match="max_tiles: expected at least 1, got 0"):
        ask(debug_model, pope, tmp_path, max_tiles=0)


def test_scoring_again_knows_the_tiles(debug_model, pope, tmp_path):
    header = {"task": "pope_random", "family": "pope", "benchmark": "pope_random", "samples": 0}
    again = ask(debug_model, pope, tmp_path, max_tiles=4, rescore=True)
    with pytest.raises(ConfigError, match="pope_random was evaluated with max_tiles 1, not 4"):
        outputs._check(again, header, "pope_random")
    outputs._check(again, header | {"max_tiles": 4}, "pope_random.tiles4")
    outputs._check(again, header | {"family": "refcoco"}, "refcoco_val.joined.adaptive")  # masks have none
