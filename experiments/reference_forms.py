"""Our forms of the length predictor and its training against the reference's and the paper's, and another objective.

    python -m experiments.reference_forms --checkpoint alto-tiny --out experiments/results/reference_forms

In: a checkpoint with a mask tokenizer. One change at a time: for every form and seed a length predictor is trained from
nothing (stage 1.5), as in experiments/length_penalty.py, with the same columns; losses of another scale have a penalty
of theirs. "expected reward" is Σ p_k (IoU_k - cost k) over the IoUs of the first tokens, in place of the
straight-through chunking. Latent mixing changes the tokenizer itself, so that two are trained from nothing (stage 1),
with and without it, and a predictor on each. Runs stay in the out directory, and the command goes on where it stopped.
"""

import argparse
import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from alto_jax import cli, figures
from alto_jax.checkpoint import loading
from alto_jax.experiment import make_experiment
from alto_jax.train.loop import train
from configs import stage1
from experiments import ceiling, predictors, tokens, trials

PENALTY = 0.012  # of a token, where the loss is ours
_NO_OTHER = {"bce": 0.0, "dice": 0.0}
# name → (switches of the tokenizer, weights of the loss, penalty of a token)
FORMS: dict[str, tuple[dict[str, str], dict[str, float], float]] = {
    "ours": ({}, {}, PENALTY),
    "logits times √W (reference)": ({"length_logit_scale": "multiply"}, {}, PENALTY),
    "SwiGLU gate (paper)": ({"length_gate": "silu"}, {}, PENALTY),
    "labels a token shorter (reference)": ({"length_rule": "reference"}, {}, PENALTY),
    "edge-weighted loss (reference)": ({}, _NO_OTHER | {"edge_weighted_mse": 1.0, "edge": 0.2}, PENALTY / 8),
    "mean squared error (paper)": ({}, _NO_OTHER | {"mse": 1.0}, PENALTY / 8),
}
COST = 0.002  # of a token, in IoU, for the expected reward
MIXED_SIZE = "tiny"  # of the tokenizers from nothing
MIXED = {"from nothing, codes in order": False, "from nothing, latents mixed (reference)": True}


def expected_reward(model: loading.LoadedModel, options: argparse.Namespace, seed: int) -> list[int]:
    """Lengths of the masks of `tokens.SCENES` by a predictor trained on the IoUs of each mask's first tokens."""
    data = ceiling.know(model, options.train_masks, seed=1, shapes="train")
    asked = ceiling.know(model, options.masks, tokens.SCENES.seed, tokens.SCENES.shapes, counts=(1,))
    cut = max(1, len(data.iou) // 10)
    watched, data = data[np.arange(cut)], data[np.arange(cut, len(data.iou))]
    return ceiling.predict_by_reward(data, watched, asked, COST, seed=seed, epochs=options.epochs).tolist()


def tokenizer_from_nothing(out: pathlib.Path, *, mixed: bool, steps: int, seed: int) -> str:
    """The directory of a short stage 1 at `tiny` size, with latent mixing or without."""
    config = stage1.get_config(MIXED_SIZE)
    config.seed, config.model.tokenizer.legacy_reshape = seed, mixed
    config.train.update({"steps": steps, "checkpoint_every": 0})
    config.tokenizer.update({"unquantized_steps": steps // 10, "reseed_until": steps * 7 // 10})
    config.eval.num_samples = 0
    train(make_experiment(config), out)
    return str(out)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Trains what is missing and gives a row for each form and seed."""
    model, runs = loading.load_model(options.checkpoint), options.out / "runs"
    table, rows = predictors.measured(model, options.masks, runs / "table.json"), []
    same = {"steps": options.steps, "masks": options.masks}
    for seed in options.seeds:
        for number, (name, (switches, loss, penalty)) in enumerate(FORMS.items()):
            tokenizer, out = {**dataclasses.asdict(model.cfg.tokenizer), **switches}, runs / f"form{number}_{seed}"
            given = {"seed": seed, "penalty": penalty, "loss": loss, **same}
            lengths = predictors.train_lengths(options.checkpoint, tokenizer, out, **given)
            rows.append({"seed": seed, **predictors.row_of(name, table, lengths)})
        settings = {"checkpoint": model.identity, "train_masks": options.train_masks, "epochs": options.epochs,
                    "masks": options.masks}  # fmt: skip
        by_reward = lambda seed=seed: expected_reward(model, options, seed)
        found = np.array(trials.once(runs / f"reward_{seed}.json", settings, by_reward))
        rows.append({"seed": seed, **predictors.row_of("expected reward", table, found)})
    if options.mixing_steps:
        rows += mixing_rows(options, runs, same)
    return rows


def mixing_rows(options: argparse.Namespace, runs: pathlib.Path, same: dict[str, int]) -> list[dict[str, Any]]:
    """A row for each tokenizer from nothing and seed, each on its own table."""
    rows = []
    for seed in options.seeds:
        for name, mixed in MIXED.items():
            out = runs / f"{'mixed' if mixed else 'ordered'}_{seed}"
            start = tokenizer_from_nothing(out, mixed=mixed, steps=options.mixing_steps, seed=seed)
            own = loading.load_model(start)
            table = predictors.measured(own, options.masks, out / "table.json")
            config = json.loads(json.dumps(dataclasses.asdict(own.cfg.tokenizer)))
            out = runs / f"{out.name}_lengths"
            lengths = predictors.train_lengths(start, config, out, seed=seed, penalty=PENALTY, **same)
            curve = {f"giou_{k}": float(table.iou[:, k - 1].mean()) for k in (1, 4, 8, 32) if k <= table.iou.shape[1]}
            rows.append({"seed": seed, **predictors.row_of(name, table, lengths), **curve})
    return rows


def main() -> int:
    """The command; see the module's docstring."""
    parser = trials.parser("reference_forms", __doc__, steps=300)
    parser.add_argument("--masks", type=int, default=512, help="that are asked")
    parser.add_argument("--train_masks", type=int, default=2048, help="of the expected reward")
    parser.add_argument("--epochs", type=int, default=12, help="of the expected reward")
    parser.add_argument("--mixing_steps", type=int, default=600, help="of the two tokenizers (0: without them)")
    options = trials.parse(parser, may_be_zero=("mixing_steps",))
    rows = run(options)
    one, two = ([row for row in rows if (row["lengths by"] in MIXED) == mixed] for mixed in (False, True))
    shown = {title: trials.means(part, "lengths by") for title, part in (
        ("On the checkpoint's tokenizer", one), ("Tokenizers from nothing", two)) if part}  # fmt: skip
    points = [figures.Series(r["lengths by"], [r["mean_length"]], [r["gain"]], "marks") for r in rows]
    figure = figures.panels_figure({"gain over a fixed length": points}, "mean length", ["gIoU"])
    trials.write(options.out, {"rows": rows, "means": shown}, shown, figure)
    return 0


if __name__ == "__main__":
    cli.run(main)
