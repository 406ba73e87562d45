"""SAM's image encoder: normalised image [B, S, S, 3] → features [B, S/p, S/p, F], p the patch size.

A ViT with relative positions; most blocks attend within windows, a few over the whole image. Also the two
ways into it: `sam_preprocess` for images in 0..255 and `mllm_to_sam` for the tiles that the MLLM sees.
Source: Segment Anything (ICCV 2023), appendix A; reference/NUMERICS.md §4.
"""

from collections.abc import Callable
import dataclasses
import functools
import itertools
from typing import Any, Literal

import einops
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from alto_jax import layers
from alto_jax.attention import places, seam
from alto_jax.config import require
from alto_jax.parallel.sharding import constrain
from alto_jax.tokenizer.pixel_decoder import Conv
from alto_jax.tokenizer.resize import resize, torch_linear_matrix

Array = jax.Array

# Mean and standard deviation of RGB: SAM's in 0..255, ImageNet's (the MLLM's normalisation) in 0..1.
PIXEL_MEAN, PIXEL_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class SamEncoderConfig:
    """Sizes of the encoder; the defaults are SAM ViT-L, the one of ALTo.

    Attributes:
      image_size: S, pixels along a side.
      global_attn_indexes: the blocks that attend over the whole image.
      window_size: side of the windows of the other blocks, in patches.
      out_channels: F.
      scaled_rel_pos_query: Compat: the query is scaled by Hd^-0.5 before the relative-position terms too,
        as ALTo's weights expect (True); official SAM weights need the unscaled one (False).
      remat: what the backward pass keeps, see `layers.Stack`.
      attention: see `attention.seam`.
    """

    image_size: int = 1024
    patch_size: int = 16
    embed_dim: int = 1024
    depth: int = 24
    num_heads: int = 16
    mlp_ratio: int = 4
    global_attn_indexes: tuple[int, ...] = (5, 11, 17, 23)
    window_size: int = 14
    out_channels: int = 256
    scaled_rel_pos_query: bool = True
    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "full", "dots"] = "none"
    attention: Literal["auto", "xla", "flash"] = "auto"

    def __post_init__(self) -> None:
        for name in ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "window_size", "out_channels"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.image_size >= self.patch_size and self.image_size % self.patch_size == 0, "image_size",
                self.image_size, f"a multiple of patch_size {self.patch_size}")  # fmt: skip
        require(
            self.embed_dim % self.num_heads == 0, "embed_dim", self.embed_dim, f"a multiple of {self.num_heads} heads"
        )
        indexes = self.global_attn_indexes
        rising = list(indexes) == sorted(set(indexes)) and all(0 <= i < self.depth for i in indexes)
        require(rising, "global_attn_indexes", indexes, f"rising block numbers below depth {self.depth}")

    @property
    def grid(self) -> int:
        """Patches along a side of the image."""
        return self.image_size // self.patch_size

    @property
    def window_attn_indexes(self) -> tuple[int, ...]:
        """The blocks that attend within windows."""
        return tuple(i for i in range(self.depth) if i not in self.global_attn_indexes)

    def segments(self) -> list[tuple[bool, int]]:
        """The blocks in order of depth as runs of one kind: (is_global, number of blocks)."""
        kinds = (i in self.global_attn_indexes for i in range(self.depth))
        return [(kind, len(list(run))) for kind, run in itertools.groupby(kinds)]

    def period(self) -> list[tuple[bool, int]]:
        """The first two segments, if all others repeat them, as in SAM's published sizes; else nothing."""
        segments = self.segments()
        is_periodic = len(segments) > 2 and segments == segments[:2] * (len(segments) // 2)
        return segments[:2] if is_periodic else []


def relative_positions(query_size: int, key_size: int, table: Array) -> Array:
    """Looks up relative-position embeddings along one axis.

    Args:
      query_size, key_size: number of positions of queries and keys.
      table: float[R, Hd]; linearly resized to 2 * max(query_size, key_size) - 1 rows if it has another
        number.

    Returns:
      float[query_size, key_size, Hd].
    """
    rows = 2 * max(query_size, key_size) - 1
    if table.shape[0] != rows:
        matrix = jnp.asarray(torch_linear_matrix(table.shape[0], rows))
        resized = jnp.einsum("sr,rd->sd", matrix, table.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
        table = resized.astype(table.dtype)
    query = np.arange(query_size)[:, None] * max(key_size / query_size, 1.0)
    key = np.arange(key_size)[None] * max(query_size / key_size, 1.0)
    offset = query - key + (key_size - 1) * max(query_size / key_size, 1.0)
    return table[offset.astype(np.int32)]


def partition_windows(x: Array, window: int) -> Array:
    """[B, H, W, ...] → [B * windows, window, window, ...]; padded with zeros at the bottom and right."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % window), (0, -x.shape[2] % window), *((0, 0),) * (x.ndim - 3)))
    return einops.rearrange(x, "b (y h) (x w) ... -> (b y x) h w ...", h=window, w=window)


def merge_windows(x: Array, height: int, width: int) -> Array:
    """Inverse of `partition_windows`, without the padding: → [B, height, width, ...]."""
    rows, columns = (-(-side // x.shape[1]) for side in (height, width))
    x = einops.rearrange(x, "(b y x) h w ... -> b (y h) (x w) ...", y=rows, x=columns)
    return x[:, :height, :width]


class SamAttention(layers.Module):
    """Self-attention over a square of positions with decomposed relative positions: [B, H, W, D] → same.

    `window`: positions attend within windows of that side, which are filled up with zeros at the lower and the right
    edge; 0: over everything.
    """

    cfg: SamEncoderConfig
    window: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        cfg, window = self.cfg, self.window
        dtype, param_dtype = jnp.dtype(cfg.dtype), jnp.dtype(cfg.param_dtype)
        height, width, dim = x.shape[1:]
        num_heads, head_dim = cfg.num_heads, dim // cfg.num_heads
        dense = functools.partial(nn.DenseGeneral, dtype=dtype, param_dtype=param_dtype)
        project = layers.BiasApart((3, num_heads, head_dim), name="qkv", dtype=dtype, param_dtype=param_dtype)
        qkv, bias = project(x), project.bias()
        qkv = constrain(qkv, "batch", ..., "heads", None)
        rows = 2 * (window or cfg.grid) - 1
        tables = [
            self.param(f"rel_pos_{axis}", nn.initializers.zeros_init(), (rows, head_dim), param_dtype) for axis in "hw"
        ]
        rel_q = qkv[..., 0, :, :] + bias[0]
        if cfg.scaled_rel_pos_query:
            rel_q = rel_q * jnp.asarray(head_dim**-0.5, dtype)
        tables = [table.astype(dtype) for table in tables]
        widest = head_dim + (2 * window or height + width)
        is_flash = seam.is_flash(cfg.attention, dtype, widest)
        plain: Callable[..., Array] = functools.partial(
            _within_windows, window, self._folded if is_flash else _whole_scores
        )
        relative: tuple[Array, ...]
        has_kernel = is_flash and height == width and not places.why_not(dtype, height, window, head_dim)
        if has_kernel and window:
            # Note: one product of matrices; those with the positions of each query alone took three times as long.
            table = jnp.concatenate(tables)
            table = jnp.pad(table, ((0, -len(table) % 16), (0, 0)))
            relative = (jnp.einsum("byxnd,cd->byxnc", rel_q, table),)
            plain = functools.partial(_from_products, window, plain)
        else:
            relative = tuple(
                jnp.einsum(form, rel_q, _rows_of_windows(table, side, window), preferred_element_type=jnp.float32)
                for form, table, side in zip(("byxnd,yid->byxni", "byxnd,xjd->byxnj"), tables, (height, width))
            )
        if has_kernel:
            relative = tuple(a.astype(dtype) for a in relative)
            out = places.attention(qkv, bias, relative, window=window, scale=head_dim**-0.5, plain=plain)
        else:
            out = plain(qkv, bias, *relative)
        return dense(dim, axis=(-2, -1), name="out")(out)

    def _folded(self, qkv: Array, by_row: Array, by_column: Array) -> Array:
        """The same attention without a bias, so that any kernel serves: wider queries, [q, by_row, by_column], and
        wider keys, [k, one of the rows, one of the columns], have the whole score as their product.

        Args:
          qkv: [B, H, W, 3, N, Hd]; by_row: [B, H, W, N, H]; by_column: [B, H, W, N, W].
        """
        batch, height, width, _, num_heads, head_dim = qkv.shape
        q, k, v = qkv[..., 0, :, :], qkv[..., 1, :, :], qkv[..., 2, :, :]
        q = q * jnp.asarray(head_dim**-0.5, q.dtype)
        rows = jnp.broadcast_to(jnp.eye(height, dtype=k.dtype)[:, None, None], (height, width, 1, height))
        columns = jnp.broadcast_to(jnp.eye(width, dtype=k.dtype)[:, None], (height, width, 1, width))
        place = jnp.broadcast_to(
            jnp.concatenate([rows, columns], -1), (batch, height, width, num_heads, height + width)
        )
        flat = lambda x: x.reshape(batch, height * width, num_heads, x.shape[-1])
        wide = jnp.concatenate([q, by_row.astype(q.dtype), by_column.astype(q.dtype)], -1)
        v = flat(jnp.pad(v, ((0, 0),) * 4 + ((0, height + width),)))
        out = seam.attention(
            flat(wide), flat(jnp.concatenate([k, place], -1)), v, scale=1.0, implementation=self.cfg.attention
        )
        return out[..., :head_dim].reshape(batch, height, width, num_heads, head_dim)


def _rows_of_windows(table: Array, side: int, window: int) -> Array:
    """[side, K, Hd]: for each of `side` positions its relative positions to the K of its window (0: to all)."""
    found = relative_positions(window or side, window or side, table)
    return found[np.arange(side) % window] if window else found


def _whole_scores(qkv: Array, by_row: Array, by_column: Array) -> Array:
    """As `SamAttention._folded`, through the whole array of scores."""
    batch, height, width, _, num_heads, head_dim = qkv.shape
    q, k, v = qkv[..., 0, :, :], qkv[..., 1, :, :], qkv[..., 2, :, :]
    scaled = q * jnp.asarray(head_dim**-0.5, q.dtype)
    scores = jnp.einsum("byxnd,bijnd->bnyxij", scaled, k, preferred_element_type=jnp.float32)
    # Note: the bias is added as two broadcast terms; as one array it would be as large as the scores.
    scores += jnp.moveaxis(by_row, 3, 1)[..., None]
    scores += jnp.moveaxis(by_column, 3, 1)[..., None, :]
    probs = jax.nn.softmax(scores.reshape(batch, num_heads, height, width, height * width), axis=-1).astype(qkv.dtype)
    return jnp.einsum("bnyxs,bsnd->byxnd", probs, v.reshape(batch, height * width, num_heads, head_dim))


def _within_windows(
    window: int, attend: Callable[..., Array], qkv: Array, bias: Array, by_row: Array, by_column: Array
) -> Array:
    """`attend` within windows (0: over the whole) of queries, keys and values without their biases [3, N, Hd], see
    `attention.places`."""
    if not window:
        return attend(qkv + bias, by_row, by_column)
    # Compat: what fills up windows takes part in the attention: zeros before they are projected, biases after.
    windows = partition_windows(qkv, window) + bias
    out = attend(windows, *(partition_windows(x, window) for x in (by_row, by_column)))
    return merge_windows(out, *qkv.shape[1:3])


def _from_products(window: int, plain: Callable[..., Array], qkv: Array, bias: Array, products: Array) -> Array:
    """`plain` of what the queries' products with all relative positions hold for rows and columns."""
    return plain(qkv, bias, *places.looked_up(products, window))


class SamBlock(nn.Module):
    """Pre-norm block on [B, H, W, D], attending within windows (`window` > 0) or over everything (0).

    Returns (x, None), as `layers.Stack` wants it.
    """

    cfg: SamEncoderConfig
    window: int

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, None]:
        cfg = self.cfg
        types: dict[str, Any] = {"dtype": jnp.dtype(cfg.dtype), "param_dtype": jnp.dtype(cfg.param_dtype)}
        y = layers.layer_norm(1e-6, name="norm1", **types)(x)
        x = constrain(x + SamAttention(cfg, self.window, name="attn")(y), "batch", ...)
        y = layers.layer_norm(1e-6, name="norm2", **types)(x)
        return constrain(x + layers.Mlp(cfg.mlp_ratio * cfg.embed_dim, name="mlp", **types)(y), "batch", ...), None


class SamEncoder(layers.Module):
    """See the module's docstring.

    Blocks of a kind lie in one stack, in order of depth: "window_blocks" and "global_blocks".
    """

    cfg: SamEncoderConfig

    @layers.exact_in_float32
    @nn.compact
    def __call__(self, image: Array, return_hidden: bool = False) -> Array | tuple[Array, list[Array]]:
        """Encodes images.

        Args:
          image: float32[B, S, S, 3], normalised. Another size than cfg.image_size (a multiple of the patch
            size) has the position tables resized.
          return_hidden: also return the patch embedding and the result of every block (compiles each block
            alone).

        Returns:
          float[B, S/p, S/p, out_channels] in cfg.dtype; with the list if asked for.
        """
        cfg = self.cfg
        types: dict[str, Any] = {"dtype": jnp.dtype(cfg.dtype), "param_dtype": jnp.dtype(cfg.param_dtype)}
        if image.ndim != 4 or image.shape[1] % cfg.patch_size or image.shape[2] % cfg.patch_size:
            raise ValueError(f"image: expected [B, S, S, 3] with S a multiple of {cfg.patch_size}, got {image.shape}")
        x = layers.PatchEmbed(cfg.embed_dim, cfg.patch_size, name="patch_embed", **types)(image)
        position = self.param("position_embedding", nn.initializers.zeros_init(), (cfg.grid, cfg.grid, cfg.embed_dim),
                              types["param_dtype"])  # fmt: skip
        if x.shape[1:3] != position.shape[:2]:
            position = resize(position, x.shape[1], x.shape[2], "bicubic")
        x = constrain(x + position.astype(x.dtype), "batch", ...)

        def stack(window: int, num_layers: int, name: str) -> layers.Stack:
            return layers.Stack(functools.partial(SamBlock, cfg, window), num_layers, remat=cfg.remat, name=name)

        stacks = (
            stack(cfg.window_size, len(cfg.window_attn_indexes), "window_blocks"),
            stack(0, len(cfg.global_attn_indexes), "global_blocks"),
        )
        hidden, done, period = [x], [0, 0], cfg.period()
        if period and not (return_hidden or self.is_initializing()):
            x = layers.alternate(x, [stacks[kind] for kind, _ in period], [length for _, length in period])
        else:
            for is_global, length in cfg.segments():
                for step in [1] * length if return_hidden else [length]:
                    start = done[is_global]
                    x, _ = stacks[is_global](x, start=start, stop=start + step)
                    done[is_global] = start + step
                    hidden.append(x)

        conv: Callable[..., Conv] = functools.partial(Conv, cfg.out_channels, use_bias=False, **types)
        x = constrain(conv((1, 1), name="neck_conv1")(x), "batch", ...)
        x = layers.layer_norm(1e-6, name="neck_norm1", **types)(x)
        x = constrain(conv((3, 3), name="neck_conv2")(x), "batch", ...)
        x = layers.layer_norm(1e-6, name="neck_norm2", **types)(x)
        return (x, hidden) if return_hidden else x


def sam_preprocess(image: Array, size: int) -> Array:
    """Normalises images and pads them with zeros at the bottom and right to a square.

    Args:
      image: uint8 or float[B, H, W, 3], RGB in 0..255, H and W at most `size`.
      size: S.

    Returns:
      float32[B, S, S, 3].
    """
    height, width = image.shape[1:3]
    if height > size or width > size:
        raise ValueError(f"image: expected at most {size} x {size} pixels, got {height} x {width}")
    image = (image.astype(jnp.float32) - jnp.asarray(PIXEL_MEAN)) / jnp.asarray(PIXEL_STD)
    return jnp.pad(image, ((0, 0), (0, size - height), (0, size - width), (0, 0)))


def mllm_to_unit(pixel_values: Array, size: int) -> Array:
    """MLLM tiles [B, V, V, 3], ImageNet-normalised → RGB float32[B, S, S, 3] in about 0..1, S = size.

    Compat: PyTorch's bicubic resize, whose overshoots are not clipped.
    """
    return resize(pixel_values.astype(jnp.float32) * jnp.asarray(IMAGENET_STD) + jnp.asarray(IMAGENET_MEAN),
                  size, size, "bicubic")  # fmt: skip


def mllm_to_sam(pixel_values: Array, size: int) -> Array:
    """The SAM encoder's input made from what the MLLM sees.

    Args:
      pixel_values: float[B, V, V, 3], ImageNet-normalised.
      size: S.

    Returns:
      float32[B, S, S, 3], normalised for the SAM encoder.
    """
    return sam_preprocess(mllm_to_unit(pixel_values, size) * 255.0, size)
