"""The state at step 0: never there twice, with the numbers of the plain way to make it."""

import dataclasses

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alto_jax.checkpoint import loading, runs
from alto_jax.experiment import make_experiment
from alto_jax.main import load_config
from alto_jax.parallel import sharding
from alto_jax.plan import __main__ as plan
from alto_jax.plan import programs
from alto_jax.stages.table import make_stage
from alto_jax.train import start
from alto_jax.train.state import make_optimizer
from tests.conftest import ROOT
from tests.parallel import stages_on_processes


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(sharding.MeshConfig(1, 1, 1), jax.devices()[:1])


def made(config, mesh):
    """(stage, optimizer, abstract state) of a configuration."""
    stage, optimizer = make_stage(config, mesh), make_optimizer(config.optim, config.train.steps)
    return stage, optimizer, start.abstract_state(config, stage, optimizer, mesh)


def narrow(stage, **optim):
    """A small configuration with frozen parameters of 16 bits."""
    config = stages_on_processes.config_of(stage, (1, 1, 1), "")
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, frozen_dtype="bfloat16", **optim))


def test_parameters_are_made_in_the_types_of_the_state(mesh):
    config = narrow("stage2", frozen_float32="^$")
    stage, optimizer, abstract = made(config, mesh)
    stage = dataclasses.replace(stage, inherits=(), requires=())  # all of it fresh
    found = start.initial_state(config, stage, optimizer, abstract, mesh)
    key = jax.random.key(config.seed)
    plain = jax.jit(lambda key: start._complete(config, stage, optimizer, stage.init(key), key))(key)
    jax.tree.map(np.testing.assert_array_equal, found, plain)
    assert {leaf.dtype for leaf in jax.tree.leaves(found.frozen["tokenizer"])} == {jnp.dtype("bfloat16")}

    begin = start.beginning(config, stage, optimizer, abstract, mesh, ())
    params = traverse_util.unflatten_dict(begin.wanted, sep="/")
    analysis = begin.complete.lower(params, key).compile().memory_analysis()
    given = sum(leaf.size * leaf.dtype.itemsize for leaf in begin.wanted.values())
    # Each array becomes one of the state.
    assert analysis.alias_size_in_bytes == given < 4 * sum(leaf.size for leaf in begin.wanted.values())


@pytest.mark.parametrize("kept, expected", [("^$", {"bfloat16", "float32"}), ("^reference/", {"float32"})])
def test_what_a_stage_makes_of_its_parameters_loses_no_digit(mesh, kept, expected):
    """The reference of stage 3 is made of the policy, and may be wider than it."""
    config = narrow("stage3", frozen_float32=kept, param_dtype="bfloat16" if kept != "^$" else "float32")
    begin = start.beginning(config, *made(config, mesh), mesh, ())
    assert {str(leaf.dtype) for leaf in begin.wanted.values()} == expected


def test_a_checkpoint_is_read_in_the_types_of_the_state(debug_model, mesh, monkeypatch):
    shapes = runs.flat(loading.load_model(debug_model.path).params)
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    types = {path: "bfloat16" if path.startswith("language_model") else "float32" for path in shapes}
    wanted = {path: jax.ShapeDtypeStruct(leaf.shape, types[path], sharding=place) for path, leaf in shapes.items()}
    monkeypatch.setattr(loading, "AT_ONCE", 1 << 18)
    read, seen = runs.read_params, []
    monkeypatch.setattr(runs, "read_params", lambda *given: seen.append(read(*given)) or seen[-1])
    found = loading.load_in_parts(debug_model.path, traverse_util.unflatten_dict(wanted, sep="/"))
    found = traverse_util.flatten_dict(found, sep="/")
    assert found.keys() == shapes.keys() and len(seen) > 1
    # As they were saved, so that they can be compared with their checksums.
    assert {str(leaf.dtype) for part in seen for leaf in jax.tree.leaves(part.arrays)} == {"float32"}
    for path, value in found.items():
        np.testing.assert_array_equal(value, shapes[path].astype(types[path]))


def test_plan_of_the_start():
    """A base of 26B parameters for adapters: it is there once, in 16 bits, and one part as float32."""
    arguments = ["--config=configs/stage2.py:26b", "--topology=h100-80g:8", "--mesh=1,8,1", "--estimate", "--step=init"]
    adapters = ["--config.lora.rank=16", "--config.optim.frozen_dtype=bfloat16", "--config.init_from=DIR"]
    options, config = plan.parse([*arguments, *adapters])
    read, complete = programs.make_plan(config, options).programs
    assert [read.name, complete.name] == ["read", "complete"] and read.fits and complete.fits
    assert 6 * 2**30 < read.hbm["parameters (read)"] < 6.5 * 2**30 and read.hbm["total"] < 9 * 2**30
    assert "parameters (read)" in plan.describe(programs.make_plan(config, options))


def test_plan_of_the_start_as_compiled():
    options, config = plan.parse(
        ["--config=configs/stage1.py:debug_no_pixels", "--topology=cpu:1", "--mesh=1,1,1", "--step=init"]
    )
    state = make_experiment(load_config(str(ROOT / "configs/stage1.py:debug_no_pixels")).to_dict())
    fresh, complete = programs.make_plan(config, options).programs
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(programs.state_shapes(state)))
    assert fresh.hbm["what it adds"] == pytest.approx(complete.hbm["what it is given"], abs=1024)
    assert complete.hbm["what it is given"] + complete.hbm["what it adds"] == pytest.approx(held, rel=0.01)


def test_what_runs_once_is_compiled_quickly_to_the_same_bits(mesh, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    assert start._quick_compilation(mesh) is None
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    quickly = start._quick_compilation(mesh)
    assert quickly == {"xla_backend_optimization_level": 1}
    draw = lambda key: (jax.random.truncated_normal(key, -2, 2, (65, 7)) * 0.02, jax.random.normal(key, (33,)))
    compiled = (jax.jit(draw, compiler_options=how) for how in (quickly, {"xla_backend_optimization_level": 3}))
    jax.tree.map(np.testing.assert_array_equal, *(program(jax.random.key(3)) for program in compiled))
