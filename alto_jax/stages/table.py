"""The stages by name: what `config.stage` may say, and the module that makes each."""

from collections.abc import Callable
import dataclasses
import os

import jax

from alto_jax.experiment import ExperimentConfig
from alto_jax.parallel.sharding import constrain_batch, on_mesh
from alto_jax.stages import grpo, sft, tokenizer
from alto_jax.stages.stage import Stage

STAGES: dict[str, Callable[..., Stage]] = {
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
    return dataclasses.replace(stage, loss_fn=on_mesh(mesh, stage.loss_fn), rollout=rollout)
