"""Losses of stage 2 (paper section 3.2): next-token cross-entropy, and the mask loss of what the tokens decode to."""

from collections.abc import Callable
import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from alto_jax.config import require
from alto_jax.losses.reconstruction import bce_elements, dice_per_sample
from alto_jax.mllm.text import IGNORE


def token_log_probs(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """Log-probability of each id under untempered logits.

    Args:
      logits: float[..., V].
      ids: int32[...], in 0..V-1.

    Returns:
      float32[...].
    """
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def token_entropy(logits: jax.Array) -> jax.Array:
    """Entropy in nats of the distribution of logits float[..., V]; returns float32[...]."""
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)


def select_supervised(labels: jax.Array, max_supervised: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Chooses, per row, the first `max_supervised` positions whose next token is supervised.

    Args:
      labels: int32[B, T], unshifted, -100 where not supervised.
      max_supervised: K, a static bound; values above T - 1 are the same as T - 1.

    Returns:
      positions int32[B, K] of the hidden states, their next_labels int32[B, K] (0 where not valid),
      valid bool[B, K], and overflow int32 scalar: how many supervised tokens of the batch were left out.
    """
    next_labels = labels[:, 1:]
    supervised = next_labels != IGNORE
    max_supervised = min(max_supervised, next_labels.shape[1])
    positions = jnp.argsort(~supervised, axis=1, stable=True)[:, :max_supervised].astype(jnp.int32)
    valid = jnp.take_along_axis(supervised, positions, axis=1)
    chosen = jnp.where(valid, jnp.take_along_axis(next_labels, positions, axis=1), 0)
    overflow = jnp.sum(supervised, dtype=jnp.int32) - jnp.sum(valid, dtype=jnp.int32)
    return positions, chosen, valid, overflow


def token_cross_entropy(
    hidden: jax.Array,
    labels: jax.Array,
    logits_fn: Callable[[jax.Array], jax.Array],
    *,
    max_supervised: int | None = None,
    at_once: int | None = None,
    loss_weight: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Next-token cross-entropy whose logits exist at supervised positions only.

    Equals the mean over all supervised tokens of the batch (gradient included) as long as no row has more
    than `max_supervised`; else `metrics["supervised_overflow"]` is positive, which callers should treat
    as an error.

    Args:
      hidden: float[B, T, D], states before the LM head.
      labels: int32[B, T], unshifted; the state at t is scored on labels[t + 1]; -100 is ignored.
      logits_fn: maps float[B, K, D] to float[B, K, V].
      max_supervised: tokens of a row that are scored; None means all.
      at_once: K, how many positions of a row have logits at the same time. Rows with more take turns, as many as the
        batch's longest answer needs, inside the one program: no token is lost, nothing is compiled anew, and the
        memory stays that of K positions. None means all.
      loss_weight: float[B, T], weight of each label; None means 1.

    Returns:
      `sum(w * ce) / sum(w)` (float32 scalar, 0 if nothing is supervised), and metrics: token_accuracy,
      num_supervised, supervised_overflow.
    """
    limit = labels.shape[1] - 1 if max_supervised is None else max_supervised
    positions, targets, valid, overflow = select_supervised(labels, limit)
    weight = valid.astype(jnp.float32)
    if loss_weight is not None:
        weight *= jnp.take_along_axis(loss_weight[:, 1:].astype(jnp.float32), positions, axis=1)

    def sums(positions: jax.Array, targets: jax.Array, valid: jax.Array, weight: jax.Array) -> tuple:
        """(sum of w * ce, number of right tokens) of some positions."""
        logits = logits_fn(jnp.take_along_axis(hidden, positions[..., None], axis=1))
        nll = -token_log_probs(logits, targets)
        correct = jnp.sum(valid & (jnp.argmax(logits, axis=-1) == targets), dtype=jnp.int32)
        return jnp.sum(jnp.where(valid, nll, 0) * weight), correct

    chosen = (positions, targets, valid, weight)
    if at_once is None or at_once >= positions.shape[1]:
        nll, correct = sums(*chosen)
    else:
        # Note: nearly all batches fit at once; the first branch is what they cost.
        fits = ~jnp.any(valid[:, at_once])
        nll, correct = jax.lax.cond(
            fits, lambda: sums(*(a[:, :at_once] for a in chosen)), lambda: _in_turns(sums, chosen, at_once)
        )
    total = jnp.sum(weight)
    loss = nll / jnp.where(total > 0, total, 1)
    count = jnp.sum(valid, dtype=jnp.int32)
    metrics = {
        "token_accuracy": correct / jnp.maximum(count, 1),
        "num_supervised": count + overflow,
        "supervised_overflow": overflow,
    }
    return loss, metrics


def _in_turns(sums: Callable, chosen: tuple, at_once: int) -> tuple[jax.Array, jax.Array]:
    """`sums` of [B, K] arrays in parts of `at_once` columns; parts without a valid position are passed over."""
    padding = -chosen[0].shape[1] % at_once
    split = lambda a: jnp.pad(a, ((0, 0), (0, padding))).reshape(len(a), -1, at_once).swapaxes(0, 1)

    def turn(total: tuple, part: tuple) -> tuple[tuple, None]:
        nothing = lambda: (jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32))
        # Note: the logits of a turn are computed again in the backward pass, so that those of one turn exist at a time.
        found = jax.lax.cond(jnp.any(part[2]), jax.checkpoint(lambda: sums(*part)), nothing)
        return jax.tree.map(jnp.add, total, found), None

    zeros = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
    return jax.lax.scan(turn, zeros, tuple(map(split, chosen)))[0]


@dataclasses.dataclass(frozen=True)
class MaskLossConfig:
    """Terms of `mask_loss`. The reference's form is `dice_reduction="batch", probability_clamp=1e-6`.

    Attributes:
      bce, dice: weights.
      dice_reduction: "sample" (mean of each sample's dice) or "batch" (one dice over all valid pixels).
      probability_clamp: Compat: with c > 0, BCE and dice are taken of probabilities clipped to c..1-c in float32; 0 is
        the exact BCE on logits, whose gradient does not vanish on saturated wrong pixels.
    """

    bce: float = 1.0
    dice: float = 0.25
    dice_reduction: Literal["sample", "batch"] = "sample"
    probability_clamp: float = 0.0

    def __post_init__(self) -> None:
        require(self.bce >= 0, "mask_loss.bce", self.bce, "a weight >= 0")
        require(self.dice >= 0, "mask_loss.dice", self.dice, "a weight >= 0")
        reductions = ("sample", "batch")
        require(
            self.dice_reduction in reductions, "mask_loss.dice_reduction", self.dice_reduction, f"one of {reductions}"
        )
        clamp = self.probability_clamp
        require(0 <= clamp < 0.5, "mask_loss.probability_clamp", clamp, "a value in 0..0.5")


def mask_token_probabilities(logits: jax.Array, length: jax.Array, scale: float = 2.0) -> jax.Array:
    """Soft mask tokens for decoding with gradient: softmax over the codebook, rows from `length` on zero.

    Args:
      logits: float[..., L, C], the LM head restricted to the codebook's ids, at the positions of
        `mask_tokens.find_supervised_masks`.
      length: int32[...], tokens to keep, in 0..L.
      scale: Compat: the reference multiplies the logits by 2.

    Returns:
      float32[..., L, C].
    """
    probabilities = jax.nn.softmax(scale * logits.astype(jnp.float32), axis=-1)
    keep = jnp.arange(logits.shape[-2]) < length[..., None]
    return probabilities * keep[..., None]


def mask_loss(
    logits: jax.Array, target: jax.Array, valid: jax.Array, cfg: MaskLossConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """BCE + dice between decoded masks and targets, over the valid samples.

    Args:
      logits: float[N, H, W], logits of the decoded masks.
      target: float[N, H, W] in 0..1.
      valid: bool[N]; the loss is 0 if none is.
      cfg: the weights and the form of both terms.

    Returns:
      The loss (float32 scalar) and its unweighted terms `mask_bce` and `mask_dice`.
    """
    keep = valid[:, None, None]
    logits = jnp.where(keep, logits.astype(jnp.float32), 0)
    target = jnp.where(keep, target.astype(jnp.float32), 0)
    probabilities = jax.nn.sigmoid(logits)
    if cfg.probability_clamp:
        clamp = cfg.probability_clamp
        probabilities = jnp.clip(probabilities, clamp, 1 - clamp)
        elements = -target * jnp.log(probabilities) - (1 - target) * jnp.log(1 - probabilities)
    else:
        elements = bce_elements(logits, target)
    probabilities = probabilities * keep
    count = jnp.maximum(jnp.sum(valid), 1)
    bce_term = jnp.sum(jnp.mean(elements, axis=(1, 2)) * valid) / count
    if cfg.dice_reduction == "batch":
        dice_term = dice_per_sample(probabilities[None], target[None], 1e-6)[0]
    else:
        dice_term = jnp.sum(dice_per_sample(probabilities, target, 1e-6) * valid) / count
    return cfg.bce * bce_term + cfg.dice * dice_term, {"mask_bce": bce_term, "mask_dice": dice_term}
