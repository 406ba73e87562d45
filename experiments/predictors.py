"""Length predictors that are trained from nothing on a checkpoint's mask tokenizer (stage 1.5), and what each is worth.

All else is frozen, so that one table of IoUs by number of tokens, measured once, serves every predictor.
"""

from collections.abc import Mapping
import dataclasses
import functools
import json
import pathlib
from typing import Any

import numpy as np

from alto_jax import metrics
from alto_jax.checkpoint import loading
from alto_jax.experiment import make_experiment
from alto_jax.train.loop import train
from configs import stage1_5
from experiments import ceiling, tokens, trials


def measured(model: loading.LoadedModel, masks: int, path: pathlib.Path) -> tokens.Table:
    """The table of a checkpoint's tokenizer; kept in a file."""

    def plain() -> dict[str, list]:
        table = dataclasses.asdict(tokens.measure(model, masks, withheld=False, counts=ceiling.COUNTS))
        return {name: value.tolist() for name, value in table.items() if value is not None}

    found = trials.once(path, {"checkpoint": model.identity, "masks": masks}, plain)
    return tokens.Table(iou_withheld=None, **{name: np.array(values) for name, values in found.items()})


def train_lengths(
    start: str,
    tokenizer: Mapping[str, Any],
    out: pathlib.Path,
    *,
    seed: int,
    steps: int,
    penalty: float,
    masks: int,
    batch_size: int = 16,
    loss: Mapping[str, float] | None = None,
) -> np.ndarray:
    """Trains a predictor from nothing, or goes on with the run in `out`, and gives its lengths.

    Args:
      start: the checkpoint whose mask tokenizer it serves.
      tokenizer: its configuration, as plain values; the switches of the length predictor may differ.
      out: the run's directory.
      seed, steps, batch_size: of the run; 0 steps give the predictor as it is drawn.
      penalty: of a token, in the loss.
      masks: how many masks of `tokens.SCENES` are asked.
      loss: weights of the reconstruction in place of the configuration's.

    Returns:
      int[N], how many tokens each mask is given where it is used.
    """
    config = stage1_5.get_config("tiny")
    config.model.tokenizer = json.loads(json.dumps(tokenizer))
    config.init_from, config.seed = start, seed
    config.train.update({"steps": max(steps, 1), "batch_size": batch_size, "checkpoint_every": 0})
    config.optim.warmup_steps = steps // 10
    config.eval.num_samples = 0
    config.tokenizer.loss.update({**(loss or {}), "length": penalty})
    if not steps:  # the predictor as it is drawn
        config.optim.lr = 0.0
    train(make_experiment(config), out)
    settings = {"masks": masks, "run": out.name}
    ask = lambda: tokens.lengths(loading.load_model(out), masks).tolist()
    return np.array(trials.once(out / "lengths.json", settings, ask))


def row_of(name: str, table: tokens.Table, lengths: np.ndarray) -> dict[str, Any]:
    """The numbers of a predictor's lengths [N] on the masks of a table."""
    found = tokens.summarize(dataclasses.replace(table, length=lengths))
    row = {"lengths by": name, "giou": found["adaptive"], "fixed_same_mean": found["fixed_same_mean"]}
    row |= {"gain": found["adaptive"] - found["fixed_same_mean"], "best_same_mean": found["best_same_mean"]}
    row |= {n: found[n] for n in ("mean_length", "std_length", "entropy_of_lengths")}
    row |= {f"spearman_{n}": found[f"spearman_predicted_{n}"] for n in ("targets", "complexity")}
    area = table.area.astype(float)
    without = functools.partial(tokens.partial_spearman, given=area)
    row |= {f"{n}_without_area": without(lengths, getattr(table, n)) for n in ("targets", "complexity")}
    return row | {"spearman_area": metrics.spearman(lengths, area)}
