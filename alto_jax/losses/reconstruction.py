"""Losses of all stages: reconstruction, VQ, length, token cross-entropy, mask loss and GRPO.

Pure functions of arrays; whatever dtype comes in, the arithmetic is float32. Stages 1 and 1.5 use
`reconstruction_loss` (paper section 3.1), stage 2 `token_cross_entropy` and `mask_loss` (section 3.2),
stage 3 `grpo_loss` (section 3.3). Dimension letters are those of `alto_jax.batch`.
"""

from collections.abc import Callable
import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from alto_jax.config import require
from alto_jax.mllm.text import IGNORE

_GRAY = (0.2989, 0.5870, 0.1140)
_HIGHEST = jax.lax.Precision.HIGHEST


# ---------------------------------------------------------------------------------------------------
# Reconstruction (stages 1 and 1.5)


@dataclasses.dataclass(frozen=True)
class ReconstructionLossConfig:
    """Weights of the terms of `reconstruction_loss`; the defaults give the reference's stage-1 total.

    Terms of weight 0 are not computed, save `mse`, which is always reported. The paper's own form is
    `mse=1, edge_weighted_mse=0, edge=0`; `bce` and `dice` on logits are what trains fastest from scratch.

    bce_dice_on_probabilities: Compat: the reference applies the sigmoid of its BCE and dice terms to
      values that already went through one.
    """

    edge_weighted_mse: float = 1.0
    mse: float = 0.0
    edge: float = 0.2
    bce: float = 0.0
    dice: float = 0.0
    quantizer: float = 1.0
    length: float = 0.01
    bce_dice_on_probabilities: bool = False

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "bce_dice_on_probabilities":
                require(value >= 0, f"losses.{field.name}", value, "a weight >= 0")


def reconstruction_loss(
    logits: jax.Array | None,
    target: jax.Array,
    cfg: ReconstructionLossConfig,
    *,
    quantizer_loss: jax.Array | float = 0.0,
    length_loss: jax.Array | float = 0.0,
    probabilities: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the training loss of the mask tokenizer.

    Args:
      logits: float[B, H, W], mask logits; may be None if `probabilities` are given and no term needs it.
      target: float[B, H, W] in 0..1 (or [B, H, W, 3], as RGB).
      cfg: the weights.
      quantizer_loss: scalar, codebook + commitment loss (`vq_loss`).
      length_loss: scalar, see `length_loss`.
      probabilities: float[B, H, W] or [B, H, W, 3], the reconstruction; default sigmoid(logits).

    Returns:
      The total (float32 scalar, averaged over samples) and the unweighted terms by name.

    Raises:
      ValueError: BCE or dice on logits is asked for but `logits` is None.
    """
    target = target.astype(jnp.float32)
    if probabilities is None:
        probabilities = jax.nn.sigmoid(logits.astype(jnp.float32))
    probabilities = probabilities.astype(jnp.float32)
    terms: dict[str, jax.Array] = {"mse": mse(probabilities, target)}
    if cfg.edge_weighted_mse:
        terms["edge_weighted_mse"] = edge_weighted_mse(probabilities, target)
    if cfg.edge:
        terms["edge"] = edge_loss(probabilities, target)
    if cfg.bce or cfg.dice:
        scores = probabilities if cfg.bce_dice_on_probabilities else logits
        if scores is None:
            raise ValueError("logits: needed by the bce and dice terms, got None")
        terms["bce"] = bce(scores, target)
        terms["dice"] = dice(scores, target)
    terms["quantizer"] = jnp.asarray(quantizer_loss, jnp.float32)
    terms["length"] = jnp.asarray(length_loss, jnp.float32)
    total = sum((getattr(cfg, name) * value for name, value in terms.items()), jnp.float32(0))
    return total, terms


def mse(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Mean squared error over all elements; both float[B, ...]; returns a float32 scalar."""
    return jnp.mean(jnp.square(prediction.astype(jnp.float32) - target.astype(jnp.float32)))


def bce(logits: jax.Array, target: jax.Array) -> jax.Array:
    """Binary cross-entropy on logits float[B, ...] against target in 0..1, mean over all elements."""
    return jnp.mean(_bce_elements(logits.astype(jnp.float32), target.astype(jnp.float32)))


def _bce_elements(logits: jax.Array, target: jax.Array) -> jax.Array:
    return jnp.maximum(logits, 0) - logits * target + jnp.log1p(jnp.exp(-jnp.abs(logits)))


def dice(logits: jax.Array, target: jax.Array, smooth: float = 1e-5) -> jax.Array:
    """Dice loss on logits float[B, ...] against target in 0..1, per sample, then the mean; in 0..1."""
    probabilities = jax.nn.sigmoid(logits.astype(jnp.float32))
    return jnp.mean(dice_per_sample(probabilities, target.astype(jnp.float32), smooth))


def dice_per_sample(probabilities: jax.Array, target: jax.Array, smooth: float) -> jax.Array:
    """Returns float32[B]: `1 - (2 sum(p t) + smooth) / (sum(p) + sum(t) + smooth)` of each sample."""
    axes = tuple(range(1, probabilities.ndim))
    intersection = jnp.sum(probabilities * target, axis=axes)
    cardinality = jnp.sum(probabilities, axis=axes) + jnp.sum(target, axis=axes)
    return 1 - (2 * intersection + smooth) / (cardinality + smooth)


def edge_map(target: jax.Array) -> jax.Array:
    """Computes the reference's edge strength of a mask (NUMERICS section 6), without gradient.

    Args:
      target: float[B, H, W] or [B, H, W, 3], in 0..1.

    Returns:
      float32[B, H, W], each sample scaled to 0..1.
    """
    gray = _gray(jax.lax.stop_gradient(target))
    edges = jnp.zeros_like(gray)
    for size, weight in ((3, 1.0), (5, 0.5)):
        centre = size // 2
        offset = jnp.arange(size, dtype=jnp.float32) - centre
        blur = jnp.exp(-jnp.square(offset) / (2 * (size / 3) ** 2))
        kernel = jnp.outer(offset / centre, blur / jnp.sum(blur))
        along, across = _correlate(gray, kernel)
        edges += weight * jnp.sqrt(jnp.square(along) + jnp.square(across) + 1e-8)
    edges = jax.nn.sigmoid(5.0 * (edges - 0.1))
    low = jnp.min(edges, axis=(1, 2), keepdims=True)
    high = jnp.max(edges, axis=(1, 2), keepdims=True)
    return (edges - low) / (high - low + 1e-8)


def edge_weighted_mse(probabilities: jax.Array, target: jax.Array) -> jax.Array:
    """Squared error weighted by (1 + 4 edge_map)^2, mean over all elements; the reference's `rec` term."""
    weight = 1 + edge_map(target) * 4.0
    if target.ndim == 4:
        weight = weight[..., None]
    return mse(probabilities * weight, target * weight)


def edge_loss(probabilities: jax.Array, target: jax.Array) -> jax.Array:
    """Distance of the edge strengths of reconstruction and target, the reference's `edge` term.

    Compat: the kernel's columns are +1, -1, -1, which do not sum to zero, so flat regions count too.
    """
    kernel = jnp.tile(jnp.array([1.0, -1.0, -1.0], jnp.float32), (3, 1))
    strengths = []
    for image in (target, probabilities):
        along, across = _correlate(_gray(image), kernel)
        strengths.append(jnp.sqrt(jnp.square(along) + jnp.square(across) + 1e-6))
    difference = strengths[0] - strengths[1]
    absolute = jnp.abs(difference)
    beta = 0.4
    smooth_l1 = jnp.where(absolute < beta, 0.5 * jnp.square(difference) / beta, absolute - 0.5 * beta)
    return jnp.mean(4.0 * (0.5 * jnp.square(difference) + 0.5 * smooth_l1))


def _gray(image: jax.Array) -> jax.Array:
    """Luma of float[B, H, W, 3], or of a mask [B, H, W] repeated to three channels."""
    image = image.astype(jnp.float32)
    red, green, blue = jnp.moveaxis(image, -1, 0) if image.ndim == 4 else (image,) * 3
    return _GRAY[0] * red + _GRAY[1] * green + _GRAY[2] * blue


def _correlate(image: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-correlates float32[B, H, W] with a square kernel and its transpose, zero padded."""
    kernels = jnp.stack([kernel, kernel.T], axis=-1)[:, :, None, :]
    out = jax.lax.conv_general_dilated(
        image[..., None],
        kernels,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=_HIGHEST,
    )
    return out[..., 0], out[..., 1]


# ---------------------------------------------------------------------------------------------------
# Quantizer and length


def vq_loss(latents: jax.Array, codes: jax.Array, commitment_cost: float) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the losses that tie latents and codebook.

    Args:
      latents: float[B, L, D], the (normalised) encoder outputs that were quantized.
      codes: float[B, L, D], the (normalised) codebook vectors chosen for them, with their gradient.
      commitment_cost: weight of the commitment term; 0.01 in ALTo, 0.25 in TiTok.

    Returns:
      `commitment + codebook` (float32 scalar) and both terms; `commitment` includes its weight.
    """
    latents, codes = latents.astype(jnp.float32), codes.astype(jnp.float32)
    commitment = commitment_cost * mse(latents, jax.lax.stop_gradient(codes))
    codebook = mse(codes, jax.lax.stop_gradient(latents))
    return commitment + codebook, {"commitment": commitment, "codebook": codebook}


def length_loss(expected_length: jax.Array, num_latent_tokens: int) -> jax.Array:
    """Mean expected stop index float[B], in 0..L-1, divided by L; the pressure towards few tokens."""
    return jnp.mean(expected_length.astype(jnp.float32)) / num_latent_tokens


# ---------------------------------------------------------------------------------------------------
# Token cross-entropy (stage 2)


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
      max_supervised: K; None means T - 1.
      loss_weight: float[B, T], weight of each label (see `len2weight`); None means 1.

    Returns:
      `sum(w * ce) / sum(w)` (float32 scalar, 0 if nothing is supervised), and metrics: token_accuracy,
      num_supervised, supervised_overflow.
    """
    limit = labels.shape[1] - 1 if max_supervised is None else max_supervised
    positions, targets, valid, overflow = select_supervised(labels, limit)
    logits = logits_fn(jnp.take_along_axis(hidden, positions[..., None], axis=1))
    nll = -token_log_probs(logits, targets)
    weight = valid.astype(jnp.float32)
    if loss_weight is not None:
        weight *= jnp.take_along_axis(loss_weight[:, 1:].astype(jnp.float32), positions, axis=1)
    total = jnp.sum(weight)
    loss = jnp.sum(jnp.where(valid, nll, 0) * weight) / jnp.where(total > 0, total, 1)
    count = jnp.sum(valid, dtype=jnp.int32)
    correct = jnp.sum(valid & (jnp.argmax(logits, axis=-1) == targets))
    metrics = {
        "token_accuracy": correct / jnp.maximum(count, 1),
        "num_supervised": count + overflow,
        "supervised_overflow": overflow,
    }
    return loss, metrics


def len2weight(num_tokens: jax.Array, reduction: Literal["token", "sample", "square"]) -> jax.Array:
    """Weight of each supervised token of a sample that has `num_tokens` of them (0 if it has none).

    Args:
      num_tokens: int32[...], >= 0.
      reduction: "token" gives 1 (every token counts the same), "sample" 1/n, "square" n^-0.5.

    Returns:
      float32[...].

    Raises:
      ValueError: unknown `reduction`.
    """
    powers = {"token": 0.0, "sample": -1.0, "square": -0.5}
    require(reduction in powers, "reduction", reduction, f"one of {tuple(powers)}")
    count = num_tokens.astype(jnp.float32)
    return jnp.where(count > 0, jnp.maximum(count, 1) ** powers[reduction], 0)


# ---------------------------------------------------------------------------------------------------
# Mask loss (stage 2)


@dataclasses.dataclass(frozen=True)
class MaskLossConfig:
    """Terms of `mask_loss`. The reference's form is `dice_reduction="batch", probability_clamp=1e-6`.

    dice_reduction: "sample" (mean of each sample's dice) or "batch" (one dice over all valid pixels).
    probability_clamp: Compat: with c > 0, BCE and dice are taken of probabilities clipped to c..1-c in
      float32; 0 is the exact BCE on logits, whose gradient does not vanish on saturated wrong pixels.
    """

    bce: float = 1.0
    dice: float = 0.25
    dice_reduction: Literal["sample", "batch"] = "sample"
    probability_clamp: float = 0.0

    def __post_init__(self):
        require(self.bce >= 0, "mask_loss.bce", self.bce, "a weight >= 0")
        require(self.dice >= 0, "mask_loss.dice", self.dice, "a weight >= 0")
        reductions = ("sample", "batch")
        require(self.dice_reduction in reductions, "mask_loss.dice_reduction", self.dice_reduction, reductions)
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
        elements = _bce_elements(logits, target)
    probabilities = probabilities * keep
    count = jnp.maximum(jnp.sum(valid), 1)
    bce_term = jnp.sum(jnp.mean(elements, axis=(1, 2)) * valid) / count
    if cfg.dice_reduction == "batch":
        dice_term = dice_per_sample(probabilities[None], target[None], 1e-6)[0]
    else:
        dice_term = jnp.sum(dice_per_sample(probabilities, target, 1e-6) * valid) / count
    return cfg.bce * bce_term + cfg.dice * dice_term, {"mask_bce": bce_term, "mask_dice": dice_term}


# ---------------------------------------------------------------------------------------------------
# GRPO (stage 3)


@dataclasses.dataclass(frozen=True)
class GrpoLossConfig:
    """Form of `grpo_loss`.

    objective:
      "paper": clipped importance ratio, mean over the tokens of each completion, then over completions.
      "reference": Compat: the PyTorch code: no old policy, no clipping, padding up to the longest
        completion of the group counts, and a group's loss is capped at `loss_cap`, with no gradient above.
      "dr_grpo": as "paper", but a completion's sum is divided by the constant T, not by its length.
      "dapo": as "paper", but the mean is over all tokens of the batch; use a larger `epsilon_high`.
      "gspo": one ratio per completion, the geometric mean of its tokens' ratios.
    epsilon_low, epsilon_high: the ratio is clipped to 1 - epsilon_low .. 1 + epsilon_high.
    beta: weight of the KL to the reference policy; 0 needs no reference.
    """

    objective: Literal["paper", "reference", "dr_grpo", "dapo", "gspo"] = "paper"
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    beta: float = 1e-3
    loss_cap: float = 1.0

    def __post_init__(self):
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

    divisor = {"dr_grpo": logps.shape[-1], "dapo": jnp.maximum(jnp.mean(valid_tokens), 1e-9)}
    divisor = divisor.get(cfg.objective, num_tokens)
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
