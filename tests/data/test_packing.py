"""Packed rows: the layout rule, what rows hold, and the same batches on any number of processes and after resuming."""

import itertools

import numpy as np
import pytest

from alto_jax.data import chat_examples, packing, pipeline
from alto_jax.data.scenes import SceneChats, ScenesConfig
from alto_jax.mllm import text
from alto_jax.parallel.shares import BatchShare

OPTIONS = dict(vision_size=28, image_size=32, mask_size=16, num_image_tokens=4, num_latent_tokens=5, max_masks=2,
               seed=0, system=None, max_length=200, batch_size=4)  # fmt: skip

NAMES = ("image", "pixel_image", "ids", "labels", "text_mask", "segment_ids", "masks", "mask_valid", "mask_image")


class Texts:
    """ChatRecords of growing length; record i shows i + 1 and has i mod 3 masks; read as a whole only."""

    def __init__(self, count=12, bad=()):
        self.count, self.bad, self.read = count, bad, []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.read.append(index)
        if index in self.bad:
            raise ValueError(f"record {index}: the image cannot be read")
        masks = [np.full((20, 30), 255, np.uint8)] * (index % 3)
        turns = [{"from": "human", "value": f"word {'word ' * index}"}]
        turns += [{"from": "gpt", "value": "Yes " + text.answer(adaptive=index % 2 == 0) * (index % 3)}]
        return {"key": f"r{index}", "image": np.full((20, 30, 3), index + 1, np.uint8), "masks": masks,
                "conversations": turns}  # fmt: skip


class Readable(Texts):
    """With texts that are read without images."""

    def conversation(self, index):
        return {name: Texts(self.count)[index][name] for name in ("key", "conversations")}


@pytest.fixture(scope="module")
def tok():
    source = SceneChats(ScenesConfig(image_size=32, num_scenes=30))
    texts = [turn["value"] for record in source for turn in record["conversations"]]
    return text.TextTokenizer.train_builtin(texts, vocab_size=400, num_codes=16)


def packed(source, tok, **options):
    return iter(pipeline.chat_batches(source, tok, **{**OPTIONS, "pack_samples": 3, **options}))


def shown(batch):
    """The records of each row, by their image."""
    return [[int(i) - 1 for i in row[:, 0, 0, 0] if i] for row in batch.image]


def test_layout_is_first_fit_in_the_order_of_the_stream():
    lengths = [5, 4, None, 3, 6, 2, 1, 9, 7, 1, 4]
    shape = {"num_rows": 2, "max_length": 10, "max_segments": 3}
    assert packing.fill_rows(lengths.__getitem__, 0, **shape) == ([[0, 1], [3, 4]], 5)
    assert packing.fill_rows(lengths.__getitem__, 5, **shape) == ([[5, 6, 8], [7, 9]], 10)
    assert packing.fill_rows(lambda _: 1, 7, **shape) == ([[7, 8, 9], [10, 11, 12]], 13)


@pytest.mark.parametrize("kind", [Texts, Readable])
def test_rows_hold_the_conversations_of_the_stream(tok, kind):
    """Every conversation once an epoch, with its own text, labels, image and masks; the rest is padding."""
    source, seen = kind(), []
    plain = {name: value for name, value in OPTIONS.items() if name not in ("seed", "batch_size")}
    rows = [row for batch in itertools.islice(packed(source, tok), 4) for row in zip(*vars_of(batch))]
    for row in rows:
        row = dict(zip(NAMES, row))
        token = mask = 0
        for number, index in enumerate(i for i in row["image"][:, 0, 0, 0].astype(int) - 1 if i >= 0):
            wanted = chat_examples.chat_example(source[index], tok, **plain)
            length, num_masks = int(wanted["text_mask"].sum()), int(wanted["mask_valid"].sum())
            at, of = slice(token, token + length), slice(mask, mask + num_masks)
            for name in ("ids", "labels"):
                np.testing.assert_array_equal(row[name][at], wanted[name][:length])
            assert (row["segment_ids"][at] == number + 1).all() and row["text_mask"][at].all()
            np.testing.assert_array_equal(row["pixel_image"][number], wanted["pixel_image"])
            np.testing.assert_array_equal(row["masks"][of], wanted["masks"][:num_masks])
            assert (row["mask_image"][of] == number).all()
            token, mask = token + length, mask + num_masks
            seen.append(index)
        assert row["mask_valid"].tolist() == [True] * mask + [False] * (6 - mask)
        assert not row["text_mask"][token:].any() and not row["segment_ids"][token:].any()
        assert (row["ids"][token:] == tok.ids.pad).all() and (row["labels"][token:] == text.IGNORE).all()
    unpacked = iter(pipeline.chat_batches(source, tok, **OPTIONS))
    stream = [int(i) - 1 for batch in itertools.islice(unpacked, 12) for i in batch.image[:, 0, 0, 0]]
    assert sorted(seen) == sorted(stream[: len(seen)]) and len(rows) == 16 and len(seen) > 24


def vars_of(batch):
    return [getattr(batch, name) for name in NAMES]


def assert_equal(one, two):
    for name in NAMES:
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name), err_msg=name)


@pytest.mark.parametrize(("kind", "threads"), [(Texts, 0), (Readable, 2)])
def test_processes_and_resuming_give_the_same_batches(tok, kind, threads):
    """One record is bad; where texts are read alone that shows only in the process that reads its image."""
    options = {"num_threads": threads, "max_bad_records": 1}
    source = lambda: kind(bad=(5,))
    whole = list(itertools.islice(packed(source(), tok, **options), 6))
    assert all(5 not in row for batch in whole for row in shown(batch))
    state = None
    for count, steps in ((2, range(2)), (4, range(2, 4)), (1, range(4, 5)), (4, range(5, 6))):
        parts = [packed(source(), tok, **options, share=BatchShare((p,), count, count)) for p in range(count)]
        for part in parts:
            if state is not None:
                part.set_state(state)
        for step in steps:
            found = [next(part) for part in parts]
            joined = type(whole[0])(**{name: np.concatenate([getattr(f, name) for f in found]) for name in NAMES})
            assert_equal(joined, whole[step])
        state = parts[-1].get_state()
        assert all(part.get_state() == state for part in parts)
        for part in parts:
            part.close()


def test_processes_read_only_the_images_of_their_rows(tok):
    source = Readable(40)
    iterator = packed(source, tok, num_threads=0, share=BatchShare((1,), 2, 2))
    batch = next(iterator)
    blank = 1  # read once, for the shapes
    assert len(source.read) - blank == sum(len(row) for row in shown(batch))


def test_wrong_options_are_refused(tok):
    with pytest.raises(ValueError, match="batch_size: expected a multiple of the 3 parts.*4"):
        packed(Texts(), tok, share=BatchShare((0,), 3, 3))
    with pytest.raises(ValueError, match="length_buckets.*pack_samples 3"):
        packed(Texts(), tok, length_buckets=(60,))
    with pytest.raises(ValueError, match="record r.*: .*max_length is 40"):
        list(itertools.islice(packed(Texts(), tok, max_length=40, num_threads=0), 9))


def test_sources_give_texts_without_images(tmp_path):
    """Conversations, prepared conversations and a mixture of both: the texts of each record."""
    from alto_jax.data import prepare
    from alto_jax.data.conversations import Conversations
    from alto_jax.data.mixture import Mixture
    from alto_jax.data.prepared import Prepared
    from tests.data import replicas

    raw = Conversations(replicas.write_conversations(tmp_path / "raw", 4))
    sizes = dict.fromkeys(("vision_size", "image_size", "mask_size"), 0)
    job = prepare.Job("conversations", "chat", raw, sizes, "png", 8, 0)
    stored = Prepared(prepare.prepare(job, tmp_path / "prepared", max_bad_fraction=0))
    mixed = Mixture({"raw": (raw, 1.0), "stored": (stored, 2.0)})
    for source in (raw, stored, mixed):
        texts = [record["conversations"] for record in source]
        assert len(texts) > 3 and texts == [source.conversation(i)["conversations"] for i in range(len(source))]
    assert not hasattr(Mixture({"raw": (raw, 1.0), "whole": (Texts(), 1.0)}), "conversation")
    for file in tmp_path.glob("raw/**/*.jpg"):
        file.unlink()
    assert raw.conversation(1)["conversations"] == stored[1]["conversations"]
    with pytest.raises(ValueError, match="jpg"):
        raw[1]
