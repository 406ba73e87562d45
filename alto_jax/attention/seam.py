"""`attention`: scaled dot-product attention by the kernel that fits the platform, the type and the mask.

What may attend to what is said by a `Mask` in words that a kernel can skip work by (causal, segments) where the caller
knows them; an array of all pairs is the last resort. Which kernel runs is decided while tracing, by what the devices
are and what each kernel can do, never by trying.

Letters: B batch, T queries, S keys, N heads, K key/value heads, Hd head width.
"""

from collections.abc import Callable
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from alto_jax.attention import cudnn
from alto_jax.parallel.sharding import traced_device

Array = jax.Array
IMPLEMENTATIONS = ("auto", "xla", "flash")
# Fewer queries than this (a token of decoding, the tokenizer's small sizes) gain nothing from a flash kernel.
_FEWEST_QUERIES = 64


@struct.dataclass
class Mask:
    """Which query may attend to which key: all conditions that are given must hold.

    Attributes:
      causal: query i attends to keys up to i; T == S.
      segments: int32[B, T], self-attention only: query and key must have the same number.
      pairs: bool, broadcastable to [B, N, T, S]; a NumPy array is known to the compiler.
    """

    causal: bool = struct.field(pytree_node=False, default=False)
    segments: Array | None = None
    pairs: Array | np.ndarray | None = None

    def dense(self, num_queries: int, num_keys: int) -> Array | None:
        """bool, broadcastable to [B, N, T, S]; None: everything may attend."""
        parts: list[Any] = [] if self.pairs is None else [self.pairs]
        if self.causal:
            parts.append((np.arange(num_keys) <= np.arange(num_queries)[:, None])[None, None])
        if self.segments is not None:
            parts.append((self.segments[:, :, None] == self.segments[:, None, :])[:, None])
        if not parts:
            return None
        dense = parts[0]
        for part in parts[1:]:
            dense = dense & part
        return jnp.asarray(dense)


EVERYTHING = Mask()


def attention(
    q: Array, k: Array, v: Array, *, mask: Mask = EVERYTHING, scale: float | None = None, implementation: str = "auto"
) -> Array:
    """Scaled dot-product attention with a float32 softmax; grouped queries where K < N.

    Args:
      q: [B, T, N, Hd]; k, v: [B, S, K, Hd], N a multiple of K (query head n uses key head n // (N/K)).
      mask: see `Mask`.
      scale: of the products of q and k; None: Hd^-0.5.
      implementation: "xla": the whole array of scores; "flash": a kernel that never holds it; "auto": flash where it
        can and pays, else xla.

    Returns:
      [B, T, N, Hd] in q's dtype.

    Raises:
      ValueError: "flash", where no kernel can; the message says why.
    """
    kernel, why_not = _kernel(q, k, mask)
    if implementation == "flash" and kernel is None:
        raise ValueError(f"attention: 'flash' is not possible here: {why_not}; use 'auto' or 'xla'")
    if implementation == "xla" or kernel is None or (implementation == "auto" and q.shape[1] < _FEWEST_QUERIES):
        dense = mask.dense(q.shape[1], k.shape[1])
        return jax.nn.dot_product_attention(q, k, v, mask=dense, scale=scale)
    return kernel(q, k, v, mask, q.shape[-1] ** -0.5 if scale is None else scale)


def is_flash(implementation: str, dtype: Any, head_dim: int) -> bool:
    """Whether `attention` over many positions, without a mask, takes a flash kernel here."""
    like = jax.ShapeDtypeStruct((1, _FEWEST_QUERIES, 1, head_dim), dtype)
    return implementation != "xla" and _kernel(like, like, EVERYTHING)[0] is not None


def _kernel(q: Any, k: Any, mask: Mask) -> tuple[Callable[..., Array] | None, str]:
    """The flash kernel for these arguments, or None and the reason."""
    device = traced_device()
    if device.platform in ("gpu", "cuda"):
        why_not = cudnn.why_not(q, k, device)
        return (None, why_not) if why_not else (cudnn.attention, "")
    if device.platform == "tpu":
        from alto_jax.attention import splash  # late: Pallas takes as long to import as the rest of the model

        why_not = splash.why_not(q, k, mask)
        return (None, why_not) if why_not else (splash.attention, "")
    return None, f"there is no such kernel for the platform {device.platform!r}"
