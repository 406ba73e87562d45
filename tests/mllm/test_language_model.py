"""The language model against the InternLM2 and Qwen2 references, its cache and its shared prefix."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alto_jax import config, layers
from alto_jax.attention import seam
from alto_jax.mllm.language_model import (
    DecoderBlock,
    KVCache,
    LanguageModel,
    LanguageModelConfig,
    ntk_inv_freq,
    prefix_attention,
)
from tests.golden_io import golden, tolerance
from tools.convert_torch_weights.mapping import import_state_dict

CONFIGS = {
    "internlm2": LanguageModelConfig(vocab_size=1200, rope_scaling_factor=2.0),
    "qwen2": LanguageModelConfig(vocab_size=1200, norm_eps=1e-6, qkv_bias=True),
}
SMALL = LanguageModelConfig(vocab_size=48, embed_dim=24, num_layers=3, num_heads=6, num_kv_heads=2, mlp_dim=32)


@functools.cache
def load(name):
    """The fixture and its parameters; rows and columns of the vocabulary that it leaves out are zero."""
    arrays = golden(name)
    weights = {k.removeprefix("weights."): v for k, v in arrays.items() if k.startswith("weights.")}
    embedding = "model.tok_embeddings.weight" if name == "internlm2" else "model.embed_tokens.weight"

    def scatter(rows, values):
        table = np.zeros((1200, values.shape[1]), np.float32)
        table[rows] = values
        return table

    weights[embedding] = scatter(arrays["embedded_ids"], weights[embedding])
    head = "output.weight" if name == "internlm2" else "lm_head.weight"
    weights[head] = scatter(arrays["columns"], weights[head])
    return arrays, import_state_dict(name, weights, CONFIGS[name])


@functools.cache
def applier(cfg):
    """Compiled `LanguageModel(cfg).apply`, called with (params, *args, method=...)."""
    model = LanguageModel(cfg)
    return jax.jit(lambda params, *args, method="__call__", **kwargs: model.apply(
        {"params": params}, *args, method=method, **kwargs), static_argnames=("method", "keep"))  # fmt: skip


@functools.cache
def small():
    model = LanguageModel(SMALL)
    init = jax.jit(functools.partial(model.init, method="forward"))
    params = init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    return model, jax.tree.map(lambda a: np.asarray(a) * 8 if a.ndim > 1 else a, params)


def check(name, key, value, where=...):
    """Compares with the fixture's array `key` at its tolerance, logits at the columns that it keeps."""
    arrays = golden(name)
    value, expected = np.asarray(value), arrays[key]
    if key.startswith(("logits", "ntk_first", "ntk_call", "ntk_second")):
        value = value[..., arrays["columns"]]
    np.testing.assert_allclose(value[where], expected[where], rtol=0, atol=tolerance(name, key))


def padding_mask(mask):
    """bool[B, T] -> causal bool[B, T, T] over the keys that are not padding."""
    return np.tril(np.ones((mask.shape[1],) * 2, bool)) & mask[:, None].astype(bool)


def forward(name, *args, cfg=None):
    return applier(cfg or CONFIGS[name])(load(name)[1], *args, method="forward")


@pytest.mark.parametrize("name", ["internlm2", "qwen2"])
def test_logits_equal_the_reference(name):
    arrays, _ = load(name)
    ids = arrays["ids"]
    check(name, "logits_nopad", forward(name, ids))
    right, left = arrays["mask_right"].astype(bool), arrays["mask_left"].astype(bool)
    check(name, "logits_right", forward(name, ids, None, padding_mask(right)), where=right)
    check(name, "logits_left_with_pos", forward(name, ids, arrays["pos_left"], padding_mask(left)), where=left)
    if name == "internlm2":
        check(name, "logits_left_arange_pos", forward(name, ids, None, padding_mask(left)), where=left)


@pytest.mark.parametrize("name", ["internlm2", "qwen2"])
def test_hidden_states_equal_the_reference(name):
    arrays, params = load(name)
    cfg, ids = CONFIGS[name], arrays["ids"]
    apply = functools.partial(applier(cfg), params)
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    embedded = apply(ids, method="embed")
    check(name, "hidden0", embedded)
    first = jax.tree.map(lambda a: a[0], params["blocks"]["layers"])
    mask = seam.Mask(causal=True)
    args = (positions, layers.rope_frequencies(cfg.head_width, cfg.rope_theta), mask, None, None, None, None, None)
    x, _ = jax.jit(DecoderBlock(cfg).apply)({"params": first}, embedded, *args)
    check(name, "hidden1", x)
    check(name, "hidden2", apply(embedded, positions)[0])


def test_cache_and_cached_step_equal_the_reference():
    arrays, params = load("internlm2")
    cfg = CONFIGS["internlm2"]
    apply = functools.partial(applier(cfg), params)
    embedded = apply(arrays["ids"], method="embed")
    empty = KVCache.create(cfg, 3, 15)
    positions = np.broadcast_to(np.arange(14), (3, 14))
    _, cache = apply(embedded, positions, cache=empty, cache_index=0)
    check("internlm2", "kcache_layer0", cache.k[0, :, :14].transpose(0, 2, 1, 3))
    check("internlm2", "vcache_layer0", cache.v[0, :, :14].transpose(0, 2, 1, 3))
    # The step follows the left-padded prompts.
    mask = np.concatenate([arrays["mask_left"], np.ones((3, 1), int)], axis=1).astype(bool)
    attn_mask = padding_mask(mask)
    _, cache = apply(embedded, arrays["pos_left"], attn_mask[:, :14], cache=empty, cache_index=0)
    step = apply(arrays["step_ids"], method="embed")
    hidden, _ = apply(step, arrays["pos_left"][:, -1:] + 1, attn_mask[:, 14:], cache=cache, cache_index=14)
    check("internlm2", "logits_step", apply(hidden, method="logits"))


def test_dynamic_ntk_equals_the_reference():
    arrays, params = load("internlm2")
    ids, cfg = arrays["ids"], dataclasses.replace(CONFIGS["internlm2"], max_position_embeddings=8)
    np.testing.assert_allclose(ntk_inv_freq(cfg, 6), arrays["inv_freq"], rtol=1e-6)
    np.testing.assert_allclose(ntk_inv_freq(cfg, 14), arrays["ntk_inv_freq_after"], rtol=1e-6)
    check("internlm2", "ntk_first_call_len6", forward("internlm2", ids[:, :6], cfg=cfg))
    check("internlm2", "ntk_call_len14", forward("internlm2", ids, cfg=cfg))
    # The reference's table is sticky: the caller passes it on.
    apply = functools.partial(applier(cfg), params)
    positions = np.broadcast_to(np.arange(6), (3, 6))
    hidden, _ = apply(apply(ids[:, :6], method="embed"), positions, inv_freq=ntk_inv_freq(cfg, 14))
    check("internlm2", "ntk_second_call_len6", apply(hidden, method="logits"))


def test_cached_decode_equals_one_forward_for_left_padded_rows():
    model, params = small()
    apply = functools.partial(applier(model.cfg), params)
    rng = np.random.default_rng(0)
    batch, prompt, new = 4, 9, 5
    length = prompt + new
    ids = rng.integers(0, 48, (batch, length))
    mask = np.arange(length) >= np.array([[0], [3], [8], [5]])
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    full = np.asarray(apply(ids, positions, padding_mask(mask), method="forward"))

    embedded = apply(ids, method="embed")
    cache = KVCache.create(model.cfg, batch, length)
    attn_mask = np.zeros((batch, prompt, length), bool)
    attn_mask[:, :, :prompt] = padding_mask(mask)[:, :prompt, :prompt]
    hidden, cache = apply(embedded[:, :prompt], positions[:, :prompt], attn_mask, cache, 0)
    steps = [np.asarray(apply(hidden, method="logits"))]
    for t in range(prompt, length):
        now = slice(t, t + 1)
        seen = mask[:, None] & (np.arange(length) <= t)
        hidden, cache = apply(embedded[:, now], positions[:, now], seen, cache, t)
        steps.append(np.asarray(apply(hidden, method="logits")))
    difference = np.abs(np.concatenate(steps, axis=1) - full)[mask]
    assert full[mask].std() > 0.5
    assert difference.max() < 1e-4


@pytest.mark.parametrize("with_cache", [False, True])
def test_shared_prefix_equals_repeated_rows(with_cache):
    model, params = small()
    apply = functools.partial(applier(model.cfg), params)
    rng = np.random.default_rng(1)
    batch, group, prompt, new = 2, 3, 6, 4
    prompt_mask = np.arange(prompt) >= np.array([[0], [2]])
    prompts = np.repeat(rng.integers(0, 48, (batch, prompt)), group, axis=0)
    ids = np.concatenate([prompts, rng.integers(0, 48, (batch * group, new))], axis=1)
    mask = np.concatenate([np.repeat(prompt_mask, group, axis=0), np.ones((batch * group, new), bool)], axis=1)
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    expected = apply(ids, positions, padding_mask(mask), method="forward")[:, prompt:]

    embedded = apply(ids, method="embed")
    first = slice(None, None, group)
    _, prefix = apply(embedded[first, :prompt], positions[first, :prompt], padding_mask(prompt_mask), keep="model")
    kwargs = dict(prefix=prefix, prefix_mask=prompt_mask)
    if not with_cache:
        hidden, _ = apply(embedded[:, prompt:], positions[:, prompt:], **kwargs)
    else:
        cache, parts = KVCache.create(model.cfg, batch * group, new), []
        for t in range(new):
            now = slice(prompt + t, prompt + t + 1)
            part, cache = apply(embedded[:, now], positions[:, now], cache=cache, cache_index=t, **kwargs)
            parts.append(part)
        hidden = jnp.concatenate(parts, axis=1)
    np.testing.assert_allclose(apply(hidden, method="logits"), expected, rtol=0, atol=2e-5)


def test_dynamic_ntk_counts_the_prefix():
    _, params = small()
    cfg = dataclasses.replace(SMALL, max_position_embeddings=8, rope_scaling_factor=2.0)
    apply = functools.partial(applier(cfg), params)
    embedded = np.random.default_rng(2).normal(size=(2, 4, 24)).astype(np.float32)
    args, prefix = (embedded, np.broadcast_to(np.arange(6, 10), (2, 4))), KVCache.create(cfg, 1, 6)
    automatic, _ = apply(*args, prefix=prefix)
    given = [apply(*args, prefix=prefix, inv_freq=ntk_inv_freq(cfg, length))[0] for length in (10, 4)]
    np.testing.assert_allclose(automatic, given[0], rtol=0, atol=1e-5)
    assert np.abs(automatic - given[1]).max() > 1e-3


def test_prefix_attention_and_its_gradient_equal_the_repeated_form():
    rng = np.random.default_rng(3)
    batch, group, length, prefix_length, heads, kv_heads, width = 2, 3, 4, 5, 6, 2, 8
    rows = batch * group
    shapes = [(rows, length, heads), *[(rows, length, kv_heads)] * 2, *[(batch, prefix_length, kv_heads)] * 2]
    args = [rng.normal(size=(*shape, width)).astype(np.float32) for shape in shapes]
    mask = np.tril(np.ones((length, length), bool))[None, None]
    prefix_mask = np.array([[False, True, True, True, True], [True] * 5])

    def shared(q, k, v, prefix_k, prefix_v):
        return prefix_attention(q, k, v, mask, prefix_k, prefix_v, prefix_mask)

    def repeated(q, k, v, prefix_k, prefix_v):
        join = lambda prefix, own: jnp.concatenate([jnp.repeat(prefix, group, axis=0), own], axis=1)
        seen = np.broadcast_to(mask, (rows, 1, length, length))
        padding = np.repeat(prefix_mask, group, axis=0)[:, None, None]
        full = np.concatenate([np.broadcast_to(padding, (rows, 1, length, prefix_length)), seen], axis=-1)
        return seam.attention(q, join(prefix_k, k), join(prefix_v, v), mask=seam.Mask(pairs=full))

    def value_and_grad(f):
        @jax.jit
        def run(*args):
            out, vjp = jax.vjp(f, *args)
            return out, vjp(jnp.cos(out))

        return run(*args)

    (ours, our_grads), (expected, expected_grads) = value_and_grad(shared), value_and_grad(repeated)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-6)
    for ours, expected in zip(our_grads, expected_grads):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


def test_remat_and_unroll_change_nothing():
    _, params = small()
    ids = np.arange(12).reshape(2, 6)

    @functools.partial(jax.jit, static_argnums=0)
    def grad(cfg, params):
        return jax.grad(lambda p: jnp.sum(jnp.sin(LanguageModel(cfg).apply({"params": p}, ids, method="forward"))))(
            params
        )

    expected = grad(SMALL, params)
    for remat, unroll in (("full", 1), ("dots", 2)):
        ours = grad(dataclasses.replace(SMALL, remat=remat, unroll=unroll), params)
        # Note: sums of many terms are rounded relative to the largest; on accelerators programs differ in that.
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max()), ours, expected
        )


def test_bfloat16_and_tied_embeddings():
    cfg = dataclasses.replace(SMALL, dtype="bfloat16", param_dtype="bfloat16", tie_embeddings=True, head_dim=8)
    ids = np.arange(12).reshape(2, 6)
    params = jax.jit(functools.partial(LanguageModel(cfg).init, method="forward"))(jax.random.key(0), ids)["params"]
    assert "head" not in params and params["blocks"]["layers"]["attn"]["q"]["kernel"].shape == (3, 24, 6, 8)
    assert {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    logits = applier(cfg)(params, ids, method="forward")
    assert logits.dtype == jnp.float32
    wide = jax.tree.map(lambda a: np.asarray(a, np.float32), params)
    exact = dataclasses.replace(cfg, dtype="float32", param_dtype="float32")
    expected = np.asarray(applier(exact)(wide, ids, method="forward"))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=0.05 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("sizes", "total"),
    [
        # Language models of InternVL2.5-8B and -1B (with its untied head): sums over the published shapes.
        (dict(vocab_size=92553, embed_dim=4096, num_layers=32, num_heads=32, num_kv_heads=8, mlp_dim=14336),
         7737782272),
        (dict(vocab_size=151674, embed_dim=896, num_layers=24, num_heads=14, num_kv_heads=2, mlp_dim=4864,
              qkv_bias=True), 629697920),
    ],
)  # fmt: skip
def test_parameter_counts_at_full_size(sizes, total):
    model = LanguageModel(LanguageModelConfig(**sizes))
    init = functools.partial(model.init, method="forward")
    params = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    assert sum(a.size for a in jax.tree.leaves(params)) == total


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_kv_heads", 3), ("num_heads", 5), ("vocab_size", 0), ("dtype", "int8"), ("remat", "some"), ("head_dim", 3)],
)
def test_bad_config_names_the_field(field, value):
    with pytest.raises(config.ConfigError, match=f"{field}.*{value}"):
        config.build(LanguageModelConfig, {field: value})


@pytest.mark.parametrize("tied", [False, True])
def test_some_logits_are_those_of_all(tied):
    cfg = dataclasses.replace(SMALL, tie_embeddings=tied)
    model = LanguageModel(cfg)
    init = jax.jit(functools.partial(model.init, method="forward"))
    params = init(jax.random.key(0), np.zeros((1, 2), np.int32))["params"]
    hidden = np.random.default_rng(1).normal(size=(2, 3, cfg.embed_dim)).astype(np.float32)
    whole = jax.jit(lambda p: model.apply({"params": p}, hidden, method="logits"))(params)
    some = jax.jit(lambda p: model.apply({"params": p}, hidden, 7, 5, method="some_logits"))(params)
    np.testing.assert_allclose(some, np.asarray(whole)[..., 7:12], rtol=0, atol=1e-6)
    assert np.abs(some).max() > 1e-3
