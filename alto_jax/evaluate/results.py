"""Per-sample results that survive a kill, and their summaries.

A result file is JSONL: a header line with everything that the results depend on, then one line a sample in
order. Lines are appended batch by batch; opened again, a file is cut back to its last whole batch, so that the
run goes on there and ends with the same bytes as one that was never stopped. Times are in a file of their own.
"""

from collections.abc import Callable, Mapping, Sequence
import json
import os
import pathlib
from typing import Any

import numpy as np

from alto_jax import metrics
from alto_jax.config import ConfigError, write_whole


class ResultFile:
    """The JSONL of one benchmark; only the first process writes.

    Attributes:
      done: samples that are in the file, a whole number of batches (or all).
    """

    def __init__(self, path: str | os.PathLike, header: Mapping[str, Any], *, batch_size: int, total: int):
        """Opens or makes the file; ConfigError if it holds results of another checkpoint or other options."""
        self.path = pathlib.Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        first = json.dumps(dict(header), sort_keys=True)
        kept, self.done = "", 0
        if self.path.exists():
            content = self.path.read_bytes().decode("utf-8", "replace")
            lines = content[: content.rfind("\n") + 1].splitlines()
            if lines and lines[0] != first:
                raise ConfigError(f"--out: {self.path} holds results of {_difference(lines[0], first)}; choose another "
                                  "directory, or delete it")  # fmt: skip
            count = min(len(lines) - 1, total) if lines else 0
            self.done = count if count == total else count - count % batch_size
            kept = "".join(line + "\n" for line in lines[1 : 1 + self.done])
        text = first + "\n" + kept
        if not self.path.exists() or self.path.read_bytes() != text.encode():
            write_whole(self.path, text)
        self._file = self.path.open("ab")

    def append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Appends the lines of a batch."""
        self._file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done += len(lines)

    def close(self) -> None:
        self._file.close()


def _difference(old: str, new: str) -> str:
    """What differs between two headers, in words."""
    try:
        before, now = json.loads(old), json.loads(new)
        return "; ".join(f"{k} {before.get(k)!r} (now {now.get(k)!r})" for k in now if before.get(k) != now.get(k))
    except ValueError:
        return "something else"


def read_results(path: str | os.PathLike) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Header and samples of a result file."""
    lines = [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]
    return lines[0], lines[1:]


def merge_lines(parts: Sequence[Sequence[dict[str, Any]]], total: int) -> list[dict[str, Any]]:
    """The lines of all processes in order of their "index", each once (processes may share samples), below `total`."""
    by_index = {line["index"]: line for part in reversed(parts) for line in part}
    return [by_index[index] for index in sorted(by_index) if index < total]


# --- summaries --------------------------------------------------------------------------------------


def summarise_masks(lines: Sequence[Mapping[str, Any]], max_length: int, *, resamples: int = 1000) -> dict[str, Any]:
    """Metrics of a segmentation benchmark.

    Args:
      lines: samples with intersection, union, target_pixels, predicted_pixels, boundary, length and valid; samples
        with an "error" are counted and left out.
      max_length: L, for the histogram.
      resamples: of the bootstrap.

    Returns:
      The numbers of `SegmentationMetrics.compute`, the 95 % interval of each as `intervals`, num_skipped,
      format_rate (answers with a well-formed mask, of which the first counts), several_masks_rate (with more), and
      `lengths` (mean, std, min, max, histogram) of the well-formed answers.

    Raises:
      ValueError: no readable sample.
    """
    good = [line for line in lines if "error" not in line]
    if not good:
        raise ValueError(f"none of the {len(lines)} samples could be read, such as: {lines[0]['error']}")
    collected = metrics.SegmentationMetrics(
        **{k: [line[k] for line in good] for k in ("intersection", "union", "target_pixels", "predicted_pixels")},
        boundary=[line["boundary"] for line in good],
        squared_error=[float("nan")] * len(good),
        length=[float("nan")] * len(good),
    )
    result: dict[str, Any] = collected.compute()
    result["intervals"] = mask_intervals(collected, resamples)
    result["num_skipped"] = len(lines) - len(good)
    asked = [line for line in good if not line.get("said_no")]
    result["format_rate"] = float(np.mean([line["valid"] for line in asked])) if asked else None
    several = [line.get("num_masks", 0) > 1 for line in asked]
    result["several_masks_rate"] = float(np.mean(several)) if asked else None
    lengths = [line["length"] for line in asked if line["valid"]]
    result["lengths"] = metrics.length_statistics(np.array(lengths), max_length) if lengths else None
    by_length: dict[int, list[float]] = {}
    for line in asked:
        if line["valid"]:
            by_length.setdefault(line["length"], []).append(line["iou"])
    result["giou_by_length"] = {str(k): float(np.mean(v)) for k, v in sorted(by_length.items())}
    return result


def mask_intervals(collected: metrics.SegmentationMetrics, resamples: int) -> dict[str, list[float]]:
    """Bootstrap 95 % intervals of the numbers in `compute`."""
    ious = collected.ious()
    intersection, union = np.array(collected.intersection, float), np.array(collected.union, float)
    has_target = np.array(collected.target_pixels) > 0
    is_empty = np.array(collected.predicted_pixels) == 0

    def interval(statistic: Callable[..., Any], *samples: np.ndarray) -> list[float]:
        return list(metrics.bootstrap_ci(statistic, *samples, num_resamples=resamples))

    found = {
        "giou": interval(np.mean, ious),
        "ciou": interval(lambda i, u: i.sum() / (u.sum() + 1e-10), intersection, union),
        "biou": interval(np.mean, np.array(collected.boundary)),
    }
    if has_target.any():
        found["t_acc"] = interval(np.mean, ~is_empty[has_target])
        for k in metrics.PRECISION_THRESHOLDS:
            found[f"precision@{k}"] = interval(np.mean, ious[has_target] > k)
    if not has_target.all():
        found["n_acc"] = interval(np.mean, is_empty[~has_target])
    return found


def summarise_reconstruction(lines: Sequence[Mapping[str, Any]], *, resamples: int = 1000) -> dict[str, Any]:
    """Metrics of the tokenizer alone.

    Args:
      lines: samples with length, iou (one for each number of tokens 1..L), iou_adaptive, and where the tokenizer
        has image features iou_plain and iou_adaptive_plain, without them; samples with an "error" or "skipped" are
        counted and left out.
      resamples: of the bootstrap.

    Returns:
      num_samples, num_skipped, lengths, and for "with_features" and "without_features" giou_by_tokens,
      giou_adaptive, and `intervals` of the full length and the adaptive one.
    """
    good = [line for line in lines if "iou" in line]
    if not good:
        raise ValueError(f"none of the {len(lines)} samples could be read")
    names = {"with_features": ("iou", "iou_adaptive"), "without_features": ("iou_plain", "iou_adaptive_plain")}
    if "iou_plain" not in good[0]:
        names = {"without_features": ("iou", "iou_adaptive")}
    result: dict[str, Any] = {"num_samples": len(good), "num_skipped": len(lines) - len(good)}
    for name, (fixed, adaptive) in names.items():
        by_tokens = np.array([line[fixed] for line in good])
        chosen = np.array([line[adaptive] for line in good])
        result[name] = {
            "giou_by_tokens": {str(k + 1): float(v) for k, v in enumerate(by_tokens.mean(0))},
            "giou_adaptive": float(chosen.mean()),
            "intervals": {
                "full": list(metrics.bootstrap_ci(np.mean, by_tokens[:, -1], num_resamples=resamples)),
                "adaptive": list(metrics.bootstrap_ci(np.mean, chosen, num_resamples=resamples)),
            },
        }
    result["lengths"] = metrics.length_statistics(np.array([line["length"] for line in good]), len(good[0]["iou"]))
    return result
