"""SAM encoder, its preprocessing and the resizes, against the reference (reference/NUMERICS.md §4)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alto_jax.tokenizer.resize import resize, torch_bicubic_matrix, torch_linear_matrix
from alto_jax.tokenizer.sam_encoder import (
    SamEncoder,
    SamEncoderConfig,
    merge_windows,
    mllm_to_sam,
    mllm_to_unit,
    partition_windows,
    relative_positions,
    sam_preprocess,
)
from tests.golden_io import golden
from tests.golden_models import (
    ALTO_CONFIG,
    alto_params,
    assert_golden,
    golden_weights,
    nhwc,
    random_params,
    sam_features,
)

CONFIG = ALTO_CONFIG.sam
TINY = SamEncoderConfig(
    image_size=24,
    patch_size=4,
    embed_dim=8,
    depth=2,
    num_heads=2,
    global_attn_indexes=(1,),
    window_size=4,
    out_channels=4,
)


def run(cfg, params, image, **kwargs):
    return jax.jit(lambda p, x: SamEncoder(cfg).apply({"params": p}, x, **kwargs))(params, image)


@pytest.fixture(scope="module")
def image():
    return sam_preprocess(nhwc(golden("sam_encoder")["image"]), CONFIG.image_size)


def test_encoder_matches_reference_block_by_block(image):
    fixture = golden("sam_encoder")
    out, hidden = run(CONFIG, alto_params()["sam_encoder"], image, return_hidden=True)
    assert_golden("sam_encoder", "block1", hidden[2][:, ::2, ::2], fixture["block1"])
    assert_golden("sam_encoder", "block2", hidden[3][:, ::2, ::2], fixture["block2"])
    assert_golden("sam_encoder", "out", out, nhwc(fixture["out"]))


def test_encoder_of_other_sizes():
    """Ten patches in windows of four: the last windows are padded."""
    sizes = {"patch_size": 8, "embed_dim": 48, "num_heads": 3, "out_chans": 16, "img_size": 80, "window_size": 4,
             "depth": 2, "global_attn_indexes": [1]}  # fmt: skip
    fixture = golden("sam_grid10")
    out = sam_features(sizes, golden_weights("sam_grid10"), fixture["x"])
    assert_golden("sam_grid10", "out", out, fixture["out"])


def test_official_form_with_scaled_tables_is_the_references_form(image):
    """ALTo's attention equals the official one with both tables times Hd^-0.5."""
    scale = (CONFIG.embed_dim // CONFIG.num_heads) ** -0.5
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * scale if "rel_pos" in path[-1].key else leaf, alto_params()["sam_encoder"]
    )
    out = run(dataclasses.replace(CONFIG, scaled_rel_pos_query=False), params, image)
    assert_golden("sam_encoder", "out", out, nhwc(golden("sam_encoder")["out"]))


def test_relative_positions_match_reference():
    fixture = golden("sam_rel_pos")
    table = jnp.asarray(fixture["rel_pos"])
    for key, sizes in (("same14", (14, 14)), ("interp10", (10, 10)), ("q4k14", (4, 14))):
        assert_golden("sam_rel_pos", key, relative_positions(*sizes, table), fixture[key])


def test_preprocessing_matches_reference():
    fixture = golden("sam_preprocess")
    image = nhwc(fixture["x01"]) * 255
    assert_golden(
        "sam_preprocess", "preprocess_of_255x", sam_preprocess(image, 64), nhwc(fixture["preprocess_of_255x"])
    )
    with pytest.raises(ValueError, match="at most 39 x 39 pixels, got 40 x 30"):
        sam_preprocess(image, 39)


def test_mllm_tile_becomes_the_references_sam_input():
    fixture = golden("sam_preprocess")
    small = nhwc(fixture["small_in"])
    assert_golden("sam_preprocess", "small_to_64", mllm_to_unit(small, 64), nhwc(fixture["small_to_64"]))
    assert_golden("sam_preprocess", "small_to_17", mllm_to_unit(small, 17), nhwc(fixture["small_to_17"]))
    unit = nhwc(fixture["small_to_64"])
    assert unit.max() > 1, "the fixture should overshoot, or clipping would go unnoticed"
    np.testing.assert_allclose(
        jax.jit(mllm_to_sam, static_argnums=1)(small, 64), sam_preprocess(unit * 255, 64), atol=3e-5
    )


def test_resize_matrices():
    for matrix in (torch_bicubic_matrix(7, 16), torch_linear_matrix(16, 5)):
        np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(torch_bicubic_matrix(9, 9), np.eye(9))
    # By hand: doubling puts samples at -0.25 and 0.25 of the first pixel; the edge is clamped.
    np.testing.assert_allclose(torch_linear_matrix(2, 4), [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    with pytest.raises(ValueError, match="method"):
        resize(jnp.zeros((1, 2, 2, 1)), 4, 4, "nearest")


def test_windows_round_trip_with_padding():
    x = jnp.arange(2 * 5 * 7 * 3, dtype=jnp.float32).reshape(2, 5, 7, 3)
    windows = partition_windows(x, 4)
    assert windows.shape == (2 * 2 * 2, 4, 4, 3)
    np.testing.assert_array_equal(windows[1, :, :3], x[0, :4, 4:])
    np.testing.assert_array_equal(windows[1, :, 3], 0)
    np.testing.assert_array_equal(merge_windows(windows, 5, 7), x)


def test_remat_gives_the_same_gradient_and_bfloat16_is_close():
    image = np.random.default_rng(0).normal(size=(1, 24, 24, 3)).astype(np.float32)
    params = random_params(SamEncoder(TINY), image)

    def loss(cfg):
        def mean_cube(p):
            out = SamEncoder(cfg).apply({"params": p}, image)
            return jnp.mean(out**3), out

        return jax.jit(jax.value_and_grad(mean_cube, has_aux=True))(params)

    (_, out), grads = loss(TINY)
    (_, out_remat), grads_remat = loss(dataclasses.replace(TINY, remat="full"))
    np.testing.assert_allclose(out, out_remat, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, grads_remat)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))

    half = run(dataclasses.replace(TINY, dtype="bfloat16"), params, image)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), out, atol=0.3)
    assert np.sqrt(np.mean(np.square(half.astype(jnp.float32) - out))) < 0.05


@pytest.mark.parametrize("remat", ["none", "full"])
def test_segments_that_repeat_are_one_loop_with_the_same_results(remat):
    cfg = dataclasses.replace(TINY, depth=6, global_attn_indexes=(2, 5), remat=remat)
    image = np.random.default_rng(1).normal(size=(1, 24, 24, 3)).astype(np.float32)
    params = random_params(SamEncoder(cfg), image)

    def loss(p, image, block_by_block):
        out = SamEncoder(cfg).apply({"params": p}, image, return_hidden=block_by_block)
        out = out[0] if block_by_block else out
        return jnp.mean(out**3), out

    results, softmaxes = {}, {}
    for block_by_block in (False, True):
        function = jax.value_and_grad(loss, has_aux=True)
        traced = jax.jit(function, static_argnums=2).trace(params, image, block_by_block)
        softmaxes[block_by_block] = str(traced.jaxpr).count(" reduce_max")  # As many as there are bodies of blocks.
        results[block_by_block] = traced.lower().compile()(params, image)
    assert softmaxes[True] == 3 * softmaxes[False] > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *results.values())
    assert cfg.period() == [(False, 2), (True, 1)] and SamEncoderConfig().period() == [(False, 5), (True, 1)]
    assert TINY.period() == [] and dataclasses.replace(cfg, global_attn_indexes=(1, 5)).period() == []


@pytest.mark.parametrize(
    ("field", "value"),
    [("image_size", 30), ("num_heads", 3), ("global_attn_indexes", (1, 2)), ("global_attn_indexes", (1, 0))],
)
def test_config_names_the_wrong_field(field, value):
    with pytest.raises(ValueError, match="embed_dim" if field == "num_heads" else field):
        dataclasses.replace(TINY, **{field: value})
