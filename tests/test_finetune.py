"""configs/finetune.py, small: from a user's files to a table of before and after, and back (docs/finetune.md)."""

import json
import re

import numpy as np
from PIL import Image
import pytest

from alto_jax import main, tokenize
from alto_jax.batch import PromptBatch
from alto_jax.checkpoint import runs
from alto_jax.config import ConfigError
from alto_jax.data import sources
from alto_jax.data.convert.pairs import read_pairs
from alto_jax.data.convert.writing import write
from alto_jax.data.mixture import Mixture
from alto_jax.experiment import make_experiment
from alto_jax.inference import shapes
from alto_jax.stages.sft import _answered
from alto_jax.train import loop
from experiments import new_class
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """Eight pictures with an umbrella and their masks, and the JSONL of them."""
    folder = tmp_path_factory.mktemp("mine")
    new_class.write(folder, "umbrella", 8)
    found = read_pairs(folder / "images", folder / "masks", "the umbrella", "auto")
    assert write(found, folder, adaptive=0.5, max_bad_fraction=0.0) == (8, [])
    return folder


def test_the_configuration_states_the_figures_of_its_document():
    stated = " ".join((ROOT / "configs/finetune.py").read_text().split('"""')[1].split())
    document = (ROOT / "docs/finetune.md").read_text()
    [(before, after)] = re.findall(r"\| gIoU, umbrellas \| ([\d.]+) \| ([\d.]+) \|", document)
    [seconds] = re.findall(r"\((\d+) processor seconds\)", document)
    assert f"from gIoU {before} to {after} in {seconds} processor seconds" in stated


def config_of(model, meta, **groups):
    plain = main.load_config(str(ROOT / "configs/finetune.py:debug")).to_dict()
    plain["data"].update({"meta": str(meta), "validation_fraction": 0.4})
    plain["init_from"] = str(model)
    for group, values in groups.items():
        plain[group].update(values)
    return make_experiment(plain)


def test_pictures_of_a_new_class(mine, tmp_path):
    names = sorted(path.name for path in (mine / "images").iterdir())
    assert names == [f"umbrella_{number:04d}.png" for number in range(8)]
    masks = [np.asarray(Image.open(mine / "masks" / name)) for name in names]
    assert all(set(np.unique(mask)) == {0, 255} and mask.shape == (128, 128) for mask in masks)
    with pytest.raises(ConfigError, match="--name=owl: alto-tiny was taught that; choose another than airplane, "):
        new_class.write(tmp_path, "owl", 1)
    with pytest.raises(ConfigError, match="--name=gizmo: no such thing among the built-in pictures"):
        new_class.write(tmp_path, "gizmo", 1)


@pytest.fixture(scope="module")
def run(mine, debug_model, tmp_path_factory):
    """(directory, result, what it printed) of a run of four steps."""
    path = tmp_path_factory.mktemp("finetuned") / "run"
    return path, loop.train(config_of(debug_model.path, mine / "meta.json"), path)


def test_before_and_after_in_the_same_units(run):
    path, result = run
    names = ("giou", "ciou", "format_rate", "mean_length", "distinct")
    for name in (*names, *(f"replay/{name}" for name in names)):
        assert np.isfinite([result["eval_before"][name], result["eval"][name]]).all()
    assert result["best_step"] in (0, 2, 4) and result["steps"] == 4
    assert json.loads((path / "result.json").read_text()) == result


def test_the_base_stays_as_it_was_and_the_run_holds_adapters_alone(run, debug_model):
    path, _ = run
    meta = runs.load_meta(path)
    assert meta["lora"]["rank"] == 16 and meta["base"] == str(debug_model.path)
    assert meta["base_identity"] == runs.identity(str(debug_model.path))
    table = (path / "parameters.txt").read_text().split("frozen:")[0]
    assert "lora_a" in table and "kernel" not in table


def test_replay_is_a_share_of_the_stream_and_never_evaluated_with_it(mine, debug_model, monkeypatch):
    config, seen = config_of(debug_model.path, mine / "meta.json", data={"replay": 0.25}), []
    monkeypatch.setattr(sources.pipeline, "chat_batches", lambda source, *_, **__: seen.append(source) or [])
    sources.chat_iterator(config, None)
    counts = seen[0].counts
    assert isinstance(seen[0], Mixture) and counts["replay"] == pytest.approx(sum(counts.values()) / 4, abs=1)
    held_out = sources.chat_source(config, held_out=True, adaptive_only=True)
    assert {"umbrella"} == {held_out[i]["image_name"].split("_")[0] for i in range(len(held_out))}
    assert sources.evaluated_on(config) == "eval"
    assert sources.chat_source(sources.replayed(config), held_out=True)[0]["key"].startswith("scenes/validation/")


@pytest.mark.parametrize(
    "groups, message",
    [
        ({"data": {"replay": 1.0}}, "config.data.replay: expected at least 0 and below 1, got 1.0"),
        (
            {"data": {"source": "scenes", "meta": "", "validation_fraction": 0.0, "replay": 0.5}},
            "config.data.replay: expected 0 with source 'scenes', got 0.5",
        ),
    ],
)
def test_replay_refuses(groups, message):
    with pytest.raises(ConfigError, match=message):
        config_of("x", "y", **groups)


def test_a_meta_file_that_is_not_there(debug_model, tmp_path):
    config = config_of(debug_model.path, tmp_path / "none.json")
    with pytest.raises(ValueError, match=r"config.data.meta: no file .*none.json; python -m alto_jax.data.convert"):
        loop.train(config, tmp_path / "run")


@pytest.mark.parametrize("have", [1, 3])
def test_a_last_batch_has_the_shape_of_the_others(have):
    rows, shapes = np.arange(have * 2.0).reshape(have, 2), []

    def answer(params, batch):
        shapes.append(batch.mask.shape)
        return [batch.mask * params]

    [found] = _answered(answer, 2.0, PromptBatch(rows, None, rows, rows, rows), 3)
    np.testing.assert_array_equal(found, rows * 2)
    assert shapes == [(3, 2)]


def check(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["tokenize", "check", *map(str, arguments)])
    return tokenize.main()


def test_is_the_tokenizer_good_enough(mine, debug_model, tmp_path, monkeypatch, capsys):
    folders = ["--images", mine / "images", "--masks", mine / "masks", "--samples", 5]
    check(monkeypatch, "--checkpoint", debug_model.path, *folders, "--worst", 2, "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out/summary.json").read_text())
    assert {"mean_iou", "iou_quantile_0.05", "mean_length", "iou_1", "iou_8"} <= set(found) and found["masks"] == 5
    lines = [json.loads(line) for line in (tmp_path / "out/masks.jsonl").read_text().splitlines()]
    assert found["mean_iou"] == pytest.approx(np.mean([line["iou_adaptive"] for line in lines]))
    assert found["iou_8"] == pytest.approx(np.mean([line["iou"][-1] for line in lines]))
    page = (tmp_path / "out/worst.html").read_text()
    worst = min(lines, key=lambda line: line["iou_adaptive"])
    assert worst["key"] in page and page.count("Predicted mask with") == 2
    assert "mean_iou" in capsys.readouterr().out


def test_folders_and_their_jsonl_are_the_same_masks(mine):
    folders = shapes.OfFolders(str(mine / "images"), str(mine / "masks"), "auto", 5)
    lines = shapes.OfConversations(str(mine / "meta.json"), 5)
    assert len(folders) == len(lines) == 5
    for one, other in ((folders[i], lines[i]) for i in range(5)):
        assert one["image_name"] == other["image_name"]
        np.testing.assert_array_equal(one["mask"], other["mask"])
        np.testing.assert_array_equal(one["image"], other["image"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "expected either --meta=FILE or both --images=DIR and --masks=DIR"),
        (["--images", "."], "expected either --meta=FILE or both"),
        (["--meta", "none.json", "--samples", 0], "--samples: expected at least 1, got 0"),
        (["--images", "none", "--masks", "."], "--images: expected a folder, got 'none'"),
        (["--meta", "none.json", "--exif", "stored"], "--exif: expected it with --images; --meta has its own"),
        (["--meta", "none.json"], "meta file none.json cannot be read"),
    ],
)
def test_check_refuses(debug_model, tmp_path, monkeypatch, arguments, message):
    with pytest.raises(ValueError, match=message):
        check(monkeypatch, "--checkpoint", debug_model.path, "--out", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()
