"""SA-1B folders and conversation files, on small replicas made here."""

import json

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
import pytest

from alto_jax.data.conversations import Conversations
from alto_jax.data.sa1b import Sa1bMasks

HEIGHT, WIDTH = 60, 90


def write_sa1b(folder, number: int, boxes, compressed: bool = True) -> None:
    """One image whose annotations are the boxes (x, y, w, h)."""
    folder.mkdir(parents=True, exist_ok=True)
    image = np.random.default_rng(number).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(image).save(folder / f"sa_{number}.jpg")
    annotations = []
    for i, (x, y, w, h) in enumerate(boxes):
        mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
        mask[y : y + h, x : x + w] = 1
        counts = coco_mask.encode(mask)["counts"].decode()
        if not compressed:
            flat = mask.ravel(order="F")
            edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [0]])))
            counts = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
        rle = {"size": [HEIGHT, WIDTH], "counts": counts}
        annotations.append({"id": i, "area": int(w * h), "bbox": [x, y, w, h], "segmentation": rle})
    info = {"image_id": number, "height": HEIGHT, "width": WIDTH, "file_name": f"sa_{number}.jpg"}
    (folder / f"sa_{number}.json").write_text(json.dumps({"image": info, "annotations": annotations}))


BOXES = [
    (0, 0, 20, 20),
    (30, 10, 10, 30),
    (2, 2, 3, 3),
    (60, 20, 25, 25),
    (5, 40, 30, 10),
]  # one is too small


@pytest.fixture
def sa1b(tmp_path):
    write_sa1b(tmp_path / "sa_000000", 1, BOXES)
    write_sa1b(tmp_path / "sa_000001", 2, BOXES, compressed=False)
    return tmp_path


def test_sa1b_evaluation_takes_the_first_annotations(sa1b):
    source = Sa1bMasks(sa1b, train=False)
    assert len(source) == 2
    for index, boxes in ((0, [BOXES[0]]), (1, [BOXES[0], BOXES[1]])):  # min(index % max(3, 4 // 2) + 1, 4)
        record = source[index]
        expected = np.zeros((WIDTH, WIDTH), np.uint8)  # padded to a square at the bottom
        for x, y, w, h in boxes:
            expected[y : y + h, x : x + w] = 255
        np.testing.assert_array_equal(record["mask"], expected)
        assert record["image"].shape == (WIDTH, WIDTH, 3) and not record["image"][HEIGHT:].any()
        assert record["key"].startswith(f"sa_00000{index}/sa_{index + 1}.json")


def test_sa1b_training_is_seeded_and_varies(sa1b):
    source, same = (Sa1bMasks(sa1b, seed=3, draws_per_image=8) for _ in range(2))
    other = Sa1bMasks(sa1b, seed=4, draws_per_image=8)
    assert len(source) == 16
    areas = []
    for i in reversed(range(16)):
        record = source[i]
        np.testing.assert_array_equal(record["mask"], same[i]["mask"])
        np.testing.assert_array_equal(record["image"], same[i]["image"])
        assert record["image"].shape[:2] == record["mask"].shape == (len(record["mask"]),) * 2
        areas.append(int((record["mask"] > 127).sum()))
    assert len(set(areas)) >= 5
    assert areas != [int((other[i]["mask"] > 127).sum()) for i in reversed(range(16))]


def test_sa1b_long_side_is_limited(sa1b):
    record = Sa1bMasks(sa1b, train=False, max_side=45)[0]
    assert record["mask"].shape == (45, 45) and record["image"].shape == (45, 45, 3)
    assert (record["mask"][1:9, 1:9] == 255).all() and not record["mask"][31:].any()


def test_sa1b_image_without_large_annotation_is_replaced(tmp_path):
    write_sa1b(tmp_path, 1, [(0, 0, 3, 3)])
    with pytest.raises(ValueError, match="no annotation above 0.005"):
        Sa1bMasks(tmp_path)[0]
    write_sa1b(tmp_path, 2, BOXES)
    assert Sa1bMasks(tmp_path, train=False)[0]["key"].startswith("sa_2.json")


def test_sa1b_errors_name_file_and_field(sa1b, tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist"):
        Sa1bMasks(tmp_path / "nowhere")
    (tmp_path / "void").mkdir()
    with pytest.raises(ValueError, match="void holds no sa_"):
        Sa1bMasks(tmp_path / "void")
    file = sa1b / "sa_000000" / "sa_1.json"
    content = json.loads(file.read_text())
    cases = {
        r"image\.height": {**content, "image": {**content["image"], "height": "60"}},
        r"annotations\[0\]\.area": {**content, "annotations": [{"id": 1}]},
        r"annotations\[0\]\.segmentation": {**content, "annotations": [{"area": 999}]},
        r"segmentation\.size differs": {**content, "image": {**content["image"], "height": 61}},
        r"field annotations ": {"image": content["image"]},
    }
    for message, changed in cases.items():
        file.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=f"sa_1.json.*{message}"):
            Sa1bMasks(sa1b, train=False)[0]
    file.write_text("{")
    with pytest.raises(ValueError, match="sa_1.json is no JSON"):
        Sa1bMasks(sa1b, train=False)[0]


def turns(token: str = "<TOK_0>", count: int = 1):
    spans = " and ".join([f"<ALTo_Start>{token * 32}<ALTo_End>"] * count)
    return [
        {"from": "human", "value": "<image>\nSegment <ref>road</ref>."},
        {"from": "gpt", "value": f"The mask appears at {spans}."},
    ]


@pytest.fixture
def files(tmp_path):
    """A meta file with one data set of three lines (a blank one between) in tmp_path."""
    for i in range(3):
        Image.fromarray(np.full((20, 30, 3), 50 * i, np.uint8)).save(tmp_path / f"{i}.png")
        mask = np.zeros((20, 30), np.uint8)
        mask[i : i + 5, 3:9] = 255
        Image.fromarray(mask).save(tmp_path / f"m{i}.png")
    lines = [
        {"image": "0.png", "mask": "m0.png", "conversations": turns()},
        {"image": "1.png", "mask": ["m0.png", "m1.png"], "conversations": turns("<TOK_1>", 2)},
        {
            "image": "2.png",
            "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "No"}],
        },
    ]
    text = [json.dumps(line) for line in lines]
    (tmp_path / "chat.jsonl").write_text("\n".join([text[0], "", *text[1:]]) + "\n")
    return tmp_path


def write_meta(folder, **fields) -> str:
    entry = {"root": ".", "annotation": "chat.jsonl", "data_augment": False, "repeat_time": 1, "length": 3}
    entry |= fields
    (folder / "meta.json").write_text(json.dumps({"sample": {k: v for k, v in entry.items() if v is not None}}))
    return str(folder / "meta.json")


def test_conversations_give_images_masks_and_text(files):
    source = Conversations(write_meta(files))
    assert [source[i]["key"] for i in range(3)] == [f"sample/chat.jsonl:{n}" for n in (1, 3, 4)]
    assert [len(source[i]["masks"]) for i in range(3)] == [1, 2, 0]
    record = source[1]
    assert (record["image"] == 50).all() and record["conversations"] == turns("<TOK_1>", 2)
    for i, mask in enumerate(record["masks"]):
        assert mask.dtype == np.uint8 and mask.sum() == 30 * 255 and (mask[i : i + 5, 3:9] == 255).all()


def test_texts_come_without_images(files):
    source = Conversations(write_meta(files, repeat_time=5))
    (files / "2.png").unlink()
    assert [len(t) for t in source.texts()] == [2, 2, 2]
    assert list(source.texts())[2] == ["Hi", "No"]


def test_repeat_time_weights_records(files):
    keys = lambda repeat: [r["key"][-1] for r in Conversations(write_meta(files, repeat_time=repeat))]
    assert keys(2) == list("134134")
    assert len(keys(100)) == 300
    some = keys(0.34)
    assert len(some) == 1 and some == keys(0.34)
    assert sorted(keys(1.67)) in [sorted("134" + pair) for pair in ("13", "14", "34")]


def test_data_augment_recompresses_the_image(files):
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(noise).save(files / "0.png")
    changed = Conversations(write_meta(files, data_augment=True))[0]["image"]
    assert not np.array_equal(changed, noise)
    np.testing.assert_array_equal(changed, Conversations(write_meta(files, data_augment=True))[0]["image"])


def test_meta_errors_name_file_and_field(files):
    for fields, message in (
        ({"annotation": None}, "sample.annotation is missing"),
        ({"annotation": "absent.jsonl"}, "sample.annotation .*absent.jsonl does not exist"),
        ({"repeat_time": 0}, "sample.repeat_time must be above 0"),
        ({"repeat_time": 1e300}, "sample.repeat_time makes more than 100000000 of 3 records, got 1e\\+300"),
        ({"repeat_time": float("inf")}, "sample.repeat_time makes more than"),
        ({"annotation": "0" * 5000}, "sample.annotation .*does not exist"),
        ({"repeat_time": "2"}, "sample.repeat_time is missing or of a wrong type: '2'"),
        ({"root": 3}, "sample.root"),
    ):
        with pytest.raises(ValueError, match=rf"meta\.json.*{message}"):
            Conversations(write_meta(files, **fields))
    with pytest.raises(ValueError, match="nometa.json cannot be read"):
        Conversations(files / "nometa.json")
    (files / "deep.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="deep.json is no JSON"):
        Conversations(files / "deep.json")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is no JSON"),
        ('{"mask": "m0.png"}', "field image"),
        ('{"image": "0.png", "mask": 3, "conversations": [{"from": "human", "value": "x"}]}', "field mask"),
        ('{"image": "0.png", "mask": "m0.png"}', "field conversations"),
        ('{"image": "0.png", "conversations": [{"from": "human"}]}', "field conversations"),
        ('{"image": "9.png", "conversations": [{"from": "human", "value": "x"}]}', r"9\.png does not exist"),
    ],
)
def test_line_errors_name_file_line_and_field(files, line, message):
    with open(files / "chat.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=rf"chat\.jsonl line 5.*{message}"):
        Conversations(write_meta(files))[3]


def test_empty_mask_is_refused(files):
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(files / "m0.png")
    with pytest.raises(ValueError, match=r"chat\.jsonl line 1: mask .*m0\.png is empty"):
        Conversations(write_meta(files))[0]
