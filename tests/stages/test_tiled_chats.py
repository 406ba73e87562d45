"""Conversations of several images and turns, in tiles: stage 2 trains on them, and a model goes on with them."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import alto_jax
from alto_jax import experiment, main
from alto_jax.batch import abstract_batch
from alto_jax.data import pipeline, sources, tiles
from alto_jax.layers import apply_module
from alto_jax.mllm import text
from alto_jax.mllm.alto_llm import ALToLLM
from alto_jax.plan import programs, roofline
from alto_jax.stages import sft
from alto_jax.train import flops, loop
from alto_jax.train.progress import read_metrics
from tests.conftest import ROOT
from tests.data.test_tiles import RECORDS, SAID, human, write
from tests.one_step import one_step_program  # noqa: F401 - a fixture

TILES, SLOTS, LENGTH = 4, 6, 160  # The wide image has 3 tiles and a thumbnail, beside another one 2 and a thumbnail.
THREE_TURNS = [human("<image>\nWhat?"), SAID, human("And here? <image>"), SAID, human("Which is larger?")]


@pytest.fixture(scope="module")
def setting(debug_model, tmp_path_factory):
    """Stage 2 on a three-turn conversation of two images, a wide image, a mask and text, and its model."""
    records = [{"image": ["a.png", "b.png"], "conversations": [*THREE_TURNS, SAID]}, *RECORDS[1:]]
    loaded = main.load_config(str(ROOT / "configs/stage2.py:debug"))
    meta = write(tmp_path_factory.mktemp("tiled"), records)
    loaded.data.update({"source": "jsonl", "meta": str(meta), "max_tiles": TILES, "max_images": 2,
                        "max_length": LENGTH, "num_threads": 1})  # fmt: skip
    loaded.init_from, loaded.eval.num_samples = str(debug_model.path), 0
    loaded.train.update({"keep_checkpoints": 2, "steps": 2, "batch_size": 3})  # one of the first two in each
    loaded.sft.mask_loss_weight = 0.0
    return experiment.make_experiment(loaded), alto_jax.load(debug_model.path)


@pytest.fixture(scope="module")
def batches(setting):
    """The four records in order: tiles in both rows; a mask and text."""
    config, model = setting
    sizes = sources._sizes(config) | sources._chat_sizes(config)
    made = pipeline.chat_batches(sources.chat_source(config), model.text, **sizes, batch_size=2, seed=0, shuffle=False,
                                 num_epochs=1, num_threads=0, system=None)  # fmt: skip
    return list(made)


@pytest.fixture(scope="module")
def full_forward(setting):
    """Logits float32[T, V] of ids [T] and tiles [n, V, V, 3], by one pass without a cache."""
    _, model = setting

    @jax.jit
    def run(params, image, ids):
        apply = functools.partial(apply_module, ALToLLM(model.cfg), params)
        inputs = apply(ids, apply(image, method="image_tokens"), model.text.ids.img_context, method="embed")
        hidden, _ = apply(inputs, jnp.arange(LENGTH)[None], method="hidden")
        return apply(hidden, method="logits")[0]

    def logits(image, ids):
        filled = np.zeros((1, LENGTH), np.int32)
        filled[0, : len(ids)] = ids  # What comes after is not seen.
        return np.asarray(run(model.params, tiles.padded(image, SLOTS)[None], filled))[: len(ids)]

    return logits


@pytest.mark.usefixtures("one_step_program")
def test_stage_2_trains_on_tiles_and_goes_on_exactly(setting, tmp_path):
    config, _ = setting
    loop.train(config, tmp_path / "run")
    untimed = lambda record: {name: value for name, value in record.items() if not name.startswith("perf/")}
    found = [untimed(record) for record in read_metrics(tmp_path / "run")]
    losses = [record["token_loss"] for record in found]
    assert np.isfinite(losses).all() and len(set(losses)) == 2 and found[-1]["update_norm/vision"] > 0
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    (tmp_path / "again" / "result.json").unlink()
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "2")
    loop.train(config, tmp_path / "again")
    assert [untimed(record) for record in read_metrics(tmp_path / "again")] == found


def test_cached_answers_of_three_turns_about_two_images_equal_the_full_forward(setting, full_forward):
    config, model = setting
    shown = tiles.images_of(sources.chat_source(config)[0])
    said = model.answer(shown, THREE_TURNS, max_tiles=TILES, max_new_tokens=9)
    parts = tiles.cut(shown, TILES, config.model.vision.image_size)
    assert [len(part) for part in parts] == said.num_tiles == [3, 1]
    tokens = [config.model.num_image_tokens * len(part) for part in parts]
    prompt = text.render_prompt(model.text, THREE_TURNS, tokens, system=model.system)
    logits = full_forward(np.concatenate(parts), prompt + said.token_ids)[len(prompt) - 1 :]
    assert len(set(said.token_ids)) > 1 and np.argmax(logits[:-1], axis=-1).tolist() == said.token_ids
    assert model.text.decode(said.token_ids).startswith(said.text[:3])
    for place in range(4):  # Each tile is seen, each in its place.
        changed = np.concatenate(parts)
        changed[place] = changed[(place + 1) % 4]
        assert np.abs(full_forward(changed, prompt)[-1] - logits[0]).max() > 1e-4


def test_the_loss_is_that_of_the_full_forward_and_padding_does_not_matter(setting, batches, full_forward):
    config, model = setting
    loss = jax.jit(functools.partial(sft.make_loss(config, model.text.ids), drawn=None, step=0))
    batch, number = batches[0], len(batches[0].ids)
    assert batch.image.shape[:2] == (number, SLOTS)
    found, (logged, _) = loss(model.params, batch)
    total = count = 0.0
    for row in range(number):
        length = int(batch.text_mask[row].sum())
        logps = np.asarray(jax.nn.log_softmax(full_forward(batch.image[row], batch.ids[row, :length])))
        at = np.flatnonzero(batch.labels[row, 1:length] != text.IGNORE)
        total, count = total - float(logps[at, batch.labels[row, 1 + at]].sum()), count + len(at)
    assert count == float(logged["num_supervised"]) > 8
    np.testing.assert_allclose(float(found), total / count, rtol=1e-5)
    changed = np.array(batch.image)
    for row, used in enumerate((batch.ids == model.text.ids.img_context).sum(1) // config.model.num_image_tokens):
        assert used == 4
        changed[row, used:] = 99
    np.testing.assert_allclose(loss(model.params, batch.replace(image=changed))[0], found, rtol=1e-6)


def test_masks_have_the_features_of_their_one_tile(setting, batches):
    config, model = setting
    config = dataclasses.replace(config, sft=dataclasses.replace(config.sft, mask_loss_weight=1.0))
    loss = functools.partial(sft.make_loss(config, model.text.ids), drawn=None, step=0)
    batch = batches[1]
    assert batch.image.shape[1] == 1 and batch.mask_valid[:, 0].tolist() == [True, False]
    others = np.full_like(batch.image, 7)
    image, pixels, _ = sft.images_with_masks(batch.replace(image=np.concatenate([batch.image, others], axis=1)))
    np.testing.assert_array_equal(image, batch.image[:, 0])
    assert pixels is batch.pixel_image
    assert "mask_bce" in jax.eval_shape(loss, model.params, batch)[1][0]


def test_answers_take_images_in_every_form(setting):
    config, model = setting
    wide, square = tiles.images_of(sources.chat_source(config)[0])
    alone = model.answer(wide, "Which?", max_new_tokens=9)
    assert alone.num_tiles == [1] and alone.to_json()["text"] == alone.text
    assert model.answer([wide], [human("<image>\nWhich?")], max_new_tokens=9).token_ids == alone.token_ids
    assert model.answer(wide, "Where is <ref>it</ref>?", max_tiles=8, max_new_tokens=9).num_tiles == [1]
    with pytest.raises(ValueError, match="max_tiles: expected a whole number of at least 1, got 0"):
        model.answer(wide, "Which?", max_tiles=0)
    with pytest.raises(ValueError, match="question: expected some text"):
        model.answer(wide, " ")
    with pytest.raises(ValueError, match="one <image> for each of the 2 images, got 1"):
        model.answer([wide, square], "<image> Which?")
    with pytest.raises(ValueError, match="image: expected uint8"):
        model.answer(np.zeros((4, 4)), "Which?")


def test_tiles_are_counted_at_their_most(setting):
    config, _ = setting
    assert config.data.tile_slots == SLOTS and abstract_batch(config).image.shape == (3, SLOTS, 56, 56, 3)
    plain = dataclasses.replace(config, data=dataclasses.replace(config.data, max_tiles=1, max_images=1))
    assert abstract_batch(plain).image.shape == (3, 56, 56, 3)
    vision = [flops.step_flops(c, only="vision/").forward for c in (config, plain)]
    assert vision[0] == SLOTS * vision[1] > 0
    assert roofline.activation_bytes(config, 1, 1).total > roofline.activation_bytes(plain, 1, 1).total
    prompts = programs._prompts(config, abstract_batch(config))  # of one tile
    assert prompts.image.shape == (3, 56, 56, 3) and prompts.pixel_image.shape == (3, 64, 64, 3)
