"""cuDNN's attention (NVIDIA GPUs), through `jax.nn.dot_product_attention`.

It takes masks over all heads and, for gradients, even lengths: others are padded by one.
"""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def capability(device: Any) -> tuple[int, ...] | None:
    """The compute capability of an NVIDIA GPU, (9, 0); None: another device."""
    said = str(getattr(device, "compute_capability", ""))
    # Note: AMD's devices are JAX's "gpu" too, and say "gfx90a".
    return tuple(map(int, said.split("."))) if re.fullmatch(r"\d+\.\d+", said) else None


def why_not(q: Any, k: Any, device: Any) -> str:
    """What of cuDNN's conditions does not hold for q [B, T, N, Hd] and k [B, S, K, Hd]; "" if all do."""
    said, found = getattr(device, "compute_capability", ""), capability(device)
    if found is None:
        return f"cuDNN's kernel wants an NVIDIA GPU, this device calls its capability {said!r}"
    widest = 256 if found >= (9, 0) else 128
    if found < (8, 0):
        return f"cuDNN's kernel wants compute capability 8.0, this device has {said}"
    if q.dtype not in (jnp.bfloat16, jnp.float16) or k.dtype != q.dtype:
        return f"cuDNN's kernel wants bfloat16 or float16, got {q.dtype} and {k.dtype}"
    if q.shape[-1] > widest:
        return f"cuDNN's kernel wants heads of at most {widest} here, got {q.shape[-1]}"
    return ""


def attention(q: Array, k: Array, v: Array, mask: Any, scale: float) -> Array:
    """As `seam.attention`; `mask` is its Mask."""
    even = functools.partial(_attention, mask=mask, scale=scale, even=True)
    if mask.segments is not None or mask.pairs is not None or not (q.shape[1] % 2 or k.shape[1] % 2):
        return even(q, k, v)
    # Note: only the backward pass refuses odd lengths, so that without gradients nothing is copied for the padding.
    either = jax.custom_vjp(functools.partial(_attention, mask=mask, scale=scale, even=False))
    either.defvjp(lambda *given: jax.vjp(even, *given), lambda pull, cotangent: pull(cotangent))
    return either(q, k, v)


def _attention(q: Array, k: Array, v: Array, *, mask: Any, scale: float, even: bool) -> Array:
    """`even`: lengths are padded to even ones, as gradients want them."""
    (batch, num_queries, num_heads, width), num_keys = q.shape, k.shape[1]
    wide, more_queries, more_keys = -width % 8, num_queries % 2 * even, num_keys % 2 * even
    padded = lambda x, rows: jnp.pad(x, ((0, 0), (0, rows), (0, 0), (0, wide))) if rows or wide else x
    q, k, v = padded(q, more_queries), padded(k, more_keys), padded(v, more_keys)
    options: dict[str, Any] = {}
    if mask.segments is None and mask.pairs is None:
        # Note: under a causal mask no query sees the keys that were added behind it.
        options["is_causal"] = mask.causal
        if more_keys and not mask.causal:
            options["key_value_seq_lengths"] = jnp.full((batch,), num_keys, jnp.int32)
    else:
        dense = jnp.broadcast_to(mask.dense(num_queries, num_keys), (batch, num_heads, num_queries, num_keys))
        options["mask"] = jnp.pad(dense, ((0, 0), (0, 0), (0, more_queries), (0, more_keys)))
    out = jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="cudnn", **options)
    return out[:, :num_queries, :, :width]
