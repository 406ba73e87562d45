"""The one loop of all stages: data → (rollout) → step → log → checkpoint → evaluate.

The run's directory receives config.json, parameters.txt, metrics.jsonl, tensorboard/, checkpoints/ and,
at the end, result.json. Running the same command again resumes from the newest checkpoint with the same
numbers as if it had never stopped.
"""

import json
import os
import pathlib
import re
import time
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax

from alto_jax import checkpoint, sharding
from alto_jax.config import to_dict
from alto_jax.experiment import ExperimentConfig, claim_workdir
from alto_jax.progress import MetricWriter, Progress, duration
from alto_jax.rollouts import Rollouts
from alto_jax.stages import Stage, make_stage
from alto_jax.train_state import TrainState, create_state, make_optimizer, make_schedule, merge_params


def train(config: ExperimentConfig, workdir: str | os.PathLike) -> dict:
    """Trains one stage to its end (or returns at once if it is already there).

    Args:
      config: the run's configuration.
      workdir: the run's directory; created if missing.

    Returns:
      {"stage", "steps", "seconds", "metrics_first", "metrics_last", "eval": {...}}, as in result.json.

    Raises:
      ConfigError: the directory belongs to another configuration.
      FileNotFoundError: the start checkpoint is missing; the message says which command makes it.
      FloatingPointError: the loss is not finite.
    """
    path = claim_workdir(workdir, config)
    if (path / "result.json").exists():
        print(f"[{config.stage}] {path} is already complete")
        return json.loads((path / "result.json").read_text())
    mesh = run_mesh(config)
    checkpointer = checkpoint.Checkpointer(path, keep=config.train.keep_checkpoints)
    stage = make_stage(config, mesh, path if checkpointer.latest_step() is not None else None)
    optimizer = make_optimizer(config.optim, config.train.steps)
    iterator = stage.data(jax.process_index(), jax.process_count())
    if stage.save_files is not None and jax.process_index() == 0:
        stage.save_files(path)

    abstract = abstract_state(config, stage, optimizer, mesh)
    if checkpointer.latest_step() is not None:
        state = checkpointer.restore(abstract, iterator)
        print(f"[{config.stage}] resumed from step {int(state.step)} of {path}")
    else:
        state = initial_state(config, stage, optimizer, abstract, mesh)
    if jax.process_index() == 0:
        write_overview(path / "parameters.txt", state)

    try:
        began = time.monotonic()
        state, evaluation = _run(config, stage, optimizer, checkpointer, iterator, state, mesh, path)
        seconds = time.monotonic() - began
    finally:
        checkpointer.close()
    result = _result(config, path, evaluation, seconds)
    if jax.process_index() == 0:
        temporary = path / "result.tmp"
        temporary.write_text(json.dumps(result, indent=2) + "\n")
        temporary.replace(path / "result.json")
    return result


def run_mesh(config: ExperimentConfig, devices: Any = None) -> jax.sharding.Mesh:
    """The mesh of a run over `devices` (None: all); `config.mesh.auto` chooses it by its state and batch."""

    def inputs():
        alone = sharding.make_mesh(sharding.MeshConfig(1, 1, 1), (devices or jax.devices())[:1])
        optimizer = make_optimizer(config.optim, config.train.steps)
        state = abstract_state(config, make_stage(config, alone), optimizer, alone)
        return sharding.AutoInputs(sharding.held_in_update(state), config.train.batch_size)

    return sharding.make_mesh(config.mesh, devices, inputs)


def abstract_state(config: ExperimentConfig, stage: Stage, optimizer: Any, mesh: Any) -> TrainState:
    """Shapes, dtypes and shardings of the state; allocates nothing."""

    def build(key):
        params = stage.init(key)
        if stage.finish_init is not None:
            params = stage.finish_init(params)
        return create_state(params, config.optim.trainable, optimizer, stage.init_stats())

    shapes = jax.eval_shape(build, jax.random.key(config.seed))
    return jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
        shapes,
        sharding.tree_shardings(shapes, mesh),
    )


def initial_state(
    config: ExperimentConfig, stage: Stage, optimizer: Any, abstract: TrainState, mesh: Any
) -> TrainState:
    """The state at step 0: parameters of the start checkpoint where the stage inherits them, fresh ones elsewhere."""
    key = jax.random.key(config.seed)
    fresh_shapes = jax.eval_shape(stage.init, key)
    flat_shapes = traverse_util.flatten_dict(fresh_shapes, sep="/")
    inherited: dict = {}
    if stage.inherits:
        if not config.init_from and stage.requires:
            raise FileNotFoundError(
                f"config.init_from: {config.stage} starts from an earlier stage's run; give --config.init_from=DIR,"
                f" made by: {stage.previous}"
            )
        if config.init_from:
            checkpoint.find_run(config.init_from, made_by=stage.previous)
            wanted = {
                p: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=_sharding(p, v, mesh))
                for p, v in flat_shapes.items()
                if p.split("/")[0] in stage.inherits and not (stage.reset and re.search(stage.reset, p))
            }
            loaded = checkpoint.load_params(config.init_from, traverse_util.unflatten_dict(wanted, sep="/"))
            inherited = traverse_util.flatten_dict(loaded, sep="/")
            missing = [p for p in wanted if p not in inherited and p.split("/")[0] in stage.requires]
            if missing:
                raise ValueError(
                    f"config.init_from: {config.init_from} lacks {len(missing)} parameters that {config.stage} needs,"
                    f" such as {missing[0]}; expected a run of: {stage.previous}"
                )

    def fresh(key):
        flat = traverse_util.flatten_dict(stage.init(key), sep="/")
        return {p: v for p, v in flat.items() if p not in inherited}

    shardings = {p: _sharding(p, v, mesh) for p, v in flat_shapes.items() if p not in inherited}
    created = jax.jit(fresh, out_shardings=shardings)(key)
    params = traverse_util.unflatten_dict({**created, **inherited}, sep="/")

    def finish(params):
        params = params if stage.finish_init is None else stage.finish_init(params)
        return create_state(params, config.optim.trainable, optimizer, stage.init_stats())

    return jax.jit(finish, out_shardings=jax.tree.map(lambda a: a.sharding, abstract))(params)


def _sharding(path: str, leaf: Any, mesh: Any) -> Any:
    return jax.sharding.NamedSharding(mesh, sharding.param_spec(path, leaf.shape, mesh))


def make_step(stage: Stage, optimizer: Any, schedule: Any, seed: int, shardings: TrainState) -> Any:
    """The jitted update `(state, batch) -> (state, metrics)`; the state is donated and keeps its `shardings`."""

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)

        def loss_fn(params):
            return stage.loss_fn(merge_params(params, state.frozen), batch, rng, state.step)

        (loss, (metrics, aux)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics = {
            "loss": loss,
            **metrics,
            "grad_norm": optax.global_norm(grads),
            "learning_rate": schedule(state.step),
        }
        state = state.replace(
            step=state.step + 1, params=optax.apply_updates(state.params, updates), opt_state=opt_state
        )
        if stage.after_update is not None:
            state = stage.after_update(state, aux, jax.random.fold_in(rng, 1))
        return state, jax.tree.map(lambda m: m.astype(jnp.float32), metrics)

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def make_rollout(stage: Stage, seed: int) -> Any:
    """The jitted rollout `(state, batch, attempt) -> batch for the loss`; attempts of one step differ in their keys."""

    def rollout(state: TrainState, batch: Any, attempt: Any) -> Any:
        rng = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), state.step), 2 + attempt)
        return stage.rollout(state.all_params(), batch, rng)

    return jax.jit(rollout)


def _run(config, stage, optimizer, checkpointer, iterator, state, mesh, path) -> tuple[TrainState, dict]:
    """Steps until config.train.steps; returns the state and the last evaluation."""
    total, start = config.train.steps, int(state.step)
    schedule = make_schedule(config.optim, total)
    step_fn = make_step(stage, optimizer, schedule, config.seed, jax.tree.map(lambda a: a.sharding, state))
    next_batch = lambda: sharding.put_batch(next(iterator), mesh)
    rollouts, repeats = None, 1
    if stage.rollout is not None:
        rollouts = Rollouts(config.grpo, stage, make_rollout(stage, config.seed), next_batch, mesh)
        repeats = config.grpo.updates_per_rollout
    meta = {"stage": config.stage, "model": to_dict(config.model), "data": {"system": config.data.system}}
    writer = MetricWriter(path, start) if jax.process_index() == 0 else None
    progress = Progress(config.stage, total, start)
    pending: list[dict] = []
    for step in range(start + 1, total + 1):
        batch = next_batch() if rollouts is None else rollouts.batch(state, step)
        state, metrics = step_fn(state, batch)
        pending.append(metrics)
        if step == start + 1:
            jax.block_until_ready(metrics)
            progress.restart_clock(step)
        if step % config.train.log_every == 0 or step in (1, total):
            means = _mean_metrics(pending)
            pending = []
            if not np.isfinite(means["loss"]):
                raise FloatingPointError(f"config.stage {config.stage}: loss is {means['loss']} at step {step}")
            if stage.check is not None:
                stage.check(means)
            if writer is not None:
                writer.write(step, means)
                progress.line(step, {name: means[name] for name in stage.headline if name in means})
            if rollouts is not None:
                rollouts.log_histograms(step, writer)
        if rollouts is not None:
            rollouts.log_samples(state, step, path)
        # Note: a rollout in progress is not part of the checkpoint, so saves fall between rollouts.
        save = config.train.checkpoint_every and step % config.train.checkpoint_every == 0 and step % repeats == 0
        if save or step == total:
            checkpointer.save(step, state, iterator, {**meta, "step": step})
        if stage.evaluate is not None and config.eval.every and step % config.eval.every == 0 and step < total:
            scalars = {k: v for k, v in stage.evaluate(state.all_params()).items() if isinstance(v, (int, float))}
            if writer is not None:
                writer.write(step, {f"eval/{k}": v for k, v in scalars.items()})
                progress.line(step, scalars)
    evaluation: dict = {}
    if stage.evaluate is not None and config.eval.num_samples:
        began = time.monotonic()
        evaluation = stage.evaluate(state.all_params())
        if writer is not None:
            scalars = {k: v for k, v in evaluation.items() if isinstance(v, (int, float))}
            writer.write(total, {f"eval/{k}": v for k, v in scalars.items()})
            line = "  ".join(f"{k} {v:.4g}" for k, v in scalars.items())
            print(f"[{config.stage}] evaluation ({duration(time.monotonic() - began)}): {line}", flush=True)
    if writer is not None:
        writer.close()
    return state, evaluation


def _mean_metrics(pending: list[dict]) -> dict[str, float]:
    """Means of metric dicts that are still on the device."""
    pending = jax.device_get(pending)
    return {name: float(np.mean([m[name] for m in pending])) for name in pending[0]}


def _result(config: ExperimentConfig, path: pathlib.Path, evaluation: dict, seconds: float) -> dict:
    """The run in short; first and last are means over the first and last quarter of the logged steps."""
    from alto_jax.progress import read_metrics

    records = [r for r in read_metrics(path) if "loss" in r]
    quarter = max(len(records) // 4, 1)

    def mean(part):
        return {k: float(np.mean([r[k] for r in part])) for k in part[0] if k != "step"}

    return {
        "stage": config.stage,
        "steps": config.train.steps,
        "seconds": round(seconds, 1),
        "metrics_first": mean(records[:quarter]),
        "metrics_last": mean(records[-quarter:]),
        "eval": evaluation,
    }


def write_overview(file: pathlib.Path, state: TrainState) -> None:
    """Writes the table of parameters (name, shape, size) and which part is trained."""
    from clu import parameter_overview

    parts = [("trainable", state.params), ("frozen", state.frozen)]
    text = "\n\n".join(
        f"{name}: {parameter_overview.count_parameters(tree):,} parameters\n"
        + parameter_overview.get_parameter_overview(tree, include_stats=False)
        for name, tree in parts
        if tree
    )
    file.write_text(text + "\n")


def evaluate(config: ExperimentConfig, workdir: str | os.PathLike) -> dict:
    """Evaluates the newest checkpoint of a run on held-out data and prints the numbers.

    Raises:
      FileNotFoundError: the directory holds no checkpoint.
    """
    checkpoint.find_run(workdir)
    path = claim_workdir(workdir, config)
    mesh = run_mesh(config)
    stage = make_stage(config, mesh, path)
    abstract = abstract_state(config, stage, make_optimizer(config.optim, config.train.steps), mesh)
    wanted = merge_params(abstract.params, abstract.frozen)
    params = checkpoint.load_params(path, wanted)
    checkpoint.require_complete(params, wanted, str(workdir))
    result = stage.evaluate(params)
    print(json.dumps({k: v for k, v in result.items() if not isinstance(v, list)}, indent=2))
    return result
