"""Mask encoder (MT): a ViT over the mask's patches with L latent tokens at its end.

Mask float[B, H, W] in 0..1 → `Encoded(z [B, L, D], latents [B, L, W], cls [B, 1, W])`. W is the width of
the encoder, D the token size. Source: ALTo (NeurIPS 2025), section 3.1; the layers are TiTok's.
"""

import dataclasses
import functools
from typing import Any

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from alto_jax import layers
from alto_jax.attention.seam import Mask
from alto_jax.config import require
from alto_jax.parallel.sharding import constrain

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Size of a transformer: width, depth, heads, and mlp_dim / embed_dim."""

    embed_dim: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    mlp_ratio: int = 4

    def __post_init__(self) -> None:
        for name in ("embed_dim", "num_layers", "num_heads", "mlp_ratio"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(
            self.embed_dim % self.num_heads == 0, "embed_dim", self.embed_dim, f"a multiple of {self.num_heads} heads"
        )


@struct.dataclass
class Encoded:
    """What the encoder gives: z [B, L, D] (not yet quantised); latents [B, L, W] and cls [B, 1, W],
    both after the last norm, for the length predictor."""

    z: Array
    latents: Array
    cls: Array


def latent_attn_mask(num_image_tokens: int, num_latents: int) -> np.ndarray:
    """bool[T, T], True = may attend: image tokens see image tokens, latent k sees them and latents <= k."""
    total = num_image_tokens + num_latents
    rows, columns = np.arange(total)[:, None], np.arange(total)[None]
    return (columns < num_image_tokens) | (columns <= rows)


def transformer(cfg: ViTConfig, dtype: Any, param_dtype: Any, remat: str, attention: str, name: str) -> nn.Module:
    """The pre-norm blocks of the mask encoder and decoder (layer norm, eps 1e-5)."""
    block = functools.partial(
        layers.ViTBlock,
        num_heads=cfg.num_heads,
        mlp_dim=cfg.mlp_ratio * cfg.embed_dim,
        norm_eps=1e-5,
        attention=attention,
        dtype=dtype,
        param_dtype=param_dtype,
    )
    return layers.Stack(block, cfg.num_layers, remat=remat, name=name)


def grid_position_init(key: Array, shape: tuple[int, int], dtype: Any) -> Array:
    """Position embedding [1 + g^2, W]: sine-cosine on the grid, noise for the class token."""
    grid = round((shape[0] - 1) ** 0.5)
    cls = jax.random.normal(key, (1, shape[1])) * shape[1] ** -0.5
    return jnp.concatenate([cls, layers.sincos_position_embedding(grid, shape[1])]).astype(dtype)


class MaskEncoder(layers.Module):
    """The mask tokenizer's ViT; see the module's docstring.

    `legacy_reshape`: Compat: published weights expect the latents [L, W] to be reinterpreted in memory
    order as [W, L] before the projection to D, so that every code mixes all latents.
    """

    vit: ViTConfig
    mask_size: int
    patch_size: int
    num_latent_tokens: int
    token_size: int
    legacy_reshape: bool = True
    remat: str = "none"
    attention: str = "auto"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @layers.exact_in_float32
    @nn.compact
    def __call__(self, mask: Array, latent_tokens: Array) -> Encoded:
        """Encodes masks.

        Args:
          mask: float[B, H, W] in 0..1, H = W = mask_size; or [B, H, W, 3], a mask that already has the three
            channels of the weights (equal ones, for a mask).
          latent_tokens: float[L, W], the learned start values of the latents.
        """
        width, grid = self.vit.embed_dim, self.mask_size // self.patch_size
        batch, num_patches = mask.shape[0], grid * grid
        scaled_normal = nn.initializers.normal(width**-0.5)
        x = (jnp.repeat(mask[..., None], 3, axis=-1) if mask.ndim == 3 else mask).astype(self.dtype)
        x = layers.PatchEmbed(width, self.patch_size, self.dtype, self.param_dtype, name="patch_embed")(x)
        x = constrain(x.reshape(batch, num_patches, width), "batch", ...)

        cls = self.param("class_embedding", scaled_normal, (width,), self.param_dtype)
        position = self.param("position_embedding", grid_position_init, (num_patches + 1, width), self.param_dtype)
        latent_position = self.param(
            "latent_position_embedding", scaled_normal, (self.num_latent_tokens, width), self.param_dtype
        )
        x = jnp.concatenate([jnp.broadcast_to(cls.astype(x.dtype), (batch, 1, width)), x], axis=1)
        x = x + position.astype(x.dtype)
        latents = (latent_tokens + latent_position).astype(x.dtype)
        x = jnp.concatenate([x, jnp.broadcast_to(latents, (batch, *latents.shape))], axis=1)

        x = layers.layer_norm(1e-5, self.dtype, self.param_dtype, name="ln_pre")(x)
        mask_of_latents = Mask(pairs=latent_attn_mask(1 + num_patches, self.num_latent_tokens)[None, None])
        blocks = transformer(self.vit, self.dtype, self.param_dtype, self.remat, self.attention, "blocks")
        x, _ = blocks(x, mask_of_latents)
        ln_post = layers.layer_norm(1e-5, self.dtype, self.param_dtype, name="ln_post")
        latents, cls = ln_post(x[:, 1 + num_patches :]), ln_post(x[:, :1])

        mixed = latents
        if self.legacy_reshape:
            # Compat: [L, W] read as [W, L]; the sum below runs over that W.
            mixed = latents.reshape(batch, width, self.num_latent_tokens).swapaxes(1, 2)
        z = layers.Dense(self.token_size, dtype=self.dtype, param_dtype=self.param_dtype, name="conv_out")(mixed)
        return Encoded(z=z, latents=latents, cls=cls)
