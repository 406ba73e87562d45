"""What does the length penalty of stage 3 trade? (the paper's figures 6 and 7, at the small size)

    python -m experiments.grpo_penalty --checkpoint alto-tiny --out experiments/results/grpo_penalty

In: a checkpoint of stage 2 or 3. For every penalty and seed a short run of GRPO from it. Before and after, the same
requests about scenes that training never showed: gIoU against tokens, beside the first tokens of the answers to the
prompt for all of them (a fixed length), and beside what the checkpoint alone gives where a request biases the end of
the mask (no training, one model for all lengths). Runs stay in the out directory, and the command goes on where it
stopped.
"""

import argparse
from collections.abc import Callable
import dataclasses
import functools
import json
import pathlib
from typing import Any

from alto_jax import cli, figures
from alto_jax.checkpoint import loading
from alto_jax.experiment import make_experiment
from alto_jax.train.loop import train
from alto_jax.train.progress import read_metrics
from configs import stage3
from experiments import fixed_adaptive, trials
from experiments.answers import Answers, Requests
from experiments.ceiling import interval

PENALTIES = (1e-2, 5e-3, 3e-3, 2e-3, 1e-3, 1e-4)
BIASES = (0.5, 1.0, 2.0, 4.0)  # of the logit of a mask's end, at request time


def config_of(model: loading.LoadedModel, options: argparse.Namespace, penalty: float, seed: int) -> Any:
    """The run of stage 3 from the checkpoint."""
    config = stage3.get_config("small")
    config.model = json.loads(json.dumps(dataclasses.asdict(model.cfg)))
    config.init_from, config.seed = options.checkpoint, seed
    config.optim.update({"lr": options.lr, "trainable": options.trainable})
    config.grpo.reward.length_weight = penalty
    config.grpo.num_generations = options.generations
    log_every = max(1, options.steps // 20)
    config.train.update({"steps": options.steps, "batch_size": options.batch_size, "log_every": log_every,
                         "checkpoint_every": max(10, options.steps // 2)})  # fmt: skip
    config.eval.num_samples = 0
    return make_experiment(config)


def row_of(name: str, kind: str, found: Answers, before: Answers, fixed: dict[int, Answers]) -> dict[str, Any]:
    """Answers beside those of the checkpoint to the same requests."""
    change = found.iou - before.iou
    low, high = interval(change)
    return {
        "lengths by": name,
        "requests": kind,
        "tokens": float(found.length.mean()),
        "std_tokens": float(found.length.std()),
        "change_of_tokens": float((found.length - before.length).mean() / max(before.length.mean(), 1e-9)),
        "giou": float(found.iou.mean()),
        "change": float(change.mean()),
        "change_from": low,
        "change_to": high,
        "fixed_same_mean": fixed_adaptive.beside_fixed(found, fixed)["fixed_same_mean"],
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """{"rows": of each run, dial and kind of requests, "fixed": gIoU by tokens, "curves": of the runs' updates}."""
    model = loading.load_model(options.checkpoint, for_inference=True)
    requests = functools.cache(lambda: Requests(model, fixed_adaptive.KINDS, options.scenes))
    runs, settings = options.out / "runs", {"checkpoint": model.identity, "scenes": options.scenes}
    before, fixed = fixed_adaptive.measured(requests, model, runs, options.scenes)
    rows = [row_of("checkpoint", kind, found, found, fixed[kind]) for kind, found in before.items()]

    def add(name: str, path: pathlib.Path, params: Callable[[], Any], **dials: Any) -> None:
        ask = lambda: {kind: requests().ask(params(), kind, **dials).plain() for kind in before}
        found = trials.once(path, settings, ask)
        rows.extend(row_of(name, kind, Answers.of(found[kind]), before[kind], fixed[kind]) for kind in before)

    trained: dict[str, list[dict[str, Any]]] = {}
    for seed in options.seeds:
        for penalty in options.penalties:
            folder, name = runs / f"{penalty:g}_{seed}", f"GRPO, λ = {penalty:g}"
            train(config_of(model, options, penalty, seed), folder)
            after = functools.cache(lambda folder=folder: loading.load_model(folder, for_inference=True).params)
            name_of = name if len(options.seeds) == 1 else f"{name}, seed {seed}"
            add(name_of, folder / "answers.json", after)
            if bias := options.bias_after:
                path = folder / f"answers_{bias:g}.json"
                add(f"{name_of}, end bias {bias:+g}", path, after, end_logit_bias=bias)
            if seed == options.seeds[0]:
                records = [record for record in read_metrics(folder) if "entropy" in record]
                trained[name] = [{key: r[key] for key in ("step", "entropy", "length", "iou", "kl")} for r in records]
    for bias in BIASES:
        add(f"end bias {bias:+g}", runs / f"bias_{bias:g}.json", lambda: model.params, end_logit_bias=bias)
    giou = {kind: {k: float(a.iou.mean()) for k, a in counts.items()} for kind, counts in fixed.items()}
    return {"rows": rows, "fixed": giou, "curves": trained}


def figure_of(found: dict[str, Any]) -> Any:
    """gIoU against tokens, a panel a kind of requests."""
    panels: dict[str, list[figures.Series]] = {}
    for kind, fixed in found["fixed"].items():
        same = [row for row in found["rows"] if row["requests"] == kind]
        most = 1.5 * max(row["tokens"] for row in same)
        shown = {int(count): giou for count, giou in fixed.items() if 2 <= int(count) <= most}
        panels[kind] = [figures.Series("fixed length", [*shown], [*shown.values()], "both")]
        for name in ("end bias", "GRPO", "checkpoint"):
            points = sorted((row["tokens"], row["giou"]) for row in same if row["lengths by"].startswith(name))
            x, y = zip(*points, strict=True)
            panels[kind].append(figures.Series(name, x, y, "both" if name == "end bias" else "marks"))
    return figures.panels_figure(panels, "mask tokens", ["gIoU"] * len(panels))


def steps_figure(curves: dict[str, list[dict[str, Any]]]) -> Any:
    """Entropy and length over the updates, a line a penalty."""
    series = lambda key: [
        figures.Series(name, [row["step"] for row in rows], [row[key] for row in rows]) for name, rows in curves.items()
    ]
    panels = {"Entropy of the policy (nats)": series("entropy"), "Mask tokens": series("length")}
    return figures.panels_figure(panels, "updates", ["entropy", "length"])


def main() -> int:
    """The command; see the module's docstring."""
    parser = trials.parser("grpo_penalty", __doc__, steps=40, seeds="0")
    parser.add_argument("--penalties", default=",".join(map(str, PENALTIES)), help="with commas between")
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--batch_size", type=int, default=8, help="prompts of an update")
    parser.add_argument("--generations", type=int, default=12, help="answers to each")
    parser.add_argument("--trainable", default="^language_model/", help="regex of the parameters that learn")
    parser.add_argument(
        "--bias_after", type=float, default=0.0, metavar="X", help="also ask with an end bias (0: do not)"
    )
    parser.add_argument("--scenes", type=int, default=256, help="of each kind of requests, for the evaluation")
    options = trials.parse(parser)
    options.penalties = trials.numbers("--penalties", options.penalties)
    found = run(options)
    trials.write(options.out, found, {"": found["rows"]}, figure_of(found))
    steps = figures.figure_bytes(steps_figure(found["curves"]), dpi=80)
    (options.out / f"{options.out.name}_steps.png").write_bytes(steps)
    return 0


if __name__ == "__main__":
    cli.run(main)
