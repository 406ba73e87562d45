"""Mask de-tokenizer (MD): token embeddings and image features → features of the mask's patches.

embeddings [B, w <= L, D], image features [B, s*g, s*g, F] → [B, g, g, Z], which the pixel decoder turns
into pixels. Source: ALTo, section 3.3; reference/NUMERICS.md §3.
"""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from alto_jax import layers
from alto_jax.parallel.sharding import constrain
from alto_jax.tokenizer.encoder import ViTConfig, grid_position_init, transformer

Array = jax.Array


class MaskDecoder(layers.Module):
    """ViT over mask tokens (carrying image features) and latents; all attend to all.

    `feature_stride`: s, the SAM grid's side divided by the mask grid's side g (4 in the paper).
    """

    vit: ViTConfig
    grid: int
    num_latent_tokens: int
    feature_stride: int
    out_channels: int
    remat: str = "none"
    attention: str = "auto"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @layers.exact_in_float32
    @nn.compact
    def __call__(self, embeddings: Array, features: Array | None) -> Array:
        """Decodes.

        Args:
          embeddings: float[B, w, D] of the first w tokens; zero rows are tokens that were not kept.
          features: float[B, s*g, s*g, F] from the SAM encoder, or None for none.

        Returns:
          float[B, g, g, out_channels].
        """
        width, grid = self.vit.embed_dim, self.grid
        batch, num_given = embeddings.shape[:2]
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        scaled_normal = nn.initializers.normal(width**-0.5)

        latents = layers.Dense(width, name="decoder_embed", **types)(embeddings.astype(self.dtype))
        # Compat: a token that is absent is a zero vector *after* the embedding, a zero code is not.
        latents = jnp.pad(latents, ((0, 0), (0, self.num_latent_tokens - num_given), (0, 0)))

        mask_token = self.param("mask_token", scaled_normal, (width,), self.param_dtype).astype(self.dtype)
        x = jnp.broadcast_to(mask_token, (batch, grid * grid, width))
        if features is not None:
            mapper = layers.PatchEmbed(features.shape[-1], self.feature_stride, name="spatial_mapper", **types)
            # Note: near zero at the start, so that the tokens are learned before the image is leaned on.
            project = layers.Dense(width, kernel_init=nn.initializers.normal(1e-3), name="vae_project", **types)
            mapped = constrain(mapper(features.astype(self.dtype)), "batch", ...)
            x = x + project(mapped.reshape(batch, grid * grid, features.shape[-1]))

        cls = self.param("class_embedding", scaled_normal, (width,), self.param_dtype).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(cls, (batch, 1, width)), x], axis=1)
        position = self.param("position_embedding", grid_position_init, (grid * grid + 1, width), self.param_dtype)
        latent_position = self.param(
            "latent_position_embedding", scaled_normal, (self.num_latent_tokens, width), self.param_dtype
        )
        x = jnp.concatenate([x + position.astype(x.dtype), latents + latent_position.astype(x.dtype)], axis=1)
        x = layers.layer_norm(1e-5, name="ln_pre", **types)(x)
        x, _ = transformer(self.vit, self.dtype, self.param_dtype, self.remat, self.attention, "blocks")(x)
        x = layers.layer_norm(1e-5, name="ln_post", **types)(x[:, 1 : 1 + grid * grid])
        x = constrain(layers.Dense(2 * width, name="ffn1", **types)(x), "batch", ...)
        x = constrain(layers.Dense(self.out_channels, name="ffn2", **types)(jnp.tanh(x)), "batch", ...)
        return x.reshape(batch, grid, grid, self.out_channels)
