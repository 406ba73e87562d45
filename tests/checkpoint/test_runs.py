"""Save, restore, init-from: bits and data position come back, what does not fit is named."""

import time

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alto_jax.checkpoint import agreement, runs
from alto_jax.experiment import OptimConfig
from alto_jax.train.state import create_state, make_optimizer
from tests.conftest import run_python

META = {"stage": "stage1", "model": {"width": 4}, "step": 0}


def make_state(scale: float, stats: dict | None = None):
    params = {
        "tokenizer": {"kernel": jnp.arange(12.0).reshape(3, 4) * scale, "bias": jnp.full(4, 1 / 3, jnp.bfloat16)},
        "vision": {"kernel": jnp.ones((2, 2)) * scale},
    }
    state = create_state(params, "^tokenizer/", make_optimizer(OptimConfig(), 10), stats or {})
    return state.replace(step=jnp.int32(round(scale)))


def make_iterator():
    return iter(grain.MapDataset.range(100).seed(1).shuffle().batch(2).to_iter_dataset())


def abstract(tree):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), tree)


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's directory with the checkpoints of steps 2 and 3, and the batches that followed step 3."""
    path, iterator = tmp_path_factory.mktemp("run"), make_iterator()
    checkpointer = runs.Checkpointer(path, keep=2)
    assert checkpointer.latest_step() is None
    for step in (1, 2, 3):
        next(iterator)
        checkpointer.save(step, make_state(step, {"usage": jnp.arange(3.0)}), iterator, {**META, "step": step})
    checkpointer.save(3, make_state(99.0), iterator, META)  # once saved, a step stays
    checkpointer.close()
    return path, [next(iterator) for _ in range(3)]


def test_restore_gives_the_same_bits_and_the_same_batches(run):
    path, following = run
    checkpointer, iterator = runs.Checkpointer(path), make_iterator()
    state = checkpointer.restore(abstract(make_state(0, {"usage": jnp.zeros(3)})), iterator)
    checkpointer.close()
    assert_same(state, make_state(3, {"usage": jnp.arange(3.0)}))
    np.testing.assert_array_equal([next(iterator) for _ in range(3)], following)


def test_only_the_newest_are_kept(run):
    path, _ = run
    assert sorted(p.name for p in (path / "checkpoints").iterdir()) == ["2", "3"]
    assert runs.find_run(path) == (path, 3)
    assert runs.find_run(path / "checkpoints") == (path, 3)
    assert runs.load_meta(path) == {**META, "step": 3}


def test_load_params_takes_what_there_is(run):
    path, _ = run
    wanted = make_state(0).all_params()
    assert_same(runs.load_params(path, abstract(wanted)), make_state(3).all_params())
    wanted["projector"] = {"kernel": jnp.zeros((2, 2))}
    found = runs.load_params(path, abstract(wanted), only="vision")
    assert_same(found, {"vision": {"kernel": jnp.full((2, 2), 3.0)}})
    found = runs.load_params(path, abstract(wanted))
    assert "projector" not in found
    with pytest.raises(ValueError, match="lacks 1 parameters, such as projector/kernel"):
        runs.require_complete(found, wanted, "DIR")
    assert runs.load_params(path, abstract({"projector": wanted["projector"]})) == {}
    wanted["vision"]["kernel"] = jnp.zeros((2, 3))
    with pytest.raises(
        ValueError, match=r"vision/kernel has shape \(2, 2\) in the checkpoint, the model wants \(2, 3\)"
    ):
        runs.load_params(path, abstract(wanted))


def test_missing_and_incomplete_runs(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no checkpoint there.*make it with: COMMAND"):
        runs.find_run(tmp_path / "nowhere", made_by="COMMAND")
    # A save that was interrupted: Orbax writes the last file of a step when all others are complete.
    (tmp_path / "run" / "checkpoints" / "5" / "state").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="holds no complete step"):
        runs.find_run(tmp_path / "run")


ANOTHER_MESH = """
import sys
import jax, jax.numpy as jnp, numpy as np
from alto_jax.checkpoint import runs
from alto_jax.parallel import sharding
from alto_jax.experiment import OptimConfig
from alto_jax.train.state import create_state, make_optimizer
from tests.checkpoint.test_runs import make_iterator

def state(data, fsdp, tensor):
    mesh = sharding.make_mesh(sharding.MeshConfig(data, fsdp, tensor))
    params = {"head": {"kernel": jnp.arange(128.0).reshape(8, 16)}, "norm": {"scale": jnp.arange(5.0)}}
    built = create_state(params, ".*", make_optimizer(OptimConfig(), 10), {})
    return jax.device_put(built, sharding.tree_shardings(built, mesh))

saved, wanted = state(2, 4, 1), state(1, 2, 4)
assert saved.params["head"]["kernel"].addressable_shards[0].data.shape == (2, 16)
checkpointer = runs.Checkpointer(sys.argv[1])
checkpointer.save(1, saved, make_iterator(), {})
checkpointer.wait()
abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), wanted)
restored = checkpointer.restore(abstract, make_iterator())
checkpointer.close()
for a, b, c in zip(*map(jax.tree.leaves, (restored, saved, wanted)), strict=True):
    np.testing.assert_array_equal(a, b)
    assert a.sharding == c.sharding, (a.sharding, c.sharding)
kernel, moment = restored.params["head"]["kernel"], restored.opt_state[1][0].mu["head"]["kernel"]
assert kernel.addressable_shards[0].data.shape == moment.addressable_shards[0].data.shape == (4, 4)
"""


def test_restore_onto_another_mesh(tmp_path, eight_devices):
    done = run_python("-c", ANOTHER_MESH, tmp_path / "run")
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_full_device_is_no_full_disk(tmp_path):
    checkpointer = runs.Checkpointer(tmp_path)
    for error, kind in (
        (ValueError("RESOURCE_EXHAUSTED: No space left on device"), OSError),
        (OSError(28, "No space left"), OSError),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"),
            jax.errors.JaxRuntimeError,
        ),
        (ValueError("a mistake"), ValueError),
    ):
        with pytest.raises(kind), checkpointer._told_failures():
            raise error
    checkpointer.close()


def test_checksums_are_the_same_where_they_are_made():
    """In the machine's memory without a program, and by the devices' program."""
    values = np.random.default_rng(0).normal(size=(3, 5)) * 1e9
    tree = {kind: jnp.asarray(values).astype(kind) for kind in ("float32", "bfloat16", "int32", "uint8", "bool")}
    tree |= {"one": jnp.float32(-2.5), "turned": jnp.asarray(values, jnp.float32).T, "none": jnp.zeros((0, 2))}
    found = agreement.checksums(tree)
    assert list(found.values()) == [int(s) for s in agreement._sums(list(agreement.flat(tree).values()))]
    assert found["none"] == 0 and found["one"] == int(np.float32(-2.5).view(np.uint32))
    tree["float32"] = tree["float32"].at[1, 2].multiply(1 + 2**-23)
    changed = agreement.checksums(tree)
    assert [name for name in tree if changed[name] != found[name]] == ["float32"]


@pytest.mark.parametrize("is_seen", [True, False])
def test_a_lost_mount_is_told_at_once(tmp_path, monkeypatch, is_seen):
    """Of the save that it meets, also in the middle; older ones are there, later ones succeed. Orbax waits 300 s."""
    (tmp_path / "disk").mkdir()
    mount = tmp_path / "mount"
    mount.symlink_to("disk")
    state, data, save = make_state(1.0), make_iterator(), runs.Checkpointer(mount / "run")
    save.save(1, state, data, {})
    save.wait()
    mount.unlink()
    if not is_seen:  # where it stands at the moment that Orbax writes, but not before
        mount.symlink_to("nowhere")
        monkeypatch.setattr(runs.Checkpointer, "_require_folder", lambda self: None)
    began = time.monotonic()
    with pytest.raises(OSError, match="a checkpoint could not be written"):
        save.save(2, state, data, {})
        save.wait()
    assert time.monotonic() - began < 60 and not (mount / "run").exists()
    mount.unlink(missing_ok=True)
    mount.symlink_to("disk")
    save.save(3, state, data, {})
    save.close()
    assert runs.complete_steps(mount / "run") == [1, 3]
