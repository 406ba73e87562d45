"""Tables of result files as they lie there: several checkpoints, unfinished and damaged ones, given rows; no model."""

import json

import pytest

from alto_jax.config import ConfigError
from alto_jax.evaluate import outputs, results, runner, timing
from alto_jax.evaluate.options import EvaluateOptions
from alto_jax.evaluate.paper import card, pages

_PLAIN = {"mode": "adaptive", "protocol": "joined", "scoring": "alto_jax", "min_pixels": 0, "grammar": False,
          "forced_prefix": False, "end_bias": 0.0, "max_new_tokens": 64, "num_latent_tokens": 32, "limit": 0,
          "exif": "stored", "mask_rule": "auto"}  # fmt: skip


def put(out, benchmark, checkpoint="stage2 step 4 abc", count=3):
    """A result file of three samples, of which `count` are there."""
    task = f"{benchmark}.joined.adaptive"
    header = {"checkpoint": checkpoint, "version": results.VERSION, "batch_size": 2, "task": task, "samples": 3,
              "family": "grefcoco", "benchmark": benchmark, "data": "x", "left_out": {}, **_PLAIN}  # fmt: skip
    line = {"phrase": "a", "answer": "", "valid": True, "num_masks": 1, "said_no": False, "length": 4, "iou": 0.5,
            "intersection": 5, "union": 10, "target_pixels": 8, "predicted_pixels": 7, "boundary": 0.5,
            "mask": None}  # fmt: skip
    lines = [{"index": i, "key": str(i), "image": str(i), **line} for i in range(count)]
    path = results.result_path(out, task)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(each) + "\n" for each in [header, *lines]))
    return path


def rescored(out, names=(), **changes):
    """The tasks of the tables, and tables.md."""
    found = outputs.rescore(EvaluateOptions("", names, out, out, rescore=True, worst=0, title="m", **changes))
    return [name.partition(".")[0] for name in found], (out / "tables.md").read_text()


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    monkeypatch.setattr(outputs.tables, "plots", lambda *arguments: [])


def test_results_of_two_checkpoints_make_no_table(tmp_path):
    put(tmp_path, "grefcoco_val")
    assert rescored(tmp_path)[0] == ["grefcoco_val"]  # also where no evaluation has come to its tables
    put(tmp_path, "grefcoco_testA", "stage2 step 9 def")
    message = "several checkpoints: grefcoco_val.* of stage2 step 4 abc, grefcoco_testA.* of stage2 step 9 def; choose"
    with pytest.raises(ConfigError, match=message):
        rescored(tmp_path, ["all"])
    assert rescored(tmp_path, ["grefcoco_testA"])[0] == ["grefcoco_testA"]


def test_unfinished_results_hinder_no_others(tmp_path):
    put(tmp_path, "grefcoco_val")
    path = put(tmp_path, "grefcoco_testA", count=2)
    assert rescored(tmp_path, ["grefcoco_val"])[0] == ["grefcoco_val"]
    with pytest.raises(ConfigError, match="2 of 3 samples are there; finish the evaluation first"):
        rescored(tmp_path, ["grefcoco_testA"])
    whole = put(tmp_path, "grefcoco_testA").read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(ConfigError, match="2 of 3 samples are there"):
        rescored(tmp_path, ["grefcoco_testA"])
    for damaged, message in (
        (b"", "testA.joined.adaptive.jsonl line 1: expected a JSON object, got ''"),
        (b"{}\n", "expected a file of results with its header"),
        (whole.replace(b'{"index": 1', b"\0\0\0"), "line 3: expected a JSON object"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match=message):
            rescored(tmp_path, ["grefcoco_testA"])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"limit": 2}, "limit 0, not 2"),
        ({"protocol": "per_sentence"}, "protocol 'joined', not 'per_sentence'"),
        ({"exif": "upright"}, "exif 'stored', not 'upright'"),
        ({"mask_rule": ">127"}, "mask_rule 'auto', not '>127'"),
        ({"max_new_tokens": 40}, "max_new_tokens 64, not 40"),
    ],
)
def test_what_only_another_evaluation_could_change_is_refused(changes, message, tmp_path):
    put(tmp_path, "grefcoco_val")
    with pytest.raises(ConfigError, match=f"grefcoco_val.joined.adaptive was evaluated with {message}; only"):
        rescored(tmp_path, **changes)
    assert rescored(tmp_path, limit=3, max_new_tokens=64)[0] == ["grefcoco_val"]  # as they were evaluated


def test_a_row_of_8_bits_is_named(tmp_path):
    put(tmp_path, "grefcoco_val", "stage2 step 4 abc int8")
    _, text = rescored(tmp_path)
    assert "| m (adaptive, joined, int8 weights) |" in text and "| grefcoco_val.joined.adaptive, int8 weights |" in text
    put(tmp_path, "grefcoco_val")
    assert "int8" not in rescored(tmp_path)[1]


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "rows.json: no such file"),
        ("{", "rows.json: not readable as JSON"),
        ("[1]", "expected rows by table, some of tokenizer, refcoco, .*, got list"),
        ('{"gref": []}', "expected rows by table, .*, got gref"),
        ('{"grefcoco": {"row": "a"}}', "grefcoco: expected a list of"),
        ('{"grefcoco": [{"name": "a"}]}', "grefcoco: expected a list of .* got {'name': 'a'}"),
        ('{"grefcoco": [{"row": "a", "grefcoco_val": 1}]}', "a: grefcoco_val is no column; expected grefcoco_testA ci"),
    ],
)
def test_given_rows_that_no_table_shows_are_refused(text, message, tmp_path):
    put(tmp_path, "grefcoco_val")
    file = tmp_path / "rows.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=f"--paper-rows: .*{message}"):
        rescored(tmp_path, paper_rows=file)
    assert not (tmp_path / "tables.md").exists()
    with pytest.raises(ConfigError, match="--paper-rows"):  # before the model is there
        runner.evaluate(EvaluateOptions("", ["scenes"], tmp_path, paper_rows=file))
    file.write_text('{"grefcoco": [{"row": "a", "grefcoco_val ciou": 71.5}]}')
    assert "| a (given) | 71.5 |" in rescored(tmp_path, paper_rows=file)[1]


def test_a_page_needs_answers_of_both_lengths(tmp_path):
    put(tmp_path, "grefcoco_val")
    tasks = {"grefcoco_val.joined.adaptive": {"benchmark": "grefcoco_val", "mode": "adaptive"}}
    with pytest.raises(ConfigError, match="no results of grefcoco_val by fixed length; finish the evaluation"):
        pages.write(tmp_path / "page", tmp_path, tasks, lambda name, header: None)


def test_times_after_a_line_that_was_cut_short(tmp_path):
    header = {"batch_size": 2}
    path = results.result_path(tmp_path, "a")
    path.parent.mkdir()
    timing.TimingFile(path, header, "cpu", done=0).add(0, 2, 8, 1.0)
    file = timing.timing_path(path)
    file.write_text(file.read_text() + '{"start": 2, "sam')
    timing.TimingFile(path, header, "cpu", done=2).add(2, 2, 8, 3.0)
    assert timing.summarise_timing(file)["batch"]["samples"] == 4


def test_a_card_has_no_settings_of_a_training_that_never_was(tmp_path):
    """A conversion writes a config.json whose fields of training are the defaults."""
    file = tmp_path / "config.json"
    plain = {"stage": "stage2", "seed": 3, "train": {"steps": 700}, "data": {"source": "scenes"}, "sft": {}}
    file.write_text(json.dumps(plain))
    assert "| train.steps | `700` |" in card._settings(file, 700)
    assert card._settings(file, 0) == card._settings(tmp_path / "none", 700)
    assert "700" not in card._settings(file, 0) and "converted, merged or packed" in card._settings(file, 0)
