"""Metrics against the reference's values and definitions written out."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alto_jax import metrics, rewards
from tests.golden_io import golden, tolerance


def test_reference_evaluation_golden():
    arrays = golden("metrics")
    collected = metrics.SegmentationMetrics()
    for i in range(5):
        target, ignore = arrays[f"gt{i}"] == 1, arrays[f"gt{i}"] == 255
        pair = metrics.apply_protocol(arrays[f"pred{i}"], target, ignore, metrics.REFERENCE_PROTOCOL)
        collected.add(*pair)
    np.testing.assert_allclose(collected.ious(), arrays["eval_ious"], rtol=0, atol=tolerance("metrics", "eval_ious"))
    assert sum(collected.intersection) == arrays["eval_intersection_sum"]
    assert sum(collected.union) == arrays["eval_union_sum"]
    result = collected.compute()
    np.testing.assert_allclose(result["giou"], arrays["eval_giou"], rtol=0, atol=tolerance("metrics", "eval_giou"))
    np.testing.assert_allclose(result["ciou"], arrays["eval_ciou"], rtol=0, atol=tolerance("metrics", "eval_ciou"))


def test_stage1_metrics_golden():
    arrays = golden("metrics")
    a, b = arrays["viz_a"][:, 0], arrays["viz_b"][:, 0]
    iou = metrics.mask_iou(a > 0.5, b > 0.5).mean()
    boundary = metrics.boundary_iou(a > 0.5, b > 0.5).mean()
    np.testing.assert_allclose(iou, arrays["viz_mean_iou"], rtol=0, atol=tolerance("metrics", "viz_mean_iou"))
    np.testing.assert_allclose(boundary, arrays["viz_mean_biou"], rtol=0, atol=tolerance("metrics", "viz_mean_biou"))
    np.testing.assert_allclose(
        np.square(a - b).mean(), arrays["viz_mean_mse"], rtol=0, atol=tolerance("metrics", "viz_mean_mse")
    )
    in_jit = jax.jit(metrics.mask_iou)(jnp.asarray(a > 0.5), jnp.asarray(b > 0.5))
    np.testing.assert_allclose(in_jit, metrics.mask_iou(a > 0.5, b > 0.5), rtol=1e-6)


def test_iou_reward_golden():
    arrays = golden("metrics")
    # Each prediction of the fixture is scored on its own target (viz_a).
    masks, target = jnp.asarray(arrays["reward_pred"])[:, None], jnp.asarray(arrays["viz_a"][:, 0])
    ours = rewards.iou_reward(masks, target, jnp.asarray(arrays["reward_valid"])[:, None])[:, 0]
    np.testing.assert_allclose(ours, arrays["reward_ious"], rtol=0, atol=tolerance("metrics", "reward_ious"))


@pytest.mark.parametrize("shape", [(5, 9), (64, 40)])
def test_boundary_is_the_mask_minus_its_repeated_erosion(shape):
    rng = np.random.default_rng(0)
    mask = rng.uniform(size=(3, *shape)) < 0.97
    eroded = mask
    for _ in range(max(1, round(0.02 * np.hypot(*shape)))):
        padded = np.pad(eroded, ((0, 0), (1, 1), (1, 1)))
        shifts = [padded[:, i : i + shape[0], j : j + shape[1]] for i in range(3) for j in range(3)]
        eroded = np.all(shifts, axis=0)
    np.testing.assert_array_equal(metrics.mask_boundary(mask), mask & ~eroded)
    empty = np.zeros(shape, bool)
    assert metrics.boundary_iou(empty, empty) == 1 and metrics.boundary_iou(mask[0], empty) == 0


def test_boundary_in_the_boxes_is_the_boundary():
    """The same number as from whole masks: boxes apart, at the border, smaller than the erosion, and empty."""
    rng = np.random.default_rng(1)
    cases = [(np.zeros((40, 60), bool), np.zeros((40, 60), bool))]
    for _ in range(300):
        shape = tuple(rng.integers(3, 120, 2))
        pair = []
        for _ in range(2):
            top, left = rng.integers(0, shape[0]), rng.integers(0, shape[1])
            mask = np.zeros(shape, bool)
            mask[top : top + rng.integers(1, 80), left : left + rng.integers(1, 80)] = True
            pair.append(mask & (rng.random(shape) < rng.choice([1.0, 0.99, 0.5])))
        cases.append(tuple(pair))
    for ratio in (0.02, 0.1):
        for prediction, target in cases:
            parts = [metrics.mask_boundary(mask, ratio) for mask in (prediction, target)]
            assert metrics.boundary_iou(prediction, target, ratio) == metrics.mask_iou(*parts)


def test_a_malformed_answer_is_never_a_rejection():
    empty, full = np.zeros((4, 4), bool), np.ones((4, 4), bool)
    garbage = metrics.SegmentationMetrics()
    assert [garbage.add(empty, target, malformed=True) for target in (empty, empty, full)] == [0, 0, 0]
    result = garbage.compute()
    assert result["n_acc"] == 0 and result["giou"] == 0 and result["biou"] == 0 and result["t_acc"] == 0
    assert result["ciou"] == 0 and garbage.union == [0, 0, 16]
    said = metrics.SegmentationMetrics()
    said.add(empty, empty)
    assert said.merge(garbage).compute()["n_acc"] == 1 / 3 and said.compute()["giou"] == 1


def test_ignored_pixels_and_small_predictions():
    probabilities = np.array([[0.9, 0.9], [0.1, 0.1]])
    target = np.array([[True, False], [True, False]])
    ignore = np.array([[False, True], [False, True]])
    prediction, kept = metrics.apply_protocol(probabilities, target, ignore)
    assert prediction.tolist() == [[True, False], [False, False]] and kept.tolist() == target.tolist()
    prediction, kept = metrics.apply_protocol(probabilities, target, ignore, metrics.REFERENCE_PROTOCOL)
    assert prediction.tolist() == [[True, True], [False, True]] and kept.all()
    strict = metrics.MaskProtocol(min_pixels=3)
    assert not metrics.apply_protocol(probabilities, target, None, strict)[0].any()
    with pytest.raises(ValueError, match="bicubic"):
        metrics.MaskProtocol(upsample="bicubic")


def test_grefcoco_rules():
    """Official rules: an empty prediction for no target scores 1 and adds nothing to the sums."""
    empty, full = np.zeros((4, 4), bool), np.ones((4, 4), bool)
    half = full.copy()
    half[2:] = False
    collected = metrics.SegmentationMetrics()
    ious = [collected.add(*pair) for pair in [(empty, empty), (half, empty), (half, full), (empty, full)]]
    assert ious == [1, 0, 0.5, 0]
    result = collected.compute()
    assert result["giou"] == 0.375
    np.testing.assert_allclose(result["ciou"], 8 / (8 + 16 + 16))
    assert result["n_acc"] == 0.5 and result["t_acc"] == 0.5
    assert result["precision@0.5"] == 0.5 and result["precision@0.6"] == 0  # at least, as the field's evaluators
    assert "mse" not in result and "mean_length" not in result


def test_merge_equals_one_collection():
    rng = np.random.default_rng(0)
    parts = [metrics.SegmentationMetrics() for _ in range(3)]
    for i in range(7):
        probabilities = rng.uniform(size=(8, 8))
        target = rng.uniform(size=(8, 8)) < 0.4
        for collection in (parts[0], parts[1 + (i >= 4)]):
            collection.add(probabilities > 0.5, target, probabilities=probabilities, length=i)
    whole, merged = parts[0].compute(), parts[1].merge(parts[2]).compute()
    assert whole == merged
    assert whole["num_samples"] == 7 and whole["mean_length"] == 3 and whole["std_length"] == 2
    with pytest.raises(ValueError, match="at least one"):
        metrics.SegmentationMetrics().compute()
    with pytest.raises(ValueError, match="shape"):
        parts[0].add(np.zeros((2, 2), bool), np.zeros((3, 2), bool))


def test_bootstrap_interval_has_the_normal_width():
    values = np.random.default_rng(0).normal(2.0, 1.0, 400)
    low, high = metrics.bootstrap_ci(np.mean, values)
    assert low < values.mean() < high
    np.testing.assert_allclose(high - low, 2 * 1.96 * values.std() / 20, rtol=0.1)
    ratio = metrics.bootstrap_ci(lambda i, u: i.sum() / u.sum(), np.full(10, 1.0), np.full(10, 4.0))
    assert ratio == (0.25, 0.25)
    with pytest.raises(ValueError, match="common length"):
        metrics.bootstrap_ci(np.mean, np.zeros(3), np.zeros(4))


def test_bootstrap_draws_groups_together():
    """Ten images with 40 equal sentences each know no more than ten samples."""
    rng = np.random.default_rng(0)
    of_images = rng.normal(size=10)
    alone = metrics.bootstrap_ci(np.mean, of_images)
    images, values = np.repeat(np.arange(10), 40), np.repeat(of_images, 40)
    order = rng.permutation(400)
    grouped = metrics.bootstrap_ci(np.mean, values[order], groups=[f"image {i}" for i in images[order]])
    apart = metrics.bootstrap_ci(np.mean, values[order])
    np.testing.assert_allclose(grouped[1] - grouped[0], alone[1] - alone[0], rtol=0.1)
    assert 5 < (grouped[1] - grouped[0]) / (apart[1] - apart[0]) < 8  # about the root of 40
    assert metrics.bootstrap_ci(np.mean, of_images, groups=list("abcdefghij")) == alone
    # Groups of unequal size come whole: with two of them a mean is one of three.
    values = np.array([0.0, 1.0, 1.0, 1.0])
    seen = []
    metrics.bootstrap_ci(lambda v: seen.append(v.tolist()) or 0.0, values, groups=["a", "b", "b", "b"])
    assert {tuple(v) for v in seen} == {(0.0, 0.0), (0.0, 1.0, 1.0, 1.0), (1.0, 1.0, 1.0, 0.0), (1.0,) * 6}
    assert metrics.bootstrap_ci(np.mean, values, groups=["a"] * 4) == (0.75, 0.75)
    with pytest.raises(ValueError, match="groups"):
        metrics.bootstrap_ci(np.mean, values, groups=["a"])


def test_length_statistics():
    result = metrics.length_statistics(np.array([1, 2, 2, 4]), 4, against=np.array([0.1, 5.0, 5.0, 7.0]))
    assert result["histogram"] == [0, 1, 2, 0, 1]
    assert (result["mean"], result["min"], result["max"]) == (2.25, 1, 4)
    np.testing.assert_allclose(result["entropy"], 1.5 * np.log(2))  # shares 1/4, 1/2, 1/4
    assert metrics.length_entropy(np.array([3, 3])) == 0.0
    np.testing.assert_allclose(result["spearman"], 1.0)
    assert "spearman" not in metrics.length_statistics(np.array([3, 3]), 4, against=np.array([1.0, 2.0]))
    uneven = metrics.length_statistics(np.array([1, 2, 3, 3]), 4, against=np.array([2.0, 1.0, 3.0, 4.0]))
    np.testing.assert_allclose(uneven["spearman"], np.corrcoef([0, 1, 2.5, 2.5], [1, 0, 2, 3])[0, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # NumPy's, of a mean of nothing
        assert metrics.spearman([], []) == 0.0


def test_code_usage():
    codes = np.array([[0, 1, 5], [1, 1, 7]])
    lengths = np.array([3, 2])
    assert metrics.count_codes(codes, 8, lengths).tolist() == [1, 3, 0, 0, 0, 1, 0, 0]
    assert metrics.code_usage(codes, 8, lengths) == 3 / 8 and metrics.code_usage(codes, 8) == 4 / 8
