"""Multi-Target-SA1B as conversations: boxes that are asked for are those of the targets; validation stays apart."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from alto_jax.config import ConfigError
from alto_jax.data import benchmarks, images, prepare, rle, sources
from alto_jax.data.chat_examples import chat_example
from alto_jax.data.jobs import open_source
from alto_jax.data.prepared import Prepared
from alto_jax.data.sa1b import Sa1bMasks
from alto_jax.data.sa1b_chats import Sa1bChats, Sa1bTargets, validation_targets
from alto_jax.data.sa1b_folder import VALIDATION
from alto_jax.data.scenes import Scenes, ScenesConfig
from alto_jax.data.split import ImageSplit, image_hash
from alto_jax.mllm import boxes, text
from alto_jax.mllm.text import TextTokenizer
from tests.data import replicas
from tests.data.test_readers import write_sa1b


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    replicas.write_sa1b(root / "sa1b", ids=(0, 1, 2, 3, *replicas.SA1B_VALIDATION))
    return root / "sa1b"


def box_of(mask) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1] + 1 - columns[0]), int(rows[-1] + 1 - rows[0])


def masks_of(file) -> list:
    content = json.loads(file.read_text())
    size = content["image"]["height"], content["image"]["width"]
    return [rle.decode(a["segmentation"], *size, "") for a in content["annotations"]]


@pytest.mark.parametrize("seed", range(3))
def test_boxes_of_the_request_are_those_of_the_targets_in_the_mask(tmp_path, monkeypatch, seed):
    """Random scenes of many objects, most of them overlapping: the mask is the union of what the boxes name."""
    config = ScenesConfig(image_size=(48, 80), num_scenes=5, seed=seed, max_objects=9, min_size=0.15)
    monkeypatch.setattr(replicas, "scenes", lambda count: [Scenes(config)[i] for i in range(count)])
    replicas.write_sa1b(tmp_path, 5)
    for file in tmp_path.glob("*.json"):
        content = json.loads(file.read_text())
        content["image"] |= {"height": 48, "width": 80}
        file.write_text(json.dumps(content))
    source, counts = Sa1bTargets(tmp_path, seed=seed), []
    for index, epoch in itertools.product(range(5), range(4)):
        record = source.at_epoch(index, epoch)
        known: dict[str, list] = {}
        for mask in masks_of(tmp_path / record["key"].partition("#")[0]):
            known.setdefault(boxes.format_boxes([box_of(mask)], mask.shape), []).append(mask)
        asked = boxes.parse_boxes(record["phrase"])
        texts = [f"<box>[[{','.join(str(round(1000 * c)) for c in box)}]]</box>" for box in asked]
        assert len(set(texts)) == len(texts) and all(len(known[t]) == 1 for t in texts)
        union = np.any([known[t][0] for t in texts], axis=0)
        np.testing.assert_array_equal(record["mask"], union * np.uint8(255))
        counts.append(len(texts))
    assert min(counts) == 1 and max(counts) >= 3


def test_two_epochs_draw_other_unions_and_wordings(folder):
    chats = Sa1bChats(Sa1bTargets(folder, seed=1), seed=1)
    epochs = [[chats.at_epoch(i, e) for i in range(len(chats))] for e in range(12)]
    said = [[record["conversations"][0]["value"] for record in epoch] for epoch in epochs]
    assert len({tuple(one) for one in said}) == len(said)
    assert any(
        not np.array_equal(a["masks"][0], b["masks"][0])
        for one, two in itertools.pairwise(epochs)
        for a, b in zip(one, two)
    )
    again = Sa1bChats(Sa1bTargets(folder, seed=1), seed=1)
    assert [again.at_epoch(i, 7)["conversations"][0]["value"] for i in reversed(range(4))] == said[7][::-1]
    flat = [question for one in said for question in one]
    adaptive = sum("by adaptive length" in question for question in flat)
    assert 0.3 < adaptive / len(flat) < 0.7
    wordings = {template.partition("{}")[0] for template in text.ADAPTIVE_TEMPLATES}
    assert len({w for w in wordings for q in flat if q.startswith(f"<image>\n{w}<box>") and "adaptive" in q}) >= 4
    for record in epochs[0]:
        kind = "<TOK_1>" if "by adaptive length" in record["conversations"][0]["value"] else "<TOK_0>"
        assert record["conversations"][1]["value"].count(kind) == 32


def test_training_never_reads_the_validation_list(folder, tmp_path):
    names = {f"sa_{i}" for i in replicas.SA1B_VALIDATION}
    assert all(ImageSplit(VALIDATION, True).has((image_hash(name),), "") for name in names)
    validation = validation_targets(folder)
    assert {record["image_name"] for record in validation} == {record["key"] for record in validation} == names
    training = (Sa1bMasks(folder), Sa1bTargets(folder), Sa1bChats(Sa1bTargets(folder, draws_per_image=2)))
    for source in training:
        seen = {source.at_epoch(i, e)["image_name"] for i in range(len(source)) for e in range(3)}
        assert seen == {"sa_0", "sa_1", "sa_2", "sa_3"}
        assert not {h for i in range(len(source)) for h in source.image_hashes(i)} & set(map(image_hash, names))
    replicas.write_sa1b(tmp_path / "only", ids=replicas.SA1B_VALIDATION)
    with pytest.raises(ValueError, match="only: all of its images are on the validation list"):
        Sa1bTargets(tmp_path / "only")
    replicas.write_sa1b(tmp_path / "none", 2)
    with pytest.raises(ValueError, match="none of its images is on the validation list, which has 0.2% of them"):
        benchmarks.open_benchmark("multi_target_sa1b_val", tmp_path / "none")


def test_validation_is_the_same_whatever_else_is_there(folder, tmp_path):
    few = tmp_path / "sa_000000"
    replicas.write_sa1b(few, ids=(0, 1, 2, 3, *replicas.SA1B_VALIDATION))
    for number in (0, 1, 2, replicas.SA1B_VALIDATION[0]):
        (few / f"sa_{number}.json").unlink()
    whole, part = (benchmarks.open_benchmark("multi_target_sa1b_val", root) for root in (folder.parent, tmp_path))
    (same,) = (record for record in whole if record["image_name"] == part[0]["image_name"])
    assert len(part) == 1 and same["phrase"] == part[0]["phrase"] and same["key"] == part[0]["key"]
    np.testing.assert_array_equal(same["mask"], part[0]["mask"])
    assert whole.at_epoch(0, 5)["phrase"] == whole[0]["phrase"]


def test_an_image_without_large_annotations_is_told(tmp_path):
    small, none = replicas.SA1B_VALIDATION
    write_sa1b(tmp_path, small, [(5, 6, 2, 2), (0, 0, 3, 4)])
    write_sa1b(tmp_path, none, [])
    write_sa1b(tmp_path, 1, [(0, 0, 3, 3)])
    write_sa1b(tmp_path, 2, [(10, 20, 30, 30)])
    source = Sa1bTargets(tmp_path)
    with images.noting() as noted:
        assert {record["image_name"] for record in source} == {"sa_2"}
    assert (str(tmp_path / "sa_1.json"), "no annotation is large enough, another image takes its place") in noted
    validation = {
        record: error for record, error in map(read_or_error, itertools.repeat(validation_targets(tmp_path)), (0, 1))
    }
    assert validation == {f"sa_{small}: <box>[[0,0,33,67]]</box>": "", "": "field annotations: the image has none"}


def read_or_error(source, index: int) -> tuple[str, str]:
    try:
        return f"{source[index]['image_name']}: {source[index]['phrase']}", ""
    except ValueError as error:
        return "", str(error).partition(".json: ")[2]


def test_errors_name_file_and_field(tmp_path):
    with pytest.raises(ValueError, match="max_targets: expected at least 1, got 0"):
        Sa1bTargets(tmp_path, max_targets=0)
    write_sa1b(tmp_path, 2, [(10, 20, 30, 30)])
    content = json.loads((tmp_path / "sa_2.json").read_text())
    content["annotations"][0]["segmentation"]["counts"] = [60 * 90]
    (tmp_path / "sa_2.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"sa_2.json: annotations\[0\].segmentation is an empty mask"):
        Sa1bTargets(tmp_path)[0]
    assert len(Sa1bChats(Sa1bTargets(tmp_path)).problems(0)) == 1


def test_most_targets_are_bounded(folder):
    source = Sa1bTargets(folder, max_targets=1)
    assert all(len(boxes.parse_boxes(source.at_epoch(i, e)["phrase"])) == 1 for i in range(4) for e in range(5))


def config_of(debug_model, **data):
    changed = dataclasses.replace(debug_model.config.data, max_length=260, max_targets=3, **data)
    evaluation = dataclasses.replace(debug_model.config.eval, num_samples=2)
    return dataclasses.replace(debug_model.config, data=changed, eval=evaluation)


def test_stages_2_and_3_read_it_and_hold_out_the_list(folder, debug_model):
    config = config_of(debug_model, source="sa1b_chats", root=str(folder), validation_fraction=VALIDATION)
    assert sources.evaluated_on(config) == "eval" and sources.count_shared_images(config) == (0, 2)
    tok = TextTokenizer.load(debug_model.path)
    first = next(sources.chat_iterator(config, tok))
    assert first.mask_valid.all() and (first.masks.max((1, 2, 3)) > 0.5).all()
    prompts = sources.chat_source(dataclasses.replace(config, stage="stage3"), adaptive_only=True)
    assert all("by adaptive length" in record["conversations"][0]["value"] for record in prompts)
    (batch,) = sources.held_out_prompts(dataclasses.replace(config, stage="stage3"), tok)
    assert len(batch.prompt_ids) == 2
    with pytest.raises(ValueError, match="stage0 reads .* with masks, 'sa1b_chats'; got 'sa1b_chats'"):
        sft = dataclasses.replace(config.sft, mask_loss_weight=0.0)
        sources.chat_source(dataclasses.replace(config, stage="stage0", sft=sft))
    with pytest.raises(ConfigError, match="root: expected the SA-1B folder"):
        config_of(debug_model, source="sa1b_chats")
    texts = [turn for turns in itertools.islice(sources.chat_source(config).texts(), 8) for turn in turns]
    assert any(turn.startswith("Segment <box>[[") for turn in texts)


def test_a_mixture_resumes_exactly_within_it(folder, debug_model, tmp_path):
    replicas.write_refer(tmp_path, splits=("train",), count=3)
    entries = {
        "boxes": {"weight": 2, "source": "sa1b_chats", "root": str(folder)},
        "words": {"weight": 1, "source": "referring", "root": ".", "meta": "refcoco"},
    }
    (tmp_path / "mixture.json").write_text(json.dumps(entries))
    config = config_of(debug_model, source="mixture", meta=str(tmp_path / "mixture.json"))
    tok = TextTokenizer.load(debug_model.path)
    batches = sources.chat_iterator(config, tok)
    seen = []
    for _ in range(9):
        state = batches.get_state()
        seen.append((state, next(batches)))
    for state, wanted in seen[::4]:
        again = sources.chat_iterator(config, tok)
        again.set_state(state)
        found = next(again)
        for name in ("ids", "labels", "image", "masks"):
            np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))


def test_prepared_records_are_those_of_the_folder(folder, tmp_path):
    sizes = dict.fromkeys(("vision_size", "image_size", "mask_size"), 0)
    for name in ("sa1b_chats", "multi_target_sa1b_val"):
        root = folder if name == "sa1b_chats" else folder.parent
        found, kind, raw = open_source(name, root, seed=1, protocol="joined", images=None, draws=2, num=0)
        job = prepare.Job(found, kind, raw, sizes, "png", 4, 1)
        stored = Prepared(prepare.prepare(job, tmp_path, max_bad_fraction=0))
        assert len(stored) == len(raw) == (8 if name == "sa1b_chats" else 2)
        for record, wanted in zip(stored, raw, strict=True):
            assert record.keys() == wanted.keys() and record["key"] == wanted["key"]
            for field in {"masks", "mask", "phrase", "conversations", "image"} & wanted.keys():
                assert np.array_equal(record[field], wanted[field]), field
        if name == "sa1b_chats":
            assert stored.num_prompts().tolist() == [1] * 8
        else:
            opened = benchmarks.open_benchmark(name, stored.directory)
            assert [record["phrase"] for record in opened] == [record["phrase"] for record in raw]


def test_an_example_has_the_mask_of_its_boxes(folder, debug_model):
    tok, record = TextTokenizer.load(debug_model.path), Sa1bChats(Sa1bTargets(folder, max_targets=2))[0]
    example = chat_example(record, tok, vision_size=56, image_size=64, mask_size=32, max_length=300, num_image_tokens=4,
                           num_latent_tokens=8, max_masks=1, system=None)  # fmt: skip
    (mask,) = example["masks"]
    x1, y1, x2, y2 = np.array(boxes.parse_boxes(record["conversations"][0]["value"])).T
    ys, xs = np.nonzero(mask > 0.5)
    inside = [
        ((x1 - 0.06 <= x / 32) & (x / 32 <= x2 + 0.06) & (y1 - 0.06 <= y / 32) & (y / 32 <= y2 + 0.06)).any()
        for y, x in zip(ys, xs)
    ]
    assert len(inside) and all(inside)
