"""Decoder-only language model of the InternLM2, Qwen2 and Llama shapes, with an explicit KV cache.

Comes in: embeddings [B, T, D] (text embeddings with image features put in), positions, attention mask.
Goes out: hidden states after the final norm [B, T, D], and from those, where asked for, float32 logits.
Pre-norm blocks, RMSNorm, rotary positions ("rotate half"), grouped queries, SwiGLU.

The three families differ by numbers only: InternLM2 and Llama have no biases, Qwen2 has q/k/v biases;
InternLM2 uses dynamic NTK scaling of the rotary base beyond its trained length.

Letters beside those of `alto_jax.batch`: S keys (cache size), P prefix keys, N heads, K key/value heads,
Hd head width, V vocabulary.
"""

import dataclasses
import functools
from typing import Any, cast

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp

from alto_jax import layers
from alto_jax.attention import one_token, seam
from alto_jax.config import Quantize, require
from alto_jax.mllm.dense import Dense, GatedMlp, wide_dot
from alto_jax.parallel.sharding import constrain, gather_params
from alto_jax.params import quantized, to_8_bits

Array = jax.Array
INIT = nn.initializers.normal(0.02)
KERNELS = r"(^|/)(attn/(q|kv|out)|mlp/(gate|up|down)|head)/kernel$"  # of matrix products
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig:
    """Sizes and numerics of the language model; the defaults are a debug size.

    Attributes:
      head_dim: None means embed_dim / num_heads.
      rope_scaling_factor: factor of the dynamic NTK scaling beyond max_position_embeddings; None: no scaling.
      dtype, param_dtype: of the computation and of the parameters.
      remat, unroll: see `layers.Stack`.
      attention: see `attention.seam`.
    """

    vocab_size: int = 512
    embed_dim: int = 64
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int | None = None
    mlp_dim: int = 128
    rope_theta: float = 1e6
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    tie_embeddings: bool = False
    max_position_embeddings: int = 32768
    rope_scaling_factor: float | None = None
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"
    unroll: int = 1
    attention: str = "auto"

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "mlp_dim", "unroll")
        for name in (*sizes, "max_position_embeddings"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        groups = self.num_heads % self.num_kv_heads == 0
        require(groups, "num_kv_heads", self.num_kv_heads, f"a divisor of num_heads {self.num_heads}")
        divides = self.head_dim is not None or self.embed_dim % self.num_heads == 0
        require(divides, "num_heads", self.num_heads, f"a divisor of embed_dim {self.embed_dim}, or head_dim set")
        require(self.head_width >= 2 and self.head_width % 2 == 0, "head_dim", self.head_width, "an even number")
        require(self.rope_theta > 0, "rope_theta", self.rope_theta, "a positive number")
        require(self.norm_eps > 0, "norm_eps", self.norm_eps, "a positive number")
        factor = self.rope_scaling_factor
        require(factor is None or factor >= 1, "rope_scaling_factor", factor, "at least 1, or None")
        require(self.dtype in DTYPES, "dtype", self.dtype, f"one of {DTYPES}")
        require(self.param_dtype in DTYPES, "param_dtype", self.param_dtype, f"one of {DTYPES}")
        implementations = seam.IMPLEMENTATIONS
        require(self.attention in implementations, "attention", self.attention, f"one of {implementations}")
        require(self.remat in layers.REMAT_POLICIES, "remat", self.remat, f"one of {layers.REMAT_POLICIES}")

    @property
    def head_width(self) -> int:
        """Hd, with the default resolved."""
        return self.embed_dim // self.num_heads if self.head_dim is None else self.head_dim


@struct.dataclass
class KVCache:
    """Keys (already rotated) and values: k, v [B, S, K, Hd] of one layer, [num_layers, B, S, K, Hd] of all.

    An int8 cache has a scale per position and head, float32[..., S, K], for keys and for values: a vector is stored
    as its integers in -127..127 times its scale. It takes (Hd + 4) / 2 Hd of the bytes of a bfloat16 cache.
    """

    k: Array
    v: Array
    k_scale: Array | None = None
    v_scale: Array | None = None

    @classmethod
    def create(cls, cfg: LanguageModelConfig, batch: int, size: int, dtype: str = "model") -> "KVCache":
        """Returns an empty cache of all layers, `batch` rows of `size` positions, in `dtype` ("model": cfg.dtype)."""
        shape = (cfg.num_layers, batch, size, cfg.num_kv_heads, cfg.head_width)
        zeros = constrain(jnp.zeros(shape, cfg.dtype), None, "batch", None, "heads", None)
        return cls.of(zeros, zeros, dtype)

    @classmethod
    def of(cls, k: Array, v: Array, dtype: str = "model") -> "KVCache":
        """Returns keys and values [..., K, Hd] as a cache holds them, in `dtype` ("model": as they are)."""
        if dtype == "int8":
            (k, k_scale), (v, v_scale) = to_8_bits(k, -1), to_8_bits(v, -1)
            return cls(k, v, k_scale, v_scale)
        return cls(k, v) if dtype == "model" else cls(k.astype(dtype), v.astype(dtype))

    def write(self, index: Array, k: Array, v: Array) -> "KVCache":
        """Returns one layer's cache with keys and values [B, T, K, Hd] at positions index .. index + T - 1."""
        new = KVCache.of(k, v, "int8" if self.k_scale is not None else str(self.k.dtype))
        update = lambda buffer, part: jax.lax.dynamic_update_slice(buffer, part, (0, index, 0, 0)[: buffer.ndim])
        return jax.tree.map(update, self, new)

    def values(self, dtype: Any) -> tuple[Array, Array]:
        """Returns keys and values in `dtype`."""
        scaled = lambda a, scale: a.astype(dtype) if scale is None else (a * scale[..., None]).astype(dtype)
        return scaled(self.k, self.k_scale), scaled(self.v, self.v_scale)


def ntk_inv_freq(cfg: LanguageModelConfig, current_length: int | Array) -> Array:
    """Inverse rotary frequencies at a sequence length, with dynamic NTK scaling.

    Up to max_position_embeddings, or without rope_scaling_factor, plain ones; beyond, the base becomes
    theta * (f * n / max - (f - 1)) ^ (Hd / (Hd - 2)), n the length, f the factor.

    Compat: the reference keeps the scaled table for later, shorter sequences of the same process. Here
    the table depends on `current_length` alone; who needs the sticky one keeps this function's result
    and passes it on as `inv_freq`.

    Args:
      cfg: language model config.
      current_length: int or int32 scalar (may be traced), number of keys attended to, padding included.

    Returns:
      float32[Hd / 2].
    """
    theta: float | Array = cfg.rope_theta
    if cfg.rope_scaling_factor is not None:
        factor, width = cfg.rope_scaling_factor, cfg.head_width
        length = jnp.maximum(jnp.asarray(current_length, jnp.float32), cfg.max_position_embeddings)
        stretch = factor * length / cfg.max_position_embeddings - (factor - 1)
        theta = theta * stretch ** (width / max(width - 2, 1))
    return layers.rope_frequencies(cfg.head_width, theta)


def prefix_attention(
    q: Array, k: Array, v: Array, mask: Array, prefix_k: Array, prefix_v: Array, prefix_mask: Array
) -> Array:
    """Attention of G rows per prefix over their own keys and one shared copy of the prefix.

    The scores over both sets of keys share one softmax, so the result equals attention over the repeated
    prefix concatenated with the own keys.

    Args:
      q: [B*G, T, N, Hd], row b*G + g; k, v: [B*G, S, K, Hd].
      mask: bool, broadcastable to [B*G, 1, T, S], True = may attend.
      prefix_k, prefix_v: [B, P, K, Hd]; prefix_mask: bool[B, P].

    Returns:
      [B*G, T, N, Hd] in q's dtype.
    """
    rows, length, num_heads, width = q.shape
    batch, prefix_length, num_kv_heads, _ = prefix_k.shape
    group = rows // batch
    split = lambda x: x.reshape(batch, group, *x.shape[1:])
    q = q.reshape(batch, group, length, num_kv_heads, num_heads // num_kv_heads, width)
    k, v = split(k), split(v)
    mask = split(jnp.broadcast_to(mask, (rows, 1, length, k.shape[2])))[:, :, :, None]
    prefix_mask = prefix_mask[:, None, None, None, None]
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    floor = 0.7 * jnp.finfo(jnp.float32).min  # Note: finite, so that rows without any key are free of NaN.
    prefix_scores = jnp.where(prefix_mask, einsum("bgtkrh,bpkh->bgkrtp", q, prefix_k) * width**-0.5, floor)
    own_scores = jnp.where(mask, einsum("bgtkrh,bgskh->bgkrts", q, k) * width**-0.5, floor)
    weights = jax.nn.softmax(jnp.concatenate([prefix_scores, own_scores], axis=-1), axis=-1).astype(v.dtype)
    prefix_weights, own_weights = jnp.split(weights, [prefix_length], axis=-1)
    out = einsum("bgkrtp,bpkh->bgtkrh", prefix_weights, prefix_v) + einsum("bgkrts,bgskh->bgtkrh", own_weights, v)
    return out.astype(q.dtype).reshape(rows, length, num_heads, width)


class DecoderAttention(nn.Module):
    """Grouped-query self-attention with rotary positions, a cache and an optional shared prefix."""

    cfg: LanguageModelConfig

    @nn.compact
    def __call__(
        self,
        x: Array,
        positions: Array,
        inv_freq: Array,
        mask: seam.Mask,
        cache_index: Array | None,
        prefix_mask: Array | None,
        keep: str | None,
        prefix: KVCache | None,
        cache: KVCache | None,
    ) -> tuple[Array, KVCache | None]:
        """Arguments as for `DecoderBlock`; returns (the attention's output [B, T, D], cache)."""
        cfg = self.cfg
        kwargs: dict[str, Any] = dict(dtype=cfg.dtype, param_dtype=cfg.param_dtype, kernel_init=INIT)
        q = Dense((cfg.num_heads, cfg.head_width), use_bias=cfg.qkv_bias, name="q", **kwargs)(x)
        kv = Dense((2, cfg.num_kv_heads, cfg.head_width), use_bias=cfg.qkv_bias, name="kv", **kwargs)(x)
        q, kv = (constrain(a, "batch", ..., "heads", None) for a in (q, kv))
        q = layers.apply_rope(q, positions, inv_freq)
        k, v = layers.apply_rope(kv[..., 0, :, :], positions, inv_freq), kv[..., 1, :, :]
        if cache is not None:
            assert cache_index is not None  # Note: `LanguageModel` gives one with every cache.
            if prefix is not None and cfg.attention != "xla" and not one_token.why_not(q, cache.k, prefix.k):
                assert prefix_mask is not None  # Note: `LanguageModel` gives one with every prefix.
                own = cast(Array, mask.dense(1, cache.k.shape[1]))[:, 0, 0]
                given = q, k, v, jnp.asarray(cache_index), own, (cache.k, cache.v), (prefix.k, prefix.v), prefix_mask
                out, updated = one_token.attention(*given)
                return Dense(cfg.embed_dim, num_inputs=2, name="out", **kwargs)(out), KVCache(*updated)
            cache = cache.write(cache_index, k, v)
            k, v = cache.values(q.dtype)
        elif keep is not None:
            cache = KVCache.of(k, v, keep)
        if prefix is None:
            out = seam.attention(q, k, v, mask=mask, implementation=cfg.attention)
        else:
            assert prefix_mask is not None  # Note: `LanguageModel` gives one with every prefix.
            own = cast(Array, mask.dense(q.shape[1], k.shape[1]))
            out = prefix_attention(q, k, v, own, *prefix.values(q.dtype), prefix_mask)
        return Dense(cfg.embed_dim, num_inputs=2, name="out", **kwargs)(out), cache


class DecoderBlock(nn.Module):
    """One pre-norm block: `x += attn(attn_norm(x)); x += mlp(mlp_norm(x))`."""

    cfg: LanguageModelConfig

    @layers.exact_in_float32
    @nn.compact
    def __call__(
        self,
        x: Array,
        positions: Array,
        inv_freq: Array,
        mask: seam.Mask,
        cache_index: Array | None,
        prefix_mask: Array | None,
        keep: str | None,
        prefix: KVCache | None,
        cache: KVCache | None,
    ) -> tuple[Array, KVCache | None]:
        """Applies the block, in the form that `layers.Stack` wants.

        Args:
          x: [B, T, D].
          positions: int32[B, T].
          inv_freq: float32[Hd / 2].
          mask: which keys (of the cache, if there is one) each input may attend to.
          cache_index: int32 scalar or None.
          prefix_mask: bool[B / G, P] or None.
          keep: type in which the new keys and values are returned where there is no cache; None: they are not.
          prefix: KVCache of this layer, [B / G, P, K, Hd], or None.
          cache: KVCache of this layer, [B, S, K, Hd], or None.

        Returns:
          (x, cache): the cache with the new keys and values, or what `keep` asks for.
        """
        cfg = self.cfg
        norm = functools.partial(layers.RMSNorm, cfg.norm_eps, cfg.dtype, cfg.param_dtype)
        shared = (positions, inv_freq, mask, cache_index, prefix_mask, keep)
        branch, cache = DecoderAttention(cfg, name="attn")(norm(name="attn_norm")(x), *shared, prefix, cache)
        x = constrain(x + branch, "batch", ...)
        mlp = GatedMlp(cfg.mlp_dim, cfg.dtype, cfg.param_dtype, kernel_init=INIT, name="mlp")
        return constrain(x + mlp(norm(name="mlp_norm")(x)), "batch", ...), cache


def for_inference(cfg: LanguageModelConfig, params: dict, quantize: Quantize = "") -> dict:
    """The parameters as a loop of tokens wants them: in the type that is computed in, each layer's as whole arrays, and
    gathered over fsdp once instead of for every token.

    Without `quantize` changes no number: every use casts to that type. Applied to what it returned it does nothing.

    Args:
      cfg: of the language model.
      params: all of its parameters, or some.
      quantize: type of 8 bits for the kernels of matrix products (`params.quantized`); tied embeddings are no kernel.
    """
    params = quantized(params, KERNELS, quantize)
    kept = lambda path, a: a.dtype.itemsize == 1 or path[-1].key == "kernel_scale"
    params = jax.tree_util.tree_map_with_path(lambda path, a: a if kept(path, a) else a.astype(cfg.dtype), params)
    # Note: a row of the embedding is moved more cheaply than the table, unless that is the head, too.
    apart = () if cfg.tie_embeddings else ("embed",)
    params |= gather_params({n: v for n, v in params.items() if n not in apart}, "language_model")
    stacked = params.get("blocks", {}).get("layers", ())
    if not isinstance(stacked, tuple):
        params["blocks"] = {"layers": layers.unstacked(stacked, cfg.num_layers)}
    return params


def with_whole_head(cfg: LanguageModelConfig, params: dict) -> dict:
    """The parameters, with those of `LanguageModel.logits` gathered over fsdp: for a loop that calls it many times."""
    name = "embed" if cfg.tie_embeddings else "head"
    return {**params, **gather_params({name: params[name]}, "language_model")}


class Embed(layers.Module, nn.Embed):
    """Linen's, as a `layers.Module`."""


class LanguageModel(nn.Module):
    """The language model. `embed`, `__call__` and `logits` are separate, so that image features can be put
    between the first two and only the needed positions reach the vocabulary.

    Initialise with `method="forward"`, which touches every parameter.
    """

    cfg: LanguageModelConfig

    def setup(self) -> None:
        cfg = self.cfg
        types: dict[str, Any] = dict(param_dtype=cfg.param_dtype)
        # Note: the table is looked up in its own type; casting the few rows is cheaper than the table.
        self.embedder = Embed(
            cfg.vocab_size, cfg.embed_dim, dtype=cfg.param_dtype, embedding_init=INIT, name="embed", **types
        )
        self.blocks = layers.Stack(functools.partial(DecoderBlock, cfg), cfg.num_layers, cfg.remat, cfg.unroll)
        self.norm = layers.RMSNorm(cfg.norm_eps, cfg.dtype, cfg.param_dtype)
        if not cfg.tie_embeddings:
            self.head = Dense(cfg.vocab_size, dtype=cfg.dtype, kernel_init=INIT, out_dtype=jnp.float32, **types)

    def embed(self, ids: Array) -> Array:
        """ids int32[...] -> embeddings [..., D] in the compute type."""
        # Note: every device looks its part of the width up for all rows; moving these few rows is far cheaper than
        # gathering the table.
        rows = self.embedder(constrain(ids, "replica", ...)).astype(self.cfg.dtype)
        rows = constrain(rows, "replica", ..., "width")
        # Note: one axis at a time (an all-to-all, then a gather over tensor); both at once make XLA gather all rows.
        return constrain(constrain(rows, "batch", ..., "channels"), "batch", ...)

    def __call__(
        self,
        inputs_embeds: Array,
        positions: Array,
        attn_mask: Array | None = None,
        cache: KVCache | tuple[KVCache, ...] | None = None,
        cache_index: int | Array | None = None,
        inv_freq: Array | None = None,
        prefix: KVCache | tuple[KVCache, ...] | None = None,
        prefix_mask: Array | None = None,
        keep: str | None = None,
        segment_ids: Array | None = None,
    ) -> tuple[Array, Any]:
        """Runs the blocks and the final norm.

        Args:
          inputs_embeds: [B, T, D].
          positions: int32[B, T], rotary positions of the inputs (prefix positions come before them).
          attn_mask: bool[B or 1, T, S], True = may attend; S = T without a cache, else the cache's size.
            None: causal; with a cache, key j is seen by input i where j <= cache_index + i.
          cache: keys and values of earlier inputs, of all layers or a tuple of each layer's; the new ones are written
            at cache_index.. and the updated cache is returned.
          cache_index: int32 scalar, position in the cache of the first input (0 if None), the same for all rows.
          inv_freq: float32[Hd / 2], rotary frequencies; None computes them from the config and the
            number of keys (`ntk_inv_freq`).
          prefix: keys and values that every input sees beside its own, with B / G rows: input rows
            b*G .. b*G + G - 1 share prefix row b. Not updated.
          prefix_mask: bool[B / G, P], True where the prefix is not padding; None: all of it.
          keep: the type in which the inputs' own keys and values are returned ("model": as they are); not with a cache.
          segment_ids: int32[B, T]; without a mask and a cache, an input sees those before it that have its number.

        Returns:
          (hidden [B, T, D], cache): hidden is after the final norm; cache is the updated one, or what `keep` asks for,
          else None. It is a tuple of each layer's where the parameters are those of `for_inference`.
        """
        cfg = self.cfg
        length = inputs_embeds.shape[1]
        offset: int | Array = 0
        some = lambda kv: kv[0] if isinstance(kv, tuple) else kv
        if cache is not None:
            assert keep is None, "a cache has its own type"
            offset = cache_index = jnp.asarray(0 if cache_index is None else cache_index, jnp.int32)
        prefix_length = 0 if prefix is None else some(prefix).k.shape[-3]
        if inv_freq is None:
            inv_freq = ntk_inv_freq(cfg, prefix_length + offset + length)
        if attn_mask is None and cache is not None:
            attn_mask = (jnp.arange(some(cache).k.shape[-3]) <= offset + jnp.arange(length)[:, None])[None]
        if attn_mask is None:
            mask = seam.Mask(causal=True, segments=segment_ids)
        else:
            mask = seam.Mask(pairs=attn_mask[:, None])
        if prefix is not None and prefix_mask is None:
            prefix_mask = jnp.ones((some(prefix).k.shape[-4], prefix_length), bool)
        shared = (positions, inv_freq, mask, cache_index, prefix_mask, keep)
        x, cache = self.blocks(inputs_embeds.astype(cfg.dtype), *shared, per_layer=(prefix, cache))
        return self.norm(x), None if cache is None or some(cache) is None else cache

    @layers.exact_in_float32
    def logits(self, hidden: Array) -> Array:
        """hidden [..., D] -> float32[..., V]."""
        if self.cfg.tie_embeddings:
            return constrain(self._of_rows(hidden, self.embedder.embedding), "batch", ..., "vocab")
        return constrain(self.head(hidden), "batch", ..., "vocab")

    @layers.exact_in_float32
    def some_logits(self, hidden: Array, start: int, count: int) -> Array:
        """hidden [..., D] -> float32[..., count], those of the tokens start .. start + count - 1 alone."""
        if self.cfg.tie_embeddings:
            return self._of_rows(hidden, self.embedder.embedding[start : start + count])
        return self.head(hidden, slice(start, start + count))

    def _of_rows(self, hidden: Array, rows: Array) -> Array:
        """Products of hidden [..., D] and rows [v, D] of the vocabulary, float32[..., v]."""
        dtype = self.cfg.dtype
        return wide_dot(hidden.astype(dtype), rows.astype(dtype), ((hidden.ndim - 1,), (1,)), jnp.float32)

    def forward(self, ids: Array, positions: Array | None = None, attn_mask: Array | None = None) -> Array:
        """Text only, without a cache: ids int32[B, T] -> logits float32[B, T, V]."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        return self.logits(self(self.embed(ids), positions, attn_mask)[0])
