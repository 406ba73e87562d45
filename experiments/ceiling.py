"""What could a length predictor know? The gain of adaptive lengths over a fixed one, and its learnable ceiling.

    python -m experiments.ceiling --checkpoint alto-tiny --out experiments/results/ceiling

The best length of each mask is known only after decoding. A regressor far larger than the length predictor sees what
can be seen before: the mask, the picture, the tokenizer's latents, the picture's features inside and outside of the
mask, area, outline and number of targets; it is trained to tell the IoU of the mask's first 1, 2, … tokens (an
ensemble, on new masks of all shapes). On masks that it never saw, lengths chosen by it are compared with one fixed
length of the same mean, with the best lengths, with the checkpoint's own predictor, and with a predictor of the same
form that is trained on these IoUs themselves (the expected reward Σ p_k (IoU_k - cost k), not the straight-through
chunking). The same command gives the same table.
"""

import argparse
from collections.abc import Callable, Sequence
import dataclasses
import json
import pathlib
from typing import Any

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from alto_jax import cli
from alto_jax.checkpoint import loading
from alto_jax.data.composition import mask_complexity
from alto_jax.tokenizer.length import LengthPredictor
from experiments import tokens

COUNTS = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32)  # measured for training; between them straight lines
MEANS = (4.0, 8.0, 12.0, 16.0)
COSTS = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016)  # of a token, for the predictors by expected reward
_VALIDATION = 0.1  # share of the training masks that says when the regressor is done


@struct.dataclass
class Known:
    """What can be seen of N masks before decoding, and the IoU [N, L] of their first 1 … L tokens.

    pictures float32[N, s, s, 4] (mask, red, green, blue), latents float32[N, L, W], cls float32[N, 1, W], numbers
    float32[N, F]; length int[N] of the checkpoint's own predictor.
    """

    pictures: np.ndarray
    latents: np.ndarray
    cls: np.ndarray
    numbers: np.ndarray
    length: np.ndarray
    iou: np.ndarray

    def __getitem__(self, chosen: np.ndarray) -> "Known":
        return Known(*(getattr(self, field.name)[chosen] for field in dataclasses.fields(self)))


def know(model: loading.LoadedModel, count: int, seed: int, shapes: str, counts: Sequence[int] = COUNTS) -> Known:
    """Measures `count` masks of new scenes (`shapes`: see `ScenesConfig`)."""
    scenes = dataclasses.replace(tokens.SCENES, seed=seed, shapes=shapes)
    source, targets = tokens.scene_masks(count, scenes)
    size, every = model.cfg.tokenizer.mask_size, np.arange(1, model.cfg.tokenizer.num_latent_tokens + 1)
    parts: list[tuple] = []
    for part in tokens.prefixes(model, source, [k for k in counts if k <= len(every)]):
        side = part.image.shape[1] // size
        image = part.image.reshape(len(part.image), size, side, size, side, 3).mean((2, 4)) / 255
        mask = part.mask[..., None].astype(np.float32)
        numbers = [mask.mean((1, 2)), [[mask_complexity(m[..., 0] > 0.5)] for m in mask]]
        if part.features is not None:
            grid = part.features.shape[1]
            inside = mask.reshape(len(mask), grid, size // grid, grid, size // grid, 1).mean((2, 4))
            numbers += [(part.features * inside).mean((1, 2)), (part.features * (1 - inside)).mean((1, 2))]
        iou = np.stack([np.interp(every, [k for k in counts if k <= len(every)], row) for row in part.iou])
        seen = (np.concatenate([mask, image], -1), part.latents, part.cls, np.concatenate(numbers, -1))
        parts.append((*(np.asarray(array, np.float32) for array in seen), part.length, iou))
    found = [np.concatenate(column) for column in zip(*parts, strict=True)]
    found[3] = np.concatenate([found[3], targets[:, None]], -1).astype(np.float32)
    return Known(*found)


class Regressor(nn.Module):
    """Everything that is known → the IoU of the first 1 … L tokens, as what is added to their mean."""

    num_tokens: int
    width: int = 192

    @nn.compact
    def __call__(self, known: Known, train: bool) -> jax.Array:
        drop = lambda x: nn.Dropout(0.1, deterministic=not train)(x)
        x = known.pictures
        for features in (32, 64, 96, 128):
            x = nn.relu(nn.Conv(features, (3, 3), strides=2)(x))
            x = nn.LayerNorm()(x)
        latents = nn.relu(nn.Dense(32)(nn.LayerNorm()(known.latents)))
        flat = [part.reshape(len(part), -1) for part in (x, latents, known.cls)]
        parts = [nn.relu(nn.Dense(self.width)(nn.LayerNorm()(drop(part)))) for part in (*flat, known.numbers)]
        x = jnp.concatenate(parts, -1)
        for _ in range(2):
            x = nn.relu(nn.Dense(self.width)(nn.LayerNorm()(drop(x))))
        return nn.Dense(self.num_tokens, kernel_init=nn.initializers.zeros)(x)


def _train(
    loss: Callable[..., jax.Array], params: Any, data: Known, watched: Known, *, seed: int, epochs: int, rate: float
) -> Any:
    """Adam on batches of 128 for `epochs`; gives the parameters that were best on `watched` masks.

    loss(params, known, key) is a mean over masks; the key is None where nothing is dropped.
    """
    steps = epochs * (len(data.iou) // 128)
    optimizer = optax.adamw(optax.cosine_decay_schedule(rate, steps), weight_decay=1e-3)

    @jax.jit
    def step(params: Any, state: Any, known: Any, key: jax.Array) -> tuple:
        updates, state = optimizer.update(jax.grad(loss)(params, known, key), state, params)
        return optax.apply_updates(params, updates), state

    score = jax.jit(lambda params, known: loss(params, known, None))
    state, rng = jax.jit(optimizer.init)(params), np.random.default_rng(seed)
    best, found = float(score(params, watched)), params
    for epoch in range(epochs):
        order = rng.permutation(len(data.iou))
        for start in range(0, len(order) - 127, 128):
            key = jax.random.fold_in(jax.random.key(seed), epoch * len(order) + start)
            params, state = step(params, state, data[order[start : start + 128]], key)
        if (now := float(score(params, watched))) < best:
            best, found = now, params
    return found


def regress(data: Known, watched: Known, asked: Known, *, seed: int, epochs: int) -> np.ndarray:
    """The IoUs [N, L] that a regressor of this seed expects of the masks `asked`."""
    mean, scale = data.numbers.mean(0), data.numbers.std(0) + 1e-6
    normal = lambda known: dataclasses.replace(known, numbers=(known.numbers - mean) / scale)
    data, watched, asked, level = normal(data), normal(watched), normal(asked), data.iou.mean(0)
    model = Regressor(data.iou.shape[1])
    params = jax.jit(model.init, static_argnums=2)(jax.random.key(seed), data[np.arange(2)], False)

    def loss(params: Any, known: Known, key: jax.Array | None) -> jax.Array:
        rngs = None if key is None else {"dropout": key}
        return jnp.mean((model.apply(params, known, key is not None, rngs=rngs) + level - known.iou) ** 2)

    found = _train(loss, params, data, watched, seed=seed, epochs=epochs, rate=1e-3)
    apply = jax.jit(lambda known: model.apply(found, known, False))
    pieces = np.array_split(np.arange(len(asked.iou)), max(1, len(asked.iou) // 256))
    return np.concatenate([np.asarray(apply(asked[piece])) for piece in pieces]) + level


def predict_by_reward(data: Known, watched: Known, asked: Known, cost: float, *, seed: int, epochs: int) -> np.ndarray:
    """Lengths [N] of a length predictor of the paper's form, trained on the expected reward Σ p_k (IoU_k - cost k)."""
    model = LengthPredictor(data.latents.shape[-1], "divide", "sigmoid", "unified")
    params = jax.jit(model.init)(jax.random.key(seed), data.latents[:2], data.cls[:2])
    price = cost * np.arange(1, data.iou.shape[1] + 1)

    def loss(params: Any, known: Known, key: jax.Array | None) -> jax.Array:
        probs = model.apply(params, known.latents, known.cls).probs
        return -jnp.mean(jnp.sum(probs * (known.iou - price), -1))

    found = _train(loss, params, data, watched, seed=seed, epochs=epochs, rate=1e-3)
    return np.asarray(jax.jit(model.apply)(found, asked.latents, asked.cls).num_kept)


def interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of values [N] over drawn masks."""
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(1000)]
    return float(np.percentile(means, 2.5)), float(np.percentile(means, 97.5))


def gain_row(name: str, iou: np.ndarray, length: np.ndarray) -> dict[str, Any]:
    """Lengths [N] beside one fixed length of the same mean (between whole numbers: interpolated)."""
    mean = float(length.mean())
    low = min(int(mean), iou.shape[1] - 1)
    fixed = iou[:, low - 1] + (mean - low) * (iou[:, low] - iou[:, low - 1])
    gain = iou[np.arange(len(iou)), length - 1] - fixed
    low_end, high_end = interval(gain)
    row = {"lengths by": name, "mean": mean, "std": float(length.std()), "giou": float((fixed + gain).mean())}
    return row | {"fixed": float(fixed.mean()), "gain": float(gain.mean()), "gain from": low_end, "gain to": high_end}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures, trains, and gives the table's rows with the regressor's quality."""
    model = loading.load_model(options.checkpoint)
    every = range(1, model.cfg.tokenizer.num_latent_tokens + 1)
    asked = know(model, options.masks, 0, "split", every)
    data = know(model, options.train_masks, 1, "all")
    cut = int(len(data.iou) * _VALIDATION)
    watched, data = data[np.arange(cut)], data[np.arange(cut, len(data.iou))]
    seeds = range(options.seeds)
    expected = np.mean([regress(data, watched, asked, seed=s, epochs=options.epochs) for s in seeds], axis=0)
    rows = [gain_row("the checkpoint's predictor", asked.iou, asked.length)]
    for mean in sorted({*MEANS, float(asked.length.mean())}):
        by_regressor = tokens.best_lengths(expected, tokens.cost_of_mean(expected, mean))
        best = tokens.best_lengths(asked.iou, tokens.cost_of_mean(asked.iou, mean))
        rows += [gain_row("regressor", asked.iou, by_regressor), gain_row("best of each mask", asked.iou, best)]
    for cost in COSTS:
        found = [predict_by_reward(data, watched, asked, cost, seed=s, epochs=options.epochs) for s in seeds]
        each = [gain_row(f"predictor by reward, cost {cost:g}", asked.iou, length) for length in found]
        numbers = {key: float(np.mean([row[key] for row in each])) for key in each[0] if key != "lengths by"}
        rows.append({"lengths by": each[0]["lengths by"], **numbers})
    rise = lambda iou: iou[:, 15] - iou[:, 3] if iou.shape[1] >= 16 else iou[:, -1] - iou[:, 0]
    spread = lambda found, true: float(1 - np.mean((found - true) ** 2) / true.var())
    return {"rows": rows, "explained_level": spread(expected[:, -1], asked.iou[:, -1]),
            "explained_rise": spread(rise(expected), rise(asked.iou)),
            "masks": len(asked.iou), "training_masks": len(data.iou)}  # fmt: skip


def main() -> int:
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m experiments.ceiling", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a run's directory, or alto-tiny")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--masks", type=int, default=1024, help="that are asked")
    parser.add_argument("--train_masks", type=int, default=8192)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3, help="regressors in the ensemble, and predictors")
    options = parser.parse_args()
    cli.check_paths({"checkpoint": options.checkpoint, "out": options.out})
    found, out = run(options), pathlib.Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "ceiling.json").write_text(json.dumps(found, indent=2) + "\n")
    text = tokens.table_of(
        [{k: round(v, 4) if k.startswith("gain") else v for k, v in row.items()} for row in found["rows"]]
    )
    said = [f"- {name.replace('_', ' ')}: {value:.3f}" for name, value in found.items() if name != "rows"]
    text = "\n".join([text, "", *said])
    (out / "ceiling.md").write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    cli.run(main)
