"""Geometry against golden values of the reference, and robust reading of image files."""

import json
from pathlib import Path

import numpy as np
import pytest

from alto_jax import metrics
from alto_jax.data import transforms
from tests.golden_io import golden, tolerance

GRIDS = json.loads((Path(__file__).parents[1] / "golden" / "dynamic_preprocess.json").read_text())
RNG = np.random.default_rng(0)


@pytest.mark.parametrize("item", range(6))
def test_stage1_geometry(item):
    arrays = golden("stage1_data")
    count = int(arrays[f"out{item}_count"])
    masks = [arrays[f"ann{item % 3}_{k}"] for k in range(count)]
    image, mask = arrays[f"image{item % 3}"], np.bitwise_or.reduce(masks) * np.uint8(255)
    image, mask = transforms.pad_square(transforms.limit_side(image, 64), transforms.limit_side(mask, 64))
    image, mask = transforms.resize_uint8(image, 64, 64), transforms.resize_uint8(mask, 32, 32)
    for name, value in (("image", image.transpose(2, 0, 1)[:, ::2, ::2]), ("mask", mask[None])):
        key = f"out{item}_{name}"
        np.testing.assert_allclose(value / 255, arrays[key], rtol=0, atol=tolerance("stage1_data", key))


def test_mllm_image_and_mask():
    arrays = golden("mllm_preprocess")
    image = transforms.normalize(transforms.squash(arrays["image"], 56)).transpose(2, 0, 1)
    atol = tolerance("mllm_preprocess", "transform56")
    np.testing.assert_allclose(image, arrays["transform56"], rtol=0, atol=atol)
    np.testing.assert_array_equal(transforms.tiles(arrays["image"], 4, 28, thumbnail=True), arrays["dyn_tiles"])
    mask = transforms.soft_mask(arrays["mask_in"], 256)
    atol = tolerance("mllm_preprocess", "mask256_sft")
    np.testing.assert_allclose(mask, arrays["mask256_sft"], rtol=0, atol=atol)


def prepare_image(images: np.ndarray, size: int) -> np.ndarray:
    """The reference's geometry: padded bottom and right to a square, then bilinear; float32[B, size, size, 3]."""
    values = images.astype(np.float32) / np.float32(255) if images.dtype == np.uint8 else images
    if values.ndim == 3:
        values = values[..., None]
    _, height, width, channels = values.shape
    side = max(height, width)
    padded = np.pad(values, [(0, 0), (0, side - height), (0, side - width), (0, 0)])
    resized = np.stack([transforms.resize_float(v, size, size) for v in padded])
    return np.repeat(resized, 3, axis=-1) if channels == 1 else resized


@pytest.mark.parametrize("case", range(4))
def test_prepare_image(case):
    arrays = golden("prepare_image")
    images, expected = arrays[f"in{case}"], arrays[f"out{case}"]  # (N, C, H, W); equal channels stored once
    images = images.transpose(0, 2, 3, 1) if images.ndim == 4 else images
    result = prepare_image(images, 64)
    assert result.shape == (len(images), 64, 64, 3)
    result = result[:, ::2, ::2]
    expected = np.broadcast_to(expected.transpose(0, 2, 3, 1), result.shape)
    np.testing.assert_allclose(result, expected, rtol=0, atol=tolerance("prepare_image", f"out{case}"))


@pytest.mark.parametrize("case", sorted(GRIDS))
def test_tile_grid(case):
    most, size, thumbnail = case.removeprefix("max").split("_")
    width, height = map(int, size.split("x"))
    grid, count = transforms.tile_grid(width, height, int(most), thumbnail=thumbnail == "thumb1")
    assert [list(grid), count] == GRIDS[case]


def test_resize_of_a_ramp_is_exact_and_edges_are_clamped():
    ramp = np.tile(np.arange(8, dtype=np.float32) * 10, (3, 1))
    wide = transforms.resize_float(ramp, 3, 16)[0]
    np.testing.assert_allclose(wide[1:-1], (np.arange(1, 15) + 0.5) / 2 * 10 - 5, atol=1e-4)
    assert wide[0] == 0 and wide[-1] == 70
    cubic = transforms.resize_float(ramp, 3, 16, cubic=True)[0]
    np.testing.assert_allclose(cubic[4:-4], wide[4:-4], atol=0.5)


def test_halving_averages_blocks():
    image = RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    blocks = image.reshape(3, 2, 4, 2, 3).astype(int).sum((1, 3))
    np.testing.assert_array_equal(transforms.resize_uint8(image, 3, 4), (blocks + 2) // 4)


def test_pad_square():
    image, mask = np.full((4, 10, 3), 9, np.uint8), np.full((4, 10), 255, np.uint8)
    padded_image, padded_mask = transforms.pad_square(image, mask)
    assert padded_image.shape == (10, 10, 3) and (padded_mask[:4] == 255).all() and not padded_mask[4:].any()
    starts = set()
    for seed in range(30):
        padded_image, padded_mask = transforms.pad_square(image, mask, np.random.default_rng(seed))
        rows = np.flatnonzero(padded_mask.any(1))
        np.testing.assert_array_equal(padded_mask > 0, padded_image[..., 0] > 0)
        assert len(rows) == 4
        starts.add(int(rows[0]))
    assert min(starts) == 0 and max(starts) == 6


def test_crop_keeps_the_whole_mask_at_the_area_asked_for():
    mask = np.zeros((300, 400), np.uint8)
    mask[100:120, 150:180] = 255
    ramp = (np.arange(400) % 251).astype(np.uint8)
    image = np.broadcast_to(ramp[None, :, None], (300, 400, 3))
    for seed in range(20):
        crop, kept = transforms.crop_around(image, mask, np.random.default_rng(seed))
        height, width = kept.shape
        assert height == width and (kept > 0).sum() == 600
        assert max(60, int((4 * 600) ** 0.5)) <= height <= (50 * 600) ** 0.5
        np.testing.assert_array_equal(crop[0, :, 0], image[0, int(crop[0, 0, 0]) :][:width, 0])
    at_edge = np.roll(mask, -150, axis=1)  # touches the left side: the crop moves into the image
    crop, kept = transforms.crop_around(image, at_edge, np.random.default_rng(1))
    assert kept.shape[0] == kept.shape[1] and (kept[:, :30] > 0).sum() == 600
    np.testing.assert_array_equal(crop[0, :, 0], ramp[: len(kept)])


def test_probability_back_to_image_size():
    probability = np.array([[0.0, 1.0], [1.0, 0.0]], np.float32)
    nearest = metrics.resize_probability(probability, 4, 6, "nearest")
    np.testing.assert_array_equal(nearest, np.kron(probability, np.ones((2, 3))))
    smooth = metrics.resize_probability(probability, 4, 6)
    assert smooth.shape == (4, 6) and 0 <= smooth.min() < 0.3 < 0.7 < smooth.max() <= 1


def test_jpeg_augmentation_changes_little():
    image = transforms.squash(RNG.integers(0, 256, (4, 4, 3), dtype=np.uint8), 64)
    again = transforms.jpeg_augment(image, np.random.default_rng(3))
    assert again.shape == image.shape
    assert 0 < np.abs(again.astype(int) - image).mean() < 8
