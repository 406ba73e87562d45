"""Gradient ascent with `grpo_loss` on a bandit whose optimum is known, for every objective."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alto_jax.losses.grpo import GrpoLossConfig, grpo_loss
from alto_jax.rewards import group_advantages

ARMS, GROUP, BATCH = 5, 16, 4
STOP = 0
# An answer is one arm, or two if the first one is not STOP: ragged, as masks are. REWARD[first, second].
REWARD = np.random.default_rng(3).uniform(0, 0.6, (ARMS, ARMS)).astype(np.float32)
REWARD[STOP] = 0.5
REWARD[2, 4] = 1.0


def log_policy(params):
    return jax.nn.log_softmax(params["first"]), jax.nn.log_softmax(params["second"], axis=-1)


def logps_of(params, ids):
    """ids int32[B, G, 2] -> float32[B, G, 2]."""
    first, second = log_policy(params)
    return jnp.stack([first[ids[..., 0]], second[ids[..., 0], ids[..., 1]]], axis=-1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def ascend(cfg, updates_per_rollout, key):
    """Probability of the best answer after training from the uniform policy."""
    params = {"first": jnp.zeros(ARMS), "second": jnp.zeros((ARMS, ARMS))}
    reference = params
    optimizer = optax.adam(0.05)

    def step(carry, key):
        params, opt_state = carry
        first, second = log_policy(params)
        keys = jax.random.split(key)
        a = jax.random.categorical(keys[0], first, shape=(BATCH, GROUP))
        b = jax.random.categorical(keys[1], second[a])
        ids = jnp.stack([a, jnp.where(a == STOP, 0, b)], axis=-1)
        mask = jnp.stack([jnp.ones_like(a, bool), a != STOP], axis=-1)
        advantages = group_advantages(jnp.asarray(REWARD)[ids[..., 0], ids[..., 1]])
        old = logps_of(params, ids)

        def loss(params):
            return grpo_loss(logps_of(params, ids), old, logps_of(reference, ids), advantages, mask, cfg)[0]

        for _ in range(updates_per_rollout):
            updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
            params = optax.apply_updates(params, updates)
        return (params, opt_state), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, 400))
    first, second = log_policy(params)
    return jnp.exp(first[2] + second[2, 4])


@pytest.mark.parametrize("objective", ["paper", "reference", "dr_grpo", "dapo", "gspo"])
def test_every_objective_finds_the_best_answer(objective):
    cfg = GrpoLossConfig(objective=objective, beta=0.0)
    assert float(ascend(cfg, 2, jax.random.key(0))) > 0.9


def test_a_strong_penalty_keeps_the_policy_at_the_reference():
    """The uniform policy gives each pair 1/25: with beta large, the same ascent stays near it."""
    assert float(ascend(GrpoLossConfig(beta=100.0), 2, jax.random.key(0))) < 0.1
