"""What does the length penalty of stage 1.5 buy? (the paper's figure 8, at the small size)

    python -m experiments.length_penalty --checkpoint alto-tiny --out experiments/results/length_penalty

In: a checkpoint with a mask tokenizer. For every penalty and seed a length predictor is trained from nothing (stage
1.5). Controls: a predictor that is not trained, and a fixed length of the same mean. Runs stay in the out directory,
and the command goes on where it stopped; the same command gives the same table.
"""

import argparse
import dataclasses
from typing import Any

from alto_jax import cli
from alto_jax.checkpoint import loading
from alto_jax.evaluate.paper import curves
from experiments import predictors, trials

PENALTIES = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1)
SHOWN = {"giou": "gIoU", "mean_length": "mean length", "std_length": "standard deviation",
         "entropy_of_lengths": "entropy (nats)"}  # fmt: skip


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Trains what is missing and gives a row a predictor: the untrained one first."""
    model, runs = loading.load_model(options.checkpoint), options.out / "runs"
    table, rows = predictors.measured(model, options.masks, runs / "table.json"), []
    for seed in options.seeds:
        for penalty in (None, *options.penalties):
            name = "untrained" if penalty is None else f"{penalty:g}"
            lengths = predictors.train_lengths(
                options.checkpoint,
                dataclasses.asdict(model.cfg.tokenizer),
                runs / f"{name}_{seed}",
                seed=seed,
                steps=0 if penalty is None else options.steps,
                penalty=penalty or 0.0,
                masks=options.masks,
            )
            rows.append({"seed": seed, "penalty": penalty, **predictors.row_of(name, table, lengths)})
    return rows


def main() -> int:
    """The command; see the module's docstring."""
    parser = trials.parser("length_penalty", __doc__, steps=300)
    parser.add_argument("--penalties", default=",".join(map(str, PENALTIES)), help="with commas between")
    parser.add_argument("--masks", type=int, default=512)
    options = trials.parse(parser)
    options.penalties = trials.numbers("--penalties", options.penalties)
    rows = run(options)
    trained = {p: [row for row in rows if row["penalty"] == p] for p in options.penalties}
    shown = trials.means([{k: v for k, v in row.items() if k != "penalty"} for row in rows], "lengths by")
    trials.write(options.out, {"rows": rows, "means": shown}, {"": shown}, curves.penalty_figure(trained, SHOWN))
    return 0


if __name__ == "__main__":
    cli.run(main)
