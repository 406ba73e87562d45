"""What is drawn for a record is drawn anew in every epoch, a function of (seed, epoch, index) and nothing else."""

import itertools

import numpy as np
import pytest

from alto_jax.data import examples, pipeline, refcoco
from alto_jax.data.conversations import Conversations
from alto_jax.data.mixture import Mixture
from alto_jax.data.sa1b import Sa1bMasks
from alto_jax.mllm import text
from alto_jax.mllm.text import TextTokenizer
from alto_jax.parallel.shares import BatchShare
from tests.data import replicas
from tests.data.test_readers import BOXES, write_sa1b

EPOCHS = 6


def same(one, other) -> bool:
    return (
        one.keys() == other.keys()
        and all(np.array_equal(one[name], other[name]) for name in one if name not in ("masks", "conversations"))
        and str(one.get("conversations")) == str(other.get("conversations"))
    )


@pytest.fixture
def sa1b(tmp_path):
    for number in range(1, 6):
        write_sa1b(tmp_path / f"sa_{number:06d}", number, BOXES)
    return tmp_path


class Phrases:
    """ReferringRecords of one image; one in three has no target."""

    no_target = True

    def __len__(self):
        return 9

    def __getitem__(self, index):
        mask = np.full((8, 8), 255 * (index % 3 != 0), np.uint8)
        return {"key": str(index), "image": np.zeros((8, 8, 3), np.uint8), "mask": mask, "phrase": f"thing {index}"}


def augmented(tmp_path):
    meta = replicas.write_conversations(tmp_path / "chat", 4)
    meta.write_text(meta.read_text().replace('"data_augment": false', '"data_augment": true'))
    assert '"data_augment": true' in meta.read_text()
    return Conversations(meta, seed=2)


def drawn(tmp_path, kind):
    if kind == "sa1b":
        for number in range(1, 6):
            write_sa1b(tmp_path / "sa1b", number, BOXES)
        return Sa1bMasks(tmp_path / "sa1b", seed=2)
    if kind == "referring":
        return refcoco.ReferringChats(Phrases(), seed=2)
    if kind == "jpeg":
        return augmented(tmp_path)
    return Mixture({"a": (drawn(tmp_path, "referring"), 1.0), "b": (refcoco.ReferringChats(Phrases(), seed=3), 0.3)})


@pytest.mark.parametrize("kind", ["sa1b", "referring", "jpeg", "mixture"])
def test_every_epoch_draws_anew(tmp_path, kind):
    source, again = drawn(tmp_path, kind), drawn(tmp_path, kind)
    changed = 0
    for index in range(len(source)):
        epochs = [source.at_epoch(index, epoch) for epoch in range(EPOCHS)]
        assert same(epochs[0], source[index]) and same(epochs[0], source[index - len(source)])
        assert all(same(epochs[e], again.at_epoch(index, e)) for e in reversed(range(EPOCHS)))
        assert len({record["key"] for record in epochs}) == 1
        changed += sum(not same(a, b) for a, b in itertools.combinations(epochs, 2))
    assert changed > 0.2 * len(source) * EPOCHS * (EPOCHS - 1) / 2
    for index in (len(source), -len(source) - 1):
        with pytest.raises(IndexError):
            source[index]


def test_what_is_not_drawn_stays(tmp_path):
    """Evaluation, lines that are taken as they are, and the samples without a target."""
    for number in range(1, 4):
        write_sa1b(tmp_path / "sa1b", number, BOXES)
    source = Sa1bMasks(tmp_path / "sa1b", train=False)
    plain = Conversations(replicas.write_conversations(tmp_path / "chat", 4), once=True)
    for fixed in (source, plain):
        assert all(same(fixed.at_epoch(i, epoch), fixed[i]) for i in range(len(fixed)) for epoch in (1, 5))
    chats = refcoco.ReferringChats(Phrases())
    for epoch in range(4):
        assert chats.at_epoch(0, epoch)["conversations"][1]["value"] == text.NO


def test_a_mixture_draws_anew_each_time_that_it_reads_a_source_again():
    small = refcoco.ReferringChats(Phrases(), seed=1)
    mixed = Mixture({"small": (small, 3.0), "large": (Phrases(), 1.0)})
    seen = {}
    for epoch in range(2):
        for index in range(len(mixed)):
            if mixed.place(index)[0] == 0:
                record = mixed.at_epoch(index, epoch)
                seen.setdefault(record["key"], []).append(record["conversations"][0]["value"])
    wanted = {f"small:{i}": [small.at_epoch(i, e)["conversations"][0]["value"] for e in range(6)] for i in range(9)}
    assert {key: sorted(values) for key, values in seen.items()} == {k: sorted(v) for k, v in wanted.items()}


def test_batches_of_a_later_epoch_are_new_and_resume_exactly(sa1b):
    """Through the pipeline: each image once an epoch, another crop each time, the same on resume and in processes."""
    options = dict(image_size=16, mask_size=8, batch_size=5, seed=1, num_threads=2)
    make = lambda **more: iter(pipeline.mask_batches(Sa1bMasks(sa1b, seed=3), **options, **more))
    iterator, batches, states = make(), [], []
    for _ in range(4):
        batches.append(next(iterator))
        states.append(iterator.get_state())
    masks = [sorted(mask.tobytes() for mask in batch.mask) for batch in batches]
    assert len({tuple(m) for m in masks}) == 4
    expected = examples.mask_example(Sa1bMasks(sa1b, seed=3).at_epoch(2, 3), 16, 8)[1]
    assert expected.tobytes() in masks[3]
    resumed = make()
    resumed.set_state(states[1])
    parts = [make(share=BatchShare((p,), 5, 5)) for p in range(5)]
    for part in parts:
        part.set_state(states[1])
    for batch in batches[2:]:
        np.testing.assert_array_equal(next(resumed).mask, batch.mask)
        np.testing.assert_array_equal(np.concatenate([next(part).mask for part in parts]), batch.mask)
    helped = make(num_workers=2)
    helped.set_state(states[1])
    for batch in batches[2:]:
        np.testing.assert_array_equal(next(helped).image, batch.image)
    helped.close()


def test_packed_rows_draw_anew(tmp_path):
    source = refcoco.ReferringChats(Phrases(), seed=1)
    tok = TextTokenizer.train_builtin([t for turns in _texts(source) for t in turns], 400, 8)
    sizes = dict(vision_size=28, image_size=32, mask_size=8, num_image_tokens=4, max_length=120, num_latent_tokens=8)
    options = dict(max_masks=1, batch_size=1, seed=0, system=None, pack_samples=2, num_threads=0)
    batches = list(itertools.islice(pipeline.chat_batches(source, tok, **sizes, **options), 18))
    words = [tok.decode(row[mask]) for b in batches for row, mask in zip(b.ids, b.text_mask)]
    told = "".join(words)
    asked = {i: [told.count(f"<ref>thing {i}</ref>{end}") for end in (" by adaptive", ".")] for i in (1, 2, 4, 5, 7, 8)}
    assert sum(min(counts) > 0 for counts in asked.values()) > 2  # in one epoch one way, in another the other


def _texts(source):
    for i in range(len(source)):
        yield [turn["value"] for turn in source[i]["conversations"]]


def test_the_seven_wordings_move_on_each_epoch():
    record = {
        "key": "k",
        "image": np.zeros((16, 16, 3), np.uint8),
        "masks": [np.full((16, 16), 255, np.uint8)],
        "conversations": [{"from": "human", "value": "<image>\nSegment <ref>it</ref>."}],
    }
    tok = TextTokenizer.train_builtin([text.question("it", adaptive=True, template=i) for i in range(7)], 400, 8)
    options = dict(vision_size=28, image_size=32, mask_size=8, num_image_tokens=4, max_prompt_length=90, batch_size=7)
    batches = pipeline.prompt_batches([record] * 7, tok, **options, seed=0, system=None, shuffle=False, templates="all")
    first, second = (b.prompt_ids for b in itertools.islice(batches, 2))
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(second, np.roll(first, -1, axis=0))


def test_kept_examples_serve_later_epochs_as_they_were(sa1b):
    """The first epoch is the same; later ones read nothing; no more is kept than was allowed."""
    read = []
    source = Sa1bMasks(sa1b, seed=3)

    def make(kept_bytes):
        transform = lambda number, record: read.append(number) or examples.mask_fields(record, 16, 8)
        return examples.Examples(source, transform, kept_bytes=kept_bytes)

    count = len(source)
    kept, some, fresh = make(10**6), make(1), make(0)
    first = [kept[i] for i in range(count)]
    assert len(read) == count
    for i in range(count):
        assert kept[count + i] is first[i]
        np.testing.assert_array_equal(fresh[i]["mask"], first[i]["mask"])
    assert len(read) == 2 * count
    assert some[0] is some[count] and some[1] is not some[count + 1]
