"""Generation against a naive loop of full forward passes, a plain parser of the format, and frequencies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alto_jax.config import ConfigError
from alto_jax.mllm import generate as generation
from alto_jax.mllm.generate import Controls, GenerateConfig, Questions, allowed_tokens, choose, generate, mask_state
from alto_jax.mllm.language_model import LanguageModel, LanguageModelConfig
from alto_jax.mllm.text import SpecialIds

SPECIAL = SpecialIds(
    pad=0, bos=None, im_start=1, im_end=2, img=3, img_end=4, img_context=5, ref=6, ref_end=7, box=8, box_end=9,
    mask_start=10, mask_end=11, code_0=12, num_codes=20,
)  # fmt: skip
VOCAB, TEXT_0 = 56, 32
FORBIDDEN_OUTSIDE = {0, 1, 3, 4, 5, 11, *range(12, 32)}
MODEL = LanguageModel(LanguageModelConfig(VOCAB, embed_dim=16, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=32))
BATCH, PROMPT = 3, 7
SAMPLE = GenerateConfig(max_new_tokens=10, temperature=1.0)
GRAMMAR = GenerateConfig(max_new_tokens=16, temperature=2.0, grammar=True, max_length=4)
INSIDE = GenerateConfig(max_new_tokens=12, grammar=True, max_length=8, stop_at_mask_end=True)


@functools.cache
def setting():
    """Parameters with lively logits, left-padded prompts, their mask and embeddings."""
    init = jax.jit(functools.partial(MODEL.init, method="forward"))
    params = init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    params = jax.tree.map(lambda a: np.asarray(a) * 8 if a.ndim > 1 else np.asarray(a), params)
    ids = np.random.default_rng(0).integers(TEXT_0, VOCAB, (BATCH, PROMPT))
    mask = np.arange(PROMPT) >= np.array([[0], [2], [5]])
    return params, ids, mask, params["embed"]["embedding"][ids]


def run(cfg, seed=0, num_samples=None, **kwargs):
    params, ids, mask, embedded = setting()
    rng = kwargs.pop("rng", jax.random.key(seed))
    return jax.device_get(generate(MODEL, params, embedded, mask, cfg, SPECIAL, rng, num_samples, **kwargs))


@functools.cache
def full_forward():
    return jax.jit(lambda params, *args: MODEL.apply({"params": params}, *args, method="forward"))


def full_logits(rows, new_ids, new_mask):
    """Logits float32[R, T, V] before each new token, by one forward pass over prompt and answer."""
    params, prompts, prompt_mask, _ = setting()
    ids = np.concatenate([prompts[rows], new_ids], axis=1)
    mask = np.concatenate([prompt_mask[rows], new_mask], axis=1)
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    attn_mask = np.tril(np.ones((mask.shape[1],) * 2, bool)) & mask[:, None]
    return np.asarray(full_forward()(params, ids, positions, attn_mask))[:, PROMPT - 1 : -1]


def log_softmax(logits):
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def spans(ids, start_inside=False):
    """Parses an answer without padding: lengths of its masks; asserts that it is well formed."""
    lengths, count = [], 0 if start_inside else None
    for token in ids:
        if count is None:
            assert token not in FORBIDDEN_OUTSIDE
            count = 0 if token == SPECIAL.mask_start else None
        elif token == SPECIAL.mask_end:
            lengths.append(count)
            count = None
        else:
            assert SPECIAL.code_0 <= token < SPECIAL.code_0 + SPECIAL.num_codes
            count += 1
    assert count is None, "a mask does not end"
    return lengths


def answers(out):
    """The unpadded answers; checks that masks are prefixes and that padding follows."""
    ids, mask = out.ids.reshape(-1, out.ids.shape[-1]), out.mask.reshape(-1, out.mask.shape[-1])
    assert np.all(mask[:, :-1] >= mask[:, 1:]) and np.all(mask[:, 0])
    assert np.all(ids[~mask] == SPECIAL.pad)
    for logps in (out.per_token_logps, out.sampling_logps):
        assert np.all(logps.reshape(mask.shape)[~mask] == 0)
    return [row[m] for row, m in zip(ids, mask)]


def test_greedy_equals_a_loop_of_full_forwards():
    cfg = GenerateConfig(max_new_tokens=10)
    out = run(cfg)
    ids, mask = np.zeros((BATCH, 10), int), np.zeros((BATCH, 10), bool)
    done = np.zeros(BATCH, bool)
    for t in range(10):
        mask[:, t] = True  # Note: rows that are done go on here; their tokens are dropped.
        logits = full_logits(np.arange(BATCH), ids, mask)[:, t]
        ids[:, t] = np.where(done, SPECIAL.pad, logits.argmax(axis=-1))
        mask[done, t] = False
        done |= ids[:, t] == SPECIAL.im_end
    np.testing.assert_array_equal(out.ids, ids)
    np.testing.assert_array_equal(out.mask, mask)
    logps = np.take_along_axis(log_softmax(full_logits(np.arange(BATCH), ids, mask)), ids[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(out.per_token_logps, np.where(mask, logps, 0), rtol=0, atol=1e-4)
    assert len(np.unique(ids)) > 8 and np.all(out.sampling_logps == 0)
    answers(out)


def test_sampled_rows_end_at_the_end_of_turn_and_logps_are_the_models():
    out = run(SAMPLE, num_samples=32)
    assert out.ids.shape == out.mask.shape == out.per_token_logps.shape == (BATCH, 32, 10)
    rows = np.repeat(np.arange(BATCH), 32)
    ids, mask = out.ids.reshape(-1, 10), out.mask.reshape(-1, 10)
    logps = np.take_along_axis(log_softmax(full_logits(rows, ids, mask)), ids[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(out.per_token_logps.reshape(-1, 10), np.where(mask, logps, 0), rtol=0, atol=1e-4)
    # Temperature 1 without constraints: the sampling distribution is the model's.
    np.testing.assert_allclose(out.sampling_logps, out.per_token_logps, rtol=0, atol=1e-5)
    ended = 0
    for answer in answers(out):
        assert np.all(answer[:-1] != SPECIAL.im_end)
        assert len(answer) == 10 or answer[-1] == SPECIAL.im_end
        ended += len(answer) < 10
    assert ended > 5
    assert len({tuple(answer) for answer in answers(out)}) > 90


def test_shared_prompt_equals_repeated_prompt():
    shared = run(SAMPLE, seed=3, num_samples=4)
    repeated = run(GenerateConfig(max_new_tokens=10, temperature=1.0, share_prompt=False), seed=3, num_samples=4)
    np.testing.assert_array_equal(shared.ids, repeated.ids)
    np.testing.assert_allclose(shared.per_token_logps, repeated.per_token_logps, rtol=0, atol=2e-5)


def test_per_row_keys_make_rows_independent_of_the_batch():
    params, _, mask, embedded = setting()
    keys = jax.random.split(jax.random.key(5), BATCH)
    order = np.array([2, 0, 1])
    first = generate(MODEL, params, embedded, mask, SAMPLE, SPECIAL, keys, 4)
    second = generate(MODEL, params, embedded[order], mask[order], SAMPLE, SPECIAL, keys[order], 4)
    np.testing.assert_array_equal(np.asarray(first.ids)[order], second.ids)
    same = generate(MODEL, params, embedded, mask, SAMPLE, SPECIAL, keys[np.zeros(BATCH, int)], 4)
    np.testing.assert_array_equal(np.asarray(same.ids)[0], np.asarray(first.ids)[0])


def test_grammar_makes_every_answer_well_formed():
    out = run(GRAMMAR, num_samples=1500)
    lengths = [length for answer in answers(out) for length in spans(answer)]
    assert min(lengths) == 1 and max(lengths) == 4 and len(lengths) > 500
    # Sampling log-probabilities: of the tempered distribution over what the grammar allows.
    count = 32
    ids, mask = out.ids[:, :count].reshape(-1, 16), out.mask[:, :count].reshape(-1, 16)
    logits = full_logits(np.repeat(np.arange(BATCH), count), ids, mask)
    inside, codes = np.zeros(len(ids), bool), np.zeros(len(ids), int)
    limits = jnp.int32(1), jnp.int32(4)
    for t in range(16):
        allowed = np.asarray(allowed_tokens(VOCAB, SPECIAL, jnp.array(inside), jnp.array(codes), 16 - t, *limits))
        logps = log_softmax(np.where(allowed, logits[:, t] / 2.0, -np.inf))[np.arange(len(ids)), ids[:, t]]
        expected = np.where(mask[:, t], logps, 0)
        np.testing.assert_allclose(out.sampling_logps[:, :count].reshape(-1, 16)[:, t], expected, rtol=0, atol=1e-4)
        codes = np.where(inside, codes + 1, 0)
        inside = (inside | (ids[:, t] == SPECIAL.mask_start)) & (ids[:, t] != SPECIAL.mask_end)
    # The same model without the grammar breaks the format, so the check above can fail.
    malformed = 0
    for answer in answers(run(SAMPLE, num_samples=32)):
        try:
            spans(answer)
        except AssertionError:
            malformed += 1
    assert malformed > 50


def test_allowed_tokens():
    inside = jnp.array([False, True, True, True, True])
    count = jnp.array([0, 0, 1, 2, 3])
    call = lambda remaining: np.asarray(allowed_tokens(VOCAB, SPECIAL, inside, count, remaining, 2, 3))
    codes, text = set(range(12, 32)), set(range(VOCAB)) - FORBIDDEN_OUTSIDE
    sets = [set(np.flatnonzero(row)) for row in call(9)]
    assert sets == [text, codes, codes, codes | {11}, {11}]
    assert set(np.flatnonzero(call(4)[0])) == text  # Start, two codes and the end still fit.
    assert set(np.flatnonzero(call(3)[0])) == text - {10}
    assert all(set(np.flatnonzero(row)) == {11} for row in call(1)[1:])


def inside_prompts():
    """Prompts that end with <ALTo_Start>: (ids, embeddings)."""
    params, ids, _, _ = setting()
    ids = ids.copy()
    ids[:, -1] = SPECIAL.mask_start
    return ids, params["embed"]["embedding"][ids]


def run_inside(cfg, controls=None):
    params, _, mask, _ = setting()
    ids, embedded = inside_prompts()
    rng = jax.random.key(0)
    out = generate(MODEL, params, embedded, mask, cfg, SPECIAL, rng, prompt_ids=ids, controls=controls)
    return jax.device_get(out), [spans(answer, start_inside=True) for answer in answers(jax.device_get(out))]


def test_length_control_and_early_exit_without_recompilation():
    change = functools.partial(GenerateConfig, max_new_tokens=12, grammar=True, stop_at_mask_end=True)
    run_inside(INSIDE)
    compiled = generation._generate._cache_size()
    for length in (1, 3, 5):
        out, lengths = run_inside(change(forced_length=length))
        assert lengths == [[length]] * BATCH
        assert out.num_steps == length + 1  # Early exit: not max_new_tokens.
        assert np.all(out.ids[np.arange(BATCH), length] == SPECIAL.mask_end)
    assert run_inside(change(max_length=6, end_logit_bias=1e4))[1] == [[1]] * BATCH
    assert run_inside(change(min_length=2, max_length=6, end_logit_bias=1e4))[1] == [[2]] * BATCH
    assert run_inside(change(max_length=6, end_logit_bias=-1e4))[1] == [[6]] * BATCH
    assert run_inside(change(max_length=30, end_logit_bias=-1e4))[1] == [[11]] * BATCH  # The room that there is.
    assert generation._generate._cache_size() == compiled

    per_row = jnp.array([4, 1, 2])
    controls = Controls(jnp.float32(1), per_row, per_row, jnp.float32(0))
    out, lengths = run_inside(INSIDE, controls)
    assert lengths == [[4], [1], [2]] and out.num_steps == 5
    np.testing.assert_array_equal(out.mask.sum(axis=1), [5, 2, 3])
    assert generation._generate._cache_size() == compiled + 1
    run_inside(INSIDE, controls.replace(min_length=per_row[::-1], max_length=per_row[::-1]))
    assert generation._generate._cache_size() == compiled + 1


def test_rows_that_finish_do_not_change_the_others():
    alone, _ = run_inside(GenerateConfig(max_new_tokens=12, grammar=True, stop_at_mask_end=True, forced_length=5))
    lengths = jnp.array([5, 1, 5])
    mixed, _ = run_inside(INSIDE, Controls(jnp.float32(1), lengths, lengths, jnp.float32(0)))
    np.testing.assert_array_equal(mixed.ids[[0, 2]], alone.ids[[0, 2]])
    np.testing.assert_allclose(mixed.per_token_logps[[0, 2]], alone.per_token_logps[[0, 2]], rtol=0, atol=1e-5)


def test_low_precision_cache_stays_close():
    exact, _ = run_inside(INSIDE)
    rounded, _ = run_inside(GenerateConfig(**{**vars(INSIDE), "cache_dtype": "bfloat16"}))
    same = np.cumprod(exact.ids == rounded.ids, axis=1).astype(bool) & exact.mask
    assert same[:, 0].all()
    np.testing.assert_allclose(rounded.per_token_logps[same], exact.per_token_logps[same], rtol=0, atol=0.2)
    assert np.any(rounded.per_token_logps != exact.per_token_logps)


def test_mask_state():
    start, end = SPECIAL.mask_start, SPECIAL.mask_end
    rows = [[0, 40, 41, 42], [40, start, 12, end], [40, start, 12, 13], [start, end, 40, start]]
    inside, count = mask_state(jnp.array(rows), SPECIAL)
    np.testing.assert_array_equal(inside, [False, False, True, True])
    np.testing.assert_array_equal(count, [0, 0, 2, 0])


@pytest.mark.parametrize(
    "options", [dict(temperature=1.0), dict(temperature=2.0, top_k=3), dict(temperature=0.7, top_p=0.8),
                dict(temperature=1.5, top_k=4, top_p=0.7)]
)  # fmt: skip
def test_sampling_frequencies(options):
    cfg = GenerateConfig(**options)
    logits = np.array([1.0, -np.inf, 0.3, 2.1, -1.0, 0.9], np.float32)
    total = 20000
    keys = jax.random.split(jax.random.key(1), total)
    rows = np.broadcast_to(logits, (total, logits.size))
    ids, logps = jax.jit(choose, static_argnums=2)(rows, keys, cfg, jnp.float32(cfg.temperature))

    probs = np.exp(log_softmax(logits.astype(np.float64) / cfg.temperature))
    order = np.argsort(-probs)
    kept = order[: cfg.top_k or logits.size]
    within = probs[kept] / probs[kept].sum()
    kept = kept[np.cumsum(within) - within < cfg.top_p]
    expected = np.zeros(logits.size)
    expected[kept] = probs[kept] / probs[kept].sum()

    frequencies = np.bincount(ids, minlength=logits.size) / total
    assert np.all(np.abs(frequencies - expected) <= 4.5 * np.sqrt(expected * (1 - expected) / total))
    np.testing.assert_allclose(np.exp(logps), expected[ids], rtol=1e-5)


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("temperature", dict(temperature=-1.0)),
        ("top_p", dict(top_p=0.0)),
        ("max_length", dict(min_length=4, max_length=3)),
        ("forced_length", dict(forced_length=3)),
        ("min_length", dict(min_length=3)),
        ("max_new_tokens", dict(grammar=True, forced_length=8, max_new_tokens=8)),
        ("cache_dtype", dict(cache_dtype="int3")),
    ],
)
def test_bad_config_names_the_field(field, options):
    with pytest.raises(ConfigError, match=f"^{field}: "):
        GenerateConfig(**options)


@pytest.mark.parametrize("grammar", [False, True])
def test_questions_about_one_beginning_equal_whole_prompts(grammar):
    params, *_ = setting()
    rng = np.random.default_rng(7)
    begin, ask, groups = np.array([5, 3]), np.array([[1, 4, 2], [3, 3, 1]]), 3
    ids = [rng.integers(32, VOCAB, n) for n in begin]
    asked = [[rng.integers(32, VOCAB, n) for n in row] for row in ask]
    asked[0][1][-1] = SPECIAL.mask_start  # A forced answer prefix: this one goes on inside a mask.
    pad = lambda row, size: np.pad(row, (size - len(row), 0), constant_values=SPECIAL.pad)
    mask_of = lambda lengths, size: np.arange(size) >= size - np.asarray(lengths)[..., None]
    embed = lambda ids: params["embed"]["embedding"][ids]
    cfg = GenerateConfig(max_new_tokens=8, grammar=grammar)

    question_ids = np.array([[pad(q, 4) for q in row] for row in asked])
    questions = Questions(embed(question_ids), mask_of(ask, 4), question_ids)
    prompts = np.array([pad(row, 5) for row in ids])
    got = generate(MODEL, params, embed(prompts), mask_of(begin, 5), cfg, SPECIAL, jax.random.key(0), groups,
                   questions=questions)  # fmt: skip
    whole = np.array([pad(np.concatenate([b, q]), 9) for b, row in zip(ids, asked) for q in row])
    lengths = (begin[:, None] + ask).reshape(-1)
    wanted = generate(
        MODEL, params, embed(whole), mask_of(lengths, 9), cfg, SPECIAL, jax.random.key(0), prompt_ids=whole
    )
    np.testing.assert_array_equal(got.ids.reshape(wanted.ids.shape), wanted.ids)
    np.testing.assert_allclose(got.per_token_logps.reshape(wanted.ids.shape), wanted.per_token_logps, rtol=0, atol=2e-5)
    assert len(np.unique(wanted.ids)) > 8
