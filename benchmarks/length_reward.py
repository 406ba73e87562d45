"""What lambda does to tokens and IoU: `python benchmarks/length_reward.py --start runs/quickstart/stage2`.

Stage 3 at `tiny` size from one stage-2 checkpoint, for each lambda and seed, evaluated on held-out scenes (greedy,
no grammar). Larger batches, a larger KL weight and a lower rate than the quickstart's: at this size the first code
carries most of a mask, and without an anchor the length drifts. Runs go to WORKDIR and resume; writes a table and a
plot to benchmarks/results/length_reward.md and .png, and says whether tokens fall with lambda.
"""

import argparse
import json
from pathlib import Path
import sys

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from alto_jax import figures
from alto_jax.experiment import make_experiment
from alto_jax.main import load_config
from alto_jax.train.loop import train

ROOT = Path(__file__).parents[1]
LAMBDAS = (0.0, 1e-3, 3e-3, 1e-2)


def run(options: argparse.Namespace, weight: float, seed: int) -> dict:
    """Trains (or reads) one run and returns its result."""
    config = load_config(str(ROOT / "configs/stage3.py") + ":tiny")
    config.init_from, config.seed = options.start, seed
    config.train.update({"steps": options.steps, "batch_size": options.batch_size, "log_every": 5})
    config.train.checkpoint_every = 0
    config.optim.update({"lr": options.lr, "schedule": "cosine", "warmup_steps": 5})
    config.grpo.update({"num_generations": options.group})
    config.grpo.reward.length_weight = weight
    config.grpo.loss.beta = options.beta
    config.eval.update({"num_samples": options.samples})
    return train(make_experiment(config), Path(options.workdir) / f"lambda_{weight:g}_seed_{seed}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--start", required=True, help="directory of the stage-2 run")
    parser.add_argument("--workdir", default="runs/length_reward")
    parser.add_argument("--lambdas", type=float, nargs="+", default=LAMBDAS)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1))
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--group", type=int, default=12)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--beta", type=float, default=0.02)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--out", default=str(ROOT / "benchmarks/results/length_reward"))
    options = parser.parse_args()
    start = json.loads((Path(options.start) / "result.json").read_text())["eval"]
    results = {w: [run(options, w, seed)["eval"] for seed in options.seeds] for w in options.lambdas}
    rows = [
        {
            "lambda": weight,
            "tokens": float(np.mean([e["mean_length"] for e in evals])),
            "giou": float(np.mean([e["giou"] for e in evals])),
            "format": float(np.mean([e["format_rate"] for e in evals])),
            "each": ", ".join(f"{e['mean_length']:.1f} / {e['giou']:.3f}" for e in evals),
        }
        for weight, evals in results.items()
    ]
    monotone = all(a["tokens"] > b["tokens"] for a, b in zip(rows, rows[1:]))
    cheaper = [
        f"{r['lambda']:g}" for r in rows[1:]
        if r["tokens"] <= 0.8 * rows[0]["tokens"] and r["giou"] >= rows[0]["giou"] - 0.01
    ]  # fmt: skip
    write(Path(options.out), options, start, rows, monotone, cheaper)
    print(Path(options.out).with_suffix(".md").read_text())


def write(out: Path, options: argparse.Namespace, start: dict, rows: list, monotone: bool, cheaper: list) -> None:
    """The table and the figure."""
    figure, axes = figures.new_figure()
    axes.plot([r["tokens"] for r in rows], [r["giou"] for r in rows], marker="o")
    for row in rows:
        axes.annotate(f"λ = {row['lambda']:g}", (row["tokens"], row["giou"]), textcoords="offset points", xytext=(6, 6))
    axes.plot([start["mean_length"]], [start["giou"]], marker="D", linestyle="", label="start (stage 2)")
    axes.set_xlabel("mean mask tokens")
    axes.set_ylabel("gIoU")
    axes.legend(frameon=False)
    figure.savefig(out.with_suffix(".png"), dpi=150)
    settings = (
        f"{options.steps} updates of {options.batch_size} prompts with {options.group} answers, rate {options.lr:g} "
        f"(cosine), beta {options.beta:g}"
    )
    lines = [
        "# The reward's lambda: tokens and IoU",
        "",
        f"`python benchmarks/length_reward.py --start RUN`, 2 CPU cores. {settings}; means over seeds",
        f"{', '.join(map(str, options.seeds))}; {options.samples} held-out scenes, greedy answers without the grammar.",
        "",
        f"![gIoU against mean tokens]({out.name}.png)",
        "",
        "| lambda | mean tokens | gIoU | well formed | tokens / gIoU of each seed |",
        "|---|---|---|---|---|",
        f"| start (stage 2) | {start['mean_length']:.2f} | {start['giou']:.3f} | {start['format_rate']:.1%} | |",
        f"| no codes at all | 0 | {start['giou_no_codes']:.3f} | | |",
        *(f"| {r['lambda']:g} | {r['tokens']:.2f} | {r['giou']:.3f} | {r['format']:.1%} | {r['each']} |" for r in rows),
        "",
        f"Mean tokens fall with every step of lambda: {'yes' if monotone else 'no'}. Lambdas with at least 20 % fewer "
        f"tokens than lambda {rows[0]['lambda']:g} and gIoU at most 0.01 below: {', '.join(cheaper) or 'none'}.",
    ]
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
