"""Annotations of referring data that are odd, missing or of another image: the right mask, or an error that says so."""

import json
import pathlib
import pickle

import numpy as np
from PIL import Image
import pytest

from alto_jax.data import benchmarks, coco, files, open_vocab, refcoco
from alto_jax.data.prompts import NoPrompts
from alto_jax.data.sa1b import Sa1bMasks
from tests.conftest import run_python
from tests.data import replicas

HEIGHT, WIDTH = 60, 80
BOX = [[8, 18, 32, 18, 32, 42, 8, 42]]
NAME = "COCO_train2014_000000000001.jpg"


def box_mask() -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[18:42, 8:32] = True
    return mask


def annotation(number: int, segmentation, crowd: int = 0) -> dict:
    return {"id": number, "image_id": 1, "iscrowd": crowd, "segmentation": segmentation}


CROWD = annotation(10, replicas.runs(np.roll(box_mask(), 20, axis=1), "counts"), crowd=1)
PLAIN = annotation(11, BOX)
HOLLOW = annotation(12, [])


def write(root: pathlib.Path, refs, dataset="refcoco", image=None, size=(WIDTH, HEIGHT), annotations=None) -> None:
    """An image of 80x60, instances.json with a crowd, a box and an annotation without segmentation, and these refs."""
    (root / "train2014").mkdir(parents=True, exist_ok=True)
    (root / dataset).mkdir(exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), 99, np.uint8)).save(root / "train2014" / NAME)
    info = {"id": 1, "file_name": NAME, "height": HEIGHT, "width": WIDTH} | (image or {})
    content = {"images": [info], "annotations": annotations or [CROWD, PLAIN, HOLLOW]}
    (root / dataset / "instances.json").write_text(json.dumps(content))
    common = {"image_id": 1, "split": "val", "sentences": [{"sent": "red thing"}]}
    refs = [{"ref_id": i, **common, **ref} for i, ref in enumerate(refs)]
    if dataset == "grefcoco":
        (root / dataset / "grefs(unc).json").write_text(json.dumps(refs))
    else:
        (root / dataset / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))


def read(root, name="refcoco_val", **options) -> list:
    """The records of a benchmark; a bad one is its message."""
    source = benchmarks.open_benchmark(name, root, **options)
    found = []
    for index in range(len(source)):
        try:
            found.append(source[index])
        except ValueError as error:
            found.append(str(error))
    return found


def test_crowds_are_masks_where_there_is_nothing_else(tmp_path):
    write(tmp_path, [{"ann_id": [10]}, {"ann_id": [10, 11]}, {"ann_id": [-1]}], "grefcoco")
    crowd, both, nothing = read(tmp_path, "grefcoco_val")
    np.testing.assert_array_equal(crowd["mask"] > 0, np.roll(box_mask(), 20, axis=1))
    np.testing.assert_array_equal(both["mask"] > 0, box_mask())
    assert not nothing["mask"].any()
    write(tmp_path, [{"ann_id": 10}, {"ann_id": 11}])
    crowd, plain = read(tmp_path)
    np.testing.assert_array_equal(crowd["mask"] > 0, np.roll(box_mask(), 20, axis=1))
    np.testing.assert_array_equal(plain["mask"] > 0, box_mask())


@pytest.mark.parametrize(
    ("dataset", "ref", "message"),
    [
        ("refcoco", {"ann_id": -1}, "ann_id -1 is not in"),
        ("refcoco", {"ann_id": None}, "ann_id None is not in"),
        ("refcoco", {"ann_id": 99}, "ann_id 99 is not in"),
        ("refcoco", {"ann_id": 12}, "ann_id 12 .* has no segmentation"),
        ("grefcoco", {"ann_id": []}, "ann_id is empty"),
        ("grefcoco", {"ann_id": [11, -1]}, "ann_id -1 is not in"),
        ("grefcoco", {"ann_id": [11, 12]}, "ann_id 12 .* has no segmentation"),
        ("grefcoco", {"ann_id": [11], "no_target": True}, "no_target is True, but ann_id is"),
        ("grefcoco", {"ann_id": [-1], "no_target": False}, "no_target is False, but ann_id is"),
        ("grefcoco", {"ann_id": {"a": 1}}, "malformed|not in"),
    ],
)
def test_missing_annotations_are_no_absent_targets(tmp_path, dataset, ref, message):
    write(tmp_path, [ref, {"ann_id": [11] if dataset == "grefcoco" else 11}], dataset)
    bad, good = read(tmp_path, f"{dataset}_val")
    assert isinstance(bad, str) and "entry 0: " in bad
    with pytest.raises(ValueError, match=message):
        raise ValueError(bad)
    assert good["mask"].sum() == 255 * 24 * 24


@pytest.mark.parametrize("size", [(40, 30), (160, 120), (60, 80)])
def test_images_of_another_size_than_stated_are_refused(tmp_path, size):
    write(tmp_path, [{"ann_id": 11}], size=size)
    (bad,) = read(tmp_path)
    assert "entry 0: the annotations are for 80x60 pixels" in bad and f"its image is {size[0]}x{size[1]}" in bad
    entry = {"image_info": {"file_name": NAME, "height": HEIGHT, "width": WIDTH}, "anns": [PLAIN]}
    psalm = [entry | {"instruction": [{"sent": "it"}]}]
    (tmp_path / "refcoco" / "refcoco_val.json").write_text(json.dumps(psalm))
    (bad,) = read(tmp_path)
    assert "refcoco_val.json entry 0: the annotations are for 80x60" in bad and f"{size[0]}x{size[1]}" in bad


@pytest.mark.parametrize("stated", [{"height": 60.0, "width": 80.0}, {"height": None, "width": None}])
def test_sizes_may_be_whole_floats_or_missing(tmp_path, stated):
    write(tmp_path, [{"ann_id": 11}], image=stated)
    assert read(tmp_path)[0]["mask"].any()


@pytest.mark.parametrize(
    "stated", [{"height": "60"}, {"width": 80.5}, {"width": None}, {"height": True}, {"height": 0}]
)
def test_sizes_that_are_none_are_named(tmp_path, stated):
    write(tmp_path, [{"ann_id": 11}], image=stated)
    assert f"image 1: field {next(iter(stated))} is missing or of a wrong type" in read(tmp_path)[0]


def test_an_empty_sentence_is_left_out_alone(tmp_path):
    said = [{"sent": "red disc"}, {"sent": " "}, {"sent": "the left one"}, {"raw": "no text"}, {"sent": None}]
    write(tmp_path, [{"ann_id": 11, "sentences": said}, {"ann_id": 11, "sentences": said[1:2]}])
    joined, nothing = read(tmp_path)
    assert joined["phrase"] == "Meet all the descriptions: 1. red disc. 2. the left one. "
    assert "entry 1: no sentence, or none but empty ones" in nothing
    single = read(tmp_path, protocol="per_sentence")
    assert [r if isinstance(r, str) else r["phrase"] for r in single[::2]] == ["red disc", "the left one", single[4]]
    for record, number in zip((single[1], single[3], single[4]), (1, 3, 4)):
        assert f"entry 0: sentence {number} is an empty one" in record
    source = benchmarks.open_benchmark("refcoco_val", tmp_path, protocol="per_sentence")
    assert isinstance(source, refcoco.Referring)
    assert list(source.phrases()) == ["red disc", "the left one"]


def test_psalm_files_are_read_as_by_their_loader(tmp_path, caplog):
    write(tmp_path, [])
    info = {"file_name": NAME, "height": HEIGHT, "width": WIDTH}
    entry = lambda instruction, anns: {"image_info": info, "instruction": instruction, "anns": anns}
    it = [{"sent": "it"}]
    entries = [entry([], [PLAIN]), entry(it, [PLAIN]), entry(it, [HOLLOW]), entry(it, [HOLLOW, PLAIN])]
    entries += [entry(it, [CROWD]), entry(it, []), {"image_info": info, "instruction": it}]
    for dataset, bad in (("refcoco", 2), ("grefcoco", 1)):
        (tmp_path / dataset).mkdir(exist_ok=True)
        (tmp_path / dataset / f"{dataset}_val.json").write_text(json.dumps(entries))
        plain, hollow, part, crowd, *rest = read(tmp_path, f"{dataset}_val")
        for record in (plain, part):
            np.testing.assert_array_equal(record["mask"] > 0, box_mask())
        assert not hollow["mask"].any() and crowd["mask"].any()
        assert sum(isinstance(record, str) for record in rest) == bad and "'anns'" in rest[-1]
    assert "anns is empty, in a data set without no-target samples" in read(tmp_path)[4]
    assert "1 of 7 entries have no instruction and are left out" in caplog.text


def test_an_empty_mask_is_answered_no_only_where_that_may_be(tmp_path):
    write(tmp_path, [])
    info = {"file_name": NAME, "height": HEIGHT, "width": WIDTH}
    entries = [{"image_info": info, "instruction": [{"sent": "it"}], "anns": [a]} for a in (HOLLOW, PLAIN)]
    for dataset in ("refcoco", "grefcoco"):
        (tmp_path / dataset).mkdir(exist_ok=True)
        (tmp_path / dataset / f"{dataset}_train.json").write_text(json.dumps(entries))
        raw = benchmarks.train_split(dataset, tmp_path)
        chats = refcoco.ReferringChats(raw)
        if dataset == "grefcoco":
            assert chats[0]["conversations"][1]["value"] == "No"
        else:
            with pytest.raises(ValueError, match="record refcoco/train/0/0: the mask is empty, in a data set without"):
                chats[0]
        asked = refcoco.ReferringChats(raw.with_targets(), adaptive_fraction=1.0, yes_fraction=0.0)
        assert len(asked) == 1 and len(asked[0]["masks"]) == 1  # Stage 3 asks for what is there alone.
    (tmp_path / "grefcoco" / "grefcoco_train.json").write_text(json.dumps(entries[:1]))
    with pytest.raises(NoPrompts, match="none of the 1 samples has a target"):
        benchmarks.train_split("grefcoco", tmp_path).with_targets()


@pytest.mark.parametrize(
    ("stated", "stored"),
    [
        (NAME, f"coco/train2014/{NAME}"),
        (f"train2014/{NAME}", f"coco/train2014/{NAME}"),
        (f"train2014/{NAME}", f"images/train2014/{NAME}"),
        (NAME, "coco/train2017/000000000001.jpg"),
        (f"train2014/{NAME}", "coco/train2017/000000000001.jpg"),
        (NAME, "coco/val2017/000000000001.jpg"),
        ("000000000001.jpg", f"coco/train2014/{NAME}"),
        ("train2017/000000000001.jpg", f"train2014/{NAME}"),
        ("odd name.jpg", "coco/train2014/odd name.jpg"),
    ],
)
def test_images_are_found_under_all_names_of_coco(tmp_path, stated, stored):
    write(tmp_path, [{"ann_id": 11}], image={"file_name": stated})
    file = tmp_path / stored
    file.parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "train2014" / NAME).rename(file)
    if file.parent.name == "val2017":
        (tmp_path / "coco" / "train2017").mkdir()
    if not any((tmp_path / "train2014").iterdir()):
        (tmp_path / "train2014").rmdir()
    assert read(tmp_path)[0]["mask"].any()


def test_another_image_of_the_same_odd_name_is_not_taken(tmp_path):
    for folder in ("val2014", "train2014"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "train2014" / "1.jpg")
    assert coco.find_image(tmp_path / "val2014" / "1.jpg") == tmp_path / "val2014" / "1.jpg"


def test_texts_of_python_2_are_utf_8_or_latin_1(tmp_path):
    def python_2(text: bytes) -> bytes:  # protocol 2: a byte string of Python 2 in a list
        return b"\x80\x02](U" + bytes([len(text)]) + text + b"U\x05plaine."

    for number, (content, wanted) in enumerate([("café 犬".encode(), "café 犬"), ("café".encode("latin-1"), "café")]):
        file = tmp_path / f"{number}.p"
        file.write_bytes(python_2(content))
        assert files.load_pickle(file) == [wanted, "plain"]


def test_a_pickle_that_claims_memory_takes_none(tmp_path):
    # Protocol 2: the number of an object in the table of those that can be named again, as a damaged file has it.
    (tmp_path / "refs(unc).p").write_bytes(b"\x80\x02]r" + (2**31 - 1).to_bytes(4, "little") + b".")
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31)); from alto_jax.data import files; "
        f"print(files.load_pickle({str(tmp_path / 'refs(unc).p')!r}))"
    )
    done = run_python("-c", code)
    assert done.stdout == "[]\n", done.stderr[-500:]


def test_sets_without_an_entry_name_their_file(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "psalm.json").write_text("[]")
    with pytest.raises(ValueError, match="psalm.json: no entry"):
        refcoco.open_psalm(tmp_path / "psalm.json", "x/val", root=tmp_path)
    (tmp_path / "refcocom" / "annotations").mkdir(parents=True)
    (tmp_path / "refcocom" / "annotations" / "val_part_only.json").write_text("[]")
    with pytest.raises(ValueError, match="val_part_only.json: no entry"):
        refcoco.open_refcocom(tmp_path, "val_part_only")


def test_names_that_are_none_are_not_looked_for(tmp_path):
    for name in ("0" * 5000 + ".jpg", "a\0b.jpg"):
        assert coco.find_image(tmp_path / name) == tmp_path / name


def test_sa1b_sizes_may_be_whole_floats_and_are_compared(tmp_path):
    replicas.write_sa1b(tmp_path, 2)
    for number, sides in enumerate(({"width": 64.0, "height": 64.0}, {"width": 128, "height": 64})):
        file = tmp_path / f"sa_{number}.json"
        content = json.loads(file.read_text())
        content["image"] |= sides
        for one in content["annotations"]:
            one["segmentation"]["size"] = [float(sides["height"]), float(sides["width"])]
            if number == 1:
                one["segmentation"]["counts"] = [64 * 128 - 5, 5]
        file.write_text(json.dumps(content))
    source = Sa1bMasks(tmp_path, train=False)
    assert source[0]["mask"].any() and source.problems(0) == []
    with pytest.raises(ValueError, match=r"sa_1\.json: the annotations are for 128x64 pixels .*its image is 64x64"):
        source[1]
    assert any("128x64" in str(problem) for problem in source.problems(1))


def test_open_vocabulary_refuses_images_of_another_size(tmp_path):
    replicas.write_label_maps(tmp_path, "pas20")
    image = tmp_path / "images" / "img_2.jpg"
    Image.open(image).resize((32, 48)).save(image)
    with pytest.raises(ValueError, match=r"img_2\.png: the label map is 64x64, its image is 32x48: .*img_2\.jpg"):
        open_vocab.build("pas20", tmp_path / "images", tmp_path / "labels", tmp_path / "out")
    assert not (tmp_path / "out" / "pas20.jsonl").exists()
