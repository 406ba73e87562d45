"""InternViT, pixel shuffle and projector against the reference (reference/NUMERICS.md §5)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alto_jax.mllm.intern_vit import (
    InternViT,
    InternViTConfig,
    Projector,
    drop_path_factors,
    imagenet_normalise,
    pixel_shuffle,
)
from alto_jax.tokenizer.resize import resize
from tests.golden_io import golden
from tests.golden_models import INTERNVIT_6B, INTERNVIT_300M, assert_golden, golden_weights, nhwc
from tools.convert_torch_weights.mapping import import_state_dict


def run(cfg, params, image, *args, **kwargs):
    return jax.jit(lambda p, x: InternViT(cfg).apply({"params": p}, x, *args, **kwargs))(params, image)


@pytest.fixture(scope="module")
def params_6b():
    return import_state_dict("internvit", golden_weights("internvit_6b"), INTERNVIT_6B)


def test_6b_form_layer_by_layer(params_6b):
    name, fixture = "internvit_6b", golden("internvit_6b")
    out, hidden = run(INTERNVIT_6B, params_6b, nhwc(fixture["x"]), return_hidden=True)
    assert_golden(name, "hidden0", hidden[0], fixture["hidden0"])
    assert_golden(name, "hidden1", hidden[1], fixture["hidden1"])
    assert_golden(name, "last_hidden_state", out, fixture["last_hidden_state"][:, 1:])

    for select_layer in (1, -2):
        selected = run(dataclasses.replace(INTERNVIT_6B, select_layer=select_layer), params_6b, nhwc(fixture["x"]))
        assert_golden(name, "hidden1", selected, fixture["hidden1"][:, 1:])


def test_300m_form_on_a_larger_oblong_image():
    name, fixture = "internvit_300m", golden("internvit_300m")
    params = import_state_dict("internvit", golden_weights(name), INTERNVIT_300M)
    out, hidden = run(INTERNVIT_300M, params, nhwc(fixture["x_larger"]), return_hidden=True)
    assert_golden(name, "embeddings_larger", hidden[0], fixture["embeddings_larger"])
    assert_golden(name, "last_hidden_state_larger", out, fixture["last_hidden_state_larger"][:, 1:])
    grid = params["position_embedding"][1:].reshape(4, 4, -1)
    resized = resize(jnp.asarray(grid), 8, 8, "bicubic").reshape(1, 64, -1)
    assert_golden(name, "pos_embedding_resized_x2", resized, fixture["pos_embedding_resized_x2"][:, 1:])


def test_pixel_shuffle_and_projector():
    name, fixture = "pixel_shuffle_mlp1", golden("pixel_shuffle_mlp1")
    merged = pixel_shuffle(fixture["x"])
    np.testing.assert_array_equal(merged, fixture["v2"])
    np.testing.assert_array_equal(pixel_shuffle(fixture["x"], version="v1"), fixture["v1"])
    params = {
        "norm": {"scale": fixture["mlp1.0.weight"], "bias": fixture["mlp1.0.bias"]},
        "fc1": {"kernel": fixture["mlp1.1.weight"].T, "bias": fixture["mlp1.1.bias"]},
        "fc2": {"kernel": fixture["mlp1.3.weight"].T, "bias": fixture["mlp1.3.bias"]},
    }
    out = Projector(20).apply({"params": params}, merged.reshape(2, 9, 32))
    assert_golden(name, "mlp1_out", out, fixture["mlp1_out"])
    with pytest.raises(ValueError, match="scale"):
        pixel_shuffle(fixture["x"], scale=0.25)


def test_imagenet_normalise():
    image = np.array([[[0, 128, 255]]], np.uint8)
    expected = (np.array([0, 128 / 255, 1]) - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(imagenet_normalise(image)[0, 0], expected, rtol=1e-5)


def test_drop_path_factors():
    factors = drop_path_factors(jax.random.key(0), 0.4, 3, 4000)
    assert factors.shape == (3, 2, 4000)
    np.testing.assert_array_equal(factors[0], 1)
    for layer, rate in ((1, 0.2), (2, 0.4)):
        np.testing.assert_allclose(np.unique(factors[layer]), [0, 1 / (1 - rate)], rtol=1e-6)
        np.testing.assert_allclose(np.mean(factors[layer], axis=1), 1, atol=0.06)


def test_drop_path_drops_whole_branches_per_sample(params_6b):
    """With the second layer's branches dropped, a sample leaves with the first layer's hidden state."""
    cfg = dataclasses.replace(INTERNVIT_6B, drop_path_rate=0.9)
    fixture = golden("internvit_6b")
    image = jnp.tile(nhwc(fixture["x"]), (8, 1, 1, 1))
    out = run(cfg, params_6b, image, jax.random.key(0))
    dropped = np.abs(out - fixture["hidden1"][:, 1:]).max(axis=(1, 2)) < 1e-4
    both = np.asarray(drop_path_factors(jax.random.key(0), 0.9, 2, 8))[1].max(axis=0) == 0
    np.testing.assert_array_equal(dropped, both)
    assert 0 < both.sum() < 8


@pytest.mark.parametrize(
    ("field", "value"),
    [("image_size", 50), ("norm_type", "group_norm"), ("select_layer", 3), ("drop_path_rate", 1.0)],
)
def test_config_names_the_wrong_field(field, value):
    with pytest.raises(ValueError, match=field):
        InternViTConfig(**{**dataclasses.asdict(INTERNVIT_300M), field: value})
