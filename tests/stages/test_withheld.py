"""Image features withheld from a share of the samples of stages 1 and 1.5."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alto_jax.data import sources
from alto_jax.experiment import make_experiment
from alto_jax.main import load_config
from alto_jax.parallel import sharding
from alto_jax.stages.table import make_stage
from alto_jax.tokenizer.alto import ALTo
from tests.conftest import ROOT
from tests.golden_models import random_params


def setup(share):
    plain = load_config(f"{ROOT}/configs/stage1.py:debug").to_dict()
    plain["tokenizer"] |= {"withhold_image": share, "unquantized_steps": 0}
    plain["data"]["num_threads"] = 1
    config = make_experiment(plain)
    return config, make_stage(config, sharding.make_mesh(config.mesh, jax.devices()[:1]))


@functools.cache
def drawn_params(size):
    mask = np.zeros((1, size.mask_size, size.mask_size), np.float32)
    return random_params(ALTo(size), mask, np.zeros((1, size.image_size, size.image_size, 3), np.uint8))


def gradients(share):
    """The largest gradients of the image encoder and of the decoder."""
    config, stage = setup(share)
    batch = next(iter(sources.held_out_masks(config)))
    params = drawn_params(config.model.tokenizer)
    drawn = stage.draw(jax.random.key(1), len(batch.mask))
    loss = lambda part: stage.loss_fn({"tokenizer": {**params, **part}}, batch, drawn, jnp.int32(5))[0]
    grads = jax.jit(jax.grad(loss))({name: params[name] for name in ("sam_encoder", "decoder")})
    largest = lambda tree: max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(tree))
    return largest(grads["sam_encoder"]), largest(grads["decoder"])


def test_what_is_withheld_teaches_nothing():
    sam, decoder = gradients(1.0)
    assert sam == 0 < decoder
    assert min(gradients(0.0)) > 0


def test_share_and_independence_of_the_number_of_tokens():
    _, stage = setup(0.3)
    drawn = stage.draw(jax.random.key(2), 4000)
    assert abs(float(jnp.mean(drawn["withheld"])) - 0.3) < 0.03
    with_, without = (drawn["kept"][drawn["withheld"] == v] for v in (True, False))
    assert abs(float(jnp.mean(with_)) - float(jnp.mean(without))) < 0.3


def test_a_share_is_a_share():
    with pytest.raises(ValueError, match="withhold_image: expected 0..1, got 1.5"):
        setup(1.5)
