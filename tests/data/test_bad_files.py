"""Bad files of every kind through the commands: training and evaluation finish, each is listed, counts are exact."""

from collections import Counter
import json
import pickle
import re

import numpy as np
from PIL import Image
import pytest

from alto_jax.data import prepare
from alto_jax.evaluate import results, runner
from alto_jax.train.progress import read_metrics
from tests.conftest import run_python
from tests.data import replicas
from tests.data.test_bad_data import ODD, corrupt, image_files
from tests.data.test_prepare import job
from tests.evaluate.test_runner import options

BAD = 3  # of each kind
# Every step of reading is as in the size "debug"; there is less to compile.
SMALL = [
    f"--config.model.tokenizer.{change}"
    for change in ("sam.depth=1", "sam.global_attn_indexes=(0,)", "pixel_decoder.channel_mult=(1,)",
                   "pixel_decoder.out_patch=8")
]  # fmt: skip
MASKS = ["--grammar", "--forced-prefix", "--batch-size", "8"]


def corrupt_sa1b(root) -> dict[str, int]:
    """Good images, four in other colour modes, and bad ones or bad annotations of 11 kinds; returns kind → number."""
    replicas.write_sa1b(root, 12)
    good, expected, number = (root / "sa_0.jpg").read_bytes(), Counter(), 100
    info = json.loads((root / "sa_0.json").read_text())

    def add(kind, image=good, content=None, shape=None, **segmentation):
        nonlocal number
        number += 1
        if image is not None:
            (root / f"sa_{number}.jpg").write_bytes(image)
        entry = json.loads(json.dumps(info))
        entry["image"] |= {"file_name": f"sa_{number}.jpg"} | (shape or {})
        for annotation in entry["annotations"]:
            annotation["segmentation"] |= segmentation
        (root / f"sa_{number}.json").write_text(json.dumps(entry) if content is None else content)
        if kind:
            expected[kind] += 1

    files = image_files(good)
    for i in range(BAD):
        add("missing image", None)
        for kind in ("file of 0 bytes", "truncated file", "unreadable file"):
            add(kind, files[kind](i))
        line = {"height": 1, "width": 50 + i}
        add("image too small", files["image too small"](i), shape=line, size=[1, 50 + i], counts=[0, 50 + i])
        add("malformed JSON", content=json.dumps(info)[: 40 + i])
        add("malformed JSON", content="")
        add("malformed entry", content=json.dumps({"image": info["image"], "masks": []}))
        half = 64 * (32 + i)
        add("size of mask and image", shape={"height": 32 + i}, size=[32 + i, 64], counts=[0, half])
        add("size of mask and image", shape={"width": 48 + i})
        add("segmentation", counts="not run lengths"[: 8 + i])
        add("segmentation", counts=[5, 5 + i])
        add("empty mask", counts=[64 * 64])
    for mode in ODD:
        add(None, files[mode](0))
    return dict(expected)


def corrupt_referring(root) -> dict[str, Counter]:
    """RefCOCO and RefCOCOm with good and bad samples of 12 kinds; returns benchmark → kind → number."""
    images, annotations, _ = replicas.write_coco(root, 6)
    folder, good = root / replicas.IMAGES, (root / replicas.IMAGES / images[0]["file_name"]).read_bytes()
    files, refs, entries = image_files(good), [], []
    expected = {"refcoco_val": Counter(), "refcocom_val_part_only": Counter()}

    def image(content):
        images.append({"id": 1000 + len(images), "file_name": f"{len(images)}.jpg", "height": 64, "width": 64})
        if content is not None:
            (folder / images[-1]["file_name"]).write_bytes(content)
        return images[-1]["id"]

    def refer(kind, segmentation=annotations[0]["segmentation"], image_id=1, **changes):
        annotations.append({"id": 1000 + len(annotations), "image_id": image_id, "segmentation": segmentation})
        ref = {"ref_id": len(refs), "image_id": image_id, "ann_id": annotations[-1]["id"], "split": "val"}
        refs.append(ref | {"sentences": replicas.sentences(f"the thing {len(refs)}")} | changes)
        if kind:
            expected["refcoco_val"][kind] += 1

    def part(kind, mask, **changes):
        name, number = "refcocom_val_part_only", len(entries)
        if isinstance(mask, np.ndarray):
            Image.fromarray(mask).save(root / "refcocom" / "masks" / f"{number}.png")
        elif mask is not None:
            (root / "refcocom" / "masks" / f"{number}.png").write_bytes(mask)
        entry = {"img_name": images[number % 6]["file_name"], "segment_id": str(number), "sentences": ["a leg"]}
        entries.append({k: v for k, v in (entry | changes).items() if v is not ...})
        if kind:
            expected[name][kind] += 1

    for name in ("annotations", "masks"):
        (root / "refcocom" / name).mkdir(parents=True)
    ones = np.full((64, 64), 255, np.uint8)
    for i in range(BAD):
        refer(None)
        part(None, np.tri(64, dtype=bool))
        refer("missing image", image_id=image(None))
        for kind in ("file of 0 bytes", "truncated file", "unreadable file", "image too small"):
            refer(kind, image_id=image(files[kind](i)))
        refer("segmentation", {"size": [64, 64], "counts": "abc"})
        refer("segmentation", [[1, 2, 3, float("nan"), 5, 6]])
        refer("size of mask and image", {"size": [64, 32 + i], "counts": [64 * (32 + i)]})
        refer("empty mask", {"size": [64, 64], "counts": [64 * 64]})
        refer("malformed entry", image_id=77 + i)
        refer("malformed entry", sentences=[])
        part("missing mask", None)
        part("file of 0 bytes", b"")
        part("unreadable file", b"no picture")
        part("empty mask", ones * 0)
        part("size of mask and image", ones[: 32 + i])
        part("malformed entry", None, segment_id=...)
    for mode in ODD:
        refer(None, image_id=image(files[mode](0)))
    (root / "refcoco").mkdir()
    content = {"images": images, "annotations": annotations}
    (root / "refcoco" / "instances.json").write_text(json.dumps(content))
    (root / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    (root / "refcocom" / "annotations" / "val_part_only.json").write_text(json.dumps(entries))
    return expected


def reported(stderr: str) -> dict[int, tuple[str, str]]:
    """Record → (kind, message) of what a run logged as left out."""
    found = re.findall(r"record (\d+) left out \(\d+ bad of \d+, (.*?)\): (.*)", stderr)
    assert len(found) == len({index for index, _, _ in found}), "reported twice"
    return {int(index): (kind, message) for index, kind, message in found}


def check_reports(
    messages: dict[int, tuple[str, str]], listed: list[dict], expected: dict[str, int], place: str
) -> None:
    """What a run reported is what `prepare --check` lists: every bad record, by kind, with where it stands."""
    assert Counter(kind for kind, _ in messages.values()) == expected
    assert all(re.search(place, message) for _, message in messages.values())
    assert {entry["index"] for entry in listed} == messages.keys()
    assert Counter(kind for _, kind in {(entry["index"], entry["kind"]) for entry in listed}) == expected


def train(stage, root, fraction, *flags):
    return run_python(
        "-m", "alto_jax.main", f"--config=configs/{stage}.py:debug", f"--workdir={root / 'run'}", *flags,
        "--config.train.steps=7", "--config.train.batch_size=8", "--config.train.checkpoint_every=1000",
        "--config.eval.num_samples=0", f"--config.data.max_bad_fraction={fraction}",
    )  # fmt: skip


def check_trained(run) -> None:
    losses = [record["loss"] for record in read_metrics(run)]
    assert len(losses) == 7 and np.isfinite(losses).all()


def test_stage_one_on_a_folder_with_bad_files(tmp_path, debug_model):
    expected = corrupt_sa1b(tmp_path / "sa1b")
    assert sum(expected.values()) == 39 and len(expected) == 10
    listed = prepare.check(job("sa1b", tmp_path / "sa1b", draws=1))
    flags = [*SMALL, "--config.data.source=sa1b", f"--config.data.root={tmp_path / 'sa1b'}"]
    assert listed["records"] == 55  # seven steps of eight are an epoch: every record is met
    done = train("stage1", tmp_path, 0.9, *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    check_trained(tmp_path / "run")
    check_reports(reported(done.stderr), listed["bad"], expected, r"sa_\d+\.json")
    # Colour modes that can be converted are used; they are listed, and each is named once in the log.
    assert len(listed["converted"]) == len(ODD) and all(f"{what}" in done.stderr for what in ODD.values())

    # Prepared, what is bad stays out, and the same run has nothing to report.
    sizes = {"vision_size": 0, "image_size": 64, "mask_size": 32}
    raw = job("sa1b", tmp_path / "sa1b", sizes, draws=1)
    folder = prepare.prepare(raw, tmp_path / "prepared", max_bad_fraction=0.9)
    assert json.loads((folder / "manifest.json").read_text())["bad_by_kind"] == dict(sorted(expected.items()))
    flags_prepared = [*SMALL, "--config.data.source=prepared", f"--config.data.root={folder}"]
    prepared = train("stage1", tmp_path / "again", 0, *flags_prepared)
    assert prepared.returncode == 0 and not reported(prepared.stderr), prepared.stderr[-2000:]
    check_trained(tmp_path / "again" / "run")

    trained = type(debug_model)(path=tmp_path / "again" / "run", config=None)
    asked = options(trained, tmp_path / "sa1b", tmp_path / "out", "tokenizer_sa1b", max_bad_fraction=0.9)
    found = runner.evaluate(asked)["tokenizer_sa1b"]
    assert found["num_samples"] == 16 and found["bad_by_kind"] == dict(sorted(expected.items()))
    lines = results.read_results(tmp_path / "out/results/tokenizer_sa1b.jsonl")[1]
    chosen = [line["iou"][line["length"] - 1] for line in lines if "iou" in line]
    assert found["with_features"]["giou_adaptive"] == pytest.approx(np.mean(chosen))

    refused = train("stage1", tmp_path / "other", 0.1, *flags)
    errors = [
        line
        for line in refused.stderr.splitlines()
        if "left out (" not in line and "further ones are counted" not in line
    ]
    assert refused.returncode == 2 and len(errors) == 1
    limit = r"bad of 55 records \(.*\); at most 5 are left out, data.max_bad_fraction is 0.1\)$"
    assert re.match(rf"error: .*sa_\d+\.json.* \(\d+ {limit}", errors[0])


def test_stage_two_on_conversations_with_bad_files(tmp_path, debug_model):
    expected = corrupt(tmp_path / "chat")
    start = tmp_path / "start"  # without a text tokenizer, so that the stage trains one on the texts of the good lines
    start.mkdir()
    for file in debug_model.path.iterdir():
        if file.name != "tokenizer.json":
            (start / file.name).symlink_to(file)
    flags = [f"--config.init_from={start}", "--config.data.source=jsonl", "--config.data.max_masks=2",
             f"--config.data.meta={tmp_path / 'chat' / 'meta.json'}", "--config.data.max_length=200"]  # fmt: skip
    done = train("stage2", tmp_path, 0.9, *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    check_trained(tmp_path / "run")
    messages = reported(done.stderr)
    listed = prepare.check(job("conversations", tmp_path / "chat"))["bad"]
    # Whether a conversation fits the model shows only where its text is rendered.
    conversations = {i for i, message in messages.items() if message[0] == "conversation"}
    listed += [{"index": i, "kind": "conversation"} for i in conversations]
    check_reports(messages, listed, expected, r"chat\.jsonl(:| line )\d+")


def test_evaluation_of_data_with_bad_files(tmp_path, debug_model):
    expected = corrupt_referring(tmp_path / "data")
    assert sum(sum(kinds.values()) for kinds in expected.values()) == 51
    assert len(set().union(*expected.values())) == 10
    listed = {name: prepare.check(job(name, tmp_path / "data")) for name in expected}
    command = ["-m", "alto_jax.evaluate", "--checkpoint", debug_model.path, "--data", tmp_path / "data", *MASKS]
    command += ["--benchmark", ",".join(expected), "--out", tmp_path / "out"]
    done = run_python(*command, "--max-bad-fraction", "0.9")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())["tasks"]
    place = {"refcoco_val": r"refs\(unc\)\.p entry \d+", "refcocom_val_part_only": r"val_part_only\.json entry \d+"}
    for name, kinds in expected.items():
        task, count = found[f"{name}.joined.adaptive"], sum(kinds.values())
        assert task["bad_by_kind"] == dict(sorted(kinds.items())) and task["num_skipped"] == count
        assert task["num_samples"] == listed[name]["records"] - count > 0
        lines = results.read_results(tmp_path / "out" / "results" / f"{name}.joined.adaptive.jsonl")[1]
        check_reports(
            {x["index"]: (x["kind"], x["error"]) for x in lines if "error" in x},
            listed[name]["bad"],
            kinds,
            place[name],
        )
        mine = [line for line in done.stderr.splitlines() if f"{name}.joined.adaptive: record" in line]
        assert len(reported("\n".join(mine))) == count
        good = [line["iou"] for line in lines if "error" not in line]
        assert task["giou"] == pytest.approx(np.mean(good), abs=1e-15)
        assert f"{count} of {listed[name]['records']} samples left out: " in done.stdout
    assert len(listed["refcoco_val"]["converted"]) == len(ODD)
