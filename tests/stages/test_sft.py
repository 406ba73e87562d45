"""Packed rows train like rows of their own: the same loss, the same gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alto_jax import experiment, main
from alto_jax.attention import seam
from alto_jax.batch import ChatBatch
from alto_jax.data import chat_examples, packing, sources, vocabulary
from alto_jax.mllm.alto_llm import init_params
from alto_jax.stages import sft
from tests.conftest import ROOT

NUM_SAMPLES, SEGMENTS, PACKED_LENGTH = 5, 3, 320


@pytest.fixture(scope="module")
def setting():
    """stage2:debug with random parameters and five conversations: questions, one mask, two masks."""
    config = experiment.make_experiment(main.load_config(str(ROOT / "configs/stage2.py:debug")))
    sam = dataclasses.replace(config.model.tokenizer.sam, depth=1, global_attn_indexes=(0,))
    tokenizer = dataclasses.replace(config.model.tokenizer, sam=sam)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, max_masks=2),
        model=dataclasses.replace(config.model, tokenizer=tokenizer),
    )
    tok = vocabulary.text_tokenizer(config)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: init_params(config.model, key), jax.random.key(0))
    params = jax.tree_util.tree_map_with_path(
        lambda path, p: (
            ("scale" in str(path[-1]))
            + (rng.normal(size=p.shape) * 0.5 / np.sqrt(max(p.shape[-2:][0], 1))).astype(np.float32)
        ),
        shapes,
    )
    source = sources.chat_source(config)
    questions = [i for i in range(len(source)) if not source[i]["masks"]][:1]
    records = [source[i] for i in (questions + [i for i in range(len(source)) if i not in questions])[:NUM_SAMPLES]]
    double = records[3]
    turns = [dict(turn) for turn in double["conversations"]]
    turns[1]["value"] += turns[1]["value"].replace("<TOK_0>", "<TOK_1>")
    second = np.roll(double["masks"][0], 7, axis=1)
    records[3] = {**double, "conversations": turns, "masks": [double["masks"][0], second]}
    size = config.model
    options = dict(
        vision_size=size.vision.image_size, image_size=size.tokenizer.image_size, mask_size=size.tokenizer.mask_size,
        num_image_tokens=size.num_image_tokens, num_latent_tokens=size.tokenizer.num_latent_tokens, max_masks=2,
        system=None,
    )  # fmt: skip
    made = [chat_examples.chat_example(record, tok, max_length=PACKED_LENGTH, **options) for record in records]
    assert sum(int(e["mask_valid"].sum()) for e in made) == NUM_SAMPLES  # 0, 1, 1, 2, 1
    return config, tok, params, made


def stack(rows):
    return ChatBatch(**{name: np.stack([row[name] for row in rows]) for name in rows[0]})


def pack(tok, made):
    lengths = [int(e["text_mask"].sum()) for e in made] + [PACKED_LENGTH] * 9
    rows, following = packing.fill_rows(
        lengths.__getitem__, 0, num_rows=2, max_length=PACKED_LENGTH, max_segments=SEGMENTS
    )
    assert following == NUM_SAMPLES and sorted(map(len, rows)) == [2, 3]
    blank = {name: np.zeros_like(value) for name, value in made[0].items()}
    blank |= {"ids": np.full_like(blank["ids"], tok.ids.pad), "labels": np.full_like(blank["labels"], -100)}
    return stack([packing.pack_row([made[i] for i in row], blank, SEGMENTS, tok.ids.img_context) for row in rows])


def test_packed_loss_and_gradients_equal_those_of_separate_rows(setting):
    config, tok, params, made = setting
    packed_config = dataclasses.replace(config, data=dataclasses.replace(config.data, pack_samples=SEGMENTS))

    trained = {name: params[name] for name in ("vision", "projector", "language_model")}

    def make_run(config):
        loss_fn = sft.make_loss(config, tok.ids)

        def loss(part, batch):
            value, (metrics, _) = loss_fn({**params, **part}, batch, None, 0)
            return value, metrics

        run = jax.jit(jax.value_and_grad(loss, has_aux=True))
        return lambda batch: jax.device_get(run(trained, batch))  # NumPy compiles nothing to compare them

    run, run_packed = make_run(config), make_run(packed_config)
    batch = pack(tok, made)
    (loss, metrics), grads = run(stack(made))
    (packed_loss, packed_metrics), packed_grads = run_packed(batch)
    assert metrics["num_supervised"] > 64 and metrics["mask_bce"] > 0.1
    for name, value in metrics.items():
        np.testing.assert_allclose(packed_metrics[name], value, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(packed_loss, loss, rtol=1e-5)
    norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(grads)))
    flat = jax.tree_util.tree_leaves_with_path(grads)
    for (path, one), two in zip(flat, jax.tree.leaves(packed_grads), strict=True):
        scale = np.maximum(np.max(np.abs(one)), 1e-4 * norm)
        assert np.max(np.abs(one - two)) <= 1e-4 * scale, jax.tree_util.keystr(path)

    # What stands where no image is must not matter, and what is in another conversation neither.
    absent = np.argmin([row.max() for row in batch.image.reshape(2, -1, *batch.image.shape[2:])[:, -1]])
    image = batch.image.copy()
    image[absent, -1] = 99
    (other_loss, _), other_grads = run_packed(batch.replace(image=image))
    np.testing.assert_allclose(other_loss, packed_loss, rtol=1e-6)
    for one, two in zip(jax.tree.leaves(packed_grads), jax.tree.leaves(other_grads), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6)


def test_positions_begin_anew_and_conversations_do_not_see_each_other():
    segment_ids = jnp.array([[1, 1, 1, 2, 2, 0, 0]])
    positions = sft.segment_positions(segment_ids)
    assert positions.tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    expected = np.zeros((7, 7), bool)
    for start, stop in ((0, 3), (3, 5), (5, 7)):
        expected[start:stop, start:stop] = np.tri(stop - start, dtype=bool)
    mask = seam.Mask(causal=True, segments=segment_ids).dense(7, 7)
    np.testing.assert_array_equal(mask[0, 0], expected)
