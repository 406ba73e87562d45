"""Image and mask geometry on the host: numpy and Pillow, no JAX.

In: arrays as images.py and masks.py read them (whose functions are named here too). Out: uint8 RGB images and
masks at the sizes of the model. The interpolations are those of the reference (reference/NUMERICS.md §4, §8):
Pillow's antialiased bicubic for the MLLM image and the SFT mask, OpenCV's bilinear and bicubic without antialiasing
for stage 1.
"""

import functools
import io
import math

import numpy as np
from PIL import Image

from alto_jax.data.images import check_size as check_size
from alto_jax.data.images import open_image as open_image
from alto_jax.data.images import open_labels as open_labels
from alto_jax.data.masks import open_mask as open_mask

IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)


def squash(image: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
    """Resizes to a square (or (height, width)), ignoring the aspect; Pillow's antialiased bicubic.

    Args:
      image: uint8[H, W, 3] or uint8[H, W].
      size: side in pixels, or (height, width).
    """
    height, width = (size, size) if isinstance(size, int) else size
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def squash_all(image: np.ndarray, *sizes: int) -> list[np.ndarray]:
    """`squash` to several sizes, which costs less than one after another."""
    source = Image.fromarray(image)
    shapes = [(size, size) for size in sizes]
    resize = lambda shape: np.asarray(source.resize(shape, Image.Resampling.BICUBIC))
    return [image if image.shape[:2] == shape else resize(shape) for shape in shapes]


def keep_small(small: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """`small`, a mask made smaller, or what is left of `mask` where nothing of it is above half any more.

    An object of a few pixels is below half everywhere at the model's mask size: an empty target, which an empty answer
    would meet. The rule: it then is the set of pixels that the mask touches (the maximum of each pixel's part).

    Args:
      small: uint8[h, w], resized from mask; mask: uint8[H, W], both in 0..255.
    """
    if not mask.any() or small.max() > 127:
        return small
    (height, width), (rows, columns) = mask.shape, small.shape
    down, across = (np.arange(n) * size // n for n, size in ((rows, height), (columns, width)))
    touched = np.maximum.reduceat(np.maximum.reduceat(mask, down, axis=0), across, axis=1)
    return np.where(touched > touched.max() // 2, np.uint8(255), np.uint8(0))


def squash_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """The target of stages 2 and 3: uint8[H, W] in 0..255 → uint8[size, size], bicubic, see `keep_small`."""
    return keep_small(squash(mask, size), mask)


def soft_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """`squash_mask` as float32[size, size] in 0..1."""
    return squash_mask(mask, size).astype(np.float32) / np.float32(255)


def normalize(image: np.ndarray) -> np.ndarray:
    """uint8[..., 3] → float32[..., 3], ImageNet-normalised."""
    return (image.astype(np.float32) / np.float32(255) - IMAGENET_MEAN) / IMAGENET_STD


@functools.lru_cache(maxsize=256)
def _taps(source: int, target: int, cubic: bool) -> tuple[np.ndarray, np.ndarray]:
    """Source positions int[target, K] and weights float32[target, K] with half-pixel centres."""
    position = ((np.arange(target) + 0.5) * (source / target) - 0.5).astype(np.float32)
    base = np.floor(position).astype(np.int64)
    t = (position - base.astype(np.float32))[:, None]
    offsets = np.arange(-1, 3) if cubic else np.arange(2)
    if cubic:  # Keys' kernel with a = -0.75, as OpenCV and PyTorch
        a, x = np.float32(-0.75), np.abs(offsets.astype(np.float32)[None] - t)
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        weights = np.where(x <= 1, near, far)
    else:
        weights = np.concatenate([1 - t, t], axis=1)
    return np.clip(base[:, None] + offsets, 0, source - 1), weights.astype(np.float32)


def _along(values: np.ndarray, axis: int, index: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted sum of taps along one axis, in the dtype of `weights`."""
    shape = [1] * values.ndim
    shape[axis] = len(index)
    tap = lambda k: values.take(index[:, k], axis=axis) * weights[:, k].reshape(shape)
    total = tap(0)
    for k in range(1, index.shape[1]):
        np.add(total, tap(k), out=total)
    return total


def resize_float(image: np.ndarray, height: int, width: int, cubic: bool = False) -> np.ndarray:
    """Bilinear or bicubic (a = -0.75) resize with half-pixel centres, clamped edges and no antialiasing.

    Args:
      image: [H, W] or [H, W, C], any real dtype.
      height, width: of the result.
      cubic: bicubic instead of bilinear; its result may leave the range of the input.

    Returns:
      float32[height, width(, C)].
    """
    values = image.astype(np.float32)
    for axis, target in ((1, width), (0, height)):
        if values.shape[axis] != target:
            values = _along(values, axis, *_taps(values.shape[axis], target, cubic))
    return values


def resize_uint8(image: np.ndarray, height: int, width: int, cubic: bool = False) -> np.ndarray:
    """OpenCV's `resize` of uint8 images with INTER_LINEAR (fixed-point arithmetic) or INTER_CUBIC (float).

    Args:
      image: uint8[H, W] or uint8[H, W, C].
      height, width: of the result.
      cubic: bicubic instead of bilinear.

    Returns:
      uint8[height, width(, C)].
    """
    if image.shape[:2] == (height, width):
        return image
    if not cubic and image.shape[:2] == (2 * height, 2 * width):  # OpenCV turns to averaging there
        blocks = image.reshape(height, 2, width, 2, *image.shape[2:]).astype(np.uint16)
        return ((blocks.sum((1, 3), dtype=np.uint16) + 2) >> 2).astype(np.uint8)
    if cubic:
        return np.rint(resize_float(image, height, width, cubic=True)).clip(0, 255).astype(np.uint8)
    columns, across = _taps(image.shape[1], width, cubic=False)
    rows, down = _taps(image.shape[0], height, cubic=False)
    shape = (-1,) + (1,) * (image.ndim - 1)
    across, down = np.rint(across * 2048).astype(np.int32), np.rint(down * 2048).astype(np.int32)
    values = _along(image, 1, columns, across) >> 4
    upper = (values.take(rows[:, 0], axis=0) * down[:, 0].reshape(shape)) >> 16
    lower = (values.take(rows[:, 1], axis=0) * down[:, 1].reshape(shape)) >> 16
    return ((upper + lower + 2) >> 2).clip(0, 255).astype(np.uint8)


def limit_side(image: np.ndarray, max_side: int) -> np.ndarray:
    """Shrinks uint8[H, W(, C)] so that its long side is at most `max_side`; bicubic, aspect kept."""
    height, width = image.shape[:2]
    scale = max_side / max(height, width)
    if scale >= 1:
        return image
    return resize_uint8(image, max(1, round(height * scale)), max(1, round(width * scale)), cubic=True)


def pad_square(
    image: np.ndarray, mask: np.ndarray, rng: np.random.Generator | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Pads image [H, W, 3] and mask [H, W] to a square with zeros.

    Args:
      image, mask: of the same height and width.
      rng: draws the offset (training); without it all padding is at the bottom and right (evaluation).
    """
    height, width = mask.shape
    side = max(height, width)
    if height == width:
        return image, mask
    spare = side - min(height, width)
    before = int(rng.integers(spare + 1)) if rng is not None else 0
    pads = [(before, spare - before), (0, 0)] if height < width else [(0, 0), (before, spare - before)]
    return np.pad(image, [*pads, (0, 0)]), np.pad(mask, pads)


def crop_around(
    image: np.ndarray,
    mask: np.ndarray,
    rng: np.random.Generator,
    low: float = 4.0,
    high: float = 50.0,
) -> tuple[np.ndarray, np.ndarray]:
    """The stage-1 training crop: a square around the mask's box, moved into the image and cut to it.

    Args:
      image: uint8[H, W, 3].
      mask: uint8[H, W], not empty.
      rng: draws the factor by which the crop's area exceeds the box's.
      low, high: range of that factor.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, left = int(rows[0]), int(columns[0])
    box_h, box_w = int(rows[-1]) + 1 - top, int(columns[-1]) + 1 - left
    side = max(int(math.sqrt(box_h * box_w * rng.uniform(low, high))), 2 * max(box_h, box_w))
    height, width = mask.shape
    y0 = max(0, min(top + box_h // 2 - side // 2, height - side))
    x0 = max(0, min(left + box_w // 2 - side // 2, width - side))
    window = np.s_[y0 : y0 + side, x0 : x0 + side]
    return image[window], mask[window]


@functools.lru_cache(maxsize=64)
def _grids(min_tiles: int, max_tiles: int) -> list[tuple[int, int]]:
    """All (columns, rows) of so many tiles, by their number."""
    # Compat: the grids stand in the order of a set, sorted (stably) by area: ties depend on it.
    grids = {
        (i, j)
        for n in range(min_tiles, max_tiles + 1)
        for i in range(1, n + 1)
        for j in range(1, n + 1)
        if min_tiles <= i * j <= max_tiles
    }
    return sorted(grids, key=lambda grid: grid[0] * grid[1])


def tile_grid(
    width: int, height: int, max_tiles: int, size: int = 448, min_tiles: int = 1, thumbnail: bool = False
) -> tuple[tuple[int, int], int]:
    """InternVL's choice of a tile grid for an image.

    Args:
      width, height: of the image, in pixels.
      max_tiles, min_tiles: bounds on columns x rows.
      size: side of a tile; where two grids fit equally well, the larger one needs an image of more than
        half its area.
      thumbnail: count one more tile for the whole image, if there is more than one.

    Returns:
      ((columns, rows), number of tiles).
    """
    best, best_gap = (1, 1), float("inf")
    for i, j in _grids(min_tiles, max_tiles):
        gap = abs(width / height - i / j)
        if gap < best_gap or (gap == best_gap and width * height > 0.5 * size * size * i * j):
            best, best_gap = (i, j), gap
    count = best[0] * best[1]
    return best, count + (1 if thumbnail and count > 1 else 0)


def tiles(image: np.ndarray, max_tiles: int, size: int = 448, thumbnail: bool = False) -> np.ndarray:
    """Cuts an image into `tile_grid` tiles: uint8[H, W, 3] → uint8[N, size, size, 3], row by row."""
    (columns, rows), count = tile_grid(image.shape[1], image.shape[0], max_tiles, size, 1, thumbnail)
    grid = squash(image, (rows * size, columns * size))
    parts = grid.reshape(rows, size, columns, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)
    return np.concatenate([parts, squash(image, size)[None]]) if count > len(parts) else parts


def jpeg_augment(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Compresses uint8[H, W, 3] as JPEG of a random quality in 75..100 and reads it back."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=int(rng.integers(75, 101)))
    return np.asarray(Image.open(buffer).convert("RGB"))
