"""Boxes as text: `<box>[[x1,y1,x2,y2],…]]</box>` in thousandths of the image's sides, as InternVL writes them.

Comes in: boxes in pixels, or text of people and models. Goes out: the text, or boxes in 0..1.
"""

from collections.abc import Sequence
import re

from alto_jax.mllm.text import BOX, BOX_END

SCALE = 1000
_BOXES = re.compile(rf"{BOX}\s*\[(.*?)\]\s*{BOX_END}", re.DOTALL)
_BOX = re.compile(r"\[\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*\]")


def format_boxes(boxes: Sequence[Sequence[float]], size: tuple[int, int], step: int = 1) -> str:
    """The text of boxes, in their order.

    Args:
      boxes: (x, y, width, height) each, in pixels.
      size: (height, width) of the image in pixels.
      step: coordinates are rounded to multiples of so many thousandths; a small model learns few numbers sooner.

    Raises:
      ValueError: no boxes.
    """
    if not boxes:
        raise ValueError("boxes: expected at least one, got none")
    height, width = size
    corners = []
    for x, y, w, h in boxes:
        ends = (x / width, y / height, (x + w) / width, (y + h) / height)
        corners.append([min(max(round(end * SCALE / step) * step, 0), SCALE) for end in ends])
    return f"{BOX}[{','.join('[' + ','.join(map(str, c)) + ']' for c in corners)}]{BOX_END}"


def parse_boxes(text: str) -> list[tuple[float, float, float, float]]:
    """All boxes (x1, y1, x2, y2) in 0..1 of a text, in order; what is no well-formed box is passed over."""
    found = []
    for group in _BOXES.findall(text):
        for corners in _BOX.findall(group):
            x1, y1, x2, y2 = (int(c) / SCALE for c in corners)
            if x1 <= x2 <= 1 and y1 <= y2 <= 1:
                found.append((x1, y1, x2, y2))
    return found


def box_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """IoU of two boxes (x1, y1, x2, y2); 0.0 where both have no area."""
    across = min(a[2], b[2]) - max(a[0], b[0])
    down = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(across, 0.0) * max(down, 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union > 0 else 0.0
