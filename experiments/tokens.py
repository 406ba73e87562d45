"""How much does each token add, for which masks, and do the predicted lengths know it?

    python -m experiments.tokens --checkpoint alto-tiny --out experiments/results/tokens

In: a checkpoint with a mask tokenizer. Masks of shapes that training never showed, unions of one to eight targets, are
encoded and decoded from their first 1, 2, … tokens: gIoU by number of tokens and group of masks, with image features
and with them withheld; adaptive length beside a fixed length of the same mean and beside the best length of each mask
(which nobody can know before decoding); Spearman correlations of lengths. The same command gives the same table.
"""

import argparse
from collections.abc import Iterator, Sequence
import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alto_jax import cli, figures, metrics
from alto_jax.checkpoint import loading
from alto_jax.data import pipeline
from alto_jax.data.composition import mask_complexity
from alto_jax.data.scenes import MaskConfig, SceneMasks, ScenesConfig
from alto_jax.layers import apply_module
from alto_jax.stages.tokenizer import mask_iou
from alto_jax.tokenizer.alto import ALTo, TokenizerConfig

SCENES = ScenesConfig(image_size=128, max_objects=10, min_size=0.12, max_size=0.6, split="validation")
MASKS = MaskConfig(max_union=8, union_probability=None)
PLAIN = 2.0  # complexity (a disc has 1) up to which a single target is a plain shape
SHOWN = (1, 2, 4, 8, 16, 32)
ONCE: dict[str, Any] = {"seed": 0, "num_epochs": 1, "shuffle": False, "drop_remainder": False, "num_threads": 1}
GROUPS = {
    "all": lambda n, c: n >= 1,
    "one plain shape": lambda n, c: (n == 1) & (c <= PLAIN),
    "one intricate shape": lambda n, c: (n == 1) & (c > PLAIN),
    "2 or 3 targets": lambda n, c: (n >= 2) & (n <= 3),
    "4 to 8 targets": lambda n, c: n >= 4,
}


@dataclasses.dataclass(frozen=True)
class Table:
    """What was measured of N masks: IoU [N, L] of the first 1 … L tokens, with image features and without (None: not
    measured); predicted lengths, numbers of targets, complexities and areas (shares of the picture) [N]."""

    iou: np.ndarray
    iou_withheld: np.ndarray | None
    length: np.ndarray
    targets: np.ndarray
    complexity: np.ndarray
    area: np.ndarray


@dataclasses.dataclass(frozen=True)
class Prefixes:
    """A batch of B masks with what the tokenizer makes of them, and IoU [B, K] of its first `counts` [K] tokens.

    mask float[B, m, m] and image uint8[B, S, S, 3] as the tokenizer gets them, latents [B, L, W] and cls [B, 1, W]
    (what the length predictor reads), length int[B] (what it says), features of the image (None without a SAM encoder).
    """

    mask: np.ndarray
    image: np.ndarray
    latents: np.ndarray
    cls: np.ndarray
    length: np.ndarray
    features: np.ndarray | None
    iou: np.ndarray
    iou_withheld: np.ndarray | None


# Note: the programs of all calls, so that each compiles once.
@functools.partial(jax.jit, static_argnums=0)
def _encode(size: TokenizerConfig, params: dict, mask: Any, image: Any) -> tuple:
    tokenizer = ALTo(size)
    encoded = apply_module(tokenizer, params, mask, method="encode")
    codes = apply_module(tokenizer, params, encoded.z, method="quantize").codes
    length = apply_module(tokenizer, params, encoded, method="predict_length").num_kept
    features = apply_module(tokenizer, params, image, method="image_features")
    return codes, length, encoded.latents, encoded.cls, features


@functools.partial(jax.jit, static_argnums=0)
def _decode(size: TokenizerConfig, params: dict, codes: Any, length: Any, features: Any, mask: Any) -> jax.Array:
    return mask_iou(apply_module(ALTo(size), params, codes, length, features, method="decode_codes"), mask)


@functools.partial(jax.jit, static_argnums=0)
def _predict(size: TokenizerConfig, params: dict, mask: Any) -> jax.Array:
    encoded = apply_module(ALTo(size), params, mask, method="encode")
    return jnp.maximum(apply_module(ALTo(size), params, encoded, method="predict_length").length, 1)


def prefixes(
    model: loading.LoadedModel,
    source: SceneMasks,
    counts: Sequence[int],
    *,
    withheld: bool = False,
    batch_size: int = 64,
) -> Iterator[Prefixes]:
    """Encodes the masks of a source and decodes them at every number of tokens of `counts` (`withheld`: also without
    image features)."""
    size, params = model.cfg.tokenizer, model.params["tokenizer"]
    for batch in pipeline.mask_batches(
        source, image_size=size.image_size, mask_size=size.mask_size, batch_size=batch_size, **ONCE
    ):
        codes, length, latents, cls, features = _encode(size, params, batch.mask, batch.image)
        each = [np.full(len(codes), k, np.int32) for k in counts]
        curve = lambda given, codes=codes, each=each, mask=batch.mask: np.stack(
            [np.asarray(_decode(size, params, codes, k, given, mask)) for k in each], axis=1
        )
        without = curve(None if features is None else np.zeros_like(features)) if withheld else None
        arrays = (batch.mask, batch.image, latents, cls, length)
        features = None if features is None else np.asarray(features)
        yield Prefixes(*(np.asarray(array) for array in arrays), features, curve(features), without)


def scene_masks(count: int, scenes: ScenesConfig = SCENES) -> tuple[SceneMasks, np.ndarray]:
    """`count` masks of scenes, and the number of targets of each."""
    source = SceneMasks(dataclasses.replace(scenes, num_scenes=count), MASKS)
    return source, np.array([len(source.scenes[i].targets(source[i]["mask"])) for i in range(len(source))])


def measure(
    model: loading.LoadedModel,
    count: int,
    scenes: ScenesConfig = SCENES,
    batch_size: int = 64,
    *,
    withheld: bool = True,
    counts: Sequence[int] | None = None,
) -> Table:
    """Encodes and decodes `count` masks at every number of tokens, or at some `counts`, between which IoUs are taken to
    lie on straight lines (`withheld`: also without image features)."""
    source, targets = scene_masks(count, scenes)
    every = np.arange(1, model.cfg.tokenizer.num_latent_tokens + 1)
    kept, parts = [k for k in every.tolist() if counts is None or k in {*counts, len(every)}], []
    whole = lambda iou: iou if len(kept) == len(every) else np.stack([np.interp(every, kept, row) for row in iou])
    for part in prefixes(model, source, kept, withheld=withheld, batch_size=batch_size):
        masks = part.mask > 0.5
        complexity = [mask_complexity(mask) for mask in masks]
        without = part.iou if part.iou_withheld is None else part.iou_withheld
        parts.append((whole(part.iou), whole(without), part.length, complexity, masks.mean((1, 2))))
    iou, without, length, complexity, area = (np.concatenate(p) for p in zip(*parts, strict=True))
    return Table(iou, without if withheld else None, length, targets, complexity, area)


def lengths(model: loading.LoadedModel, count: int, scenes: ScenesConfig = SCENES) -> np.ndarray:
    """The lengths [N] that the masks of `measure` are given where the predictor is used, as labels have them (with the
    reference's rule a token fewer than in training; an empty mask counts as one token)."""
    size = model.cfg.tokenizer
    source = SceneMasks(dataclasses.replace(scenes, num_scenes=count), MASKS)

    batches = pipeline.mask_batches(source, image_size=size.image_size, mask_size=size.mask_size, batch_size=64, **ONCE)
    return np.concatenate([np.asarray(_predict(size, model.params["tokenizer"], batch.mask)) for batch in batches])


def at_length(iou: np.ndarray, length: np.ndarray | float) -> float:
    """gIoU at a length of each mask, or at a fixed one (between whole numbers: interpolated)."""
    if np.ndim(length):
        return float(iou[np.arange(len(iou)), np.asarray(length) - 1].mean())
    low = int(np.floor(length))
    ends = [float(iou[:, min(max(k, 1), iou.shape[1]) - 1].mean()) for k in (low, low + 1)]
    return ends[0] + (float(length) - low) * (ends[1] - ends[0])


def best_lengths(iou: np.ndarray, cost: float) -> np.ndarray:
    """The length of each mask that is best where a token costs so much IoU."""
    return np.argmax(iou - cost * np.arange(1, iou.shape[1] + 1), axis=1) + 1


def cost_of_mean(iou: np.ndarray, mean: float) -> float:
    """The cost of a token at which the best lengths have this mean."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if best_lengths(iou, middle).mean() > mean else (low, middle)
    return high


def partial_spearman(x: np.ndarray, y: np.ndarray, given: np.ndarray) -> float:
    """Spearman correlation of x and y with that of `given` taken out."""
    xy, xg, yg = metrics.spearman(x, y), metrics.spearman(x, given), metrics.spearman(y, given)
    rest = (1 - xg**2) * (1 - yg**2)
    return (xy - xg * yg) / rest**0.5 if rest > 0 else 0.0


def summarize(table: Table) -> dict[str, Any]:
    """The numbers of the report."""
    rows = []
    for name, holds in GROUPS.items():
        chosen = holds(table.targets, table.complexity)
        if not chosen.any():
            continue
        iou, length = table.iou[chosen], table.length[chosen]
        kept = [k for k in SHOWN if k <= iou.shape[1]]
        row = {"masks": name, "number": int(chosen.sum())} | {f"{k}": float(iou[:, k - 1].mean()) for k in kept}
        if table.iou_withheld is not None:
            row |= {f"{k} withheld": float(table.iou_withheld[chosen][:, k - 1].mean()) for k in (kept[0], kept[-1])}
        rows.append(row | {"adaptive": at_length(iou, length), "length": float(length.mean())})
    mean = float(table.length.mean())
    best = best_lengths(table.iou, cost_of_mean(table.iou, mean))
    found: dict[str, Any] = {
        "rows": rows,
        "adaptive": at_length(table.iou, table.length),
        "fixed_same_mean": at_length(table.iou, mean),
        "best_same_mean": at_length(table.iou, best),
        "best_mean": float(best.mean()),
        "mean_length": mean,
        "std_length": float(table.length.std()),
        "entropy_of_lengths": metrics.length_entropy(table.length),
    }
    for whose, length in (("predicted", table.length), ("best", best)):
        for what, value in (("targets", table.targets), ("complexity", table.complexity)):
            found[f"spearman_{whose}_{what}"] = metrics.spearman(length, value)
    found["partial_predicted_complexity_given_targets"] = partial_spearman(
        table.length, table.complexity, table.targets.astype(float)
    )
    return found


def markdown(found: dict[str, Any]) -> str:
    """The table and the numbers below it."""
    lines = [
        table_of(found["rows"]),
        "",
        *(f"- {name.replace('_', ' ')}: {value:.3f}" for name, value in found.items() if name != "rows"),
    ]
    return "\n".join(lines)


def table_of(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table."""
    lines = [f"| {' | '.join(name.replace('_', ' ') for name in rows[0])} |", "|---" * len(rows[0]) + "|"]
    for row in rows:
        cells = [f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m experiments.tokens", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a run's directory, or alto-tiny")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--masks", type=int, default=512)
    options = parser.parse_args()
    cli.check_paths({"checkpoint": options.checkpoint, "out": options.out})
    model = loading.load_model(options.checkpoint)
    table = measure(model, options.masks)
    found, out = summarize(table), pathlib.Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokens.json").write_text(json.dumps({"checkpoint": model.identity, **found}, indent=2) + "\n")
    (out / "tokens.md").write_text(markdown(found) + "\n")
    curves = {row["masks"]: {k: v for k, v in row.items() if k.isdigit()} for row in found["rows"]}
    figure = figures.iou_curve_figure(curves, {"adaptive": (found["mean_length"], found["adaptive"])})
    figure.savefig(out / "tokens.png", dpi=120)
    print(markdown(found))
    return 0


if __name__ == "__main__":
    cli.run(main)
