"""The one loop of all stages: data → (rollout) → step → log → checkpoint → evaluate.

The run's directory receives config.json, parameters.txt, metrics.jsonl, tensorboard/, goodput.jsonl, checkpoints/,
frozen/, in stage 3 prompts.jsonl, and at the end result.json. Running the same command again resumes from the newest
checkpoint with the same numbers as if it had never stopped.
"""

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import time
from typing import Any

import jax
import numpy as np
import optax

from alto_jax.checkpoint import loading, nearby, runs
from alto_jax.cli import Stopped, duration
from alto_jax.config import ConfigError, write_whole
from alto_jax.data import prefetch, sources, stream
from alto_jax.experiment import ExperimentConfig
from alto_jax.lora import adapters
from alto_jax.parallel import distributed, sharding
from alto_jax.params import merge_params
from alto_jax.stages.stage import Stage
from alto_jax.stages.table import make_stage
from alto_jax.storage import mirror
from alto_jax.train import best, early, goodput
from alto_jax.train.logs import Logs
from alto_jax.train.preemption import StopSignals
from alto_jax.train.progress import Meter, Profiler, read_metrics
from alto_jax.train.prompt_log import PromptLog
from alto_jax.train.rollouts import Rollouts
from alto_jax.train.saving import Saver, check_bad
from alto_jax.train.start import abstract_state, initial_state, restored_state, write_overview
from alto_jax.train.state import TrainState, make_optimizer
from alto_jax.train.step import make_rollout, make_step
from alto_jax.train.workdir import claim_workdir


def train(
    config: ExperimentConfig, workdir: str | os.PathLike, *, age: float = 0.0, noted: early.Note | None = None
) -> dict:
    """Trains one stage to its end (or returns at once if it is already there).

    Args:
      config: the run's configuration.
      workdir: the run's directory, created if missing; or a URL of a bucket, which a copy on this machine is kept like.
      age: seconds since the start of the process, if it was started for this run.
      noted: the note of this start, if one was made.

    Returns:
      {"stage", "steps", "seconds", "metrics_first", "metrics_last", "goodput": {...} (see `train.goodput`),
      "eval": {...}}, as in result.json; "eval_train" instead of "eval" where evaluation is on training data
      (`sources.evaluated_on`).

    Raises:
      ConfigError: the directory belongs to another configuration, or its starts die again and again at one place.
      FileNotFoundError: the start checkpoint is missing; the message says which command makes it.
      FloatingPointError: too many updates in a row were skipped (see `alto_jax.train.step`).
      OSError: the last checkpoint could not be written.
      distributed.ProcessLost, distributed.OutOfMemory: see `distributed.explained`.
      Stopped: a signal ended the run after a save.
    """
    with mirror.working_copy(workdir, "--workdir") as (path, copy):
        finished, newest = distributed.from_first(lambda: _claim(path, config))
        path, is_apart = mirror.of_each(workdir, path, copy)
        if is_apart and config.train.patience:
            raise ConfigError(f"config.train.patience: expected 0 where not all processes see the copy of {workdir} in"
                              f" ALTO_RUNS, got {config.train.patience}")  # fmt: skip
        if finished is not None:
            print(f"[{config.stage}] {workdir} is already complete")
            return finished
        is_first = jax.process_index() == 0
        before = noted.take() if noted and is_first else ()
        account = goodput.Account(path if is_first else None, config, newest, age=age, early=before)
        if noted:
            noted.drop()
        with account.closing(), distributed.explained():
            return _train(config, path, account, copy, is_apart)


def _train(
    config: ExperimentConfig, path: pathlib.Path, account: goodput.Account, copy: mirror.Mirror | None, is_apart: bool
) -> dict:
    """`train` in a directory that is the run's; copy: keeps a bucket like it; is_apart: each process has its own."""
    measured = _name_evaluation(config)
    mesh = run_mesh(config)
    sharding.batch_share(mesh).rows(config.train.batch_size, "config.train.batch_size")
    cfg = config.train
    keep = runs.Retention(cfg.keep_checkpoints, cfg.keep_best, cfg.best_mode, cfg.best_metric)
    if copy is not None and cfg.checkpoint_local_every:
        raise ConfigError(f"config.train.checkpoint_local_every: expected 0 with a bucket, whose copy on this machine"
                          f" is ahead of it anyway, got {cfg.checkpoint_local_every}")  # fmt: skip
    checkpointer = runs.Checkpointer(
        path, keep, is_apart=is_apart, has_local=cfg.checkpoint_local_every > 0, one_reader=cfg.checkpoint_one_reader
    )
    is_resumed = checkpointer.latest_step() is not None
    optimizer = make_optimizer(config.optim, config.train.steps)
    with distributed.opening():
        stage = make_stage(config, mesh, path if is_resumed else None)
        data = stage.data(sharding.batch_share(mesh))
    iterator = prefetch.Ahead(data, lambda batch: sharding.put_batch(batch, mesh, config.train.batch_size))
    if distributed.count() > 1:
        distributed.require_same("data set", iterator.get_state()[stream.DATA_SET])
    if stage.save_files is not None and jax.process_index() == 0:
        stage.save_files(path)

    abstract = abstract_state(config, stage, optimizer, mesh)
    if is_resumed:
        state = restored_state(config, stage, optimizer, abstract, mesh, checkpointer, iterator)
        print(f"[{config.stage}] resumed from step {int(state.step)} of {path}", flush=True)
    else:
        state = initial_state(config, stage, optimizer, abstract, mesh)
    if jax.process_index() == 0:
        write_overview(path / "parameters.txt", state)
    account.go_on_from(int(state.step))

    began = time.monotonic()
    try:
        with StopSignals() as signals:
            run = _Run(config, stage, optimizer, checkpointer, iterator, mesh, path, signals, measured, is_resumed,
                       account, copy)  # fmt: skip
            state, logs, watch = _steps(run, state)
    except BaseException:
        iterator.close()
        with contextlib.suppress(OSError):  # Note: what has ended the run is told, not what follows from it.
            checkpointer.close()
        raise
    iterator.close()
    checkpointer.close()
    # Note: with patience the run has the parameters of the best evaluation, which gives the same numbers again.
    with account.during("evaluate"):
        evaluation = (config.train.patience and watch.found) or _final_evaluation(config, stage, state, logs, measured)
    logs.close()
    result = _result(config, path, int(state.step), {measured: evaluation}, time.monotonic() - began)
    result |= watch.result(measured) | {"goodput": distributed.from_first(account.summary)}
    logs.say(f"{watch.comparison(measured, evaluation)}[{config.stage}] {goodput.line(result['goodput'])}")
    if jax.process_index() == 0:
        write_whole(path / "result.json", json.dumps(result, indent=2) + "\n")
    return result


def _name_evaluation(config: ExperimentConfig) -> str:
    """The name of the evaluation's metrics ("eval" or "eval_train"); says once if they are not of held-out data.

    Raises:
      ConfigError: `train.best_metric` is an evaluation's that is not made.
    """
    cfg, measured = config.train, sources.evaluated_on(config)
    best, _, metric = cfg.best_metric.partition("/")
    if cfg.keep_best and metric and best.startswith("eval"):
        every = config.eval.every if config.eval.num_samples else 0
        if best != measured or not every:
            why = f"eval.every {config.eval.every}, eval.num_samples {config.eval.num_samples}" if not every else (
                f"evaluation is on {'training' if measured == 'eval_train' else 'held-out'} data (config.eval.source, "
                f"config.data.validation_fraction), so its metrics are named {measured}/…")  # fmt: skip
            raise ConfigError(f"config.train.best_metric: {cfg.best_metric!r} is never measured: {why}")
    if config.eval.num_samples and jax.process_index() == 0:
        if measured == "eval_train":
            print(
                f"[{config.stage}] evaluation is on training data, so its metrics are named eval_train/…; for held-out "
                "data give config.eval.source or config.data.validation_fraction",
                flush=True,
            )
        elif config.eval.source:
            shared, count = sources.count_shared_images(config)
            if shared:
                print(f"[{config.stage}] warning: {shared} of the {count} images that evaluation takes from "
                      "config.eval.source are in the training data too", flush=True)  # fmt: skip
    return measured


def _claim(path: pathlib.Path, config: ExperimentConfig) -> tuple[dict | None, int]:
    """What the result.json of the run's directory holds (None: the run is not at its end), its newest step (or 0)."""
    claim_workdir(path, config)
    file = path / "result.json"
    newest = max([*runs.complete_steps(path), *nearby.steps_here(path)], default=0)
    if file.exists():
        return json.loads(file.read_text()), newest
    goodput.require_progress(path, config, newest)
    return None, newest


def run_mesh(config: ExperimentConfig, devices: Any = None) -> jax.sharding.Mesh:
    """The mesh of a run over `devices` (None: all); `config.mesh.auto` chooses it by its state and batch."""

    def inputs() -> sharding.AutoInputs:
        alone = sharding.make_mesh(sharding.MeshConfig(1, 1, 1), (devices or jax.devices())[:1])
        optimizer = make_optimizer(config.optim, config.train.steps)
        state = abstract_state(config, make_stage(config, alone), optimizer, alone)
        return sharding.AutoInputs(sharding.held_in_update(state), config.train.batch_size)

    return sharding.make_mesh(config.mesh, devices, inputs)


@dataclasses.dataclass(frozen=True)
class _Run:
    """What the steps of a run work with, beside its state.

    iterator: of batches on the devices of `mesh`. path: the run's directory. signals: taken while the steps run.
    measured: the name of the evaluations' metrics. account: of the time that all of it takes. copy: keeps a bucket like
    the run's directory (None: there is none).
    """

    config: ExperimentConfig
    stage: Stage
    optimizer: optax.GradientTransformation
    checkpointer: runs.Checkpointer
    iterator: prefetch.Ahead
    mesh: jax.sharding.Mesh
    path: pathlib.Path
    signals: StopSignals
    measured: str
    is_resumed: bool
    account: goodput.Account
    copy: mirror.Mirror | None


def _steps(run: _Run, state: TrainState) -> tuple[TrainState, Logs, best.Watch]:
    """Steps until config.train.steps, until `train.patience` is over, or until a signal.

    Returns:
      The state, which is saved, the open logs, and what the evaluations have shown.
    """
    config, stage, path, account = run.config, run.stage, run.path, run.account
    total, start, name = config.train.steps, int(state.step), f"[{config.stage}]"
    timed = start
    step_fn = make_step(config, stage, run.optimizer, jax.tree.map(lambda a: a.sharding, state))
    step_fn = distributed.meeting(step_fn)
    rollouts, repeats = None, 1
    saver = Saver(config, run.checkpointer, run.iterator, run.copy)
    logs, meter = Logs(config, path, start, is_resumed=run.is_resumed), Meter(config, account)
    # Note: after Logs, which drops what a killed run wrote after its last checkpoint.
    watch = best.Watch(config.train, distributed.from_first(lambda: read_metrics(path)))
    profiler = Profiler(path / "profile", start + 3, config.train.profile_steps if jax.process_index() == 0 else 0)
    pending: list[dict] = []
    pending += run.checkpointer.unlogged
    counters: collections.deque = collections.deque(maxlen=2)

    def next_batch() -> Any:
        with account.during("data"):
            return next(run.iterator)

    if stage.rollout is not None:
        log = PromptLog(path, start, run.mesh)
        rollout = distributed.meeting(make_rollout(config, stage))
        rollouts = Rollouts(config.grpo, stage, rollout, next_batch, run.mesh, log)
        repeats = config.grpo.updates_per_rollout

    def evaluate(step: int) -> None:
        with account.during("evaluate"):
            found = _evaluate(config, stage, state)
        scalars = {f"{run.measured}/{k}": v for k, v in found.items() if isinstance(v, (int, float))}
        logs.write(step, scalars, tuple(scalars))
        watch.see(step, scalars, found)

    if stage.evaluate is not None and config.eval.at_start and not watch.has(0) and start == 0:
        evaluate(0)
        if config.train.patience:
            saver.save(0, state, logs)
    account.enter("compile")
    if watch.is_over():
        logs.say(f"{name} ends at step {start}: {watch} (config.train.patience {config.train.patience})")
    for step in () if watch.is_over() else range(start + 1, total + 1):
        profiler.before(step)
        batch = next_batch() if rollouts is None else rollouts.batch(state, step)
        state, metrics = step_fn(state, batch)
        pending.append(metrics)
        profiler.after(step, metrics)
        # Note: of the step before the last, so that the device never waits for this.
        counters.append(metrics["in_a_row"])
        with account.during(goodput.DEVICE if step > start + 1 else "compile"):
            check_bad(config, run.checkpointer, step - 1, counters[0])
        if step == start + 1:
            jax.block_until_ready(metrics)
            logs.progress.restart_clock(step)
            account.enter("step")
            meter.restart()
            timed = step
        elif step % config.train.log_every == 0 or step == total:
            with account.during(goodput.DEVICE):
                jax.block_until_ready(metrics)
            meter.count(step - timed)
        if step % config.train.log_every == 0 or step in (1, total):
            means = mean_metrics(pending)
            pending = []
            if stage.check is not None:
                stage.check(means)
            speed, timed = meter.flush(), step
            logs.write(step, means | (speed and speed | account.metrics()), stage.headline)
            if meter.news:
                logs.say(f"{name} warning: {meter.news}")
            if rollouts is not None:
                rollouts.log_histograms(step, logs.writer)
        if rollouts is not None:
            rollouts.log_samples(state, step, path)
        is_watched = step < total or config.train.patience
        if stage.evaluate is not None and config.eval.every and step % config.eval.every == 0 and is_watched:
            evaluate(step)
        # Note: a rollout in progress is not part of the checkpoint, so saves (and stops) fall between rollouts.
        if step % repeats == 0 or step == total:
            why = run.signals.stop()
            is_due = saver.is_due(step)
            is_over = step == total or watch.is_over()
            is_last = why is not None or is_over
            if is_last:
                check_bad(config, run.checkpointer, step, metrics["in_a_row"])
            if is_over and config.train.patience:
                state = _best_state(run, state, watch, logs)
            if is_last or is_due or saver.is_local_due(step):
                if rollouts is not None:
                    rollouts.prompts.flush()
                with account.during(goodput.DEVICE):
                    jax.block_until_ready(metrics)
                with account.during("save"):
                    is_local = not (is_last or is_due)
                    saver.save(step, state, logs, unlogged=pending, is_last=is_last, is_local=is_local)
                account.note(step)
            if is_over:
                break
            if why is not None:
                logs.close()
                raise Stopped(f"{name} {why}: saved step {step} of {path}; the same command goes on from there")
        account.beat(step)
    account.enter("save")
    profiler.close()
    if rollouts is not None:
        rollouts.prompts.close()
    return state, logs, watch


def _best_state(run: _Run, state: TrainState, watch: best.Watch, logs: Logs) -> TrainState:
    """The state with the parameters of the best evaluation, which its checkpoint holds."""
    step = int(state.step)
    if watch.is_over() and step < run.config.train.steps:
        logs.say(f"[{run.config.stage}] ends at step {step}: {watch}")
    if watch.best is None or watch.best_step == step:
        return state
    kept = run.checkpointer.kept_best()
    if kept is None or kept[0] != watch.best_step:
        rest = "the last parameters are" if kept is None else f"those of step {kept[0]} ({kept[1]:.4g}) are"
        logs.say(f"[{run.config.stage}] warning: the parameters of step {watch.best_step}, the best evaluation"
                 f" ({watch.best:.4g}), are not among the checkpoints; {rest} taken")  # fmt: skip
        watch.take(*(kept or (step, None)))
        if kept is None or kept[0] == step:
            return state
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state.params)
    params = runs.load_params(run.path, shapes, step=watch.best_step)
    runs.require_complete(params, shapes, str(run.path))
    assert watch.best is not None  # Note: it is kept with one.
    logs.know(step, {run.config.train.best_metric: watch.best})
    # Note: what a checkpoint gives is the average already, where a run has one.
    ema = jax.tree.map(lambda a, old: a.astype(old.dtype), params, state.ema) if state.ema else state.ema
    return dataclasses.replace(state, params=params, ema=ema)


def mean_metrics(pending: list[dict]) -> dict[str, float]:
    """Means over the updates that were not skipped (NaN if there is none), and the number of those that were."""
    pending = jax.device_get(pending)
    # Note: those that a checkpoint gives are plain numbers.
    pending = [{name: np.float32(value) for name, value in m.items()} for m in pending]
    good = [m for m in pending if not m["skipped"]]
    names = [name for name in pending[0] if name not in ("skipped", "in_a_row")]
    means = {name: float(np.mean([m[name] for m in good])) for name in names} if good else {}
    return means | {"skipped": float(sum(m["skipped"] for m in pending))}


def _evaluate(config: ExperimentConfig, stage: Stage, state: TrainState) -> dict:
    assert stage.evaluate is not None  # Note: the callers ask.
    with adapters.applied(config.lora):
        return stage.evaluate(state.eval_params())


def _final_evaluation(config: ExperimentConfig, stage: Stage, state: TrainState, logs: Logs, measured: str) -> dict:
    """Evaluates at the end, writes and prints it."""
    evaluation: dict = {}
    if stage.evaluate is not None and config.eval.num_samples:
        began = time.monotonic()
        evaluation = _evaluate(config, stage, state)
        scalars = {k: v for k, v in evaluation.items() if isinstance(v, (int, float))}
        logs.write(int(state.step), {f"{measured}/{k}": v for k, v in scalars.items()})
        line = "  ".join(f"{k} {v:.4g}" for k, v in scalars.items())
        where = "" if measured == "eval" else " on training data"
        logs.say(f"[{config.stage}] evaluation{where} ({duration(time.monotonic() - began)}): {line}")
    return evaluation


def _result(config: ExperimentConfig, path: pathlib.Path, steps: int, evaluation: dict, seconds: float) -> dict:
    """The run in short; first and last are means over the first and last quarter of the logged steps."""
    records = [r for r in distributed.from_first(lambda: read_metrics(path)) if "loss" in r]
    quarter = max(len(records) // 4, 1)

    def mean(part: list[dict]) -> dict[str, float]:
        names = [k for k in part[0] if k != "step" and all(k in r for r in part)]
        return {k: float(np.mean([r[k] for r in part])) for k in names}

    return {
        "stage": config.stage,
        "steps": steps,
        "seconds": round(seconds, 1),
        "metrics_first": mean(records[:quarter]) if records else {},
        "metrics_last": mean(records[-quarter:]) if records else {},
        **evaluation,
    }


def evaluate(config: ExperimentConfig, workdir: str | os.PathLike) -> dict:
    """Evaluates the newest checkpoint of a run, on held-out data if there are some, and prints the numbers.

    Args:
      config: the run's configuration.
      workdir: the run's directory, or its URL.

    Returns:
      {metric: value}, with names of the stage.

    Raises:
      ConfigError: the directory belongs to another configuration, or nothing is to be evaluated.
      FileNotFoundError: the directory holds no checkpoint.
    """
    path, _ = runs.find_run(workdir)
    distributed.from_first(lambda: str(claim_workdir(path, config, is_training=False)))
    _name_evaluation(config)
    mesh = run_mesh(config)
    stage = make_stage(config, mesh, path)
    if stage.evaluate is None:
        raise ConfigError(f"config.eval.num_samples: expected at least 1 to evaluate, got {config.eval.num_samples}")
    abstract = abstract_state(config, stage, make_optimizer(config.optim, config.train.steps), mesh)
    wanted = merge_params(abstract.params, abstract.frozen)
    params = runs.load_params(path, wanted)
    if config.lora.rank:
        base = loading.load_base(runs.load_meta(path), adapters.without_adapters(wanted), str(workdir))
        params = merge_params(base, params)
    runs.require_complete(params, wanted, str(workdir))
    with adapters.applied(config.lora):
        result = stage.evaluate(params)
    print(json.dumps({k: v for k, v in result.items() if not isinstance(v, list)}, indent=2))
    return result
