"""A fixed budget of two tokens (as SAMTok, 2026) against adaptive length: what does adaptivity buy?

    python -m experiments.two_tokens --checkpoint alto-tiny --out experiments/results/two_tokens

In: a checkpoint with a mask tokenizer. It is trained on a little, with equal updates on the same masks: for exactly two
tokens, for a random number as in stage 1, and for the lengths that its predictor says. Then gIoU at two tokens, at the
adaptive length, and at one fixed length of the same mean; and as it is, without training. The same command gives the
same table, and goes on where it stopped.
"""

import argparse
import dataclasses
from typing import Any

import numpy as np

from alto_jax import cli, figures
from alto_jax.checkpoint import loading
from experiments import adapt, tokens, trials

BUDGET = 2
COUNTS = (1, 2, 4, 8, 12, 16, 20, 24, 32)  # that are measured; between them straight lines
ARMS: dict[str, int | str] = {"two tokens": BUDGET, "a random number": "random", "the predictor's lengths": "adaptive"}


def row_of(name: str, table: tokens.Table) -> dict[str, Any]:
    """gIoU at the budget, and by adaptive and fixed length, of a table."""
    mean, most = float(table.length.mean()), table.iou.shape[1]
    adaptive, fixed = tokens.at_length(table.iou, table.length), tokens.at_length(table.iou, mean)
    several = table.targets >= 4
    parts = {"4 to 8 targets": several, "1 to 3 targets": ~several}
    row = {"trained for": name, "giou_2": tokens.at_length(table.iou, BUDGET), "adaptive": adaptive,
           "mean_length": mean, "fixed_same_mean": fixed, "gain": adaptive - fixed,
           f"giou_{most}": tokens.at_length(table.iou, most)}  # fmt: skip
    for part, chosen in parts.items():
        iou, length = table.iou[chosen], table.length[chosen]
        row |= {f"{part}: 2": tokens.at_length(iou, BUDGET), f"{part}: adaptive": tokens.at_length(iou, length)}
    return row


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Trains what is missing and gives a row for each arm and seed, without training first."""
    model, runs = loading.load_model(options.checkpoint), options.out / "runs"
    settings = {"checkpoint": model.identity, "masks": options.masks}
    rows = []
    for seed in options.seeds:
        for name, kept in {"nothing": None, **ARMS}.items():

            def measure(name: str = name, kept: Any = kept, seed: int = seed) -> dict[str, Any]:
                changed = model
                if kept is not None:
                    given = {"seed": seed, "steps": options.steps, "batch_size": options.batch_size}
                    changed = dataclasses.replace(model, params=adapt.adapt(model, kept=kept, **given))
                table = tokens.measure(changed, options.masks, withheld=False, counts=COUNTS)
                curve = {str(k): float(table.iou[:, k - 1].mean()) for k in COUNTS if k <= table.iou.shape[1]}
                return {"row": row_of(name, table), "curve": curve}

            trained = {} if kept is None else {"steps": options.steps, "batch_size": options.batch_size}
            file = runs / ("nothing.json" if kept is None else f"{kept}_{seed}.json")
            rows.append({"seed": seed, **trials.once(file, settings | trained, measure)})
    return rows


def main() -> int:
    """The command; see the module's docstring."""
    parser = trials.parser("two_tokens", __doc__, steps=200)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--masks", type=int, default=512)
    options = trials.parse(parser)
    rows = run(options)
    flat = [{"seed": row["seed"], **row["row"]} for row in rows]
    shown = trials.means(flat, "trained for", spread=("giou_2", "gain"))
    curves: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(row["row"]["trained for"] for row in rows):
        same = [row["curve"] for row in rows if row["row"]["trained for"] == name]
        curves[name] = {k: float(np.mean([curve[k] for curve in same])) for k in same[0]}
    figure = figures.panels_figure(
        {"gIoU of the first tokens": [
            figures.Series(f"trained for {name}", [int(k) for k in curve], [*curve.values()], "both")
            for name, curve in curves.items()
        ]}, "mask tokens", ["gIoU"],
    )  # fmt: skip
    trials.write(options.out, {"rows": flat, "means": shown, "curves": curves}, {"": shown}, figure)
    return 0


if __name__ == "__main__":
    cli.run(main)
