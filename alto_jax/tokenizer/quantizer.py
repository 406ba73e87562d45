"""Vector quantizer: z float[B, L, D] → codes int32[B, L] and their embeddings, straight through.

Source: ALTo's quantizer (l2-normalised lookup of a projected codebook).
"""

from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from alto_jax import layers

Array = jax.Array


@struct.dataclass
class Quantized:
    """codes int32[B, L]; embeddings float32[B, L, D], the codes' values with the gradient of z;
    z float32[B, L, D], what was quantised (normalised); entries float32[B, L, D], the same values with the
    gradient of the codebook, for `losses.vq_loss`."""

    codes: Array
    embeddings: Array
    z: Array
    entries: Array


def l2_normalize(x: Array, eps: float = 1e-12) -> Array:
    """x / max(|x|, eps) along the last axis, with a zero gradient (not NaN) at x = 0."""
    squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    safe = jnp.where(squared > eps * eps, squared, 1.0)
    return x * jnp.where(squared > eps * eps, jax.lax.rsqrt(safe), 1.0 / eps)


def uniform_codebook_init(key: Array, shape: tuple[int, int], dtype: Any) -> Array:
    """Uniform in ±1/C, as the reference initialises its codebook."""
    return jax.random.uniform(key, shape, dtype, -1.0 / shape[0], 1.0 / shape[0])


class VectorQuantizer(layers.Module):
    """Nearest code by (normalised) Euclidean distance; float32 on every device and in every configuration."""

    codebook_size: int
    token_size: int
    use_l2_norm: bool = True
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        shape = (self.codebook_size, self.token_size)
        self.embedding = self.param("embedding", uniform_codebook_init, shape, self.param_dtype)
        self.embedding_proj = layers.Dense(
            self.token_size,
            use_bias=False,
            dtype=jnp.float32,
            param_dtype=self.param_dtype,
            precision=layers.HIGHEST,
            kernel_init=lambda key, shape, dtype: jnp.eye(shape[0], shape[1], dtype=dtype),
        )

    def codebook(self) -> Array:
        """The projected codebook, float32[C, D], not normalised."""
        return self.embedding_proj(self.embedding.astype(jnp.float32))

    def _lookup_table(self) -> Array:
        table = self.codebook()
        return l2_normalize(table) if self.use_l2_norm else table

    def __call__(self, z: Array) -> Quantized:
        """Quantises z float[B, L, D]; the first of equally near codes wins."""
        z = z.astype(jnp.float32)
        z = l2_normalize(z) if self.use_l2_norm else z
        table = self._lookup_table()
        distance = (
            jnp.sum(jnp.square(z), axis=-1, keepdims=True)
            + jnp.sum(jnp.square(table), axis=-1)
            - 2 * jnp.einsum("bld,cd->blc", z, table, precision=layers.HIGHEST)
        )
        codes = jnp.argmin(distance, axis=-1).astype(jnp.int32)
        entries = table[codes]
        return Quantized(codes=codes, embeddings=z + jax.lax.stop_gradient(entries - z), z=z, entries=entries)

    def lookup(self, codes: Array) -> Array:
        """Embeddings float32[..., D] of codes int32[...]."""
        return self._lookup_table()[codes]

    def soft_lookup(self, probs: Array, normalize: bool = True) -> Array:
        """Mixture of codes: l2n(probs) @ l2n(codebook), the form that the MLLM side of the reference decodes.

        Args:
          probs: float[..., C], one-hot rows, probabilities, or zero rows for tokens that are absent.
          normalize: False leaves out both normalisations.

        Returns:
          float32[..., D]; zero where the row is zero; not of unit length for soft rows.
        """
        probs, table = probs.astype(jnp.float32), self.codebook()
        if normalize:
            probs, table = l2_normalize(probs), l2_normalize(table)
        return jnp.matmul(probs, table, precision=layers.HIGHEST)


def reseed_dead_codes(params: dict, usage: Array, z: Array, key: Array, threshold: float) -> dict:
    """Replaces codes that are hardly used by encoder outputs.

    Args:
      params: the quantizer's parameters.
      usage: float32[C], how often each code was used lately, as a share of all uses (sums to 1).
      z: float32[N, D], normalised encoder outputs to draw from.
      key: random key.
      threshold: a code is dead if its usage is below threshold / C.

    Returns:
      The parameters with new embedding rows; the projection is undone, so that the *projected* code
      equals the drawn output.
    """
    embedding, proj = params["embedding"], params["embedding_proj"]["kernel"]
    drawn = z[jax.random.randint(key, (embedding.shape[0],), 0, z.shape[0])]
    rows = jnp.matmul(drawn, jnp.linalg.pinv(proj.astype(jnp.float32)), precision=layers.HIGHEST)
    dead = usage < threshold / embedding.shape[0]
    return {**params, "embedding": jnp.where(dead[:, None], rows.astype(embedding.dtype), embedding)}
