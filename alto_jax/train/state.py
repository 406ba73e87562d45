"""TrainState, the split into trainable and frozen parameters, and the optimizer."""

import dataclasses
import re
from typing import Any, Literal

from flax import struct, traverse_util
import jax
import jax.numpy as jnp
import optax

from alto_jax.config import require
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


def split_params(params: dict, trainable: str) -> tuple[dict, dict]:
    """Splits a nested dict by a regex on "a/b/c" paths into (trainable, frozen).

    Raises:
      ValueError: the regex matches no parameter.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    chosen = {path for path in flat if re.search(trainable, path)}
    if not chosen:
        raise ValueError(f"config.optim.trainable: {trainable!r} matches no parameter; top level: {sorted(params)}")

    def pick(keep):
        return traverse_util.unflatten_dict({p: v for p, v in flat.items() if (p in chosen) == keep}, sep="/")

    return pick(True), pick(False)


def merge_params(*trees: dict) -> dict:
    """Joins nested dicts with disjoint leaves."""
    flat: dict = {}
    for tree in trees:
        flat.update(traverse_util.flatten_dict(tree, sep="/"))
    return traverse_util.unflatten_dict(flat, sep="/")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule.

    schedule: "cosine" (one warm-up, then cosine to `final_ratio`), "constant" (no warm-up), or
    "reference" (the reference's stage 1, with its second warm-up). trainable, no_decay: regexes on
    parameter paths. clip_norm: global L2 norm of the gradient. ema_decay: moving average of the trained
    parameters (0: none), which evaluation, prediction and the next stage then take; the first updates count more,
    min(decay, (1 + n) / (10 + n)). param_dtype, frozen_dtype: type in which trained and frozen parameters are kept
    ("": the model's; gradients, optimizer state and average are float32 in any case). frozen_float32: regex of
    frozen parameters that keep their type, since the codes, lengths or pixels depend on every digit.
    """

    lr: float = 1e-5
    schedule: Literal["cosine", "constant", "reference"] = "cosine"
    warmup_steps: int = 1000
    final_ratio: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    trainable: str = ".*"
    no_decay: str = "^$"
    ema_decay: float = 0.0
    param_dtype: Literal["", "float32", "bfloat16"] = ""
    frozen_dtype: Literal["", "float32", "bfloat16"] = ""
    frozen_float32: str = "^tokenizer/(quantizer|length|pixel_decoder)/"

    def __post_init__(self):
        require(self.lr >= 0, "lr", self.lr, "at least 0")
        require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "at least 0")
        require(0 <= self.final_ratio <= 1, "final_ratio", self.final_ratio, "0..1")
        require(0 <= self.b1 < 1 and 0 <= self.b2 < 1, "b1, b2", (self.b1, self.b2), "0 <= b < 1")
        require(self.clip_norm > 0, "clip_norm", self.clip_norm, "more than 0")
        require(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "at least 0 and below 1")
        for name in ("trainable", "no_decay", "frozen_float32"):
            try:
                re.compile(getattr(self, name))
            except re.error as error:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not a regular expression: {error}") from error


def make_schedule(cfg: OptimConfig, total_steps: int) -> optax.Schedule:
    """Learning rate of each update, as a function of the number of updates done before it."""
    if cfg.schedule == "reference":
        return schedules.reference_stage1_schedule(cfg.lr, cfg.warmup_steps, total_steps, cfg.final_ratio)
    if cfg.schedule == "constant":
        return schedules.constant_schedule(cfg.lr)
    return schedules.cosine_with_warmup(cfg.lr, cfg.warmup_steps, total_steps, cfg.final_ratio)


def make_optimizer(cfg: OptimConfig, total_steps: int) -> optax.GradientTransformation:
    """Global-norm clipping, AdamW, schedule; weight decay everywhere but on paths that match `no_decay`."""

    def decay_mask(params):
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


def cast(params: dict, dtype: str, *, keep: str = "^$") -> dict:
    """The parameters in `dtype` ("": as they are), but for paths that match the regex `keep`."""
    if not dtype:
        return params
    flat = traverse_util.flatten_dict(params, sep="/")
    return traverse_util.unflatten_dict(
        {p: v if re.search(keep, p) else v.astype(dtype) for p, v in flat.items()}, sep="/"
    )
