"""A group that shares its prompt gives the log-probabilities and gradients of separate rows."""

import dataclasses
import functools
import json
import types

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alto_jax.batch import PromptBatch, Rollout
from alto_jax.experiment import GrpoStageConfig
from alto_jax.lora import adapters
from alto_jax.losses.grpo import GrpoLossConfig, grpo_loss
from alto_jax.losses.tokens import token_log_probs
from alto_jax.mllm.alto_llm import ALToLLM, ModelConfig, init_params
from alto_jax.mllm.generate import GenerateConfig
from alto_jax.mllm.intern_vit import InternViTConfig
from alto_jax.mllm.language_model import LanguageModelConfig
from alto_jax.mllm.text import SpecialIds
from alto_jax.params import merge_params
from alto_jax.stages.grpo import completion_logps, refill, rollout
from alto_jax.tokenizer.alto import TokenizerConfig
from alto_jax.tokenizer.encoder import ViTConfig
from alto_jax.tokenizer.pixel_decoder import PixelDecoderConfig
from alto_jax.train.rollouts import minibatch
from tests.conftest import run_python
from tests.debug_model import random_params

SPECIAL = SpecialIds(
    pad=0, bos=None, im_start=1, im_end=2, img=3, img_end=4, img_context=5, ref=6, ref_end=7, box=8, box_end=9,
    mask_start=10, mask_end=11, code_0=12, num_codes=8,
)  # fmt: skip
CONFIG = ModelConfig(
    tokenizer=TokenizerConfig(
        mask_size=16, patch_size=8, num_latent_tokens=4, codebook_size=8, token_size=4,
        encoder=ViTConfig(16, 1, 2), decoder=ViTConfig(16, 1, 2), sam=None,
        pixel_decoder=PixelDecoderConfig(z_channels=8, hidden_channels=8, channel_mult=(1,), num_res_blocks=1,
                                         out_patch=8),
    ),
    vision=InternViTConfig(image_size=28, patch_size=14, embed_dim=16, num_layers=1, num_heads=2, mlp_dim=32),
    language_model=LanguageModelConfig(vocab_size=40, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2,
                                       mlp_dim=48),
)  # fmt: skip
BATCH, GROUP, PROMPT, LENGTH = 2, 3, 7, 6


@pytest.fixture(scope="module")
def group():
    """Parameters, two prompts of different lengths with their images, and ragged completions."""
    rng = np.random.default_rng(0)
    params = traverse_util.unflatten_dict(random_params(CONFIG), sep="/")
    ids = rng.integers(13, 40, (BATCH, PROMPT)).astype(np.int32)
    ids[:, 3] = SPECIAL.img_context
    prompt_mask = np.arange(PROMPT) >= np.array([[0], [2]])
    batch = PromptBatch(
        image=rng.integers(0, 256, (BATCH, 28, 28, 3)).astype(np.uint8),
        pixel_image=np.zeros((BATCH, 16, 16, 3), np.uint8),
        prompt_ids=np.where(prompt_mask, ids, SPECIAL.pad),
        prompt_mask=prompt_mask,
        mask=np.zeros((BATCH, 16, 16), np.float32),
    )
    completion_ids = rng.integers(0, 40, (BATCH, GROUP, LENGTH)).astype(np.int32)
    lengths = np.array([[6, 1, 3], [2, 5, 4]])
    mask = np.arange(LENGTH) < lengths[..., None]
    image_tokens = jax.jit(lambda p, x: ALToLLM(CONFIG).apply({"params": p}, x, method="image_tokens"))
    image_tokens = image_tokens(params, batch.image)
    return params, batch, image_tokens, np.where(mask, completion_ids, SPECIAL.pad), mask


def packed_logps(params, batch, image_tokens, completion_ids, share_prompt=True):
    return completion_logps(CONFIG, params, SPECIAL, batch, image_tokens, completion_ids, share_prompt=share_prompt)


def first_of_packed(*arguments):
    return packed_logps(*arguments)[0]


def naive_logps(params, batch, image_tokens, completion_ids):
    """One full row per completion: prompt and completion side by side, image tokens repeated."""
    model, (batch_size, group_size, length) = ALToLLM(CONFIG), completion_ids.shape
    prompt_length = batch.prompt_ids.shape[1]
    apply = lambda *args, method: model.apply({"params": params}, *args, method=method)
    repeat = lambda a: jnp.repeat(a, group_size, axis=0)
    completions = completion_ids.reshape(-1, length)
    ids = jnp.concatenate([repeat(batch.prompt_ids), completions], axis=1)
    mask = jnp.concatenate([repeat(batch.prompt_mask), jnp.ones_like(completions, bool)], axis=1)
    # The image goes to the prompt alone: a sampled <IMG_CONTEXT> is text.
    prompt = apply(repeat(batch.prompt_ids), repeat(image_tokens), SPECIAL.img_context, method="embed")
    inputs = jnp.concatenate([prompt, apply(completions, method="embed_text")], axis=1)
    total = ids.shape[1]
    attn_mask = jnp.tril(jnp.ones((total, total), bool)) & mask[:, None]
    hidden, _ = apply(inputs, jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0), attn_mask, method="hidden")
    logps = token_log_probs(apply(hidden[:, prompt_length - 1 : -1], method="logits"), completions)
    return logps.reshape(batch_size, group_size, length)


@functools.partial(jax.jit, static_argnums=0)
def logps_and_gradients(logps_of, params, batch, image_tokens, completion_ids, slope):
    """The log-probabilities, and the gradients of the language model for a loss with this slope in them."""
    logps = lambda p: logps_of({**params, "language_model": p}, batch, image_tokens, completion_ids)
    values, backward = jax.vjp(logps, params["language_model"])
    return values, backward(slope)[0]


@pytest.mark.parametrize("share_prompt", [True, False])
def test_shared_prompt_gives_the_log_probabilities_of_separate_rows(group, share_prompt):
    params, batch, image_tokens, ids, mask = group
    arguments = params, batch, image_tokens, ids
    packed, entropy = jax.jit(packed_logps, static_argnums=4)(*arguments, share_prompt)
    naive = jax.jit(naive_logps)(*arguments)
    np.testing.assert_allclose(np.asarray(packed)[mask], np.asarray(naive)[mask], atol=1e-5)
    assert float(jnp.min(entropy)) > 0


@pytest.mark.parametrize("objective", ["paper", "reference", "dr_grpo", "dapo", "gspo"])
def test_shared_prompt_gives_the_gradients_of_separate_rows(group, objective):
    params, batch, image_tokens, ids, mask = group
    rng = np.random.default_rng(1)
    advantages = jnp.asarray(rng.normal(size=(BATCH, GROUP)), jnp.float32)
    arguments = params, batch, image_tokens, ids
    base = jax.jit(naive_logps)(*arguments)
    old = base + 0.3 * rng.normal(size=base.shape).astype(np.float32)
    reference = base + 0.3 * rng.normal(size=base.shape).astype(np.float32)
    cfg = GrpoLossConfig(objective=objective, beta=0.1, loss_cap=100.0)

    loss = jax.jit(lambda logps: grpo_loss(logps, old, reference, advantages, jnp.asarray(mask), cfg)[0])

    def gradients(logps_of):
        values, _ = logps_and_gradients(logps_of, *arguments, jnp.zeros_like(base))
        return logps_and_gradients(logps_of, *arguments, jax.grad(loss)(values))[1]

    got, want = gradients(first_of_packed), gradients(naive_logps)
    for path, leaf in jax.tree_util.tree_leaves_with_path(want):
        other = dict(jax.tree_util.tree_leaves_with_path(got))[path]
        scale = float(jnp.max(jnp.abs(leaf)))
        assert scale > 0, path
        np.testing.assert_allclose(other, leaf, atol=1e-4 * scale, err_msg=str(path))


def test_beta_zero_needs_no_reference():
    cfg = dataclasses.replace(GrpoLossConfig(), beta=0.0)
    logps = jnp.zeros((1, 2, 3))
    loss, metrics = grpo_loss(logps, None, None, jnp.array([[1.0, 3.0]]), jnp.ones((1, 2, 3), bool), cfg)
    assert float(loss) == -2 and float(metrics["kl"]) == 0


@pytest.mark.parametrize("quantize", ["", "int8"])
def test_rollouts_of_merged_adapters_are_those_of_adapters(group, quantize):
    """And of the plain model that they make; the base alone gives others, and is the reference."""
    params, batch, *_ = group
    lora = adapters.LoraConfig(rank=2, alpha=4.0)
    key = jax.random.key(3)
    added = adapters.make_adapters(params, lora, key)
    added = jax.tree.map(lambda a: 0.3 * jax.random.normal(key, a.shape), added)

    def sampled(params, lora, **options):
        generate = GenerateConfig(max_new_tokens=LENGTH, temperature=1.0, quantize=quantize)
        grpo = GrpoStageConfig(num_generations=GROUP, generate=generate, **options)
        config = types.SimpleNamespace(model=CONFIG, grpo=grpo, lora=lora)
        with adapters.applied(lora):
            return jax.jit(functools.partial(rollout, config, SPECIAL))(params, batch, jax.random.key(5))

    whole = merge_params(params, added)
    merged, base = sampled(whole, lora), sampled(params, adapters.LoraConfig())
    plain = sampled(adapters.merged(whole, lora), adapters.LoraConfig())
    np.testing.assert_array_equal(merged.completion_ids, plain.completion_ids)
    np.testing.assert_allclose(merged.old_per_token_logps, plain.old_per_token_logps, atol=1e-4)
    assert np.abs(merged.old_per_token_logps - base.old_per_token_logps).max() > 0.1
    if not quantize:
        beside = sampled(whole, lora, merge_adapters=False)
        np.testing.assert_array_equal(merged.completion_ids, beside.completion_ids)
        for name in ("old_per_token_logps", "ref_per_token_logps"):
            np.testing.assert_allclose(getattr(merged, name), getattr(beside, name), atol=1e-4)


def rollout_of(rewards, first=0):
    """A rollout with these rewards [B][G], whose prompts are numbered from `first` on."""
    rewards = jnp.asarray(rewards, jnp.float32)
    numbers = jnp.arange(first, first + len(rewards))
    prompt = PromptBatch(*[numbers] * 5)
    return Rollout(prompt, *[numbers] * 5, rewards=rewards, components={"iou": rewards}, image_tokens=numbers)


def test_refill_replaces_groups_that_teach_nothing():
    first = rollout_of([[1, 1], [0, 1], [0, 0], [2, 2]])
    other = rollout_of([[3, 3], [1, 0], [2, 5], [4, 4]], first=10)
    once = jax.jit(refill)(first, other)
    np.testing.assert_array_equal(once.prompt.image, [1, 11, 12, 0])
    np.testing.assert_array_equal(once.rewards, [[0, 1], [1, 0], [2, 5], [1, 1]])
    np.testing.assert_array_equal(once.components["iou"], once.rewards)
    twice = refill(once, rollout_of([[0, 9], [0, 9], [0, 9], [0, 9]], first=20))
    np.testing.assert_array_equal(twice.completion_ids, [1, 11, 12, 20])


def test_minibatches_are_the_whole():
    whole = rollout_of(np.arange(12).reshape(6, 2))
    parts = [minibatch(whole, jnp.int32(i), 3) for i in range(3)]
    np.testing.assert_array_equal([p.prompt.image for p in parts], [[0, 3], [1, 4], [2, 5]])
    np.testing.assert_array_equal(parts[1].rewards, [[2, 3], [8, 9]])
    assert minibatch._cache_size() == 1


def test_packed_equals_naive_on_a_mesh(eight_devices):
    """Eight devices, mesh (2, 2, 2), two images on each: see grpo_on_mesh.py."""
    done = run_python("-m", "tests.stages.grpo_on_mesh")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["devices"] == 8 and found["images_per_device"] == 2 and found["split_parameters"] > 5
    assert found["logps"] < 1e-5 and found["gathered_in_loop"] == [] and found["logits_in_8_bits"] < 1e-4
    split = found["split_in_8_bits"]
    assert split["attn/q/kernel_t"] == ["int8", [4, 8, 32], [2, 8, 32]]
    assert split["attn/q/kernel_scale"] == ["float32", [4, 8], [2, 8]]
    assert split["mlp/down/kernel_t"] == ["int8", [32, 48], [32, 24]]
    assert split["mlp/down/kernel_scale"] == ["float32", [32], [32]]
    assert set(found["gradients"]) == {"paper", "reference", "dr_grpo", "dapo", "gspo"}
    assert max(found["gradients"].values()) < 1e-4


@pytest.fixture(scope="module")
def at_a_time(group):
    """What the loss of so many logits at a time gives, and its gradient; 0: of all at once."""
    params, *rest, mask = group

    def loss(language_model, at_once):
        changed = {**params, "language_model": language_model}
        logps, entropy = completion_logps(CONFIG, changed, SPECIAL, *rest, at_once=at_once)
        return jnp.sum(jnp.where(mask, logps, 0)), (logps, entropy)

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    return functools.cache(lambda at_once: run(params["language_model"], at_once))


@pytest.mark.parametrize("at_once", [1, 4, 5])
def test_logits_of_a_part_at_a_time_are_the_same(at_a_time, at_once):
    (_, whole), gradient = at_a_time(0)
    (_, parts), of_parts = at_a_time(at_once)
    for got, wanted in zip(jax.tree.leaves((parts, of_parts)), jax.tree.leaves((whole, gradient)), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_logits_of_a_part_take_the_memory_of_a_part(group):
    """With a large vocabulary, the update's memory is that of the logits."""
    config = dataclasses.replace(CONFIG, language_model=dataclasses.replace(CONFIG.language_model, vocab_size=20_000))
    params = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    _, batch, image_tokens, ids, _ = group
    ids = np.tile(ids, (1, 1, 8))

    def temporary(at_once):
        loss = lambda p: jnp.sum(completion_logps(config, p, SPECIAL, batch, image_tokens, ids, at_once=at_once)[0])
        return jax.jit(jax.grad(loss)).lower(params).compile().memory_analysis().temp_size_in_bytes

    logits = ids.size * 20_000 * 4
    assert temporary(0) > 2 * logits and temporary(4) < 0.6 * logits
