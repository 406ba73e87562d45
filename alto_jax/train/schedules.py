"""Learning-rate schedules: functions from the optimizer step (0-based) to the learning rate.

Each constructor returns a jittable `step -> float32 scalar`, as optax expects. `step` k is the number of
updates done so far, so entry k is the rate that update k uses (NUMERICS section 6 and 7).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from alto_jax.config import require

Schedule = Callable[[jax.Array | int], jax.Array]


def constant_schedule(peak_lr: float) -> Schedule:
    """The same rate at every step: stage 3 of the reference, which ignores its own warm-up flag."""
    return lambda step: jnp.full(jnp.shape(step), peak_lr, jnp.float32)


def cosine_with_warmup(peak_lr: float, warmup_steps: int, total_steps: int, end_factor: float = 0.0) -> Schedule:
    """Linear warm-up from 0, then a half cosine to `end_factor * peak_lr` at `total_steps`, then constant.

    With `end_factor=0` it equals the `cosine` schedule of Hugging Face transformers (stage 2).

    Args:
      peak_lr: rate at step `warmup_steps`.
      warmup_steps: steps of the warm-up, at least 0; a shorter run ends inside it.
      total_steps: step at which the end is reached, at least 1.
      end_factor: final rate over peak rate, in 0..1.

    Raises:
      ValueError: a step count or the factor is out of range.
    """
    _check(warmup_steps, total_steps, end_factor)

    def schedule(step: jax.Array | int) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        warm = step / max(warmup_steps, 1)
        progress = jnp.clip((step - warmup_steps) / max(total_steps - warmup_steps, 1), 0.0, 1.0)
        return peak_lr * jnp.where(step < warmup_steps, warm, _cosine(progress, end_factor))

    return schedule


def reference_stage1_schedule(peak_lr: float, warmup_steps: int, total_steps: int, end_factor: float = 0.5) -> Schedule:
    """Compat: the reference's schedule of stages 1 and 1.5, which warms up twice.

    After the first warm-up the rate falls back to `peak_lr / warmup_steps` and warms up again; the cosine
    then runs on a clock that is `warmup_steps - 1` behind. Arguments as in `cosine_with_warmup`.

    Raises:
      ValueError: a step count or the factor is out of range.
    """
    _check(warmup_steps, total_steps, end_factor)

    def schedule(step: jax.Array | int) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        late = jnp.where(step < warmup_steps, step, step - max(warmup_steps, 1) + 1)
        progress = jnp.clip((late - warmup_steps) / max(total_steps - warmup_steps, 1), 0.0, 1.0)
        is_warm = late >= warmup_steps
        return peak_lr * jnp.where(is_warm, _cosine(progress, end_factor), late / max(warmup_steps, 1))

    return schedule


def _cosine(progress: jax.Array, end_factor: float) -> jax.Array:
    return end_factor + (1 - end_factor) * 0.5 * (1 + jnp.cos(jnp.pi * progress))


def _check(warmup_steps: int, total_steps: int, end_factor: float) -> None:
    require(total_steps >= 1, "optim.total_steps", total_steps, "at least 1")
    require(warmup_steps >= 0, "optim.warmup_steps", warmup_steps, "at least 0")
    require(0 <= end_factor <= 1, "optim.end_factor", end_factor, "a value in 0..1")
