"""COCO segmentations: right masks, and one error naming the entry before pycocotools sees what it can't take."""

import json

import numpy as np
from pycocotools import mask as coco_mask
import pytest

from alto_jax.data import bad_data, images, rle
from tests.conftest import run_python
from tests.data import replicas

H, W = 20, 30
BOX = [2, 3, 12, 3, 12, 13, 2, 13]


def drawn(polygons, height: int = H, width: int = W) -> np.ndarray:
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))).astype(bool)


def text_of(runs: list[int], height: int = 4, width: int = 4) -> str:
    return coco_mask.frPyObjects({"size": [height, width], "counts": runs}, height, width)["counts"].decode()


@pytest.mark.parametrize("compressed", [True, False])
def test_run_lengths_equal_pycocotools(compressed):
    rng = np.random.default_rng(0)
    for trial in range(200):
        height, width = rng.integers(1, 70, 2).tolist()
        mask = rng.random((height, width)) < rng.choice([0.02, 0.5, 0.97, 0, 1])
        if trial % 2:
            mask = np.repeat(np.repeat(mask, 5, 0), 9, 1)[: height * 3, : width * 7]
        code = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        code["counts"] = code["counts"].decode() if compressed else replicas.runs(mask, "counts")["counts"]
        np.testing.assert_array_equal(rle.decode(code, *mask.shape, "x"), mask)


@pytest.mark.parametrize("seed", range(5))
def test_runs_in_both_forms(seed):
    mask = np.random.default_rng(seed).random((H, W)) < (0.5, 0.01, 0.99, 0.0, 1.0)[seed]
    code = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    counts = rle.check_runs({"size": [H, W], "counts": code["counts"]}, H, W, "x").tolist()
    for form in (code["counts"], code["counts"].decode(), counts, [float(c) for c in counts], [0, 0, *counts]):
        np.testing.assert_array_equal(rle.decode({"size": [H, W], "counts": form}, H, W, "x"), mask)


@pytest.mark.parametrize(
    "polygons",
    [[BOX], [BOX, [1.5, 1.25, 28.0, 2.0, 15.5, 18.75]], [[0, 0, W, 0, W, H, 0, H]], [[5, 5, 5, 5, 5, 5]],
     [[-3, 2, 10, 2, 10, 8, -3, 8]], [[20, -5, 35, -5, 35, 30, 20, 30]], [[-30, -20, 60, -20, 60, 40]]],
)  # fmt: skip
def test_polygons_as_coco_draws_them_also_over_the_edge(polygons):
    np.testing.assert_array_equal(rle.decode(polygons, H, W, "x"), drawn(polygons))


BAD = {
    "text": ({"size": [4, 4], "counts": "abc~"}, "does not decode"),
    "accent": ({"size": [4, 4], "counts": "é"}, "does not decode"),
    "bytes": ({"size": [4, 4], "counts": b"\xff\xfe"}, "out of range"),
    "void text": ({"size": [4, 4], "counts": ""}, "does not decode: it is empty"),
    "cut": ({"size": [4, 4], "counts": "o"}, "cut short"),
    "long number": ({"size": [4, 4], "counts": "o" * 20 + "0"}, "too long"),
    "short sum": ({"size": [4, 4], "counts": [3, 5]}, "add up to 8 of 16"),
    "void": ({"size": [4, 4], "counts": []}, "add up to 0 of 16"),
    "negative": ({"size": [4, 4], "counts": [-3, 19]}, r"a run is not in 0\.\.16"),
    "overflow": ({"size": [4, 4], "counts": [2**62, 2**62, 2**62, 2**62 + 16]}, r"a run is not in 0\.\.16"),
    "unsigned": ({"size": [4, 4], "counts": [2**64 - 1, 17]}, "does not decode"),
    "huge": ({"size": [4, 4], "counts": [10**30]}, "expected a list of numbers"),
    "half": ({"size": [4, 4], "counts": [3.5, 12.5]}, "not whole"),
    "nan": ({"size": [4, 4], "counts": [float("nan"), 16]}, "not whole"),
    "infinite": ({"size": [4, 4], "counts": [float("inf")]}, "not whole"),
    "texts": ({"size": [4, 4], "counts": ["16"]}, "expected a list of numbers"),
    "nested": ({"size": [4, 4], "counts": [[16]]}, "expected a list of numbers"),
    "ragged": ({"size": [4, 4], "counts": [[1], [2, 3]]}, "expected a list of numbers"),
    "bools": ({"size": [4, 4], "counts": [True, 15]}, "expected a list of numbers"),
    "none": ({"size": [4, 4], "counts": None}, "does not decode"),
    "missing": ({}, "size differs"),
    "size": ({"size": [4, 5], "counts": [20]}, "size differs"),
    "size text": ({"size": "44", "counts": [16]}, "size differs"),
    "size nan": ({"size": [float("nan"), 4], "counts": [16]}, "size differs"),
    "two points": ([[1, 2, 3, 3]], "at least 3 points"),
    "odd": ([[1, 2, 3, 3, 1, 2, 3]], "at least 3 points"),
    "flat": ([1, 2, 3, 3, 1, 2], "at least 3 points"),
    "pairs": ([[[1, 2], [3, 3], [1, 2]]], "at least 3 points"),
    "bool": ([[1, 2, 3, 3, 1, True]], "at least 3 points"),
    "no polygon": ([], "no polygon"),
    "not finite": ([[0, 0, 1, float("nan"), 1, 1]], "not finite"),
    "infinity": ([[0, 0, 1, float("-inf"), 1, 1]], "not finite"),
    "digits": ([[0, 0, 1, 10**400, 1, 1]], "not finite"),
    "far": ([[0, 0, 3.2e8, 1, 1, 1]], r"coordinate 3\.2e\+08 lies far outside of the 4x4 image"),
    "far below": ([[0, 0, 1, -4.5, 1, 1]], r"coordinate -4\.5 lies far outside"),
    "second": ([[0, 0, 1, 1, 1, 0], [0, 0, 9, 1, 1, 1]], "coordinate 9 lies far outside"),
    "null": (None, "expected run lengths or polygons"),
}


@pytest.mark.parametrize("name", BAD)
def test_broken_segmentations_are_refused(name):
    segmentation, message = BAD[name]
    with pytest.raises(bad_data.RecordError, match=f"here: segmentation.*{message}") as caught:
        rle.decode(segmentation, 4, 4, "here")
    assert caught.value.kind == ("size of mask and image" if "size differs" in message else "segmentation")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize("size", [(0, 4), (-4, 4), (4.0, 4), ("4", 4), (True, 4), (None, 4), (10**9, 10**9)])
def test_sizes_are_checked_before_anything_is_allocated(size):
    with pytest.raises(bad_data.RecordError, match="here: height x width"):
        rle.decode([BOX], *size, "here")


def test_outlines_are_limited():
    far = [[0, 0, 9999, 9999] * 100 + [0, 9999]]
    with pytest.raises(bad_data.RecordError, match="outline is 4.* pixels, at most 2000000"):
        rle.decode([far[0] + [0, 0, 9999, 9999] * 100], 10_000, 10_000, "here")
    assert images.MAX_PIXELS >= 10_000**2
    # The largest that is let through, in a process of its own with little memory.
    points = [value for i in range(199) for value in ((0, i) if i % 2 else (9999, i))]
    code = f"from alto_jax.data import rle; print(rle.decode([{json.dumps(points)}], 2000, 10000, 'x').sum())"
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31)); {code}"
    done = run_python("-c", limited)
    assert done.returncode == 0 and int(done.stdout) > 0, done.stderr[-500:]
