"""Boundary IoU of masks at their images' sizes: whole masks eroded against their boxes alone, the same numbers.

    python benchmarks/boundary.py [--repeats 5]

Prints a Markdown table of milliseconds a sample. "Whole" is `metrics.mask_boundary` of both masks and their IoU, as
evaluation computed it before; "boxes" is `metrics.boundary_iou`.
"""

import argparse
import time

import numpy as np
from PIL import Image, ImageDraw

from alto_jax import metrics

# (height, width, share of the image's sides that the mask's box takes)
CASES = ((480, 640, 0.2), (480, 640, 0.5), (480, 640, 0.95), (1500, 2250, 0.2), (1500, 2250, 0.95))


def pair(height: int, width: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """An ellipse with ragged pixels, and the same a little to the side."""
    image = Image.new("1", (width, height))
    top, left = (round(side * (1 - share) / 2) for side in (height, width))
    ImageDraw.Draw(image).ellipse((left, top, width - left - 8, height - top - 1), fill=1)
    mask = np.array(image) & (np.random.default_rng(0).random((height, width)) < 0.999)
    return mask, np.roll(mask, 7, axis=1)


def milliseconds(function, *arguments, repeats: int) -> float:
    """The fastest of some runs."""
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        function(*arguments)
        found.append(time.perf_counter() - began)
    return 1000 * min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    whole = lambda p, t: metrics.mask_iou(metrics.mask_boundary(p), metrics.mask_boundary(t))
    print("| image | mask's box | whole, ms | boxes, ms |\n| --- | ---: | ---: | ---: |")
    for height, width, share in CASES:
        masks = pair(height, width, share)
        assert whole(*masks) == metrics.boundary_iou(*masks)
        before, now = (milliseconds(f, *masks, repeats=options.repeats) for f in (whole, metrics.boundary_iou))
        print(f"| {height} x {width} | {100 * share:.0f} % of each side | {before:.1f} | {now:.1f} |")


if __name__ == "__main__":
    main()
