"""Rewards and advantages against the reference's group and plain formulas."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alto_jax import metrics, rewards
from alto_jax.mllm.mask_tokens import parse_completion
from tests.golden_io import golden, tolerance

SPECIAL = types.SimpleNamespace(pad=2, mask_start=521, mask_end=522, code_0=523, num_codes=1024)


def _group():
    arrays = golden("grpo")
    parsed = parse_completion(jnp.asarray(arrays["completion_ids"])[None], None, SPECIAL, 32)
    return arrays, parsed, jnp.asarray(arrays["ious"], jnp.float32)[None]


def test_reference_reward_golden():
    arrays, parsed, iou = _group()
    np.testing.assert_array_equal(rewards.format_checks(parsed)[0], arrays["format_rewards"])
    cfg = rewards.RewardConfig(kind="reference", length_weight=1e-3)
    values, parts = jax.jit(lambda p, i: rewards.compute_rewards(p, i, cfg))(parsed, iou)
    np.testing.assert_allclose(values[0], arrays["rewards"], rtol=0, atol=tolerance("grpo", "rewards"))
    np.testing.assert_allclose(parts["format"] + parts["iou"] + parts["length_reward"], values, rtol=1e-6)


def test_reference_advantages_golden():
    arrays = golden("grpo")
    values = jnp.asarray(arrays["rewards"])[None]
    ours = rewards.group_advantages(values, "reference")[0]
    np.testing.assert_allclose(ours, arrays["advantages"], rtol=0, atol=tolerance("grpo", "advantages"))


def test_paper_reward_charges_tokens_and_gives_nothing_to_malformed():
    arrays, parsed, iou = _group()
    cfg = rewards.RewardConfig(length_weight=1e-2)
    values, parts = rewards.compute_rewards(parsed, iou, cfg)
    valid = arrays["valid_mask"]
    expected = np.where(valid, 1 + arrays["ious"] - 1e-2 * arrays["lengths"], 0)
    np.testing.assert_allclose(values[0], expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(parts["valid"][0], valid)
    np.testing.assert_array_equal(parts["length"][0], np.where(valid, arrays["lengths"], 0))


def test_iou_reward_golden():
    group = golden("grpo")
    masks, target = jnp.asarray(group["mask_images_row012"])[None], jnp.asarray(group["target_mask"])
    ours = rewards.iou_reward(masks, target, jnp.ones((1, 3), bool))[0]
    np.testing.assert_allclose(ours, group["ious"][:3], rtol=0, atol=tolerance("grpo", "ious"))


def test_iou_reward_by_hand():
    target = jnp.array([[[1.0, 1.0, 0.0, 0.0]], [[0.0] * 4]])
    masks = jnp.array([[[[0.9, 0.0, 0.8, 0.5]], [[1.0, 1.0, 0.0, 0.0]]], [[[0.2] * 4], [[0.0, 0.0, 0.0, 0.6]]]])
    ours = rewards.iou_reward(masks, target, jnp.ones((2, 2), bool))
    np.testing.assert_allclose(ours, [[1 / 3, 1], [1, 0]])
    none = rewards.iou_reward(masks, target, jnp.zeros((2, 2), bool))
    assert not np.any(none)


def test_boundary_reward_is_the_metric():
    rng = np.random.default_rng(0)
    masks = rng.uniform(size=(2, 3, 20, 30)).astype(np.float32)
    masks[:, :, 4:15, 6:22] += 0.6
    target = np.zeros((2, 20, 30), np.float32)
    target[:, 5:16, 6:20] = 1
    valid = jnp.array([[True, True, False], [True, True, True]])
    ours = jax.jit(functools.partial(rewards.iou_reward, boundary=True))(masks, target, valid)
    expected = metrics.boundary_iou(masks > 0.5, (target > 0.5)[:, None])
    np.testing.assert_allclose(ours, np.where(valid, expected, 0), rtol=1e-6)
    whole = rewards.iou_reward(masks, target, valid)
    assert 0 < float(ours[0, 0]) < float(whole[0, 0])


def test_token_match_and_weights():
    ids = jnp.array([[521, 530, 531, 532, 522], [521, 530, 540, 522, 2], [530, 521, 522, 2, 2]])[None]
    parsed = parse_completion(ids, None, SPECIAL, 4)
    match = rewards.token_match(parsed, jnp.array([[7, 8, 0, 9]]))
    np.testing.assert_allclose(match, [[2 / 3, 1 / 2, 0]])  # Codes 7, 8, 9; 7, 17; malformed.
    iou = jnp.array([[0.5, 0.25, 0.0]])
    cfg = rewards.RewardConfig(boundary_weight=2.0, token_weight=3.0, length_weight=0.1)
    values, parts = rewards.compute_rewards(parsed, iou, cfg, boundary=iou / 2, tokens=match)
    np.testing.assert_allclose(values, [[1 + 0.5 - 0.3 + 0.5 + 2, 1 + 0.25 - 0.2 + 0.25 + 1.5, 0]], rtol=1e-6)
    np.testing.assert_allclose(parts["tokens"], [[2, 1.5, 0]], rtol=1e-6)
    with pytest.raises(ValueError, match="tokens: .*weight of 3.0, got None"):
        rewards.compute_rewards(parsed, iou, cfg, boundary=iou)


def test_group_advantages():
    values = np.random.default_rng(0).uniform(size=(3, 5))
    values[2] = 0.7
    centred = values - values.mean(1, keepdims=True)
    std = values.std(1, ddof=1, keepdims=True)
    given = jnp.asarray(values)
    np.testing.assert_allclose(rewards.group_advantages(given), centred / (std + 1e-4), rtol=1e-5, atol=1e-6)
    assert not np.any(rewards.group_advantages(given)[2])
    np.testing.assert_allclose(rewards.group_advantages(given, "none"), centred, atol=1e-6)
    np.testing.assert_array_equal(rewards.informative_groups(given), [True, True, False])
    with pytest.raises(ValueError, match="at least 2"):
        rewards.group_advantages(jnp.ones((2, 1)))
    with pytest.raises(ValueError, match="robust"):
        rewards.group_advantages(given, "robust")


@pytest.mark.parametrize("normalization", ["paper", "reference", "none"])
def test_groups_of_equal_rewards_get_no_advantage(normalization):
    """Exactly 0 for groups of 2..32 and rewards of 1e-3..1e6; groups that differ keep their formula."""
    rng, run = np.random.default_rng(0), jax.jit(rewards.group_advantages, static_argnums=1)
    size = np.repeat(10.0 ** np.arange(-3, 7), 200)[:, None]
    offset = {"paper": 1e-4, "reference": 0.1 + 1e-4, "none": None}[normalization]
    for group in range(2, 33):
        values = size * (1 + rng.random(size.shape)) * rng.choice([-1, 1], size.shape)
        equal = np.repeat(values.astype(np.float32), group, axis=1)
        assert not np.any(run(equal, normalization)), group
        equal[:, 0] += (3 * size[:, 0]).astype(np.float32)
        wide = equal.astype(np.float64)
        expected = wide - wide.mean(1, keepdims=True)
        expected = expected if offset is None else expected / (wide.std(1, ddof=1, keepdims=True) + offset)
        np.testing.assert_allclose(run(equal, normalization), expected, rtol=2e-5, atol=1e-7)


def test_rewards_that_are_equal_before_the_sum_stay_equal():
    """The parts of a reward are added inside the same program, so that no fusion may round them apart."""
    rng = np.random.default_rng(1)
    parts = [jnp.asarray(np.repeat(rng.random((500, 1)), 12, 1), jnp.float32) for _ in range(3)]
    run = jax.jit(lambda a, b, c: rewards.group_advantages(1.7 * a + 0.3 * b - 1e-3 * c))
    assert not np.any(run(*parts))


def test_config_names_the_field():
    with pytest.raises(ValueError, match=r"reward\.kind.*'best'"):
        rewards.RewardConfig(kind="best")
    with pytest.raises(ValueError, match=r"reward\.length_weight.*-1"):
        rewards.RewardConfig(length_weight=-1.0)
