"""Batches: contents, determinism, exact resuming, slicing over hosts, and clear errors."""

import numpy as np
import pytest

from alto_jax.batch import ChatBatch, MaskBatch, PromptBatch, key_of
from alto_jax.data import pipeline
from alto_jax.data.examples import mask_example
from alto_jax.data.scenes import ChatConfig, SceneChats, ScenesConfig
from alto_jax.mllm import text
from alto_jax.parallel.shares import BatchShare

CHAT = dict(vision_size=28, image_size=32, mask_size=16, num_image_tokens=4, seed=0, system=None)


class Numbers:
    """MaskRecords whose image holds their index."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        mask = np.zeros((16, 16), np.uint8)
        mask[4:12, 4:12] = 255
        return {"key": f"n{index}", "image": np.full((16, 16, 3), index, np.uint8), "mask": mask}


def numbers(count=10, **options):
    options = {"image_size": 16, "mask_size": 8, "batch_size": 4, "seed": 1, **options}
    return iter(pipeline.mask_batches(Numbers(count), **options))


def read(iterator, count=None):
    batches = list(iterator) if count is None else [next(iterator) for _ in range(count)]
    return [batch.image[:, 0, 0, 0].tolist() for batch in batches]


@pytest.fixture(scope="module")
def tok():
    source = SceneChats(ScenesConfig(image_size=32, num_scenes=30))
    texts = [turn["value"] for record in source for turn in record["conversations"]]
    return text.TextTokenizer.train_builtin(texts, vocab_size=400, num_codes=16)


def chat_record(**changes):
    conversations = [
        {"from": "human", "value": "<image>\nSegment <ref>the apple</ref>."},
        {"from": "gpt", "value": text.answer(adaptive=False)},
    ]
    image, mask = np.full((20, 30, 3), 7, np.uint8), np.full((20, 30), 255, np.uint8)
    return {"key": "k1", "image": image, "masks": [mask], "conversations": conversations, **changes}


def test_mask_batch_contents():
    batch = next(numbers())
    assert isinstance(batch, MaskBatch)
    assert batch.image.shape == (4, 16, 16, 3) and batch.image.dtype == np.uint8
    assert batch.mask.shape == (4, 8, 8) and batch.mask.dtype == np.float32
    expected = np.zeros((8, 8))
    expected[2:6, 2:6] = 1
    np.testing.assert_array_equal(batch.mask[0], expected)


def test_every_record_once_an_epoch_in_another_order():
    batches = read(numbers(8), 4)
    first, second = sum(batches[:2], []), sum(batches[2:], [])
    assert sorted(first) == sorted(second) == list(range(8)) and first != second
    assert read(numbers(8), 4) == batches
    assert read(numbers(8, seed=2), 4) != batches


def test_evaluation_order_and_remainder():
    options = {"shuffle": False, "num_epochs": 1}
    assert read(numbers(10, **options)) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert read(numbers(10, drop_remainder=False, **options))[-1] == [8, 9]


@pytest.mark.parametrize("threads", [0, 3])
@pytest.mark.parametrize("taken", [0, 1, 5])
def test_iterator_resumes_exactly(threads, taken):
    whole = read(numbers(num_threads=threads), 12)
    iterator = numbers(num_threads=threads)
    read(iterator, taken)
    state = iterator.get_state()
    read(iterator, 3)
    resumed = numbers(num_threads=threads)
    resumed.set_state(state)
    assert read(resumed, 12 - taken) == whole[taken:]


def slices(process_count, state=None, **options):
    """One iterator a process, all at `state`."""
    shares = [BatchShare((p,), process_count, process_count) for p in range(process_count)]
    iterators = [numbers(share=share, **options) for share in shares]
    for iterator in iterators if state is not None else ():
        iterator.set_state(state)
    return iterators


def read_whole(iterators, count):
    """Global batches: the processes' slices one after the other."""
    return [sum((read(iterator, 1)[0] for iterator in iterators), []) for _ in range(count)]


@pytest.mark.parametrize("process_count", [2, 4])
def test_slices_of_the_processes_make_the_batches_of_one(process_count):
    whole = read(numbers(), 6)
    assert read_whole(slices(process_count), 6) == whole
    for epochs in (1, 3):  # 10 records: batches cross the epochs' ends, and the last records make no batch of 4
        options = {"num_epochs": epochs}
        parts = [read(iterator) for iterator in slices(process_count, **options)]
        assert [sum(rows, []) for rows in zip(*parts, strict=True)] == read(numbers(**options))


@pytest.mark.parametrize("threads", [0, 2])
def test_another_number_of_processes_goes_on_with_the_same_batches(threads):
    options = {"num_threads": threads}
    whole = read(numbers(**options), 8)
    for before, after in ((2, 1), (1, 4), (4, 2)):
        saved = slices(before, **options)
        assert read_whole(saved, 3) == whole[:3]
        state = saved[0].get_state()
        assert all(iterator.get_state() == state for iterator in saved)
        assert read_whole(slices(after, state, **options), 5) == whole[3:]


@pytest.mark.parametrize("epochs", [None, 3])
def test_rows_follow_the_devices(epochs):
    """Processes that share parts read the same rows, and the parts of a process need not follow each other."""
    whole = read(numbers(batch_size=8, num_epochs=epochs), 3)
    for parts in ((0, 1), (2, 3), (0, 2), (1, 3), (0, 1, 3), (0, 1, 2, 3)):
        own = numbers(batch_size=8, num_epochs=epochs, share=BatchShare(parts, 4, 4))
        rows = [row for part in parts for row in (2 * part, 2 * part + 1)]
        assert read(own, 3) == [[batch[row] for row in rows] for batch in whole]


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="batch_size: expected a multiple of the 3 parts.*4"):
        numbers(share=BatchShare((0,), 3, 3))
    with pytest.raises(ValueError, match="batch_size: 16 is more than"):
        numbers(10, batch_size=16, num_epochs=1)
    with pytest.raises(ValueError, match="drop_remainder.*2 processes"):
        numbers(share=BatchShare((0,), 2, 2), drop_remainder=False)
    with pytest.raises(ValueError, match="no record"):
        numbers(0)


def test_non_square_records_are_padded_and_small_masks_do_not_vanish():
    image, mask = np.full((40, 80, 3), 200, np.uint8), np.zeros((40, 80), np.uint8)
    mask[:, 10:11] = 255  # a line of one pixel, ten times finer than the target grid
    image, soft = mask_example({"key": "a", "image": image, "mask": mask}, 16, 8)
    assert (image[:7] > 190).all() and (image[9:] < 10).all()
    assert soft[:4].max() > 0.02 and soft[5:].max() == 0


def test_bad_records_are_bounded(caplog):
    class Flawed(Numbers):
        def __getitem__(self, index):
            if index in (2, 5):
                raise ValueError(f"record {index} is broken")
            return super().__getitem__(index)

    options = dict(image_size=16, mask_size=8, batch_size=5, seed=0, num_epochs=1, shuffle=False, num_threads=0)
    with pytest.raises(ValueError, match="record 2 is broken"):
        next(iter(pipeline.mask_batches(Flawed(10), **options)))
    with pytest.raises(ValueError, match="record 5 is broken"):
        list(pipeline.mask_batches(Flawed(10), max_bad_records=1, **options))
    batches = read(iter(pipeline.mask_batches(Flawed(10), max_bad_records=2, **options)))
    assert batches == [[0, 1, 3, 3, 4], [6, 6, 7, 8, 9]]
    assert "record 2 is broken" in caplog.text


def test_empty_mask_names_the_record():
    record = {"key": "here", "image": np.zeros((16, 16, 3), np.uint8), "mask": np.zeros((16, 16), np.uint8)}
    with pytest.raises(ValueError, match="record here: the mask is empty"):
        mask_example(record, 16, 8)


def test_chat_batches_of_scenes(tok):
    source = SceneChats(ScenesConfig(image_size=32, num_scenes=40), ChatConfig(question_fraction=0.4))
    options = {**CHAT, "batch_size": 8, "shuffle": False, "num_epochs": 1}
    batches = pipeline.chat_batches(source, tok, max_length=140, num_latent_tokens=5, max_masks=2, **options)
    kinds = set()
    for step, batch in enumerate(batches):
        assert isinstance(batch, ChatBatch)
        assert batch.image.shape == (8, 28, 28, 3) and batch.pixel_image.shape == (8, 32, 32, 3)
        assert batch.ids.dtype == batch.labels.dtype == np.int32
        for row in range(8):
            record, ids = source[step * 8 + row], batch.ids[row]
            assert batch.mask_valid[row].tolist() == [bool(record["masks"]), False]
            length = int(batch.text_mask[row].sum())
            assert (ids[length:] == tok.ids.pad).all() and (batch.labels[row, length:] == -100).all()
            assert (batch.labels[row][batch.labels[row] != -100] == ids[batch.labels[row] != -100]).all()
            codes = ids[(ids >= tok.ids.code_0) & (ids < tok.ids.code_0 + 16)] - tok.ids.code_0
            adaptive = "adaptive" in record["conversations"][0]["value"]
            assert codes.tolist() == ([int(adaptive)] * 5 if record["masks"] else [])
            assert ids[:length].tolist().count(tok.ids.img_context) == 4
            kinds.add((len(codes) > 0, adaptive))
            if record["masks"]:
                assert abs(batch.masks[row, 0].mean() - record["masks"][0].mean() / 255) < 0.01
            assert not batch.masks[row, 1].any()
    assert kinds == {(True, True), (True, False), (False, False)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"conversations": [{"from": "human", "value": "word " * 200}, {"from": "gpt", "value": "No"}]},
            "max_length",
        ),
        ({"masks": []}, "0 masks, but 1 mask placeholders"),
        ({"masks": [np.zeros((30, 20), np.uint8)]}, "the image is 30x20, but a mask is 20x30"),
        ({"image": np.zeros((1, 1, 3), np.uint8)}, "1x1"),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "<ALTo_Start>"}]},
            "do not match",
        ),
    ],
)
def test_bad_chat_records_are_named(tok, changes, message):
    batches = pipeline.chat_batches(
        [chat_record(**changes)], tok, max_length=60, num_latent_tokens=5, max_masks=1, batch_size=1, **CHAT
    )
    with pytest.raises(ValueError, match=f"record k1.*{message}"):
        next(iter(batches))


def test_two_masks_need_two_slots(tok):
    turns = chat_record()["conversations"]
    turns[1]["value"] += turns[1]["value"]
    record = chat_record(conversations=turns, masks=chat_record()["masks"] * 2)
    options = {**CHAT, "batch_size": 1, "max_length": 100, "num_latent_tokens": 5}
    batch = next(iter(pipeline.chat_batches([record], tok, max_masks=2, **options)))
    assert batch.mask_valid.tolist() == [[True, True]] and (batch.masks == 1).all()
    with pytest.raises(ValueError, match="record k1: 2 masks, but max_masks is 1"):
        next(iter(pipeline.chat_batches([record], tok, max_masks=1, **options)))


def prompts(source, tok, **changes):
    options = {**CHAT, "batch_size": 1, "max_prompt_length": 64, "shuffle": False, **changes}
    return iter(pipeline.prompt_batches(source, tok, **options))


def test_prompts_are_left_padded_in_the_seven_wordings(tok):
    seen = []
    iterator = prompts([chat_record()] * 7, tok, templates="all", answer_prefix=text.FORCED_ANSWER_PREFIX)
    for _ in range(7):
        batch = next(iterator)
        assert isinstance(batch, PromptBatch) and batch.mask.shape == (1, 16, 16) and (batch.mask == 1).all()
        length = int(batch.prompt_mask.sum())
        assert batch.prompt_mask[0, -length:].all() and (batch.prompt_ids[0, :-length] == tok.ids.pad).all()
        assert batch.prompt_ids[0, -1] == tok.ids.mask_start
        seen.append(tok.decode(batch.prompt_ids[0, -length:]))
    for words, template in zip(seen, text.ADAPTIVE_TEMPLATES, strict=True):
        assert template.replace("{}", "<ref>the apple</ref>") in words
    assert "Segment <ref>the apple</ref> by adaptive length." in tok.decode(
        next(prompts([chat_record()], tok)).prompt_ids[0]
    )
    kept = next(prompts([chat_record()], tok, templates="keep"))
    assert "Segment <ref>the apple</ref>.<|im_end|>" in tok.decode(kept.prompt_ids[0])


def test_prompts_say_which_records_they_are(tok):
    """A bad one is replaced by the one after it, which then stands there twice; kept examples name theirs too."""
    records = [
        chat_record(key=f"k{n}", conversations=[] if n == 1 else chat_record()["conversations"]) for n in range(3)
    ]
    for options in ({}, {"kept_bytes": 10**6}):
        iterator = prompts(records, tok, batch_size=3, are_named=True, max_bad_records=1, **options)
        for _ in range(2):
            batch = next(iterator)
            assert batch.record.dtype == np.int32 and batch.record.tolist() == [0, 2, 2]
            assert [key_of(row) for row in batch.key] == ["k0", "k2", "k2"]
    assert next(prompts([chat_record()], tok)).record is None


def test_bad_prompts_are_named(tok):
    no_reference = [{"from": "human", "value": "Segment it."}, {"from": "gpt", "value": "x"}]
    for changes, options, message in (
        ({"conversations": no_reference}, {}, "no <ref> or <box>"),
        ({"masks": []}, {}, "expected one mask, got 0"),
        ({}, {"max_prompt_length": 8}, "max_prompt_length is 8"),
    ):
        with pytest.raises(ValueError, match=f"record k1: .*{message}"):
            next(prompts([chat_record(**changes)], tok, **options))
    with pytest.raises(ValueError, match="templates.*'some'"):
        prompts([chat_record()], tok, templates="some")
