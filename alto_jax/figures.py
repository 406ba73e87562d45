"""The figures of reports and evaluations; they need matplotlib (`pip install alto_jax[demo]`).

Numbers and pictures come in, a `matplotlib.figure.Figure` goes out; matplotlib's global state is not touched.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import io
import pathlib
from typing import Any, Literal

import numpy as np

from alto_jax.config import write_whole

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
    _legend(figure, axes, least=1)
    return figure


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


def strip_figure(strips: Sequence[Sequence[tuple[str, np.ndarray]]], captions: Sequence[str] = ()) -> Any:
    """Draws pictures in rows, each with its title above.

    Args:
      strips: of each row (title, uint8[H, W, 3]) from left to right.
      captions: a line of text above each row; none if empty.

    Returns:
      A `matplotlib.figure.Figure`.
    """
    figure, columns = new_figure()[0], max(map(len, strips))
    side, above = (1.9, 0.35) if captions else (1.3, 0.2)
    figure.clear()
    heights = [above + side * max(pixels.shape[0] / pixels.shape[1] for _, pixels in cells) for cells in strips]
    figure.set_size_inches(side * columns, sum(heights))
    parts = figure.subfigures(len(strips), 1, squeeze=False, height_ratios=heights)[:, 0]
    for number, (part, cells) in enumerate(zip(parts, strips, strict=True)):
        row = part.subplots(1, columns, squeeze=False)[0]
        if captions:
            part.suptitle(captions[number], x=0.01, horizontalalignment="left", fontsize=8, weight="bold")
        for one in row:
            one.axis("off")
        for one, (title, pixels) in zip(row, cells):
            one.imshow(pixels)
            one.set_title(title, fontsize=8)
    return figure


@dataclasses.dataclass(frozen=True)
class Series:
    """Points (x, y) of a panel under a name; style: as a "line", as "marks", or as "both"."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: Literal["line", "marks", "both"] = "line"


def panels_figure(
    panels: Mapping[str, Sequence[Series]], xlabel: str, ylabels: Sequence[str], *, log_x: bool = False
) -> Any:
    """Draws panels side by side, with one legend of all names below them; a name has one colour in all panels.

    A line of more than 60 points is drawn faintly, with its running mean over a twentieth of them.

    Args:
      panels: title → what is drawn there.
      xlabel: name of the horizontal axes; ylabels: of the vertical axis of each panel.
      log_x: horizontal axes in powers of ten.

    Returns:
      A `matplotlib.figure.Figure`.
    """
    figure = new_figure()[0]
    figure.clear()
    figure.set_size_inches(max(3.4 * len(panels), 6.4), 3.6)
    names = list(dict.fromkeys(series.name for drawn in panels.values() for series in drawn))
    colors = {name: _SERIES_COLORS[i % len(_SERIES_COLORS)] for i, name in enumerate(names)}
    # Note: where colours come again, lines and marks have another form.
    lines = {name: ("-", "--", ":")[i // len(_SERIES_COLORS) % 3] for i, name in enumerate(names)}
    marks = {name: "Ds^"[i // len(_SERIES_COLORS) % 3] for i, name in enumerate(names)}
    handles: dict[str, Any] = {}
    for one, (title, drawn), ylabel in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), ylabels, strict=True
    ):
        for series in drawn:
            x, y = np.asarray(series.x, float), np.asarray(series.y, float)
            order = np.argsort(x, kind="stable")
            style: dict[str, Any] = {"color": colors[series.name], "linewidth": 1.6}
            style["linestyle"] = "" if series.style == "marks" else lines[series.name]
            forms = {"marks": {"marker": marks[series.name], "markersize": 6}, "both": {"marker": "o", "markersize": 4}}
            style |= forms.get(series.style, {})
            width = len(x) // 20
            if series.style == "line" and len(x) > 60:
                one.plot(x[order], y[order], color=colors[series.name], linewidth=0.6, alpha=0.35)
                kernel = np.ones(width) / width
                x, y = x[order][width // 2 :][: len(x) - width + 1], np.convolve(y[order], kernel, "valid")
                order = np.arange(len(x))
            handles.setdefault(series.name, one.plot(x[order], y[order], **style)[0])
        one.set_title(title, fontsize=9)
        one.set_xlabel(xlabel)
        one.set_ylabel(ylabel)
        if log_x:
            one.set_xscale("log")
        one.spines[["top", "right"]].set_visible(False)
        one.grid(axis="y", color="#e2e5e9", linewidth=0.8)
        one.set_axisbelow(True)
    _legend_below(figure, handles)
    return figure


def _legend(figure: Any, axes: Any, least: int = 2) -> None:
    """A legend where the axes leave room for it; below them if it has many names; none of fewer than `least`."""
    handles = dict(zip(*reversed(axes.get_legend_handles_labels())))
    if len(handles) > _MOST_NAMES:
        _legend_below(figure, handles)
    elif len(handles) >= least:
        axes.legend(frameon=False, loc="best")


def _legend_below(figure: Any, handles: Mapping[str, Any]) -> None:
    """A legend below all axes, in as many columns as the figure is wide; the figure grows by its rows."""
    width, height = figure.get_size_inches()
    columns = max(1, min(len(handles), int(width / (0.6 + 0.065 * max(map(len, handles))))))
    figure.set_size_inches(width, height + 0.2 * -(-len(handles) // columns))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False,
                  fontsize=8)  # fmt: skip


def figure_bytes(figure: Any, form: str = "png", dpi: int = 120) -> bytes:
    """A figure as a file of that form ("png" or "svg"), the same bytes for the same figure."""
    import matplotlib  # late: an optional dependency

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "alto_jax"}):  # else the ids of an SVG are drawn anew each time
        figure.savefig(buffer, format=form, dpi=dpi, metadata={"Software" if form == "png" else "Date": None})
    return buffer.getvalue()


def save_figure(figure: Any, stem: pathlib.Path) -> list[pathlib.Path]:
    """Writes a figure as STEM.png and STEM.svg; returns the paths."""
    written = [stem.with_name(f"{stem.name}.{form}") for form in ("png", "svg")]
    for path in written:
        write_whole(path, figure_bytes(figure, path.suffix[1:]))
    return written


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
