"""The planner: what it counts from shapes and texts, and its figures against arrays that are really there."""

import dataclasses
import functools
import json
import os

import jax
import numpy as np
import pytest

from alto_jax.batch import abstract_batch
from alto_jax.experiment import make_experiment
from alto_jax.main import load_config
from alto_jax.parallel import sharding
from alto_jax.parallel.sharding import MeshConfig
from alto_jax.plan import __main__ as plan
from alto_jax.plan import hlo, programs, roofline, rules
from alto_jax.stages.table import make_stage
from tests.conftest import ROOT, run_python


def config_of(stage, size="debug", **train):
    config = make_experiment(load_config(str(ROOT / "configs" / f"{stage}.py:{size}")).to_dict())
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **train))


@pytest.mark.parametrize("stage, packed", [("stage1", 1), ("stage1_5", 1), ("stage2", 1), ("stage2", 2), ("stage3", 1)])
def test_abstract_batch_is_what_the_data_give(stage, packed):
    config = config_of(stage)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, pack_samples=packed))
    mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    real = next(make_stage(config, mesh).data(sharding.batch_share(mesh)))
    described = jax.tree.map(lambda a: (a.shape, str(a.dtype)), abstract_batch(config))
    assert described == jax.tree.map(lambda a: (np.shape(a), str(np.asarray(a).dtype)), real)


HLO = """\
HloModule m, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}

%inner (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %ar = bf16[4,8]{1,0:T(8,128)(2,1)} all-reduce(%x), replica_groups=[2,4]<=[8], to_apply=%add
}

%body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %ag = (bf16[1,8]{1,0}, bf16[4,8]{1,0}) all-gather-start(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %agd = bf16[4,8]{1,0} all-gather-done(%ag)
  %w = (s32[], bf16[4,8]{1,0}) while(%t), condition=%cond, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
}

%unknown (p: (s32[], f32[16])) -> (s32[], f32[16]) {
  %rs = f32[16]{0} reduce-scatter(%x), replica_groups=mesh['a'=2,'b'=4] {'a'}, to_apply=%add
}

%cond (p: (s32[], bf16[4,8])) -> pred[] {
  ROOT %c = pred[] compare(%i, %n), direction=LT
}

%fused (p: f32[8]) -> f32[8] {
  ROOT %cp = f32[8]{0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %w1 = (s32[], bf16[4,8]{1,0}) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %w2 = (s32[], f32[16]{0}) while(%t), condition=%cond, body=%unknown
  ROOT %f = f32[8]{0} fusion(%p), kind=kCustom, calls=%fused
}
"""


def test_collectives_count_as_often_as_their_loops_run():
    found = {c.kind: c for c in hlo.collectives(HLO, 8)}
    assert found["all-reduce"] == hlo.Collective("all-reduce", 4, 15, 15 * 2 * 64 * 3 // 4, False)
    assert found["all-gather"] == hlo.Collective("all-gather", 4, 5, 5 * 64 * 3 // 4, False)
    assert found["reduce-scatter"] == hlo.Collective("reduce-scatter", 2, 1, 64, True)
    assert found["collective-permute"] == hlo.Collective("collective-permute", 8, 1, 32, False)
    assert hlo.collectives("ENTRY %main (p: f32[8]) -> f32[8] {\n}\n", 8) == []


# As a TPU's compiler writes it: loops without their trip counts, an asynchronous gather that stands in each fusion it
# overlaps with, a reduce-scatter as a fusion, groups as axes of a mesh with its devices.
TPU_HLO = """HloModule jit_step

%start (p: bf16[1,8]) -> (bf16[1,8], bf16[4,8]) {
  %ag.1 = bf16[4,8]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, GROUPS, dimensions={0}
}

%overlapped (p: bf16[1,8]) -> bf16[4,8] {
  %ag.2 = bf16[4,8]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, GROUPS, dimensions={0}
}

%all-reduce-scatter.3 (p: f32[16]) -> f32[4] {
  %ar = f32[16]{0} all-reduce(%p), channel_id=8, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}

%body (p: (s32[], bf16[1,8])) -> (s32[], bf16[1,8]) {
  %s = (bf16[1,8], bf16[4,8]) fusion(%x), kind=kCustom, calls=%start
  %o = bf16[4,8]{1,0} fusion(%x), kind=kCustom, calls=%overlapped
  %rs = f32[4]{0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.3
}

%below (p: (s32[], bf16[1,8])) -> pred[] {
  %constant.5 = s32[]{:T(128)} constant(33)
  %p = (s32[]{:T(128)}, bf16[1,8]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %gte = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%gte, %constant.5), direction=LT, metadata={op_name="while/cond/lt"}
}

%either (p: (s32[], bf16[1,8])) -> pred[] {
  ROOT %and = pred[] and(%a, %b)
}

ENTRY %main (p: bf16[1,8]) -> bf16[1,8] {
  %zero = s32[]{:T(128)} constant(1)
  %copied = s32[]{:T(128)} copy(s32[]{:T(128)} %zero)
  %tuple = (s32[]{:T(128)}, bf16[1,8]{1,0:T(8,128)(2,1)}) tuple(%copied, %p)
  %w1 = (s32[]{:T(128)}, bf16[1,8]{1,0:T(8,128)(2,1)}) while(%tuple), condition=%below, body=%body
  %w2 = (s32[]{:T(128)}, bf16[1,8]{1,0:T(8,128)(2,1)}) while(%tuple), condition=CONDITION, body=%body
}
""".replace("GROUPS", "replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_0'}")


def test_collectives_of_a_tpu_count_once_a_turn_of_their_loops():
    found = {c.kind: c for c in hlo.collectives(TPU_HLO.replace("CONDITION", "%below"), 8)}
    assert found == {
        "all-gather": hlo.Collective("all-gather", 4, 64, 64 * 64 * 3 // 4, False),
        "reduce-scatter": hlo.Collective("reduce-scatter", 4, 64, 64 * 64 * 3 // 4, False),
    }
    found = {c.kind: c for c in hlo.collectives(TPU_HLO.replace("CONDITION", "%either"), 8)}
    assert found["all-gather"] == hlo.Collective("all-gather", 4, 33, 33 * 64 * 3 // 4, True)


# Two slices of a TPU: within each the collectives of old, between them what goes through the host's runtime.
BETWEEN_SLICES = """HloModule m, num_partitions=32
ENTRY %main (p: f32[8]) -> f32[8] {
  %rs = f32[64,8,128]{2,1,0} reduce-scatter(%x), channel_id=9, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %send.2 = (f32[64,8,128]{2,1,0:T(8,128)}, u32[], token[]) send(%rs, %after-all.2), ATTRIBUTES
  %recv.2 = (f32[64,8,128]{2,1,0:T(8,128)}, u32[], token[]) recv(%after-all.2), ATTRIBUTES
  %send-done.2 = token[] send-done(%send.2), ATTRIBUTES
  %recv-done.2 = (f32[64,8,128]{2,1,0:T(8,128)}, token[]) recv-done(%recv.2), ATTRIBUTES
}
""".replace(
    "ATTRIBUTES",
    'channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
    '_xla_host_transfer_rendezvous="all-reduce.5_0",_xla_megascale_reduce_operation="SUM",'
    '_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE",is_spmd_generated="true"}',
)


def test_what_crosses_the_network_between_slices_is_counted_once():
    size = 64 * 8 * 128 * 4
    assert hlo.collectives(BETWEEN_SLICES, 32) == [
        hlo.Collective("reduce-scatter", 4, 1, 3 * size, False),
        hlo.Collective("all-reduce", 2, 1, size, False, between_slices=True),
    ]


def test_a_loop_of_gathers_as_the_compiler_writes_it(monkeypatch):
    """The text of this version of XLA: five products with gathered weights."""
    script = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding as N, PartitionSpec as P
from alto_jax.parallel import sharding
from alto_jax.plan import hlo
mesh = sharding.make_mesh(sharding.MeshConfig(1, 4, 1))
def f(x, ws):
    ws = jax.lax.with_sharding_constraint(ws, N(mesh, P(None, "fsdp", None)))
    body = lambda x, w: (jnp.tanh(x @ jax.lax.with_sharding_constraint(w, N(mesh, P()))), None)
    return jax.lax.scan(body, x, ws)[0]
put = lambda shape, *spec: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=N(mesh, P(*spec)))
program = jax.jit(f).lower(put((8, 64), "fsdp"), put((5, 64, 64), None, "fsdp")).compile()
found = [c for c in hlo.collectives(program.as_text(), 4) if c.kind == "all-gather"]
print(sum(c.bytes for c in found), any(c.in_unknown_loop for c in found))
"""
    monkeypatch.setenv("XLA_FLAGS", f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4")
    done = run_python("-c", script)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [str(5 * 64 * 64 * 4 * 3 // 4), "False"]


def test_out_of_memory_is_read_as_a_shortfall():
    message = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
        "Used 35.25G of 15.75G hbm. Exceeded hbm capacity by 19.50G."
    )
    found = hlo.parse_out_of_memory(message)
    assert (found.used, found.limit) == (35.25 * 2**30, 15.75 * 2**30)
    other = "Ran out of memory on HBM, the total memory required for HLO temporaries (81.12G) exceeds available HBM"
    other += " (15.75G)."
    found = hlo.parse_out_of_memory(other)
    assert (found.used, found.temporaries, found.limit) == (None, round(81.12 * 2**30), 15.75 * 2**30)
    assert hlo.parse_out_of_memory("RESOURCE_EXHAUSTED: something").limit is None
    assert hlo.parse_out_of_memory("INTERNAL: something") is None


lower_programs = functools.cache(programs.lower_programs)  # the same program whatever the compiler says of it


@pytest.mark.parametrize("message, short", [("Used 3G of 1G hbm", 2 * 2**30), ("RESOURCE_EXHAUSTED", None)])
def test_a_program_that_does_not_fit_is_an_answer(monkeypatch, message, short):
    """What a compiler that runs out of memory says becomes the plan's shortfall, not an error."""

    def refuse(lowered):
        raise hlo.parse_out_of_memory(message)

    monkeypatch.setattr(hlo, "compile_program", refuse)
    monkeypatch.setattr(programs, "lower_programs", lower_programs)
    options, config = plan.parse(["--config=configs/stage1.py:debug", "--topology=cpu:1", "--mesh=1,1,1"])
    found = programs.make_plan(config, options)
    assert found.fits is False and found.programs[0].shortfall == short
    assert "DOES NOT FIT" in plan.describe(found)


SCRIPT = """
import json, jax, numpy, sys
from alto_jax.parallel import sharding
from alto_jax.plan import __main__ as plan, programs
from alto_jax.train import loop
from alto_jax.stages.table import make_stage
from alto_jax.train.state import create_state, make_optimizer
options, config = plan.parse(sys.argv[1:])
planned = programs.make_plan(config, options)
mesh = sharding.make_mesh(sharding.MeshConfig(**planned.mesh))
stage, optimizer = make_stage(config, mesh), make_optimizer(config.optim, config.train.steps)
abstract = loop.abstract_state(config, stage, optimizer, mesh)
zeros = lambda a: jax.device_put(numpy.zeros(a.shape, a.dtype), a.sharding)
state = jax.tree.map(zeros, abstract)
on_one = lambda tree: max(
    sum(s.data.nbytes for leaf in jax.tree.leaves(tree) for s in leaf.addressable_shards if s.device == d)
    for d in mesh.devices.flat
)
live = [on_one(state.params), on_one(state.frozen), on_one(state.opt_state)]
print(json.dumps({"plan": planned.to_dict(), "live": live}))
"""


def test_state_of_a_debug_model_equals_the_arrays_on_eight_devices(eight_devices):
    """Compiled for eight CPU devices; parameters and optimizer as counted are what the devices really hold."""
    done = run_python(
        "-c", SCRIPT, "--config=configs/stage1.py:debug_no_pixels", "--topology=cpu:8", "--mesh=2,2,2",
        "--config.train.batch_size=8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    program = found["plan"]["programs"][0]
    hbm = program["hbm"]
    assert [hbm["parameters (trained)"], hbm["parameters (frozen)"], hbm["optimizer"]] == found["live"]
    assert all(size > 0 for size in found["live"])
    # The compiler's account of the arguments holds the state and the batch: nothing is left out.
    assert 0 < hbm["batch and padding"] < 8 * 2**20 and hbm["activations and temporary"] > 0
    assert program["flops"] > 0 and program["collectives_from"] == "from the compiled program"
    assert {c["group_size"] for c in program["collectives"]} <= {2, 4, 8}
    assert not any(c["in_unknown_loop"] for c in program["collectives"])


@pytest.mark.parametrize(
    "size, topology, fits", [("8b", "v5e:2x2", False), ("8b", "h100-80g:8", True), ("2b", "v6e:4x4", True)]
)
def test_estimates(size, topology, fits):
    options, config = plan.parse(
        [f"--config=configs/stage2.py:{size}", f"--topology={topology}", "--estimate", "--mesh=auto"]
    )
    found = programs.make_plan(config, options)
    program = found.programs[0]
    assert found.fits is fits and (program.shortfall or 0) == max(program.hbm["total"] - program.hbm["limit"], 0)
    assert program.seconds["estimate"] == max(program.seconds[k] for k in ("compute", "memory", "collectives"))
    peak = {"v5e:2x2": 197e12, "h100-80g:8": 989e12, "v6e:4x4": 918e12}[topology]
    assert program.mfu == pytest.approx(program.flops / (program.seconds["estimate"] * found.num_devices * peak))
    assert program.mfu <= roofline.COMPUTE + 1e-9
    text = plan.describe(found)
    assert ("FITS" if fits else "DOES NOT FIT") in text and ("short of memory by" in text) != fits


def estimated(topology, *more):
    options, config = plan.parse(["--config=configs/stage2.py:8b", f"--topology={topology}", "--estimate", *more])
    return programs.make_plan(config, options)


def test_the_network_between_machines_takes_its_time():
    """Two machines on twice the rows: each does what one did, and the gradients of its part cross the network."""
    one = estimated("h100-80g:8", "--mesh=1,8,1", "--config.train.batch_size=32")
    two = estimated("h100-80g:8*2", "--mesh=2,8,1", "--config.train.batch_size=64")
    (alone,), (both,) = one.programs, two.programs
    assert both.hbm == alone.hbm and two.slices == 2 and two.num_devices == 16
    assert both.seconds["collectives"] == pytest.approx(alone.seconds["collectives"])
    # An all-reduce between two: half of it comes in, twice; float32 gradients as large as the parameters.
    crossed = {c["bytes"] for c in both.collectives if c.get("between_slices")}
    assert crossed == {both.hbm["parameters (trained)"]} and alone.seconds["network"] == 0
    assert both.seconds["network"] == pytest.approx(max(crossed) / (0.8 * 50e9))
    assert both.seconds["expected"] == pytest.approx(alone.seconds["expected"] + both.seconds["network"])
    slow = estimated("h100-80g:8*2", "--mesh=2,8,1", "--network=5").programs[0].seconds
    assert slow["network"] == pytest.approx(10 * both.seconds["network"]) == slow["estimate"]
    # Parameters that are gathered over the network in every layer.
    across = estimated("h100-80g:8*2", "--mesh=1,16,1").programs[0].seconds
    assert across["network"] > both.seconds["network"]
    text = plan.describe(two)
    assert "(16 x NVIDIA H100 80GB HBM3 in 2 slices)" in text and "among 2 slices" in text and "network" in text


def test_gpus_beyond_one_machine_are_several():
    many = estimated("h100-80g:64", "--mesh=auto")
    assert many.slices == 8 and many.programs[0].seconds["network"] > 0
    assert dataclasses.replace(estimated("h100-80g:8*8", "--mesh=auto"), topology=many.topology) == many
    assert many.mesh["data"] % 8 == 0


def test_a_gpu_has_the_memory_that_jax_takes(monkeypatch):
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.25")
    found = estimated("h100-80g:8", "--mesh=2,4,1")
    assert found.programs[0].hbm["limit"] == 20 * 2**30 and found.fits is False
    assert "20.000 GiB a device (25% of its memory, which JAX takes)" in plan.describe(found)
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.9")
    assert estimated("h100-80g:8", "--mesh=2,4,1").fits is True


def test_sweep_ranks_what_fits_by_speed():
    options, config = plan.parse(
        ["--config=configs/stage2.py:2b", "--topology=v5e:4x4", "--estimate", "--sweep", "--batch_sizes=16,64"]
    )
    plans = programs.sweep(config, options)
    fitting = [p.rows_per_second for p in plans if p.fits]
    assert {p.batch_size for p in plans} == {16, 64} and len({tuple(p.mesh.values()) for p in plans}) > 5
    assert fitting and fitting == sorted(fitting, reverse=True) and plans[0].fits
    assert not any(p.fits for p in plans[len(fitting) :])
    assert plan.table(plans).count("\n") == len(plans) + 1


def test_rules_show_every_parameter_with_its_bytes():
    options, config = plan.parse(["--config=configs/stage2.py:8b", "--mesh=1,8,2", "--rules"])
    text = rules.describe_rules(config, options)
    head = next(line for line in text.splitlines() if line.startswith("language_model/head/kernel"))
    # 4096 x 93579 float32 over 16 devices, by its second choice.
    assert head.split()[1:3] == ["(4096,", "93579)"] and "fsdp*tensor, -" in head and "17.2" in head
    assert f"{4096 * 93579 * 4 / 16 / 2**20:.3f}" in head
    assert "batch over data x fsdp" in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--topology=v9z:2x2"], r"--topology=v9z:2x2: expected a TPU slice"),
        (["--topology=gpu:8"], r"--topology=gpu:8: this machine has no GPU"),
        (["--topology=cpu:64"], r"--topology=cpu:64: this machine has \d+ of them"),
        (["--topology=h300:8", "--estimate"], r"--estimate knows v4, v5e"),
        (
            ["--topology=h100-80g:8*0", "--estimate"],
            r"h100-80g:8\*0: expected a number of slices after the \*",
        ),
        (["--topology=h100-80g:12", "--estimate"], r"links join 8 of these in a machine.* as in h100-80g:8\*2"),
        (["--topology=h100-80g:16*2", "--estimate"], r"links join 8 of these in a machine.* as in h100-80g:8\*4"),
        (["--topology=v4:2x2x4*2", "--estimate"], r"v4:2x2x4\*2: the network's rate is not known; give --network"),
        (["--topology=cpu:1*2"], r"--topology=cpu:1\*2: this machine is one; for several --estimate"),
        (["--topology=v5e:16x16", "--estimate"], r"config.train.batch_size: 64 does not split over 256 devices"),
        (["--topology=v5e:4x4", "--estimate", "--mesh=3,2"], r"--mesh=3,2: expected auto or DATA,FSDP,TENSOR"),
        (["--topology=v5e:4x4", "--estimate", "--step=rollout"], r"--step=rollout: stage2 has none"),
        (["--rules"], r"--rules: give --mesh"),
    ],
)
def test_bad_input_is_one_clear_error(arguments, message):
    options, config = plan.parse(["--config=configs/stage2.py:8b", *arguments])
    with pytest.raises(ValueError, match=message):
        rules.describe_rules(config, options) if options.rules else programs.make_plan(config, options)
