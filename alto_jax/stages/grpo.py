"""Stage 3: GRPO. Roll out G answers per prompt, reward format, IoU and length, update the language model.

The group shares its prompt: vision, prompt and SAM features are computed once per image in the rollout,
and the policy and reference passes let the G completions attend to one copy of the prompt's keys and
values (gradients equal those of G separate rows). Source: ALTo, section 3.4; DeepSeekMath (GRPO).
"""

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp

from alto_jax import rewards
from alto_jax.batch import PromptBatch, Rollout
from alto_jax.data import sources, vocabulary
from alto_jax.experiment import ExperimentConfig
from alto_jax.layers import apply_module
from alto_jax.lora import adapters
from alto_jax.losses import grpo as grpo_losses
from alto_jax.losses import tokens as token_losses
from alto_jax.mllm.alto_llm import ALToLLM, ModelConfig, init_params, segment
from alto_jax.mllm.language_model import with_whole_head
from alto_jax.stages import rollout_log
from alto_jax.stages.sft import make_evaluate
from alto_jax.stages.stage import Stage
from alto_jax.stages.tokenizer import tokenizer_apply
from alto_jax.tokenizer.alto import ALTo


def make(config: ExperimentConfig, mesh: jax.sharding.Mesh, directory: os.PathLike | None = None) -> Stage:
    """The stage for `config.stage` "stage3"."""
    text = vocabulary.text_tokenizer(config, directory)
    names = ("tokenizer", "vision", "projector", "language_model")

    def finish_init(params: dict) -> dict:
        # Note: with adapters the reference is their base, which is there already.
        needs_copy = config.grpo.loss.beta > 0 and not config.lora.rank
        return {**params, "reference": params["language_model"]} if needs_copy else params

    return Stage(
        init=lambda key: init_params(config.model, key),
        finish_init=finish_init,
        data=lambda share: sources.prompt_iterator(config, text, share, directory),
        loss_fn=make_loss(config, text.ids),
        rollout=functools.partial(rollout, config, text.ids),
        refill=refill,
        num_missing=lambda batch: jnp.sum(~rewards.informative_groups(batch.rewards)),
        histograms=reward_parts,
        log_samples=rollout_log.make_writer(config, text, mesh),
        inherits=names,
        requires=names,
        evaluate=make_evaluate(config, text, mesh),
        previous="python -m alto_jax.main --config=configs/stage2.py --config.init_from=DIR --workdir=DIR",
        headline=("loss", "reward", "format", "iou", "length", "kl", "entropy"),
        save_files=text.save,
    )


def rollout(config: ExperimentConfig, special: Any, params: dict, batch: PromptBatch, rng: jax.Array) -> Rollout:
    """Samples G completions per prompt and rewards them.

    Args:
      config: the run; special: the tokenizer's special ids.
      params: all parameters, with the frozen "reference" language model if beta > 0.
      batch: prompts with images and target masks.
      rng: random key.
    """
    cfg = config.grpo
    policy = {k: v for k, v in params.items() if k != "reference"}
    # Note: in a loop of tokens adapters cost a dozen small kernels a layer and token.
    merges = config.lora.rank > 0 and cfg.merge_adapters
    sampled = adapters.merged(policy, config.lora, exact=False) if merges else policy
    found = segment(config.model, sampled, batch, cfg.generate, special, rng, cfg.num_generations)
    masks, valid, extra = jax.nn.sigmoid(found.mask_logits), found.parsed.valid, {}
    if cfg.reward.boundary_weight > 0:
        extra["boundary"] = rewards.iou_reward(masks, batch.mask, valid, boundary=True)
    if cfg.reward.token_weight > 0:
        codes, _ = tokenizer_apply(ALTo(config.model.tokenizer), params)(batch.mask, method="tokenize")
        extra["tokens"] = rewards.token_match(found.parsed, codes)
    iou = rewards.iou_reward(masks, batch.mask, valid)
    reward, components = rewards.compute_rewards(found.parsed, iou, cfg.reward, **extra)
    generated = found.generated
    reference_logps = jnp.zeros_like(generated.per_token_logps)
    if config.grpo.loss.beta > 0:
        reference = adapters.without_adapters(policy)
        if "reference" in params:
            reference["language_model"] = params["reference"]
        reference_logps, _ = completion_logps(
            config.model, reference, special, batch, found.image_tokens, generated.ids,
            share_prompt=cfg.generate.share_prompt, at_once=cfg.logits_at_once,
        )  # fmt: skip
    return Rollout(
        prompt=batch,
        completion_ids=generated.ids,
        completion_mask=generated.mask,
        old_per_token_logps=generated.per_token_logps,
        ref_per_token_logps=reference_logps,
        advantages=rewards.group_advantages(reward, cfg.advantage_normalization),
        rewards=reward,
        components=components | {"num_masks": found.masks.num_masks.astype(jnp.float32)},
        image_tokens=found.image_tokens,
    )


def reward_parts(batch: Rollout) -> dict[str, jax.Array]:
    """The reward and its components, float32[B, G] each."""
    return {"reward": batch.rewards, **batch.components}


def refill(rollout: Rollout, other: Rollout) -> Rollout:
    """Replaces groups whose rewards are all equal by groups of another rollout whose rewards differ, in order."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), rollout, other)
    order = jnp.argsort(~rewards.informative_groups(both.rewards), stable=True)[: rollout.rewards.shape[0]]
    return jax.tree.map(lambda a: a[order], both)


def completion_logps(
    cfg: ModelConfig,
    params: dict,
    special: Any,
    batch: PromptBatch,
    image_tokens: jax.Array,
    completion_ids: jax.Array,
    *,
    share_prompt: bool = True,
    at_once: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of G completions per prompt, with one pass over each prompt.

    Args:
      cfg: the model; params: its parameters; special: the tokenizer's special ids.
      batch: B prompts, left padded; image_tokens float[B, I, D].
      completion_ids: int32[B, G, T].
      share_prompt: False repeats the prompt for every completion (the same numbers at a multiple of the cost).
      at_once: how many tokens of each completion have logits at the same time; 0: all.

    Returns:
      (logps, entropy), float32[B, G, T]: of the untempered full-vocabulary distribution, at padding too;
      entropy without gradient.
    """
    model = ALToLLM(cfg)
    apply = functools.partial(apply_module, model, params)
    if not share_prompt:
        batch, image_tokens = jax.tree.map(
            lambda a: jnp.repeat(a, completion_ids.shape[1], axis=0), (batch, image_tokens)
        )
        rows = completion_ids.reshape(-1, 1, completion_ids.shape[-1])
        outputs = completion_logps(cfg, params, special, batch, image_tokens, rows, at_once=at_once)
        return jax.tree.map(lambda a: a.reshape(completion_ids.shape), outputs)
    batch_size, group, length = completion_ids.shape
    prompt_mask = batch.prompt_mask

    inputs = apply(batch.prompt_ids, image_tokens, special.img_context, method="embed")
    positions = jnp.maximum(jnp.cumsum(prompt_mask, axis=1) - 1, 0)
    # Note: padding is a segment of its own, which nothing else attends to.
    hidden, prefix = apply(inputs, positions, segment_ids=prompt_mask.astype(jnp.int32), keep="model", method="hidden")
    first = jnp.broadcast_to(hidden[:, None, -1:], (batch_size, group, 1, hidden.shape[-1]))

    ids = completion_ids.reshape(batch_size * group, length)
    offset = jnp.repeat(jnp.sum(prompt_mask, axis=1), group)
    inputs = apply(ids[:, :-1], method="embed_text")
    positions = offset[:, None] + jnp.arange(length - 1)
    hidden, _ = apply(inputs, positions, prefix=prefix, prefix_mask=prompt_mask, method="hidden")
    hidden = jnp.concatenate([first, hidden.reshape(batch_size, group, length - 1, -1)], axis=2)

    language = with_whole_head(cfg.need_language_model(), params["language_model"])
    whole = {**params, "language_model": language}

    def score(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        logits = apply_module(model, whole, part[0], method="logits")
        return token_losses.token_log_probs(logits, part[1]), jax.lax.stop_gradient(token_losses.token_entropy(logits))

    if at_once == 0 or at_once >= length:
        return score((hidden, completion_ids))
    # Note: the logits of a part are computed again in the backward pass, so that those of one part exist at a time.
    split = lambda a: jnp.moveaxis(_padded(a, -length % at_once).reshape(*a.shape[:2], -1, at_once, *a.shape[3:]), 2, 0)
    parts = jax.lax.map(jax.checkpoint(score), (split(hidden), split(completion_ids)))
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 2).reshape(batch_size, group, -1)[..., :length], parts)


def _padded(x: jax.Array, count: int) -> jax.Array:
    """[B, G, T, ...] with `count` zeros behind T."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, count), *((0, 0),) * (x.ndim - 3)))


def make_loss(config: ExperimentConfig, special: Any) -> Any:
    """`loss_fn(params, rollout, rng, step)` of stage 3."""
    cfg = config.grpo

    def loss_fn(params: dict, batch: Rollout, rng: Any, step: jax.Array) -> tuple[jax.Array, tuple]:
        del rng, step
        logps, entropy = completion_logps(
            config.model, params, special, batch.prompt, batch.image_tokens, batch.completion_ids,
            share_prompt=cfg.generate.share_prompt, at_once=cfg.logits_at_once,
        )  # fmt: skip
        reference = batch.ref_per_token_logps if cfg.loss.beta > 0 else None
        informative = rewards.informative_groups(batch.rewards)
        mask = batch.completion_mask
        if cfg.max_rollouts > 1:
            mask &= informative[:, None, None]
        loss, logged = grpo_losses.grpo_loss(
            logps,
            batch.old_per_token_logps,
            reference,
            batch.advantages,
            mask,
            cfg.loss,
            entropy=entropy,
        )
        means = {name: jnp.mean(value) for name, value in reward_parts(batch).items()}
        spread = {"reward_std": jnp.mean(jnp.std(batch.rewards, axis=1)), "informative_groups": jnp.mean(informative)}
        return loss, ({**means, **spread, **logged}, ())

    return loss_fn
