"""Losses against golden values of the reference, naive forms and float64 formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alto_jax.losses import grpo as grpo_losses
from alto_jax.losses import reconstruction
from alto_jax.losses import tokens as token_losses
from tests.golden_io import golden, tolerance

DEFAULT = reconstruction.ReconstructionLossConfig()
BCE_DICE = reconstruction.ReconstructionLossConfig(bce=2.0, dice=0.5, bce_dice_on_probabilities=True)


def _himt_inputs(rgb: bool):
    arrays = golden("himtloss")
    recon = arrays["recon"]
    if rgb:
        recon = np.concatenate([recon, 0.8 * recon, 0.6 * recon + 0.1], axis=1)
    target = arrays["targets"].transpose(0, 2, 3, 1)
    return arrays, jnp.asarray(recon.transpose(0, 2, 3, 1)), jnp.asarray(target)


@pytest.mark.parametrize("prefix,cfg", [("default", DEFAULT), ("bce_dice", BCE_DICE)])
@pytest.mark.parametrize("rgb", [False, True])
def test_reconstruction_loss_golden(prefix, cfg, rgb):
    arrays, recon, target = _himt_inputs(rgb)

    def total(probabilities):
        if not rgb:
            probabilities = jnp.repeat(probabilities, 3, axis=-1)
        return reconstruction.reconstruction_loss(
            None,
            target,
            cfg,
            probabilities=probabilities,
            quantizer_loss=arrays["quantizer_loss"],
            length_loss=arrays["length_loss"],
        )

    (value, terms), grad = jax.jit(jax.value_and_grad(total, has_aux=True))(recon)
    if rgb:
        np.testing.assert_allclose(
            value,
            arrays[f"{prefix}_rgbrecon_total"],
            rtol=0,
            atol=tolerance("himtloss", f"{prefix}_rgbrecon_total"),
        )
        expected, atol = arrays[f"{prefix}_rgbrecon_grad"], tolerance("himtloss", f"{prefix}_rgbrecon_grad")
        np.testing.assert_allclose(np.transpose(grad[:1, ::2, ::2], (0, 3, 1, 2)), expected, rtol=0, atol=atol)
        return
    names = {"mse": "mse", "edge": "edge", "edge_weighted_mse": "reconstruction"}
    if prefix == "bce_dice":
        names |= {"bce": "bce", "dice": "dice"}
    for ours, theirs in names.items():
        key = f"{prefix}_{theirs}_loss"
        np.testing.assert_allclose(terms[ours], arrays[key], rtol=0, atol=tolerance("himtloss", key))
    key = f"{prefix}_total"
    np.testing.assert_allclose(value, arrays[key], rtol=0, atol=tolerance("himtloss", key))
    key = f"{prefix}_grad_recon"
    np.testing.assert_allclose(grad[:, ::2, ::2, 0][:, None], arrays[key], rtol=0, atol=tolerance("himtloss", key))


def test_mask_equals_its_gray_rgb_image():
    _, recon, target = _himt_inputs(rgb=False)
    recon, target = np.asarray(recon), np.asarray(target)
    gray = target[1:, ..., 0]
    assert np.all(target[1:] == gray[..., None])
    total = jax.jit(lambda p, t: reconstruction.reconstruction_loss(None, t, BCE_DICE, probabilities=p)[0])
    as_mask = total(recon[1:, ..., 0], gray)
    repeated = np.repeat(recon[1:], 3, axis=-1)
    as_rgb = total(repeated, target[1:])
    np.testing.assert_allclose(as_mask, as_rgb, rtol=2e-6)


def test_edge_map_and_edge_loss_golden():
    arrays, recon, target = _himt_inputs(rgb=False)
    edges = jax.jit(reconstruction.edge_map)(target)
    atol = tolerance("himtloss", "edge_maps_per_sample")
    np.testing.assert_allclose(edges[:, None, ::2, ::2], arrays["edge_maps_per_sample"], rtol=0, atol=atol)
    edge_loss = jax.jit(reconstruction.edge_loss)
    per_sample = [edge_loss(recon[i : i + 1, ..., 0], target[i : i + 1]) for i in range(3)]
    atol = tolerance("himtloss", "edge_loss_per_sample")
    np.testing.assert_allclose(per_sample, arrays["edge_loss_per_sample"], rtol=0, atol=atol)


def test_vq_loss_golden():
    arrays = golden("vq_loss")
    index = arrays["l21_indices"][:, 0]

    def loss(z, embedding):
        codebook = embedding @ arrays["embedding_proj.weight"].T
        latents, codes = z[:, :, 0].transpose(0, 2, 1), codebook[index]
        latents, codes = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (latents, codes))
        return reconstruction.vq_loss(latents, codes, 0.01)

    inputs = (jnp.asarray(arrays["z"]), jnp.asarray(arrays["embedding.weight"]))
    (total, terms), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(*inputs)
    for key, value in {
        "l21_loss": total,
        "l21_commitment": terms["commitment"],
        "l21_codebook_loss": terms["codebook"],
        "l21_grad_loss_z": grads[0],
        "l21_grad_loss_embedding": grads[1],
    }.items():
        np.testing.assert_allclose(value, arrays[key], rtol=0, atol=tolerance("quantizer", key), err_msg=key)


def test_terms_from_logits_are_stable_and_equal_the_plain_form():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 8, 8)) * 3
    target = rng.uniform(size=(2, 8, 8))
    p = 1 / (1 + np.exp(-logits))
    plain_bce = -np.mean(target * np.log(p) + (1 - target) * np.log(1 - p))
    plain_dice = np.mean([1 - 2 * np.sum(a * b) / (a.sum() + b.sum()) for a, b in zip(p, target)])
    bce, dice = jax.jit(lambda x, t: (reconstruction.bce(x, t), reconstruction.dice(x, t)))(logits, target)
    np.testing.assert_allclose(bce, plain_bce, rtol=1e-5)
    np.testing.assert_allclose(dice, plain_dice, rtol=1e-5)
    extreme = np.array([[[1e4, -1e4]]])
    value, grad = jax.jit(jax.value_and_grad(lambda x: reconstruction.bce(x, jnp.array([[[0.0, 1.0]]]))))(extreme)
    assert float(value) == 1e4
    np.testing.assert_array_equal(grad, [[[0.5, -0.5]]])


def test_length_loss_is_a_fraction():
    np.testing.assert_allclose(reconstruction.length_loss(jnp.array([0.0, 31.0]), 32), 31 / 64)


def test_config_refuses_negative_weight():
    with pytest.raises(ValueError, match=r"losses\.edge.*-1"):
        reconstruction.ReconstructionLossConfig(edge=-1.0)
    with pytest.raises(ValueError, match="logits"):
        cfg, zeros = reconstruction.ReconstructionLossConfig(bce=1.0), np.zeros((1, 4, 4))
        jax.eval_shape(lambda x: reconstruction.reconstruction_loss(None, x, cfg, probabilities=x), zeros)


# --- token cross-entropy ---------------------------------------------------------------------------


def _ce_case(seed=0, batch=3, time=17, width=5, vocab=11):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, vocab, (batch, time)).astype(np.int32)
    labels[rng.uniform(size=labels.shape) < 0.6] = -100
    hidden = rng.normal(size=(batch, time, width)).astype(np.float32)
    head = rng.normal(size=(width, vocab)).astype(np.float32)
    return jnp.asarray(hidden), jnp.asarray(labels), jnp.asarray(head)


@jax.jit
def _naive_ce(hidden, labels, head, weight=None):
    log_probs = jax.nn.log_softmax(hidden[:, :-1] @ head)
    target = labels[:, 1:]
    nll = -jnp.take_along_axis(log_probs, jnp.maximum(target, 0)[..., None], axis=-1)[..., 0]
    weight = (target != -100) * (1.0 if weight is None else weight[:, 1:])
    return jnp.sum(nll * weight) / jnp.sum(weight)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("max_supervised", [None, 12])
def test_selected_cross_entropy_equals_naive_with_gradient(weighted, max_supervised):
    hidden, labels, head = _ce_case()
    weight = jnp.asarray(np.random.default_rng(1).uniform(size=labels.shape), jnp.float32) if weighted else None
    assert np.max(np.sum(np.asarray(labels)[:, 1:] != -100, axis=1)) <= 12

    def selected(hidden, head):
        return token_losses.token_cross_entropy(
            hidden, labels, lambda x: x @ head, max_supervised=max_supervised, loss_weight=weight
        )

    (value, metrics), grads = jax.jit(jax.value_and_grad(selected, argnums=(0, 1), has_aux=True))(hidden, head)
    naive, naive_grads = jax.value_and_grad(_naive_ce, argnums=(0, 2))(hidden, labels, head, weight)
    np.testing.assert_allclose(value, naive, rtol=2e-6)
    for ours, theirs in zip(grads, naive_grads):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
    assert int(metrics["supervised_overflow"]) == 0
    assert int(metrics["num_supervised"]) == np.sum(np.asarray(labels)[:, 1:] != -100)


def test_logits_exist_at_selected_positions_only_and_overflow_is_counted():
    hidden, labels, head = _ce_case()
    shapes = []

    def logits_fn(x):
        shapes.append(x.shape)
        return x @ head

    loss = jax.jit(lambda h: token_losses.token_cross_entropy(h, labels, logits_fn, max_supervised=4))
    _, metrics = loss(hidden)
    assert shapes == [(3, 4, 5)]
    counts = np.sum(np.asarray(labels)[:, 1:] != -100, axis=1)
    assert int(metrics["supervised_overflow"]) == int(np.maximum(counts - 4, 0).sum()) > 0


@pytest.mark.parametrize("at_once", [1, 4, 5, 11, 64])
@pytest.mark.parametrize("weighted", [False, True])
def test_long_answers_take_turns_and_lose_no_token(at_once, weighted):
    """Loss, accuracy and gradients are those of all supervised tokens, also of answers longer than a turn."""
    hidden, labels, head = _ce_case()
    assert np.max(np.sum(np.asarray(labels)[:, 1:] != -100, axis=1)) > 5
    weight = jnp.asarray(np.random.default_rng(1).uniform(size=labels.shape), jnp.float32) if weighted else None
    shapes = set()

    def run(hidden, head, **options):
        def logits_fn(x):
            shapes.add(x.shape)
            return x @ head

        return token_losses.token_cross_entropy(hidden, labels, logits_fn, loss_weight=weight, **options)

    grad = lambda **options: jax.value_and_grad(lambda *a: run(*a, **options), argnums=(0, 1), has_aux=True)
    (expected, metrics), expected_grads = jax.jit(grad())(hidden, head)
    shapes.clear()
    (value, found), grads = jax.jit(grad(at_once=at_once))(hidden, head)
    assert max(shape[1] for shape in shapes) <= at_once, "no more logits than that at a time"
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for ours, theirs in zip(grads, expected_grads):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
    assert {k: float(v) for k, v in found.items()} == pytest.approx({k: float(v) for k, v in metrics.items()})
    assert int(found["supervised_overflow"]) == 0


def test_turns_are_one_program_for_all_batches():
    hidden, labels, head = _ce_case()
    run = jax.jit(lambda labels: token_losses.token_cross_entropy(hidden, labels, lambda x: x @ head, at_once=4)[0])
    for kept in (0, 2, 4, 5, 9, labels.shape[1]):
        some = np.where(np.arange(labels.shape[1]) <= kept, labels, -100)
        expected = _naive_ce(hidden, some, head) if np.any(some[:, 1:] != -100) else 0.0
        np.testing.assert_allclose(run(some), expected, rtol=2e-6)
    assert run._cache_size() == 1


def test_cross_entropy_without_supervision_is_zero_with_zero_gradient():
    hidden, labels, head = _ce_case()
    labels = jnp.full_like(labels, -100)
    loss = lambda h: token_losses.token_cross_entropy(h, labels, lambda x: x @ head, max_supervised=4)[0]
    value, grad = jax.jit(jax.value_and_grad(loss))(hidden)
    assert float(value) == 0 and not np.any(grad)


def test_token_log_probs_and_entropy():
    logits = np.random.default_rng(0).normal(size=(4, 9)) * 5
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    ids = np.array([0, 3, 8, 1])
    ours = jax.jit(token_losses.token_log_probs)(logits, ids)
    np.testing.assert_allclose(ours, np.log(p[np.arange(4), ids]), rtol=1e-5)
    np.testing.assert_allclose(jax.jit(token_losses.token_entropy)(logits), -(p * np.log(p)).sum(-1), rtol=1e-5)


def test_mask_token_probabilities_golden():
    arrays = golden("mask_loss_probs")
    valid, lengths = arrays["valid"], arrays["lengths"]
    logits, probabilities = arrays["code_logits"], jax.jit(token_losses.mask_token_probabilities)
    full = np.asarray(probabilities(logits, np.full(3, 32, np.int32)))
    some = full[valid][..., ::16]
    np.testing.assert_allclose(some, arrays["probs"][valid], rtol=0, atol=tolerance("mask_loss", "probs"))
    kept = np.asarray(probabilities(logits, lengths.astype(np.int32)))
    for row, length in enumerate(lengths):
        np.testing.assert_array_equal(kept[row, :length], full[row, :length])
        assert not np.any(kept[row, length:])


def _mask_case():
    rng = np.random.default_rng(3)
    logits = (rng.normal(size=(4, 6, 6)) * 4).astype(np.float32)
    target = rng.uniform(size=(4, 6, 6)).astype(np.float32)
    return logits, target, np.array([True, False, True, True])


@pytest.mark.parametrize("reduction", ["sample", "batch"])
def test_mask_loss_equals_float64_formula(reduction):
    logits, target, valid = _mask_case()
    p, t = 1 / (1 + np.exp(-logits[valid].astype(np.float64))), target[valid].astype(np.float64)
    bce = -np.mean(t * np.log(p) + (1 - t) * np.log(1 - p))
    axes = (1, 2) if reduction == "sample" else None
    dice = np.mean(1 - (2 * np.sum(p * t, axes) + 1e-6) / (np.sum(p, axes) + np.sum(t, axes) + 1e-6))
    for clamp in (0.0, 1e-6):
        cfg = token_losses.MaskLossConfig(dice_reduction=reduction, probability_clamp=clamp)
        value, _ = jax.jit(token_losses.mask_loss, static_argnums=3)(logits, target, valid, cfg)
        np.testing.assert_allclose(value, bce + 0.25 * dice, rtol=2e-6)


def test_mask_loss_clamp_is_the_float32_one():
    cfg = token_losses.MaskLossConfig(dice=0.0, probability_clamp=1e-6)
    wrong = np.full((1, 2, 2), 40.0, np.float32), np.zeros((1, 2, 2), np.float32), np.array([True])
    of = lambda cfg: jax.jit(jax.value_and_grad(lambda x: token_losses.mask_loss(x, *wrong[1:], cfg)[0]))(wrong[0])
    value, grad = of(cfg)
    np.testing.assert_allclose(value, -np.log1p(-np.float64(np.float32(1 - 1e-6))), rtol=1e-5)
    assert not np.any(grad)
    np.testing.assert_allclose(of(token_losses.MaskLossConfig(dice=0.0))[1], 0.25)


@pytest.mark.parametrize("reduction", ["sample", "batch"])
def test_mask_loss_of_no_valid_sample_is_zero(reduction):
    logits, target, _ = _mask_case()
    logits[0] = np.nan
    cfg = token_losses.MaskLossConfig(dice_reduction=reduction)
    loss = jax.jit(lambda x: token_losses.mask_loss(x, target, np.zeros(4, bool), cfg)[0])
    value, grad = jax.value_and_grad(loss)(logits)
    assert float(value) == 0 and not np.any(grad)


# --- GRPO ------------------------------------------------------------------------------------------


def test_grpo_reference_objective_golden():
    arrays = golden("grpo")
    mask = np.asarray(arrays["completion_ids"] != 2)
    cfg = grpo_losses.GrpoLossConfig(objective="reference", beta=1e-3)
    # Three more columns than the longest completion has: they must not count.
    pad = lambda x: jnp.asarray(np.pad(x, ((0, 0), (0, 3)))[None])
    logps, ref, mask = pad(arrays["logps"]), pad(arrays["ref_logps"]), pad(mask)
    advantages = jnp.asarray(arrays["advantages"][None])

    loss_fn = lambda p: grpo_losses.grpo_loss(p, None, ref, advantages, mask, cfg)
    (loss, metrics), grad = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(logps)
    # The mean of the twelve float32 advantages, zero in exact arithmetic, is only defined to about 1e-8.
    np.testing.assert_allclose(loss, arrays["loss"], rtol=0, atol=tolerance("grpo", "loss") + 1e-8)
    kl_only = jax.jit(lambda p: grpo_losses.grpo_loss(p, None, ref, 0 * advantages, mask, cfg)[0])(logps)
    np.testing.assert_allclose(kl_only, arrays["loss"], rtol=0, atol=tolerance("grpo", "loss"))
    difference = arrays["ref_logps"] - arrays["logps"]
    kl = np.exp(difference) - difference - 1
    np.testing.assert_allclose(kl, arrays["per_token_kl"], rtol=0, atol=tolerance("grpo", "per_token_kl"))
    ids_mask = np.asarray(mask[0, :, :42])
    np.testing.assert_allclose(metrics["kl"], arrays["per_token_kl"][ids_mask].mean(), rtol=1e-4)
    assert not np.any(grad[..., 42:])
    # d loss / d logit of the chosen id is (1 - p) * d loss / d logp; of every other id -p_v * the same.
    chosen = arrays["grad_logits_row1_chosen"]
    expected = np.asarray(grad)[0, 1, :42] * (1 - np.exp(arrays["logps"][1]))
    np.testing.assert_allclose(expected, chosen, rtol=0, atol=tolerance("grpo", "grad_logits_row1"))


def test_grpo_reference_cap_kills_the_gradient_of_its_group_only():
    logps = np.full((2, 2, 3), -1.0, np.float32)
    ref = np.stack([np.full((2, 3), 9.0, np.float32), np.full((2, 3), -0.5, np.float32)])
    mask = np.ones((2, 2, 3), bool)
    cfg = grpo_losses.GrpoLossConfig(objective="reference", beta=1e-3)
    loss_fn = lambda p: grpo_losses.grpo_loss(p, None, ref, jnp.array([[1.0, -1.0]] * 2), mask, cfg)[0]
    value, grad = jax.jit(jax.value_and_grad(loss_fn))(logps)
    small = 1e-3 * (np.exp(0.5) - 1.5)
    np.testing.assert_allclose(value, (1.0 + small) / 2, rtol=1e-5)
    grad = np.asarray(grad)
    assert not np.any(grad[0]) and np.all(grad[1] != 0)


def _grpo_case(seed=0, batch=3, group=4, time=9):
    rng = np.random.default_rng(seed)
    shape = (batch, group, time)
    logps = -rng.gamma(2.0, size=shape)
    old = logps + rng.normal(size=shape) * 0.3
    ref = logps + rng.normal(size=shape) * 0.5
    advantages = rng.normal(size=shape[:2])
    lengths = rng.integers(1, time + 1, shape[:2])
    return logps, old, ref, advantages, np.arange(time) < lengths[..., None]


def _grpo_float64(logps, old, ref, advantages, mask, objective, low, high, beta):
    """The formulas, one completion at a time."""
    batch, group, time = logps.shape
    per_group, all_tokens = [], []
    for b in range(batch):
        values = []
        for g in range(group):
            keep = mask[b, g]
            ratio = np.exp(logps[b, g, keep] - old[b, g, keep])
            if objective == "gspo":
                ratio = np.full_like(ratio, np.exp(np.mean(logps[b, g, keep] - old[b, g, keep])))
            advantage = advantages[b, g]
            gain = np.minimum(ratio * advantage, np.clip(ratio, 1 - low, 1 + high) * advantage)
            delta = ref[b, g, keep] - logps[b, g, keep]
            tokens = gain - beta * (np.exp(delta) - delta - 1)
            all_tokens.extend(tokens)
            values.append(tokens.sum() / (time if objective == "dr_grpo" else keep.sum()))
        per_group.append(np.mean(values))
    return -np.mean(all_tokens) if objective == "dapo" else -np.mean(per_group)


@pytest.mark.parametrize("objective", ["paper", "dr_grpo", "dapo", "gspo"])
def test_grpo_equals_float64_formula_with_gradient(objective):
    logps, old, ref, advantages, mask = _grpo_case()
    low, high, beta = 0.2, 0.28, 0.04
    cfg = grpo_losses.GrpoLossConfig(objective=objective, epsilon_low=low, epsilon_high=high, beta=beta)
    poisoned = [np.where(mask, x, 1e6) for x in (logps, old, ref)]
    args = [jnp.asarray(x, jnp.float32) for x in poisoned]
    loss_fn = jax.jit(
        lambda p: grpo_losses.grpo_loss(p, args[1], args[2], jnp.asarray(advantages), jnp.asarray(mask), cfg)
    )
    loss_only = lambda p: loss_fn(p)[0]
    value, grad = jax.value_and_grad(loss_only)(args[0])
    formula = lambda p: _grpo_float64(p, old, ref, advantages, mask, objective, low, high, beta)
    np.testing.assert_allclose(value, formula(logps), rtol=3e-6, atol=1e-7)
    assert not np.any(np.asarray(grad)[~mask])
    rng = np.random.default_rng(1)
    for _ in range(5):
        direction = rng.normal(size=logps.shape)
        step = 1e-6 * direction
        numeric = (formula(logps + step) - formula(logps - step)) / 2e-6
        np.testing.assert_allclose(np.sum(np.asarray(grad) * direction), numeric, rtol=1e-4, atol=1e-6)


def test_grpo_metrics_and_errors():
    logps, old, ref, advantages, mask = (
        np.asarray(x, np.bool_ if x.dtype == bool else np.float32) for x in _grpo_case()
    )
    cfg = grpo_losses.GrpoLossConfig()
    entropy = np.where(mask, np.float32(2), np.float32(np.nan))
    loss = jax.jit(grpo_losses.grpo_loss, static_argnums=5)
    _, metrics = loss(logps, old, ref, advantages, mask, cfg, entropy=entropy)
    ratio = np.exp(np.asarray(logps - old))
    positive = np.asarray(advantages)[..., None] > 0
    clipped = np.where(positive, ratio > 1.2, ratio < 0.8)
    np.testing.assert_allclose(metrics["clip_fraction"], clipped[np.asarray(mask)].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["ratio"], ratio[np.asarray(mask)].mean(), rtol=1e-5)
    assert float(metrics["entropy"]) == 2.0
    on_policy, metrics = loss(logps, None, ref, advantages, mask, cfg)
    assert float(metrics["clip_fraction"]) == 0 and float(metrics["ratio"]) == 1
    with pytest.raises(ValueError, match="ref_per_token_logps"):
        grpo_losses.grpo_loss(logps, old, None, advantages, mask, cfg)
    free = grpo_losses.GrpoLossConfig(beta=0.0)
    assert np.isfinite(loss(logps, old, None, advantages, mask, free)[0])
    with pytest.raises(ValueError, match="ppo"):
        grpo_losses.GrpoLossConfig(objective="ppo")


@pytest.mark.parametrize("objective", ["paper", "reference", "dr_grpo", "dapo", "gspo"])
def test_grpo_reaches_the_optimum_of_a_bandit(objective):
    """One-token completions over 4 arms with exact sampling of every arm: the best arm wins."""
    rewards = np.array([[0.1, 0.9, 0.3, 0.5]], np.float32)
    advantages = rewards - np.mean(rewards)
    mask = np.ones((1, 4, 1), bool)
    cfg = grpo_losses.GrpoLossConfig(objective=objective, beta=0.0)

    @jax.jit
    def update(logits):
        loss_fn = lambda x: grpo_losses.grpo_loss(
            jax.nn.log_softmax(x)[None, :, None], None, None, advantages, mask, cfg
        )[0]
        return logits - 2.0 * jax.grad(loss_fn)(logits)

    logits = np.zeros(4, np.float32)
    for _ in range(60):
        logits = update(logits)
    assert float(jax.nn.softmax(logits)[1]) > 0.95
