"""The report of a run: `report.html`, complete in one file, and its figures as PNG files.

What comes in are tables (rows of plain values), figures and samples (arrays); what goes out is a page
that opens without a network: images are embedded, there are no scripts, every image has a text
alternative. Overlays and the page need only Pillow; figures are made in figures.py.
"""

import base64
from collections.abc import Mapping, Sequence
import dataclasses
import html
import io
import math
import os
from pathlib import Path
import re
from typing import Any

import numpy as np
from PIL import Image

from alto_jax.config import write_whole
from alto_jax.figures import figure_bytes

# Okabe-Ito colours: told apart with every common form of colour blindness.
TARGET_COLOR = (0, 114, 178)
PREDICTION_COLOR = (213, 94, 0)
_SAMPLE_PIXELS = 224


@dataclasses.dataclass(frozen=True)
class ReportSample:
    """One prediction to show.

    image: uint8[H, W, 3]; prediction: bool[H, W]; target: bool[H, W] or None; text: the request (or any
    caption); length: mask tokens used, of at most max_length; iou in 0..1 or None; codes: the tokens; note: a line
    below the text.
    """

    image: np.ndarray
    prediction: np.ndarray
    text: str
    length: int
    max_length: int
    target: np.ndarray | None = None
    iou: float | None = None
    codes: Sequence[int] = ()
    note: str = ""


# --- overlays --------------------------------------------------------------------------------------


def overlay(
    image: np.ndarray,
    mask: np.ndarray,
    color: tuple[int, int, int] = PREDICTION_COLOR,
    alpha: float = 0.45,
) -> np.ndarray:
    """Tints the masked pixels of an image and draws the mask's outline.

    Args:
      image: uint8[H, W, 3].
      mask: bool[H, W], or float[H, W] that is taken at > 0.5.
      color: RGB in 0..255.
      alpha: opacity of the tint, in 0..1; the outline is opaque.

    Returns:
      uint8[H, W, 3].

    Raises:
      ValueError: the mask's size is not the image's, or `alpha` is out of range.
    """
    mask = np.asarray(mask) > 0.5
    if mask.shape != image.shape[:2]:
        raise ValueError(f"mask: expected shape {image.shape[:2]}, got {mask.shape}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: expected a value in 0..1, got {alpha!r}")
    out = image.astype(np.float32)
    out[mask] = (1 - alpha) * out[mask] + alpha * np.array(color, np.float32)
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    out[mask & ~inner] = color
    return np.rint(out).astype(np.uint8)


def save_overlay(
    path: str | os.PathLike,
    image: np.ndarray,
    mask: np.ndarray,
    color: tuple[int, int, int] = PREDICTION_COLOR,
    alpha: float = 0.45,
) -> None:
    """Writes `overlay(...)` to an image file; the format follows the suffix of `path`."""
    Image.fromarray(overlay(image, mask, color, alpha)).save(path)


# --- tables ----------------------------------------------------------------------------------------


def stage_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Turns the nested summary of a run into the rows of one table, a stage a row.

    Args:
      summary: stage name → its metrics; scalars become columns, anything else is left out. The group
        `seconds` (stage name → time) becomes the last column.

    Returns:
      Rows for `write_report`; a metric that a stage lacks is absent from its row.
    """
    seconds = summary.get("seconds", {})
    rows = []
    for stage, values in summary.items():
        if stage == "seconds" or not isinstance(values, Mapping):
            continue
        row: dict[str, Any] = {"stage": stage}
        row |= {k: v for k, v in values.items() if isinstance(v, (int, float, str)) and k != "stage"}
        if stage in seconds:
            row["seconds"] = seconds[stage]
        rows.append(row)
    return rows


def format_value(value: Any) -> str:
    """Writes a table value: three decimals for small floats, a dash for what is missing."""
    if value is None or (isinstance(value, (float, np.floating)) and math.isnan(value)):
        return "–"
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, (int, np.integer)):
        return f"{value:,}"
    if isinstance(value, (float, np.floating)):
        value = float(value)
        if value != 0 and abs(value) < 1e-3:
            return f"{value:.2e}"
        return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"
    return str(value)


# --- page ------------------------------------------------------------------------------------------


def write_report(
    path: str | os.PathLike,
    title: str,
    tables: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    figures: Mapping[str, tuple[Any, str]] | None = None,
    samples: Mapping[str, Sequence[ReportSample]] | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Writes the page, and each figure as a PNG file beside it.

    Args:
      path: the HTML file; its folder is created. Figures go to `<title of the figure>.png` in that folder.
      title: heading of the page.
      tables: title → rows; the columns are the union of the rows' keys, in order of appearance.
      figures: title → (matplotlib figure, text alternative that says what the figure shows).
      samples: title → predictions, shown as a grid.
      notes: paragraphs under the heading.

    Returns:
      The path of the HTML file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    body = [f"<header><h1>{html.escape(title)}</h1>"]
    body += [f"<p>{html.escape(note)}</p>" for note in notes]
    body.append("</header>")
    body += [_table_html(name, rows) for name, rows in (tables or {}).items()]
    if figures:
        body.append('<section class="figures">')
        for name, (figure, alt) in figures.items():
            data = figure_bytes(figure, dpi=150)
            (path.parent / f"{_slug(name)}.png").write_bytes(data)
            body.append(f"<figure>{_img(data, alt)}<figcaption>{html.escape(name)}</figcaption></figure>")
        body.append("</section>")
    for name, group in (samples or {}).items():
        cards = "".join(_sample_html(sample) for sample in group)
        body.append(f"<section><h2>{html.escape(name)}</h2>{_LEGEND}<div class='grid'>{cards}</div></section>")
    page = _PAGE.format(title=html.escape(title), style=_STYLE, body="\n".join(body))
    write_whole(path, page)
    return path


def _table_html(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(f'<th scope="col">{html.escape(str(c))}</th>' for c in columns)
    lines = []
    for row in rows:
        cells = []
        for i, column in enumerate(columns):
            value = row.get(column)
            text = html.escape(format_value(value))
            number = value is None or isinstance(value, (int, float, np.number))
            kind = ' class="number"' if number else ""
            cells.append(f'<th scope="row">{text}</th>' if i == 0 else f"<td{kind}>{text}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<section><div class="scroll"><table><caption>{html.escape(title)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div></section>"
    )


def _sample_html(sample: ReportSample) -> str:
    text = html.escape(sample.text)
    iou = "" if sample.iou is None else f"<span>IoU <b>{sample.iou:.2f}</b></span>"
    views = [(sample.image, f"Input image for: {sample.text}")]
    if sample.target is not None:
        views.append((overlay(sample.image, sample.target, TARGET_COLOR), f"Target mask for: {sample.text}"))
    quality = "" if sample.iou is None else f", IoU {sample.iou:.2f}"
    predicted = overlay(sample.image, sample.prediction, PREDICTION_COLOR)
    views.append((predicted, f"Predicted mask with {sample.length} tokens{quality}"))
    images = "".join(_img(_image_png(pixels), alt) for pixels, alt in views)
    filled = 100 * sample.length / max(sample.max_length, 1)
    codes = " ".join(str(int(c)) for c in sample.codes)
    codes = f'<p class="codes">{codes}</p>' if codes else ""
    note = f'<p class="note">{html.escape(sample.note)}</p>' if sample.note else ""
    return (
        f'<article><div class="views">{images}</div><p class="text">{text}</p>{note}'
        f'<p class="facts"><span><b>{sample.length}</b> of {sample.max_length} tokens</span>{iou}</p>'
        f'<div class="bar" aria-hidden="true"><i style="width:{filled:.1f}%"></i></div>{codes}</article>'
    )


def _image_png(pixels: np.ndarray) -> bytes:
    """PNG bytes of uint8[H, W, 3]; large images are reduced, small ones kept."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if max(image.size) > _SAMPLE_PIXELS:
        image.thumbnail((_SAMPLE_PIXELS, _SAMPLE_PIXELS), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _img(png: bytes, alt: str) -> str:
    data = base64.b64encode(png).decode("ascii")
    return f'<img alt="{html.escape(alt, quote=True)}" src="data:image/png;base64,{data}">'


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "figure"


_LEGEND = '<p class="legend"><span class="target">target</span> <span class="prediction">prediction</span></p>'

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root {
  color-scheme: light; --ink: #1c2430; --soft: #5b6675; --line: #e2e5e9; --target: #0072b2;
  --prediction: #d55e00;
}
* { box-sizing: border-box; }
body {
  margin: 0; background: #f6f7f9; color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif;
}
main { max-width: 76rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { margin: 0 0 .5rem; font-size: 1.9rem; line-height: 1.2; letter-spacing: -.01em; }
h2 { margin: 0 0 .25rem; font-size: 1.2rem; }
header p { max-width: 46rem; margin: .4rem 0; color: var(--soft); }
section { margin-top: 2rem; }
.scroll { overflow-x: auto; background: #fff; border: 1px solid var(--line); border-radius: 8px; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { padding: .9rem 1rem .3rem; text-align: left; font-size: 1.2rem; font-weight: 600; }
th, td { padding: .5rem 1rem; border-top: 1px solid var(--line); text-align: left; white-space: nowrap; }
thead th { border-top: 0; color: var(--soft); font-size: .85rem; font-weight: 500; }
tbody th { font-weight: 600; }
td.number { text-align: right; }
thead th:not(:first-child) { text-align: right; }
.figures {
  display: grid; gap: 1.25rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
}
figure { margin: 0; padding: 1rem; background: #fff; border: 1px solid var(--line); border-radius: 8px; }
figure img { width: 100%; height: auto; display: block; }
figcaption { margin-top: .5rem; color: var(--soft); font-size: .9rem; }
.legend { margin: 0 0 .75rem; color: var(--soft); font-size: .9rem; }
.legend span::before {
  content: ""; display: inline-block; width: .75em; height: .75em; margin-right: .35em;
  border-radius: 2px; background: currentColor;
}
.legend span { margin-right: 1rem; }
.target { color: var(--target); } .prediction { color: var(--prediction); }
.grid {
  display: grid; gap: 1.25rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr));
}
article { padding: .9rem; background: #fff; border: 1px solid var(--line); border-radius: 8px; }
.views { display: flex; gap: .4rem; }
.views img { flex: 1 1 0; min-width: 0; height: auto; border-radius: 4px; align-self: start; }
.text { margin: .7rem 0 .3rem; }
.note { margin: 0 0 .3rem; color: var(--soft); font-size: .85rem; overflow-wrap: anywhere; }
.facts {
  display: flex; justify-content: space-between; margin: 0 0 .35rem; color: var(--soft);
  font-size: .9rem;
}
.facts b { color: var(--ink); }
.bar { height: 6px; border-radius: 3px; background: var(--line); overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--prediction); }
.codes {
  margin: .5rem 0 0; color: var(--soft); font: .72rem/1.5 ui-monospace, monospace;
  overflow-wrap: anywhere;
}
@media print { body { background: #fff; } article, figure { break-inside: avoid; } }
"""
