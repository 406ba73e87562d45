"""A mask tokenizer that is trained on a little, from a checkpoint: other numbers of kept tokens, other pictures."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import json
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax

from alto_jax.batch import MaskBatch
from alto_jax.checkpoint import loading
from alto_jax.experiment import make_experiment
from alto_jax.parallel import sharding
from alto_jax.stages import tokenizer as stage
from alto_jax.stages.stage import Stage
from alto_jax.tokenizer.alto import TokenizerConfig
from alto_jax.train.loop import run_mesh
from configs import stage1

LEARNING_RATE = 2e-4  # a tenth of stage 1's, at its end


def adapt(
    model: loading.LoadedModel,
    *,
    seed: int,
    steps: int,
    batch_size: int,
    kept: int | str = "random",
    every: int = 1,
    change: Callable[[MaskBatch], MaskBatch] = lambda batch: batch,
) -> dict:
    """Trains encoder, codebook, de-tokenizer and image encoder by the loss of stage 1; gives the model's parameters.

    Args:
      model: the checkpoint.
      seed: of masks and draws; steps, batch_size: of the training.
      kept: tokens of each mask in the loss: so many, "random" (uniform), or as the length predictor says ("adaptive").
      every: a number of kept tokens holds for every so-many-th mask of a batch; the others keep a random number.
      change: what is done to each batch before it is used.
    """
    made, optimizer, step = _programs(model.cfg.tokenizer, seed, steps, batch_size, kept)
    params, batches = model.params["tokenizer"], made.data(sharding.BatchShare())
    state = jax.jit(optimizer.init)(params)
    for number in range(steps):
        key = jax.random.fold_in(jax.random.key(seed), number)
        drawn = {} if made.draw is None else made.draw(key, batch_size)
        if isinstance(kept, int):
            drawn["kept"] = jnp.where(jnp.arange(batch_size) % every == 0, kept, drawn["kept"])
        params, state = step(params, state, change(next(batches)), drawn, jnp.int32(number))
    return {**model.params, "tokenizer": jax.tree.map(np.asarray, params)}


@functools.cache
def _programs(
    tokenizer: TokenizerConfig, seed: int, steps: int, batch_size: int, kept: int | str
) -> tuple[Stage, optax.GradientTransformation, Callable[..., tuple]]:
    """The stage, its optimizer, and an update; see `adapt`."""
    config = stage1.get_config("tiny")
    config.model.tokenizer = json.loads(json.dumps(dataclasses.asdict(tokenizer)))
    config.seed = seed
    config.data.scenes.update({"num_scenes": steps * batch_size, "seed": 100 + seed})
    config.train.batch_size = batch_size
    config.tokenizer.update({"unquantized_steps": 0, "reseed_every": 0})
    config.tokenizer.keep_tokens = "adaptive" if kept == "adaptive" else "random"
    experiment = make_experiment(config)
    made = stage.make(experiment, run_mesh(experiment))
    schedule = optax.warmup_cosine_decay_schedule(LEARNING_RATE / 10, LEARNING_RATE, min(10, steps), steps + 1)
    # Note: the length predictor stays as it is, as in stage 1.
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.0))
    label = lambda tree: traverse_util.path_aware_map(lambda path, _: "length" not in path, tree)
    optimizer = optax.masked(optimizer, label)

    @jax.jit
    def step(params: dict, state: Any, batch: MaskBatch, drawn: Mapping[str, Any], number: jax.Array) -> tuple:
        grads = jax.grad(lambda p: made.loss_fn({"tokenizer": p}, batch, drawn, number)[0])(params)
        grads = traverse_util.path_aware_map(lambda path, g: jnp.zeros_like(g) if "length" in path else g, grads)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return made, optimizer, step
