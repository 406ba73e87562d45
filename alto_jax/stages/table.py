"""The stages by name: what `config.stage` may say, and the module that makes each."""

from collections.abc import Callable
import dataclasses
import functools
import os
from typing import Any

import jax

from alto_jax import layers
from alto_jax.experiment import ExperimentConfig
from alto_jax.parallel.sharding import constrain_batch, on_mesh
from alto_jax.stages import grpo, sft, tokenizer
from alto_jax.stages.stage import Stage

STAGES: dict[str, Callable[..., Stage]] = {
    "stage0": sft.make_text_stage,
    "stage1": tokenizer.make,
    "stage1_5": tokenizer.make,
    "stage2": sft.make,
    "stage3": grpo.make,
}


def make_stage(config: ExperimentConfig, mesh: jax.sharding.Mesh, directory: os.PathLike | None = None) -> Stage:
    """The stage that `config.stage` names, for a run in `directory` (None: for no run)."""
    stage = STAGES[config.stage](config, mesh, directory)
    roll = stage.rollout
    rollout = None if roll is None else on_mesh(mesh, lambda *args: constrain_batch(roll(*args)))
    told = functools.partial(_told, config.model.matmul_precision)
    return dataclasses.replace(
        stage,
        init=jax.jit(stage.init),  # traced once, though its shapes are asked for before it runs
        loss_fn=told(on_mesh(mesh, stage.loss_fn)),
        rollout=rollout and told(rollout),
        totals=stage.totals and told(stage.totals),
        evaluate=stage.evaluate and told(stage.evaluate),
        log_samples=stage.log_samples and told(stage.log_samples),
    )


def _told(precision: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a stage that computes with the configured precision."""

    @functools.wraps(function)
    def told(*args: Any, **kwargs: Any) -> Any:
        with layers.told_precision(precision):
            return function(*args, **kwargs)

    return told
