"""Tiles and several images: cut as the reference cuts them, in few shapes, in the order of their tokens."""

import json

import numpy as np
from PIL import Image
import pytest

from alto_jax import experiment, main
from alto_jax.data import pipeline, sources, tiles
from alto_jax.data.conversations import Conversations
from alto_jax.data.split import EmptySplit, ImageSplit, image_hash
from alto_jax.mllm import text
from alto_jax.parallel.shares import BatchShare
from tests.conftest import ROOT
from tests.data.test_transforms import GRIDS
from tests.golden_io import golden

SIZES = dict(vision_size=28, image_size=32, mask_size=16, num_image_tokens=4, num_latent_tokens=8, max_masks=1,
             system=None, batch_size=2, seed=0, num_threads=0)  # fmt: skip
SAID = {"from": "gpt", "value": "Yes."}


def human(words: str) -> dict[str, str]:
    return {"from": "human", "value": words}


def test_tiles_are_those_of_the_reference():
    arrays = golden("mllm_preprocess")
    (found,) = tiles.cut([arrays["image"]], 4, 28)
    np.testing.assert_array_equal(found, arrays["dyn_tiles"])  # a thumbnail last
    for case, (_, count) in GRIDS.items():
        most, size, thumbnail = case.split("_")
        if thumbnail == "thumb1" and most in ("max4", "max12"):
            width, height = map(int, size.split("x"))
            (found,) = tiles.cut([np.zeros((height, width, 3), np.uint8)], int(most.removeprefix("max")), 448)
            assert found.shape == (count, 448, 448, 3), case


def test_several_images_share_the_tiles():
    wide, square = np.zeros((28, 280, 3), np.uint8), np.zeros((280, 280, 3), np.uint8)
    numbers = lambda images, most: [len(part) for part in tiles.cut(images, most, 28)]
    assert numbers([wide], 12) == [11] and numbers([wide, square], 12) == [7, 5] and numbers([wide] * 5, 4) == [1] * 5
    for most in (1, 2, 5, 12):
        for count in (1, 2, 3, 7):
            made = max(sum(numbers([image] * n, most)) for image in (wide, square) for n in range(1, count + 1))
            assert made <= tiles.most_slots(most, count)
    assert tiles.most_slots(12) == 13 and tiles.most_slots(1, 3) == 3 and tiles.most_slots(12, 2) == 14
    assert tiles.slot_counts(13) == [1, 2, 4, 7, 13] and tiles.slots_for([1, 5], 13) == 7


@pytest.mark.parametrize("mark", ["<ref>the cat</ref>", "<box>[[1,2,3,4]]</box>"])
def test_the_number_of_tiles_does_not_tell_whether_there_is_a_mask(mark):
    ask = [human(f"Segment {mark} by adaptive length.")]
    with_mask, without = [*ask, {"from": "gpt", "value": text.answer(adaptive=True)}], [*ask, SAID]
    assert not tiles.has_tiles(with_mask, 1) and not tiles.has_tiles(without, 0)
    assert tiles.has_tiles([human("How many cats?"), SAID], 0)
    # A mask without a reference in the request, and an earlier one.
    assert not tiles.has_tiles([human("Segment it."), with_mask[1]], 1)


RECORDS = [
    {"image": ["a.png", "b.png"], "conversations": [human("<image>\nSo?"), SAID, human("And <image>?"), SAID]},
    {"image": "a.png", "conversations": [human("Wide?"), SAID]},
    {"image": "b.png", "mask": "m.png", "conversations": [human("Segment <ref>it</ref>."),
                                                          {"from": "gpt", "value": text.answer(adaptive=True)}]},
    {"conversations": [human("Why?"), SAID]},
]  # fmt: skip


def write(folder, records=RECORDS):
    """A meta file of the records; a.png is three times as wide as high."""
    rng = np.random.default_rng(0)
    for name, shape in (("a", (30, 90)), ("b", (40, 40))):
        Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    mask = np.zeros((40, 40), np.uint8)
    mask[9:30, 9:30] = 255
    Image.fromarray(mask).save(folder / "m.png")
    (folder / "chat.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "meta.json").write_text(json.dumps({"set": {"root": ".", "annotation": "chat.jsonl"}}))
    return folder / "meta.json"


def batches(source, tok, **options):
    return pipeline.chat_batches(source, tok, **{**SIZES, "max_length": 200, **options})


def test_rows_hold_the_tiles_in_the_order_of_their_tokens(tmp_path, debug_model):
    tok = text.TextTokenizer.load(debug_model.path)
    source = Conversations(write(tmp_path), max_images=2)
    one, two = batches(source, tok, max_tiles=3, max_images=2, num_epochs=1, shuffle=False)
    assert [len(batch.image[0]) for batch in (one, two)] == [4, 1]  # slots of 1, 2, 4; never more than are needed
    raw = [np.asarray(Image.open(tmp_path / f"{name}.png")) for name in "ab"]
    for row, shown, each in ((one.image[0], raw, 1), (one.image[1], raw[:1], 3), (two.image[0], raw[1:], 1)):
        expected = np.concatenate(tiles.cut(shown, each, 28))
        np.testing.assert_array_equal(row[: len(expected)], expected)
        assert not row[len(expected) :].any()
    assert not two.image[1].any() and two.mask_valid.tolist() == [[True], [False]]
    assert two.pixel_image[0].any() and not one.pixel_image.any()  # for masks alone
    counts = [(batch.ids == tok.ids.img_context).sum(1).tolist() for batch in (one, two)]
    assert counts == [[8, 16], [4, 0]] and (one.ids == tok.ids.img).sum(1).tolist() == [2, 1]
    # The same text otherwise: without tiles the wide image has one.
    plain = next(iter(batches(Conversations(write(tmp_path, RECORDS[1:3])), tok, num_epochs=1, shuffle=False)))
    keep = lambda ids: ids[(ids != tok.ids.img_context) & (ids != tok.ids.pad)].tolist()
    assert plain.image.ndim == 4 and keep(plain.ids[0]) == keep(one.ids[1])
    np.testing.assert_array_equal(plain.image[1], two.image[0, 0])


def test_the_stream_goes_on_exactly_and_processes_agree_on_its_shape(tmp_path, debug_model):
    tok = text.TextTokenizer.load(debug_model.path)
    made = lambda **options: iter(batches(Conversations(write(tmp_path), max_images=2), tok, max_tiles=3, max_images=2,
                                          **options))  # fmt: skip
    whole = made()
    expected, state = [], None
    for number in range(6):
        state = whole.get_state() if number == 3 else state
        expected.append(next(whole))
    resumed = made()
    resumed.set_state(state)
    for batch in expected[3:]:
        again = next(resumed)
        np.testing.assert_array_equal(batch.image, again.image)
        np.testing.assert_array_equal(batch.ids, again.ids)
    # Each process sees other rows; all of them have as many slots as there may be.
    halves = [made(share=BatchShare(parts=(p,), num_parts=2, num_processes=2)) for p in range(2)]
    for batch in expected[:3]:
        rows = [next(half) for half in halves]
        assert [row.image.shape[:2] for row in rows] == [(1, 4)] * 2
        for place, row in enumerate(rows):
            number = batch.image.shape[1]
            np.testing.assert_array_equal(row.image[0, :number], batch.image[place])
            assert not row.image[0, number:].any()


def test_images_and_image_tokens_must_match(tmp_path, debug_model):
    tok = text.TextTokenizer.load(debug_model.path)
    two = lambda words: [human(words), SAID]
    ids, _ = text.render_conversation(tok, two("Which?"), [4, 8], system=None)
    assert tok.decode(ids).count("Image-1: <img>") == 1 and "Image-2: <img>" + "<IMG_CONTEXT>" * 8 in tok.decode(ids)
    for words, message in (("<image> Which?", "one <image> for each of the 2 images, got 1"),
                           ("<image><image><image>", "each of the 2 images, got 3")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            text.render_conversation(tok, two(words), [4, 8], system=None)
    with pytest.raises(ValueError, match="expected a question as the last turn"):
        text.render_prompt(tok, two("Which?"), 4)
    source = Conversations(write(tmp_path), max_images=2)
    with pytest.raises(ValueError, match="record set/chat.jsonl:1: 2 images, but max_images is 1"):
        next(iter(batches(source, tok, max_tiles=2, shuffle=False)))
    with pytest.raises(ValueError, match="expected 1 with pack_samples 2, got .*'max_tiles': 3"):
        batches(source, tok, max_tiles=3, pack_samples=2)


def test_a_record_is_where_all_of_its_images_are(tmp_path):
    fraction = (min(map(image_hash, "ab")) + 2**40) / 2**64  # between the two
    (inside,) = [name for name in "ab" if image_hash(name) / 2**64 < fraction]
    source = Conversations(write(tmp_path, RECORDS[:3]), max_images=2)
    assert [len(source.image_hashes(i)) for i in range(3)] == [2, 1, 1] and "images" in source[0]
    sides = [source.part(ImageSplit(fraction, held_out)) for held_out in (False, True)]
    names = [[side[i]["image_name"] for i in range(len(side))] for side in sides]
    assert names == [[name] for name in ("b" if inside == "a" else "a", inside)]
    with pytest.raises(EmptySplit):
        Conversations(write(tmp_path, RECORDS[:1]), max_images=2).part(ImageSplit(fraction, True))


def test_more_images_than_the_run_takes_are_named_when_opened(tmp_path, caplog):
    meta = write(tmp_path)
    assert len(Conversations(meta, max_images=2)) == 4 and len(Conversations(meta)) == 3
    assert "1 of 4 records are passed over, as they have more images than config.data.max_images=1" in caplog.text
    with pytest.raises(ValueError, match="none of its records can be used: they have more than .* data.max_images"):
        Conversations(write(tmp_path, RECORDS[:1]))


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("stage3", {"max_tiles": 2}, r"data\.max_tiles: expected 1 in stage3, got 2"),
        (
            "stage2",
            {"max_tiles": 12, "max_length": 50},
            r"data\.max_length: .*more than the 52 image tokens of 13 tiles",
        ),
        ("stage2", {"max_images": 2, "pack_samples": 2}, r"max_images: expected 1 with pack_samples 2, as packed rows"),
        ("stage2", {"max_tiles": 0}, r"max_tiles: expected at least 1, got 0"),
    ],
)
def test_what_does_not_go_together_is_one_error(stage, changes, message):
    config = main.load_config(str(ROOT / f"configs/{stage}.py:debug"))
    config.data.update(changes)
    with pytest.raises(ValueError, match=message):
        experiment.make_experiment(config)


def test_prepared_sets_have_no_tiles(tmp_path):
    config = main.load_config(str(ROOT / "configs/stage2.py:debug"))
    config.data.update({"source": "prepared", "root": str(tmp_path), "max_tiles": 2})
    with pytest.raises(ValueError, match=r"config\.data\.source: prepared sets hold one image of one tile a record"):
        sources.chat_source(experiment.make_experiment(config))
