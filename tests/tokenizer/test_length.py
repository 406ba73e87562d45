"""Length predictor: the straight-through gradient against its formula, and the range of lengths (NUMERICS.md §2)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alto_jax.experiment import make_experiment
from alto_jax.main import load_config
from alto_jax.tokenizer.alto import ALTo
from alto_jax.tokenizer.length import LengthPredictor, stop_expectation, straight_through_keep
from tests.conftest import ROOT
from tests.golden_models import random_params

L = 8


def soft_keep(probs):
    """1 - sum_{j<l} p_j in float64 by a plain loop."""
    return np.array([[1.0 - sum(row[:position]) for position in range(len(row))] for row in probs])


def test_gradient_is_that_of_the_soft_form():
    """By finite differences of a non-linear function of the soft keep, taken where its value is the hard one."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, L))
    stop = np.array([0, 3, L - 1])
    hard = (np.arange(L) <= stop[:, None]).astype(np.float64)
    weight = rng.normal(size=(3, L))

    def through(logits):
        keep = straight_through_keep(jax.nn.softmax(logits), jnp.asarray(stop))
        return jnp.sum(weight * keep**2), keep

    gradient, keep = jax.grad(through, has_aux=True)(jnp.asarray(logits, jnp.float32))
    np.testing.assert_array_equal(keep, hard)

    def soft(logits):  # d(w keep^2) = 2 w hard d(soft): the derivative is taken at the hard value
        probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        return np.sum(2 * weight * hard * soft_keep(probs))

    step, expected = 1e-5, np.zeros_like(logits)
    for index in np.ndindex(*logits.shape):
        up, down = logits.copy(), logits.copy()
        up[index] += step
        down[index] -= step
        expected[index] = (soft(up) - soft(down)) / (2 * step)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(gradient, expected, atol=1e-5)


def test_reconstruction_alone_trains_the_predictor():
    """Through the decoder of the debug model, with no length loss: the gradient is not zero, and the formula's."""
    config = make_experiment(load_config(str(ROOT / "configs/stage1_5.py:debug")).to_dict())
    model = ALTo(config.model.tokenizer)
    rng = np.random.default_rng(0)
    mask = (rng.random((2, 32, 32)) > 0.5).astype(np.float32)
    image = rng.integers(0, 256, (2, 64, 64, 3), np.uint8)
    params = random_params(model, mask, image)

    @jax.jit
    def gradients(params):
        apply = lambda p, *args, method: model.apply({"params": p}, *args, method=method)
        encoded = apply(params, mask, method="encode")
        embeddings = apply(params, encoded.z, method="quantize").embeddings
        features = apply(params, image, method="image_features")

        def reconstruction(keep):
            logits = apply(params, embeddings * keep[..., None], features, method="decode")
            return jnp.mean((jax.nn.sigmoid(logits) - mask) ** 2)

        def loss(length_params):
            prediction = apply({**params, "length": length_params}, encoded, method="predict_length")
            return reconstruction(prediction.keep), prediction

        def formula(length_params, weight):
            probs = apply({**params, "length": length_params}, encoded, method="predict_length").probs
            return jnp.sum(weight * (1.0 - jnp.tril(jnp.ones((L, L)), -1) @ probs[..., None])[..., 0])

        actual, prediction = jax.grad(loss, has_aux=True)(params["length"])
        weight = jax.grad(reconstruction)(prediction.keep)
        return actual, jax.grad(formula)(params["length"], weight), prediction

    actual, expected, prediction = gradients(params)
    assert 1 < prediction.num_kept.min() and set(np.unique(prediction.keep)) == {0.0, 1.0}
    for layer in ("fc1", "fc2", "fc3"):
        for name, gradient in actual[layer].items():
            size = np.abs(gradient).max()
            assert size > 1e-6, (layer, name)
            np.testing.assert_allclose(gradient, expected[layer][name], atol=1e-4 * size)


@pytest.mark.parametrize("rule, low, high", [("unified", 1, L), ("reference", 0, L - 1)])
def test_lengths_stay_in_range(rule, low, high):
    """At the ends too, and wherever the expectation lies between."""
    width = 4
    module = LengthPredictor(width, logit_scale="divide", length_rule=rule)
    rng = np.random.default_rng(1)
    latents = rng.normal(size=(400, L, width)).astype(np.float32) * 30
    cls = rng.normal(size=(400, 1, width)).astype(np.float32) * 30
    params = random_params(module, latents, cls)
    out = module.apply({"params": params}, latents, cls)
    assert out.length.min() == low and out.length.max() == high, "both ends are reached"
    assert out.num_kept.min() >= 1 and out.num_kept.max() <= L
    np.testing.assert_array_equal(out.keep.sum(-1), out.num_kept)
    np.testing.assert_array_equal(out.length, out.num_kept - (rule == "reference"))
    edge = 1e-3 if rule == "unified" else 0.0
    expectation = np.asarray(stop_expectation(out.probs))
    np.testing.assert_array_equal(out.num_kept, np.ceil(np.clip(expectation - edge, 0, L - 1)) + 1)
    assert len(np.unique(out.num_kept)) == L
