"""Mask tokens against the reference's replacement and against plain Python on random sequences."""

import types

import jax
import jax.numpy as jnp
import numpy as np

from alto_jax.mllm import mask_tokens
from tests.golden_io import golden

START, END, CODE_0, NUM_CODES, PAD = 10, 11, 12, 6, 0
IDS = types.SimpleNamespace(pad=PAD, mask_start=START, mask_end=END, code_0=CODE_0, num_codes=NUM_CODES)
L = 4


# --- parse_completion ------------------------------------------------------------------------------


def _parse_plain(row, mask):
    """The format in words: one start, one end behind it, 1..L tokens between, all codes."""
    row = [t for t, keep in zip(row, mask) if keep]
    num_starts, num_ends = row.count(START), row.count(END)
    between = None
    if num_starts == 1 and num_ends == 1:
        between = row[row.index(START) + 1 : row.index(END)]
    in_range = between is not None and 1 <= len(between) <= L
    valid = in_range and all(CODE_0 <= t < CODE_0 + NUM_CODES for t in between)
    codes = [t - CODE_0 for t in between] if valid else []
    return num_starts, num_ends, len(between or []), in_range, valid, codes


def _random_completions(seed, count, time):
    """Half noise, half well-formed answers with a few random edits."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, CODE_0 + NUM_CODES + 2, (count, time))
    for row in ids[::2]:
        row[(row == START) | (row == END)] = 5
        length = rng.integers(0, L + 2)
        start = rng.integers(0, time - length - 1)
        row[start], row[start + length + 1] = START, END
        row[start + 1 : start + 1 + length] = rng.integers(CODE_0, CODE_0 + NUM_CODES, length)
        if rng.uniform() < 0.3:
            row[rng.integers(time)] = rng.integers(1, CODE_0 + NUM_CODES + 2)
    mask = np.arange(time) < rng.integers(0, time + 1, (count, 1))
    return ids.astype(np.int32), mask


def test_parse_completion_equals_plain_parser():
    count, time = 6000, 10
    ids, mask = _random_completions(0, count, time)
    parse = jax.jit(lambda i, m: mask_tokens.parse_completion(i, m, IDS, L))
    for m in (mask, np.ones_like(mask)):
        shaped = parse(ids.reshape(20, 300, time), m.reshape(20, 300, time))
        parsed = jax.tree.map(lambda x: np.asarray(x).reshape(count, *x.shape[2:]), shaped)
        num_valid = 0
        for i in range(count):
            num_starts, num_ends, between, in_range, valid, codes = _parse_plain(ids[i].tolist(), m[i])
            ours = (
                parsed.num_starts[i],
                parsed.num_ends[i],
                parsed.num_between[i],
                parsed.in_range[i],
                parsed.valid[i],
            )
            assert ours == (num_starts, num_ends, between, in_range, valid), ids[i]
            assert parsed.length[i] == len(codes)
            assert parsed.codes[i].tolist() == codes + [0] * (L - len(codes))
            assert parsed.code_mask[i].tolist() == [True] * len(codes) + [False] * (L - len(codes))
            num_valid += valid
        assert num_valid > 500


def test_parse_completion_edges():
    parse = lambda row: mask_tokens.parse_completion(jnp.array(row), None, IDS, L)
    full = parse([3, START, 12, 13, 14, 17, END, 7])
    assert bool(full.valid) and full.codes.tolist() == [0, 1, 2, 5]
    assert not bool(parse([END, 12, START]).valid)
    assert int(parse([END, 12, START]).num_between) == 0
    assert not bool(parse([START, 12, 13, 14, 15, 16, END]).valid)
    assert int(parse([START, 12, 13, 14, 15, 16, END]).num_between) == 5
    assert not bool(parse([START, CODE_0 + NUM_CODES, END]).valid)
    assert not bool(parse([START, END]).valid)


def test_parse_completion_of_the_reference_group():
    arrays = golden("grpo")
    special = types.SimpleNamespace(pad=2, mask_start=521, mask_end=522, code_0=523, num_codes=1024)
    parse = jax.jit(lambda x: mask_tokens.parse_completion(x, None, special, 32))
    parsed = parse(arrays["completion_ids"].astype(np.int32))
    np.testing.assert_array_equal(parsed.valid, arrays["valid_mask"])
    np.testing.assert_array_equal(parsed.num_between, arrays["lengths"])


# --- parse_masks -----------------------------------------------------------------------------------


def _masks_plain(row, mask):
    """The codes of every start that 1..L codes and an end follow."""
    row, found = [t if keep else -1 for t, keep in zip(row, mask)], []
    for at in (t for t, token in enumerate(row) if token == START):
        codes = []
        while at + 1 + len(codes) < len(row) and CODE_0 <= row[at + 1 + len(codes)] < CODE_0 + NUM_CODES:
            codes.append(row[at + 1 + len(codes)] - CODE_0)
        after = at + 1 + len(codes)
        if 1 <= len(codes) <= L and after < len(row) and row[after] == END:
            found.append(codes)
    return found


def test_parse_masks_equals_plain_parser():
    ids, _ = _random_completions(1, 3000, 10)
    ids = np.concatenate([ids, np.roll(ids, 2, axis=0)], axis=1)  # Two answers side by side: often two masks.
    mask = np.arange(20) < np.random.default_rng(5).integers(0, 24, (3000, 1))
    strict = jax.device_get(jax.jit(lambda i, m: mask_tokens.parse_completion(i, m, IDS, L))(ids, mask))
    for max_masks in (1, 3):
        found = jax.device_get(jax.jit(lambda i, m, n=max_masks: mask_tokens.parse_masks(i, m, IDS, L, n))(ids, mask))
        counts = []
        for i in range(len(ids)):
            masks = _masks_plain(ids[i].tolist(), mask[i])
            counts.append(len(masks))
            assert found.num_masks[i] == len(masks), ids[i]
            assert found.num_starts[i] == np.sum((ids[i] == START) & mask[i])
            for m in range(max_masks):
                codes = masks[m] if m < len(masks) else []
                assert found.valid[i, m] == (m < len(masks)) and found.length[i, m] == len(codes)
                assert found.codes[i, m].tolist() == codes + [0] * (L - len(codes))
            if strict.valid[i]:  # What rewards call well formed is one mask, the same one.
                assert found.num_masks[i] == 1 and found.codes[i, 0].tolist() == strict.codes[i].tolist()
        assert np.bincount(counts, minlength=3)[:3].min() > 100 and strict.valid.sum() > 100


def test_an_answer_with_two_masks_holds_two():
    parse = jax.jit(lambda row, most: mask_tokens.parse_masks(row, None, IDS, L, most), static_argnums=1)
    row = np.array([3, START, 12, 13, END, 4, START, 14, END, 7], np.int32)
    found = parse(row, 3)
    assert (int(found.num_masks), int(found.num_starts)) == (2, 2)
    assert found.valid.tolist() == [True, True, False] and found.length.tolist() == [2, 1, 0]
    assert found.codes.tolist() == [[0, 1, 0, 0], [2, 0, 0, 0], [0, 0, 0, 0]]
    one = jax.jit(lambda row: mask_tokens.parse_completion(row, None, IDS, L))
    assert not bool(one(row).valid), "a reward asks for one"
    broken = parse(np.array([START, START, 12, END, START, 13], np.int32), 2)
    assert int(broken.num_masks) == 1 and int(broken.num_starts) == 3
    assert np.asarray(broken.codes)[0].tolist() == [0, 0, 0, 0]
    assert parse(np.array([[START]], np.int32), 1).num_masks.tolist() == [0]


# --- replace_mask_tokens ---------------------------------------------------------------------------


def _golden_replace():
    arrays = {k: jnp.asarray(v) for k, v in golden("replace_tokens").items()}
    start, end, code_0, pad = (int(i) for i in arrays["ids"])
    special = types.SimpleNamespace(pad=pad, mask_start=start, mask_end=end, code_0=code_0, num_codes=1024)
    return arrays, special


def test_replace_mask_tokens_golden():
    arrays, special = _golden_replace()
    codes, lengths = arrays["mask_codes"][:, None], arrays["length_indices"][:, None]
    replace = jax.jit(lambda *a: mask_tokens.replace_mask_tokens(*a, special))
    ids, labels, _ = replace(arrays["input_ids"], arrays["labels"], codes, lengths, jnp.ones((3, 1), bool))
    np.testing.assert_array_equal(ids, arrays["new_input_ids"])
    np.testing.assert_array_equal(labels, arrays["new_labels"])
    user = slice(0, 1)
    labels = jnp.full_like(arrays["labels"][user], -100)
    ids, labels, _ = replace(arrays["input_ids"][user], labels, codes[user], lengths[user], jnp.ones((1, 1), bool))
    np.testing.assert_array_equal(ids, arrays["user_adaptive_ids"])
    np.testing.assert_array_equal(labels, arrays["user_adaptive_labels"])


def test_labels_move_with_the_ids_behind_a_user_mask():
    ids = jnp.array([[START, 13, 13, 13, 13, END, 5, 6]])
    labels = jnp.array([[-100, -100, -100, -100, -100, -100, 5, 6]])
    args = (ids, labels, jnp.array([[[3, 2, 1, 0]]]), jnp.array([[2]]), jnp.ones((1, 1), bool), IDS)
    new_ids, new_labels, text_mask = mask_tokens.replace_mask_tokens(*args)
    assert new_ids.tolist() == [[START, 15, 14, END, 5, 6, PAD, PAD]]
    assert new_labels.tolist() == [[-100, -100, -100, -100, 5, 6, -100, -100]]
    assert text_mask.tolist() == [[True] * 6 + [False] * 2]


def _replace_plain(ids, labels, length, codes, lengths, valid):
    """Row by row and token by token."""
    out_ids, out_labels, t, mask = [], [], 0, 0
    while t < length:
        out_ids.append(ids[t])
        out_labels.append(labels[t])
        t += 1
        if ids[t - 1] != START:
            continue
        if mask < len(codes) and valid[mask]:
            adaptive = ids[t] == CODE_0 + 1
            kept = lengths[mask] if adaptive else L
            for j in range(kept):
                out_ids.append(CODE_0 + codes[mask][j])
                out_labels.append(-100 if labels[t + j] == -100 else CODE_0 + codes[mask][j])
            t += L
        mask += 1
    real = len(out_ids)
    pad = len(ids) - real
    return out_ids + [PAD] * pad, out_labels + [-100] * pad, [True] * real + [False] * pad


def _random_chat(rng, time, num_masks):
    """A row of turns: text, some with a mask (fixed or adaptive), supervised or not, then padding."""
    ids, labels = [], []
    for _ in range(rng.integers(0, num_masks + 2)):
        turn = rng.integers(1, START, rng.integers(0, 4)).tolist()
        if ids.count(START) < num_masks and rng.uniform() < 0.8:
            turn += [START] + [CODE_0 + int(rng.integers(2))] * L + [END]
        turn += rng.integers(1, START, rng.integers(0, 3)).tolist()
        ids += turn
        labels += turn if rng.uniform() < 0.6 else [-100] * len(turn)
    ids, labels = ids[:time], labels[:time]
    pad = time - len(ids)
    return ids + [PAD] * pad, labels + [-100] * pad, len(ids)


def test_replace_mask_tokens_equals_plain_python():
    rng = np.random.default_rng(7)
    count, time, num_masks = 600, 48, 3
    rows = [_random_chat(rng, time, num_masks) for _ in range(count)]
    ids, labels = (np.array([r[i] for r in rows], np.int32) for i in (0, 1))
    codes = rng.integers(0, NUM_CODES, (count, num_masks, L))
    lengths = rng.integers(0, L + 1, (count, num_masks))
    valid = rng.uniform(size=(count, num_masks)) < 0.8
    replace = jax.jit(lambda *a: mask_tokens.replace_mask_tokens(*a, IDS))
    new_ids, new_labels, text_mask = replace(ids, labels, codes, lengths, valid)
    assert new_ids.dtype == new_labels.dtype == jnp.int32 and text_mask.dtype == bool
    for i, (row_ids, row_labels, length) in enumerate(rows):
        expected = _replace_plain(row_ids, row_labels, length, codes[i], lengths[i], valid[i])
        assert new_ids[i].tolist() == expected[0]
        assert new_labels[i].tolist() == expected[1]
        assert text_mask[i].tolist() == expected[2]


def test_text_mask_argument_wins_over_the_pad_id():
    ids = jnp.array([[5, PAD, 6, PAD]])
    args = (
        ids,
        jnp.full_like(ids, -100),
        jnp.zeros((1, 1, L), int),
        jnp.ones((1, 1), int),
        jnp.ones((1, 1), bool),
    )
    given = jnp.array([[True, False, True, True]])
    assert mask_tokens.replace_mask_tokens(*args, IDS, text_mask=given)[2].tolist() == given.tolist()
    assert mask_tokens.replace_mask_tokens(*args, IDS)[2].tolist() == [[True, True, True, False]]


# --- find_supervised_masks -------------------------------------------------------------------------


def test_find_supervised_masks_points_at_the_states_that_predict_the_codes():
    rng = np.random.default_rng(3)
    count, time, num_masks = 200, 48, 3
    rows = [_random_chat(rng, time, num_masks) for _ in range(count)]
    ids, labels = (np.array([r[i] for r in rows], np.int32) for i in (0, 1))
    codes = rng.integers(0, NUM_CODES, (count, num_masks, L))
    lengths = rng.integers(1, L + 1, (count, num_masks))
    ids, labels, _ = mask_tokens.replace_mask_tokens(
        ids, labels, codes, lengths, np.ones((count, num_masks), bool), IDS
    )
    found = jax.jit(lambda *rows: mask_tokens.find_supervised_masks(*rows, IDS, L, num_masks))(ids, labels)
    ids, labels = np.asarray(ids), np.asarray(labels)
    num_valid = 0
    for i in range(count):
        starts = np.flatnonzero(ids[i] == START)
        for m in range(num_masks):
            if m >= len(starts) or labels[i, starts[m]] != START:
                assert not found.valid[i, m]
                continue
            length = int(found.length[i, m])
            assert bool(found.valid[i, m]) == (length > 0)
            predicted = labels[i, np.asarray(found.positions[i, m, :length]) + 1]
            np.testing.assert_array_equal(predicted - CODE_0, codes[i, m, :length])
            after = starts[m] + 1 + length
            assert after == time or ids[i, after] == END
            num_valid += length > 0
    assert num_valid > 50


def test_find_supervised_masks_golden():
    arrays = golden("mask_loss_probs")
    start, end, code_0 = (int(i) for i in arrays["ids"])
    special = types.SimpleNamespace(pad=2, mask_start=start, mask_end=end, code_0=code_0, num_codes=1024)
    # The fixture's labels are already shifted: one column in front undoes it.
    labels = jnp.pad(jnp.asarray(arrays["labels"]), ((0, 0), (1, 0)), constant_values=-100)
    found = jax.jit(lambda x: mask_tokens.find_supervised_masks(x, x, special, 32, 1))(labels)
    np.testing.assert_array_equal(found.valid[:, 0], arrays["valid"])
    np.testing.assert_array_equal(found.length[:2, 0], arrays["lengths"][:2])
    np.testing.assert_array_equal(found.positions[:2, 0, 0], [6, 4])


# --- text ------------------------------------------------------------------------------------------
