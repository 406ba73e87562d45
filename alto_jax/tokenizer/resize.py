"""Image resizing exactly as `torch.nn.functional.interpolate(..., align_corners=False, antialias=False)`.

A resize along one axis is a matrix product, so a resize inside a jitted function is two small products
with constant matrices. Used for images (MLLM tile → SAM input), position embeddings and relative-position
tables.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def _source_positions(in_size: int, out_size: int) -> np.ndarray:
    """Centres of the output samples in input coordinates, float64[out]."""
    if in_size < 1 or out_size < 1:
        raise ValueError(f"resize: expected sizes of at least 1, got {in_size} and {out_size}")
    return (np.arange(out_size) + 0.5) * (in_size / out_size) - 0.5


def _matrix(in_size: int, taps: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Adds weights [out, taps] up at the columns taps [out, taps], clamped to the edge: float32[out, in]."""
    matrix = np.zeros((len(taps), in_size))
    np.add.at(matrix, (np.arange(len(taps))[:, None], np.clip(taps, 0, in_size - 1)), weights)
    matrix = matrix.astype(np.float32)
    matrix.setflags(write=False)
    return matrix


@functools.lru_cache(maxsize=64)
def torch_bicubic_matrix(in_size: int, out_size: int) -> np.ndarray:
    """Cubic-convolution weights with a = -0.75, edge clamp and no antialiasing: float32[out, in] (read-only)."""
    a = -0.75
    position = _source_positions(in_size, out_size)
    first = np.floor(position)
    t = (position - first)[:, None]

    def near(x: np.ndarray) -> np.ndarray:
        return ((a + 2) * x - (a + 3)) * x * x + 1

    def far(x: np.ndarray) -> np.ndarray:
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

    weights = np.concatenate([far(t + 1), near(t), near(1 - t), far(2 - t)], axis=1)
    return _matrix(in_size, first.astype(np.int64)[:, None] + np.arange(-1, 3), weights)


@functools.lru_cache(maxsize=64)
def torch_linear_matrix(in_size: int, out_size: int) -> np.ndarray:
    """Weights of linear (and, on both axes, bilinear) interpolation: float32[out, in] (read-only)."""
    position = np.maximum(_source_positions(in_size, out_size), 0.0)
    first = np.floor(position)
    t = (position - first)[:, None]
    return _matrix(in_size, first.astype(np.int64)[:, None] + np.arange(2), np.concatenate([1 - t, t], axis=1))


def resize(image: Array, height: int, width: int, method: Literal["bicubic", "bilinear"]) -> Array:
    """Resizes images or feature maps.

    Args:
      image: float[..., H, W, D].
      height, width: new size.
      method: "bicubic" (may overshoot the input's range: nothing is clipped) or "bilinear".

    Returns:
      float32[..., height, width, D].
    """
    matrices = {"bicubic": torch_bicubic_matrix, "bilinear": torch_linear_matrix}
    if method not in matrices:
        raise ValueError(f"method: expected one of {tuple(matrices)}, got {method!r}")
    image = image.astype(jnp.float32)
    # Note: the accelerators' default precision for float32 products has 8 bits, as many as a pixel.
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    if image.shape[-2] != width:
        image = product("vw,...hwd->...hvd", jnp.asarray(matrices[method](image.shape[-2], width)), image)
    if image.shape[-3] != height:
        image = product("uh,...hwd->...uwd", jnp.asarray(matrices[method](image.shape[-3], height)), image)
    return image
