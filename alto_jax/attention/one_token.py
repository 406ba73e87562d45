"""Attention of one new token a row over a prompt that rows share and over the row's own earlier tokens, whose cache
takes the new one on the way: two kernels of Pallas (Triton, NVIDIA GPUs) instead of a dozen small ones.

The first takes a part of the prompt's keys for all rows that share them, so that these are read once, and leaves each
part's sums; the second, for one row, adds its own keys and the parts. Both keep the sums of a softmax (float32) as
flash attention does, whose source is FlashAttention-2 and its split form for decoding (Dao 2023).
"""

from typing import Any

import jax
import jax.numpy as jnp

from alto_jax.attention import tiles
from alto_jax.parallel.sharding import traced_device

Array = jax.Array
_KEYS = 128  # of the prompt, that one program takes
_QUERIES = 64  # of them, at most


def why_not(q: Any, cached: Any, prefix: Any) -> str:
    """Why these kernels do not serve here; "" if they do.

    Args:
      q: [R, T, N, Hd]; cached: [R, S, K, Hd]; prefix: [B, P, K, Hd], arrays or what has their shape and dtype.
    """
    if reason := tiles.why_not(traced_device()):
        return reason
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        return f"these kernels want one device, not a mesh of {mesh.size}"
    if q.shape[1] != 1:
        return f"these kernels want one token a row, got {q.shape[1]}"
    if q.dtype not in (jnp.bfloat16, jnp.float16) or cached.dtype != q.dtype or prefix.dtype != q.dtype:
        return f"these kernels want bfloat16 or float16 throughout, got {q.dtype}, {cached.dtype} and {prefix.dtype}"
    if q.shape[-1] not in (32, 64, 128):
        return f"these kernels want heads of 32, 64 or 128, got {q.shape[-1]}"
    return "" if cached.shape[1] <= 256 else f"these kernels want a cache of at most 256 keys, got {cached.shape[1]}"


def attention(
    q: Array, k: Array, v: Array, index: Array, mask: Array, cached: tuple[Array, Array], prefix: tuple[Array, Array],
    prefix_mask: Array, *, interpret: bool = False,
) -> tuple[Array, tuple[Array, Array]]:  # fmt: skip
    """One softmax over the keys of the prefix, of the cache and of the new token; the cache gets the new token.

    Args:
      q: [R, 1, N, Hd], R = B * G rows, row b*G + g of prefix b.
      k, v: [R, 1, K, Hd], those of the new tokens; N is a multiple of K.
      index: int32 scalar, where the cache takes them.
      mask: bool, broadcastable to [R, S]: which keys of the cache, the new one among them, a row may attend to.
      cached: keys and values [R, S, K, Hd].
      prefix: keys and values [B, P, K, Hd].
      prefix_mask: bool[B, P], False: padding.
      interpret: run the kernels' programs without a GPU, slowly.

    Returns:
      ([R, 1, N, Hd] in q's type, the cache's keys and values).
    """
    from jax.experimental import pallas as pl  # late: Pallas takes as long to import as the rest of the model
    from jax.experimental.pallas import triton  # late: as above

    (rows, _, num_heads, width), (_, size, num_kv_heads, _) = q.shape, cached[0].shape
    batch, length = prefix[0].shape[:2]
    group, ratio = rows // batch, num_heads // num_kv_heads
    scale = width**-0.5 * tiles.LOG2_E
    own_ratio = max(16, _power(ratio))  # a matrix unit takes no fewer rows
    parts, tile = -(-length // _KEYS), min(_QUERIES, max(16, _power(group * ratio)))
    shared = -(-group * ratio // tile)  # tiles of the queries that share a key
    options = None if interpret else triton.CompilerParams(num_warps=4, num_stages=2)

    def of_prefix(q: Any, keys: Any, values: Any, real: Any, out: Any, highest: Any, total: Any) -> None:
        """`_KEYS` keys of one head of one prefix, and `tile` of the queries."""
        part, head, which = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        columns = jnp.arange(width)[None]
        sample = which // shared
        query = which % shared * tile + jnp.arange(tile)
        exists = query < group * ratio
        row, query_head = sample * group + query // ratio, head * ratio + query % ratio
        key = part * _KEYS + jnp.arange(_KEYS)
        inside = key < length
        at = ((sample * length + key) * num_kv_heads + head)[:, None], columns
        wanted = triton.load(q.at[(row * num_heads + query_head)[:, None], columns], mask=exists[:, None], other=0.0)
        score = tiles.dot(wanted, triton.load(keys.at[at], mask=inside[:, None], other=0.0).T) * scale
        seen = triton.load(real.at[sample * length + key], mask=inside, other=0) > 0
        score = jnp.where(seen[None], score, tiles.NEVER)
        top = jnp.max(score, axis=1)
        weights = jnp.where(inside[None], jnp.exp2(score - top[:, None]), 0.0)
        found = tiles.dot(weights.astype(wanted.dtype), triton.load(values.at[at], mask=inside[:, None], other=0.0))
        place = (part * rows + row) * num_heads + query_head
        triton.store(out.at[place[:, None], columns], found, mask=exists[:, None])
        triton.store(highest.at[place], top, mask=exists)
        triton.store(total.at[place], jnp.sum(weights, axis=1), mask=exists)

    def of_row(q: Any, k: Any, v: Any, index: Any, seen: Any, found: Any, highest: Any, total: Any, keys: Any,
               values: Any, out: Any, new_keys: Any, new_values: Any) -> None:  # fmt: skip
        """One row's own keys of one head, what the parts of its prefix gave, and the cache's new place."""
        head, row = pl.program_id(0), pl.program_id(1)
        query, columns = jnp.arange(own_ratio), jnp.arange(width)[None]
        exists = query < ratio
        place = row * num_heads + head * ratio + query
        wanted = triton.load(q.at[place[:, None], columns], mask=exists[:, None], other=0.0)
        key, now = jnp.arange(max(16, _power(size))), index[0]
        at, inside = ((row * size + key) * num_kv_heads + head)[:, None], key < size
        own = row * num_kv_heads + head

        def with_new(cache: Any, new: Any, updated: Any) -> Array:
            latest = triton.load(new.at[own, columns[0]])[None]
            triton.store(updated.at[((row * size + now) * num_kv_heads + head), columns[0]], latest[0])
            earlier = triton.load(cache.at[at, columns], mask=(inside & (key != now))[:, None], other=0.0)
            return jnp.where((key == now)[:, None], latest, earlier)

        score = tiles.dot(wanted, with_new(keys, k, new_keys).T) * scale
        allowed = triton.load(seen.at[row * size + key], mask=inside, other=0) > 0
        score = jnp.where(allowed[None], score, tiles.NEVER)
        top = jnp.max(score, axis=1)
        weights = jnp.where(inside[None], jnp.exp2(score - top[:, None]), 0.0)
        sums = tiles.dot(weights.astype(wanted.dtype), with_new(values, v, new_values)), jnp.sum(weights, axis=1), top

        def add(part: Any, state: tuple[Array, ...]) -> tuple[Array, ...]:
            sum_, count, top = state
            there = part * (rows * num_heads) + place
            other = triton.load(highest.at[there], mask=exists, other=tiles.NEVER)
            more = triton.load(found.at[there[:, None], columns], mask=exists[:, None], other=0.0)
            new_top = jnp.maximum(top, other)
            kept, added = jnp.exp2(top - new_top), jnp.exp2(other - new_top)
            count = count * kept + triton.load(total.at[there], mask=exists, other=0.0) * added
            return sum_ * kept[:, None] + more * added[:, None], count, new_top

        sum_, count, _ = jax.lax.fori_loop(0, parts, add, sums)
        triton.store(out.at[place[:, None], columns], (sum_ / count[:, None]).astype(out.dtype), mask=exists[:, None])

    flat = lambda x: x.reshape(-1, width)
    shapes = [(parts * rows * num_heads, width), (parts * rows * num_heads,), (parts * rows * num_heads,)]
    found = pl.pallas_call(
        of_prefix,
        grid=(parts, num_kv_heads, batch * shared),
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        interpret=interpret,
        name="attention_to_prefix",
        compiler_params=options,
    )(flat(q), *map(flat, prefix), prefix_mask.astype(jnp.int8).reshape(-1))
    seen = jnp.broadcast_to(mask, (rows, size)).astype(jnp.int8).reshape(-1)
    caches = [flat(x) for x in cached]
    out, *caches = pl.pallas_call(
        of_row,
        grid=(num_kv_heads, rows),
        out_shape=[jax.ShapeDtypeStruct((rows * num_heads, width), q.dtype),
                   *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in caches)],
        input_output_aliases={8: 1, 9: 2},
        interpret=interpret,
        name="attention_of_row",
        compiler_params=options,
    )(flat(q), flat(k), flat(v), jnp.reshape(index, 1), seen, *found, *caches)  # fmt: skip
    return out.reshape(q.shape), (caches[0].reshape(cached[0].shape), caches[1].reshape(cached[1].shape))


def _power(count: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << (count - 1).bit_length()
