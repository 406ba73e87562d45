"""Where do more tokens help: in the shape, or in the last pixels of its outline?

    python -m experiments.outline --checkpoint alto-tiny --out experiments/results/outline

In: a checkpoint with a mask tokenizer. The masks of experiments.tokens are decoded from their first 4, 8, 16 and all
tokens, and gIoU is taken thrice: of all pixels, and with the pixels at most one or two from the outline of the true
mask counted as right. What rises in the first alone is a sharper outline of a shape that is right already. With
--first_tokens_steps the tokenizer is trained for its first four tokens before. The same command gives the same table.
"""

import dataclasses
import json
from typing import Any

import jax
import numpy as np

from alto_jax import cli, metrics
from alto_jax.checkpoint import loading
from alto_jax.data import pipeline
from alto_jax.data.composition import mask_complexity
from alto_jax.data.scenes import ScenesConfig
from alto_jax.layers import apply_module
from alto_jax.tokenizer.alto import ALTo
from experiments import tokens, trials
from experiments.adapt import adapt

COUNTS, WIDTHS = (4, 8, 16, 32), (0, 1, 2)


def near_outline(masks: np.ndarray, width: int) -> np.ndarray:
    """The pixels of masks, bool[B, H, W], with one of the other kind at most `width` rows and columns away."""
    around = np.pad(masks, [(0, 0), (width, width), (width, width)], mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(around, (2 * width + 1, 2 * width + 1), axis=(1, 2))
    return windows.any(axis=(3, 4)) & ~windows.all(axis=(3, 4))


def measure(
    model: loading.LoadedModel, count: int, scenes: ScenesConfig = tokens.SCENES
) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[int, ...]]:
    """IoU [N, K, W] of `count` masks at the K numbers of tokens that are returned last, with the outline's pixels of
    each of WIDTHS counted as right; numbers of targets and complexities [N]."""
    size = model.cfg.tokenizer
    tokenizer, params = ALTo(size), model.params["tokenizer"]
    counts = tuple(k for k in COUNTS if k <= size.num_latent_tokens)
    source, targets = tokens.scene_masks(count, scenes)

    @jax.jit
    def encode(params: dict, mask: Any, image: Any) -> tuple[jax.Array, jax.Array | None]:
        latents = apply_module(tokenizer, params, mask, method="encode").z
        codes = apply_module(tokenizer, params, latents, method="quantize").codes
        return codes, apply_module(tokenizer, params, image, method="image_features")

    @jax.jit
    def decode(params: dict, codes: Any, length: Any, features: Any) -> jax.Array:
        return apply_module(tokenizer, params, codes, length, features, method="decode_codes") > 0

    found, complexity = [], []
    for batch in pipeline.mask_batches(
        source, image_size=size.image_size, mask_size=size.mask_size, batch_size=64, **tokens.ONCE
    ):
        true = np.asarray(batch.mask) > 0.5
        codes, features = encode(params, batch.mask, batch.image)
        near = [near_outline(true, width) for width in WIDTHS]
        each = []
        for k in counts:
            mask = np.asarray(decode(params, codes, np.full(len(codes), k, np.int32), features)).reshape(true.shape)
            each.append([metrics.mask_iou(np.where(band, true, mask), true) for band in near])
        found.append(np.array(each).transpose(2, 0, 1))
        complexity += [mask_complexity(mask) for mask in true]
    return np.concatenate(found), targets, np.array(complexity), counts


def summarize(iou: np.ndarray, targets: np.ndarray, complexity: np.ndarray, counts: tuple[int, ...]) -> list[dict]:
    """A row for each group of masks and width: gIoU by number of tokens, and what it rises from 4 to 16."""
    rows = []
    for name, holds in tokens.GROUPS.items():
        chosen = holds(targets, complexity)
        if not chosen.any():
            continue
        for index, width in enumerate(WIDTHS):
            of_counts = iou[chosen][:, :, index].mean(0)
            row = {"masks": name, "number": int(chosen.sum()), "outline's pixels left out": width}
            row |= {f"{k}": float(value) for k, value in zip(counts, of_counts, strict=True)}
            if 16 in counts:
                row["from 4 to 16"] = float(of_counts[counts.index(16)] - of_counts[0])
            rows.append(row)
    return rows


def main() -> int:
    """The command; see the module's docstring."""
    parser = trials.parser("outline", __doc__, steps=None)
    parser.add_argument("--masks", type=int, default=512)
    told = "train the tokenizer so many updates first, in which every second mask keeps its first 4 tokens (default: 0)"
    parser.add_argument("--first_tokens_steps", type=int, default=0, help=told)
    options = trials.parse(parser, may_be_zero=("first_tokens_steps",))
    model = loading.load_model(options.checkpoint)
    if steps := options.first_tokens_steps:
        params = adapt(model, seed=0, steps=steps, batch_size=16, kept=COUNTS[0], every=2)
        model = dataclasses.replace(model, params=params)
    rows, out = summarize(*measure(model, options.masks)), options.out
    out.mkdir(parents=True, exist_ok=True)
    (out / "outline.json").write_text(json.dumps({"checkpoint": model.identity, "rows": rows}, indent=2) + "\n")
    (out / "outline.md").write_text(tokens.table_of(rows) + "\n")
    print(tokens.table_of(rows))
    return 0


if __name__ == "__main__":
    cli.run(main)
