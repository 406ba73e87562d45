"""Stage 2: supervised fine-tuning of the MLLM on text and mask tokens, with the mask tokenizer frozen.

Stage 0 is the same on text answers alone, of a model without a mask tokenizer.
"""

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alto_jax.batch import ChatBatch, PromptBatch
from alto_jax.data import sources, vocabulary
from alto_jax.experiment import ExperimentConfig
from alto_jax.layers import apply_module
from alto_jax.losses import tokens as token_losses
from alto_jax.mllm import mask_tokens
from alto_jax.mllm.alto_llm import ALToLLM, init_params, segment
from alto_jax.mllm.generate import GenerateConfig
from alto_jax.mllm.text import IGNORE
from alto_jax.parallel import distributed, sharding
from alto_jax.stages.stage import Stage
from alto_jax.stages.tokenizer import mask_iou, tokenizer_apply
from alto_jax.tokenizer.alto import ALTo


def make(config: ExperimentConfig, mesh: jax.sharding.Mesh, directory: os.PathLike | None = None) -> Stage:
    """The stage for `config.stage` "stage2"."""
    text = vocabulary.text_tokenizer(config, directory)
    return Stage(
        init=lambda key: init_params(config.model, key),
        data=lambda share: sources.chat_iterator(config, text, share, directory),
        loss_fn=make_loss(config, text.ids),
        draw=jax.random.split if config.model.need_vision().drop_path_rate > 0 else None,
        totals=make_totals(config, text.ids),
        inherits=("tokenizer", "vision", "projector", "language_model"),
        requires=("tokenizer",),
        evaluate=make_evaluate(config, text, mesh),
        previous="python -m alto_jax.main --config=configs/stage1_5.py --config.init_from=DIR --workdir=DIR",
        headline=("loss", "token_loss", "token_accuracy", "mask_dice", "length"),
        check=check_supervised,
        save_files=text.save,
    )


def make_text_stage(config: ExperimentConfig, mesh: jax.sharding.Mesh, directory: os.PathLike | None = None) -> Stage:
    """The stage for `config.stage` "stage0"."""
    text = vocabulary.text_tokenizer(config, directory)
    return Stage(
        init=lambda key: {k: v for k, v in init_params(config.model, key).items() if k != "tokenizer"},
        data=lambda share: sources.chat_iterator(config, text, share, directory),
        loss_fn=make_loss(config, text.ids),
        draw=jax.random.split if config.model.need_vision().drop_path_rate > 0 else None,
        totals=make_totals(config, text.ids),
        inherits=("vision", "projector", "language_model"),
        evaluate=make_text_evaluate(config, text, mesh),
        headline=("loss", "token_accuracy"),
        check=check_supervised,
        save_files=text.save,
    )


def check_supervised(means: dict[str, float]) -> None:
    """Raises ValueError if supervised tokens did not fit into `config.sft.max_supervised`."""
    if means.get("supervised_overflow", 0) > 0:
        raise ValueError(
            "config.sft.max_supervised: rows have more supervised tokens than it allows"
            f" ({means['supervised_overflow']:.1f} of a batch were left out); raise it, or give 0 for no bound"
        )


def make_loss(config: ExperimentConfig, special: Any) -> Any:
    """`loss_fn(params, batch, drawn, step, totals=None)` of stage 2: token cross-entropy and the mask loss."""
    cfg, size, model = config.sft, config.model.tokenizer, ALToLLM(config.model)

    def loss_fn(
        params: dict,
        batch: ChatBatch,
        drawn: jax.Array | None,
        step: jax.Array,
        totals: dict[str, jax.Array] | None = None,
    ) -> tuple[jax.Array, tuple]:
        del step
        apply = functools.partial(apply_module, model, params)
        batch_size, num_masks = batch.mask_valid.shape
        is_packed = batch.segment_ids is not None
        masks = batch.masks.reshape(-1, size.mask_size, size.mask_size)
        ids, labels, segment_ids, length = written_tokens(config, special, params, batch)
        image_tokens = apply(batch.image, drawn, method="image_tokens")
        inputs = apply(ids, image_tokens, special.img_context, method="embed")
        if is_packed:
            positions, segments = segment_positions(segment_ids), segment_ids
        else:  # Note: rows are padded on the right, so that the causal mask alone hides the padding.
            positions, segments = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape), None
        hidden, _ = apply(inputs, positions, segment_ids=segments, method="hidden")
        logits_fn = lambda h: apply(h, method="logits")
        at_once = cfg.at_once * config.data.pack_samples
        limit = at_once if cfg.max_supervised else None
        loss, logged = token_losses.token_cross_entropy(
            hidden, labels, logits_fn, max_supervised=limit, at_once=at_once
        )
        if totals is not None:  # Note: both terms are means over something else than rows.
            loss = loss * logged["num_supervised"] / jnp.maximum(totals["tokens"], 1e-9)
        logged = {"token_loss": loss, **logged, "length": jnp.sum(length * batch.mask_valid.reshape(-1)) / jnp.maximum(
            jnp.sum(batch.mask_valid), 1)}  # fmt: skip
        if cfg.mask_loss_weight > 0:
            found = mask_tokens.find_supervised_masks(ids, labels, special, size.num_latent_tokens, num_masks)
            at = found.positions.reshape(batch_size, -1, 1)
            code_logits = apply(jnp.take_along_axis(hidden, at, axis=1), special, method="code_logits")
            code_logits = code_logits.reshape(batch_size * num_masks, size.num_latent_tokens, -1)
            probs = token_losses.mask_token_probabilities(code_logits, found.length.reshape(-1))
            features = apply(*images_with_masks(batch), method="image_features")
            if features is not None:
                features = features_of_masks(features, batch)
            mask_logits = tokenizer_apply(ALTo(size), params)(probs, features, method="decode_probs")
            valid = (found.valid & batch.mask_valid).reshape(-1)
            term, parts = token_losses.mask_loss(mask_logits, masks, valid, cfg.mask_loss)
            if totals is not None:
                term = term * jnp.sum(valid) / jnp.maximum(totals["masks"], 1e-9)
            loss = loss + cfg.mask_loss_weight * term
            logged |= parts
        return loss, (logged, ())

    return loss_fn


def written_tokens(config: ExperimentConfig, special: Any, params: dict, batch: ChatBatch) -> tuple:
    """(ids, labels, segment_ids, length int32[B*M]) of a batch with its masks written as mask tokens."""
    size = config.model.tokenizer
    batch_size, num_masks = batch.mask_valid.shape
    if "tokenizer" not in params:  # Note: stage 0, whose conversations hold no masks.
        return batch.ids, batch.labels, batch.segment_ids, jnp.zeros(batch_size * num_masks, jnp.int32)
    if batch.codes is None:
        masks = batch.masks.reshape(-1, size.mask_size, size.mask_size)
        codes, length = jax.lax.stop_gradient(tokenizer_apply(ALTo(size), params)(masks, method="tokenize"))
    else:
        assert batch.code_lengths is not None  # Note: cached together with the codes.
        codes, length = batch.codes, batch.code_lengths.reshape(-1)
    ids, labels, segment_ids = mask_tokens.replace_mask_tokens(
        batch.ids, batch.labels, codes.reshape(batch_size, num_masks, -1), length.reshape(batch_size, num_masks),
        batch.mask_valid, special, text_mask=batch.text_mask if batch.segment_ids is None else batch.segment_ids,
    )  # fmt: skip
    return ids, labels, segment_ids, length


def make_totals(config: ExperimentConfig, special: Any) -> Any:
    """`totals(params, batch)` of stage 2: the numbers of supervised tokens and of masks with a loss."""
    size = config.model.tokenizer

    def totals(params: dict, batch: ChatBatch) -> dict[str, jax.Array]:
        ids, labels, _, _ = written_tokens(config, special, params, batch)
        num_masks = batch.mask_valid.shape[1]
        found = mask_tokens.find_supervised_masks(ids, labels, special, size.num_latent_tokens, num_masks)
        tokens = jnp.sum(labels[:, 1:] != IGNORE, dtype=jnp.float32)
        return {"tokens": tokens, "masks": jnp.sum(found.valid & batch.mask_valid, dtype=jnp.float32)}

    return totals


def segment_positions(segment_ids: jax.Array) -> jax.Array:
    """Positions int32[B, T] that begin at 0 in each conversation of packed rows.

    Args:
      segment_ids: int32[B, T]; the positions of a conversation share a number and follow each other.
    """
    time = jnp.arange(segment_ids.shape[1])
    begins = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1] - 1) != 0
    return time - jax.lax.cummax(jnp.where(begins, time, 0), axis=1)


def images_with_masks(batch: ChatBatch) -> tuple[Any, Any, Any]:
    """(image, pixel_image, features) of what may have masks: of packed rows all images, along one axis, of rows with
    tiles the first, as one with masks has no other."""
    if batch.segment_ids is not None:
        join = lambda a: None if a is None else a.reshape(-1, *a.shape[2:])
        return join(batch.image), join(batch.pixel_image), join(batch.features)
    image = batch.image[:, 0] if batch.image.ndim == 5 else batch.image
    return image, batch.pixel_image, batch.features


def features_of_masks(features: jax.Array, batch: ChatBatch) -> jax.Array:
    """Image features [B or B*J, ...] of a batch's images → [B*M, ...], those of each mask's image."""
    batch_size, num_masks = batch.mask_valid.shape
    if batch.mask_image is None:
        return jnp.repeat(features, num_masks, axis=0)
    features = features.reshape(batch_size, -1, *features.shape[1:])
    index = batch.mask_image.reshape(batch_size, num_masks, *(1,) * (features.ndim - 2))
    return jnp.take_along_axis(features, index, axis=1).reshape(-1, *features.shape[2:])


def make_text_evaluate(config: ExperimentConfig, text: Any, mesh: jax.sharding.Mesh) -> Any:
    """How well held-out conversations without masks are answered.

    The result holds token_accuracy, and exact: the share of answers that greedy decoding would give word for word after
    the turns before them, for the built-in lessons also of each kind alone ("exact/where", a box to the last digit).
    """
    model, special = ALToLLM(config.model), text.ids

    @distributed.meeting
    @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
    @functools.partial(sharding.on_mesh, mesh)
    def right(params: dict, batch: ChatBatch) -> tuple[jax.Array, jax.Array]:
        apply = functools.partial(apply_module, model, params)
        inputs = apply(batch.ids, apply(batch.image, None, method="image_tokens"), special.img_context, method="embed")
        positions = jnp.broadcast_to(jnp.arange(batch.ids.shape[1]), batch.ids.shape)
        hidden, _ = apply(inputs, positions, method="hidden")
        return jnp.argmax(apply(hidden[:, :-1], method="logits"), axis=-1) == batch.labels[:, 1:], batch.labels[:, 1:]

    def evaluate(params: dict) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, batches in sources.held_out_chats(config, text).items():
            answers: list[float] = []
            tokens: list[np.ndarray] = []
            for batch in batches:
                for correct, labels in zip(*(np.asarray(a) for a in right(params, batch)), strict=True):
                    told = labels != IGNORE
                    starts = np.flatnonzero(told & ~np.concatenate([[False], told[:-1]]))
                    tokens.append(correct[told])
                    answers += [bool(correct[s:][: np.argmin(np.append(told[s:], False))].all()) for s in starts]
            result[f"exact{name}"] = float(np.mean(answers))
            if not name:
                result["token_accuracy"] = float(np.concatenate(tokens).mean())
        return result

    return evaluate if config.eval.num_samples else None


def make_evaluate(config: ExperimentConfig, text: Any, mesh: jax.sharding.Mesh) -> Any:
    """Greedy answers to held-out adaptive prompts, as the model gives them (no grammar).

    The result holds giou and ciou (of the first mask; an answer without a well-formed one is empty), format_rate
    (answers with one), several_masks_rate (with more), distinct (share of different answers), giou_no_codes (the mask
    decoded from no codes, the baseline that an MLLM must beat), mean_length, std_length and the lengths; the same under
    "replay/…" for held-out built-in data, if `config.data.replay` mixes some in.

    Raises:
      ValueError: the evaluation data hold no request for one mask; now, not when the training is over.
    """
    if config.eval.num_samples:
        sources.chat_source(config, held_out=True, adaptive_only=True)
    generate_cfg = GenerateConfig(max_new_tokens=config.eval.max_new_tokens)
    size = config.model.tokenizer

    @distributed.meeting
    @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
    @functools.partial(sharding.on_mesh, mesh)
    def answer(params: dict, batch: PromptBatch) -> tuple[jax.Array, ...]:
        found = segment(config.model, params, batch, generate_cfg, text.ids, jax.random.key(0))
        images = batch.image, batch.pixel_image, batch.features
        features = apply_module(ALToLLM(config.model), params, *images, method="image_features")
        empty = jnp.zeros((batch.mask.shape[0], size.num_latent_tokens, size.token_size))
        baseline = tokenizer_apply(ALTo(size), params)(empty, features, method="decode")
        target, answered = batch.mask > 0.5, (found.mask_logits > 0) & found.valid[:, None, None]
        pixels = [jnp.sum(m, axis=(1, 2), dtype=jnp.float32) for m in (answered & target, answered | target)]
        iou = jnp.where(found.valid, mask_iou(found.mask_logits, batch.mask), 0.0)
        no_codes, count = mask_iou(baseline, batch.mask), found.masks.num_masks
        return iou, *pixels, found.valid, found.length, count, no_codes, found.codes

    def answers(params: dict, batches: Any) -> dict[str, Any]:
        parts = [_answered(answer, params, batch, config.eval.batch_size) for batch in batches]
        iou, shared, union, valid, length, count, baseline, codes = (np.concatenate(p) for p in zip(*parts))
        lengths = length[valid]
        return {
            "giou": float(iou.mean()),
            "ciou": float(shared.sum() / max(union.sum(), 1)),
            "format_rate": float(valid.mean()),
            "several_masks_rate": float((count > 1).mean()),
            "distinct": len({tuple(c[:n]) for c, n in zip(codes, length)}) / len(codes),
            "giou_no_codes": float(baseline.mean()),
            "mean_length": float(lengths.mean()) if len(lengths) else 0.0,
            "std_length": float(lengths.std()) if len(lengths) else 0.0,
            "lengths": lengths.tolist(),
        }

    def evaluate(params: dict) -> dict[str, Any]:
        params = {k: v for k, v in params.items() if k != "reference"}
        result = answers(params, sources.held_out_prompts(config, text))
        if config.data.replay:
            kept = answers(params, sources.held_out_prompts(sources.replayed(config), text))
            result |= {f"replay/{name}": value for name, value in kept.items()}
        return result

    return evaluate if config.eval.num_samples else None


def _answered(answer: Any, params: dict, batch: PromptBatch, rows: int) -> list[np.ndarray]:
    """The answers to a batch, which is filled up to `rows` for one compiled program whatever the last batch holds."""
    have = len(batch.prompt_ids)
    if have < rows:
        batch = jax.tree.map(lambda a: np.concatenate([a, np.repeat(a[-1:], rows - have, axis=0)]), batch)
    return [np.asarray(found)[:have] for found in jax.device_get(answer(params, batch))]
