"""Names of many: which files are requests, what can be written of an id, and which number an image has."""

import json
import types

import numpy as np
from PIL import Image
import pytest

from alto_jax.config import ConfigError
from alto_jax.inference import bulk, bulk_work, requests
from alto_jax.inference.prediction import AnswerMask, Prediction
from alto_jax.inference.requests import Request


def test_no_mask_is_written_over_another_ones(tmp_path):
    pixels = np.zeros((9, 9), bool)
    masks = [AnswerMask(pixels, [1], 0.0), AnswerMask(~pixels, [2], 1.0)]
    two = Prediction(pixels, pixels, "", [], [1], 1, 0.0, masks=masks, num_masks=2)
    cfg = types.SimpleNamespace(tokenizer=types.SimpleNamespace(num_latent_tokens=8))
    answer = lambda prepared, *others: [two] * len(prepared)
    model = types.SimpleNamespace(cfg=cfg, identity="", answer_batch=answer)
    work = bulk_work.SegmentWork(model, tmp_path, {}, prompt=None, exif="upright", batch_size=2, save_masks=True,
                                 save_overlays=False)  # fmt: skip
    asked = [Request(name, {"image": "x.png", "text": "a"}) for name in ("a", "a.2", "2/a")]
    lines = work.answer(asked, [(None, None)] * 3, tmp_path)
    files = [file for line in lines for file in line["files"]]
    assert len(set(files)) == 6 and files[:2] == ["masks/a.png", "masks_2/a.png"]
    assert [np.asarray(Image.open(tmp_path / file)).max() for file in files] == [0, 255] * 3


@pytest.mark.parametrize(
    ("names", "ids"),
    [
        (["7.png", "007.png"], [1, 2]), (["7.png", "08.png", "7.png"], [7, 8, 7]), (["7", "007"], [1, 2]),
        (["²", "1"], [1, 2]),
    ],
)  # fmt: skip
def test_each_image_has_a_number_of_its_own(names, ids, tmp_path):
    line = {"size": [8, 8], "token_probability": 1.0, "masks": [{"rle": {}, "confidence": 1.0}]}
    lines = [{"id": str(n), "request": {"image": name, "text": "a"}, **line} for n, name in enumerate(names)]
    (tmp_path / bulk.RESULTS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert bulk_work.write_coco(tmp_path) == len(names)
    assert [entry["image_id"] for entry in json.loads((tmp_path / bulk_work.COCO).read_text())] == ids


def test_results_in_the_folder_of_images_are_none_of_them(tmp_path):
    for name in ("a.png", "inner/b.png", "answers/masks/a.png.png", "answers 2/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "answers")
    ids = lambda out: [one.id for one in requests.of_folder(str(tmp_path), "--images", "image", {}, out)]
    others = ["a.png", "answers 2/c.png", "inner/b.png"]
    for out in (tmp_path / "answers", str(tmp_path / "inner/../answers"), tmp_path / "link"):
        assert ids(out) == others
    assert ids(tmp_path / "inner")[1:] == ["answers 2/c.png", "answers/masks/a.png.png"]
    assert len(ids(tmp_path.parent)) == len(ids(tmp_path.parent / "else")) == 4
    with pytest.raises(ConfigError, match="--out=.*: expected another folder than that of --images"):
        ids(tmp_path)


def test_names_that_no_file_can_have_are_bad_requests(tmp_path):
    """Bytes count, and the ending of what is written."""
    file, longest = tmp_path / "requests.jsonl", "苹" * 83 + "ab"  # 251 bytes
    asked = [longest, longest + "c", f"{longest}c/b", "苹" * 90, f"{'苹' * 86}/b"]
    file.write_text("\n".join(json.dumps({"image": "a.png", "text": "a", "id": name}) for name in asked))
    found = requests.of_jsonl(str(file), "--requests", {})
    assert [one.error is None for one in found] == [True, False, True, False, False]
    assert "line 4: id: expected names that end in .png in 255 bytes, got 274: '苹苹" in str(found[3].error)
    for name in ("x" * 247, "x" * 248):
        (tmp_path / f"{name}.png").write_bytes(b"x")
    kept, bad = requests.of_folder(str(tmp_path), "--images", "image", {"text": "a"})
    assert kept.error is None and (tmp_path / f"{kept.id}.png").write_bytes(b"x")
    assert "image: expected names that end in .png in 255 bytes, got 256" in str(bad.error)
