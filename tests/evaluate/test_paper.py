"""The paper's tables, figures and a model's card, each by its command, on format replicas with models of debug size."""

import csv
import dataclasses
import hashlib
import json
import math
import shutil
import xml.etree.ElementTree as ElementTree

import numpy as np
from PIL import Image
import pytest

from alto_jax.checkpoint import loading, packed, runs
from alto_jax.config import ConfigError
from alto_jax.evaluate import __main__ as command
from alto_jax.evaluate import device, runner
from alto_jax.evaluate.paper import card, curves, pages, published
from alto_jax.mllm import text
from tests.debug_model import write_model
from tests.evaluate.test_runner import data  # noqa: F401 - a fixture

# Of the printed numbers, with their keys in order: a changed digit changes it.
PRINTED = "343675d46dd302a533ff9ee52fee8f5c5746f016b10569963cbe17890ef097ef"
ONE = ("--limit", "1", "--batch-size", "1", "--timed-samples", "1", "--worst", "0", "--grammar", "--forced-prefix")


@pytest.fixture(scope="module", autouse=True)
def one_model_in_memory():
    """A model is opened and its programs are traced once, in however many folders it lies."""
    load, opened, programs, last = loading.load_model, {}, {}, [""]

    def load_once(directory, mesh=None, step=None, **options):
        last[0] = json.dumps(runs.load_meta(directory)["model"])
        if last[0] not in opened:
            opened[last[0]] = load(directory, mesh, step, **options)
        return opened[last[0]]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "load_model", load_once)
        patch.setattr(runner, "Programs", lambda *given: programs.setdefault(last[0], device.Programs(*given)))
        yield


def ask(*arguments) -> None:
    """Runs the command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["evaluate", *map(str, arguments)])
        assert command.main() == 0


@pytest.fixture(scope="module")
def tables(debug_model, data, tmp_path_factory):  # noqa: F811
    """Tables 2 to 6 of one checkpoint, written once: the out directory."""
    out = tmp_path_factory.mktemp("tables")
    ask("--table", "2,3,4,5,6", "--checkpoint", debug_model.path, "--data", data, "--out", out, *ONE)
    return out


def read_csv(path) -> list[dict]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def numbers_in(value) -> list[float]:
    """All numbers of nested lists and dicts, in order."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for item in value for number in numbers_in(item)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def run_of(path, model, stage: str, penalty: float):
    """A run with the weights of a model, and the configuration of a stage."""
    shutil.copytree(model.path, path)
    own = {"tokenizer": {"loss": {"length": penalty}}, "grpo": {"reward": {"length_weight": penalty}}}
    (path / "config.json").write_text(json.dumps({"stage": stage, **own}))
    return path


# --- the paper's numbers ----------------------------------------------------------------------------------


def test_the_printed_numbers_are_all_there():
    text = json.dumps(published.numbers(), sort_keys=True, ensure_ascii=False)
    assert hashlib.sha256(text.encode()).hexdigest() == PRINTED
    for table in published.TABLES.values():
        shown = [v for _, values in table.rows() for v in values if v is not None]
        assert sorted(shown) == sorted(numbers_in(published.numbers()[table.key])), table.number
    assert "paper" not in packed.shipped()  # a folder of assets, but no checkpoint


def test_the_papers_rows_for_the_tables_of_an_evaluation():
    rows = {row["row"]: row for row in published.family_rows("grefcoco")}
    assert rows["ALToLLM-8B (AL), paper"]["grefcoco_val length"] == 17.5
    assert rows["GroundHog-7B, paper"] == {"row": "GroundHog-7B, paper", "grefcoco_val giou": 66.7}
    assert published.times()[3] == ("ALToLLM-8B (AL)", "val", 17.5, 0.71)


# --- tables -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [2, 3, 4, 5, 6])
def test_a_table_has_all_rows_of_the_paper_and_no_gap_in_ours(tables, number):
    table = published.TABLES[number]
    rows = read_csv(tables / f"table{number}.csv")
    assert [*rows[0]] == ["source", "method", *(column.heading for column in table.columns)]
    value = lambda text: float(text) if text else None
    printed = [(r["method"], [value(v) for v in [*r.values()][2:]]) for r in rows if r["source"] == "paper"]
    assert printed == [(name, [*values]) for name, values in table.rows()]
    ours = [row for row in rows if row["source"] == "ours"]
    assert len(ours) == (4 if number == 3 else 2) and all(all(row.values()) for row in ours)
    for row, mode in zip(ours, ("FL", "AL") * 2):
        assert f"({mode}, joined, " in row["method"] and "grammar, forced prefix, first 1 samples)" in row["method"]
        assert ("batch 1" in row["method"]) == (number != 3)
    if number == 3:
        assert ["one at a time" in row["method"] for row in ours] == [True, True, False, False]
        assert "in batches of 1" in ours[2]["method"]
    text = (tables / f"table{number}.md").read_text()
    for name, values in printed:
        assert f"| {name}, paper | {' | '.join('–' if v is None else str(v) for v in values)} |" in text
    assert all(note in text for note in table.notes)


def test_the_numbers_of_a_table_are_those_of_the_evaluation(tables):
    found = json.loads((tables / "metrics.json").read_text())["tasks"]
    times = json.loads((tables / "timing.json").read_text())
    content = json.loads((tables / "table2.json").read_text())
    fixed, adaptive = [row for row in content["rows"] if row["source"] == "ours"]
    for row, mode in ((fixed, "fixed"), (adaptive, "adaptive")):
        for split in ("val", "testA", "testB"):
            task = found[f"grefcoco_{split}.joined.{mode}"]
            shown = [row["cells"][f"{split} {name}"] for name in ("cIoU", "gIoU", "length")]
            assert shown == [100 * task["ciou"], 100 * task["giou"], task["lengths"]["mean"]]
            assert row["details"][f"grefcoco_{split}"]["intervals"] == task["intervals"]
    alone = [row for row in read_csv(tables / "table3.csv") if "one at a time" in row["method"]][1]
    single = times["grefcoco_testA.joined.adaptive"]["single"]
    assert float(alone["testA"]) == single["seconds_per_sample"] and single["samples"] == 1
    text = (tables / "table4.md").read_text()
    assert text.count("| refcoco_val | FL | 1 |") == text.count("| refcocog_test | AL | 1 |") == 1


def test_tables_are_written_again_without_a_model(tables, data, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    shutil.copytree(tables / "results", tmp_path / "results")
    ask("--table", "2,6", "--rescore", "--data", data, "--out", tmp_path, "--worst", "0", "--title",
        json.loads((tables / "tasks.json").read_text())["title"])  # fmt: skip
    for name in ("table2.md", "table2.csv", "table2.json", "table6.md"):
        assert (tmp_path / name).read_bytes() == (tables / name).read_bytes()


def test_table_7_is_of_two_checkpoints(debug_model, data, tmp_path):  # noqa: F811
    config = debug_model.config
    plain = dataclasses.replace(config.model, tokenizer=dataclasses.replace(config.model.tokenizer, sam=None))
    write_model(tmp_path / "plain", dataclasses.replace(config, model=plain))
    given = ("--table", "7", "--data", data, "--limit", "1", "--batch-size", "1", "--out", tmp_path)
    for wrong in (debug_model.path, f"{debug_model.path},{debug_model.path}"):
        with pytest.raises(ConfigError, match="table 7 takes two"):
            ask(*given, "--checkpoint", wrong)
    ask(*given, "--checkpoint", f"{tmp_path / 'plain'},{debug_model.path}")  # in any order
    rows = read_csv(tmp_path / "table7.csv")
    assert [float(row["gIoU"]) for row in rows[:2]] == [94.4, 91.9]
    tasks = [json.loads((tmp_path / f"{name}_pixels" / "metrics.json").read_text())["tasks"][published.RECONSTRUCTION]
             for name in ("with", "without")]  # fmt: skip
    expected = [tasks[0]["with_features"]["giou_by_tokens"]["8"], tasks[1]["without_features"]["giou_by_tokens"]["8"]]
    assert [float(row["gIoU"]) for row in rows[2:]] == [100 * value for value in expected]
    assert all(
        "tokenizer_multi_target_sa1b_val, 8 tokens, " in row["method"] and "batch 1" in row["method"]
        for row in rows[2:]
    )
    assert rows[3]["method"].startswith("pixel encoder: no, plain (")


# --- figures ------------------------------------------------------------------------------------------------


def check_pictures(stem, least: int = 300) -> None:
    """There is a PNG of some size that is not of one colour, and an SVG that can be parsed."""
    picture = np.asarray(Image.open(f"{stem}.png").convert("L"))
    assert min(picture.shape) >= least and picture.std() > 5
    assert ElementTree.parse(f"{stem}.svg").getroot().tag.endswith("svg")


def test_figure_6_is_of_the_records_of_runs(tmp_path):
    given = []
    for penalty, steps in ((0.01, 100), (0.0001, 40)):
        run = tmp_path / f"{penalty}"
        run.mkdir()
        plain = {"stage": "stage3", "grpo": {"reward": {"length_weight": penalty}}}
        (run / "config.json").write_text(json.dumps(plain))
        records = [{"step": s, "entropy": math.exp(-s), "length": 9.0 - s / 50, "iou": 0.5} for s in range(1, steps)]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (run / "metrics.jsonl").write_text(lines + '{"step": 99999, "entr')  # cut short by a crash
        given.append(run)
    ask("--figure", "6", "--runs", ",".join(map(str, given)), "--out", tmp_path / "out")
    check_pictures(tmp_path / "out" / "figure6")
    rows = read_csv(tmp_path / "out" / "figure6.csv")
    assert [float(row["penalty"]) for row in rows] == [0.0001] * 39 + [0.01] * 99  # from the smallest penalty on
    assert float(rows[4]["entropy"]) == math.exp(-5) and float(rows[-1]["length"]) == 9.0 - 99 / 50
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    ask("--figure", "6", "--runs", ",".join(map(str, given)), "--out", tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_figure_7_has_points_and_a_curve(debug_model, data, tmp_path):  # noqa: F811
    run = run_of(tmp_path / "run", debug_model, "stage3", 0.002)
    sets = ("multi_target_sa1b_val", "grefcoco_val", "a150")
    ask("--figure", "7", "--runs", run, "--length", "1,8", "--data", data,
        "--out", tmp_path, *ONE, "--timed-samples", "0")  # fmt: skip
    check_pictures(tmp_path / "figure7")
    rows = read_csv(tmp_path / "figure7.csv")
    assert [(row["benchmark"], row["run"], row["length"]) for row in rows] == [
        (name, run, length) for name in sets for run, length in (("fixed", "1"), ("fixed", "8"), ("run", "adaptive"))
    ]
    assert [float(row["tokens"]) for row in rows if row["run"] == "fixed"] == [1, 8] * 3
    assert {row["penalty"] for row in rows if row["run"] == "run"} == {"0.002"}
    found = json.loads((tmp_path / "runs" / "run" / "metrics.json").read_text())["tasks"]
    assert float(rows[-1]["giou"]) == found["a150.joined.adaptive"]["giou"]
    before = (tmp_path / "figure7.csv").read_bytes()
    ask("--figure", "7", "--runs", run, "--rescore", "--data", data, "--out", tmp_path,
        "--worst", "0")  # fmt: skip
    assert (tmp_path / "figure7.csv").read_bytes() == before


def test_figure_8_is_of_the_predicted_lengths(debug_model, tmp_path):
    given = [run_of(tmp_path / f"run{i}", debug_model, "stage1_5", penalty) for i, penalty in enumerate((0.1, 0.001))]
    ask("--figure", "8", "--runs", ",".join(map(str, given)), "--benchmark", "tokenizer_scenes", "--scenes", "2",
        "--batch-size", "1", "--timed-samples", "0", "--out", tmp_path)  # fmt: skip
    check_pictures(tmp_path / "figure8")
    rows = read_csv(tmp_path / "figure8.csv")
    assert [(row["run"], float(row["penalty"])) for row in rows] == [("run1", 0.001), ("run0", 0.1)]
    task = json.loads((tmp_path / "runs" / "run0" / "metrics.json").read_text())["tasks"]["tokenizer_scenes"]
    assert [float(rows[1][name]) for name in ("mean", "std", "entropy")] == [
        task["lengths"][name] for name in ("mean", "std", "entropy")
    ]
    assert float(rows[1]["giou"]) == task["with_features"]["giou_adaptive"]


def test_masks_in_questions_take_as_many_tokens_as_asked_for(debug_model, data, tmp_path, monkeypatch):  # noqa: F811
    asked, render = [], text.render_prompt
    spy = lambda tokenizer, question, *rest, **options: (
        asked.append(question) or render(tokenizer, question, *rest, **options)
    )
    monkeypatch.setattr(text, "render_prompt", spy)
    ask("--benchmark", "mask_perception", "--length", "3,fixed", "--checkpoint", debug_model.path, "--data", data,
        "--out", tmp_path, *ONE, "--timed-samples", "0")  # fmt: skip
    masks = [question.split(text.MASK_START)[1].split(text.MASK_END)[0] for question in asked]
    assert [mask.count("<") for mask in masks] == [3, 8]


def test_pages_show_answers_of_both_lengths(tables, debug_model, data, tmp_path):  # noqa: F811
    for number, names in pages.PAGES.items():
        stem = tmp_path / f"figure{number}"
        shutil.copytree(tables / "results", stem / "results")  # as a page that was stopped and goes on
        ask("--figure", number, "--checkpoint", debug_model.path, "--data", data, "--out", tmp_path, *ONE)
        check_pictures(stem, 200)
        rows = read_csv(stem.with_suffix(".csv"))
        assert [row["benchmark"] for row in rows] == [*names]
        assert all(row["phrase"].startswith("<box>[[") == (number == 4) for row in rows)
        assert all(1 <= int(row["adaptive tokens"]) <= int(row["fixed tokens"]) == 8 for row in rows)


def test_rows_of_a_page_go_from_short_to_long():
    lines = [{"index": i, "length": length, "valid": i != 3, "target_pixels": 5 * (i != 4)}
             for i, length in enumerate((7, 2, 5, 1, 1, 3, 9))]  # fmt: skip
    chosen = pages.by_length(lines, 3)
    assert [line["length"] for line in chosen] == [2, 5, 9]  # neither malformed nor without a target
    assert len(pages.by_length(lines[3:5], 3)) == 2
    box = pages._with_boxes(np.zeros((50, 100, 3), np.uint8), [(0.1, 0.2, 0.5, 0.8)])
    assert box[10, 20].any() and box[39, 20].any() and not box[25, 30].any() and not box[45:].any()


# --- the card -----------------------------------------------------------------------------------------------


def test_a_card_names_weights_data_and_settings(tables, debug_model, tmp_path):
    file = tmp_path / "cards" / "CARD.md"
    results = tmp_path / "results"
    shutil.copytree(tables, results)
    ask("--card", "--results", results, "--checkpoint", debug_model.path, "--title", "my model", "--out", file)
    text = file.read_text()
    digest, count = card.weights_hash(str(debug_model.path))
    assert digest in text and f"| parameters | {count:,} |" in text and text.startswith("# my model\n")
    header = json.loads((results / "results" / "pas20.joined.fixed.jsonl").read_text().splitlines()[0])
    assert header["data"] in text and header["checkpoint"] in text and "forced_prefix True" in text
    assert "| LISA-7B, paper | 39.1 |" in text and "| my model (fixed, joined, grammar, forced prefix" in text
    for name in ("lengths.png", "iou_by_length.png"):
        assert f"](../results/{name})" in text and (results / name).exists()
    ask("--card", "--results", results, "--checkpoint", debug_model.path, "--title", "my model", "--out", file)
    assert file.read_text() == text


def test_weights_have_a_hash_of_their_values(debug_model, tmp_path):
    """It is that of what the checkpoint holds, however it lies on disk."""
    config = debug_model.config
    other = tmp_path / "other"
    write_model(other, config)
    assert card.weights_hash(str(other)) == card.weights_hash(str(debug_model.path))
    plain = dataclasses.replace(config.model, tokenizer=dataclasses.replace(config.model.tokenizer, sam=None))
    write_model(tmp_path / "plain", dataclasses.replace(config, model=plain))
    assert card.weights_hash(str(tmp_path / "plain"))[0] != card.weights_hash(str(other))[0]


def test_a_card_is_of_one_checkpoint(tables, debug_model, tmp_path):
    other = shutil.copytree(debug_model.path, tmp_path / "other")
    step = next((other / "checkpoints").iterdir())
    (step / "_CHECKPOINT_METADATA").write_bytes((step / "_CHECKPOINT_METADATA").read_bytes() + b" ")
    given = ("--card", "--out", tmp_path / "CARD.md")
    with pytest.raises(ConfigError, match="is of checkpoint 'stage2 step 0 .*, not of 'step 0"):
        ask(*given, "--results", tables, "--checkpoint", other)
    with pytest.raises(ConfigError, match="are of the same task"):
        ask(*given, "--results", f"{tables},{tables}", "--checkpoint", debug_model.path)
    with pytest.raises(ConfigError, match="holds no results"):
        ask(*given, "--results", tmp_path, "--checkpoint", debug_model.path)
    assert not (tmp_path / "CARD.md").exists()


# --- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--table 9 --checkpoint M", "--table: expected some of 2, 3, 4, 5, 6, 7, got 9"),
        ("--table two --checkpoint M", "--table: expected numbers with commas between, got 'two'"),
        ("--table 2,7 --checkpoint M", "--table: 7 takes two checkpoints of its own"),
        ("--table 2", "--checkpoint is required"),
        ("--table 2 --checkpoint M --benchmark a150", "--benchmark: a150 is no column of table 2; expected some"),
        ("--table 7 --checkpoint M --benchmark a150", "--benchmark: expected one of tokenizer_NAME for table 7"),
        ("--table 2 --figure 6", "expected one of --table, --figure"),
        ("--figure 3 --runs M", "--figure: expected one of 4, 5, 6, 7, 8, 9, got 3"),
        ("--figure 6", "--runs: expected the runs that it compares, got nothing"),
        ("--figure 4 --runs M", "--runs: expected nothing for figure 4, but --checkpoint, got M"),
        ("--figure 4", "--checkpoint is required"),
        ("--figure 5 --checkpoint M --benchmark a150,pope_random", "--benchmark: pope_random: figure 5 is of masks"),
        ("--figure 4 --checkpoint M --benchmark mask_perception", "--benchmark: mask_perception: figure 4 is of masks"),
        ("--figure 7 --runs M --benchmark tokenizer_a150", "--benchmark: tokenizer_a150: figure 7 is of masks"),
        ("--figure 6 --runs nowhere", "--runs: nowhere: expected the directory of a run of stage3"),
        ("--figure 8 --runs M", "--runs: M: expected the directory of a run of stage1_5"),
        ("--figure 6 --runs gs://bucket/run", "--runs: expected a path on this machine"),
        ("--card --checkpoint M --results gs://bucket/out", "--results: expected a path on this machine"),
        ("--runs M --checkpoint M --benchmark scenes", "--runs: goes with --figure alone"),
        ("--card --checkpoint M", "--results is required"),
        ("--card --checkpoint M --results M --out out.txt", "--out: expected a name that ends in .md"),
        ("--benchmark scenes --checkpoint M --length 4,some", "--length: expected adaptive, fixed, both, or numbers"),
        ("--benchmark scenes --checkpoint M --length 0", "--length: expected adaptive, fixed, both, or numbers"),
    ],
)  # fmt: skip
def test_wrong_requests_are_refused(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        ask("--out", "out", *arguments.split())
    assert str(error.value).startswith(message) and not (tmp_path / "out").exists()


def test_runs_are_told_apart(tmp_path):
    for name in ("a/x", "b/x", "c/y"):
        (tmp_path / name).mkdir(parents=True)
    names = lambda *given: [run.name for run in curves.open_runs([str(tmp_path / name) for name in given])]
    assert names("a/x", "c/y") == ["x", "y"] and names("a/x", "b/x") == ["a-x", "b-x"]
    with pytest.raises(ConfigError, match="is named twice"):
        names("a/x", "a/x")
    (tmp_path / "a/x/config.json").write_text('{"stage": "stage2"}')
    with pytest.raises(ConfigError, match="config.json: stage: expected 'stage3', got 'stage2'"):
        curves.open_runs([str(tmp_path / "a/x")], "stage3")
    (tmp_path / "a/x/config.json").write_text("{")
    with pytest.raises(ConfigError, match="config.json: not readable as JSON"):
        names("a/x")
