"""Parameters that modules read."""

from flax import errors
from flax import linen as nn
import jax
import jax.numpy as jnp
import pytest

from alto_jax import layers


@pytest.mark.parametrize("make", [lambda **k: layers.Dense(3, **k), lambda **k: layers.DenseGeneral((3,), **k)])
def test_a_parameter_is_checked_and_its_initialiser_runs_once(make):
    ran = []
    module = make(kernel_init=lambda *given: ran.append(1) or nn.initializers.ones(*given))
    params = module.init(jax.random.key(0), jnp.ones((1, 2)))
    ran.clear()
    assert module.apply(params, jnp.ones((1, 2))).tolist() == [[2.0, 2.0, 2.0]] and not ran
    with pytest.raises(errors.ScopeParamShapeError, match=r'"kernel" in "/".* \(2, 3\)'):
        module.apply(params, jnp.ones((1, 4)))


def test_parameters_are_those_of_linen():
    x, key = jnp.arange(8.0).reshape(1, 2, 4), jax.random.key(0)
    for ours, linens in ((layers.Dense(3), nn.Dense(3)), (layers.LayerNorm(), nn.LayerNorm()),
                         (layers.DenseGeneral((2, 3)), nn.DenseGeneral((2, 3)))):  # fmt: skip
        params = ours.init(key, x)
        assert jax.tree.all(jax.tree.map(jnp.array_equal, params, linens.init(key, x)))
        assert jnp.array_equal(ours.apply(params, x), linens.apply(params, x))
