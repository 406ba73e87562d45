"""The jitted update: micro-batches, moving average, types of parameters, and the guard against bad updates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alto_jax.experiment import TrainConfig, make_experiment
from alto_jax.main import load_config
from alto_jax.parallel import sharding
from alto_jax.train import step, workdir
from alto_jax.train.start import abstract_state, initial_state
from alto_jax.train.state import TrainState, apply_updates, make_optimizer
from tests import fake_stage
from tests.conftest import ROOT, run_python


def run(config, stage, steps):
    """States (on the host) before and after each of `steps` updates, and the metrics of each."""
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    optimizer = make_optimizer(config.optim, config.train.steps)
    abstract = abstract_state(config, stage, optimizer, mesh)
    state = initial_state(config, stage, optimizer, abstract, mesh)
    update = step.make_step(config, stage, optimizer, jax.tree.map(lambda a: a.sharding, abstract))
    iterator, states, metrics = stage.data(sharding.batch_share(mesh)), [jax.device_get(state)], []
    for _ in range(steps):
        state, logged = update(state, sharding.put_batch(next(iterator), mesh, fake_stage.ROWS))
        states.append(jax.device_get(state))
        metrics.append(jax.device_get(logged))
    return states, metrics


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_accumulation_gives_the_same_updates():
    """Also what is drawn, a loss that is no mean over rows, and what the stage gets to see afterwards."""
    stage, parts = fake_stage.stage(), 4
    whole, logged = run(fake_stage.config(), stage, 5)
    split, logged_split = run(fake_stage.config(train={"accumulate": parts}), stage, 5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), split[-1], whole[-1])
    for a, b in zip(logged_split, logged):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-6, err_msg=name)
    # It is no accident: without the totals of the whole batch the second term would be off.
    wrong, _ = run(fake_stage.config(train={"accumulate": parts}), fake_stage.replace(stage, totals=None), 5)
    assert not np.allclose(wrong[-1].params["vision"]["kernel"], whole[-1].params["vision"]["kernel"], rtol=1e-5)


def test_accumulation_must_divide():
    with pytest.raises(ValueError, match=r"train.accumulate: expected a divisor of batch_size 8, got 3"):
        fake_stage.config(train={"accumulate": 3})
    plain = load_config(str(ROOT / "configs" / "stage3.py:debug")).to_dict()
    plain["train"]["accumulate"] = 2
    plain["grpo"]["loss"]["objective"] = "dapo"
    with pytest.raises(ValueError, match="accumulate: expected 1, since grpo.loss.objective"):
        make_experiment(plain)


STAGE2 = """
import dataclasses, jax, numpy as np
from alto_jax.parallel import sharding
from alto_jax.train import step
from alto_jax.stages.table import make_stage
from alto_jax.train.state import create_state, make_optimizer
from benchmarks.reliability import get_config
from tests.train.test_flops import experiment

tokenizer = get_config().to_dict()["model"]["tokenizer"]
vision = {"image_size": 56, "patch_size": 14, "embed_dim": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 16,
          "drop_path_rate": 0.2}
model = {"vision": vision, "tokenizer": tokenizer}
config = experiment("stage2", train={"batch_size": 4}, model=model, data={"max_masks": 2})
mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
stage = make_stage(config, mesh)
batch = sharding.put_batch(next(stage.data(sharding.batch_share(mesh))), mesh, 4)
state = create_state(stage.init(jax.random.key(0)), config.trainable, make_optimizer(config.optim, 10), {})
counted = []
for parts in (1, 4):
    changed = dataclasses.replace(config, train=dataclasses.replace(config.train, accumulate=parts))
    compute = jax.jit(lambda state: step._gradients(changed, stage, state, batch, jax.random.key(1), mesh))
    loss, metrics, _, grads = compute(state)
    counted.append((loss, grads))
    print(parts, loss, {k: float(v) for k, v in metrics.items()})
supervised = np.sum(np.asarray(batch.labels) != -100, axis=1)
assert len(set(supervised)) > 1, "rows must differ in their number of supervised tokens"
np.testing.assert_allclose(counted[0][0], counted[1][0], rtol=1e-5)
for path, a in jax.tree_util.tree_leaves_with_path(counted[0][1]):
    b = counted[1][1]
    for key in path:
        b = b[key.key]
    scale = float(np.abs(a).max())
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(scale, 1e-6), err_msg=str(path))
"""


def test_accumulation_of_stage2():
    """Means over supervised tokens and over masks, of which rows have different numbers; stochastic depth too."""
    done = run_python("-c", STAGE2)
    assert done.returncode == 0, done.stderr[-3000:]


def test_moving_average():
    states, _ = run(fake_stage.config(optim={"ema_decay": 0.7}), fake_stage.stage(), 4)
    expected = states[0].params
    assert_equal(states[0].ema, expected)
    for n, state in enumerate(states[1:]):
        decay = min(0.7, (1 + n) / (10 + n))
        expected = jax.tree.map(lambda e, p, d=decay: d * e + (1 - d) * p, expected, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), states[-1].ema, expected)
    chosen = states[-1].eval_params()
    assert_equal(chosen["vision"], states[-1].ema["vision"])
    assert_equal(chosen["tokenizer"]["length"], states[-1].frozen["tokenizer"]["length"])
    plain = run(fake_stage.config(), fake_stage.stage(), 1)[0][-1]
    assert plain.ema == {} and plain.eval_params()["vision"]["kernel"] is plain.params["vision"]["kernel"]


def test_types_of_parameters():
    """Trained ones in bfloat16 with float32 moments; frozen ones in bfloat16 but for those named."""
    optim = {"param_dtype": "bfloat16", "frozen_dtype": "bfloat16", "frozen_float32": "^$"}
    states, _ = run(fake_stage.config(optim=optim), fake_stage.stage(), 3)
    assert {leaf.dtype.name for leaf in jax.tree.leaves((states[-1].params, states[-1].frozen))} == {"bfloat16"}
    moments = [leaf for leaf in jax.tree.leaves(states[-1].opt_state) if leaf.ndim]
    assert moments and {leaf.dtype.name for leaf in moments} == {"float32"}
    exact, _ = run(fake_stage.config(), fake_stage.stage(), 3)
    for a, b in zip(jax.tree.leaves(states[-1].params), jax.tree.leaves(exact[-1].params)):
        np.testing.assert_allclose(np.asarray(a, np.float32), b, atol=0.03)
    # No optimizer state for what is frozen, whose type is kept where it matters.
    kept, _ = run(fake_stage.config(optim={"frozen_dtype": "bfloat16"}), fake_stage.stage(), 1)
    assert kept[-1].frozen["tokenizer"]["length"]["kernel"].dtype == np.float32
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(kept[-1].opt_state)]
    assert any("encoder" in p for p in paths) and not any("length" in p for p in paths)


def test_bad_updates_change_nothing_but_counters():
    bad = {2: np.nan, 3: np.inf, 5: np.nan}
    stage = fake_stage.stage(lambda batch: bad.get(batch, 1.0))
    states, metrics = run(fake_stage.config(optim={"ema_decay": 0.9}), stage, 7)
    for index in range(7):
        before, after = states[index], states[index + 1]
        assert after.step == before.step + 1
        assert bool(metrics[index]["skipped"]) == (index in bad)
        if index in bad:
            for part in ("params", "opt_state", "stats", "ema", "frozen"):
                assert_equal(getattr(after, part), getattr(before, part))
        elif index > 0:  # the warm-up begins at 0
            assert not np.array_equal(after.params["vision"]["kernel"], before.params["vision"]["kernel"])
    assert [int(m["in_a_row"]) for m in metrics] == [0, 0, 1, 2, 0, 1, 0]
    assert states[-1].guard["skipped"] == 3
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(states[-1]))
    # The schedule counts updates, not steps.
    schedule = step.make_schedule(fake_stage.config().optim, 12)
    expected = [float(schedule(n)) for n in (0, 1, 2, 2, 2, 3, 3)]
    np.testing.assert_allclose([m["learning_rate"] for m in metrics], expected, rtol=1e-6)


def test_spikes(monkeypatch):
    """A loss far above the ones before is skipped, if that is asked for."""
    monkeypatch.setattr(step, "SPIKE_AFTER", 6)
    stage = fake_stage.stage(lambda batch: 30.0 if batch == 9 else 1.0)
    calm = {"lr": 1e-4}
    _, metrics = run(fake_stage.config(train={"spike_sigmas": 6.0}, optim=calm), stage, 12)
    assert [i for i, m in enumerate(metrics) if m["skipped"]] == [9]
    _, metrics = run(fake_stage.config(optim=calm), stage, 12)
    assert not any(m["skipped"] for m in metrics)


def skipped(losses, sigmas=6.0, max_bad_steps=10, guard=None):
    """Indices of the losses that the guard skips, and its state at the end."""
    cfg = TrainConfig(spike_sigmas=sigmas, max_bad_steps=max_bad_steps)
    zeros = {"skipped": 0, "in_a_row": 0, "loss_mean": 0.0, "loss_variance": 0.0}

    def one(carry, loss):
        guard, done = carry
        bad, guard = step._guard(TrainState(done, {}, {}, {}, {}, {}, guard), loss, jnp.float32(1), done, cfg)
        return (guard, done + ~bad), bad

    start = jax.tree.map(jnp.asarray, guard or zeros), jnp.int32(0 if guard is None else 1000)
    (guard, _), bad = jax.lax.scan(one, start, jnp.asarray(losses, jnp.float32))
    return np.flatnonzero(bad).tolist(), guard


def noise(count, seed=0):
    return np.random.default_rng(seed).normal(0, 0.1, count)


@pytest.mark.parametrize("sigmas", [2.5, 6.0, 20.0])
@pytest.mark.parametrize("jump", [3.0, 1e4])
def test_the_guard_follows_a_new_level(sigmas, jump):
    """At most SPIKE_PATIENCE updates are lost to it, and single spikes are skipped before and after."""
    losses = 1 + noise(700)
    losses[200:] += jump
    losses[[150, 600]] += 10 * jump
    found, _ = skipped(losses, sigmas)
    of_noise = [i for i in found if i not in (150, 600) and not 200 <= i < 200 + step.SPIKE_PATIENCE]
    assert (
        {150, 600} <= {*found}
        and (200 in found or sigmas * 0.1 * 2 > jump)
        and len(of_noise) <= (10 if sigmas < 3 else 0)
    ), found


def test_the_guard_follows_levels_that_alternate():
    """Where highs never come often enough in a row, they still widen the deviation."""
    losses = 1 + noise(900)
    losses[200::2] += 5
    losses[201::2] += 5 * (np.arange(350) % 3 == 0)
    found, _ = skipped(losses, 6.0)
    assert found and max(found) < 260, found


def test_the_guard_ends_with_fewer_updates_than_the_run():
    losses = 1 + noise(300)
    losses[200:] += 5
    assert skipped(losses, 6.0, max_bad_steps=3)[0] == [200, 201]
    losses[250:260] = np.nan
    found, guard = skipped(losses)
    assert found == [200, 201, 202, 203, 204, *range(250, 260)] and np.isfinite(guard["loss_mean"])


def test_the_guard_may_be_turned_on_and_off_later():
    losses = 1 + noise(200)
    off, guard = skipped(losses, sigmas=0.0)
    on, _ = skipped(np.where(np.arange(200) == 50, 9.0, losses), 6.0, guard=guard)
    assert off == [] and on == [50]
    # A checkpoint whose guard was off when nothing was counted, and losses too large to be squared.
    empty = {"skipped": 0, "in_a_row": 0, "loss_mean": 0.0, "loss_variance": 0.0}
    found, guard = skipped([*losses, *[3e38] * 8, *losses], 6.0, guard=empty)
    assert 200 in found and len(found) < 15 and np.isfinite(guard["loss_variance"])
    assert "train.spike_sigmas" in workdir._FREE_FIELDS


def test_norms_of_groups():
    states, metrics = run(fake_stage.config(optim={"schedule": "constant"}), fake_stage.stage(), 2)
    logged = metrics[1]
    names = {name for name in logged if "/" in name}
    assert names == {f"{n}_norm/{g}" for n in ("grad", "update") for g in ("tokenizer/encoder", "vision")}
    moved = np.linalg.norm(states[2].params["vision"]["kernel"] - states[1].params["vision"]["kernel"])
    np.testing.assert_allclose(logged["update_norm/vision"], moved, rtol=1e-4)
    parts = [logged["grad_norm/vision"], logged["grad_norm/tokenizer/encoder"]]
    np.testing.assert_allclose(logged["grad_norm"], np.linalg.norm(parts), rtol=1e-5)
    assert optax.global_norm(jnp.ones(4)) == 2


def test_small_updates_of_bfloat16_parameters_count_in_the_mean():
    """Updates of a hundredth of a step: none would survive rounding to the nearest."""
    start = {"half": jnp.full((64, 64), 1.5, jnp.bfloat16), "whole": jnp.full(3, 1.5)}
    update = jax.tree.map(lambda a: jnp.full(a.shape, 8e-5), start)
    step = jax.jit(lambda p, i: apply_updates(p, update, jax.random.fold_in(jax.random.key(0), i)))
    params = start
    for i in range(50):
        params = step(params, i)
    assert params["half"].dtype == jnp.bfloat16
    moved = np.asarray(params["half"], np.float64).mean() - 1.5
    assert abs(moved - 50 * 8e-5) < 3e-4  # the mean's own deviation: 1e-4
    np.testing.assert_allclose(params["whole"], 1.5 + 50 * 8e-5, rtol=1e-6)
    exact = apply_updates(
        {"a": jnp.asarray([1.5, -2.0, jnp.inf], jnp.bfloat16)}, {"a": jnp.zeros(3)}, jax.random.key(1)
    )
    np.testing.assert_array_equal(np.asarray(exact["a"], np.float32), [1.5, -2.0, np.inf])
