"""Stages 1 and 1.5: the mask tokenizer on a random number of leading tokens, then the length predictor."""

from collections.abc import Callable
import dataclasses
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alto_jax import metrics
from alto_jax.batch import MaskBatch
from alto_jax.data import sources
from alto_jax.experiment import ExperimentConfig
from alto_jax.losses import reconstruction
from alto_jax.mllm.alto_llm import init_params
from alto_jax.parallel import distributed, sharding
from alto_jax.stages.stage import Stage
from alto_jax.tokenizer.alto import ALTo
from alto_jax.tokenizer.length import leading_tokens
from alto_jax.tokenizer.quantizer import reseed_dead_codes

USAGE_DECAY = 0.98


def make(config: ExperimentConfig, mesh: jax.sharding.Mesh, directory: os.PathLike | None = None) -> Stage:
    """The stage for `config.stage` "stage1" or "stage1_5"."""
    cfg, model = config.tokenizer, ALTo(config.model.tokenizer)
    size = config.model.tokenizer
    is_first = config.stage == "stage1"

    def draw(rng: jax.Array, batch_size: int) -> dict[str, jax.Array]:
        drawn = {}
        if cfg.keep_tokens == "random":
            drawn["kept"] = jax.random.randint(rng, (batch_size,), 1, size.num_latent_tokens + 1)
        if cfg.withhold_image > 0:
            drawn["withheld"] = jax.random.bernoulli(jax.random.fold_in(rng, 1), cfg.withhold_image, (batch_size,))
        return drawn

    def loss_fn(params: dict, batch: MaskBatch, drawn: Any, step: jax.Array) -> tuple[jax.Array, tuple]:
        apply = tokenizer_apply(model, params)
        encoded = apply(batch.mask, method="encode")
        quantized = apply(encoded.z, method="quantize")
        # Compat: in the reference the length loss trains the encoder too, through the frozen length predictor.
        read = encoded if cfg.length_loss_reaches_encoder else jax.lax.stop_gradient(encoded)
        prediction = apply(read, method="predict_length")
        if cfg.keep_tokens == "random":
            count = drawn["kept"]
            keep = leading_tokens(count, size.num_latent_tokens)
        elif cfg.keep_tokens == "adaptive":
            keep, count = prediction.keep, prediction.num_kept
        else:
            keep = jnp.ones_like(prediction.keep)
            count = jnp.full(keep.shape[:1], size.num_latent_tokens)
        is_quantized = step >= cfg.unquantized_steps
        embeddings = jnp.where(is_quantized, quantized.embeddings, quantized.z)
        features = image_features(apply, batch)
        if cfg.withhold_image > 0 and features is not None:
            features = jnp.where(drawn["withheld"][:, None, None, None], 0, features)
        logits = apply(embeddings * keep[..., None], features, method="decode")
        vq, vq_terms = reconstruction.vq_loss(quantized.z, quantized.entries, cfg.commitment_cost)
        length = reconstruction.length_loss(prediction.expectation, size.num_latent_tokens)
        loss, terms = reconstruction.reconstruction_loss(
            logits, batch.mask, cfg.loss, quantizer_loss=vq * is_quantized, length_loss=length
        )
        logged = {**terms, **vq_terms, "iou": jnp.mean(mask_iou(logits, batch.mask)), "kept": jnp.mean(count)}
        if is_first:
            used = jnp.zeros(size.codebook_size).at[quantized.codes.reshape(-1)].set(1.0)
            logged["codes_in_batch"] = jnp.sum(used) / min(size.codebook_size, quantized.codes.size)
        else:
            logged["length_std"] = jnp.std(prediction.num_kept.astype(jnp.float32))
        return loss, (logged, (quantized.codes, quantized.z))

    def after_update(state: Any, aux: Any, rng: jax.Array) -> Any:
        codes, z = jax.lax.stop_gradient(aux)
        used = jnp.zeros_like(state.stats["code_usage"]).at[codes.reshape(-1)].add(1.0 / codes.size)
        usage = USAGE_DECAY * state.stats["code_usage"] + (1 - USAGE_DECAY) * used
        due = (state.step % cfg.reseed_every == 0) & (state.step <= cfg.reseed_until)
        quantizer = state.params["tokenizer"]["quantizer"]
        reseeded = reseed_dead_codes(quantizer, usage, z.reshape(-1, z.shape[-1]), rng, cfg.reseed_threshold)
        quantizer = jax.tree.map(lambda new, old: jnp.where(due, new, old), reseeded, quantizer)
        params = {**state.params, "tokenizer": {**state.params["tokenizer"], "quantizer": quantizer}}
        dead = due & (usage < cfg.reseed_threshold / usage.shape[0])
        usage = jnp.where(dead, 1.0 / usage.shape[0], usage)
        return state.replace(params=params, stats={"code_usage": usage})

    reseeds = is_first and cfg.reseed_every > 0
    return Stage(
        init=functools.partial(init_params, dataclasses.replace(config.model, vision=None, language_model=None)),
        data=lambda share: sources.mask_iterator(config, share, directory),
        loss_fn=loss_fn,
        draw=draw if cfg.keep_tokens == "random" or cfg.withhold_image > 0 else None,
        inherits=("tokenizer",),
        requires=() if is_first else ("tokenizer",),
        reset=None if is_first else "^tokenizer/length/",
        headline=("loss", "iou", "kept") if is_first else ("loss", "iou", "kept", "length_std"),
        init_stats=lambda: {"code_usage": jnp.full(size.codebook_size, 1.0 / size.codebook_size)} if reseeds else {},
        after_update=after_update if reseeds else None,
        evaluate=make_evaluate(config, model, mesh, adaptive=not is_first),
        previous="python -m alto_jax.main --config=configs/stage1.py --workdir=DIR",
    )


def tokenizer_apply(model: ALTo, params: dict) -> Any:
    """`apply(*args, method=name)` of the tokenizer with the parameters of a whole model."""
    variables = {"params": params["tokenizer"]}
    return lambda *args, method: model.apply(variables, *args, method=method)


def image_features(apply: Any, batch: MaskBatch) -> jax.Array | None:
    """The SAM features of a batch, computed (`apply`: see `tokenizer_apply`) unless they are cached."""
    return apply(batch.image, method="image_features") if batch.features is None else batch.features


def mask_iou(logits: jax.Array, target: jax.Array) -> jax.Array:
    """IoU float32[B] of mask logits and targets [B, H, W], both at probability 0.5; 1 where both are empty."""
    prediction, target = logits > 0, target > 0.5
    intersection = jnp.sum(prediction & target, axis=(1, 2), dtype=jnp.float32)
    union = jnp.sum(prediction | target, axis=(1, 2), dtype=jnp.float32)
    return jnp.where(union > 0, intersection / jnp.maximum(union, 1), 1.0)


def make_evaluate(config: ExperimentConfig, model: ALTo, mesh: jax.sharding.Mesh, *, adaptive: bool) -> Any:
    """Reconstruction on held-out masks at fixed numbers of tokens and (if `adaptive`) at the predicted ones.

    The result holds giou_by_tokens {k: gIoU}, giou_full, codes_used (share of the codebook), and with
    `adaptive` giou_adaptive, giou_fixed_same_mean (interpolated between the two fixed lengths around the
    mean), mean_length, std_length and the lengths.
    """
    num_tokens = model.cfg.num_latent_tokens
    # Note: every process computes the same and must be able to read the result.
    whole = sharding.replicated(mesh)
    jit = lambda function: distributed.meeting(jax.jit(sharding.on_mesh(mesh, function), out_shardings=whole))

    @jit
    def encode(params: dict, batch: MaskBatch) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        apply = tokenizer_apply(model, params)
        encoded = apply(batch.mask, method="encode")
        length = apply(encoded, method="predict_length").num_kept
        return apply(encoded.z, method="quantize").codes, length, image_features(apply, batch)

    @jit
    def reconstruct(params: dict, codes: Any, length: Any, features: Any, target: Any) -> jax.Array:
        return mask_iou(tokenizer_apply(model, params)(codes, length, features, method="decode_codes"), target)

    def evaluate(params: dict) -> dict[str, Any]:
        counts = {k for k in config.eval.token_counts if k <= num_tokens} | {num_tokens}
        parts = []
        for batch in sources.held_out_masks(config):
            codes, length, features = encode(params, batch)
            parts.append((codes, np.asarray(length), features, batch.mask))
        lengths = np.concatenate([p[1] for p in parts])

        def giou(length_of: Callable[[np.ndarray], np.ndarray]) -> float:
            ious = [reconstruct(params, p[0], length_of(p[1]), p[2], p[3]) for p in parts]
            return float(np.mean(np.concatenate([np.asarray(i) for i in ious])))

        def fixed(k: int) -> float:
            return giou(lambda length: np.full_like(length, k))

        codes = np.concatenate([np.asarray(p[0]) for p in parts])
        by_tokens = {str(k): fixed(k) for k in sorted(counts)}
        result = {
            "giou_full": by_tokens[str(num_tokens)],
            "giou_by_tokens": by_tokens,
            "codes_used": metrics.code_usage(codes, model.cfg.codebook_size),
        }
        if adaptive:
            mean = float(lengths.mean())
            low = int(np.floor(mean))
            ends = [fixed(low), fixed(min(low + 1, num_tokens))]
            result |= {
                "giou_adaptive": giou(lambda length: length),
                "giou_fixed_same_mean": ends[0] + (mean - low) * (ends[1] - ends[0]),
                "mean_length": mean,
                "std_length": float(lengths.std()),
                "lengths": lengths.tolist(),
            }
        return result

    return evaluate if config.eval.num_samples else None
