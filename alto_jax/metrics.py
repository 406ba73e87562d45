"""Evaluation metrics: IoU family, gRefCOCO's accuracies, boundary IoU, lengths, code usage.

Masks come in as bool or probability arrays on the host, numbers come out as plain floats, ready for a
table. Definitions: NUMERICS section 6 (stage-1 validation) and 8 (reference evaluation), gRefCOCO's
official rules for samples without a target. `intersection_union` and `mask_iou` use only array
operators, so they take jax arrays inside jit as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any, Literal

import numpy as np
from PIL import Image

from alto_jax.config import require

PRECISION_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)


# --- single masks ----------------------------------------------------------------------------------


def intersection_union(prediction: Any, target: Any) -> tuple[Any, Any]:
    """Counts the pixels in both and in either of bool[..., H, W] masks; returns two int[...]."""
    return (prediction & target).sum(axis=(-2, -1)), (prediction | target).sum(axis=(-2, -1))


def mask_iou(prediction: Any, target: Any) -> Any:
    """IoU of prediction and target, bool[..., H, W] masks; float[...] in 0..1, and 1 where both are empty."""
    intersection, union = intersection_union(prediction, target)
    is_empty = union == 0
    return (intersection + is_empty) / (union + is_empty)


def mask_boundary(mask: Any, dilation_ratio: float = 0.02) -> Any:
    """Pixels of bool[..., H, W] (numpy or jax) within a few pixels of the mask's border (or of the image's).

    The width is `dilation_ratio` times the image diagonal, at least 1 pixel: the mask minus its erosion by a
    square of side 2 * width + 1, with zeros outside the image.
    """
    reach = _boundary_width(mask, dilation_ratio)
    pad = [(0, 0)] * (mask.ndim - 2) + [(reach + 1, reach)] * 2
    sums = mask.__array_namespace__().pad(mask, pad).astype(np.int32).cumsum(axis=-2).cumsum(axis=-1)
    side = 2 * reach + 1
    window = sums[..., side:, side:] - sums[..., :-side, side:] - sums[..., side:, :-side] + sums[..., :-side, :-side]
    return mask & (window < side * side)


def _boundary_width(mask: Any, dilation_ratio: float) -> int:
    height, width = mask.shape[-2:]
    return max(1, round(dilation_ratio * float(np.hypot(height, width))))


def boundary_iou(prediction: Any, target: Any, dilation_ratio: float = 0.02) -> Any:
    """IoU of the `mask_boundary` of prediction and target, bool[..., H, W] masks (numpy or jax), as wide as
    dilation_ratio of the diagonal; float[...], 1 where both are empty.

    Single masks of numpy are eroded within their boxes alone: the same number for a fraction of the work.
    """
    if isinstance(prediction, np.ndarray) and isinstance(target, np.ndarray) and prediction.ndim == 2:
        reach = _boundary_width(target, dilation_ratio)
        (first, (top, left)), (second, (top2, left2)) = (_boundary_in_box(mask, reach) for mask in (prediction, target))
        # Where the two boxes overlap, in the coordinates of each.
        rows = max(top, top2), min(top + first.shape[0], top2 + second.shape[0])
        columns = max(left, left2), min(left + first.shape[1], left2 + second.shape[1])
        both = 0
        if rows[0] < rows[1] and columns[0] < columns[1]:
            part = lambda found, y, x: found[rows[0] - y : rows[1] - y, columns[0] - x : columns[1] - x]
            both = int(np.count_nonzero(part(first, top, left) & part(second, top2, left2)))
        either = np.count_nonzero(first) + np.count_nonzero(second) - both
        return np.float64(both / either) if either else np.float64(1)
    return mask_iou(mask_boundary(prediction, dilation_ratio), mask_boundary(target, dilation_ratio))


def _boundary_in_box(mask: np.ndarray, reach: int) -> tuple[np.ndarray, tuple[int, int]]:
    """The boundary of bool[H, W] within the mask's box, and the box's first row and column."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return np.zeros((0, 0), bool), (0, 0)
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    eroded = _all_near(_all_near(box, reach, 0), reach, 1)
    return box & ~eroded, (int(rows[0]), int(columns[0]))


def _all_near(mask: np.ndarray, reach: int, axis: int) -> np.ndarray:
    """Whether all pixels within `reach` along an axis are True (none outside is), bool[H, W]; by doubling steps."""
    result, side, done = np.zeros(mask.shape, bool), 2 * reach + 1, 1
    cut = lambda array, start, stop: array[start:stop] if axis == 0 else array[:, start:stop]
    size = mask.shape[axis]
    if size < side:
        return result
    while done < side:
        step = min(done, side - done)  # Note: found[i] is of `done` pixels from i on.
        left = mask.shape[axis] - step
        mask = cut(mask, 0, left) & cut(mask, step, left + step)
        done += step
    cut(result, reach, size - reach)[...] = mask
    return result


# --- from a probability map to a prediction ----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class MaskProtocol:
    """How a probability map becomes a prediction at the size of the ground truth.

    upsample: resize of the probabilities before the threshold; the reference uses "nearest".
    ignore: what happens to ignored pixels: "exclude" drops them from both masks, "true_positive" sets them
      in both (Compat: the reference).
    min_pixels: a prediction with fewer pixels is taken as empty; gRefCOCO results often use 50.
    """

    upsample: Literal["bilinear", "nearest"] = "bilinear"
    ignore: Literal["exclude", "true_positive"] = "exclude"
    min_pixels: int = 0

    def __post_init__(self) -> None:
        require(self.upsample in ("bilinear", "nearest"), "eval.upsample", self.upsample, "bilinear or nearest")
        modes = ("exclude", "true_positive")
        require(self.ignore in modes, "eval.ignore", self.ignore, f"one of {modes}")
        require(self.min_pixels >= 0, "eval.min_pixels", self.min_pixels, "a count >= 0")


REFERENCE_PROTOCOL = MaskProtocol(upsample="nearest", ignore="true_positive")


def resize_probability(
    probability: np.ndarray, height: int, width: int, upsample: Literal["bilinear", "nearest"] = "bilinear"
) -> np.ndarray:
    """Brings a predicted probability map to the size of its image.

    Args:
      probability: float[h, w] in 0..1.
      height, width: of the image.
      upsample: between pixel centres (Pillow's half-pixel convention); the reference takes the nearest pixel.

    Returns:
      float32[height, width] in 0..1.
    """
    filters = {"bilinear": Image.Resampling.BILINEAR, "nearest": Image.Resampling.NEAREST}
    image = Image.fromarray(np.ascontiguousarray(probability, np.float32))
    return np.asarray(image.resize((width, height), filters[upsample]))


def apply_protocol(
    probabilities: np.ndarray,
    target: np.ndarray,
    ignore: np.ndarray | None = None,
    protocol: MaskProtocol = MaskProtocol(),  # noqa: B008 (frozen)
) -> tuple[np.ndarray, np.ndarray]:
    """Turns a probability map into the two masks that are compared.

    Args:
      probabilities: float[h, w] in 0..1, of any size.
      target: bool[H, W].
      ignore: bool[H, W], pixels without a label; None means none.
      protocol: see `MaskProtocol`.

    Returns:
      prediction bool[H, W] (probability > 0.5) and target bool[H, W].
    """
    height, width = target.shape
    prediction = resize_probability(probabilities, height, width, protocol.upsample) > 0.5
    prediction, target = without_ignored(prediction, target, ignore, protocol)
    if prediction.sum() < protocol.min_pixels:
        prediction = np.zeros_like(prediction)
    return prediction, target


def without_ignored(
    prediction: np.ndarray, target: np.ndarray, ignore: np.ndarray | None, protocol: MaskProtocol
) -> tuple[np.ndarray, np.ndarray]:
    """Treats pixels without a label (`ignore` bool[H, W] or None) in both bool[H, W] masks by protocol."""
    if ignore is not None:
        if protocol.ignore == "exclude":
            prediction, target = prediction & ~ignore, target & ~ignore
        else:
            prediction, target = prediction | ignore, target | ignore
    return prediction, target


# --- a data set ------------------------------------------------------------------------------------


@dataclasses.dataclass
class SegmentationMetrics:
    """Collects samples and summarises them; collections of several processes merge.

    Each field is one list entry per sample: pixel counts `intersection`, `union` and `target_pixels`,
    `predicted_pixels`, the boundary IoU, where known the squared error of the probabilities and the mask
    tokens used (NaN where not), and whether the answer was malformed. A malformed answer says nothing: it is no
    rejection, so that without a target too its IoU is 0.
    """

    intersection: list[int] = dataclasses.field(default_factory=list)
    union: list[int] = dataclasses.field(default_factory=list)
    target_pixels: list[int] = dataclasses.field(default_factory=list)
    predicted_pixels: list[int] = dataclasses.field(default_factory=list)
    boundary: list[float] = dataclasses.field(default_factory=list)
    squared_error: list[float] = dataclasses.field(default_factory=list)
    length: list[float] = dataclasses.field(default_factory=list)
    malformed: list[bool] = dataclasses.field(default_factory=list)

    def add(
        self,
        prediction: np.ndarray,
        target: np.ndarray,
        *,
        probabilities: np.ndarray | None = None,
        length: int | None = None,
        malformed: bool = False,
    ) -> float:
        """Adds one sample and returns its IoU.

        Args:
          prediction, target: bool[H, W]; an empty target is a sample without a target.
          probabilities: float[H, W] in 0..1, for the mean squared error against `target`.
          length: mask tokens used.
          malformed: the answer held neither a mask nor a "No"; expects an empty prediction.

        Raises:
          ValueError: the two shapes differ.
        """
        prediction, target = np.asarray(prediction, bool), np.asarray(target, bool)
        if prediction.shape != target.shape:
            raise ValueError(f"prediction: expected shape {target.shape}, got {prediction.shape}")
        intersection, union = intersection_union(prediction, target)
        self.intersection.append(int(intersection))
        self.union.append(int(union))
        self.target_pixels.append(int(target.sum()))
        self.predicted_pixels.append(int(prediction.sum()))
        self.boundary.append(0.0 if malformed else float(boundary_iou(prediction, target)))
        self.malformed.append(bool(malformed))
        error = np.nan if probabilities is None else float(np.mean(np.square(probabilities - target)))
        self.squared_error.append(error)
        self.length.append(np.nan if length is None else float(length))
        return 0.0 if malformed else float(mask_iou(prediction, target))

    def merge(self, other: SegmentationMetrics) -> SegmentationMetrics:
        """Returns a new collection of the samples of both, in order."""
        return SegmentationMetrics(**{k: getattr(self, k) + getattr(other, k) for k in vars(self)})

    def ious(self) -> np.ndarray:
        """IoU of each sample, float64[N]: 1 where neither mask has a pixel, 0 where the answer is malformed."""
        intersection, union = np.array(self.intersection, float), np.array(self.union, float)
        ious = np.where(union == 0, 1.0, intersection / np.maximum(union, 1))
        return np.where(np.array(self.malformed, bool), 0.0, ious)

    def rejected(self) -> np.ndarray:
        """Whether the answer says that there is no target, bool[N]: a "No", or a well-formed mask without a pixel."""
        return (np.array(self.predicted_pixels) == 0) & ~np.array(self.malformed, bool)

    def compute(self) -> dict[str, float]:
        """Summarises the samples added so far.

        Returns:
          num_samples; giou (mean IoU); ciou (sum of intersections over sum of unions; a sample without target
          adds its predicted pixels to the union); biou (mean boundary IoU); over samples with a target
          precision@K (share with an IoU of at least K); and, only where they are defined: n_acc (samples without a
          target that are `rejected`), t_acc (samples with a target whose prediction has pixels), mse, mean_length,
          std_length.

        Raises:
          ValueError: no sample was added.
        """
        if not self.union:
            raise ValueError("samples: expected at least one, got none")
        ious = self.ious()
        has_target = np.array(self.target_pixels) > 0
        is_empty = np.array(self.predicted_pixels) == 0
        result = {
            "num_samples": float(len(ious)),
            "giou": float(ious.mean()),
            "ciou": float(np.sum(self.intersection) / (np.sum(self.union) + 1e-10)),
            "biou": float(np.mean(self.boundary)),
        }
        if has_target.any():
            for k in PRECISION_THRESHOLDS:
                result[f"precision@{k}"] = float(np.mean(ious[has_target] >= k))
            result["t_acc"] = float(np.mean(~is_empty[has_target]))
        if not has_target.all():
            result["n_acc"] = float(np.mean(self.rejected()[~has_target]))
        errors, lengths = np.array(self.squared_error), np.array(self.length)
        if not np.isnan(errors).all():
            result["mse"] = float(np.nanmean(errors))
        if not np.isnan(lengths).all():
            result["mean_length"], result["std_length"] = (
                float(np.nanmean(lengths)),
                float(np.nanstd(lengths)),
            )
        return result


def bootstrap_ci(
    statistic: Callable[..., float],
    *samples: np.ndarray,
    level: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
    groups: Sequence[Any] | None = None,
) -> tuple[float, float]:
    """Percentile bootstrap confidence interval.

    Args:
      statistic: maps the resampled arrays to a number, e.g. `np.mean`, or `lambda i, u: i.sum() / u.sum()`.
      *samples: float[N, ...], arrays that are resampled together along their first axis.
      level: coverage, in 0..1.
      num_resamples: number of resamples.
      seed: seed of the resampling.
      groups: what each sample belongs to, such as its image, N hashable values. Whole groups are resampled, since the
        samples of one are not independent (several sentences about an image); None: each is its own.

    Returns:
      The lower and the upper bound.

    Raises:
      ValueError: no samples, or arrays of different lengths.
    """
    samples = tuple(np.asarray(s) for s in samples)
    sizes = {len(s) for s in samples}
    require(len(sizes) == 1 and min(sizes) > 0, "samples", sorted(sizes), "arrays of one common length > 0")
    rng = np.random.default_rng(seed)
    (size,) = sizes
    numbers: dict[Any, int] = {}  # groups in order of appearance
    which = np.arange(size) if groups is None else np.array([numbers.setdefault(g, len(numbers)) for g in groups])
    require(len(which) == size, "groups", len(which), f"one for each of {size} samples")
    members, counts = np.argsort(which, kind="stable"), np.bincount(which)
    starts, values = np.cumsum(counts) - counts, []
    # Note: all indices at once would take 1.7 GB for VQAv2. Of one group all resamples are the same.
    for _ in range(num_resamples if len(counts) > 1 else 1):
        drawn = rng.integers(len(counts), size=len(counts))
        if len(counts) == size:
            index = members[drawn]
        else:
            ends = np.cumsum(counts[drawn])
            index = members[np.arange(ends[-1]) + np.repeat(starts[drawn] - ends + counts[drawn], counts[drawn])]
        values.append(statistic(*(s[index] for s in samples)))
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


# --- lengths and codes -------------------------------------------------------------------------------


def length_entropy(lengths: np.ndarray) -> float:
    """Entropy of the distribution of lengths int[N], in nats."""
    shares = np.unique(lengths, return_counts=True)[1] / len(lengths)
    return float(np.maximum(-(shares * np.log(shares)).sum(), 0.0))


def length_statistics(
    lengths: np.ndarray, max_length: int, against: np.ndarray | None = None
) -> dict[str, float | list[int]]:
    """Describes how many mask tokens were used.

    Args:
      lengths: int[N], N >= 1, in 0..max_length.
      max_length: L.
      against: float[N], e.g. the complexity of each mask, for a rank correlation.

    Returns:
      mean, std, entropy (nats), min, max; histogram (count of each length 0..L); spearman with `against`, if given and
      if neither of the two is constant.
    """
    lengths = np.asarray(lengths, np.int64)
    result: dict[str, float | list[int]] = {
        "mean": float(lengths.mean()),
        "std": float(lengths.std()),
        "entropy": length_entropy(lengths),
        "min": float(lengths.min()),
        "max": float(lengths.max()),
        "histogram": np.bincount(lengths, minlength=max_length + 1).tolist(),
    }
    if against is not None and lengths.std() > 0 and np.std(against) > 0:
        result["spearman"] = float(np.corrcoef(_ranks(lengths), _ranks(np.asarray(against)))[0, 1])
    return result


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, ties sharing their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse]


def count_codes(codes: np.ndarray, num_codes: int, lengths: np.ndarray | None = None) -> np.ndarray:
    """Counts how often each code occurs; counts of several batches or processes add up.

    Args:
      codes: int[N, L], in 0..num_codes - 1.
      num_codes: size of the codebook.
      lengths: int[N], only the first so many codes of each row count; None means all.

    Returns:
      int64[num_codes].
    """
    codes = np.asarray(codes)
    if lengths is not None:
        codes = codes[np.arange(codes.shape[1]) < np.asarray(lengths)[:, None]]
    return np.bincount(codes.reshape(-1), minlength=num_codes)


def code_usage(codes: np.ndarray, num_codes: int, lengths: np.ndarray | None = None) -> float:
    """Share of the codebook that occurs at least once, in 0..1; arguments as in `count_codes`."""
    return float(np.mean(count_codes(codes, num_codes, lengths) > 0))


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rank correlation of two sequences, ties at their mean rank; 0.0 where one is constant or empty."""
    if not len(x):
        return 0.0
    ranks = []
    for values in (np.asarray(x, float), np.asarray(y, float)):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[inverse])
    a, b = (rank - rank.mean() for rank in ranks)
    spread = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / spread) if spread > 0 else 0.0
