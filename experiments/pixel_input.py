"""The SAM encoder on the native image against the language model's, made larger: what do the lost pixels cost?

    python -m experiments.pixel_input --checkpoint alto-tiny --out experiments/results/pixel_input

In the paper's sizes the SAM encoder takes 1024 pixels a side, and in stages 2 and 3 of the reference gets the MLLM's
448, enlarged (`pixel_input` "mllm"), though stage 1 used the native ones. alto-tiny's two images have one size, so the
MLLM's image is made 448/1024 of it here, and others, and enlarged as there. The mask tokenizer as it is, and after a
short stage 1 on each kind of picture with equal updates; then, if the checkpoint has a language model, its answers with
either picture. The same command gives the same table.
"""

import argparse
from collections.abc import Mapping
import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alto_jax import cli, figures
from alto_jax.checkpoint import loading
from alto_jax.config import ConfigError
from alto_jax.data import pipeline, transforms
from alto_jax.layers import apply_module
from alto_jax.stages.tokenizer import mask_iou
from alto_jax.tokenizer.alto import ALTo, TokenizerConfig
from alto_jax.tokenizer.resize import resize
from experiments import adapt, fixed_adaptive, tokens, trials
from experiments.answers import Requests

SHARE = 448 / 1024  # the paper's
SHARES = (1.0, 0.75, SHARE, 0.25)
COUNTS = (1, 2, 4, 8, 16, 32)


def enlarged(image: np.ndarray, share: float) -> np.ndarray:
    """uint8[B, S, S, 3] → float32 of that size from so many of the pixels along a side, in 0..255: the MLLM's picture,
    and the reference's way back from it."""
    size = image.shape[1]
    side = round(share * size)
    if side == size:
        return np.asarray(image, np.float32)
    small = np.stack([transforms.squash(np.asarray(one), side) for one in image])
    return np.asarray(resize(jnp.asarray(small, jnp.float32), size, size, "bicubic"))


@functools.partial(jax.jit, static_argnums=0)
def _reconstruct(size: TokenizerConfig, params: Any, mask: Any, image: Any) -> jax.Array:
    """IoU [K, B] at each of the K counts that a tokenizer has."""
    encoded = apply_module(ALTo(size), params, mask, method="encode")
    codes = apply_module(ALTo(size), params, encoded.z, method="quantize").codes
    features = apply_module(ALTo(size), params, image, method="image_features")
    decode = lambda k: apply_module(ALTo(size), params, codes, jnp.full(len(codes), k), features, method="decode_codes")
    return jax.lax.map(lambda k: mask_iou(decode(k), mask), jnp.array(_kept(size)))


def _kept(size: TokenizerConfig) -> list[int]:
    return [k for k in COUNTS if k <= size.num_latent_tokens]


def measure(model: loading.LoadedModel, params: Mapping[str, Any], count: int, shares: list[float]) -> list[dict]:
    """gIoU of masks by number of tokens, a row a share."""
    size = model.cfg.tokenizer
    source, _ = tokens.scene_masks(count)
    found: dict[float, list[np.ndarray]] = {share: [] for share in shares}
    sizes = {"image_size": size.image_size, "mask_size": size.mask_size, "batch_size": min(64, count)}
    for batch in pipeline.mask_batches(source, **sizes, **tokens.ONCE):
        for share, parts in found.items():
            parts.append(np.asarray(_reconstruct(size, params["tokenizer"], batch.mask, enlarged(batch.image, share))))
    rows = []
    for share, parts in found.items():
        means = np.concatenate(parts, 1).mean(1)
        rows.append({"pixels": round(share * size.image_size)} | {str(k): float(v) for k, v in zip(_kept(size), means)})
    return rows


def adapted(model: loading.LoadedModel, options: argparse.Namespace, runs: pathlib.Path) -> list[dict[str, Any]]:
    """A row for each picture that the tokenizer is adapted to and asked with, and seed."""
    rows = []
    for seed in options.seeds:
        for share in (1.0, SHARE):
            settings = {"checkpoint": model.identity, "steps": options.steps, "batch_size": options.batch_size,
                        "masks": options.masks}  # fmt: skip

            def both(share: float = share, seed: int = seed) -> list[dict]:
                change = lambda batch: dataclasses.replace(batch, image=enlarged(batch.image, share))
                given = {"seed": seed, "steps": options.steps, "batch_size": options.batch_size}
                return measure(model, adapt.adapt(model, change=change, **given), options.masks, [1.0, SHARE])

            trained = round(share * model.cfg.tokenizer.image_size)
            for row in trials.once(runs / f"adapted_{trained}_{seed}.json", settings, both):
                rows.append({"seed": seed, "trained on, asked with": f"{trained}, {row.pop('pixels')}", **row})
    return rows


def run(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """{"as_it_is", "adapted", "answers"}: rows."""
    model, runs = loading.load_model(options.checkpoint, for_inference=True), options.out / "runs"
    if model.cfg.tokenizer.sam is None:
        raise ConfigError(f"--checkpoint={options.checkpoint}: its mask tokenizer has no image encoder")
    found = {"as_it_is": measure(model, model.params, options.masks, list(SHARES)),
             "adapted": adapted(model, options, runs), "answers": []}  # fmt: skip
    if model.text is not None:
        requests = Requests(model, fixed_adaptive.KINDS, options.scenes)
        for kind in fixed_adaptive.KINDS:
            for share in (1.0, SHARE):
                change = lambda batch, share=share: dataclasses.replace(
                    batch, pixel_image=enlarged(batch.pixel_image, share)
                )
                row = requests.ask(model.params, kind, change=change).row()
                pixels = round(share * model.cfg.tokenizer.image_size)
                found["answers"].append({"requests": kind, "pixels": pixels, **row})
    return found


def main() -> int:
    """The command; see the module's docstring."""
    parser = trials.parser("pixel_input", __doc__, steps=200, seeds="0")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--masks", type=int, default=512)
    parser.add_argument("--scenes", type=int, default=256, help="of each kind of requests")
    options = trials.parse(parser)
    found = run(options)
    counts = [key for key in found["as_it_is"][0] if key.isdigit()]
    series = lambda name, row: figures.Series(name, [int(k) for k in counts], [row[k] for k in counts], "both")
    shown = trials.means(found["adapted"], "trained on, asked with", spread=())
    panels = {
        "as it is": [series(f"{row['pixels']} pixels a side", row) for row in found["as_it_is"]],
        "adapted": [series(f"trained, asked: {row['trained on, asked with']}", row) for row in shown],
    }
    tables = {"The mask tokenizer as it is": found["as_it_is"], "After a short stage 1": shown}
    tables |= {"Answers of the language model": found["answers"]} if found["answers"] else {}
    trials.write(options.out, found, tables, figures.panels_figure(panels, "mask tokens", ["gIoU"] * 2))
    return 0


if __name__ == "__main__":
    cli.run(main)
