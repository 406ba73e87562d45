"""What is held out of training: by image, the same everywhere, and never on both sides."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from alto_jax.config import ConfigError
from alto_jax.data import prepare, sources
from alto_jax.data.conversations import Conversations
from alto_jax.data.prepared import Prepared
from alto_jax.data.sa1b import Sa1bMasks
from alto_jax.data.split import ImageSplit, image_hash, image_name
from alto_jax.experiment import EvalConfig
from tests.data import replicas

COUNT = 12


def config_of(debug_model, stage: str = "stage2", **data):
    evaluation = dataclasses.replace(debug_model.config.eval, **data.pop("evaluation", {}))
    changed = dataclasses.replace(debug_model.config.data, max_length=200, max_masks=2, max_bad_fraction=0.5, **data)
    return dataclasses.replace(debug_model.config, stage=stage, data=changed, eval=evaluation)


def open_both(config):
    open_source = sources.mask_source if config.stage.startswith("stage1") else sources.chat_source
    return open_source(config), open_source(config, held_out=True)


def hashes_of(source) -> set[int]:
    """Of all images, by the index alone."""
    return {number for i in range(len(source)) for number in source.image_hashes(i)}


def test_a_name_is_the_files_own_whatever_the_folder_and_ending():
    for path in ("coco/train2017/000000000009.jpg", "train2014/COCO_train2014_000000000009.jpg", "a\\000000000009.png"):
        assert image_name(path) == "000000000009"
    assert image_name("a/.hidden") == ".hidden" and image_name("a.b/c") == "c" and image_name("x.tar.jpg") == "x.tar"


def test_the_hash_is_as_documented():
    """Pinned: a later version must hold out the same images."""
    assert image_hash("000000000009") == 0xC11F4234C7EB77EC
    half, tenth = (ImageSplit(f, held_out=True) for f in (0.5, 0.1))
    names = [f"{i:012d}" for i in range(4000)]
    hashes = np.array([image_hash(n) for n in names], np.uint64)
    chosen = [half.has((image_hash(n),), "") for n in names]
    np.testing.assert_array_equal(chosen, half.has_hashes(hashes))
    assert 0.47 < np.mean(chosen) < 0.53
    assert set(np.flatnonzero(tenth.has_hashes(hashes))) < set(np.flatnonzero(chosen))


def test_a_record_with_images_of_both_sides_is_on_neither():
    inside, outside = 2**63 - 2**20, 2**63 + 2**20
    sides = [ImageSplit(0.5, held_out=side) for side in (False, True)]
    assert [s.has((inside, outside), "") for s in sides] == [False, False]
    assert sum(s.has((), "a text") for s in sides) == 1


def write_conversations(root, count: int = COUNT) -> str:
    """A meta file of two data sets, the second with other conversations about some of the same images."""
    meta = replicas.write_conversations(root, count)
    lines = (root / "chat.jsonl").read_text().splitlines()
    (root / "again.jsonl").write_text("\n".join([*lines[::2], "{broken"]) + "\n")
    content = json.loads(meta.read_text())
    content["again"] = {"root": ".", "annotation": "again.jsonl", "repeat_time": 3}
    meta.write_text(json.dumps(content))
    return str(meta)


def make(kind: str, root, debug_model):
    """A configuration of each kind of data with half of the images held out."""
    if kind == "sa1b":
        replicas.write_sa1b(root / "sa1b", COUNT)
        return config_of(debug_model, "stage1", source="sa1b", root=str(root / "sa1b"), validation_fraction=0.5)
    if kind == "prepared masks":
        replicas.write_sa1b(root / "sa1b", COUNT)
        raw = Sa1bMasks(root / "sa1b", draws_per_image=2)
        job = prepare.Job(
            "sa1b", "masks", raw, dict.fromkeys(("vision_size", "image_size", "mask_size"), 0), "png", 5, 0
        )
        folder = prepare.prepare(job, root / "prepared", max_bad_fraction=0.5)
        return config_of(debug_model, "stage1", source="prepared", root=str(folder), validation_fraction=0.5)
    if kind == "jsonl":
        meta = write_conversations(root)
        return config_of(debug_model, source="jsonl", meta=meta, validation_fraction=0.5)
    if kind == "prepared":
        raw = Conversations(write_conversations(root), once=True)
        job = prepare.Job(
            "chat", "chat", raw, dict.fromkeys(("vision_size", "image_size", "mask_size"), 0), "png", 5, 0
        )
        folder = prepare.prepare(job, root / "prepared", max_bad_fraction=0.5)
        return config_of(debug_model, source="prepared", root=str(folder), validation_fraction=0.5)
    if kind == "referring":
        for dataset in ("refcoco", "grefcoco"):
            replicas.write_refer(root, dataset, splits=("train",), count=COUNT)
        return config_of(
            debug_model, source="referring", root=str(root), meta="refcoco,grefcoco", validation_fraction=0.5
        )
    make("jsonl", root, debug_model), make("referring", root, debug_model)
    entries = {
        "chat": {"weight": 1, "source": "jsonl", "meta": "meta.json"},
        "ref": {"weight": 1, "source": "referring", "root": ".", "meta": "refcoco"},
    }
    (root / "mixture.json").write_text(json.dumps(entries))
    return config_of(debug_model, source="mixture", meta=str(root / "mixture.json"), validation_fraction=0.5)


KINDS = ("sa1b", "prepared masks", "jsonl", "prepared", "referring", "mixture")


@pytest.mark.parametrize("kind", KINDS)
def test_training_never_sees_a_held_out_image(tmp_path, debug_model, kind):
    config = make(kind, tmp_path, debug_model)
    assert sources.evaluated_on(config) == "eval"
    training, held_out = open_both(config)
    whole, _ = open_both(dataclasses.replace(config, data=dataclasses.replace(config.data, validation_fraction=0.0)))
    assert len(training) < len(whole) or kind == "mixture"
    seen = []
    for source in (training, held_out):
        records = []
        for index in range(len(source)):
            try:
                records.append(source[index])
            except ValueError as error:
                assert "no JSON" in str(error)
        seen.append(hashes_of(source))
        assert {image_hash(r["image_name"]) for r in records} == seen[-1]
        assert len(records) >= 2 and len(seen[-1]) >= 2
    assert not seen[0] & seen[1]
    assert seen[0] | seen[1] == hashes_of(whole)
    assert seen[1] == {number for number in seen[0] | seen[1] if number < 2**63}


def test_requests_for_masks_stay_on_their_side(tmp_path, debug_model):
    """Where a sample without a target is replaced by the next one, it is not by one of the other side."""
    config = make("referring", tmp_path, debug_model)
    shown = []
    for held_out in (False, True):
        source = sources.chat_source(config, held_out=held_out, adaptive_only=True)
        shown.append({source[i]["image_name"] for i in range(len(source))})
        assert all(len(source[i]["masks"]) == 1 for i in range(len(source)))
    assert shown[0] and shown[1] and not shown[0] & shown[1]


def test_prepared_sets_hold_out_what_the_raw_ones_do(tmp_path, debug_model):
    prepared, raw = make("prepared", tmp_path / "a", debug_model), make("jsonl", tmp_path / "b", debug_model)
    keys = [{r["key"] for r in open_both(config)[1]} for config in (prepared,)]
    source = open_both(raw)[1]
    assert keys[0] == {source[i]["key"] for i in range(len(source)) if source.image_hashes(i)}
    (tmp_path / "old").mkdir()
    shutil.copytree(prepared.data.root, tmp_path / "old", dirs_exist_ok=True)
    (tmp_path / "old" / "images.npy").unlink()
    old = dataclasses.replace(prepared, data=dataclasses.replace(prepared.data, root=str(tmp_path / "old")))
    with pytest.raises(ValueError, match="images.npy.*prepare it again"):
        open_both(old)
    assert len(Prepared(old.data.root)) > 0


def test_a_source_of_its_own(tmp_path, debug_model, capsys):
    meta, other = write_conversations(tmp_path / "a"), replicas.write_conversations(tmp_path / "b", 4)
    own = config_of(debug_model, source="jsonl", meta=meta, evaluation={"source": "jsonl", "meta": str(other)})
    training, held_out = open_both(own)
    assert (len(training), len(held_out)) == (12 + 3 * 7, 4)
    assert sources.evaluated_on(own) == "eval"
    assert sources.count_shared_images(own) == (
        3,
        3,
    )  # of the records that can be prompts; names as in the other folder
    same = {"source": "jsonl", "meta": str(tmp_path / "a" / ".." / "a" / "meta.json")}
    for fraction in (0.0, 0.5):
        again = config_of(debug_model, source="jsonl", meta=meta, evaluation=same, validation_fraction=fraction)
        assert sources.evaluated_on(again) == "eval_train"
    built = config_of(debug_model, source="jsonl", meta=meta, evaluation={"source": "scenes"})
    assert sources.evaluated_on(built) == "eval"
    assert len(open_both(built)[1]) == built.eval.num_samples
    replicas.write_refer(tmp_path, "refcoco", splits=("train", "val"))
    named = {"source": "referring", "root": str(tmp_path), "meta": "refcoco_val"}
    referring = config_of(debug_model, source="jsonl", meta=meta, evaluation=named)
    assert {r["key"].split("/")[1] for r in open_both(referring)[1]} == {"val"}
    with pytest.raises(ValueError, match="config.data.meta: expected some of refcoco, .*got 'refcoco_val'"):
        open_both(config_of(debug_model, **named))


def test_nothing_held_out_is_called_so(tmp_path, debug_model):
    meta = write_conversations(tmp_path)
    assert sources.evaluated_on(config_of(debug_model, source="jsonl", meta=meta)) == "eval_train"
    assert sources.evaluated_on(config_of(debug_model)) == "eval"  # the built-in data
    for content, expected in (({"weight": 1, "source": "scenes"}, "eval"),
                              ({"weight": 1, "source": "jsonl", "meta": "meta.json"}, "eval_train")):  # fmt: skip
        (tmp_path / "mixture.json").write_text(json.dumps({"part": content}))
        mixed = config_of(debug_model, source="mixture", meta=str(tmp_path / "mixture.json"))
        assert sources.evaluated_on(mixed) == expected


def test_a_side_without_images_is_an_error(tmp_path, debug_model):
    meta = write_conversations(tmp_path, 1)
    for fraction in (1e-6, 1 - 1e-6):
        config = config_of(debug_model, source="jsonl", meta=meta, validation_fraction=fraction)
        with pytest.raises(ValueError, match="config.data.validation_fraction: none of the"):
            open_both(config)


def test_wrong_values_name_their_fields(debug_model):
    with pytest.raises(ConfigError, match="validation_fraction: expected 0 with source 'scenes', got 0.1"):
        config_of(debug_model, validation_fraction=0.1)
    with pytest.raises(ConfigError, match="validation_fraction: expected at least 0 and below 1, got 1"):
        config_of(debug_model, source="jsonl", meta="m", validation_fraction=1)
    with pytest.raises(ConfigError, match="meta: expected the meta file .--config.eval.meta=FILE"):
        EvalConfig(source="jsonl")
    with pytest.raises(ConfigError, match="root: expected empty without eval.source, got 'x'"):
        EvalConfig(root="x")
