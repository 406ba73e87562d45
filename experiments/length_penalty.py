"""What does the length penalty of stage 1.5 buy? (the paper's figure 8, at the small size)

    python -m experiments.length_penalty --checkpoint alto-tiny --out experiments/results/length_penalty

In: a checkpoint with a mask tokenizer. For every penalty and seed a length predictor is trained from nothing (stage
1.5); the rest is frozen, so that one table of IoUs by number of tokens serves all. Controls: a predictor that is not
trained, and a fixed length of the same mean. Runs stay in the out directory, and the command goes on where it stopped.
"""

import argparse
import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from alto_jax import cli, metrics
from alto_jax.checkpoint import loading
from alto_jax.config import ConfigError
from alto_jax.evaluate.paper import curves
from alto_jax.experiment import make_experiment
from alto_jax.train.loop import train
from configs import stage1_5
from experiments import tokens

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
SHOWN = {"giou": "gIoU", "mean_length": "mean length", "std_length": "standard deviation",
         "entropy_of_lengths": "entropy (nats)"}  # fmt: skip


def row_of(name: str, table: tokens.Table, lengths: np.ndarray) -> dict[str, Any]:
    """The numbers of a predictor's lengths [N] on the masks of a table."""
    found = tokens.summarize(dataclasses.replace(table, length=lengths))
    row = {"penalty": name, "giou": found["adaptive"], "fixed_same_mean": found["fixed_same_mean"]}
    row |= {"gain": found["adaptive"] - found["fixed_same_mean"], "best_same_mean": found["best_same_mean"]}
    row |= {n: found[n] for n in ("mean_length", "std_length", "entropy_of_lengths")}
    row |= {f"spearman_{n}": found[f"spearman_predicted_{n}"] for n in ("targets", "complexity")}
    area = table.area.astype(float)
    row["complexity_without_area"] = tokens.partial_spearman(lengths, table.complexity, area)
    return row | {"spearman_area": metrics.spearman(lengths, area)}


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Trains what is missing and gives a row a predictor: the untrained one first."""
    out = pathlib.Path(options.out)
    model = loading.load_model(options.checkpoint)
    table, rows = tokens.measure(model, options.masks), []
    for seed in options.seeds:
        for penalty in (None, *options.penalties):
            config = stage1_5.get_config("tiny")
            config.model.tokenizer = json.loads(json.dumps(dataclasses.asdict(model.cfg.tokenizer)))
            config.init_from, config.seed = options.checkpoint, seed
            config.train.steps = options.steps if penalty else 1
            config.train.checkpoint_every = 0
            config.eval.num_samples = 0
            config.tokenizer.loss.length = penalty or 0.0
            if not penalty:  # the predictor as it is drawn
                config.optim.lr = 0.0
            name = f"{penalty:g}" if penalty else "untrained"
            train(make_experiment(config), out / "runs" / f"{name}_{seed}")
            lengths = tokens.lengths(loading.load_model(out / "runs" / f"{name}_{seed}"), options.masks)
            rows.append({"seed": seed, **row_of(name, table, lengths)})
    return rows


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds, with the standard deviation of the gain."""
    found = []
    for name in dict.fromkeys(row["penalty"] for row in rows):
        same = [row for row in rows if row["penalty"] == name]
        numbers = [key for key in same[0] if key not in ("penalty", "seed")]
        mean = {key: float(np.mean([row[key] for row in same])) for key in numbers}
        found.append({"penalty": name, **mean, "std_of_gain": float(np.std([row["gain"] for row in same]))})
    return found


def main() -> int:
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m experiments.length_penalty", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a run's directory, or alto-tiny")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--penalties", default=",".join(map(str, PENALTIES)), help="with commas between")
    parser.add_argument("--seeds", default="0,1,2", help="with commas between")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--masks", type=int, default=512)
    options = parser.parse_args()
    cli.check_paths({"checkpoint": options.checkpoint, "out": options.out})
    try:
        options.penalties = [float(value) for value in options.penalties.split(",")]
        options.seeds = [int(value) for value in options.seeds.split(",")]
    except ValueError as error:
        raise ConfigError(f"--penalties, --seeds: expected numbers with commas between: {error}") from error
    rows, out = run(options), pathlib.Path(options.out)
    shown = means(rows)
    (out / "length_penalty.json").write_text(json.dumps({"rows": rows, "means": shown}, indent=2) + "\n")
    (out / "length_penalty.md").write_text(tokens.table_of(shown) + "\n")
    trained = {p: [row for row in rows if row["penalty"] == f"{p:g}"] for p in options.penalties}
    curves.save(curves.penalty_figure(trained, SHOWN), rows, out / "length_penalty")
    print(tokens.table_of(shown))
    return 0


if __name__ == "__main__":
    cli.run(main)
