"""What is made of stored results, without a model: tables, COCO results, pictures; and what an answer counts for."""

import argparse
import base64
import dataclasses
import io
import json
import re
import shutil

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
import pytest

from alto_jax.checkpoint import loading
from alto_jax.config import ConfigError
from alto_jax.data import benchmarks, prepare, rle
from alto_jax.data.prepared import Prepared
from alto_jax.evaluate import __main__ as command
from alto_jax.evaluate import gallery, results, runner, summaries, tables
from alto_jax.evaluate.options import EvaluateOptions
from alto_jax.evaluate.tasks import says_no
from tests.data import replicas
from tests.evaluate.test_runner import compiled_once, options  # noqa: F401 - a fixture

pytestmark = pytest.mark.usefixtures("compiled_once")

NAMES = "grefcoco_val,refcoco_val,pas20,pope_random,tokenizer_refcoco_val"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    replicas.write_refer(root, "grefcoco", splits=("val",), count=6)
    replicas.write_refer(root, "refcoco", splits=("val",), count=6)
    replicas.write_label_maps(root / "pas20", "pas20")
    from alto_jax.data import open_vocab

    open_vocab.build("pas20", root / "pas20" / "images", root / "pas20" / "labels", root / "open_vocab")
    replicas.write_questions(root)
    return root


@pytest.fixture(scope="module")
def evaluated(compiled_once, debug_model, data, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("out")
    found = runner.evaluate(options(debug_model, data, out, NAMES, worst=4, protocol="per_sentence", length="both"))
    return out, found


def written(out) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def test_rescored_tables_are_the_first_ones(evaluated, data, tmp_path, monkeypatch):
    """Byte for byte, with no model in sight, and again from what it wrote itself."""
    out, found = evaluated
    monkeypatch.setattr(loading, "load_model", lambda *arguments: pytest.fail("a model was loaded"))
    shutil.copytree(out, tmp_path / "out")
    for path in (tmp_path / "out").iterdir():
        if path.is_file() and path.name != "tasks.json":
            path.unlink()
    shutil.rmtree(tmp_path / "out" / "coco")
    again = lambda **changes: runner.evaluate(
        EvaluateOptions("", [], tmp_path / "out", data, rescore=True, worst=4, title="debug", **changes)
    )
    assert again() == found
    expected = written(out)
    assert {"tables.md", "metrics.json", "worst.html", "lengths.png", "coco/refcoco_val.per_sentence.fixed.json"} < {
        *expected
    }
    assert written(tmp_path / "out") == expected
    again()
    assert written(tmp_path / "out") == expected


def test_rescoring_changes_what_needs_no_model(evaluated, data, tmp_path):
    out, found = evaluated
    shutil.copytree(out, tmp_path / "out")
    rescored = runner.evaluate(
        EvaluateOptions(
            "", ["refcoco_val"], tmp_path / "out", data, rescore=True, worst=0, title="other", min_pixels=10**6
        )
    )
    assert [*rescored] == ["refcoco_val.per_sentence.adaptive", "refcoco_val.per_sentence.fixed"]
    for name, numbers in rescored.items():
        assert numbers["giou"] == numbers["t_acc"] == numbers["biou"] == 0 < found[name]["giou"]
        assert numbers["min_pixels"] == 10**6 and found[name]["min_pixels"] == 0
    text = (tmp_path / "out" / "tables.md").read_text()
    assert "other (adaptive, per_sentence, grammar, forced prefix, empty below 1000000 px)" in text


def test_what_cannot_be_rescored_is_one_clear_line(evaluated, data, tmp_path):
    out, _ = evaluated
    ask = lambda names, where, **changes: runner.evaluate(
        EvaluateOptions("", names, where, data, rescore=True, worst=0, **changes)
    )
    with pytest.raises(ConfigError, match="holds no results to compute tables from"):
        ask([], tmp_path)
    with pytest.raises(ConfigError, match="holds no results of a150 to compute"):
        ask(["a150"], out)
    with pytest.raises(ConfigError, match="was evaluated with end_bias 0.0, not 2.0"):
        ask([], out, end_bias=2.0)
    with pytest.raises(ConfigError, match="was evaluated with scoring 'alto_jax', not 'reference'"):
        ask([], out, reference=True)
    shutil.copytree(out, tmp_path / "out")
    file = results.result_path(tmp_path / "out", "refcoco_val.per_sentence.fixed")
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]))
    with pytest.raises(ConfigError, match="11 of 12 samples are there; finish the evaluation first"):
        ask(["refcoco_val"], tmp_path / "out")
    file.write_text("".join([lines[0].replace('"version": 2', '"version": 1'), *lines[1:]]))
    with pytest.raises(ConfigError, match="results of another version"):
        ask(["refcoco_val"], tmp_path / "out")


def test_coco_results_load(evaluated, tmp_path):
    """With COCO's own image numbers; the masks are those that were scored."""
    out, _ = evaluated
    for name in ("refcoco_val.per_sentence.adaptive", "pas20.per_sentence.fixed"):
        path = out / "coco" / f"{name}.json"
        lines = results.read_results(results.result_path(out, name))[1]
        entries = json.loads(path.read_text())
        assert [e["index"] for e in entries] == [line["index"] for line in lines if line["mask"] is not None] != []
        sizes = {e["image_id"]: e["segmentation"]["size"] for e in entries}
        truth = {
            "images": [{"id": i, "height": h, "width": w} for i, (h, w) in sizes.items()],
            "annotations": [],
            "categories": [{"id": 1, "name": "referent"}],
        }
        (tmp_path / "truth.json").write_text(json.dumps(truth))
        loaded = COCO(tmp_path / "truth.json").loadRes(str(path))
        assert len(loaded.anns) == len(entries)
        for annotation, entry in zip(loaded.loadAnns(loaded.getAnnIds()), entries):
            mask = loaded.annToMask(annotation)
            line = lines[entry["index"]]
            assert int(mask.sum()) == annotation["area"] >= line["predicted_pixels"]  # without ignored ones
            np.testing.assert_array_equal(mask, rle.decode(line["mask"], *line["mask"]["size"], "line"))
        if name.startswith("refcoco"):
            areas = [int(annotation["area"]) for annotation in loaded.dataset["annotations"]]
            assert areas == [lines[e["index"]]["predicted_pixels"] for e in entries]
            assert sizes.keys() <= set(range(1, 7))  # COCO_train2014_000000000001.jpg …


def test_masks_to_runs_and_back():
    rng = np.random.default_rng(0)
    for _ in range(50):
        mask = rng.random(tuple(rng.integers(1, 40, 2))) < rng.choice([0, 0.3, 1])
        found = rle.encode(mask)
        np.testing.assert_array_equal(rle.decode(found, *mask.shape, "test"), mask)
        np.testing.assert_array_equal(coco_mask.decode(json.loads(json.dumps(found))), mask)


def test_worst_answers_are_shown(evaluated, data):
    """One file with everything inside: the samples of lowest IoU first, target and prediction as they are."""
    out, found = evaluated
    page = (out / "worst.html").read_text()
    assert "http" not in page.replace("http-equiv", "") and "<script" not in page
    with_masks = [name for name, task in found.items() if "giou" in task]
    assert re.findall(r"<h2>(.*?)</h2>", page) == with_masks
    lines = results.read_results(results.result_path(out, "refcoco_val.per_sentence.fixed"))[1]
    chosen = gallery.worst(lines, 4)
    ious = sorted(line["iou"] for line in lines)[:4]
    assert [iou for _, iou in chosen] == ious
    assert all(line["key"] in page for line, _ in chosen)
    images = [Image.open(io.BytesIO(base64.b64decode(code))) for code in re.findall(r"base64,([^\"]+)", page)]
    assert len(images) == 3 * 4 * len(with_masks)
    record = benchmarks.open_benchmark("refcoco_val", data, protocol="per_sentence")[chosen[0][0]["index"]]
    sample = gallery.sample(*chosen[0], record, 8)
    np.testing.assert_array_equal(sample.target, record["mask"] > 0)
    both = (sample.target & sample.prediction).sum() / (sample.target | sample.prediction).sum()
    assert both == pytest.approx(chosen[0][1])


def test_pictures_are_left_out_where_the_data_are_not_the_same(evaluated, data, tmp_path, capsys):
    out, _ = evaluated
    shutil.copytree(out, tmp_path / "out")
    (tmp_path / "out" / "worst.html").unlink()
    replicas.write_refer(tmp_path / "data", "refcoco", splits=("val", "train"), count=12)
    for where, why in ((tmp_path / "nothing", "does not exist"), (tmp_path / "data", "holds other data")):
        runner.evaluate(EvaluateOptions("", ["refcoco_val"], tmp_path / "out", where, rescore=True))
        assert why in capsys.readouterr().out and not (tmp_path / "out" / "worst.html").exists()


def test_classes_of_open_vocabulary(evaluated):
    out, found = evaluated
    name = "pas20.per_sentence.adaptive"
    lines = results.read_results(results.result_path(out, name))[1]
    by_class = found[name]["by_class"]
    asked = {label for line in lines for label in line["phrase"].split(", ")}
    assert by_class.keys() == asked and len(asked) > 1
    for label, numbers in by_class.items():
        mine = [line for line in lines if label in line["phrase"].split(", ")]
        assert numbers["num_samples"] == len(mine)
        assert numbers["giou"] == pytest.approx(np.mean([line["iou"] for line in mine]))
    text = (out / "tables.md").read_text()
    assert f"## Classes of {name}" in text and all(f"| {label} | " in text for label in asked)
    assert "by_class" not in found["refcoco_val.per_sentence.adaptive"]


# --- what an answer counts for --------------------------------------------------------------------------


def line(**changes):
    """A sample without a target that got an empty prediction."""
    base = {"key": "k", "image": "i", "valid": False, "said_no": False, "length": 0, "intersection": 0, "union": 0}
    base |= {"target_pixels": 0, "predicted_pixels": 0, "boundary": 1.0, "iou": 1.0, "answer": "?", "phrase": "p"}
    return base | changes


def test_only_a_no_or_an_empty_mask_is_a_rejection():
    numbers = lambda *lines, **options: summaries.summarise_masks(lines, 8, resamples=10, **options)
    garbage = numbers(line(), line())
    assert garbage["n_acc"] == garbage["giou"] == garbage["format_rate"] == garbage["biou"] == 0
    assert garbage["intervals"]["n_acc"] == [0, 0]
    assert numbers(line(said_no=True))["n_acc"] == 1 and numbers(line(valid=True, length=3))["n_acc"] == 1
    few = {"predicted_pixels": 9, "union": 9, "boundary": 0.0, "iou": 0.0}
    for valid, expected in ((True, [0, 1]), (False, [0, 0])):  # the reference's scoring decodes malformed answers too
        found = [numbers(line(valid=valid, **few), min_pixels=m) for m in (0, 50)]
        assert [f["n_acc"] for f in found] == [f["giou"] for f in found] == expected
    # With a target nobody rejects by accident, and nobody finds it by garbage.
    target = {"target_pixels": 5, "union": 5, "boundary": 0.0, "iou": 0.0}
    assert numbers(line(**target))["t_acc"] == 0 and numbers(line(**target, said_no=True))["t_acc"] == 0


def test_what_a_no_is():
    assert all(says_no(text) for text in ("No", "no.", " No, there is none", "NO"))
    assert not any(says_no(text) for text in ("Yes", "", "Nobody", "<TOK_1>No", "There is no dog", "not"))


def test_garbage_of_a_model_is_no_rejection(debug_model, data, tmp_path):
    """An untrained model that may say anything answers no request; its N-acc was 1."""
    found = runner.evaluate(
        options(debug_model, data, tmp_path, "grefcoco_val", grammar=False, forced_prefix=False, max_new_tokens=4)
    )
    numbers = found["grefcoco_val.joined.adaptive"]
    lines = results.read_results(results.result_path(tmp_path, "grefcoco_val.joined.adaptive"))[1]
    assert not any(entry["valid"] or entry["said_no"] or entry["mask"] for entry in lines)
    assert numbers["format_rate"] == numbers["n_acc"] == numbers["giou"] == numbers["ciou"] == 0
    assert json.loads((tmp_path / "coco" / "grefcoco_val.joined.adaptive.json").read_text()) == []


# --- which data -------------------------------------------------------------------------------------------


def test_results_of_other_data_are_not_continued(debug_model, data, tmp_path):
    """The same data elsewhere go on; the same length of others is refused."""
    ask = lambda where: runner.evaluate(options(debug_model, where, tmp_path / "out", "refcoco_val", worst=0))
    ask(data)
    shutil.copytree(data, tmp_path / "moved")
    ask(tmp_path / "moved")
    sources = [benchmarks.open_benchmark("refcoco_val", root) for root in (data, tmp_path / "moved")]
    assert sources[0].fingerprint() == sources[1].fingerprint()
    changed = tmp_path / "moved" / "refcoco" / "instances.json"
    content = json.loads(changed.read_text())
    content["annotations"][0]["segmentation"] = content["annotations"][1]["segmentation"]
    changed.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="holds results of data '.*' .now '.*'"):
        ask(tmp_path / "moved")
    shutil.copy(data / "refcoco" / "instances.json", changed)
    image = sorted((tmp_path / "moved" / replicas.IMAGES).iterdir())[0]
    Image.open(image).transpose(Image.Transpose.ROTATE_180).save(image, quality=90)
    with pytest.raises(ConfigError, match="holds results of data"):
        ask(tmp_path / "moved")


@pytest.mark.parametrize("name", ["refcocom_val_part_only", "pas20", "sa1b", "mme"])
def test_fingerprints_see_what_decides_the_results(tmp_path, name):
    from alto_jax.data import open_vocab
    from alto_jax.data.sa1b import Sa1bMasks
    from alto_jax.evaluate import questions

    if name == "sa1b":
        replicas.write_sa1b(tmp_path)
        changed, source = tmp_path / "sa_1.json", lambda: Sa1bMasks(tmp_path, train=False)
    elif name == "mme":
        replicas.write_questions(tmp_path)
        changed = tmp_path / "mme" / "existence" / "0.txt"
        source = lambda: questions.open_questions("mme", "test", tmp_path)
    elif name == "pas20":
        replicas.write_label_maps(tmp_path, name)
        open_vocab.build(name, tmp_path / "images", tmp_path / "labels", tmp_path / "open_vocab")
        changed = next((tmp_path / "open_vocab" / "pas20").iterdir())
        source = lambda: benchmarks.open_benchmark(name, tmp_path)
    else:
        replicas.write_refcocom(tmp_path)
        changed = next((tmp_path / "refcocom" / "masks").iterdir())
        source = lambda: benchmarks.open_benchmark(name, tmp_path)
    before = source().fingerprint()
    assert before == source().fingerprint()
    if changed.suffix == ".png":
        Image.open(changed).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(changed)
    elif changed.suffix == ".txt":
        changed.write_text("Is it here?\tNo\nIs it gone?\tNo\n")
    else:
        changed.write_text(changed.read_text() + " ")
    assert source().fingerprint() != before


def test_records_lost_in_preparation_are_counted(debug_model, tmp_path):
    replicas.write_refer(tmp_path, "refcoco", splits=("val",), count=6)
    images = sorted((tmp_path / replicas.IMAGES).iterdir())
    for image in images[1], images[4]:
        image.write_bytes(image.read_bytes()[:100])
    raw = benchmarks.open_benchmark("refcoco_val", tmp_path)
    sizes = dict.fromkeys(("vision_size", "image_size", "mask_size"), 0)
    job = prepare.Job("refcoco_val.joined", "referring", raw, sizes, "png", 4, 0)
    folder = prepare.prepare(job, tmp_path / "prepared", max_bad_fraction=0.5)
    for where, out in ((tmp_path, "raw"), (folder, "prepared")):
        found = runner.evaluate(options(debug_model, where, tmp_path / out, "refcoco_val", max_bad_fraction=0.5))
        numbers = found["refcoco_val.joined.adaptive"]
        assert (numbers["num_samples"], numbers["num_skipped"]) == (4, 2)
        assert numbers["bad_by_kind"] == {"truncated file": 2}
        assert (tmp_path / out / "tables.md").read_text().count("| 2 |") == 1  # the column of those left out
    prepared = Prepared(folder)
    assert prepared.fingerprint() == raw.fingerprint()  # stored as they are, they are the same data
    # Of the first two that are kept, one was left out between them; of the first, none before it.
    assert [len(prepared.left_out(count)) for count in (1, 2, 3, 4)] == [0, 1, 1, 2]


# --- the command ------------------------------------------------------------------------------------------


def test_every_option_is_on_the_command_line():
    parser = command.parser()
    flags = {action.dest: action for action in parser._actions if not isinstance(action, argparse._HelpAction)}
    fields = {field.name: field for field in dataclasses.fields(EvaluateOptions)}
    of_the_paper = {"table", "figure", "runs", "card", "results"}
    assert flags.keys() - {"list", "distributed", *of_the_paper} == (fields.keys() - {"benchmarks"}) | {"benchmark"}
    for name, field in fields.items():
        if field.default is not dataclasses.MISSING and name != "length":  # whose default goes by what is asked for
            assert flags[name].default == field.default, name


def test_rows_say_how_they_were_made():
    task = {"mode": "fixed", "protocol": "joined", "grammar": True, "forced_prefix": False, "end_bias": -1.5,
            "scoring": "reference", "min_pixels": 50, "limit": 100}  # fmt: skip
    named = "m (fixed, joined, grammar, end bias -1.5, reference scoring, empty below 50 px, first 100 samples)"
    assert tables._row_name(task, "m") == named
    plain = {"mode": "adaptive", "protocol": "joined", "grammar": False, "forced_prefix": False, "end_bias": 0.0,
             "scoring": "alto_jax", "min_pixels": 0, "limit": 0}  # fmt: skip
    assert tables._row_name(plain, "m") == "m (adaptive, joined)"


def test_a_limit_that_cuts_nothing_is_not_named(debug_model, data, tmp_path):
    for limit, expected in ((3, 3), (100, 0)):
        ask = options(debug_model, data, tmp_path / str(limit), "refcoco_val,pope_random", limit=limit)
        found = runner.evaluate(ask)
        assert [task["limit"] for task in found.values()] == [expected if n > limit else 0 for n in (6, 3)]
    assert "first 3 samples" in (tmp_path / "3" / "tables.md").read_text()
    assert "first" not in (tmp_path / "100" / "tables.md").read_text()


def test_rescoring_needs_a_place_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["evaluate", "--rescore"])
    with pytest.raises(ConfigError, match="--out is required"):
        command.main()
    monkeypatch.setattr("sys.argv", ["evaluate", "--rescore", "--out", str(tmp_path)])
    with pytest.raises(ConfigError, match="holds no results"):
        command.main()
