"""10,000 samples of a random model at temperature 2: the grammar makes every answer well formed, and without it the
format reward says of each answer what a plain parser in Python says."""

import numpy as np

from alto_jax import rewards
from alto_jax.mllm.generate import GenerateConfig
from alto_jax.mllm.mask_tokens import parse_completion
from tests.mllm.test_generate import SPECIAL, answers, run, spans

LIMIT, SAMPLES = 4, 3334  # times three prompts


def is_well_formed(ids) -> bool:
    """One start, one end after it, and between them 1..LIMIT codes and nothing else."""
    ids = list(ids)
    if ids.count(SPECIAL.mask_start) != 1 or ids.count(SPECIAL.mask_end) != 1:
        return False
    between = ids[ids.index(SPECIAL.mask_start) + 1 : ids.index(SPECIAL.mask_end)]
    codes = range(SPECIAL.code_0, SPECIAL.code_0 + SPECIAL.num_codes)
    return 1 <= len(between) <= LIMIT and all(token in codes for token in between)


def format_rewards(ids, mask):
    parsed = parse_completion(ids, mask, SPECIAL, LIMIT)
    _, parts = rewards.compute_rewards(parsed, np.ones(ids.shape[:-1], np.float32), rewards.RewardConfig())
    return np.asarray(parts["format"])


def mutated(rng, ids, mask):
    """Answers with one or two tokens replaced, dropped or doubled, so that many are malformed by little."""
    ids = ids.copy()
    for row, valid in zip(ids, mask):
        for _ in range(rng.integers(1, 3)):
            at, length = rng.integers(valid.sum()), len(row)
            kind = rng.integers(3)
            if kind == 0:
                row[at] = rng.choice([SPECIAL.mask_start, SPECIAL.mask_end, SPECIAL.code_0, 40, SPECIAL.pad])
            elif kind == 1:
                row[at : length - 1] = row[at + 1 :].copy()
            else:
                row[at + 1 :] = row[at : length - 1].copy()
    return ids


def test_grammar_and_format_reward_on_ten_thousand_samples():
    grammar = run(GenerateConfig(max_new_tokens=10, temperature=2.0, grammar=True, max_length=LIMIT), 0, SAMPLES)
    ids, mask = (a.reshape(-1, a.shape[-1]) for a in (grammar.ids, grammar.mask))
    assert len(ids) >= 10_000
    lengths = [spans(answer) for answer in answers(grammar)]
    assert all(1 <= length <= LIMIT for row in lengths for length in row)
    # An answer may hold no mask or several, which is text, not a wrong mask; with exactly one it is rewarded.
    np.testing.assert_array_equal(format_rewards(ids, mask) == 1, [len(row) == 1 for row in lengths])

    free = run(GenerateConfig(max_new_tokens=10, temperature=2.0), 1, SAMPLES)
    free = [a.reshape(-1, a.shape[-1]) for a in (free.ids, free.mask)]
    rng = np.random.default_rng(0)
    for name, rows, valid in [("free", *free), ("near", mutated(rng, ids, mask), mask)]:
        wanted = np.array([is_well_formed(row[real]) for row, real in zip(rows, valid)])
        np.testing.assert_array_equal(format_rewards(rows, valid), wanted.astype(np.float32), err_msg=name)
        assert len(wanted) >= 10_000 and 10 < wanted.sum() < len(wanted) - 1000, (name, wanted.sum())
