"""Rewards of stage 3 and what becomes of them: format, IoU, length, and more by weight; advantages inside a group.

What comes in are completions parsed by `mllm.mask_tokens.parse_completion`, the masks decoded from their codes
and, for two further parts, the codes that the mask tokenizer gives the target; what goes out are rewards, their
parts (for logging) and advantages. Paper section 3.3; the PyTorch code's form is NUMERICS section 7. Everything is
jittable float32, [B, G] per prompt and sample.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from alto_jax import metrics
from alto_jax.config import require
from alto_jax.mllm.mask_tokens import ParsedMask


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """Form and weights of `compute_rewards`.

    Attributes:
      kind: "paper": `format_weight * format + iou_weight * IoU - length_weight * n`, where format is 1 for a
        well-formed completion and else 0; a malformed one gets 0 in all. Several masks are malformed, for both kinds:
        the request names one target. "reference": Compat: `0.1 * (number of the four format checks passed) + (L - n) *
        length_weight + IoU`; a malformed completion keeps its length bonus.
      format_weight, iou_weight: see kind.
      length_weight: lambda of the paper, reward per mask token; the reference's script uses 1e-3.
      boundary_weight: of the IoU of both masks' boundaries, 2 % of the diagonal wide (`metrics.boundary_iou`).
      token_weight: of the share of an answer's codes that are the tokenizer's own for the target (`token_match`).
    """

    kind: Literal["paper", "reference"] = "paper"
    format_weight: float = 1.0
    iou_weight: float = 1.0
    length_weight: float = 1e-3
    boundary_weight: float = 0.0
    token_weight: float = 0.0

    def __post_init__(self) -> None:
        kinds = ("paper", "reference")
        require(self.kind in kinds, "reward.kind", self.kind, f"one of {kinds}")
        for name in ("format_weight", "iou_weight", "length_weight", "boundary_weight", "token_weight"):
            require(getattr(self, name) >= 0, f"reward.{name}", getattr(self, name), "a weight >= 0")


def iou_reward(masks: jax.Array, target: jax.Array, valid: jax.Array, *, boundary: bool = False) -> jax.Array:
    """IoU of each sample's mask with its prompt's target, both thresholded at > 0.5.

    Args:
      masks: float[B, G, H, W], decoded mask probabilities.
      target: float[B, H, W] in 0..1.
      valid: bool[B, G], well-formed completions; the others get 0.
      boundary: compare the masks' boundaries only.

    Returns:
      float32[B, G] in 0..1; 1 where both masks are empty.
    """
    measure = metrics.boundary_iou if boundary else metrics.mask_iou
    iou = measure(masks > 0.5, (target > 0.5)[:, None])
    return jnp.where(valid, iou, 0.0).astype(jnp.float32)


def token_match(parsed: ParsedMask, target_codes: jax.Array) -> jax.Array:
    """Share of each answer's codes that equal the tokenizer's own at the same place.

    A mask's leading codes do not depend on how many are kept, so answers of any length compare.

    Args:
      parsed: the completions' masks, leading axes [B, G].
      target_codes: int32[B, L], the target mask as the tokenizer writes it.

    Returns:
      float32[B, G] in 0..1; 0 for malformed answers.
    """
    equal = (parsed.codes == target_codes[:, None]) & parsed.code_mask
    return jnp.sum(equal, axis=-1, dtype=jnp.float32) / jnp.maximum(parsed.length, 1)


def format_checks(parsed: ParsedMask) -> jax.Array:
    """The four checks of the reference's partial credit.

    Returns:
      bool[..., 4]: exactly one start; exactly one end; (both and) 1..L tokens between; (all that and) only
      codes between.
    """
    return jnp.stack([parsed.num_starts == 1, parsed.num_ends == 1, parsed.in_range, parsed.valid], axis=-1)


def compute_rewards(
    parsed: ParsedMask,
    iou: jax.Array,
    cfg: RewardConfig,
    *,
    boundary: jax.Array | None = None,
    tokens: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Combines format, IoU and length, and boundary and token match if given, into the reward of each sample.

    Args:
      parsed: the completions' masks, leading axes [B, G].
      iou: float32[B, G] from `iou_reward`.
      cfg: form and weights.
      boundary: float32[B, G] from `iou_reward(..., boundary=True)`; needed for a boundary_weight > 0.
      tokens: float32[B, G] from `token_match`; needed for a token_weight > 0.

    Returns:
      rewards float32[B, G], and its parts, each float32[B, G]: format, iou, length_reward, boundary and tokens (those
      given), which sum to the reward, and length (mask tokens, 0 if malformed) and valid (1 if well formed).

    Raises:
      ValueError: a part has a weight but is not given.
    """
    extra = {"boundary": (boundary, cfg.boundary_weight), "tokens": (tokens, cfg.token_weight)}
    for name, (part, weight) in extra.items():
        require(part is not None or weight == 0, name, part, f"values for a weight of {weight}")
    valid = parsed.valid.astype(jnp.float32)
    if cfg.kind == "paper":
        format_part = cfg.format_weight * valid
        iou_part = cfg.iou_weight * iou * valid
        length_part = -cfg.length_weight * parsed.length.astype(jnp.float32)
    else:
        num_latent_tokens = parsed.codes.shape[-1]
        format_part = 0.1 * jnp.sum(format_checks(parsed), axis=-1, dtype=jnp.float32)
        iou_part = iou * valid
        unused = num_latent_tokens - parsed.num_between
        length_part = unused.astype(jnp.float32) * cfg.length_weight
    components = {"format": format_part, "iou": iou_part, "length_reward": length_part}
    components |= {name: weight * part * valid for name, (part, weight) in extra.items() if part is not None}
    rewards = sum(components.values(), jnp.float32(0))
    return rewards, {**components, "length": parsed.length.astype(jnp.float32), "valid": valid}


def group_advantages(
    rewards: jax.Array,
    normalization: Literal["paper", "reference", "none"] = "paper",
    eps: float = 1e-4,
) -> jax.Array:
    """Centres, and usually scales, the rewards inside each group.

    Args:
      rewards: float32[B, G], G >= 2.
      normalization: "paper" divides by `std + eps`, "reference" by `std + 0.1 + eps` (Compat: damps the
        advantages of groups whose rewards hardly differ), "none" does not divide (dr_grpo). The standard
        deviation is the unbiased one.
      eps: bounds the advantages of groups whose rewards hardly differ.

    Returns:
      float32[B, G]; exactly 0 in a group of equal rewards, whatever their size.

    Raises:
      ValueError: unknown `normalization`, or fewer than two samples in a group.
    """
    offsets = {"paper": eps, "reference": 0.1 + eps, "none": 0.0}
    require(normalization in offsets, "grpo.advantage_normalization", normalization, f"one of {tuple(offsets)}")
    require(rewards.shape[-1] >= 2, "grpo.num_generations", rewards.shape[-1], "at least 2")
    # Note: differences from the first reward are exactly 0 where all are equal; those from a rounded mean are not. The
    # barrier keeps a compiler from computing a reward twice, with other roundings.
    rewards = jax.lax.optimization_barrier(rewards.astype(jnp.float32))
    above_first = rewards - rewards[..., :1]
    centred = above_first - jnp.mean(above_first, axis=-1, keepdims=True)
    if normalization == "none":
        return centred
    deviation = jnp.sqrt(jnp.sum(jnp.square(centred), axis=-1, keepdims=True) / (rewards.shape[-1] - 1))
    return centred / (deviation + offsets[normalization])


def informative_groups(rewards: jax.Array, tolerance: float = 1e-6) -> jax.Array:
    """Which groups of float32[B, G] have rewards that differ by more than `tolerance`; bool[B].

    The others have no gradient; `grpo.max_rollouts` > 1 replaces them by groups of fresh prompts, and leaves those that
    remain out of the completion mask.
    """
    return jnp.max(rewards, axis=-1) - jnp.min(rewards, axis=-1) > tolerance
