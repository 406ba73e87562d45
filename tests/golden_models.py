"""Weights of the reference's small models (tests/golden/*_weights.npz) as our parameters, and comparisons."""

import functools
from typing import Any

import jax
import numpy as np

from alto_jax.mllm.intern_vit import InternViTConfig
from alto_jax.tokenizer.alto import TokenizerConfig
from alto_jax.tokenizer.encoder import ViTConfig
from alto_jax.tokenizer.pixel_decoder import PixelDecoderConfig
from alto_jax.tokenizer.sam_encoder import SamEncoderConfig
from tests.golden_io import golden, tolerance
from tools.convert_torch_weights.mapping import import_state_dict

# The sizes of the fixtures, as their meta.json gives them.
ALTO_CONFIG = TokenizerConfig(
    mask_size=64,
    encoder=ViTConfig(embed_dim=64, num_layers=2, num_heads=4),
    decoder=ViTConfig(embed_dim=48, num_layers=2, num_heads=3),
    sam=SamEncoderConfig(
        image_size=256, embed_dim=48, depth=4, num_heads=4, global_attn_indexes=(2,), window_size=6, out_channels=32
    ),
    pixel_decoder=PixelDecoderConfig(z_channels=64, hidden_channels=32),
)
INTERNVIT_300M = InternViTConfig(image_size=56, embed_dim=32, num_layers=2, num_heads=4, mlp_dim=64)
INTERNVIT_6B = InternViTConfig(
    image_size=56,
    embed_dim=32,
    num_layers=2,
    num_heads=4,
    mlp_dim=64,
    norm_type="rms_norm",
    qkv_bias=False,
    qk_norm=True,
)


def golden_weights(name: str) -> dict[str, np.ndarray]:
    """The state dict of tests/golden/{name}_weights.npz (float32 as four planes of bytes, which zip better)."""

    def restore(array):
        if array.dtype != np.uint8:
            return array
        return np.ascontiguousarray(np.moveaxis(array, 0, -1)).view(np.float32)[..., 0]

    return {key: restore(array) for key, array in golden(f"{name}_weights").items()}


@functools.cache
def alto_params() -> dict[str, Any]:
    """Parameters of the tokenizer of ALTO_CONFIG."""
    return import_state_dict("alto", golden_weights("alto"), ALTO_CONFIG)


def random_params(module: Any, *args: Any) -> dict[str, Any]:
    """Parameters drawn with numpy, scaled by fan-in: initialising by jax compiles for seconds."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        offset = 1.0 if path[-1].key == "scale" else 0.0
        fan_in = np.prod(leaf.shape[:-1]) if path[-1].key == "kernel" else 16
        return (offset + rng.normal(size=leaf.shape) * max(fan_in, 1) ** -0.5).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(module.init, jax.random.key(0), *args)["params"])


def nhwc(array: np.ndarray) -> np.ndarray:
    """[B, D, H, W] → [B, H, W, D]."""
    return np.moveaxis(array, 1, -1)


def assert_golden(name: str, key: str, actual: Any, expected: np.ndarray) -> None:
    """Compares with fixture `name`, within the tolerance of its array `key`."""
    actual = np.asarray(actual)
    assert actual.shape == expected.shape, f"{name}.{key}: shape {actual.shape}, expected {expected.shape}"
    error = np.max(np.abs(actual.astype(np.float64) - expected))
    assert error <= tolerance(name, key), f"{name}.{key}: error {error:.3g}, tolerance {tolerance(name, key):.3g}"
