"""ReasonSeg and RefCOCO-M: polygons with ignored regions, and masks in a parquet file."""

import json
import sys

import numpy as np
from PIL import Image
import pytest

from alto_jax.config import ConfigError
from alto_jax.data import benchmarks, reason_seg, refcoco
from alto_jax.data.refcoco_m import open_refcoco_m
from tests.data import replicas


def test_shapes_are_drawn_larger_ones_first_and_ignored_pixels_apart(tmp_path):
    replicas.write_reason_seg(tmp_path)
    source = benchmarks.open_benchmark("reasonseg_val", tmp_path)
    assert isinstance(source, refcoco.Referring) and len(source) == 3
    for number, record in enumerate(source):
        ignore, mask = np.zeros((64, 64), bool), np.zeros((64, 64), bool)
        mask[8 : 41 + number, 8 : 41 + number] = True
        ignore[20 + number : 31, 20 + number : 31] = True
        np.testing.assert_array_equal(record["ignore"] > 0, ignore)
        np.testing.assert_array_equal(record["mask"] > 0, mask & ~ignore)
        assert record["key"] == f"reasonseg/val/val_{number}/0" and record["image_name"] == f"val_{number}"
        assert record["phrase"] == f"what keeps café {number} dry?"


def test_training_asks_every_question_and_evaluation_the_first(tmp_path):
    replicas.write_reason_seg(tmp_path)
    assert len(benchmarks.train_split("reasonseg", tmp_path)) == 6
    assert len(reason_seg.open_reason_seg(tmp_path, "train")) == 3
    chats = refcoco.ReferringChats(benchmarks.train_split("reasonseg", tmp_path))
    assert "<ref>the thing that keeps it dry</ref>" in chats[1]["conversations"][0]["value"]


def test_it_is_drawn_on_the_upright_image(tmp_path):
    replicas.write_reason_seg(tmp_path, ("val",), 1)
    file = tmp_path / "ReasonSeg/val/val_0.jpg"
    wide = Image.open(file).resize((80, 48))
    exif = wide.getexif()
    exif[0x0112] = 6
    wide.save(file, exif=exif.tobytes(), quality=95)
    record = reason_seg.open_reason_seg(tmp_path, "val")[0]
    assert record["image"].shape == (80, 48, 3) and record["mask"].shape == (80, 48) and record["mask"][8, 8]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"shapes": [{"label": "target", "points": [[1, 2], [3]]}]}, r"shapes\[0\]: field points: expected \[\[x, y\]"),
        ({"shapes": [{"label": "target", "points": [[1, 2], [3, float("nan")]]}]}, r"shapes\[0\]: field points"),
        ({"shapes": [{"label": "target", "points": [[1, 2], [9e9, 3], [1, 4]]}]}, "a corner lies further outside"),
        ({"shapes": [{"label": "ignore", "points": [[1, 2], [9, 3], [1, 4]]}]}, "no pixel is target"),
        ({"shapes": [{"points": []}]}, r"shapes\[0\]: field label is missing"),
        ({"shapes": 4}, "a field is missing or malformed"),
        ({"text": [""]}, "no sentence, or none but empty ones"),
        ({"text": None}, "no sentence, or none but empty ones"),
    ],
)
def test_a_broken_file_is_named(tmp_path, changes, message):
    replicas.write_reason_seg(tmp_path, ("val",), 1)
    file = tmp_path / "ReasonSeg/val/val_0.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    source = reason_seg.open_reason_seg(tmp_path, "val")
    with pytest.raises(ValueError, match=f"val_0.json.*{message}"):
        source[0]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="ReasonSeg val: expected one of reason_seg/ReasonSeg/val, ReasonSeg/val"):
        reason_seg.open_reason_seg(tmp_path, "val")
    (tmp_path / "ReasonSeg/val").mkdir(parents=True)
    with pytest.raises(ValueError, match="val holds no "):
        reason_seg.open_reason_seg(tmp_path, "val")


def test_few_corners_and_a_corner_alone_are_drawn(tmp_path):
    replicas.write_reason_seg(tmp_path, ("val",), 1)
    file = tmp_path / "ReasonSeg/val/val_0.json"
    for points, count in (([[3, 4]], 1), ([[3, 4], [3, 9]], 6)):
        shapes = [{"label": "target", "points": points}]
        file.write_text(json.dumps({"text": "it", "is_sentence": False, "shapes": shapes}))
        assert (reason_seg.open_reason_seg(tmp_path, "val")[0]["mask"] > 0).sum() == count


def test_refcoco_m_gives_its_masks(tmp_path, monkeypatch):
    expected = replicas.write_refcoco_m(tmp_path)
    source = open_refcoco_m(tmp_path)
    assert len(source) == len(expected) and source[0]["phrase"].startswith("Meet all the descriptions: 1. the one. ")
    for record in source:
        mask = expected[int(record["key"].rpartition("/")[2])]
        np.testing.assert_array_equal(record["mask"] > 0, mask)
    assert len(open_refcoco_m(tmp_path, protocol="per_sentence")) == 2 * len(expected)
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(ConfigError, match=r"RefCOCO-M needs pyarrow: pip install 'alto_jax\[parquet\]'"):
            open_refcoco_m(tmp_path)
    (file,) = (tmp_path / "refcoco-m/data").iterdir()
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match="parquet: cannot be read as RefCOCO-M: "):
        open_refcoco_m(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match="RefCOCO-M: .* holds no validation"):
        open_refcoco_m(tmp_path)
