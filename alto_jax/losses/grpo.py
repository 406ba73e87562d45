"""Loss of stage 3 (paper section 3.3): group-relative policy optimisation and its kin."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from alto_jax.config import require


@dataclasses.dataclass(frozen=True)
class GrpoLossConfig:
    """Form of `grpo_loss`.

    Attributes:
      objective: "paper": clipped importance ratio, mean over the tokens of each completion, then over completions.
        "reference": Compat: the PyTorch code: no old policy, no clipping, padding up to the longest completion of the
        group counts, and a group's loss is capped at `loss_cap`, with no gradient above.
        "dr_grpo": as "paper", but a completion's sum is divided by the constant T, not by its length.
        "dapo": as "paper", but the mean is over all tokens of the batch; use a larger `epsilon_high`.
        "gspo": one ratio per completion, the geometric mean of its tokens' ratios.
      epsilon_low, epsilon_high: the ratio is clipped to 1 - epsilon_low .. 1 + epsilon_high.
      beta: weight of the KL to the reference policy; 0 needs no reference.
      loss_cap: of "reference".
    """

    objective: Literal["paper", "reference", "dr_grpo", "dapo", "gspo"] = "paper"
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    beta: float = 1e-3
    loss_cap: float = 1.0

    def __post_init__(self) -> None:
        objectives = ("paper", "reference", "dr_grpo", "dapo", "gspo")
        require(self.objective in objectives, "grpo.objective", self.objective, f"one of {objectives}")
        require(0 <= self.epsilon_low < 1, "grpo.epsilon_low", self.epsilon_low, "a value in 0..1")
        require(self.epsilon_high >= 0, "grpo.epsilon_high", self.epsilon_high, "a value >= 0")
        require(self.beta >= 0, "grpo.beta", self.beta, "a value >= 0")


def grpo_loss(
    per_token_logps: jax.Array,
    old_per_token_logps: jax.Array | None,
    ref_per_token_logps: jax.Array | None,
    advantages: jax.Array,
    completion_mask: jax.Array,
    cfg: GrpoLossConfig,
    *,
    entropy: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Group-relative policy optimisation loss, with the k3 estimate of the KL to the reference policy.

    Args:
      per_token_logps: float[B, G, T], log-probabilities of the completion ids under the policy.
      old_per_token_logps: float[B, G, T], under the policy that sampled them; None is the policy itself
        (one update per rollout). Not used by "reference".
      ref_per_token_logps: float[B, G, T], under the frozen reference; may be None if `cfg.beta` is 0.
      advantages: float[B, G].
      completion_mask: bool[B, G, T], True up to and including the end of turn.
      cfg: the objective.
      entropy: float[B, G, T], entropy of the policy at each token, for the metrics only.

    Returns:
      The loss to minimise (float32 scalar) and metrics: kl and (if given) entropy, means over the valid
      tokens; clip_fraction of tokens (completions for "gspo"); ratio, the mean importance ratio.

    Raises:
      ValueError: `cfg.beta` > 0 without `ref_per_token_logps`.
    """
    if ref_per_token_logps is None and cfg.beta > 0:
        raise ValueError(f"ref_per_token_logps: needed for beta = {cfg.beta!r}, got None")
    logps = per_token_logps.astype(jnp.float32)
    advantages = jax.lax.stop_gradient(advantages.astype(jnp.float32))
    if cfg.objective == "reference":
        # Note: the reference's batch ends with the longest completion; static shapes may go further.
        mask = jnp.broadcast_to(jnp.any(completion_mask, axis=1, keepdims=True), logps.shape)
        old = jax.lax.stop_gradient(logps)
    else:
        mask = completion_mask
        old = logps if old_per_token_logps is None else old_per_token_logps.astype(jnp.float32)
        old = jax.lax.stop_gradient(old)
    # Padding may hold any value: it leaves before the exponential, so that it can't make inf * 0.
    kl = jnp.zeros_like(logps)
    if ref_per_token_logps is not None:
        reference = jax.lax.stop_gradient(ref_per_token_logps.astype(jnp.float32))
        log_ratio_ref = jnp.where(mask, reference - logps, 0)
        kl = jnp.exp(log_ratio_ref) - log_ratio_ref - 1
    log_ratio = jnp.where(mask, logps - old, 0)
    weights = mask.astype(jnp.float32)
    valid_tokens = jnp.sum(weights, axis=-1)
    num_tokens = jnp.maximum(valid_tokens, 1)
    if cfg.objective == "gspo":
        log_ratio = (jnp.sum(log_ratio, axis=-1) / num_tokens)[..., None]
    ratio = jnp.exp(log_ratio)
    surrogate = ratio  # min(r A, clip(r) A) = A * surrogate
    if cfg.objective != "reference":
        high, low = jnp.minimum(ratio, 1 + cfg.epsilon_high), jnp.maximum(ratio, 1 - cfg.epsilon_low)
        surrogate = jnp.where(advantages[..., None] >= 0, high, low)

    divisors: dict[str, int | jax.Array] = {
        "dr_grpo": logps.shape[-1],
        "dapo": jnp.maximum(jnp.mean(valid_tokens), 1e-9),
    }
    divisor = divisors.get(cfg.objective, num_tokens)
    # Note: surrogate = 1 + excess, and the advantages of a group sum to 0. That constant is taken apart, and what
    # float32 leaves of it is dropped, so that rounding at the size of the advantages does not drown the small rest.
    gain = advantages * (jnp.sum((surrogate - 1) * weights, axis=-1) / divisor)
    constant = advantages * (valid_tokens / divisor)
    offset = jnp.mean(constant, axis=-1, keepdims=True)
    rounding = 4 * jnp.finfo(jnp.float32).eps * jnp.max(jnp.abs(constant), axis=-1, keepdims=True)
    gain += jnp.where(jnp.abs(offset) <= rounding, 0, offset)
    penalty = cfg.beta * (jnp.sum(kl * weights, axis=-1) / divisor)
    per_group = jnp.mean(penalty, axis=-1) - jnp.mean(gain, axis=-1)
    if cfg.objective == "reference":
        per_group = jnp.where(per_group <= cfg.loss_cap, per_group, cfg.loss_cap)
    loss = jnp.mean(per_group)

    counted = jnp.any(mask, axis=-1, keepdims=True) if cfg.objective == "gspo" else mask
    metrics = {
        "kl": _mean(kl, completion_mask),
        "clip_fraction": _mean(surrogate != ratio, counted),
        "ratio": _mean(ratio, counted),
    }
    if entropy is not None:
        metrics["entropy"] = _mean(entropy.astype(jnp.float32), completion_mask)
    return loss, jax.lax.stop_gradient(metrics)


def _mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of the values where mask bool is True; 0 if it never is."""
    return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.maximum(jnp.sum(mask), 1)
