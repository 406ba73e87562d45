"""The figures of reports and evaluations; they need matplotlib (`pip install alto_jax[demo]`).

Numbers and pictures come in, a `matplotlib.figure.Figure` goes out; matplotlib's global state is not touched.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Okabe-Ito colours, as in report.py.
_SERIES_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_MOST_NAMES = 6  # in a legend that lies on the plot


def iou_curve_figure(
    curves: Mapping[str, Mapping[int | str, float]],
    points: Mapping[str, tuple[float, float]] | None = None,
    ylabel: str = "gIoU",
) -> Any:
    """Draws IoU against the number of mask tokens.

    Args:
      curves: for each name, IoU in 0..1 by token count (counts may be strings, as JSON gives them).
      points: single operating points `(mean tokens, IoU)`, e.g. adaptive length.
      ylabel: name of the vertical axis.

    Returns:
      A `matplotlib.figure.Figure`.

    Raises:
      ImportError: matplotlib is not installed.
    """
    figure, axes = new_figure()
    colors = iter(_SERIES_COLORS * (1 + (len(curves) + len(points or {})) // len(_SERIES_COLORS)))
    ticks: set[int] = set()
    for name, curve in curves.items():
        tokens, values = zip(*sorted((int(k), v) for k, v in curve.items()))
        axes.plot(tokens, values, marker="o", markersize=5, linewidth=2, color=next(colors), label=name)
        ticks.update(tokens)
    for name, (mean, value) in (points or {}).items():
        axes.plot([mean], [value], marker="D", markersize=8, linestyle="", color=next(colors), label=name)
    axes.set_xlabel("mask tokens")
    axes.set_ylabel(ylabel)
    axes.set_ylim(0, 1)
    axes.set_xlim(left=0)
    if ticks and len(ticks) <= 8:
        axes.set_xticks(sorted(ticks))
    if len(curves) + len(points or {}) > 1:
        _legend(figure, axes)
    return figure


def length_histogram_figure(lengths: Mapping[str, Sequence[int]], max_length: int) -> Any:
    """Draws how often each number of mask tokens was used.

    Args:
      lengths: for each name, the lengths of its samples, each in 0..max_length.
      max_length: L.

    Returns:
      A `matplotlib.figure.Figure`.

    Raises:
      ImportError: matplotlib is not installed.
    """
    figure, axes = new_figure()
    width = 0.86 / max(len(lengths), 1)
    for i, (name, values) in enumerate(lengths.items()):
        counts = np.bincount(np.asarray(values, np.int64), minlength=max_length + 1)
        share = counts / max(counts.sum(), 1)
        color = _SERIES_COLORS[i % len(_SERIES_COLORS)]
        centres = np.arange(max_length + 1) + (i - (len(lengths) - 1) / 2) * width
        mean = f"{np.mean(values):.1f}" if len(values) else "no samples"
        axes.bar(centres, share, width, color=color, label=f"{name} (mean {mean})")
    axes.set_xlabel("mask tokens")
    axes.set_ylabel("share of samples")
    axes.set_xlim(-0.5, max_length + 0.5)
    _legend(figure, axes)
    return figure


def _legend(figure: Any, axes: Any) -> None:
    """Names of what is drawn: among it, or if they are many, below it."""
    count = len(axes.get_legend_handles_labels()[0])
    if count <= _MOST_NAMES:
        axes.legend(frameon=False, loc="best")
        return
    figure.set_figheight(figure.get_figheight() + 0.22 * count)
    figure.legend(frameon=False, loc="outside lower left")


def scatter_figure(panels: Mapping[str, tuple[Sequence[float], Sequence[float]]], ylabel: str) -> Any:
    """Draws points in panels side by side that share their vertical axis.

    Args:
      panels: name of the horizontal axis → (x, y) of its points.
      ylabel: name of the vertical axis.

    Returns:
      A `matplotlib.figure.Figure`.
    """
    figure = new_figure()[0]
    figure.clear()
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for one, (name, (x, y)) in zip(axes, panels.items(), strict=True):
        one.plot(x, y, marker="o", markersize=4, linestyle="", alpha=0.35, color=_SERIES_COLORS[0])
        one.set_xlabel(name)
        one.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(ylabel)
    return figure


def strip_figure(strips: Sequence[Sequence[tuple[int, np.ndarray]]]) -> Any:
    """Draws pictures in rows, each with its number of tokens above.

    Args:
      strips: of each row (number of tokens, uint8[H, W, 3]) from left to right.

    Returns:
      A `matplotlib.figure.Figure`.
    """
    figure, columns = new_figure()[0], max(map(len, strips))
    figure.clear()
    figure.set_size_inches(1.3 * columns, 1.5 * len(strips))
    for row, cells in zip(figure.subplots(len(strips), columns, squeeze=False), strips, strict=True):
        for one in row:
            one.axis("off")
        for one, (count, pixels) in zip(row, cells):
            one.imshow(pixels)
            one.set_title(f"{count} token{'s' * (count != 1)}", fontsize=8)
    return figure


def new_figure() -> tuple[Any, Any]:
    """Returns a figure and its axes in the report's style, without touching matplotlib's global state."""
    try:
        from matplotlib.figure import Figure  # late: an optional dependency
    except ImportError as error:
        raise ImportError("matplotlib is needed for figures: pip install 'alto_jax[demo]'") from error
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e2e5e9", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes
