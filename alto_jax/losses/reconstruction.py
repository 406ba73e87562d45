"""Losses of the mask tokenizer (stages 1 and 1.5; paper section 3.1): reconstruction, vector quantizer, length."""

import dataclasses

import jax
import jax.numpy as jnp

from alto_jax.config import require

_GRAY = (0.2989, 0.5870, 0.1140)
_HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class ReconstructionLossConfig:
    """Weights of the terms of `reconstruction_loss`; the defaults give the reference's stage-1 total.

    Terms of weight 0 are not computed, save `mse`, which is always reported. The paper's own form is
    `mse=1, edge_weighted_mse=0, edge=0`; `bce` and `dice` on logits are what trains fastest from scratch; `quantizer`
    and `length` weigh the quantizer's and the length predictor's own losses.

    Attributes:
      bce_dice_on_probabilities: Compat: the reference applies the sigmoid of its BCE and dice terms to values that
        already went through one.
    """

    edge_weighted_mse: float = 1.0
    mse: float = 0.0
    edge: float = 0.2
    bce: float = 0.0
    dice: float = 0.0
    quantizer: float = 1.0
    length: float = 0.01
    bce_dice_on_probabilities: bool = False

    def __post_init__(self) -> None:
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
        if logits is None:
            raise ValueError("logits: needed where no probabilities are given, got None")
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
    # Note: a term of weight 0 is no part of the loss, so that what it alone reads counts as not read.
    weighted = (getattr(cfg, name) * value for name, value in terms.items() if getattr(cfg, name))
    total = sum(weighted, jnp.float32(0))
    return total, terms


def mse(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Mean squared error over all elements; both float[B, ...]; returns a float32 scalar."""
    return jnp.mean(jnp.square(prediction.astype(jnp.float32) - target.astype(jnp.float32)))


def bce(logits: jax.Array, target: jax.Array) -> jax.Array:
    """Binary cross-entropy on logits float[B, ...] against target in 0..1, mean over all elements."""
    return jnp.mean(bce_elements(logits.astype(jnp.float32), target.astype(jnp.float32)))


def bce_elements(logits: jax.Array, target: jax.Array) -> jax.Array:
    """Binary cross-entropy of each element; both float32[...]."""
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
