"""JAX's Splash attention (Pallas, TPUs): blocks of the score matrix, of which those that the mask forbids are skipped.

Over several devices each computes its rows and heads (`jax.shard_map`), since the compiler cannot split a kernel.
"""

import functools
from typing import Any

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

from alto_jax.parallel.sharding import activation_spec

Array = jax.Array
_LANES = 128
_BLOCK = 512


def why_not(q: Any, k: Any, mask: Any) -> str:
    """What of the kernel's conditions does not hold for q [B, T, N, Hd] and k [B, S, K, Hd]; "" if all do."""
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"the TPU's kernel wants bfloat16 or float32, got {q.dtype}"
    if mask.pairs is not None and not isinstance(mask.pairs, np.ndarray):
        return "the TPU's kernel wants a mask that is known before it runs, or segments"
    if mask.pairs is not None and mask.pairs.shape[:-2] != (1,) * (mask.pairs.ndim - 2):
        return "the TPU's kernel wants one mask for all rows and heads"
    return ""


def attention(q: Array, k: Array, v: Array, mask: Any, scale: float, *, interpret: bool = False) -> Array:
    """As `seam.attention`; `mask` is its Mask. `interpret`: run the kernel's program without a TPU, slowly."""
    local = functools.partial(_on_one_device, mask=mask, scale=scale, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return local(q, k, v, mask.segments)
    head_axes = activation_spec(k.shape, ("batch", None, "heads", None), mesh)
    if head_axes[2] != activation_spec(q.shape, ("batch", None, "heads", None), mesh)[2]:
        # Note: fewer key heads than devices: each device gets those of its query heads.
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    spec = activation_spec(q.shape, ("batch", None, "heads", None), mesh)
    rows = None if mask.segments is None else PartitionSpec(spec[0], None)
    split = jax.shard_map(local, mesh=mesh, in_specs=(spec, spec, spec, rows), out_specs=spec, check_vma=False)
    return split(q, k, v, mask.segments)


def _on_one_device(
    q: Array, k: Array, v: Array, segments: Array | None, *, mask: Any, scale: float, interpret: bool
) -> Array:
    num_queries, num_keys, num_heads = q.shape[1], k.shape[1], q.shape[2]
    more_queries, more_keys = -num_queries % _LANES, -num_keys % _LANES
    padded = lambda x, more: jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))).swapaxes(1, 2)
    ids = None
    if segments is None and mask.pairs is None and more_keys and not mask.causal:
        segments = jnp.zeros((q.shape[0], num_keys), jnp.int32)
    if segments is not None:
        numbers = lambda count, more: jnp.pad(segments[:, :count], ((0, 0), (0, more)), constant_values=-1)
        ids = kernels.SegmentIds(numbers(num_queries, more_queries), numbers(num_keys, more_keys))
    shape = (num_queries + more_queries, num_keys + more_keys)
    one: Any = masks.CausalMask(shape) if mask.causal else masks.FullMask(shape)
    if mask.pairs is not None:
        pairs = np.broadcast_to(mask.pairs.reshape(mask.pairs.shape[-2:]), (num_queries, num_keys))
        # Note: rows without any key would divide by nothing; those added see the first key, and nobody sees them.
        wide = np.pad(pairs, ((0, more_queries), (0, more_keys)))
        wide[num_queries:, 0] = True
        one = masks.NumpyMask(wide) if not mask.causal else masks.NumpyMask(wide & np.tri(*shape, dtype=bool))
    block = functools.partial(_largest_block, most=_BLOCK)
    query_block, key_block = block(shape[0]), block(shape[1])
    sizes = kernels.BlockSizes(
        block_q=query_block, block_kv=key_block, block_kv_compute=key_block, block_q_dkv=query_block,
        block_kv_dkv=key_block, block_kv_dkv_compute=key_block, block_q_dq=query_block, block_kv_dq=key_block,
    )  # fmt: skip
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([one] * num_heads), block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )
    q = q * jnp.asarray(scale, q.dtype)
    out = jax.vmap(kernel)(padded(q, more_queries), padded(k, more_keys), padded(v, more_keys), ids)
    return out.swapaxes(1, 2)[:, :num_queries]


def _largest_block(length: int, most: int) -> int:
    """The largest multiple of the lanes up to `most` that divides a length."""
    return next(size for size in range(min(most, length), 0, -_LANES) if length % size == 0)
