"""Referring comprehension and mask perception: boxes as answers, masks in questions."""

import json

import numpy as np
import pytest

from alto_jax.data import benchmarks, refcoco
from alto_jax.data.comprehension import BoxQuestions, Comprehension, ComprehensionChats
from alto_jax.data.mask_perception import open_mask_perception
from alto_jax.evaluate import choices, questions
from alto_jax.mllm import boxes
from tests.data import replicas


def box_of(mask) -> list[float]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [columns[0] / 64, rows[0] / 64, (columns[-1] + 1) / 64, (rows[-1] + 1) / 64]


@pytest.mark.parametrize("stated", [True, False])
def test_boxes_are_those_of_the_targets(tmp_path, stated):
    expected = replicas.write_refer(tmp_path)
    if not stated:
        file = tmp_path / "refcoco" / "instances.json"
        content = json.loads(file.read_text())
        for annotation in content["annotations"]:
            del annotation["bbox"]
        file.write_text(json.dumps(content))
    source = benchmarks.open_boxes("rec_refcoco_val", tmp_path)
    assert len(source) == 4  # each sentence by itself
    for record in source:
        mask = expected[record["key"].rpartition("/")[0]]
        np.testing.assert_allclose(record["label"], box_of(mask), atol=1e-6)
        assert record["question"].endswith("describes: <ref>" + record["question"].partition("<ref>")[2])
        assert record["category"] == "refcoco_val"
    chats = ComprehensionChats(Comprehension(benchmarks.train_split("refcoco", tmp_path)))
    for chat in chats:
        (box,) = boxes.parse_boxes(chat["conversations"][1]["value"])
        mask = expected[chat["key"].rpartition("/")[0]]
        np.testing.assert_allclose(box, box_of(mask), atol=6e-4)
        assert chat["masks"] == [] and chat["conversations"][0]["value"].startswith("<image>\nPlease provide")
    assert any("<box>[[" in turn for turns in chats.texts() for turn in turns)


def test_psalm_files_have_boxes_too(tmp_path):
    replicas.write_psalm(tmp_path, "refcocog", "test")
    file = tmp_path / "refcocog" / "refcocog_test.json"
    entries = json.loads(file.read_text())
    for entry in entries:
        del entry["anns"][1:]
    file.write_text(json.dumps(entries))
    source = benchmarks.open_boxes("rec_refcocog_test", tmp_path)
    x, y, width, height = entries[0]["anns"][0]["bbox"]
    np.testing.assert_allclose(source[0]["label"], [x / 64, y / 64, (x + width) / 64, (y + height) / 64])


def test_bad_boxes_and_other_data_are_refused(tmp_path):
    replicas.write_refer(tmp_path, "grefcoco")
    with pytest.raises(ValueError, match="comprehension: expected the sentences of RefCOCO"):
        Comprehension(benchmarks.train_split("grefcoco", tmp_path))
    replicas.write_refer(tmp_path)
    file = tmp_path / "refcoco" / "instances.json"
    content = json.loads(file.read_text())
    for annotation in content["annotations"]:
        annotation["bbox"] = [60, 0, 20, 10]
    file.write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"entry 0: bbox \[60.0, 0.0, 20.0, 10.0\] is not inside of the image, which is 64"
    ):
        benchmarks.open_boxes("rec_refcoco_val", tmp_path)[0]
    assert isinstance(benchmarks.open_benchmark("refcoco_val", tmp_path), refcoco.Referring)


def test_box_scores():
    label = [0.1, 0.2, 0.5, 0.6]
    answers = [
        "<box>[[100,200,500,600]]</box>",
        "it is at [[100, 200, 500, 400]]",
        "nowhere",
        "<box>[[0,0,10,10]]</box>",
    ]
    assert [questions.first_box_iou(a, label) for a in answers] == pytest.approx([1.0, 0.5, 0.0, 0.0])
    found = questions.score("rec", answers, [label] * 4, ["k"] * 4, ["c"] * 4)
    assert found == {"box_precision@0.5": 0.5, "box_precision@0.7": 0.25, "box_precision@0.9": 0.25, "box_iou": 0.375}
    lines = [{"answer": a, "label": label, "key": str(i), "category": "c"} for i, a in enumerate(answers)]
    assert questions.summarise_questions("rec", lines, resamples=10)["intervals"].keys() == {"box_precision@0.5"}


def test_box_questions_say_what_they_are(tmp_path):
    replicas.write_refer(tmp_path)
    one, same = (benchmarks.open_boxes("rec_refcoco_val", tmp_path) for _ in range(2))
    assert isinstance(one, BoxQuestions) and one.fingerprint() == same.fingerprint()
    with pytest.raises(ValueError, match="nowhere does not exist; rec_refcoco_val expects there: refcoco/refs"):
        benchmarks.open_boxes("rec_refcoco_val", tmp_path / "nowhere")


def test_mask_perception_has_the_masks_in_place_of_foreign_tokens(tmp_path):
    replicas.write_mask_perception(tmp_path)
    source = open_mask_perception(tmp_path)
    record = source[1]
    assert record["question"] == "What is <mask>?\nA. a cat\nB. a dog" and record["label"] == "B. a dog"
    assert record["mask"].shape == record["image"].shape[:2] == (64, 64) and record["mask"].any()
    before = source.fingerprint()
    file = tmp_path / "mask_perception" / "mask_perception.json"
    entries = json.loads(file.read_text())
    entries[0]["question"], entries[1]["mask"] = "What is it?", "mask/none.png"
    file.write_text(json.dumps([*entries, {"image": 3}]))
    source = open_mask_perception(tmp_path)
    for index, message in enumerate(
        ("question: expected one mask in tokens, got 0", "none.png", "", "field image: expected")
    ):
        if message:
            with pytest.raises(ValueError, match=f"mask_perception.json entry {index}: .*{message}"):
                source[index]
    assert source.fingerprint() != before


@pytest.mark.parametrize(
    "answer, label, right",
    [("B. a dog", "B. a dog", True), ("B", "B. a dog", True), ("The answer is B.", "B. a dog", True),
     ("a dog", "B. a dog", False), ("A dog", "A. a dog", False), ("It is A", "A. a cat", True),
     ("(C) no", "C", True), ("A Dog.", "a dog", True),
     ("", "A. a cat", False)],
)  # fmt: skip
def test_choices(answer, label, right):
    assert choices.is_right(answer, label) is right
