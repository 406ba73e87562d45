"""The jitted update of all stages, and the jitted rollout of stage 3.

`(state, batch) -> (state, metrics)`: loss and gradients (of micro-batches in turn, if `train.accumulate` asks for
it), the optimizer, the moving average of the parameters, and the guard against updates that would do harm.

The guard: an update is bad if its loss or gradient is not finite, or, with `train.spike_sigmas` = s > 0 and after
SPIKE_AFTER good updates, if its loss exceeds m + s * d, where m and d are mean and standard deviation of the losses
so far (exponentially weighted, SPIKE_DECAY; a spike counts as m + s * d). After SPIKE_PATIENCE bad updates in a row
(fewer, if `train.max_bad_steps` is no more) a finite loss is no spike but a new level, from which m and d go on.
A bad update changes nothing in the state but its counters, m and d: `step` goes on (the data is consumed),
`guard["skipped"]` counts all, `guard["in_a_row"]` the last ones.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import optax

from alto_jax.config import ConfigError
from alto_jax.experiment import ExperimentConfig, TrainConfig
from alto_jax.lora import adapters
from alto_jax.parallel import sharding
from alto_jax.params import cast, merge_params, watched
from alto_jax.stages.stage import Stage
from alto_jax.train.state import TrainState, apply_updates, make_schedule

SPIKE_AFTER = 100
SPIKE_DECAY = 0.98
SPIKE_PATIENCE = 5


def make_step(config: ExperimentConfig, stage: Stage, optimizer: optax.GradientTransformation, shardings: Any) -> Any:
    """The jitted update `(state, batch) -> (state, metrics)`; the state is donated and keeps its `shardings`.

    Args:
      config: the run's configuration.
      stage: loss, and what is drawn and kept.
      optimizer: of `make_optimizer`.
      shardings: a TrainState of shardings.

    Returns:
      The jitted function. Its metrics are float32 scalars; beside the stage's: loss, grad_norm, learning_rate,
      skipped (1 if the update was bad), in_a_row (bad updates up to this one), grad_norm/GROUP and
      update_norm/GROUP of the top-level modules.
    """
    schedule = make_schedule(config.optim, config.train.steps)
    mesh = shardings.step.mesh

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict]:
        rng = jax.random.fold_in(jax.random.key(config.seed), state.step)
        loss, metrics, aux, grads = _gradients(config, stage, state, batch, rng, mesh)
        grad_norm = optax.global_norm(grads)
        grads, params = cast(grads, "float32"), cast(state.params, "float32")
        updates, opt_state = optimizer.update(grads, state.opt_state, params)
        params = apply_updates(state.params, updates, jax.random.fold_in(rng, 2))
        updated = dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state)
        if stage.after_update is not None:
            updated = stage.after_update(updated, aux, jax.random.fold_in(rng, 1))
        done = state.step - state.guard["skipped"]
        if state.ema:
            decay = jnp.minimum(config.optim.ema_decay, (1.0 + done) / (10.0 + done))
            average = lambda old, new: decay * old + (1 - decay) * new.astype(jnp.float32)
            updated = dataclasses.replace(updated, ema=jax.tree.map(average, state.ema, updated.params))
        bad, guard = _guard(state, loss, grad_norm, done, config.train)
        keep = lambda old, new: jax.tree.map(lambda o, n: jnp.where(bad, o, n), old, new)
        updated = dataclasses.replace(
            updated,
            params=keep(state.params, updated.params),
            opt_state=keep(state.opt_state, updated.opt_state),
            stats=keep(state.stats, updated.stats),
            ema=keep(state.ema, updated.ema),
            guard=guard,
        )
        metrics = {
            "loss": loss,
            **metrics,
            "grad_norm": grad_norm,
            "learning_rate": schedule(done),
            "skipped": bad,
            "in_a_row": guard["in_a_row"],
            **_norms("grad_norm", grads),
            **_norms("update_norm", updates),
        }
        return updated, jax.tree.map(lambda m: m.astype(jnp.float32), metrics)

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def make_rollout(config: ExperimentConfig, stage: Stage) -> Any:
    """The jitted rollout `(state, batch, attempt) -> batch for the loss`; attempts of one step differ in their keys."""
    roll = stage.rollout
    if roll is None:
        raise ValueError(f"config.stage: expected a stage with rollouts, got {config.stage!r}")

    def rollout(state: TrainState, batch: Any, attempt: Any = 0) -> Any:
        rng = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), state.step), 2 + attempt)
        with adapters.applied(config.lora):
            rolled = roll(state.all_params(), batch, rng)
        # Note: for its shapes alone, so that what is not trained is refused before the first rollout is compiled.
        jax.eval_shape(_checked_gradients(config, stage, state), state.params, rolled, None)
        return rolled

    return jax.jit(rollout)


def _gradients(
    config: ExperimentConfig, stage: Stage, state: TrainState, batch: Any, rng: jax.Array, mesh: jax.sharding.Mesh
) -> tuple[jax.Array, dict, Any, Any]:
    """(loss, metrics, aux, gradients) of a batch, computed at once or in `config.train.accumulate` parts."""
    parts, rows = config.train.accumulate, jax.tree.leaves(batch)[0].shape[0]
    drawn = None if stage.draw is None else stage.draw(rng, rows)

    grad_fn = _checked_gradients(config, stage, state)
    if parts == 1:
        (loss, (metrics, aux)), grads = grad_fn(state.params, batch, drawn)
        return loss, metrics, aux, grads

    pieces = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % (parts * pieces):
        raise ValueError(
            f"config.train.accumulate: {rows} rows do not split into {parts} micro-batches over {pieces} devices"
        )
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, *sharding.batch_spec()))

    def split(array: jax.Array) -> jax.Array:
        # Note: every micro-batch takes rows of every device, so that no row moves.
        array = array.reshape(rows // parts, parts, *array.shape[1:]).swapaxes(0, 1)
        is_key = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
        return array if is_key else jax.lax.with_sharding_constraint(array, spec)

    def join(array: jax.Array) -> jax.Array:
        return array.swapaxes(0, 1).reshape(rows, *array.shape[2:])

    micro = jax.tree.map(split, (batch, drawn))
    totals: tuple[dict[str, jax.Array], ...] = ()
    if (count_totals := stage.totals) is not None:
        counts = jax.lax.map(lambda m: count_totals(state.all_params(), m), micro[0])
        totals = (jax.tree.map(lambda count: jnp.sum(count, axis=0) / parts, counts),)

    def accumulate(sums: Any, part: Any) -> tuple[Any, Any]:
        (loss, (metrics, aux)), grads = grad_fn(state.params, *part, *totals)
        return jax.tree.map(lambda s, value: s + value.astype(s.dtype), sums, (loss, metrics, grads)), aux

    shapes = jax.eval_shape(grad_fn, state.params, *jax.tree.map(lambda a: a[0], micro), *totals)
    (loss, (metrics, _)), grads = shapes
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), (loss, metrics, grads))
    sums, aux = jax.lax.scan(accumulate, zeros, micro)
    loss, metrics, grads = jax.tree.map(lambda s: s / parts, sums)
    return loss, metrics, jax.tree.map(join, aux), grads


def _checked_gradients(config: ExperimentConfig, stage: Stage, state: TrainState) -> Callable:
    """`(params, batch, drawn, *totals) -> ((loss, (metrics, aux)), gradients)`.

    Raises, when it is traced:
      ConfigError: the loss has no gradient for a parameter that is to be trained; names the field and the parameter.
    """

    def compute(params: dict, batch: Any, drawn: Any, *totals: dict[str, jax.Array]) -> Any:
        reached: set[str] = set()

        def loss_fn(params: dict) -> tuple[jax.Array, tuple]:
            params = watched(params, reached)
            with adapters.applied(config.lora):
                return stage.loss_fn(merge_params(params, state.frozen), batch, drawn, state.step, *totals)

        found = jax.value_and_grad(loss_fn, has_aux=True)(params)
        lost = sorted(set(traverse_util.flatten_dict(params, sep="/")) - reached)
        if lost:
            name = "lora.targets" if config.lora.rank else "optim.trainable"
            value = config.lora.targets if config.lora.rank else config.optim.trainable
            raise ConfigError(
                f"config.{name}: {value!r} names {len(lost)} parameters that the loss of {config.stage} does not read,"
                f" such as {lost[0]}; weight decay alone would change them"
            )
        return found

    return compute


def _guard(
    state: TrainState, loss: jax.Array, grad_norm: jax.Array, done: jax.Array, cfg: TrainConfig
) -> tuple[jax.Array, dict]:
    """Whether the update is bad, and the counters after it."""
    guard, loss = state.guard, loss.astype(jnp.float32)
    mean, variance, in_a_row = guard["loss_mean"], guard["loss_variance"], guard["in_a_row"]
    is_finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    is_first = (mean == 0) & (variance == 0)
    is_spike = is_level = jnp.bool_(False)
    sigmas, seen = cfg.spike_sigmas, loss
    if sigmas > 0:
        highest = mean + sigmas * jnp.sqrt(variance)
        is_high = is_finite & (done >= SPIKE_AFTER) & ~is_first & (loss > highest)
        is_level = is_high & (in_a_row >= max(min(SPIKE_PATIENCE, cfg.max_bad_steps - 1), 1))
        is_spike = is_high & ~is_level
        seen = jnp.where(is_spike, highest, loss)
    # Note: also while the guard is off, so that it may be turned on later.
    delta, weight = jnp.clip(seen - mean, -1e18, 1e18), jnp.where(is_first | is_level, 1.0, 1 - SPIKE_DECAY)
    spread = jnp.where(is_first, 0.0, SPIKE_DECAY * (variance + weight * delta**2))
    # Note: one loss says nothing of the deviation at its level. Until that has settled, twice the jump is a spike.
    spread = jnp.where(is_level, (delta / max(sigmas, 1e-9)) ** 2, spread)
    bad = ~is_finite | is_spike
    return bad, {
        "skipped": guard["skipped"] + bad,
        "in_a_row": jnp.where(bad, in_a_row + 1, 0),
        "loss_mean": jnp.where(is_finite, mean + weight * delta, mean),
        "loss_variance": jnp.where(is_finite, spread, variance),
    }


def _norms(name: str, tree: Any) -> dict[str, jax.Array]:
    """L2 norms of the groups of a tree of parameters: its top-level modules, and those of the mask tokenizer."""
    groups: dict[str, Any] = {}
    for top, inner in tree.items():
        is_split = top == "tokenizer" and isinstance(inner, dict)
        groups |= {f"{top}/{part}": leaf for part, leaf in inner.items()} if is_split else {top: inner}
    return {f"{name}/{group}": optax.global_norm(leaves) for group, leaves in groups.items()}
