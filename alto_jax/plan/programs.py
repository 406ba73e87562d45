"""The real programs of a step on a mesh of devices that need not be here.

In: a configuration and a topology. Out: `Plan`. States and batches are shapes only; nothing is allocated.
"""

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp

from alto_jax.batch import PromptBatch, abstract_batch
from alto_jax.config import ConfigError
from alto_jax.data import vocabulary
from alto_jax.experiment import ExperimentConfig
from alto_jax.mllm.alto_llm import Segmentation, segment
from alto_jax.mllm.generate import GenerateConfig
from alto_jax.parallel import sharding
from alto_jax.parallel.devices import DEVICES
from alto_jax.parallel.sharding import MeshConfig
from alto_jax.plan import hlo, kernels, roofline, starting
from alto_jax.plan.topology import Target, find_target
from alto_jax.plan.types import Options, Plan, Program
from alto_jax.stages.table import make_stage
from alto_jax.train import flops, loop
from alto_jax.train.state import make_optimizer


def _without_sizes(config: ExperimentConfig) -> ExperimentConfig:
    """The configuration without what neither the state nor the operations of one row depend on."""
    return dataclasses.replace(
        config, mesh=MeshConfig(1, 1, 1), train=dataclasses.replace(config.train, batch_size=1, accumulate=1)
    )


def state_shapes(config: ExperimentConfig) -> Any:
    """Shapes and dtypes of the training state, on no particular mesh."""
    return _state_shapes(_without_sizes(config))


@functools.lru_cache(maxsize=2)
def _state_shapes(config: ExperimentConfig) -> Any:
    mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    return loop.abstract_state(config, make_stage(config, mesh), make_optimizer(config.optim, config.train.steps), mesh)


def _resolve(config: ExperimentConfig, options: Options, target: Target) -> MeshConfig:
    """The sizes of the mesh that the options or the configuration ask for."""
    cfg = config.mesh
    if options.mesh == "auto":
        cfg = dataclasses.replace(cfg, auto=True)
    elif options.mesh:
        cfg = _given_sizes(options.mesh)
    if cfg.auto:
        memory = target.memory
        return sharding.choose_sizes(
            sharding.held_in_update(state_shapes(config)),
            target.number,
            config.train.batch_size,
            memory,
            target.slices,
        )
    sizes = sharding.fill_sizes(cfg, target.number)
    parts = sizes.data * sizes.fsdp
    if config.train.batch_size % parts:
        raise ConfigError(
            f"config.train.batch_size: {config.train.batch_size} does not split over {parts} devices (data x fsdp);"
            f" give --config.train.batch_size=N, a mesh with fewer of them, or --mesh=auto"
        )
    return sizes


def _given_sizes(mesh: str) -> MeshConfig:
    """The mesh of "DATA,FSDP,TENSOR"."""
    sizes = mesh.split(",")
    if len(sizes) != 3 or not all(size.lstrip("-").isdigit() for size in sizes):
        raise ConfigError(f"--mesh={mesh}: expected auto or DATA,FSDP,TENSOR")
    data, fsdp, tensor = map(int, sizes)
    return MeshConfig(data, fsdp, tensor)


def sizes_for_rules(config: ExperimentConfig, options: Options) -> MeshConfig:
    """The mesh whose splits `--rules` prints."""
    if options.mesh and options.mesh != "auto" and not options.topology:
        return _given_sizes(options.mesh)
    if not options.topology:
        raise ConfigError("--rules: give --mesh=DATA,FSDP,TENSOR or --topology")
    return _resolve(config, options, _target(options))


def _target(options: Options) -> Target:
    return find_target(options.topology, estimate=options.estimate, network=options.network)


def make_plan(config: ExperimentConfig, options: Options, sizes: MeshConfig | None = None) -> Plan:
    """Compiles (or, with `options.estimate`, counts) the programs of one step.

    Raises:
      ConfigError, ValueError: sizes that do not divide, a topology that cannot be had.
    """
    target = _target(options)
    sizes = _resolve(config, options, target) if sizes is None else sizes
    build = _estimated_programs if target.devices is None else _compiled_programs
    if options.step == "init":
        found = starting.init_programs(config, sizes, target)
    else:
        found = build(config, options.step, sizes, target)
    return Plan(
        config=options.config,
        stage=config.stage,
        step=options.step,
        topology=target.name,
        device_kind=target.kind,
        num_devices=target.number,
        mesh={axis: getattr(sizes, axis) for axis in sharding.AXES},
        batch_size=config.train.batch_size,
        estimated=target.devices is None,
        programs=found,
        slices=target.slices,
        memory_share=target.memory / target.device.memory if target.device and target.memory else 1.0,
    )


def _wanted(config: ExperimentConfig, step: str) -> list[str]:
    """The programs of a step: names among "train", "rollout", "update", "predict"."""
    if step == "predict":
        if config.model.language_model is None:
            raise ConfigError("--step=predict: the configuration has no language model")
        return ["predict"]
    if config.stage == "stage3":
        return ["rollout", "update"] if step == "train" else [step]
    if step == "rollout":
        raise ConfigError(f"--step=rollout: {config.stage} has none; it is for stage3")
    return ["train"]


def _flops(config: ExperimentConfig, name: str) -> float:
    """Operations of one program, of all devices."""
    return config.train.batch_size * _row_flops(_without_sizes(config), name)


@functools.lru_cache(maxsize=8)
def _row_flops(config: ExperimentConfig, name: str) -> float:
    if name == "predict":
        return flops.answer_flops(config.model, config.data.max_length, config.eval.max_new_tokens)
    counted = flops.step_flops(config)
    if name == "rollout":
        return counted.rollout * config.grpo.updates_per_rollout
    return counted.forward + counted.backward


def _work(config: ExperimentConfig, name: str, state: Any, sizes: MeshConfig, num_slices: int) -> roofline.Work:
    """What one device holds and moves in one program, from shapes."""
    if name in ("rollout", "predict"):
        samples, new = 1, config.eval.max_new_tokens
        if name == "rollout":
            samples, new = config.grpo.num_generations, config.grpo.generate.max_new_tokens
        return roofline.answering_work(config, state.all_params(), sizes, samples, new, num_slices)
    return roofline.training_work(config, state.params, state.frozen, state.opt_state, sizes, num_slices)


def _held(config: ExperimentConfig, name: str, state: Any, sizes: MeshConfig) -> dict[str, int]:
    """Exact bytes of what a program is given, on one device."""
    held = {
        "parameters (trained)": sharding.bytes_per_device(state.params, sizes),
        "parameters (frozen)": sharding.bytes_per_device(state.frozen, sizes),
        "optimizer": sharding.bytes_per_device(state.opt_state, sizes),
    }
    if name == "predict":
        trained = held.pop("parameters (trained)")
        held = {"parameters": trained + held["parameters (frozen)"]}
    return held


def _expected(
    config: ExperimentConfig, name: str, state: Any, sizes: MeshConfig, target: Target, work: roofline.Work
) -> dict[str, float]:
    """{"expected": seconds} of one program at the kernels' measured rates; {} for a device that is not in the table."""
    if target.device is None:
        return {}
    new = {"rollout": config.grpo.generate.max_new_tokens, "predict": config.eval.max_new_tokens}.get(name, 0)
    held = lambda tree: sharding.bytes_per_device(tree, sizes)
    moved = 2 * held(state.params) + held(state.opt_state)
    found = kernels.expected_seconds(config, name, target.device, target.number, work, new, moved, target.network)
    return {"expected": found}


def _time(target: Target, work: roofline.Work, operations: float) -> tuple[dict, float | None]:
    """Seconds of one program by part, and its MFU."""
    if target.device is None:
        return {}, None
    parts = roofline.seconds(target.device, operations / target.number, work, target.network)
    times = {**dataclasses.asdict(parts), "estimate": parts.estimate, "serial": parts.serial}
    return times, operations / (parts.estimate * target.number * target.device.flops)


def _estimated_programs(config: ExperimentConfig, step: str, sizes: MeshConfig, target: Target) -> list[Program]:
    """The programs of a step, from shapes."""
    state, programs = state_shapes(config), []
    for name in _wanted(config, step):
        work, operations = _work(config, name, state, sizes, target.slices), _flops(config, name)
        held = _held(config, name, state, sizes) | {"temporary": round(work.temporary)}
        total = sum(held.values())
        hbm: dict[str, int | None] = {**held, "total": total, "limit": target.memory}
        fits, short = _compare(total, target.memory)
        times, mfu = _time(target, work, operations)
        times |= _expected(config, name, state, sizes, target, work)
        moved = _estimated_moves(work, target)
        programs.append(Program(name, fits, hbm, short, operations, times, mfu, moved, "estimated", None))
    return programs


def _estimated_moves(work: roofline.Work, target: Target) -> list[dict]:
    """What a program moves, from shapes, in the form of `hlo.Collective`."""
    found = [{"kind": "all", "bytes": round(work.links), "group_size": target.number // target.slices, "count": 1}]
    if target.slices > 1:
        crossed = {"kind": "all", "bytes": round(work.network), "group_size": target.slices, "count": 1}
        found.append(crossed | {"between_slices": True})
    return found


def _compare(total: int | None, limit: int | None) -> tuple[bool | None, int | None]:
    """Whether `total` bytes fit, and how many are too many; None where that is not known (or none are)."""
    if total is None or limit is None:
        return None, None
    return total <= limit, max(total - limit, 0) or None


def lower_programs(config: ExperimentConfig, step: str, mesh: Any) -> tuple[Any, Any, list[tuple[str, Any, tuple]]]:
    """The real programs of a step on a mesh: (state, batch, [(name, jitted function, abstract arguments)]).

    In stage 2 as it is for answers that are scored at once; the turns of longer ones have no fixed number.
    """
    config = dataclasses.replace(config, sft=dataclasses.replace(config.sft, max_supervised=config.sft.at_once))
    stage, optimizer = make_stage(config, mesh), make_optimizer(config.optim, config.train.steps)
    state = loop.abstract_state(config, stage, optimizer, mesh)
    split = jax.sharding.NamedSharding(mesh, sharding.batch_spec())
    place = lambda tree: jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=split), tree)
    batch = place(abstract_batch(config))
    programs: list[tuple[str, Any, tuple]] = []
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    update = loop.make_step(config, stage, optimizer, shardings)
    roll = functools.cache(lambda: loop.make_rollout(config, stage))  # one function, which is traced once
    for name in _wanted(config, step):
        if name == "predict":
            programs.append((name, _predict(config, mesh), (state.all_params(), _prompts(config, batch))))
        elif name == "rollout":
            programs.append((name, roll(), (state, batch)))
        elif config.stage == "stage3":
            rolled = place(jax.eval_shape(roll(), state, batch))
            programs.append((name, update, (state, rolled)))
        else:
            programs.append((name, update, (state, batch)))
    return state, batch, programs


def _prompts(config: ExperimentConfig, batch: Any) -> PromptBatch:
    """Prompts as large as the rows of a training batch."""
    if isinstance(batch, PromptBatch):
        return batch
    size = config.model.tokenizer.mask_size
    split = batch.ids.sharding
    mask = jax.ShapeDtypeStruct((config.train.batch_size, size, size), jnp.float32, sharding=split)
    # Note: a prompt has one image of one tile, also where rows are packed or have several.
    one = lambda a: jax.ShapeDtypeStruct((a.shape[0], *a.shape[-3:]), a.dtype, sharding=split)
    return PromptBatch(one(batch.image), one(batch.pixel_image), batch.ids, batch.text_mask, mask)


def _predict(config: ExperimentConfig, mesh: Any) -> Any:
    """The jitted answer to prompts with masks, as prediction and evaluation compute it."""
    special = vocabulary.text_tokenizer(config).ids
    generate = GenerateConfig(max_new_tokens=config.eval.max_new_tokens)

    def predict(params: dict, batch: PromptBatch) -> Segmentation:
        policy = {name: tree for name, tree in params.items() if name != "reference"}
        return segment(config.model, policy, batch, generate, special, jax.random.key(0))

    return jax.jit(sharding.on_mesh(mesh, predict))


def _compiled_programs(config: ExperimentConfig, step: str, sizes: MeshConfig, target: Target) -> list[Program]:
    """The programs of a step, compiled for the target's devices."""
    mesh = sharding.make_mesh(sizes, target.devices)
    state, _, wanted = lower_programs(config, step, mesh)
    programs = []
    for name, function, arguments in wanted:
        work, operations = _work(config, name, state, sizes, target.slices), _flops(config, name)
        held = _held(config, name, state, sizes)
        lowered = function.lower(*arguments)
        began = time.monotonic()
        try:
            executable = hlo.compile_program(lowered)
        except hlo.OutOfMemory as error:
            taken = time.monotonic() - began
            total, limit = error.used, error.limit or target.memory
            if error.temporaries is not None:
                held["activations and temporary"] = error.temporaries
                total = sum(held.values())
            short = None if total is None or limit is None else total - limit
            times, mfu = _time(target, work, operations)
            times |= _expected(config, name, state, sizes, target, work)
            programs.append(
                Program(
                    name,
                    False,
                    {**held, "total": total, "limit": limit},
                    short,
                    operations,
                    times,
                    mfu,
                    [],
                    "not compiled",
                    taken,
                )
            )
            continue
        taken = time.monotonic() - began
        account = _memory(executable, sum(held.values()))
        total = sum(held.values()) + sum(account.values())
        hbm: dict[str, int | None] = {**held, **account, "total": total, "limit": target.memory}
        text = hlo.program_text(executable)
        moved = None if text is None else hlo.collectives(text, target.number)
        times, mfu = _time(target, _compiled_work(work, moved), operations)
        times |= _expected(config, name, state, sizes, target, work)
        found = _estimated_moves(work, target) if moved is None else [dataclasses.asdict(c) for c in moved]
        source = "estimated; the compiler cannot print this program" if moved is None else "from the compiled program"
        fits, short = _compare(total, target.memory)
        programs.append(Program(name, fits, hbm, short, operations, times, mfu, found, source, taken))
    return programs


def _compiled_work(work: roofline.Work, moved: list[hlo.Collective] | None) -> roofline.Work:
    """`work` with the bytes between devices and slices of a compiled program's collectives, where they can be read."""
    if moved is None:
        return work
    total = {crossed: sum(c.bytes for c in moved if c.between_slices == crossed) for crossed in (False, True)}
    links, network = float(total[False]), float(total[True])
    if any(c.in_unknown_loop for c in moved):
        links = max(links, work.links)  # Of a loop that ends by itself one turn was counted.
        network = max(network, work.network)
    return dataclasses.replace(work, links=links, network=network)


def _memory(executable: Any, held: int) -> dict[str, int]:
    """The compiler's account of memory beside the `held` exact bytes of the state."""
    analysis = executable.memory_analysis()
    arguments, outputs = analysis.argument_size_in_bytes, analysis.output_size_in_bytes
    new = outputs - analysis.alias_size_in_bytes
    return {
        "batch and padding": arguments - held,
        "output": new,
        "activations and temporary": analysis.temp_size_in_bytes,
        "program": analysis.generated_code_size_in_bytes,
    }


def sweep(config: ExperimentConfig, options: Options) -> list[Plan]:
    """Plans for all meshes and batch sizes: the `options.compile` best by estimate compiled, the rest estimated.

    Sorted by rows per second, those that fit first, compiled ones before estimates.
    """
    target = _target(options)
    sizes = [config.train.batch_size]
    if options.batch_sizes:
        sizes = [int(size) for size in options.batch_sizes.split(",") if size.isdigit()]
        if len(sizes) != options.batch_sizes.count(",") + 1:
            raise ConfigError(f"--batch_sizes={options.batch_sizes}: expected numbers with commas")
    if target.device is None:
        raise ConfigError(f"--sweep: no figures for {target.kind!r} to rank meshes by; known: {', '.join(DEVICES)}")
    name = next(n for n, device in DEVICES.items() if device is target.device)
    each = f"{target.number // target.slices}" + (f"*{target.slices}" if target.slices > 1 else "")
    guess = dataclasses.replace(options, topology=f"{name}:{each}", estimate=True)
    estimates, reasons = [], []
    for batch_size in sizes:
        run = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=batch_size))
        for mesh in sharding.mesh_sizes(target.number, batch_size):
            try:
                estimates.append((run, mesh, make_plan(run, guess, mesh)))
            except ValueError as error:
                reasons.append(str(error))
    if not estimates:
        raise ConfigError(f"--sweep: no mesh of {target.number} devices divides: {(reasons or ['the batch'])[0]}")
    rank = lambda plan: (plan.fits is not True, plan.estimated, -(plan.rows_per_second or 0))
    # Note: the estimate of memory is rough, so what misses by less than a quarter is still worth compiling.
    near = lambda plan: all((p.shortfall or 0) < 0.25 * (p.hbm["limit"] or 0) for p in plan.programs)
    order = sorted(estimates, key=lambda item: (not near(item[2]), -(item[2].rows_per_second or 0)))
    plans = []
    for index, (run, mesh, plan) in enumerate(order):
        if not options.estimate and index < options.compile:
            plan = make_plan(run, options, mesh)
        plans.append(dataclasses.replace(plan, topology=target.name))
    return sorted(plans, key=rank)
