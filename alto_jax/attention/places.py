"""Attention over squares of positions with decomposed relative positions, as SAM's encoder has it: two kernels of
Pallas (Triton, NVIDIA GPUs), over windows and over the whole square.

The score of query (y, x) and key (y', x') is scale * q · k + by_row[y'] + by_column[x'], the last two rows of the
query's own. Within windows these are looked up in the query's products with all relative positions. Neither the scores
nor windows, with their padding, are ever written to memory. Biases cost nothing: that of the keys adds the same to all
scores of a query, that of the values is added to their mean. Gradients go through what the caller gives as the plain
form of the same attention.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alto_jax.attention import tiles
from alto_jax.parallel.sharding import activation_spec, traced_device

Array = jax.Array
_QUERIES = 64  # that one program takes: with more of them the H100 was slower, for want of registers


def why_not(dtype: Any, side: int, window: int, head_dim: int) -> str:
    """Why no kernel serves here for a square of `side` positions a side; "" if one does.

    Args:
      dtype: of queries, keys and values. side: positions along a side. window: that of a window; 0: the whole square.
      head_dim: Hd.
    """
    if reason := tiles.why_not(traced_device()):
        return reason
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"these kernels want bfloat16 or float16, got {dtype}"
    if head_dim not in (32, 64, 128):
        return f"these kernels want heads of 32, 64 or 128, got {head_dim}"
    if window:
        return "" if window <= 16 else f"the kernel of windows wants windows of at most 16, got {window}"
    fits = side in (16, 32, 64, 128)
    return "" if fits else f"the kernel of the whole square wants a side of 16, 32, 64 or 128, got {side}"


def attention(
    qkv: Array,
    bias: Array,
    relative: tuple[Array, ...],
    *,
    window: int,
    scale: float,
    plain: Callable[..., Array],
    interpret: bool = False,
) -> Array:
    """Attention within windows, or over the whole square.

    Args:
      qkv: [B, H, W, 3, N, Hd], queries, keys and values without their biases.
      bias: [3, N, Hd]; also the keys and values of what fills up windows at the lower and the right edge, which takes
        part.
      relative: (by_row, by_column) [B, H, W, N, K], what a query's score has more for each row and column of the
        square, K of them; with windows (products,) [B, H, W, N, C], of which `looked_up` takes them.
      window: positions along a side of a window; 0: no windows, H == W == K.
      scale: of the products of queries and keys.
      plain: the same attention as a function of qkv, bias and the arrays of `relative`, for gradients.
      interpret: run the kernel's program without a GPU, slowly.

    Returns:
      [B, H, W, N, Hd] in qkv's type.
    """
    one = functools.partial(_forward, window=window, scale=scale, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        # Note: the compiler cannot split a kernel; each device computes its rows and heads.
        spec = functools.partial(activation_spec, mesh=mesh)
        rows = spec(relative[0].shape, ("batch", None, None, "heads", None))
        whole = spec(qkv.shape, ("batch", None, None, None, "heads", None))
        specs = (whole, spec(bias.shape, (None, "heads", None)), *(rows for _ in relative))
        one = jax.shard_map(one, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)
    fused = jax.custom_vjp(one)
    fused.defvjp(lambda *given: (one(*given), given), lambda given, cotangent: jax.vjp(plain, *given)[1](cotangent))
    return fused(qkv, bias, *relative)


def looked_up(products: Array, window: int) -> tuple[Array, Array]:
    """(by_row, by_column) [B, H, W, N, K]: what a query's score has more for the K = `window` rows and columns of its
    window.

    Args:
      products: [B, H, W, N, C] of a query and the relative positions -(K-1) .. K-1 of rows, and then of columns.
      window: K.
    """
    keys = np.arange(window)

    def along(axis: int, first: int) -> Array:
        """What position 0.. along `axis` takes for each key, out of the products from `first`."""
        queries = np.arange(products.shape[axis])[:, None] % window
        index = (first + queries - keys + window - 1).reshape([-1 if i == axis else 1 for i in range(4)] + [window])
        return jnp.take_along_axis(products, jnp.broadcast_to(index, (*products.shape[:4], window)), axis=-1)

    return along(1, 0), along(2, 2 * window - 1)


def _forward(qkv: Array, bias: Array, *relative: Array, window: int, scale: float, interpret: bool) -> Array:
    from jax.experimental import pallas as pl  # late: Pallas takes as long to import as the rest of the model
    from jax.experimental.pallas import triton  # late: as above

    batch, height, width, _, num_heads, head_dim = qkv.shape
    sizes: dict[str, Any] = {
        "height": height,
        "width": width,
        "num_heads": num_heads,
        "head_dim": head_dim,
        "scale": scale,
    }
    if window:
        down, right = -(-height // window), -(-width // window)
        kernel = functools.partial(_windows, pl=pl, load=triton.load, store=triton.store, window=window,
                                   down=down, right=right, **sizes)  # fmt: skip
        tiles = -(-(window**2) // _QUERIES)
        grid, stages = (tiles, num_heads, batch * down * right), 2
    else:
        kernel = functools.partial(_whole, pl=pl, load=triton.load, store=triton.store, **sizes)
        grid, stages = (height * width // _QUERIES, num_heads, batch), 3
    flat = lambda x, *last: x.reshape(batch * height * width, *last)
    out = pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=jax.ShapeDtypeStruct((batch * height * width, num_heads * head_dim), qkv.dtype),
        compiler_params=None if interpret else triton.CompilerParams(num_warps=4, num_stages=stages),
        interpret=interpret,
        name="attention_of_windows" if window else "attention_of_squares",
    )(
        flat(qkv, 3 * num_heads * head_dim),
        bias.reshape(-1),
        *(flat(x, num_heads * x.shape[-1]) for x in relative),
    )
    return out.reshape(batch, height, width, num_heads, head_dim)


def _windows(
    qkv: Any, bias: Any, products: Any, out: Any, *, pl: Any, load: Any, store: Any, window: int, down: int, right: int,
    height: int, width: int, num_heads: int, head_dim: int, scale: float,
) -> None:  # fmt: skip
    """Some queries of one head of one window, and all its keys."""
    tile, head, which = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    sample, top = which // (down * right), which // right % down * window
    left = which % right * window

    def places(first: Any, count: int) -> tuple[Array, ...]:
        """Of `count` places from `first`: row and column in the window, the position's number, whether it is a place
        of the window, and whether it is one of the image."""
        number = first + jnp.arange(count)
        y, x = number // window, number % window
        inside = y < window
        real = inside & (top + y < height) & (left + x < width)
        return y, x, (sample * height + top + y) * width + left + x, inside, real

    columns = jnp.arange(head_dim)
    of = lambda part: (part * num_heads + head) * head_dim + columns
    row, column, queries, _, real_query = places(tile * _QUERIES, _QUERIES)

    def rows(part: int, numbers: Array, real: Array) -> Array:
        return load(qkv.at[numbers[:, None], of(part)[None]], mask=real[:, None], other=0.0)

    # Note: a product takes powers of two; 128, 64 and 16 keys apart took a quarter longer than 256 at once.
    count = max(16, 1 << (window**2 - 1).bit_length())
    key_row, key_column, keys, inside, real_key = places(0, count)
    q = rows(0, queries, real_query) + load(bias.at[of(0)])[None]
    score = tiles.dot(q, rows(1, keys, real_key).T) * scale
    # What a query's scores have more for 16 rows, then for 16 columns.
    place = jnp.arange(32)
    is_column, key = (place >= 16)[None], (place % 16)[None]
    offset = jnp.where(is_column, 2 * window - 1 + column[:, None], row[:, None]) - key + window - 1
    exists = real_query[:, None] & (key < window)
    first = head * (products.shape[1] // num_heads)
    more = load(products.at[queries[:, None], first + offset], mask=exists, other=0.0)
    chosen = (place[:, None] == key_row[None]) | (place[:, None] == 16 + key_column[None])
    score += tiles.dot(more, chosen.astype(more.dtype))
    score = jnp.where(inside[None], score, tiles.NEVER)
    weights = jnp.exp2((score - jnp.max(score, axis=1)[:, None]) * tiles.LOG2_E)
    found = tiles.dot(weights.astype(q.dtype), rows(2, keys, real_key)) / jnp.sum(weights, axis=1)[:, None]
    found += load(bias.at[of(2)])[None]
    store(out.at[queries[:, None], (head * head_dim + columns)[None]], found.astype(out.dtype),
          mask=real_query[:, None])  # fmt: skip


def _whole(
    qkv: Any, bias: Any, by_row: Any, by_column: Any, out: Any, *, pl: Any, load: Any, store: Any, height: int,
    width: int, num_heads: int, head_dim: int, scale: float,
) -> None:  # fmt: skip
    """Some queries of one head of one square; a step of the loop takes a row of keys."""
    tile, head, sample = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    columns = jnp.arange(head_dim)
    of = lambda part: (part * num_heads + head) * head_dim + columns
    first = sample * (height * width)
    queries = (first + tile * _QUERIES + jnp.arange(_QUERIES))[:, None]
    beside = load(by_column.at[queries, (head * width + jnp.arange(width))[None]]).astype(jnp.float32) * tiles.LOG2_E

    q = load(qkv.at[queries, of(0)[None]]).astype(jnp.float32) + load(bias.at[of(0)])[None].astype(jnp.float32)
    q = (q * (scale * tiles.LOG2_E)).astype(out.dtype)

    def step(y: Any, state: tuple[Array, ...]) -> tuple[Array, ...]:
        total, highest, found = state
        keys = (first + y * width + jnp.arange(width))[:, None]
        down = load(by_row.at[queries, (head * height + y + jnp.zeros(1, jnp.int32))[None]]).astype(jnp.float32)
        score = tiles.dot(q, load(qkv.at[keys, of(1)[None]]).T) + beside + down * tiles.LOG2_E
        top = jnp.maximum(highest, jnp.max(score, axis=1))
        weights, kept = jnp.exp2(score - top[:, None]), jnp.exp2(highest - top)
        found = found * kept[:, None] + tiles.dot(weights.astype(out.dtype), load(qkv.at[keys, of(2)[None]]))
        return total * kept + jnp.sum(weights, axis=1), top, found

    nothing = (jnp.zeros(_QUERIES), jnp.full(_QUERIES, tiles.NEVER), jnp.zeros((_QUERIES, head_dim)))
    total, _, found = jax.lax.fori_loop(0, height, step, nothing)
    found = found / total[:, None] + load(bias.at[of(2)])[None]
    store(out.at[queries, (head * head_dim + columns)[None]], found.astype(out.dtype))
