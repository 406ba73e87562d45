"""Token length predictor (TLP) with differentiable chunking, and the rules that turn a distribution into a length.

latents [B, L, W] and cls [B, 1, W] → a distribution over stop positions → how many leading tokens to
keep. In training the number is hard in the value and soft in the gradient (straight through), so the
reconstruction loss alone trains the predictor. Source: ALTo, section 3.2; reference/NUMERICS.md §2.
"""

from typing import Any

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp

from alto_jax import layers

Array = jax.Array
LENGTH_RULES = ("unified", "reference")
LOGIT_SCALES = ("divide", "multiply")
GATES = ("sigmoid", "silu")


@struct.dataclass
class LengthPrediction:
    """The predictor's output for B masks.

    probs float32[B, L]: probability that the last kept token has index l; expectation float32[B] in
    0..L-1; keep float32[B, L]: 1 for kept tokens, 0 after, with the straight-through gradient;
    num_kept int32[B]: sum of keep, in 1..L; length int32[B]: number of tokens of a label or an encoded
    mask (equal to num_kept under the "unified" rule).
    """

    probs: Array
    expectation: Array
    keep: Array
    num_kept: Array
    length: Array


def stop_expectation(probs: Array) -> Array:
    """Expected stop index float32[B] of probs float32[B, L], in the order of operations of the reference."""
    num = probs.shape[-1]
    return num * jnp.sum(probs * (jnp.arange(num, dtype=jnp.float32) / num), axis=-1)


def straight_through_keep(probs: Array, stop_index: Array) -> Array:
    """Keep mask of tokens 0..stop_index: value 0/1, gradient that of 1 - sum_{j<l} probs_j.

    Args:
      probs: float32[B, L]; stop_index: int32[B] in 0..L-1.

    Returns:
      float32[B, L].
    """
    onehot = jax.nn.one_hot(stop_index, probs.shape[-1], dtype=probs.dtype)
    stop = onehot + probs - jax.lax.stop_gradient(probs)
    keep = 1.0 - (jnp.cumsum(stop, axis=-1) - stop)
    # Note: the running sum of soft parts cancels only up to rounding; the value is exactly 0 or 1 by definition.
    hard = leading_tokens(stop_index + 1, probs.shape[-1])
    return keep + jax.lax.stop_gradient(hard - keep)


def leading_tokens(num_kept: Array, num_tokens: int) -> Array:
    """float32[B, L] with ones for the first num_kept int32[B] of L tokens."""
    return (jnp.arange(num_tokens) < num_kept[..., None]).astype(jnp.float32)


class LengthPredictor(nn.Module):
    """TLP: keys from gated latents, query from cls, a softmax over positions.

    Attributes:
      logit_scale: "multiply": Compat: logits times sqrt(W), as published weights expect; "divide": by
        sqrt(W), scaled attention, for training from scratch.
      gate: "sigmoid" (Compat: the reference) or "silu" (SwiGLU, the paper's text).
      length_rule: "reference": Compat: training keeps ceil(E) + 1 tokens, labels get ceil(E) of them
        (0..31); "unified": ceil(E) + 1 everywhere, 1..L, and an expectation within 1e-3 above an integer
        counts as that integer, so that rounding cannot move a length.
    """

    width: int
    logit_scale: str = "multiply"
    gate: str = "sigmoid"
    length_rule: str = "reference"
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, latents: Array, cls: Array) -> LengthPrediction:
        """Predicts from latents [B, L, W] and cls [B, 1, W], in float32 on every device and in every configuration."""
        latents, cls = latents.astype(jnp.float32), cls.astype(jnp.float32)

        def dense(name: str) -> nn.Dense:
            init = nn.initializers.truncated_normal(0.02, lower=-100.0, upper=100.0)
            types = {"dtype": jnp.float32, "param_dtype": self.param_dtype, "precision": layers.HIGHEST}
            return layers.Dense(self.width, kernel_init=init, name=name, **types)

        gate = jax.nn.sigmoid if self.gate == "sigmoid" else jax.nn.silu
        keys = dense("fc1")(latents) * gate(dense("fc2")(latents))
        query = dense("fc3")(cls)
        logits = jnp.einsum("bqw,blw->bql", query, keys, precision=layers.HIGHEST)[:, 0]
        logits = logits * self.width**0.5 if self.logit_scale == "multiply" else logits / self.width**0.5
        probs = jax.nn.softmax(logits, axis=-1)

        num_tokens = latents.shape[1]
        expectation = stop_expectation(probs)
        edge = 0.0 if self.length_rule == "reference" else 1e-3
        stop_index = jnp.ceil(jnp.clip(expectation - edge, 0, num_tokens - 1)).astype(jnp.int32)
        return LengthPrediction(
            probs=probs,
            expectation=expectation,
            keep=straight_through_keep(probs, stop_index),
            num_kept=stop_index + 1,
            length=stop_index + (1 if self.length_rule == "unified" else 0),
        )
