"""The KV cache: an int8 cache answers like a float one in half the memory, and no cache is ever copied."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alto_jax.layers import unstacked
from alto_jax.mllm import generate as generation
from alto_jax.mllm.generate import GenerateConfig, bucket_length, generate
from alto_jax.mllm.language_model import KVCache, LanguageModel, LanguageModelConfig
from tests.mllm.test_generate import SPECIAL, VOCAB

MODEL = LanguageModel(LanguageModelConfig(VOCAB, embed_dim=128, num_layers=3, num_heads=4, num_kv_heads=2, mlp_dim=128))
BATCH, PROMPT = 2, 12


@functools.cache
def setting():
    """Parameters with clear-cut logits, left-padded prompts and their mask."""
    init = jax.jit(functools.partial(MODEL.init, method="forward"))
    params = init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    scale = lambda path: 2 if "layers" in jax.tree_util.keystr(path) else 6
    params = jax.tree_util.tree_map_with_path(lambda p, a: np.asarray(a) * (scale(p) if a.ndim > 1 else 1), params)
    ids = np.random.default_rng(0).integers(32, VOCAB, (BATCH, PROMPT))
    return params, ids, np.arange(PROMPT) >= np.array([[0], [5]])


def nbytes(cache) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))


def test_int8_keeps_what_is_written():
    cfg = MODEL.cfg
    rng = np.random.default_rng(1)
    k, v = (rng.normal(size=(2, 3, 2, 32)).astype(np.float32) * scale for scale in (5.0, 0.01))
    v[0, 1] = 0
    empty = unstacked(KVCache.create(cfg, 2, 8, "int8"), cfg.num_layers)[1]
    cache = empty.write(jnp.int32(4), k, v)
    got_k, got_v = cache.values(jnp.float32)
    for got, want in ((got_k, k), (got_v, v)):
        step = np.abs(want).max(axis=-1, keepdims=True) / 127
        assert np.all(np.abs(got[:, 4:7] - want) <= 0.5 * step + 1e-9)
        assert not np.any(got[:, :4]) and not np.any(got[:, 7:])
    # Hd bytes and a scale against 2 Hd bytes; at the heads of real models (Hd 128) 0.52.
    sizes = {dtype: nbytes(KVCache.create(cfg, 2, 8, dtype)) for dtype in ("model", "bfloat16", "int8")}
    assert sizes["model"] == 2 * sizes["bfloat16"]
    assert sizes["int8"] / sizes["bfloat16"] == (32 + 4) / (2 * 32)


@pytest.mark.parametrize("num_samples", [None, 3])
def test_int8_answers_like_float(num_samples):
    params, ids, mask = setting()
    embedded = params["embed"]["embedding"][ids]

    def run(dtype):
        cfg = GenerateConfig(max_new_tokens=10, cache_dtype=dtype)
        return jax.device_get(generate(MODEL, params, embedded, mask, cfg, SPECIAL, jax.random.key(0), num_samples))

    exact, rounded = run("model"), run("int8")
    np.testing.assert_array_equal(rounded.ids, exact.ids)
    difference = np.abs(rounded.per_token_logps - exact.per_token_logps)
    assert 0 < difference.max() < 0.05
    assert len(np.unique(exact.ids)) > 5


def test_the_caches_are_updated_in_place():
    """What the compiled call allocates beside its arguments holds both caches about once."""
    params, ids, mask = setting()
    embedded, length = params["embed"]["embedding"][ids], 2000
    cfg = GenerateConfig(max_new_tokens=length, grammar=True)
    start = jnp.zeros(BATCH, bool), jnp.zeros(BATCH, jnp.int32)
    keys = jax.random.split(jax.random.key(0), BATCH)
    args = params, embedded, mask, start, cfg.controls(), keys
    compiled = generation._generate.lower(MODEL, cfg.static(), SPECIAL, 4, *args).compile()
    cache = nbytes(jax.eval_shape(lambda: KVCache.create(MODEL.cfg, 4 * BATCH, length)))
    assert cache < compiled.memory_analysis().temp_size_in_bytes < 1.5 * cache


def test_prompts_of_a_bucket_share_a_program():
    assert [bucket_length(n) for n in (1, 31, 32, 33, 316)] == [32, 32, 32, 64, 320]
    params, _, _ = setting()
    rng = np.random.default_rng(2)

    def run(length):
        padded = bucket_length(length)
        ids = np.pad(rng.integers(32, VOCAB, (1, length)), ((0, 0), (padded - length, 0)))
        mask = np.arange(padded)[None] >= padded - length
        cfg = GenerateConfig(max_new_tokens=3)
        generate(MODEL, params, params["embed"]["embedding"][ids], mask, cfg, SPECIAL, jax.random.key(0))
        return generation._generate._cache_size()

    first = run(20)
    assert run(3) == run(32) == run(27) == first
    assert run(33) == run(60) == first + 1
