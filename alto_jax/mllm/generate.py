"""Text generation with mask tokens: one jitted call of prefill and a `while_loop` of cached steps.

Comes in: the prompt's embeddings (image features already in place), left padded. Goes out: token ids with
their log-probabilities. Shapes are static and nothing is read back to the host inside; the loop ends as
soon as every row is done.

The prompt runs once per row of the batch; its keys and values are one prefix that all `num_samples`
samples of the row attend to, and each sample has its own cache for the new tokens only.

Masks: a row is *inside* a mask between `<ALTo_Start>` and `<ALTo_End>`. The grammar allows, inside, only
codes (1..max_length of them) and the end; outside, ordinary text and the start. Length control works
inside masks: bias on the end's logit, minimum, budget and exact length (paper, adaptive length).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

from flax import struct
import jax
import jax.numpy as jnp

from alto_jax.config import QUANTIZE, Quantize, require
from alto_jax.layers import unstacked
from alto_jax.mllm.choice import allowed_tokens, choose, mask_state
from alto_jax.mllm.language_model import DTYPES, KVCache, LanguageModel, for_inference

if TYPE_CHECKING:
    from alto_jax.mllm.text import SpecialIds

Array = jax.Array
CACHE_DTYPES = ("model", *DTYPES, "int8")
PROMPT_BUCKET = 32


def bucket_length(length: int) -> int:
    """The prompt length to pad to: a multiple of 32, so that all prompts of a bucket share one program."""
    return -(-length // PROMPT_BUCKET) * PROMPT_BUCKET


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """How to generate. Only max_new_tokens, greedy or not, top_k, top_p, grammar, stop_at_mask_end,
    share_prompt, cache_dtype and quantize are compiled in; the others can change without recompilation.

    Attributes:
      max_new_tokens: T, length of the result; longer answers are cut. With the grammar a mask is only
        started where it can still be ended.
      temperature: 0 takes the most likely token; else logits are divided by it before sampling.
      top_k: sample among this many likeliest tokens; 0: all.
      top_p: sample among the likeliest tokens that hold this much probability; 1: all.
      grammar: allow only well-formed masks.
      min_length: codes per mask at least; needs the grammar.
      max_length: codes per mask at most (the budget; L of the mask tokenizer); needs the grammar.
      forced_length: exactly so many codes per mask; overrides both; needs the grammar.
      end_logit_bias: added to the logit of `<ALTo_End>` inside a mask; positive shortens masks.
      stop_at_mask_end: a row is done at its first `<ALTo_End>` that ends a mask, not only at `<|im_end|>`.
      share_prompt: False computes and stores the prompt once per sample (same result; the oracle), in the policy
        and reference passes of GRPO too.
      cache_dtype: type of keys and values: "model" (the model's), a float type, or "int8" (with a scale per position
        and head, half the memory of bfloat16).
      quantize: the language model's kernels of matrix products in 8 bits, "int8" or "fp8" (see `params.quantized`); "":
        as they are given.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    grammar: bool = False
    min_length: int = 1
    max_length: int = 32
    forced_length: int | None = None
    end_logit_bias: float = 0.0
    stop_at_mask_end: bool = False
    share_prompt: bool = True
    cache_dtype: str = "model"
    quantize: Quantize = ""

    def __post_init__(self) -> None:
        require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        require(self.temperature >= 0, "temperature", self.temperature, "a number of at least 0")
        require(self.top_k >= 0, "top_k", self.top_k, "at least 0")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "a number in (0, 1]")
        low, high, forced = self.min_length, self.max_length, self.forced_length
        require(low >= 1, "min_length", low, "at least 1")
        require(high >= low, "max_length", high, f"at least min_length {low}")
        require(forced is None or forced >= 1, "forced_length", forced, "at least 1, or None")
        if self.grammar:
            fits = self.max_new_tokens > (forced or low)
            require(fits, "max_new_tokens", self.max_new_tokens, f"at least {(forced or low) + 1}, a mask and its end")
        else:
            require(forced is None, "forced_length", forced, "None without grammar=True")
            require(low == 1, "min_length", low, "1 without grammar=True")
        require(self.cache_dtype in CACHE_DTYPES, "cache_dtype", self.cache_dtype, f"one of {CACHE_DTYPES}")
        require(self.quantize in QUANTIZE, "quantize", self.quantize, f"one of {QUANTIZE}")

    def static(self) -> GenerateConfig:
        """Returns what is compiled in: this configuration with neutral values for all that `controls` holds."""
        neutral: dict[str, Any] = dict(min_length=1, max_length=32, forced_length=None, end_logit_bias=0.0)
        return dataclasses.replace(self, temperature=1.0 if self.temperature else 0.0, **neutral)

    def controls(self) -> Controls:
        """Returns the values that may differ per row and call, as scalars."""
        low, high = (self.min_length, self.max_length) if self.forced_length is None else (self.forced_length,) * 2
        return Controls(
            temperature=jnp.float32(self.temperature or 1.0),
            min_length=jnp.int32(low),
            max_length=jnp.int32(high),
            end_logit_bias=jnp.float32(self.end_logit_bias),
        )


@struct.dataclass
class Controls:
    """What a request may change without recompilation; each a scalar or one value per prompt ([B]).

    temperature: float32, > 0 (ignored by a greedy config); min_length, max_length: int32, codes per mask
    (equal: an exact length), 1 <= min_length <= max_length, min_length < max_new_tokens;
    end_logit_bias: float32.
    """

    temperature: Array
    min_length: Array
    max_length: Array
    end_logit_bias: Array


@struct.dataclass
class Generated:
    """The new tokens. Leading axes are [B], or [B, G] if `num_samples` was given.

    ids: int32[..., T], pad where mask is False. mask: bool[..., T], True up to and including the token
    that ended the row. per_token_logps: float32[..., T], log-probability of each token under the model
    as it is: full vocabulary, temperature 1, no constraint. sampling_logps: float32[..., T], under the
    distribution that was sampled from (bias, grammar, temperature, top-k, top-p; 0 for greedy). Both are
    0 where mask is False. num_steps: int32 scalar, tokens generated by the longest row.
    """

    ids: Array
    mask: Array
    per_token_logps: Array
    sampling_logps: Array
    num_steps: Array


@struct.dataclass
class Questions:
    """G ends of B prompts, left padded: embeds [B, G, Q, D]; mask bool[B, G, Q], True where not padding, as everywhere
    at the last position; ids int32[B, G, Q]."""

    embeds: Array
    mask: Array
    ids: Array


@struct.dataclass
class State:
    """The loop's state; R = B * G rows. `cache` holds the new tokens only; inside, count: see mask_state."""

    step: Array
    ids: Array
    mask: Array
    per_token_logps: Array
    sampling_logps: Array
    done: Array
    inside: Array
    count: Array
    cache: tuple[KVCache, ...]

    @property
    def generated(self) -> Generated:
        """The tokens so far, of R rows."""
        return Generated(self.ids, self.mask, self.per_token_logps, self.sampling_logps, self.step)


@struct.dataclass
class Given:
    """What every step reads: keys and values of the prompts, with their mask bool[B, P]; which of a row's own keys may
    be attended to, bool[R, 1, S] (None: all that come before); positions before the new tokens, int32[R]."""

    prefix: tuple[KVCache, ...]
    prompt_mask: Array
    own: Array | None
    lengths: Array
    controls: Controls
    keys: Array


def generate(
    model: LanguageModel,
    params: Any,
    inputs_embeds: Array,
    prompt_mask: Array,
    cfg: GenerateConfig,
    special: SpecialIds,
    rng: Array,
    num_samples: int | None = None,
    *,
    prompt_ids: Array | None = None,
    controls: Controls | None = None,
    questions: Questions | None = None,
) -> Generated:
    """Generates answers to a batch of prompts.

    Args:
      model: the language model (unbound); params: its parameters.
      inputs_embeds: [B, P, D], the prompts' embeddings, left padded: the last position is never padding.
      prompt_mask: bool[B, P], True where not padding.
      cfg: how to generate.
      special: ids of the special tokens.
      rng: one random key, or one per prompt ([B]; a row's result then depends on nothing but its own
        prompt and key).
      num_samples: G, samples per prompt, which share one prefill and one prompt cache. None: one sample,
        and no G axis in the result.
      prompt_ids: int32[B, P], the prompts' ids. Needed if a prompt ends inside a mask (forced answer
        prefix); None: none does.
      controls: overrides `cfg.controls()`, e.g. with one value per prompt.
      questions: G different ends of each prompt, G = num_samples: the beginning, such as an image, is computed once.

    Returns:
      Generated.
    """
    batch = inputs_embeds.shape[0]
    given = arguments(inputs_embeds, prompt_mask, cfg, special, rng, num_samples, prompt_ids, controls, questions)
    out = _generate(model, cfg.static(), special, num_samples or 1, params, *given)
    if num_samples is not None:
        group = lambda a: a.reshape(batch, num_samples, *a.shape[1:]) if a.ndim else a
        out = jax.tree.map(group, out)
    return out


def arguments(
    inputs_embeds: Array,
    prompt_mask: Array,
    cfg: GenerateConfig,
    special: SpecialIds,
    rng: Array,
    num_samples: int | None,
    prompt_ids: Array | None,
    controls: Controls | None,
    questions: Questions | None,
) -> tuple[Any, ...]:
    """The arguments of `generate`, checked, as `begin` wants them behind the parameters."""
    require(num_samples is None or num_samples >= 1, "num_samples", num_samples, "at least 1, or None")
    if questions is not None:
        require(num_samples == questions.mask.shape[1], "num_samples", num_samples, "the number of questions")
        require(cfg.share_prompt, "share_prompt", cfg.share_prompt, "True with questions")
    batch = inputs_embeds.shape[0]
    rng = jax.random.split(rng, batch) if rng.ndim == 0 else rng
    if questions is not None:
        start = mask_state(questions.ids.reshape(-1, questions.ids.shape[-1]), special)
    elif prompt_ids is None:
        start = jnp.zeros(batch, bool), jnp.zeros(batch, jnp.int32)
    else:
        start = mask_state(jnp.asarray(prompt_ids), special)
    return inputs_embeds, prompt_mask, start, cfg.controls() if controls is None else controls, rng, questions


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _generate(
    model: LanguageModel,
    cfg: GenerateConfig,
    special: SpecialIds,
    num_samples: int,
    params: Any,
    inputs_embeds: Array,
    prompt_mask: Array,
    start: tuple[Array, Array],
    controls: Controls,
    keys: Array,
    questions: Questions | None = None,
) -> Generated:
    """The compiled part of `generate`; results have R = B * G rows."""
    # Note: the loop's operands are whole arrays; slices of stacked ones would be copied for every token.
    params = for_inference(model.cfg, params, cfg.quantize)
    given, state = begin(
        model, cfg, special, num_samples, params, inputs_embeds, prompt_mask, start, controls, keys, questions
    )
    return advance(model, params, given, state, cfg, special, cfg.max_new_tokens).generated


def begin(
    model: LanguageModel,
    cfg: GenerateConfig,
    special: SpecialIds,
    num_samples: int,
    params: Any,
    inputs_embeds: Array,
    prompt_mask: Array,
    start: tuple[Array, Array],
    controls: Controls,
    keys: Array,
    questions: Questions | None,
) -> tuple[Given, State]:
    """The prompts, and the first token after them; `advance` gives the others. Traceable."""
    rows = inputs_embeds.shape[0] * num_samples
    first = 0 if questions is None else questions.mask.shape[2]  # of the new tokens, in a row's cache
    repeat = lambda a: jnp.repeat(a, num_samples, axis=0)
    keys = jax.vmap(lambda key: jax.random.split(key, num_samples))(keys).reshape(rows)
    inside, count = jax.tree.map(repeat, start) if questions is None else start
    controls = jax.tree.map(lambda a: repeat(a)[:, None] if jnp.ndim(a) else a, controls)
    apply: Any = functools.partial(model.apply, {"params": for_inference(model.cfg, params, cfg.quantize)})
    if not cfg.share_prompt:
        inputs_embeds, prompt_mask = repeat(inputs_embeds), repeat(prompt_mask)
    prefix, first_logits = _prefill(apply, cfg, inputs_embeds, prompt_mask)
    lengths = jnp.sum(prompt_mask, axis=1, dtype=jnp.int32)
    if cfg.share_prompt:
        first_logits, lengths = repeat(first_logits), repeat(lengths)
    cache = unstacked(
        KVCache.create(model.cfg, rows, first + cfg.max_new_tokens, cfg.cache_dtype), model.cfg.num_layers
    )
    own = None  # Note: what of a row's own keys may be attended to, if not all that come before.
    if questions is not None:
        asked = questions.mask.reshape(rows, first)
        positions = lengths[:, None] + jnp.maximum(jnp.cumsum(asked, axis=1, dtype=jnp.int32) - 1, 0)
        own = jnp.concatenate([asked, jnp.ones((rows, cfg.max_new_tokens), bool)], axis=1)[:, None]
        seen = own & (jnp.arange(own.shape[-1]) <= jnp.arange(first)[:, None])
        hidden, cache = apply(
            questions.embeds.reshape(rows, first, -1), positions, seen, cache=cache, cache_index=0, prefix=prefix,
            prefix_mask=prompt_mask,
        )  # fmt: skip
        first_logits, lengths = apply(hidden[:, -1], method="logits"), lengths + jnp.sum(asked, axis=1, dtype=jnp.int32)

    shape = (rows, cfg.max_new_tokens)
    zeros = jnp.zeros(shape, jnp.float32)
    state = State(
        step=jnp.int32(0),
        ids=jnp.full(shape, special.pad, jnp.int32),
        mask=jnp.zeros(shape, bool),
        per_token_logps=zeros,
        sampling_logps=zeros,
        done=jnp.zeros(rows, bool),
        inside=inside,
        count=count,
        cache=cache,
    )

    given = Given(prefix, prompt_mask, own, lengths, controls, keys)
    return given, _append(state, first_logits, cfg, special, controls, keys)


def advance(
    model: LanguageModel,
    params: Any,
    given: Given,
    state: State,
    cfg: GenerateConfig,
    special: SpecialIds,
    until: int | Array,
) -> State:
    """Goes on until every row is done or has `until` tokens (int32 scalar, at most cfg.max_new_tokens); traceable.

    Args:
      model, params, cfg, special: as of `generate`.
      given, state: as `begin` and `advance` gave them.
    """
    apply: Any = functools.partial(model.apply, {"params": for_inference(model.cfg, params, cfg.quantize)})
    own, prefix, prompt_mask = given.own, given.prefix, given.prompt_mask
    first = 0 if own is None else own.shape[-1] - cfg.max_new_tokens

    def body(state: State) -> State:
        previous = state.step - 1
        token = jax.lax.dynamic_index_in_dim(state.ids, previous, axis=1)
        seen = None if own is None else own & (jnp.arange(own.shape[-1]) <= first + previous)
        hidden, cache = apply(
            apply(token, method="embed"), (given.lengths + previous)[:, None], seen, cache=state.cache,
            cache_index=first + previous, prefix=prefix, prefix_mask=prompt_mask,
        )  # fmt: skip
        logits = apply(hidden[:, 0], method="logits")
        state = dataclasses.replace(state, cache=cache)
        return _append(state, logits, cfg, special, given.controls, given.keys)

    return jax.lax.while_loop(lambda s: (s.step < until) & ~jnp.all(s.done), body, state)


def _prefill(
    apply: Any, cfg: GenerateConfig, inputs_embeds: Array, prompt_mask: Array
) -> tuple[tuple[KVCache, ...], Array]:
    """Runs the prompts; returns their keys and values and the logits float32[B, V] after the last position."""
    positions = jnp.maximum(jnp.cumsum(prompt_mask, axis=1, dtype=jnp.int32) - 1, 0)
    # Note: padding is a segment of its own, which nothing else attends to.
    segments = prompt_mask.astype(jnp.int32)
    hidden, prefix = apply(inputs_embeds, positions, segment_ids=segments, keep=cfg.cache_dtype)
    return prefix, apply(hidden[:, -1], method="logits")


def _append(
    state: State, logits: Array, cfg: GenerateConfig, special: SpecialIds, controls: Controls, keys: Array
) -> State:
    """Chooses the token of the current step from logits float32[R, V] and writes it into the state."""
    token = jnp.arange(logits.shape[-1])
    bias = jnp.where(state.inside[:, None] & (token == special.mask_end), controls.end_logit_bias, 0.0)
    shaped = logits + bias
    if cfg.grammar:
        remaining = cfg.max_new_tokens - state.step
        limits = controls.min_length, controls.max_length
        allowed = allowed_tokens(logits.shape[-1], special, state.inside, state.count, remaining, *limits)
        shaped = jnp.where(allowed, shaped, -jnp.inf)
    step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, state.step)
    ids, sampling_logps = choose(shaped, step_keys, cfg, controls.temperature)
    logps = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), ids[:, None], axis=-1)[:, 0]

    alive = ~state.done
    ids = jnp.where(alive, ids, special.pad)
    ends_mask = state.inside & (ids == special.mask_end)
    finished = (ids == special.im_end) | (ends_mask if cfg.stop_at_mask_end else False)
    begins = ids == special.mask_start
    write = lambda buffer, column: jax.lax.dynamic_update_index_in_dim(buffer, column, state.step, axis=1)
    return dataclasses.replace(
        state,
        step=state.step + 1,
        ids=write(state.ids, ids),
        mask=write(state.mask, alive),
        per_token_logps=write(state.per_token_logps, jnp.where(alive, logps, 0.0)),
        sampling_logps=write(state.sampling_logps, jnp.where(alive, sampling_logps, 0.0)),
        done=state.done | finished,
        inside=(state.inside | begins) & ~ends_mask,
        count=jnp.where(begins | ~state.inside, 0, state.count + 1),
    )
