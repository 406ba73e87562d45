"""Reads the golden arrays of tests/golden (real runs of the PyTorch reference) and their tolerances."""

import functools
import json
from pathlib import Path

import numpy as np

_FOLDER = Path(__file__).parent / "golden"


def golden(name: str) -> dict[str, np.ndarray]:
    """Returns all arrays of tests/golden/{name}.npz by their name."""
    with np.load(_FOLDER / f"{name}.npz") as arrays:
        return dict(_unpack(key, arrays[key]) for key in arrays.files)


def _unpack(key: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    """Joins "KEY.planes", the four bytes of each float32 apart with the sign as lowest bit (which zips better)."""
    if not key.endswith(".planes"):
        return key, array
    bits = np.ascontiguousarray(np.moveaxis(array, 0, -1)).view(np.uint32)[..., 0]
    return key.removesuffix(".planes"), ((bits >> np.uint32(1)) | (bits << np.uint32(31))).view(np.float32)


def tolerance(name: str, key: str) -> float:
    """Absolute tolerance of array `key` of fixture `name`; 0 where the fixture asks for equality."""
    value = _tolerances()[name][key]
    return 0.0 if value == "exact" else float(value)


@functools.cache
def _tolerances() -> dict[str, dict[str, float | str]]:
    return json.loads((_FOLDER / "tolerances.json").read_text())
