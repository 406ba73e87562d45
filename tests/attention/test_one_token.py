"""One new token a row over a shared prompt and its own cache: as attention over the cache that was written before."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alto_jax.attention import one_token
from alto_jax.mllm.generate import GenerateConfig, Questions, generate
from alto_jax.mllm.language_model import KVCache, LanguageModel, prefix_attention
from tests.mllm.test_cache import BATCH, MODEL, SPECIAL, setting

ON_GPU = jax.default_backend() == "gpu"
DTYPE = jnp.bfloat16 if ON_GPU else jnp.float32
TOLERANCE = 2e-2 if ON_GPU else 1e-5


@pytest.mark.parametrize(
    "batch, group, length, size, heads, kv_heads, index",
    [(2, 3, 150, 20, 6, 2, 7), (1, 40, 128, 33, 4, 2, 32), (2, 1, 1, 1, 2, 2, 0)],
)
def test_kernels_equal_attention_over_the_updated_cache(batch, group, length, size, heads, kv_heads, index):
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=(*shape, 32)), DTYPE)
    rows, prefix_mask = batch * group, np.ones((batch, length), bool)
    prefix_mask[0, : length // 3] = False
    mask = np.broadcast_to(np.arange(size) <= index, (rows, size)).copy()
    mask[0, : index // 2] = False
    q, k, v = normal(rows, 1, heads), normal(rows, 1, kv_heads), normal(rows, 1, kv_heads)
    cached = normal(rows, size, kv_heads), normal(rows, size, kv_heads)
    prefix = normal(batch, length, kv_heads), normal(batch, length, kv_heads)

    @jax.jit
    def plain():
        cache = KVCache.of(*cached).write(jnp.int32(index), k, v)
        return prefix_attention(q, cache.k, cache.v, mask[:, None, None], *prefix, prefix_mask), (cache.k, cache.v)

    @jax.jit
    def fused():
        given = q, k, v, jnp.int32(index), jnp.asarray(mask), cached, prefix, jnp.asarray(prefix_mask)
        return one_token.attention(*given, interpret=not ON_GPU)

    (want, want_cache), (got, got_cache) = plain(), fused()
    assert got.dtype == want.dtype and got.shape == want.shape
    np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), atol=TOLERANCE)
    for one, two in zip(got_cache, want_cache):
        np.testing.assert_array_equal(one.astype(jnp.float32), two.astype(jnp.float32))


@pytest.mark.parametrize(
    "capability, dtypes, shape, reason",
    [("9.0", ("bfloat16",) * 3, (1, 20, 64), ""), ("7.5", ("float16",) * 3, (1, 20, 64), "7.5"),
     ("gfx90a", ("bfloat16",) * 3, (1, 20, 64), "NVIDIA"), ("9.0", ("float32",) * 3, (1, 20, 64), "float32"),
     ("9.0", ("bfloat16", "int8", "int8"), (1, 20, 64), "int8"), ("9.0", ("bfloat16",) * 3, (2, 20, 64), "got 2"),
     ("9.0", ("bfloat16",) * 3, (1, 300, 64), "got 300"), ("9.0", ("bfloat16",) * 3, (1, 20, 80), "got 80")],
)  # fmt: skip
def test_what_the_kernels_can(capability, dtypes, shape, reason, monkeypatch):
    device = types.SimpleNamespace(platform="gpu", compute_capability=capability)
    monkeypatch.setattr(one_token, "traced_device", lambda: device)
    tokens, size, width = shape
    shapes = (2, tokens, 4, width), (2, size, 2, width), (1, 50, 2, width)
    said = one_token.why_not(*(jax.ShapeDtypeStruct(s, t) for s, t in zip(shapes, dtypes)))
    assert reason in said if reason else said == ""


@pytest.mark.parametrize("asks", [False, True], ids=["prompts", "questions"])
def test_answers_are_those_of_plain_attention(asks, monkeypatch):
    """Also of rows with an end of their own behind a shared beginning, which may be padded."""
    params, ids, mask = setting()
    embed = lambda ids: params["embed"]["embedding"][ids]
    questions, calls = None, []
    if asks:
        asked = ids[:, :6].reshape(BATCH, 3, 2)
        questions = Questions(embed(asked), np.arange(2) >= np.array([[[0], [1], [0]], [[1], [0], [0]]]), asked)

    def answers(model):
        cfg = GenerateConfig(max_new_tokens=9)
        key = jax.random.key(0)
        return jax.device_get(generate(model, params, embed(ids), mask, cfg, SPECIAL, key, 3, questions=questions))

    want = answers(LanguageModel(MODEL.cfg.__class__(**{**vars(MODEL.cfg), "attention": "xla"})))

    fused = functools.partial(one_token.attention, interpret=True)

    def called(*given):
        calls.append(given)
        return fused(*given)

    monkeypatch.setattr(one_token, "why_not", lambda q, *_: "" if q.shape[1] == 1 else "more tokens")
    monkeypatch.setattr(one_token, "attention", called)
    got = answers(MODEL)
    assert len(calls) == MODEL.cfg.num_layers
    np.testing.assert_array_equal(got.ids, want.ids)
    np.testing.assert_allclose(got.per_token_logps, want.per_token_logps, rtol=1e-4, atol=1e-4)
    assert len(np.unique(got.ids)) > 5
