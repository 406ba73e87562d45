"""The benchmarks' command: numbers for every table, the same bytes after a kill, and metric parity."""

import functools
import random
import re

import numpy as np
from pycocotools import mask as coco_mask
import pytest

from alto_jax import metrics
from alto_jax.config import ConfigError
from alto_jax.data import benchmarks
from alto_jax.evaluate import device, results, runner, summaries, tables
from alto_jax.evaluate.options import EvaluateOptions
from tests.data import replicas

pytestmark = pytest.mark.usefixtures("compiled_once")


def options(model, data, out, benchmark, **changes):
    given = {"grammar": True, "forced_prefix": True, "batch_size": 2, "title": "debug", "timed_samples": 0}
    given |= changes
    return EvaluateOptions(model.path, [name for name in benchmark.split(",") if name], out, data, **given)


@pytest.fixture(scope="module")
def compiled_once():
    """Evaluations of one checkpoint trace and compile their programs once; for a module's that all have one model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "Programs", functools.cache(device.Programs))
        yield


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Replicas of every benchmark in one data folder."""
    root = tmp_path_factory.mktemp("benchmarks")
    replicas.write_benchmarks(root)
    return root


@pytest.fixture(scope="module")
def run(compiled_once, debug_model, data, tmp_path_factory):
    """All benchmarks, evaluated once."""
    out = tmp_path_factory.mktemp("evaluation")
    found = runner.evaluate(
        options(
            debug_model,
            data,
            out,
            "all,tokenizer_refcoco_val,tokenizer_scenes,tokenizer_multi_target_sa1b_val",
            scenes=3,
        )
    )
    assert {task["benchmark"] for task in found.values()} > benchmarks.BENCHMARKS.keys()
    return out, found


def test_every_table_has_numbers(run):
    out, found = run
    text = (out / "tables.md").read_text()
    for heading, *_ in tables.LAYOUTS.values():
        assert f"## {heading}" in text
    assert "## Mask reconstruction (Table 7" in text and "with image features" in text
    assert "image features withheld at inference (trained with them)" in text and "without image" not in text
    # The paper's rows stand above ours, in whose cells nothing is missing.
    paper = [line for line in text.splitlines() if "paper |" in line]
    ours = [line for line in text.splitlines() if line not in paper]
    assert len(paper) == 11 + 24 + 10 + 4 and "–" not in "\n".join(ours)
    assert (out / "metrics.json").exists() and all((out / f"{n}.png").exists() for n in ("lengths", "iou_by_length"))
    one = found["grefcoco_val.joined.adaptive"]
    assert {"ciou", "giou", "n_acc", "t_acc", "biou", "precision@0.7", "precision@0.9"} <= one["intervals"].keys()
    assert one["lengths"]["histogram"] and one["num_skipped"] == 0 and one["format_rate"] == 1.0
    assert 0 < found["refcoco_val.joined.adaptive"]["giou"] < 1


def test_reported_numbers_are_those_of_the_samples(run):
    out, found = run
    header, lines = results.read_results(out / "results" / "refcoco_val.joined.adaptive.jsonl")
    assert header["protocol"] == "joined" and [line["index"] for line in lines] == list(range(len(lines)))
    one = found["refcoco_val.joined.adaptive"]
    assert one["giou"] == pytest.approx(np.mean([line["iou"] for line in lines]), abs=1e-15)
    assert all(1 <= line["length"] <= 8 for line in lines)
    curve = found["tokenizer_refcoco_val"]["with_features"]["giou_by_tokens"]
    assert [*curve] == [str(k) for k in range(1, 9)]


def test_a_second_run_only_reads_and_a_cut_run_ends_the_same(run, debug_model, data, tmp_path):
    out, _ = run
    name = "refcocom_val_part_only"
    runner.evaluate(options(debug_model, data, tmp_path, name))
    file = tmp_path / "results" / f"{name}.joined.adaptive.jsonl"
    assert file.read_bytes() == (out / "results" / file.name).read_bytes()
    snapshot = {n: (tmp_path / n).read_bytes() for n in ("metrics.json", "tables.md", "lengths.png")} | {
        "results": file.read_bytes()
    }
    for _ in range(3):
        whole = snapshot["results"]
        file.write_bytes(whole[: random.Random(_).randrange(len(whole))])
        (tmp_path / "metrics.json").unlink()
        runner.evaluate(options(debug_model, data, tmp_path, name))
        assert file.read_bytes() == whole
        assert all((tmp_path / n).read_bytes() == snapshot[n] for n in ("metrics.json", "tables.md", "lengths.png"))
    with pytest.raises(ConfigError, match="holds results of .*min_pixels 0 .now 50"):
        runner.evaluate(options(debug_model, data, tmp_path, name, min_pixels=50))


def test_processes_that_see_other_data_are_refused(debug_model, data, tmp_path, monkeypatch):
    """Hosts with disks of their own: as many samples, but not the same."""

    def gather(value):
        is_asked = isinstance(value, dict) and all(isinstance(h, dict) and "data" in h for h in value.values())
        return [value, {task: header | {"data": "x"} for task, header in value.items()}] if is_asked else [value]

    monkeypatch.setattr(runner.distributed, "gather", gather)
    with pytest.raises(ConfigError, match="process 1 has another benchmarks than process 0: refcoco_val.*data: 'x'"):
        runner.evaluate(options(debug_model, data, tmp_path, "refcoco_val"))
    assert not (tmp_path / "results").exists()


def test_protocols_and_lengths_are_told_apart(debug_model, data, tmp_path):
    found = runner.evaluate(options(debug_model, data, tmp_path, "refcoco_val", length="both", protocol="per_sentence"))
    assert [*found] == ["refcoco_val.per_sentence.adaptive", "refcoco_val.per_sentence.fixed"]
    assert all(task["num_samples"] == 4 for task in found.values())
    text = (tmp_path / "tables.md").read_text()
    assert "debug (adaptive, per_sentence, grammar, forced prefix)" in text
    assert "debug (fixed, per_sentence, grammar, forced prefix)" in text


def test_paper_rows_stand_beside_ours(run):
    _, found = run
    given = {"refcoco": [{"row": "some model", "refcoco_val": 80.5}]}
    text = tables.markdown(found, "debug", given)
    assert "| ALToLLM-8B (AL), paper | 85.8 | 86.6 | 84.7 | 81.3 |" in text
    assert "| some model (given) | 80.5 | – |" in text
    assert "(given)" not in tables.markdown(found, "debug")


def test_bad_samples_are_counted_up_to_a_limit(debug_model, tmp_path, capsys):
    replicas.write_refcocom(tmp_path)
    images = sorted((tmp_path / replicas.IMAGES).iterdir())
    images[1].write_bytes(images[1].read_bytes()[:100])
    name = "refcocom_val_part_only"
    with pytest.raises(ValueError, match="cannot be read.*1 bad of 6 records.*at most 0 .*--max-bad-fraction is 0.001"):
        runner.evaluate(options(debug_model, tmp_path, tmp_path / "a", name))
    found = runner.evaluate(options(debug_model, tmp_path, tmp_path / "b", "all", max_bad_fraction=0.5, scenes=2))
    assert [task["benchmark"] for task in found.values()] == [name, "scenes"]  # the others' files are not there
    assert re.search(r"\[refcoco_val\] left out: refcoco val: expected .*refs\(unc\)\.p", capsys.readouterr().out)
    one = found[f"{name}.joined.adaptive"]
    count = len(results.read_results(tmp_path / "b" / "results" / f"{name}.joined.adaptive.jsonl")[1])
    assert one["num_skipped"] in (1, 2) and one["num_samples"] == count - one["num_skipped"]


def test_wrong_requests_are_one_clear_line(debug_model, data, tmp_path):
    for benchmark, message in (("refcoco_all", "unknown 'refcoco_all'"), (",", "expected at least one name")):
        with pytest.raises(ValueError, match=message):
            runner.evaluate(options(debug_model, data, tmp_path, benchmark))
    with pytest.raises(ConfigError, match="--length: expected at most 8 mask tokens, got 9"):
        runner.evaluate(options(debug_model, data, tmp_path, "scenes", length="8,9"))
    with pytest.raises(ConfigError, match="--batch-size"):
        runner.evaluate(options(debug_model, data, tmp_path, "scenes", batch_size=0))


# --- metric parity ------------------------------------------------------------------------------------


def official(predictions, targets):
    """gRefCOCO's official rules, written from their definition with pycocotools for the areas."""
    encode = lambda mask: coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    inter, union, ious, tp, tn, fp, fn = 0, 0, [], 0, 0, 0, 0
    for prediction, target in zip(predictions, targets):
        if not target.any():
            empty = not prediction.any()
            tp, fn = tp + empty, fn + (not empty)
            ious.append(1.0 if empty else 0.0)
            union += int(prediction.sum())
            continue
        tn, fp = tn + bool(prediction.any()), fp + (not prediction.any())
        both = int(coco_mask.area(coco_mask.merge([encode(prediction), encode(target)], intersect=True)))
        either = int(coco_mask.area(coco_mask.merge([encode(prediction), encode(target)])))
        inter, union = inter + both, union + either
        ious.append(both / either)
    has = np.array([t.any() for t in targets])
    precision = {k: float(np.mean(np.array(ious)[has] >= k)) for k in (0.7, 0.8, 0.9)}
    return np.mean(ious), inter / union, tp / (tp + fn), tn / (tn + fp), precision


def test_metrics_equal_the_official_formulas_on_random_masks():
    rng = np.random.default_rng(0)
    predictions, targets = [], []
    for _ in range(1000):
        shape = tuple(rng.integers(4, 40, 2))
        target = rng.random(shape) < rng.choice([0, 0.1, 0.5, 0.9])
        noise = rng.random(shape) < rng.choice([0, 0.02, 0.3])
        prediction = (target ^ noise) & (rng.random() < 0.9)
        predictions.append(prediction)
        targets.append(target)
    collected = metrics.SegmentationMetrics()
    for prediction, target in zip(predictions, targets):
        collected.add(prediction, target)
    found = collected.compute()
    giou, ciou, n_acc, t_acc, precision = official(predictions, targets)
    for name, value in (("giou", giou), ("ciou", ciou), ("n_acc", n_acc), ("t_acc", t_acc)):
        assert abs(found[name] - value) < 1e-12, name
    assert all(abs(found[f"precision@{k}"] - v) < 1e-12 for k, v in precision.items())


def test_metrics_on_hand_worked_cases():
    a, b, none = np.zeros((4, 4), bool), np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    a[:2], b[1:3] = True, True  # 8 pixels each, 4 in both, 12 in either
    lines = []
    for prediction, target in ((a, b), (a, a), (none, none), (a, none), (none, a)):
        one = metrics.SegmentationMetrics()
        iou = one.add(prediction, target)
        names = ("intersection", "union", "target_pixels", "predicted_pixels")
        lines.append(
            {"iou": iou, "valid": True, "length": 3, "boundary": one.boundary[0]}
            | {k: getattr(one, k)[0] for k in names}
        )
    found = summaries.summarise_masks(lines, 8)
    assert [line["iou"] for line in lines] == [1 / 3, 1, 1, 0, 0]
    assert found["giou"] == pytest.approx((1 / 3 + 2) / 5, abs=1e-12)
    assert found["ciou"] == pytest.approx(12 / (12 + 8 + 0 + 8 + 8), abs=1e-12)
    assert found["n_acc"] == 0.5 and found["t_acc"] == pytest.approx(2 / 3)
    assert found["precision@0.7"] == pytest.approx(1 / 3) and found["intervals"]["giou"][0] < found["giou"]


def test_lines_of_processes_that_share_samples_count_once():
    lines = [{"index": index, "iou": index / 10} for index in range(8)]
    # A tensor axis spans processes 0 and 1, which read the same samples; the last two only fill the batch.
    parts = [[lines[i] for i in rows] for rows in ((0, 1, 4, 5), (0, 1, 4, 5), (2, 3, 6, 7))]
    assert results.merge_lines(parts, 6) == lines[:6]
