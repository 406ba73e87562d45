"""From the samples of a result file to the numbers of the tables; needs neither model nor data."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from alto_jax import metrics
from alto_jax.config import QUANTIZE
from alto_jax.evaluate import questions
from alto_jax.mllm import text as words

# What a header holds beside the options of its task.
_NO_OPTIONS = ("checkpoint", "task", "family", "benchmark", "samples", "batch_size", "data", "left_out", "version")


def summarise(
    header: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], min_pixels: int | None = None
) -> dict[str, Any]:
    """What `metrics.json` says of a result file: benchmark, options, and the numbers of its samples.

    Args:
      header, lines: the file's, see `read_results`.
      min_pixels: fewer predicted pixels count as no mask; None: as the header says.

    Raises:
      ValueError: no readable sample.
    """
    options = {name: value for name, value in header.items() if name not in _NO_OPTIONS}
    if min_pixels is not None and "min_pixels" in options:
        options["min_pixels"] = min_pixels
    if kind := quantized(header):
        options["quantize"] = kind
    family, kinds = header["family"], Counter(header["left_out"])
    kinds.update(line.get("kind", "other") for line in lines if "error" in line)
    if family == "tokenizer":
        found = summarise_reconstruction(lines)
    elif "num_latent_tokens" in options:
        found = summarise_masks(lines, options["num_latent_tokens"], min_pixels=options["min_pixels"])
        if family == "open_vocab":
            found["by_class"] = summarise_classes(lines, options["min_pixels"])
    else:
        found = questions.summarise_questions(family, lines)
    found["num_skipped"] += sum(header["left_out"].values())
    named = {"family": family, "benchmark": header["benchmark"]}
    return {**named, **options, **found, "bad_by_kind": dict(sorted(kinds.items()))}


def quantized(header: Mapping[str, Any]) -> str:
    """The type of 8 bits that the language model's kernels had, "" if none: the last word of what a checkpoint is
    called (`loading.load_model`)."""
    kind = header["checkpoint"].rpartition(" ")[2]
    return kind if kind in QUANTIZE else ""


def collect(lines: Sequence[Mapping[str, Any]], min_pixels: int = 0) -> metrics.SegmentationMetrics:
    """The samples of a segmentation benchmark, without those that have an error.

    A prediction of fewer than `min_pixels` is taken as empty. An answer that holds neither a mask nor a "No" is no
    rejection, unless the reference's scoring gave it a mask.
    """
    found = metrics.SegmentationMetrics()
    for line in lines:
        if "error" in line:
            continue
        numbers = {k: line[k] for k in ("intersection", "union", "target_pixels", "predicted_pixels", "boundary")}
        malformed = not line["valid"] and not line.get("said_no", False) and numbers["predicted_pixels"] < max(
            min_pixels, 1)  # fmt: skip
        if numbers["predicted_pixels"] < min_pixels:
            target = line["target_pixels"]
            numbers |= {"intersection": 0, "union": target, "predicted_pixels": 0, "boundary": 0.0 if target else 1.0}
        if malformed:
            numbers["boundary"] = 0.0
        for name, value in numbers.items():
            getattr(found, name).append(value)
        found.malformed.append(malformed)
        found.squared_error.append(float("nan"))
        found.length.append(float("nan"))
    return found


def summarise_masks(
    lines: Sequence[Mapping[str, Any]], max_length: int, *, min_pixels: int = 0, resamples: int = 1000
) -> dict[str, Any]:
    """Metrics of a segmentation benchmark.

    Args:
      lines: samples with key, image, intersection, union, target_pixels, predicted_pixels, boundary, length, valid and
        said_no; samples with an "error" are counted and left out.
      max_length: L, for the histogram.
      min_pixels: fewer predicted pixels count as no mask.
      resamples: of the bootstrap, which draws images.

    Returns:
      The numbers of `SegmentationMetrics.compute`, the 95 % interval of each as `intervals`, num_images, num_skipped,
      format_rate (answers with a well-formed mask, of which the first counts), several_masks_rate (with more), and
      `lengths` (mean, std, min, max, histogram) of the well-formed answers.

    Raises:
      ValueError: no readable sample.
    """
    good = [line for line in lines if "error" not in line]
    if not good:
        raise ValueError(f"none of the {len(lines)} samples could be read, such as: {lines[0]['error']}")
    collected = collect(good, min_pixels)
    images = [line.get("image", line.get("key", number)) for number, line in enumerate(good)]
    result: dict[str, Any] = collected.compute()
    result["intervals"] = mask_intervals(collected, images, resamples)
    result |= {"num_images": len(set(images)), "num_skipped": len(lines) - len(good)}
    ious = collected.ious()
    asked = [number for number, line in enumerate(good) if not line.get("said_no")]
    result["format_rate"] = float(np.mean([good[number]["valid"] for number in asked])) if asked else None
    several = [good[number].get("num_masks", 0) > 1 for number in asked]
    result["several_masks_rate"] = float(np.mean(several)) if asked else None
    valid = [number for number in asked if good[number]["valid"]]
    lengths = [good[number]["length"] for number in valid]
    result["lengths"] = metrics.length_statistics(np.array(lengths), max_length) if lengths else None
    by_length: dict[int, list[float]] = {}
    for number in valid:
        by_length.setdefault(good[number]["length"], []).append(ious[number])
    result["giou_by_length"] = {str(k): float(np.mean(v)) for k, v in sorted(by_length.items())}
    return result


def mask_intervals(
    collected: metrics.SegmentationMetrics, images: Sequence[Any], resamples: int
) -> dict[str, list[float]]:
    """Bootstrap 95 % intervals of the numbers in `compute`; the samples of an image are drawn together."""
    ious, groups = collected.ious(), np.array(images, object)
    intersection, union = np.array(collected.intersection, float), np.array(collected.union, float)
    has_target = np.array(collected.target_pixels) > 0
    is_empty = np.array(collected.predicted_pixels) == 0

    def interval(
        statistic: Callable[..., float], *samples: np.ndarray, of: np.ndarray | slice = slice(None)
    ) -> list[float]:
        drawn = [sample[of] for sample in samples]
        return list(metrics.bootstrap_ci(statistic, *drawn, num_resamples=resamples, groups=groups[of].tolist()))

    found = {
        "giou": interval(np.mean, ious),
        "ciou": interval(lambda i, u: i.sum() / (u.sum() + 1e-10), intersection, union),
        "biou": interval(np.mean, np.array(collected.boundary)),
    }
    if has_target.any():
        found["t_acc"] = interval(np.mean, ~is_empty, of=has_target)
        for k in metrics.PRECISION_THRESHOLDS:
            found[f"precision@{k}"] = interval(np.mean, ious >= k, of=has_target)
    if not has_target.all():
        found["n_acc"] = interval(np.mean, collected.rejected(), of=~has_target)
    return found


def summarise_classes(lines: Sequence[Mapping[str, Any]], min_pixels: int = 0) -> dict[str, dict[str, float]]:
    """gIoU and cIoU of the samples that ask for each class (alone or with others), by name: open vocabulary."""
    by_class: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        for name in dict.fromkeys(words.split_classes(line["phrase"])) if "error" not in line else ():
            by_class.setdefault(name, []).append(line)
    found = {}
    for name, mine in sorted(by_class.items()):
        numbers = collect(mine, min_pixels).compute()
        found[name] = {"num_samples": len(mine), "giou": numbers["giou"], "ciou": numbers["ciou"]}
    return found


def summarise_reconstruction(lines: Sequence[Mapping[str, Any]], *, resamples: int = 1000) -> dict[str, Any]:
    """Metrics of the tokenizer alone.

    Args:
      lines: samples with image, length, iou (one for each number of tokens 1..L), iou_adaptive, and where the tokenizer
        has image features iou_plain and iou_adaptive_plain, without them; samples with an "error" or "skipped" are
        counted and left out.
      resamples: of the bootstrap, which draws images.

    Returns:
      num_samples, num_images, num_skipped, lengths, and for "with_features" and "features_withheld" (or
      "without_features" of a tokenizer that was trained without them) giou_by_tokens, giou_adaptive, and `intervals` of
      the full length and the adaptive one.
    """
    good = [line for line in lines if "iou" in line]
    if not good:
        raise ValueError(f"none of the {len(lines)} samples could be read")
    names = {"with_features": ("iou", "iou_adaptive"), "features_withheld": ("iou_plain", "iou_adaptive_plain")}
    if "iou_plain" not in good[0]:
        names = {"without_features": ("iou", "iou_adaptive")}
    images = [line.get("image", line["key"]) for line in good]
    interval = lambda values: list(metrics.bootstrap_ci(np.mean, values, num_resamples=resamples, groups=images))
    counts = {"num_samples": len(good), "num_images": len(set(images)), "num_skipped": len(lines) - len(good)}
    result: dict[str, Any] = counts
    for name, (fixed, adaptive) in names.items():
        by_tokens = np.array([line[fixed] for line in good])
        chosen = np.array([line[adaptive] for line in good])
        result[name] = {
            "giou_by_tokens": {str(k + 1): float(v) for k, v in enumerate(by_tokens.mean(0))},
            "giou_adaptive": float(chosen.mean()),
            "intervals": {
                "full": interval(by_tokens[:, -1]),
                "adaptive": interval(chosen),
            },
        }
    result["lengths"] = metrics.length_statistics(np.array([line["length"] for line in good]), len(good[0]["iou"]))
    return result
