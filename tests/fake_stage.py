"""A stage small enough to train in milliseconds: what the loop and the step do is the same for all stages."""

import dataclasses

import grain
import jax
import jax.numpy as jnp
import numpy as np

from alto_jax.experiment import make_experiment
from alto_jax.main import load_config
from alto_jax.stages.stage import Stage
from tests.conftest import ROOT

ROWS = 8


def config(**groups):
    """configs/stage1.py:debug for this stage: 12 steps of 8 rows, logged each, saved every second."""
    plain = load_config(str(ROOT / "configs" / "stage1.py:debug")).to_dict()
    plain["train"].update({"steps": 12, "batch_size": ROWS, "log_every": 1, "checkpoint_every": 2})
    plain["optim"].update(
        {"trainable": "^(tokenizer/encoder|vision)/", "lr": 0.02, "warmup_steps": 1, "clip_norm": 1e9}
    )
    for group, values in groups.items():
        plain[group].update(values)
    return make_experiment(plain)


class _Rows(grain.transforms.Map):
    """Index → a row of numbers, of which some are spoilt by `spoil(batch number, row)`."""

    def __init__(self, spoil):
        self.spoil = spoil

    def map(self, index):
        row = np.random.default_rng(index).normal(size=4).astype(np.float32)
        return {"x": row * self.spoil(index // ROWS), "weight": np.float32(1 + index % 3)}


def stage(spoil=lambda batch: 1.0) -> Stage:
    """Least squares with noise that is drawn, averaged over the rows, with the weights of the rows in a second term.

    Args:
      spoil: factor of all numbers of a batch, by its number (from 0): NaN, or large for a spike.
    """

    def init(key):
        shapes = {"encoder": (4, 3), "length": (2,)}
        made = {
            name: {"kernel": jax.random.normal(jax.random.fold_in(key, i), s)}
            for i, (name, s) in enumerate(shapes.items())
        }
        return {"tokenizer": made, "vision": {"kernel": jnp.ones((3, 2))}}

    def loss_fn(params, batch, drawn, step, totals=None):
        del step
        hidden = batch["x"] @ params["tokenizer"]["encoder"]["kernel"] @ params["vision"]["kernel"]
        rows = jnp.sum(jnp.square(hidden - drawn - jnp.sum(params["tokenizer"]["length"]["kernel"])), axis=1)
        weighted = jnp.sum(jnp.abs(hidden[:, 0]) * batch["weight"])
        count = jnp.sum(batch["weight"]) if totals is None else totals["weight"]
        return jnp.mean(rows) + weighted / count, ({"rows": jnp.mean(rows)}, batch["x"])

    def after_update(state, aux, rng):
        del rng
        return state.replace(stats={"seen": state.stats["seen"] + jnp.sum(aux, axis=0), "last": aux[-1]})

    return Stage(
        init=init,
        data=lambda share: iter(grain.MapDataset.range(ROWS * 100).map(_Rows(spoil)).batch(ROWS).to_iter_dataset()),
        loss_fn=loss_fn,
        draw=lambda rng, rows: jax.random.normal(rng, (rows, 2)),
        totals=lambda params, batch: {"weight": jnp.sum(batch["weight"])},
        init_stats=lambda: {"seen": jnp.zeros(4), "last": jnp.zeros(4)},
        after_update=after_update,
        headline=("loss",),
    )


def replace(stage: Stage, **changes) -> Stage:
    """The stage with other parts."""
    return dataclasses.replace(stage, **changes)
