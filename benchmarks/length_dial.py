"""IoU against mean tokens from one checkpoint, by what a request may ask for: `python benchmarks/length_dial.py RUN`.

RUN is the directory of a stage-2 or stage-3 run on the built-in data. Three dials, all of one compiled program: a bias
on the logit of `<ALTo_End>`, a budget, and an exact number of tokens. Greedy answers with the grammar to held-out
requests. Writes NAME.png and a table NAME.md (default: benchmarks/results/length_dial).
"""

import argparse
import dataclasses
import json
from pathlib import Path
import sys

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from alto_jax import figures
from alto_jax.checkpoint import loading
from alto_jax.config import build
from alto_jax.data import sources
from alto_jax.experiment import ExperimentConfig
from alto_jax.mllm.alto_llm import segment
from alto_jax.mllm.generate import GenerateConfig
from alto_jax.stages.tokenizer import mask_iou

ROOT = Path(__file__).parents[1]
BIASES = (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0, 8.0)
COUNTS = (1, 2, 4, 8, 16, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="directory of a run")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--out", default=str(ROOT / "benchmarks/results/length_dial"))
    options = parser.parse_args()
    loaded = loading.load_model(options.run, for_inference=True)
    values = json.loads((Path(options.run) / "config.json").read_text())
    names = ("stage", "model", "data", "eval")
    config = build(ExperimentConfig, {name: values[name] for name in names})
    config = dataclasses.replace(
        config, eval=dataclasses.replace(config.eval, num_samples=options.samples, batch_size=options.batch_size)
    )
    size = config.model.tokenizer.num_latent_tokens
    base = GenerateConfig(max_new_tokens=size + 32, grammar=True, max_length=size)

    @jax.jit
    def answer(params, batch, controls):
        found = segment(config.model, params, batch, base.static(), loaded.text.ids, jax.random.key(0), None, controls)
        iou = mask_iou(found.mask_logits, batch.mask) * found.valid
        return iou, found.length, found.valid

    batches = list(sources.held_out_prompts(config, loaded.text))

    def measure(**dial) -> dict[str, float]:
        controls = dataclasses.replace(base, **dial).controls()
        parts = [jax.device_get(answer(loaded.params, batch, controls)) for batch in batches]
        iou, length, valid = (np.concatenate(column) for column in zip(*parts))
        return {"giou": float(iou.mean()), "tokens": float(length[valid].mean()), "well_formed": float(valid.mean())}

    dials = {
        "bias of the end": [{"end_logit_bias": b} for b in BIASES],
        "budget": [{"max_length": min(c, size)} for c in COUNTS],
        "exact length": [{"forced_length": min(c, size)} for c in COUNTS],
    }
    rows = []
    for name, settings in dials.items():
        for dial in settings:
            row = {"dial": name, "value": next(iter(dial.values())), **measure(**dial)}
            rows.append(row)
            print(f"{name:16} {row['value']:>5}  tokens {row['tokens']:5.1f}  gIoU {row['giou']:.3f}", flush=True)
    programs = answer._cache_size()
    write(Path(options.out), rows, config.stage, sum(len(b.mask) for b in batches), programs)


def write(out: Path, rows: list[dict], stage: str, count: int, programs: int) -> None:
    """The table and the figure."""
    figure, axes = figures.new_figure()
    for name in dict.fromkeys(row["dial"] for row in rows):
        points = sorted((row["tokens"], row["giou"]) for row in rows if row["dial"] == name)
        axes.plot(*zip(*points), marker="o", label=name)
    axes.set_xlabel("mean mask tokens")
    axes.set_ylabel("gIoU")
    axes.legend(frameon=False)
    figure.savefig(out.with_suffix(".png"), dpi=150)
    lines = [
        "# Length at request time",
        "",
        f"`python benchmarks/length_dial.py RUN --samples {count}`, 2 CPU cores: one checkpoint ({stage}), {count}",
        f"held-out requests, greedy, with the grammar; {len(rows)} settings of one program ({programs} compiled:",
        "one per batch size).",
        "",
        f"![gIoU against mean tokens]({out.name}.png)",
        "",
        "| dial | value | mean tokens | gIoU | well formed |",
        "|---|---|---|---|---|",
        *(
            f"| {r['dial']} | {r['value']:g} | {r['tokens']:.1f} | {r['giou']:.3f} | {r['well_formed']:.1%} |"
            for r in rows
        ),
    ]
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
