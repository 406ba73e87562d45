"""Which token comes next: whether a row is inside of a mask, what the grammar allows there, and sampling.

Comes in: ids, logits. Goes out: states, what may come, and one token per row. `generate` asks for each step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from alto_jax.mllm.text import SpecialIds

Array = jax.Array


class Sampling(Protocol):
    """What of a `GenerateConfig` says how a token is taken."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def top_p(self) -> float: ...


def mask_state(ids: Array, special: SpecialIds) -> tuple[Array, Array]:
    """Tells whether rows of ids end inside a mask, as with a forced answer prefix.

    Args:
      ids: int32[..., P], left padded.
      special: ids of the special tokens.

    Returns:
      (inside bool[...], count int32[...]): the last `<ALTo_Start>` is not followed by an end; tokens after it.
    """
    index = jnp.arange(ids.shape[-1])
    last = lambda token: jnp.max(jnp.where(ids == token, index, -1), axis=-1)
    start, end = last(special.mask_start), last(special.mask_end)
    inside = start > end
    return inside, jnp.where(inside, ids.shape[-1] - 1 - start, 0).astype(jnp.int32)


def allowed_tokens(
    vocab_size: int, special: SpecialIds, inside: Array, count: Array, remaining: Array, low: Array, high: Array
) -> Array:
    """The grammar: which tokens may come next.

    Outside a mask: all but codes, the end, padding, begin of text, begin of turn and image tokens; the
    start only if the shortest allowed mask still fits. Inside: codes, up to `high` of them and with room
    left for the end; the end after at least `low`.

    Args:
      vocab_size: V. special: ids of the special tokens.
      inside, count: bool[R], int32[R], see `mask_state`.
      remaining: int32 scalar, tokens that may still be generated, this one included.
      low, high: int32, broadcastable to [R, 1], limits of the number of codes.

    Returns:
      bool[R, V].
    """
    token = jnp.arange(vocab_size)
    is_code = (token >= special.code_0) & (token < special.code_0 + special.num_codes)
    is_start, is_end = token == special.mask_start, token == special.mask_end
    structural = {special.pad, special.bos, special.im_start, special.img, special.img_end, special.img_context}
    is_text = ~(is_code | is_end | is_start) & ~jnp.isin(token, jnp.array(sorted(structural - {None, special.im_end})))
    inside, count = inside[:, None], count[:, None]
    last = remaining <= 1
    may_code, may_end = (count < high) & ~last, (count >= low) | last
    when_inside = (is_code & may_code) | (is_end & may_end)
    when_outside = is_text | (is_start & (remaining >= low + 2))
    return jnp.where(inside, when_inside, when_outside)


def choose(logits: Array, keys: Array, cfg: Sampling, temperature: Array) -> tuple[Array, Array]:
    """Takes one token per row.

    Args:
      logits: float32[R, V], -inf where not allowed.
      keys: random keys [R], one per row.
      cfg: greedy if its temperature is 0; top_k and top_p (applied in this order after the temperature).
      temperature: float32, broadcastable to [R, 1].

    Returns:
      (ids int32[R], logps float32[R] under the distribution sampled from, 0 for greedy).
    """
    if cfg.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), jnp.zeros(logits.shape[:1], jnp.float32)
    scaled, tokens = logits / temperature, None
    top_k = min(cfg.top_k, logits.shape[-1])
    if top_k or cfg.top_p < 1:
        scaled, tokens = jax.lax.top_k(scaled, top_k or logits.shape[-1])
    if cfg.top_p < 1:
        probs = jax.nn.softmax(scaled, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs
        scaled = jnp.where(before < cfg.top_p, scaled, -jnp.inf)
    index = jax.vmap(jax.random.categorical)(keys, scaled)[:, None]
    logps = jnp.take_along_axis(jax.nn.log_softmax(scaled, axis=-1), index, axis=-1)[:, 0]
    ids = index if tokens is None else jnp.take_along_axis(tokens, index, axis=-1)
    return ids[:, 0].astype(jnp.int32), logps
