"""Attention: every implementation that a machine has gives the same outputs and gradients, for every kind of mask.

The TPU's kernel runs here in Pallas's interpreter; cuDNN's runs where there is such a GPU. What a TPU would run is
compiled for a topology in tests/plan.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alto_jax.attention import cudnn, seam, splash
from alto_jax.tokenizer import sam_encoder

ON_GPU = jax.default_backend() == "gpu"
LENGTH = 70
SEGMENTS = np.r_[[1] * 20, [2] * 33, [0] * 17]
STATIC = (np.arange(LENGTH) < 40) | (np.arange(LENGTH) <= np.arange(LENGTH)[:, None])
SPARSE = (np.arange(LENGTH) % 7 < 5) | np.eye(LENGTH, dtype=bool)
MASKS = {
    "full": lambda: seam.Mask(),
    "causal": lambda: seam.Mask(causal=True),
    "packed": lambda: seam.Mask(causal=True, segments=jnp.asarray(np.stack([SEGMENTS, np.roll(SEGMENTS, 9)]))),
    "padded": lambda: seam.Mask(segments=jnp.asarray(np.stack([SEGMENTS > 0, np.ones(LENGTH)]), jnp.int32)),
    "static": lambda: seam.Mask(pairs=STATIC[None, None]),
    "static and causal": lambda: seam.Mask(causal=True, pairs=SPARSE[None, None]),
}


def inputs(dtype, length=LENGTH, num_heads=4, num_kv_heads=2, width=16):
    rng = np.random.default_rng(0)
    make = lambda heads: jnp.asarray(rng.normal(size=(2, length, heads, width)), dtype)
    return make(num_heads), make(num_kv_heads), make(num_kv_heads), make(num_heads)


def softmax_attention(q, k, v, mask, scale):
    """By the definition, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = np.einsum("btnh,bsnh->bnts", q, k) * scale
    if mask is not None:
        scores = np.where(np.asarray(mask), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)


def with_gradients(kernel, q, k, v, out):
    """The result for random cotangents, and the gradients of q, k and v, in float32."""

    def both(q, k, v):
        result, back = jax.vjp(kernel, q, k, v)
        return result, *back(out.astype(result.dtype))

    return [np.asarray(x, np.float32) for x in jax.jit(both)(q, k, v)]


@pytest.mark.parametrize("name", MASKS)
def test_dense_masks_say_the_definition(name):
    q, k, v, _ = inputs(jnp.float32)
    mask = MASKS[name]()
    dense = mask.dense(LENGTH, LENGTH)
    expected = softmax_attention(q, k, v, dense, 0.2)
    np.testing.assert_allclose(seam.attention(q, k, v, mask=mask, scale=0.2), expected, atol=2e-6)
    whole = np.ones((LENGTH, LENGTH), bool) if dense is None else np.broadcast_to(dense, (2, 1, LENGTH, LENGTH))[1, 0]
    assert whole[5, 6] == ("causal" not in name and name != "packed")


@pytest.mark.parametrize("name", ["causal", "packed", "padded", "static and causal"])
def test_the_tpus_kernel(name):
    """Outputs and gradients, over a length that is padded, with grouped queries."""
    arrays = inputs(jnp.float32)
    mask = MASKS[name]()
    flash = with_gradients(lambda *qkv: splash.attention(*qkv, mask, 0.25, interpret=True), *arrays)
    plain = with_gradients(
        lambda *qkv: seam.attention(*qkv, mask=mask, scale=0.25, implementation="xla"), *arrays
    )  # fmt: skip
    for one, two in zip(flash, plain, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU with cuDNN")
@pytest.mark.parametrize("length", [LENGTH, LENGTH - 1])
@pytest.mark.parametrize("name", MASKS)
def test_cudnns_kernel(name, length):
    if length != LENGTH and name not in ("full", "causal"):
        pytest.skip("these masks are made for one length")
    arrays = inputs(jnp.bfloat16, length, width=20)
    mask = MASKS[name]()
    run = lambda how: with_gradients(lambda *qkv: seam.attention(*qkv, mask=mask, implementation=how), *arrays)
    for one, two in zip(run("flash"), run("xla"), strict=True):
        np.testing.assert_allclose(one, two, atol=2e-2 * np.abs(two).max(), rtol=2e-2)


def test_flash_where_nothing_can_says_why():
    arrays = inputs(jnp.float32)[:3]
    reason = "float32" if ON_GPU else "no such kernel for the platform 'cpu'"
    with pytest.raises(ValueError, match=f"'flash' is not possible here: .*{reason}"):
        seam.attention(*arrays, implementation="flash")
    assert not seam.is_flash("auto", jnp.float32, 64)


@pytest.mark.parametrize(
    "capability, dtype, width, reason",
    [("9.0", jnp.bfloat16, 256, ""), ("8.0", jnp.float16, 128, ""), ("8.0", jnp.bfloat16, 192, "at most 128"),
     ("7.5", jnp.float16, 64, "7.5"), ("gfx90a", jnp.bfloat16, 64, "an NVIDIA GPU"),
     ("", jnp.bfloat16, 64, "NVIDIA"), ("9.0", jnp.float32, 64, "float32")],
)  # fmt: skip
def test_what_cudnn_can(capability, dtype, width, reason):
    like = jax.ShapeDtypeStruct((1, 64, 1, width), dtype)
    said = cudnn.why_not(like, like, types.SimpleNamespace(compute_capability=capability))
    assert reason in said and bool(said) == bool(reason)


def test_the_tpus_kernel_wants_a_known_mask():
    like = jax.ShapeDtypeStruct((2, 64, 1, 64), jnp.bfloat16)
    assert splash.why_not(like, like, MASKS["static"]()) == ""
    assert "known before" in splash.why_not(like, like, seam.Mask(pairs=jnp.ones((2, 1, 64, 64), bool)))
    assert "all rows" in splash.why_not(like, like, seam.Mask(pairs=np.ones((2, 1, 64, 64), bool)))
    assert seam._kernel(like, like, seam.Mask())[0] is None or ON_GPU


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("window", [0, 4])
def test_sams_relative_positions_folded_into_wider_heads(scaled, window, monkeypatch):
    cfg = sam_encoder.SamEncoderConfig(
        image_size=96, patch_size=16, embed_dim=32, depth=1, num_heads=2, global_attn_indexes=(),
        scaled_rel_pos_query=scaled,
    )  # fmt: skip
    block = sam_encoder.SamBlock(cfg, window)
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(2, 6, 6, 32)), jnp.float32)
    shapes = jax.eval_shape(block.init, jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)

    def run(params):
        return jnp.sum(jnp.sin(block.apply({"params": params}, x)[0]))

    plain = jax.jit(jax.value_and_grad(run))(params)
    monkeypatch.setattr(seam, "is_flash", lambda *_: True)  # the wider heads, through whatever kernel is here
    wide = jax.jit(jax.value_and_grad(run))(params)
    for one, two in zip(jax.tree.leaves(plain), jax.tree.leaves(wide), strict=True):
        np.testing.assert_allclose(one, two, rtol=2e-4, atol=1e-5 * max(1, np.abs(two).max()))
