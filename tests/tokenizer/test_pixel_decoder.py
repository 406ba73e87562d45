"""Pixel decoder against the reference (reference/NUMERICS.md §3.6), and what we added to it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alto_jax.tokenizer.pixel_decoder import PixelDecoder, PixelDecoderConfig, ResBlock, depth_to_space
from tests.golden_io import golden
from tests.golden_models import ALTO_CONFIG, alto_params, assert_golden, nhwc, random_params

TINY = PixelDecoderConfig(z_channels=4, hidden_channels=4, channel_mult=(1,), num_res_blocks=1, out_patch=3)


def test_matches_reference():
    fixture = golden("pixel_decoder")
    decoder = PixelDecoder(ALTO_CONFIG.pixel_decoder)
    apply = jax.jit(lambda p, x: decoder.apply({"params": p}, x, return_hidden=True))
    out, hidden = apply(alto_params()["pixel_decoder"], nhwc(fixture["x"]))
    assert_golden("pixel_decoder", "mid1", hidden[2], nhwc(fixture["mid1"]))
    assert_golden("pixel_decoder", "up3", hidden[4][:, ::4, ::4], nhwc(fixture["up3"]))
    assert_golden("pixel_decoder", "out", out, nhwc(fixture["out"]))


def test_new_model_starts_at_one_half():
    x = np.random.default_rng(0).normal(size=(2, 5, 5, TINY.z_channels)).astype(np.float32)
    out, params = PixelDecoder(TINY).init_with_output(jax.random.key(1), x)
    assert out.shape == (2, 5 * TINY.upscale, 5 * TINY.upscale, 3) and TINY.upscale == 3
    np.testing.assert_allclose(out, 0.5, atol=0.05)
    assert np.std(out) > 0, "without any noise no gradient would pass the last convolution"
    assert params["params"]["conv_out"]["kernel"].shape == (3, 3, 4, 27)


def test_depth_to_space_fills_squares():
    x = jnp.arange(2 * 3 * 8).reshape(1, 2, 3, 8)  # r = 2, two channels
    out = depth_to_space(x, 2)
    assert out.shape == (1, 4, 6, 2)
    for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
        np.testing.assert_array_equal(out[:, dy::2, dx::2], x[..., 2 * (2 * dy + dx) :][..., :2])


def test_shortcut_of_a_block_that_changes_channels():
    """With conv2 at zero, h is 0: the reference's form then gives 0, the corrected one a projection of x."""
    x = np.random.default_rng(0).normal(size=(1, 3, 3, 8)).astype(np.float32)
    legacy, standard = TINY, dataclasses.replace(TINY, legacy_shortcut=False)
    for cfg, fan_in in ((legacy, 4), (standard, 8)):
        block = ResBlock(cfg, 4)
        params = random_params(block, x)
        kernel = params["nin_shortcut"]["kernel"]
        assert kernel.shape == (1, 1, fan_in, 4)
        params["conv2"]["kernel"] = np.zeros_like(params["conv2"]["kernel"])
        expected = 0 if cfg.legacy_shortcut else x @ kernel[0, 0]
        np.testing.assert_allclose(
            block.apply({"params": params}, x), jnp.broadcast_to(expected, (1, 3, 3, 4)), atol=1e-5
        )


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [("num_groups", 3, "num_groups"), ("channel_mult", (), "channel_mult"), ("out_patch", 0, "out_patch")],
)
def test_config_names_the_wrong_field(field, value, named):
    with pytest.raises(ValueError, match=named):
        dataclasses.replace(TINY, **{field: value})
