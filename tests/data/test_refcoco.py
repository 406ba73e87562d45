"""Referring and open-vocabulary readers on replicas of the published formats."""

import json
import pickle

import numpy as np
from PIL import Image
import pytest

from alto_jax.data import benchmarks, open_vocab, refcoco
from alto_jax.data.conversations import Conversations
from alto_jax.mllm import text
from tests.data import replicas


@pytest.mark.parametrize("dataset", ["refcoco", "refcoco+", "refcocog", "grefcoco"])
def test_refer_files(tmp_path, dataset):
    expected = replicas.write_refer(tmp_path, dataset)
    for split in ("val", "testA") if dataset != "refcocog" else ("val",):
        source = benchmarks.open_benchmark(f"{dataset}_{split}", tmp_path)
        keys = [key for key in expected if f"/{split}/" in key]
        assert [record["key"] for record in source] == keys
        for record in source:
            assert record["phrase"].startswith("Meet all the descriptions: 1. the thing")
            np.testing.assert_array_equal(record["mask"] > 0, expected[record["key"]])
        assert any(not record["mask"].any() for record in source) == (dataset == "grefcoco") == source.no_target
        single = benchmarks.open_benchmark(f"{dataset}_{split}", tmp_path, protocol="per_sentence")
        assert len(single) == 2 * len(source) and single[1]["phrase"].startswith("thing on the left")
        assert single[1]["key"] == f"{keys[0]}/1"
    assert len(benchmarks.train_split(dataset, tmp_path)) >= 4


@pytest.mark.parametrize("no_target", [False, True])
def test_psalm_file_is_preferred(tmp_path, no_target):
    dataset = "grefcoco" if no_target else "refcoco"
    replicas.write_refer(tmp_path, dataset)
    expected = replicas.write_psalm(tmp_path, dataset, no_target=no_target)
    source = benchmarks.open_benchmark(f"{dataset}_val", tmp_path)
    assert len(source) == len(expected) == 6
    for record, mask in zip(source, expected):
        np.testing.assert_array_equal(record["mask"] > 0, mask)
        assert "3. it. " in record["phrase"]
    assert len(benchmarks.open_benchmark(f"{dataset}_val", tmp_path, protocol="per_sentence")) == 18


def test_refcocom(tmp_path):
    expected = replicas.write_refcocom(tmp_path)
    source = benchmarks.open_benchmark("refcocom_val_part_only", tmp_path)
    assert len(source) == len(expected)
    for record, mask in zip(source, expected):
        np.testing.assert_array_equal(record["mask"] > 0, mask)


def test_errors_say_what_was_expected_where(tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist; refcoco_val expects there: refcoco/refs"):
        benchmarks.open_benchmark("refcoco_val", tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"refcocog val: expected .*refs\(umd\)\.p .*or the PSALM"):
        benchmarks.open_benchmark("refcocog_val", tmp_path)
    with pytest.raises(ValueError, match="unknown 'refcoco_test'.*refcoco_val"):
        benchmarks.open_benchmark("refcoco_test", tmp_path)
    replicas.write_refer(tmp_path)
    with pytest.raises(ValueError, match="no entry of split 'testB'"):
        benchmarks.open_benchmark("refcoco_testB", tmp_path)
    with pytest.raises(ValueError, match="protocol: expected one of joined"):
        benchmarks.open_benchmark("refcoco_val", tmp_path, protocol="best")
    (tmp_path / "images").rename(tmp_path / "pictures")
    with pytest.raises(ValueError, match="COCO train2014 images: expected one of images/mscoco"):
        benchmarks.open_benchmark("refcoco_val", tmp_path)
    source = benchmarks.open_benchmark("refcoco_val", tmp_path, images=tmp_path / "pictures/mscoco/images/train2014")
    assert len(source) == 2
    (tmp_path / "refcoco" / "instances.json").write_text("{")
    with pytest.raises(ValueError, match=r"instances\.json is no JSON"):
        benchmarks.open_benchmark("refcoco_val", tmp_path, images=tmp_path)


def test_pickles_that_run_code_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "made"), "w"))

    replicas.write_refer(tmp_path)
    file = tmp_path / "refcoco" / "refs(unc).p"
    for content in (pickle.dumps([Evil()]), b"", b"not a pickle"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"refs\(unc\)\.p: refused as a pickle"):
            benchmarks.open_benchmark("refcoco_val", tmp_path)
    assert not (tmp_path / "made").exists()


def test_a_broken_entry_fails_alone_and_is_named(tmp_path):
    replicas.write_refer(tmp_path, "grefcoco", splits=("val",))
    file = tmp_path / "grefcoco" / "grefs(unc).json"
    refs = json.loads(file.read_text())
    refs[0]["ann_id"], refs[1]["image_id"], refs[2]["sentences"] = [999], 77, []
    del refs[3]["ann_id"]
    file.write_text(json.dumps(refs))
    source = benchmarks.open_benchmark("grefcoco_val", tmp_path)
    assert len(source) == len(refs)
    for index, message in enumerate(("ann_id 999 is not in", "image_id 77 is not in", "no sentence", "'ann_id'")):
        with pytest.raises(ValueError, match=rf"grefs\(unc\)\.json entry {index}: .*{message}"):
            source[index]
    assert source[4]["mask"].any()


def test_mask_of_another_size_is_refused(tmp_path):
    replicas.write_refcocom(tmp_path)
    file = next((tmp_path / "refcocom" / "masks").iterdir())
    Image.fromarray(np.full((32, 32), 255, np.uint8)).save(file)
    source = benchmarks.open_benchmark("refcocom_val_part_only", tmp_path)
    with pytest.raises(ValueError, match="val_part_only.json entry .*is 32x32, its image is 64x64"):
        list(source)


def test_referring_chats(tmp_path):
    replicas.write_refer(tmp_path, "grefcoco", splits=("train",))
    source = refcoco.ReferringChats(benchmarks.train_split("grefcoco", tmp_path), seed=1)
    kinds = []
    for i, record in enumerate(source):
        question, answer = (turn["value"] for turn in record["conversations"])
        if not source.source[i]["mask"].any():
            assert answer == text.NO and not record["masks"]
        kinds.append(answer)
        if record["masks"]:
            assert ("adaptive" in question) == ("<TOK_1>" in answer)
    assert len(set(kinds)) >= 3 and kinds == [r["conversations"][1]["value"] for r in source]


@pytest.mark.parametrize("name", ["a150", "pc59", "pas20"])
def test_open_vocabulary_sets_are_built_from_label_maps(tmp_path, name):
    replicas.write_label_maps(tmp_path, name)
    names = [f"class {i}" for i in range(1, 21)] if name == "a150" else open_vocab.LABEL_MAPS[name][0]
    make = lambda out, seed: open_vocab.build(
        name, tmp_path / "images", tmp_path / "labels", tmp_path / out, names=names, samples_per_image=3, seed=seed
    )
    count = make("open_vocab", 0)
    assert make("again", 0) == count and make("other", 1) >= 4
    text_of = lambda out: (tmp_path / out / f"{name}.jsonl").read_text().replace(out, "")
    assert text_of("again") == text_of("open_vocab") != text_of("other")
    source = benchmarks.open_benchmark(name, tmp_path)
    assert len(source) == count >= 4
    entries = [json.loads(line) for line in (tmp_path / "open_vocab" / f"{name}.jsonl").read_text().splitlines()]
    assert max(len(entry["description"]) for entry in entries) > 1
    for record, entry in zip(source, entries):
        assert record["phrase"] == ", ".join(entry["description"])
        label = np.asarray(Image.open(tmp_path / "labels" / f"{entry['image'].split('/')[-1][:-4]}.png"))
        wanted = np.isin(label, [names.index(n) + 1 for n in entry["description"]])
        np.testing.assert_array_equal(record["mask"] > 0, wanted)
        ignored = label == (0 if name == "a150" else 255)
        assert ("ignore" in record) == ignored.any()
        if ignored.any():
            np.testing.assert_array_equal(record["ignore"] > 0, ignored)


def test_open_vocabulary_errors(tmp_path):
    replicas.write_label_maps(tmp_path, "pc59")
    make = lambda **more: open_vocab.build("pc59", tmp_path / "images", tmp_path / "labels", tmp_path / "out", **more)
    with pytest.raises(ValueError, match="img_.*png: label .*but there are 3 classes"):
        make(names=["a", "b", "c"])
    with pytest.raises(ValueError, match="lacks 1 label maps of the split, such as nope.png"):
        make(ids=["nope"])
    (tmp_path / "images" / "img_1.jpg").unlink()
    with pytest.raises(ValueError, match="images holds no img_1.jpg or .png"):
        make()
    with pytest.raises(ValueError, match="a150 needs the class names"):
        open_vocab.build("a150", tmp_path / "images", tmp_path / "labels", tmp_path / "out")
    (tmp_path / "bad.jsonl").write_text('{"image": "x"}\n[]\n')
    for index in (0, 1):
        with pytest.raises(ValueError, match=rf"bad\.jsonl line {index + 1}: expected image, mask, description"):
            open_vocab.OpenVocab(tmp_path / "bad.jsonl")[index]


def test_ade20k_names(tmp_path):
    head = "Idx\tRatio\tTrain\tVal\tStuff\tName\n"
    (tmp_path / "n.txt").write_text(head + "1\t0.1\t2\t3\t1\twall\n2\t0.1\t2\t3\t1\tbuilding, edifice\n")
    assert open_vocab.read_names(tmp_path / "n.txt") == ["wall", "building"]


def test_conversation_replica_has_every_form(tmp_path):
    source = Conversations(replicas.write_conversations(tmp_path))
    assert sorted({len(record["masks"]) for record in source}) == [1, 2]
    assert any("<box>[[" in record["conversations"][0]["value"] for record in source)
