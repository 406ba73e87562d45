"""The figures of docs/how_it_works.md: masks from their first tokens, and gIoU by number of tokens.

    python -m experiments.how_it_works --checkpoint alto-tiny --out docs/figures

Comes in: a checkpoint. Goes out: growth.png, masks of built-in scenes that training never showed, true and from their
first 1, 2, 4, … codes; tokens.png, the mean IoU of some hundred such masks, with adaptive length as a point.
"""

import argparse
import pathlib
from typing import Any

import numpy as np

import alto_jax
from alto_jax import cli, figures, report
from alto_jax.config import ConfigError
from alto_jax.data.composition import Scenes, ScenesConfig

_SCENES: dict[str, Any] = {"split": "validation", "min_objects": 8, "max_objects": 8, "min_size": 0.15, "max_size": 0.4}
_TARGETS = (1, 3, 6)  # objects in the masks of growth.png, a row each


def write(model: Any, out: pathlib.Path, samples: int) -> dict[str, float]:
    """Writes both figures.

    Args:
      model: with `encode` and `decode`.
      out: the folder.
      samples: masks of tokens.png, unions of one to eight objects.

    Returns:
      Mean IoU by number of tokens ("1", "2", …) and by "adaptive" length, and its mean "length".
    """
    most = model.cfg.tokenizer.num_latent_tokens
    counts = [2**power for power in range(most.bit_length()) if 2**power <= most]
    scenes = Scenes(ScenesConfig(seed=5, num_scenes=max(samples, len(_TARGETS)), **_SCENES))
    strips = []
    for row, targets in enumerate(_TARGETS):
        scene = scenes[row]
        mask = scene.union(range(min(targets, len(scene.objects)))) > 0
        codes = model.encode(mask, "full")
        drawn = [(n, model.decode(codes[:n], mask.shape, scene.image)) for n in counts]
        strips.append([(n, _shown(scene.image, one, mask)) for n, one in drawn])
    out.mkdir(parents=True, exist_ok=True)
    figures.strip_figure(strips).savefig(out / "growth.png", dpi=110, bbox_inches="tight")
    found: dict[str, list[float]] = {str(n): [] for n in counts} | {"adaptive": [], "length": []}
    for number in range(samples):
        scene = scenes[number]
        mask = scene.union(range(1 + number % len(scene.objects))) > 0
        codes, length = model.encode(mask, "full"), len(model.encode(mask))
        iou = {n: _iou(model.decode(codes[:n], mask.shape, scene.image), mask) for n in {*counts, length}}
        for n in counts:
            found[str(n)].append(iou[n])
        found["adaptive"].append(iou[length])
        found["length"].append(length)
    means = {name: float(np.mean(values)) for name, values in found.items()}
    curve = {"fixed": {n: means[str(n)] for n in counts}}
    figure = figures.iou_curve_figure(curve, {"adaptive": (means["length"], means["adaptive"])})
    figure.savefig(out / "tokens.png", dpi=110, bbox_inches="tight")
    return means


def _shown(image: np.ndarray, mask: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The picture, dark outside of the mask, with the outline of the true one in white."""
    dark = np.where(mask[..., None], image, image // 4)
    return report.overlay(dark, target, color=(255, 255, 255), alpha=0.0)


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sum(a & b) / max(np.sum(a | b), 1))


def main() -> int:
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m experiments.how_it_works", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="alto-tiny", metavar="DIR")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--samples", type=int, default=200, metavar="N")
    options = parser.parse_args()
    cli.check_paths({"--out": options.out})
    if options.samples < 1:
        raise ConfigError(f"--samples={options.samples}: expected at least 1")
    means = write(alto_jax.load(options.checkpoint), pathlib.Path(options.out), options.samples)
    print("\n".join(f"{name:<10}{value:>8.3f}" for name, value in means.items()))
    return 0


if __name__ == "__main__":
    cli.run(main)
