"""The start of a run on a machine that is not here: what reading, drawing and completing the state at step 0 take."""

import math
import time
from typing import Any

from flax import traverse_util
import jax

from alto_jax.checkpoint.loading import AT_ONCE
from alto_jax.experiment import ExperimentConfig
from alto_jax.parallel import sharding
from alto_jax.parallel.sharding import MeshConfig
from alto_jax.plan import hlo
from alto_jax.plan.topology import Target
from alto_jax.plan.types import Program
from alto_jax.stages.table import make_stage
from alto_jax.train.start import Beginning, abstract_state, beginning, inherited_paths
from alto_jax.train.state import make_optimizer


def init_programs(config: ExperimentConfig, sizes: MeshConfig, target: Target) -> list[Program]:
    """The programs of a start, in their order: "read" (no program: a checkpoint), "fresh", "complete".

    What a stage takes from an earlier one is taken to be all in the start checkpoint, if there is one or must be one.
    """
    devices = target.devices or jax.devices()[:1]
    mesh = sharding.make_mesh(sizes if target.devices else MeshConfig(1, 1, 1), devices)
    stage, optimizer = make_stage(config, mesh), make_optimizer(config.optim, config.train.steps)
    abstract = abstract_state(config, stage, optimizer, mesh)
    plain = beginning(config, stage, optimizer, abstract, mesh, ())
    reads = bool(stage.inherits and (config.init_from or stage.requires))
    inherited = inherited_paths(stage, plain.wanted) if reads else set()
    begin = beginning(config, stage, optimizer, abstract, mesh, inherited)
    held = lambda tree: sharding.bytes_per_device(tree, sizes)
    read = held({path: leaf for path, leaf in begin.wanted.items() if path in inherited})
    drawn = {path: leaf for path, leaf in begin.wanted.items() if path not in inherited}
    programs = []
    if inherited:
        part = _largest_part({path: begin.wanted[path] for path in inherited}, sizes)
        account = {"parameters (read)": read, "the part at hand (float32)": part}
        programs.append(_program("read", account, target, "read from files"))
    if target.devices:
        return programs + _compiled(config, begin, bool(drawn), read, target)
    if drawn:
        part = _largest_part(drawn, sizes)
        account = {"parameters (read)": read, "parameters (fresh)": held(drawn), "an array as it is drawn": 2 * part}
        programs.append(_program("fresh", account, target, "estimated"))
    # Note: the parameters' memory becomes the state's, where it is of the same type.
    account = {"state": held(abstract)}
    return [*programs, _program("complete", account, target, "estimated")]


def _largest_part(leaves: dict[str, Any], sizes: MeshConfig) -> int:
    """Bytes on one device of the largest array as float32, or of as many as are read at once."""
    floats = {path: jax.ShapeDtypeStruct(leaf.shape, "float32") for path, leaf in leaves.items()}
    each = {path: (math.prod(leaf.shape) * 4, sharding.bytes_per_device({path: leaf}, sizes)) for path, leaf in
            floats.items()}  # fmt: skip
    at_once = min(AT_ONCE, sum(whole for whole, _ in each.values()))
    return max(max(mine for _, mine in each.values()), at_once // (sizes.data * sizes.fsdp * sizes.tensor))


def _compiled(config: ExperimentConfig, begin: Beginning, draws: bool, read: int, target: Target) -> list[Program]:
    """The programs of a start, compiled for the target's devices."""
    key = jax.random.key(config.seed)
    params = traverse_util.unflatten_dict(begin.wanted, sep="/")
    wanted = [("fresh", begin.fresh, (key,), read)] if draws else []
    programs = []
    for name, function, arguments, beside in [*wanted, ("complete", begin.complete, (params, key), 0)]:
        began = time.monotonic()
        try:
            analysis = hlo.compile_program(function.lower(*arguments)).memory_analysis()
        except hlo.OutOfMemory as error:
            limit = error.limit or target.memory
            short = None if error.used is None or limit is None else error.used - limit
            hbm: dict[str, int | None] = {"parameters (read)": beside, "total": error.used, "limit": limit}
            taken = time.monotonic() - began
            programs.append(Program(name, False, hbm, short, 0.0, {}, None, [], "not compiled", taken))
            continue
        account = {
            "parameters (read)": beside,
            "what it is given": analysis.argument_size_in_bytes,
            "what it adds": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
            "temporary": analysis.temp_size_in_bytes,
            "program": analysis.generated_code_size_in_bytes,
        }
        found = _program(name, account, target, "not counted")
        found.compile_seconds = time.monotonic() - began
        programs.append(found)
    return programs


def _program(name: str, account: dict[str, int], target: Target, source: str) -> Program:
    """A part of a start by its bytes on one device."""
    total, limit = sum(account.values()), target.memory
    hbm: dict[str, int | None] = {**account, "total": total, "limit": limit}
    fits, short = (None, None) if limit is None else (total <= limit, max(total - limit, 0) or None)
    return Program(name, fits, hbm, short, 0.0, {}, None, [], source, None)
