"""Mask tokens inside token sequences: the one joint of SFT targets, inference and rewards.

In a sequence a mask is `<ALTo_Start> <TOK_c1> .. <TOK_ck> <ALTo_End>` with 1..L codes (paper, section
3.2). Training files hold placeholders instead: L times `<TOK_0>` (mask of fixed length L) or L times
`<TOK_1>` (adaptive length). What comes in are ids, labels, codes and lengths; what goes out are rows
with real codes, or the masks of an answer and whether it is one well-formed mask. Every array function is jittable and
vectorised over its leading axes; ids come from the tokenizer's `SpecialIds` and are never hard-coded.
"""

import re

from flax import struct
import jax
import jax.numpy as jnp

from alto_jax.mllm.text import IGNORE, MASK_END, MASK_START, SpecialIds

# The inverse of `code_token`.
_CODE_PATTERN = re.compile(r"<TOK_(\d+)>")
_SPAN_PATTERN = re.compile(rf"{re.escape(MASK_START)}((?:<TOK_\d+>)*){re.escape(MASK_END)}")


@struct.dataclass
class ParsedMask:
    """What `parse_completion` read from each completion, for rewards, which ask for exactly one mask; all fields share
    the leading axes `...`.

    Attributes:
      codes: int32[..., L], the codes in order, 0 from `length` on (and everywhere if not valid).
      code_mask: bool[..., L], True for the first `length` entries.
      length: int32[...], number of codes, in 1..L where valid, else 0.
      valid: bool[...], well formed: one start, one end after it, 1..L tokens between, all of them codes.
      num_starts, num_ends: int32[...], counts of the two delimiters.
      num_between: int32[...], tokens between the delimiters, 0 unless there is exactly one of each (may exceed L).
      in_range: bool[...], one start, one end and 1 <= num_between <= L; the tokens may be any.
    """

    codes: jax.Array
    code_mask: jax.Array
    length: jax.Array
    valid: jax.Array
    num_starts: jax.Array
    num_ends: jax.Array
    num_between: jax.Array
    in_range: jax.Array


@struct.dataclass
class AnswerMasks:
    """The masks of answers, as `parse_masks` read them; M slots, all fields share the leading axes `...`.

    An answer may hold several masks, and broken ones beside them. Prediction and evaluation take the first well-formed
    one (slot 0), as the reference takes the first `<ALTo_Start>`; rewards ask for exactly one, see `ParsedMask`.

    codes: int32[..., M, L], the codes of the m-th well-formed mask, 0 from its length on.
    length: int32[..., M], its number of codes, 1..L; 0 where there is none.
    valid: bool[..., M], whether there is an m-th one.
    num_masks: int32[...], well-formed masks of the answer; may exceed M.
    num_starts: int32[...], `<ALTo_Start>` in the answer, those of broken masks too.
    """

    codes: jax.Array
    length: jax.Array
    valid: jax.Array
    num_masks: jax.Array
    num_starts: jax.Array


@struct.dataclass
class SupervisedMasks:
    """Where a batch of label rows predicts mask codes.

    positions: int32[B, M, L], index of the hidden state that predicts code l of mask m; clipped to the
      row, meaningful where l < length.
    length: int32[B, M], number of codes of the mask in the row, 0..L.
    valid: bool[B, M], the mask exists, is supervised and has at least one code.
    """

    positions: jax.Array
    length: jax.Array
    valid: jax.Array


def parse_completion(
    ids: jax.Array,
    completion_mask: jax.Array | None,
    special_ids: SpecialIds,
    num_latent_tokens: int,
) -> ParsedMask:
    """Reads the one mask of each completion and checks its format, as rewards ask for it (see `parse_masks`).

    Tokens before the start and after the end are free text. Delimiters outside `completion_mask` do not
    count.

    Args:
      ids: int32[..., T], completions (any number of leading axes).
      completion_mask: bool[..., T], True up to and including the end of turn; None means all.
      special_ids: the tokenizer's special ids.
      num_latent_tokens: L, the largest number of codes.

    Returns:
      A `ParsedMask` with leading axes `...`.
    """
    ids = jnp.asarray(ids)
    is_start = ids == special_ids.mask_start
    is_end = ids == special_ids.mask_end
    if completion_mask is not None:
        is_start &= completion_mask
        is_end &= completion_mask
    num_starts = jnp.sum(is_start, axis=-1, dtype=jnp.int32)
    num_ends = jnp.sum(is_end, axis=-1, dtype=jnp.int32)
    start = jnp.argmax(is_start, axis=-1).astype(jnp.int32)
    end = jnp.argmax(is_end, axis=-1).astype(jnp.int32)

    one_of_each = (num_starts == 1) & (num_ends == 1)
    num_between = jnp.where(one_of_each, jnp.maximum(end - start - 1, 0), 0)
    in_range = one_of_each & (num_between >= 1) & (num_between <= num_latent_tokens)

    offsets = jnp.arange(num_latent_tokens, dtype=jnp.int32)
    positions = jnp.minimum(start[..., None] + 1 + offsets, ids.shape[-1] - 1)
    codes = jnp.take_along_axis(ids, positions, axis=-1) - special_ids.code_0
    inside = offsets < num_between[..., None]
    is_code = (codes >= 0) & (codes < special_ids.num_codes)
    valid = in_range & jnp.all(is_code | ~inside, axis=-1)
    code_mask = inside & valid[..., None]
    return ParsedMask(
        codes=jnp.where(code_mask, codes, 0).astype(jnp.int32),
        code_mask=code_mask,
        length=jnp.where(valid, num_between, 0),
        valid=valid,
        num_starts=num_starts,
        num_ends=num_ends,
        num_between=num_between,
        in_range=in_range,
    )


def parse_masks(
    ids: jax.Array,
    completion_mask: jax.Array | None,
    special_ids: SpecialIds,
    num_latent_tokens: int,
    max_masks: int = 1,
) -> AnswerMasks:
    """Reads all masks of each answer: every start that 1..L codes and an end follow.

    Args:
      ids, completion_mask, special_ids, num_latent_tokens: as in `parse_completion`.
      max_masks: M, how many are given out; all are counted.

    Returns:
      An `AnswerMasks` with leading axes `...`.
    """
    ids = jnp.asarray(ids)
    total = ids.shape[-1]
    inside = jnp.ones(ids.shape, bool) if completion_mask is None else completion_mask
    is_start, is_end = (inside & (ids == token) for token in (special_ids.mask_start, special_ids.mask_end))
    codes = ids - special_ids.code_0
    is_code = inside & (codes >= 0) & (codes < special_ids.num_codes)
    time = jnp.arange(total, dtype=jnp.int32)
    # Where the codes that follow a position stop: the first other token after it.
    other = jax.lax.cummin(jnp.where(is_code, total, time), axis=ids.ndim - 1, reverse=True)
    stop = jnp.concatenate([other[..., 1:], jnp.full((*ids.shape[:-1], 1), total, jnp.int32)], axis=-1)
    length = stop - time - 1
    ends = jnp.take_along_axis(is_end, jnp.minimum(stop, total - 1), axis=-1) & (stop < total)
    well_formed = is_start & ends & (length >= 1) & (length <= num_latent_tokens)

    starts = jnp.sort(jnp.where(well_formed, time, total), axis=-1)[..., :max_masks]
    starts = jnp.pad(starts, [(0, 0)] * (ids.ndim - 1) + [(0, max_masks - starts.shape[-1])], constant_values=total)
    valid = starts < total
    length = jnp.where(valid, jnp.take_along_axis(length, jnp.minimum(starts, total - 1), axis=-1), 0)
    offsets = jnp.arange(num_latent_tokens, dtype=jnp.int32)
    at = jnp.minimum(starts[..., None] + 1 + offsets, total - 1)
    codes = jnp.take_along_axis(codes[..., None, :], at, axis=-1)
    return AnswerMasks(
        codes=jnp.where(offsets < length[..., None], codes, 0).astype(jnp.int32),
        length=length,
        valid=valid,
        num_masks=jnp.sum(well_formed, axis=-1, dtype=jnp.int32),
        num_starts=jnp.sum(is_start, axis=-1, dtype=jnp.int32),
    )


def replace_mask_tokens(
    ids: jax.Array,
    labels: jax.Array,
    codes: jax.Array,
    lengths: jax.Array,
    mask_valid: jax.Array,
    special_ids: SpecialIds,
    *,
    text_mask: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Turns placeholder spans into the masks' codes, closes the gaps and pads on the right.

    The m-th `<ALTo_Start>` of a row belongs to mask m, whether it stands in a prompt or an answer. Its L
    placeholders become L codes if the first one is `<TOK_0>`, and `lengths[m]` codes if it is `<TOK_1>`.
    Labels move with their ids; a placeholder that is not supervised stays so. A span without a valid mask
    is left as it is.

    Args:
      ids: int32[B, T], right padded with `special_ids.pad`.
      labels: int32[B, T], -100 where not supervised.
      codes: int32[B, M, L], codes of each mask, in 0..num_codes-1.
      lengths: int32[B, M], adaptive length of each mask, in 0..L.
      mask_valid: bool[B, M], which masks exist.
      special_ids: the tokenizer's special ids.
      text_mask: bool[B, T], True at real tokens, or their segment ids (int32[B, T], 0 at padding); None takes
        everything up to the last id that is not pad.

    Returns:
      ids int32[B, T], labels int32[B, T] (padded with -100) and text_mask (of the type given) of the new rows.
    """
    num_masks, num_latent_tokens = codes.shape[1:]
    row_length = ids.shape[1]
    time = jnp.arange(row_length, dtype=jnp.int32)
    is_start = ids == special_ids.mask_start
    last_start = jax.lax.cummax(jnp.where(is_start, time, -1), axis=1)
    mask_index = jnp.cumsum(is_start, axis=1, dtype=jnp.int32) - 1
    offset = time - last_start - 1

    at_mask = jnp.clip(mask_index, 0, num_masks - 1)
    at_code = jnp.clip(offset, 0, num_latent_tokens - 1)
    first_placeholder = jnp.take_along_axis(ids, jnp.clip(last_start + 1, 0, row_length - 1), axis=1)
    is_adaptive = first_placeholder == special_ids.code_0 + 1
    is_placeholder = is_adaptive | (first_placeholder == special_ids.code_0)
    in_span = (last_start >= 0) & (offset >= 0) & (offset < num_latent_tokens) & is_placeholder
    in_span &= (mask_index < num_masks) & jnp.take_along_axis(mask_valid, at_mask, axis=1)

    kept_codes = jnp.where(is_adaptive, jnp.take_along_axis(lengths, at_mask, axis=1), num_latent_tokens)
    keep = ~in_span | (offset < kept_codes)
    flat_codes = codes.reshape(codes.shape[0], num_masks * num_latent_tokens)
    code_ids = special_ids.code_0 + jnp.take_along_axis(flat_codes, at_mask * num_latent_tokens + at_code, axis=1)
    new_ids = jnp.where(in_span, code_ids, ids)
    new_labels = jnp.where(in_span & (labels != IGNORE), code_ids, labels)
    if text_mask is None:
        text_mask = time < _last_true(ids != special_ids.pad)

    # A stable sort of the dropped flag is a compaction that needs no scatter, so rows stay on their shard.
    order = jnp.argsort(~keep, axis=1, stable=True)
    num_kept = jnp.sum(keep, axis=1, keepdims=True)
    filled = time < num_kept
    out_ids = jnp.where(filled, jnp.take_along_axis(new_ids, order, axis=1), special_ids.pad)
    out_labels = jnp.where(filled, jnp.take_along_axis(new_labels, order, axis=1), IGNORE)
    out_mask = jnp.where(filled, jnp.take_along_axis(text_mask, order, axis=1), jnp.zeros((), text_mask.dtype))
    return out_ids.astype(ids.dtype), out_labels.astype(labels.dtype), out_mask


def _last_true(flags: jax.Array) -> jax.Array:
    """Returns int32[B, 1]: one past the last True of bool[B, T], 0 if there is none."""
    time = jnp.arange(flags.shape[1], dtype=jnp.int32)
    return jnp.max(jnp.where(flags, time + 1, 0), axis=1, keepdims=True)


def find_supervised_masks(
    ids: jax.Array,
    labels: jax.Array,
    special_ids: SpecialIds,
    num_latent_tokens: int,
    max_masks: int,
) -> SupervisedMasks:
    """Finds the hidden states that predict the codes of each supervised mask (for the mask loss).

    Args:
      ids: int32[B, T], rows with real codes (after `replace_mask_tokens`).
      labels: int32[B, T], unshifted: the state at t-1 predicts labels[t].
      special_ids: the tokenizer's special ids.
      num_latent_tokens: L.
      max_masks: M, masks per row; the m-th start of a row is mask m.

    Returns:
      A `SupervisedMasks`.
    """
    row_length = ids.shape[1]
    time = jnp.arange(row_length, dtype=jnp.int32)
    is_start = ids == special_ids.mask_start
    starts = jnp.sort(jnp.where(is_start, time, row_length), axis=1)[:, :max_masks]
    starts = jnp.pad(starts, ((0, 0), (0, max_masks - starts.shape[1])), constant_values=row_length)
    exists = starts < row_length
    at_start = jnp.minimum(starts, row_length - 1)
    is_supervised = jnp.take_along_axis(labels, at_start, axis=1) == special_ids.mask_start

    positions = starts[..., None] + jnp.arange(num_latent_tokens, dtype=jnp.int32)
    targets = jnp.minimum(positions + 1, row_length - 1)
    tokens = jnp.take_along_axis(ids[:, None, :], targets, axis=2) - special_ids.code_0
    is_code = (tokens >= 0) & (tokens < special_ids.num_codes) & (positions + 1 < row_length)
    length = jnp.sum(jnp.cumprod(is_code.astype(jnp.int32), axis=2), axis=2)
    return SupervisedMasks(
        positions=jnp.minimum(positions, row_length - 1),
        length=length,
        valid=exists & is_supervised & (length > 0),
    )
