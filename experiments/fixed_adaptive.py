"""Fixed against adaptive prompts: what do the answers' lengths buy the language model? (the question of tables 2 to 4)

    python -m experiments.fixed_adaptive --checkpoint alto-tiny --out experiments/results/fixed_adaptive

In: a checkpoint of stage 2 or 3. Nothing is trained. The same requests about scenes that training never showed are put
by the prompt for all mask tokens, which is cut to its first 1, 2, … tokens, and by the prompt for adaptive length;
gIoU, cIoU, tokens, and for requests by a box the CPU seconds of an answer (in batches of 32). The same command gives
the same table, but for the seconds, and goes on where it stopped.
"""

import argparse
from collections.abc import Callable
import functools
import pathlib
from typing import Any

import numpy as np

from alto_jax import cli, figures
from alto_jax.checkpoint import loading
from experiments import trials
from experiments.answers import Answers, Requests
from experiments.ceiling import interval

KINDS = ("names", "box", "boxes")
TIMED = "box"
COUNTS = (1, 2, 4, 8, 12, 16, 24, 32)


def counts_of(model: loading.LoadedModel) -> list[int]:
    """The lengths that are measured, as far as the mask tokenizer has so many tokens."""
    return sorted({min(count, model.cfg.tokenizer.num_latent_tokens) for count in COUNTS})


def at_mean(fixed: dict[int, Answers], mean: float) -> np.ndarray:
    """IoU [N] of a fixed length of that mean, on the line between the two measured ones beside it."""
    low = max((count for count in fixed if count <= mean), default=min(fixed))
    high = min((count for count in fixed if count >= mean), default=max(fixed))
    share = (mean - low) / (high - low) if high > low else 0.0
    return (1 - share) * fixed[low].iou + share * fixed[high].iou


def beside_fixed(adaptive: Answers, fixed: dict[int, Answers]) -> dict[str, float]:
    """What adaptive length gains over a fixed one of the same mean, with its 95 % interval."""
    beside = at_mean(fixed, float(adaptive.length.mean()))
    low, high = interval(adaptive.iou - beside)
    gain = float((adaptive.iou - beside).mean())
    return {"fixed_same_mean": float(beside.mean()), "gain": gain, "gain_from": low, "gain_to": high}


def measured(
    requests: Callable[[], Requests], model: loading.LoadedModel, runs: pathlib.Path, scenes: int
) -> tuple[dict[str, Answers], dict[str, dict[int, Answers]]]:
    """Answers by adaptive length, and the first tokens of the others, by kind of requests; kept in files of `runs`."""
    settings, params = {"checkpoint": model.identity, "scenes": scenes}, model.params
    adaptive = lambda: {kind: requests().ask(params, kind).plain() for kind in KINDS}

    def fixed() -> dict[str, dict[str, Any]]:
        found = {kind: requests().first_tokens(params, kind, counts_of(model)) for kind in KINDS}
        return {kind: {str(k): answers.plain() for k, answers in first.items()} for kind, first in found.items()}

    one = trials.once(runs / "checkpoint.json", settings, adaptive)
    two = trials.once(runs / "fixed.json", settings, fixed)
    return {kind: Answers.of(plain) for kind, plain in one.items()}, {
        kind: {int(k): Answers.of(plain) for k, plain in first.items()} for kind, first in two.items()
    }


def run(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """{"rows": of prompts, "gains": of adaptive length over a fixed one of the same mean, "seconds": of an answer}."""
    model = loading.load_model(options.checkpoint, for_inference=True)
    requests = functools.cache(lambda: Requests(model, KINDS, options.scenes))
    adaptive, fixed = measured(requests, model, options.out / "runs", options.scenes)
    rows, gains, seconds = [], [], {}
    for kind, found in adaptive.items():
        rows += [{"requests": kind, "prompt": f"fixed, {count}", **cut.row()} for count, cut in fixed[kind].items()]
        rows.append({"requests": kind, "prompt": "adaptive", **found.row()})
        gain = beside_fixed(found, fixed[kind])
        gains.append({"requests": kind, "tokens": rows[-1]["tokens"], "giou": rows[-1]["giou"], **gain})
    for count in counts_of(model):
        dial = {"adaptive": False, "forced_length": count}
        seconds[f"fixed, {count}"] = requests().cpu_seconds(model.params, TIMED, **dial)
    seconds["adaptive"] = requests().cpu_seconds(model.params, TIMED)
    timed = [{"prompt": name, "cpu_seconds": value} for name, value in seconds.items()]
    return {"rows": rows, "gains": gains, "seconds": timed}


def main() -> int:
    """The command; see the module's docstring."""
    parser = trials.parser("fixed_adaptive", __doc__, steps=None)
    parser.add_argument("--scenes", type=int, default=256, help="of each kind of requests")
    options = trials.parse(parser)
    found = run(options)
    panels = {}
    for kind in KINDS:
        same = [row for row in found["rows"] if row["requests"] == kind]
        points = lambda rows: ([row["tokens"] for row in rows], [row["giou"] for row in rows])
        panels[kind] = [figures.Series("fixed prompt, cut", *points(same[:-1]), "both"),
                        figures.Series("adaptive prompt", *points(same[-1:]), "marks")]  # fmt: skip
    figure = figures.panels_figure(panels, "mask tokens", ["gIoU"] * len(panels))
    tables = {"": found["rows"], "Adaptive length beside a fixed one": found["gains"]}
    trials.write(options.out, found, tables | {"An answer to a request by a box": found["seconds"]}, figure)
    return 0


if __name__ == "__main__":
    cli.run(main)
