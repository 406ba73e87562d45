"""POPE, VQAv2 and MME: reading and scoring."""

import numpy as np
from PIL import Image
import pytest

from alto_jax.evaluate import questions
from tests.data import replicas


def test_readers(tmp_path):
    replicas.write_questions(tmp_path)
    counts = {"pope": 3, "vqav2": 3, "mme": 8}
    for family, count in counts.items():
        source = questions.open_questions(family, "popular", tmp_path)
        record = source[0]
        assert len(source) == count and record["image"].shape == (64, 64, 3)
        assert record["question"].endswith("? Answer the question using a single word or phrase.")
    assert source[7]["category"] == "code_reasoning" and source[7]["label"] == "no"
    with pytest.raises(ValueError, match="POPE best: expected one of pope/coco_pope_best.json"):
        questions.open_questions("pope", "best", tmp_path)
    (tmp_path / "pope" / "coco_pope_popular.json").write_text('{"question_id": 1}')
    with pytest.raises(ValueError, match="popular.json line 1: expected question_id, image"):
        questions.open_questions("pope", "popular", tmp_path)


@pytest.mark.parametrize("outer", ["mme", "MME/MME_Benchmark_release_version", "MME_Benchmark_release_version"])
@pytest.mark.parametrize("inside", [True, False])
def test_mme_as_published(tmp_path, outer, inside, caplog):
    texts, images = ("questions_answers_YN", "images") if inside else ("", "")
    for category in ("artwork", "count"):
        for folder in (texts, images):
            (tmp_path / outer / category / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(replicas.scenes(1)[0].image).save(tmp_path / outer / category / images / "a.jpg")
        said = "Is this by Cézanne?\tYes\nIs it new?\tNo\n"
        (tmp_path / outer / category / texts / "a.txt").write_text(said, encoding="utf-8")
        (tmp_path / outer / category / texts / "._a.txt").write_bytes(b"\x00\x05")
    source = questions.open_questions("mme", "test", tmp_path)
    assert len(source) == 4 and [source[i]["category"] for i in range(4)] == ["count"] * 2 + ["artwork"] * 2
    assert source[0]["question"].startswith("Is this by Cézanne?") and source[1]["label"] == "no"
    assert "no questions of existence, position" in caplog.text
    with pytest.raises(ValueError, match="MME: expected existence/, count/ … in one of mme/MME_Benchmark"):
        questions.open_questions("mme", "test", tmp_path / outer / "artwork")


@pytest.mark.parametrize(
    ("answer", "reading"),
    [("Yes", "yes"), ("No", "no"), ("no, there is none", "no"), ("There is not any. Yes", "no"), ("Nothing", "yes")],
)
def test_pope_reading(answer, reading):
    assert questions.pope_answer(answer) == reading


def test_pope_scores():
    found = questions.pope_scores(["Yes", "Yes", "No", "No"], ["yes", "no", "no", "yes"])
    assert found == {"accuracy": 0.5, "precision": 0.5, "recall": 0.5, "f1": 0.5, "yes_rate": 0.5}
    lines = [
        {"key": str(i), "category": "random", "label": ("yes", "no")[i % 2], "answer": "Yes" if i % 3 else "No"}
        for i in range(60)
    ]
    found = questions.summarise_questions("pope", lines)
    for name in ("accuracy", "precision", "recall", "f1"):
        low, high = found["intervals"][name]
        assert low < found[name] < high < low + 0.4


def test_vqa_accuracy_by_hand():
    given = ["red"] * 2 + ["blue"] * 8
    # Leaving one out: the two "red" persons see 1 match, the other eight see 2.
    assert questions.vqa_accuracy("Red.", given) == pytest.approx((2 * (1 / 3) + 8 * (2 / 3)) / 10)
    assert questions.vqa_accuracy("blue", given) == 1.0 and questions.vqa_accuracy("green", given) == 0.0


@pytest.mark.parametrize(
    ("raw", "normal"),
    [
        ("The dog!", "dog"),
        ("two", "2"),
        ("dont know", "don't know"),
        ("3.5", "3.5"),
        ("a man/woman", "man woman"),
        ("yes.", "yes"),
    ],
)
def test_answers_are_normalised(raw, normal):
    assert questions.normalise_answer(raw) == normal


@pytest.mark.parametrize(
    ("answer", "reading"),
    [("Yes", "yes"), ("no.", "no"), ('"No"', "no"), (" *Yes*", "yes"), ("The answer is yes", ""), ("", "")],
)
def test_mme_reading(answer, reading):
    """As the benchmark's own calculation.py."""
    assert questions.mme_answer(answer) == reading
    assert questions.mme_scores([answer], ["no"], ["mme/count/1/1"], ["count"])["perception"] == 200 * (reading == "no")


def test_mme_scores():
    keys = ["mme/existence/1/1", "mme/existence/1/2", "mme/existence/2/1", "mme/existence/2/2"]
    found = questions.mme_scores(["Yes", "No", "yes.", "Yes"], ["yes", "no", "yes", "no"], keys, ["existence"] * 4)
    assert found["perception"] == pytest.approx(75 + 50) and found["cognition"] == 0
    assert np.isclose(found["categories"]["existence"], 125)
