"""The training cases of `benchmarks/gpu.py`: the programs of a run's own step, on batches of the built-in scenes.

Parameters are random; the optimizer begins at zero. MFU: the model's operations (`alto_jax.train.flops`) over the time
and the peak of the card's data sheet.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alto_jax.experiment import ExperimentConfig
from alto_jax.parallel import sharding
from alto_jax.parallel.devices import find_device
from alto_jax.plan.programs import lower_programs
from alto_jax.stages.table import make_stage
from alto_jax.train import flops
from benchmarks.gpu_common import Job, Options, experiment, filled, timed, token_loop, zeros

LORA = {"rank": 16}


def stage2(options: Options, *, cached: bool = False) -> Job:
    """Stage 2 at 2B, 16 rows of 512 tokens; SAM features computed in the step, or given."""
    changes = {} if options.is_debug else {"train.batch_size": 16, "data.max_length": 512}
    return _update(options, "stage2_2b_cached" if cached else "stage2_2b", "stage2.py:2b", changes, cached)


def stage2_cached(options: Options) -> Job:
    """Stage 2 with the SAM features of a prepared data set."""
    return stage2(options, cached=True)


def stage1(options: Options) -> Job:
    """Stage 1 at the paper's size, 32 images."""
    return _update(
        options, "stage1_base", "stage1.py:base", {} if options.is_debug else {"train.batch_size": 32}, False
    )


def stage3(options: Options) -> Job:
    """Stage 3 at 8B with adapters of rank 16: 4 prompts of 320 tokens, 12 answers of 64 tokens each."""
    changes: dict[str, Any] = {"lora": {**LORA}}
    if not options.is_debug:
        changes |= {"train.batch_size": 4, "data.max_length": 320}
    if options.quantize:
        changes["grpo.generate.quantize"] = options.quantize
    config = experiment("stage3.py:8b", options, changes)
    with token_loop(options):
        mesh, state, _, programs = _programs(config)
        lowered = {name: function.lower(*arguments) for name, function, arguments in programs}
    count, data = flops.step_flops(config), functools.cache(lambda: _host_batch(config, mesh))

    def measure(compiled: dict) -> list[dict]:
        held, given = _state(state), _placed(config, mesh, data())
        rolled = compiled["rollout"](held, given)
        tokens = np.asarray(rolled.completion_mask).sum(axis=-1)
        rollout = timed(lambda: compiled["rollout"](held, given), options)
        update, held = _steps(compiled["update"], held, rolled, options)
        total = {name: rollout[name] + update[name] for name in update}
        record = {"case": "stage3_8b_lora", **total, "rollout_ms": rollout["ms"], "update_ms": update["ms"],
                  "tokens_mean": float(tokens.mean())}  # fmt: skip
        return [record | _mfu(count.total, total["ms"])]

    return Job(lowered, measure, (state.params, state.frozen), data)


def _update(options: Options, case: str, file: str, changes: dict, cached: bool) -> Job:
    """One program of state and batch."""
    config = experiment(file, options, changes)
    mesh, state, batch, programs = _programs(config)
    _, function, (_, batch) = programs[0]
    if cached:
        batch = _with_features(config, batch)
    operations = flops.step_flops(config).total - (_sam_flops(config) if cached else 0.0)
    data = functools.cache(lambda: _host_batch(config, mesh))

    def measure(compiled: dict) -> list[dict]:
        host = dataclasses.replace(data(), pixel_image=None) if cached else data()
        held, given = _state(state), _placed(config, mesh, host)
        if cached:
            given = dataclasses.replace(given, features=filled(batch.features))
        took, _ = _steps(compiled["update"], held, given, options)
        return [{"case": case, **took, **_mfu(operations, took["ms"])}]

    fills = state.params, state.frozen, batch.features
    return Job({"update": function.lower(state, batch)}, measure, fills, data)


def _programs(config: ExperimentConfig) -> tuple[Any, Any, Any, list]:
    """(mesh of one device, abstract state, abstract batch, programs)."""
    mesh = sharding.make_mesh(sharding.MeshConfig(1, 1, 1), jax.devices()[:1])
    return mesh, *lower_programs(config, "train", mesh)


def _with_features(config: ExperimentConfig, batch: Any) -> Any:
    """The batch of a data set whose SAM features are cached."""
    sam = config.model.tokenizer.sam
    assert sam is not None
    shape = (config.train.batch_size, sam.grid, sam.grid, sam.out_channels)
    features = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=batch.ids.sharding)
    return dataclasses.replace(batch, pixel_image=None, features=features)


def _sam_flops(config: ExperimentConfig) -> float:
    """Operations of SAM's encoder on the images of a batch (frozen here, so forward alone).

    Counted as what a step without it saves; that leaves its mapping to the mask's patches out too, 0.02 % of it.
    """
    tokenizer = dataclasses.replace(config.model.tokenizer, sam=None)
    without = dataclasses.replace(config, model=dataclasses.replace(config.model, tokenizer=tokenizer))
    return flops.step_flops(config).total - flops.step_flops(without).total


def _state(state: Any) -> Any:
    """A state at step 0 with random parameters."""
    filled_parts = {name: filled(getattr(state, name)) for name in ("params", "frozen")}
    rest = {f.name: zeros(getattr(state, f.name)) for f in dataclasses.fields(state) if f.name not in filled_parts}
    return dataclasses.replace(state, **filled_parts, **rest)


def _host_batch(config: ExperimentConfig, mesh: Any) -> Any:
    """The first batch of the run's data."""
    return next(make_stage(config, mesh).data(sharding.batch_share(mesh)))


def _placed(config: ExperimentConfig, mesh: Any, batch: Any) -> Any:
    """The batch on the device."""
    return sharding.put_batch(batch, mesh, config.train.batch_size)


def _steps(update: Any, state: Any, batch: Any, options: Options) -> tuple[dict, Any]:
    """The time of one update, and the state after some; the state is donated from each to the next.

    Raises:
      FloatingPointError: the loss is not finite, so that the update was not applied.
    """
    held = [state]

    def call() -> dict:
        held[0], metrics = update(held[0], batch)
        return metrics

    metrics = call()
    if float(metrics["skipped"]):
        raise FloatingPointError(f"the update was skipped: loss {float(metrics['loss'])}")
    return timed(call, options), held[0]


def _mfu(operations: float, milliseconds: float) -> dict[str, float]:
    """{"tflop", "mfu"}; without the share where the device's peak is not known."""
    device = find_device(jax.devices()[0].device_kind)
    found = {"tflop": operations / 1e12}
    return found if device is None else found | {"mfu": operations / milliseconds * 1e3 / device.flops}
