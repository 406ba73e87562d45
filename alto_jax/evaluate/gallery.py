"""The worst answers as pictures: one HTML file with everything inside, per benchmark the samples of lowest IoU."""

from collections.abc import Mapping, Sequence
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from alto_jax import report
from alto_jax.data import rle
from alto_jax.data.source import Records
from alto_jax.evaluate import summaries


def worst(lines: Sequence[Mapping[str, Any]], count: int, min_pixels: int = 0) -> list[tuple[Mapping[str, Any], float]]:
    """The `count` samples of lowest IoU with that, worst first; of equal ones the first."""
    good = [line for line in lines if "error" not in line]
    ious = summaries.collect(good, min_pixels).ious()
    return [(good[number], float(ious[number])) for number in np.argsort(ious, kind="stable")[:count].tolist()]


def sample(line: Mapping[str, Any], iou: float, record: Mapping[str, Any], max_length: int) -> report.ReportSample:
    """A result line as a picture, with the image and target of its record."""
    target = record["mask"] > 0
    height, width = target.shape
    mask = line["mask"]
    prediction = np.zeros_like(target) if mask is None else rle.decode(mask, height, width, line["key"])
    image = record["image"]
    if image.shape[:2] != target.shape:  # Prepared images are squashed.
        image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    return report.ReportSample(
        image=image,
        prediction=prediction,
        text=line["phrase"],
        length=line["length"],
        max_length=max_length,
        target=target,
        iou=iou,
        note=f"{line['key']}: {_verdict(line)}",
    )


def _verdict(line: Mapping[str, Any]) -> str:
    """What the answer was, in words."""
    target = f"the target has {line['target_pixels']:,} pixels" if line["target_pixels"] else "there is no target"
    if line["said_no"]:
        return f'said "No", {target}'
    answer = f"{line['predicted_pixels']:,} predicted pixels" if line["predicted_pixels"] else "an empty mask"
    return f"{answer if line['valid'] else 'a malformed answer'}, {target}" + (
        "" if line["valid"] else f": {line['answer']:.120}"
    )


def write(
    path: pathlib.Path,
    title: str,
    benchmarks: Mapping[str, tuple[Mapping[str, Any], Sequence[Mapping[str, Any]], Records]],
    count: int,
    min_pixels: Mapping[str, int],
) -> None:
    """Writes the page.

    Args:
      path: of the HTML file.
      title: of the model.
      benchmarks: task → (header, lines, records) of its results.
      count: samples of each.
      min_pixels: task → fewer predicted pixels count as no mask.
    """
    shown = {}
    for name, (header, lines, records) in benchmarks.items():
        chosen = worst(lines, count, min_pixels[name])
        length = header["num_latent_tokens"]
        shown[name] = [sample(line, iou, records[line["index"]], length) for line, iou in chosen]
    note = f"The {count} answers of lowest IoU of each benchmark, worst first: image, target, prediction."
    report.write_report(path, f"Worst answers of {title}", samples=shown, notes=[note])
