"""What is to be trained must be what the loss reads: by the structure of the gradient, before anything is updated."""

import re

from flax import traverse_util
import jax
import jax.numpy as jnp
import pytest

from alto_jax.config import ConfigError
from alto_jax.experiment import make_experiment
from alto_jax.main import load_config
from alto_jax.parallel import sharding
from alto_jax.params import watched
from alto_jax.plan import programs
from tests.conftest import ROOT


def trace(stage, step="train", **groups):
    """Traces the programs of a stage at debug size."""
    values = load_config(str(ROOT / f"configs/{stage}.py:debug")).to_dict()
    for group, changes in groups.items():
        values[group].update(changes)
    mesh = sharding.make_mesh(sharding.MeshConfig(1, 1, 1), jax.devices()[:1])
    for _, function, arguments in programs.lower_programs(make_experiment(values), step, mesh)[2]:
        jax.eval_shape(function, *arguments)


def test_watched_parameters_are_those_that_a_gradient_reaches():
    """Through loops, rematerialisation, and branches; not behind a stop_gradient, an argmax, or what is dropped."""

    def loss(params, reached):
        p = watched(params, reached)
        body = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), jnp.sum(w)))
        x, _ = jax.lax.scan(body, jnp.ones((2, 3)), p["a"]["stack"])
        x = jax.lax.cond(jnp.sum(x) > 0, lambda: x * p["a"]["branch"], lambda: x)
        chosen = jnp.argmax(p["code"] @ jnp.ones(3))
        cut = jax.lax.stop_gradient(p["cut"] * 2)
        return jnp.sum(x) + chosen + jnp.sum(cut) + 0 * p["times_zero"], jnp.sum(p["only_logged"])

    params = {"a": {"stack": jnp.ones((4, 3, 3)), "branch": jnp.ones(3)}, "code": jnp.ones((2, 3)), "cut": jnp.ones(2)}
    params |= {"unread": jnp.ones(1), "only_logged": jnp.ones(2), "times_zero": jnp.ones(())}
    reached: set[str] = set()
    grad = jax.jit(jax.grad(lambda p: loss(p, reached), has_aux=True))
    gradients, _ = grad(params)
    assert reached == {"a/stack", "a/branch", "times_zero"}
    plain, _ = jax.grad(lambda p: loss(p, set()), has_aux=True)(params)
    flat, expected = (traverse_util.flatten_dict(g, sep="/") for g in (gradients, plain))
    assert flat.keys() == expected.keys() and all(bool(jnp.all(flat[k] == expected[k])) for k in flat)
    assert not any(bool(jnp.any(flat[k])) for k in flat.keys() - reached)


@pytest.mark.parametrize(
    "stage, groups, named, parameter",
    [
        ("stage3", {"optim": {"trainable": "^(vision|language_model)/"}}, "optim.trainable", "vision/"),
        ("stage3", {"optim": {"trainable": "^projector/"}}, "optim.trainable", "projector/"),
        ("stage3", {"optim": {"trainable": ".*"}}, "optim.trainable", "(projector|reference|tokenizer|vision)/"),
        ("stage3", {"lora": {"rank": 2, "targets": "vision/.*/qkv/kernel$"}}, "lora.targets", "vision/.*/lora_[ab]"),
        ("stage2", {"optim": {"trainable": "^(language_model|tokenizer/encoder)/"}}, "optim.trainable",
         "tokenizer/encoder/"),
        ("stage2", {"optim": {"trainable": "^(projector|tokenizer/decoder)/"}, "sft": {"mask_loss_weight": 0.0}},
         "optim.trainable", "tokenizer/decoder/"),
        ("stage1", {"optim": {"trainable": "^tokenizer/"}}, "optim.trainable", "tokenizer/length/"),
        ("stage1_5", {"tokenizer": {"keep_tokens": "full", "loss": {"length": 0.0, "bce": 1.0}}}, "optim.trainable",
         "tokenizer/length/"),
    ],
)  # fmt: skip
def test_parameters_that_the_loss_never_reads_are_refused(stage, groups, named, parameter):
    with pytest.raises(ConfigError) as error:
        trace(stage, "rollout" if stage == "stage3" else "train", **groups)
    found = re.fullmatch(
        rf"config\.{named}: '(.*)' names \d+ parameters that the loss of {stage} does not read, such as (\S+);.*",
        str(error.value),
    )
    assert found and found[1] == groups.get("optim", groups.get("lora", {})).get(named.split(".")[1], found[1])
    assert re.match(parameter, found[2])


@pytest.mark.parametrize(
    "stage, groups",
    [
        ("stage1", {}),
        ("stage1", {"optim": {"trainable": "^tokenizer/"}, "tokenizer": {"loss": {"length": 0.1, "bce": 1.0}}}),
        ("stage2", {"optim": {"trainable": "^(language_model|tokenizer/(decoder|quantizer|pixel_decoder))/"}}),
        ("stage2", {"train": {"accumulate": 2}}),
        ("stage3", {"lora": {"rank": 2}}),
    ],
)
def test_what_the_loss_reads_may_be_trained(stage, groups):
    trace(stage, **groups)
