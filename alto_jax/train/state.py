"""TrainState and the optimizer."""

import re
from typing import Any

from flax import struct, traverse_util
import jax
import jax.numpy as jnp
import optax

from alto_jax.experiment import OptimConfig
from alto_jax.params import cast, merge_params, split_params
from alto_jax.train import schedules


@struct.dataclass
class TrainState:
    """Everything that a training run must remember.

    step: int32 scalar, steps done (updates that were skipped included). params: trainable parameters (nested
    dict without the frozen ones). frozen: the rest; no gradient, no optimizer state. opt_state: optax state of
    `params`. stats: what a stage keeps between steps beside parameters (such as code usage), a nested dict of
    arrays. ema: moving average of `params`, float32, {} if there is none. guard: counters of skipped updates,
    see `alto_jax.train.step`.
    """

    step: jax.Array
    params: Any
    frozen: Any
    opt_state: Any
    stats: Any
    ema: Any = struct.field(default_factory=dict)
    guard: Any = struct.field(default_factory=dict)

    def all_params(self) -> dict:
        """Trainable and frozen parameters as one nested dict."""
        return merge_params(self.params, self.frozen)

    def eval_params(self) -> dict:
        """All parameters for evaluation: with the moving average in place of the trained ones, if there is one."""
        averaged = jax.tree.map(lambda average, p: average.astype(p.dtype), self.ema, self.params) if self.ema else {}
        return merge_params(averaged or self.params, self.frozen)


def make_schedule(cfg: OptimConfig, total_steps: int) -> optax.Schedule:
    """Learning rate of each update, as a function of the number of updates done before it."""
    if cfg.schedule == "reference":
        return schedules.reference_stage1_schedule(cfg.lr, cfg.warmup_steps, total_steps, cfg.final_ratio)
    if cfg.schedule == "constant":
        return schedules.constant_schedule(cfg.lr)
    return schedules.cosine_with_warmup(cfg.lr, cfg.warmup_steps, total_steps, cfg.final_ratio)


def make_optimizer(cfg: OptimConfig, total_steps: int) -> optax.GradientTransformation:
    """Global-norm clipping, AdamW, schedule; weight decay everywhere but on paths that match `no_decay`."""

    def decay_mask(params: dict) -> dict:
        flat = traverse_util.flatten_dict(params, sep="/")
        return traverse_util.unflatten_dict({p: not re.search(cfg.no_decay, p) for p in flat}, sep="/")

    return optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm),
        optax.adamw(
            make_schedule(cfg, total_steps),
            b1=cfg.b1,
            b2=cfg.b2,
            eps=cfg.eps,
            weight_decay=cfg.weight_decay,
            mask=decay_mask,
        ),
    )


def create_state(
    params: dict,
    trainable: str,
    optimizer: optax.GradientTransformation,
    stats: dict,
    cfg: OptimConfig | None = None,
) -> TrainState:
    """A state at step 0; pure, so that it can be traced for shapes and shardings.

    Args:
      params: all parameters.
      trainable: regex of the trained ones.
      optimizer: of `make_optimizer`.
      stats: what the stage keeps.
      cfg: types of the parameters and the moving average; None: as they are, without an average.
    """
    cfg = OptimConfig() if cfg is None else cfg
    chosen, frozen = split_params(params, trainable)
    chosen, frozen = cast(chosen, cfg.param_dtype), cast(frozen, cfg.frozen_dtype, keep=cfg.frozen_float32)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=chosen,
        frozen=frozen,
        opt_state=optimizer.init(cast(chosen, "float32")),
        stats=stats,
        # Note: a copy, since no buffer may be donated twice.
        ema=jax.tree.map(jnp.copy, cast(chosen, "float32")) if cfg.ema_decay else {},
        guard={"skipped": jnp.zeros((), jnp.int32), "in_a_row": jnp.zeros((), jnp.int32)}
        | {name: jnp.zeros((), jnp.float32) for name in ("loss_mean", "loss_variance")},
    )


def apply_updates(params: Any, updates: Any, key: jax.Array) -> Any:
    """The parameters plus the float32 updates, in the parameters' types.

    Those in bfloat16 are rounded up or down by chance, so that the mean is right: rounded to the nearest, updates of
    less than half a step (1/256 of the value) would be lost, at a learning rate of 1e-6 all but two in a hundred.
    """

    def add(number: int, value: jax.Array, update: jax.Array) -> jax.Array:
        new = value.astype(jnp.float32) + update
        if value.dtype != jnp.bfloat16:
            return new.astype(value.dtype)
        below = jax.random.bits(jax.random.fold_in(key, number), value.shape, jnp.uint16).astype(jnp.uint32)
        # Note: bfloat16 is the upper half of a float32.
        bits = (jax.lax.bitcast_convert_type(new, jnp.uint32) + below) & jnp.uint32(0xFFFF0000)
        return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.bfloat16)

    numbers = jax.tree.unflatten(jax.tree.structure(params), range(len(jax.tree.leaves(params))))
    return jax.tree.map(add, numbers, params, updates)
