"""Slices and nodes: groups of devices with fast links inside and a slower network between them.

A TPU slice, or a machine with GPUs: JAX numbers them by `slice_index`. A mesh over several has its data axis between
them wherever that divides, since that axis moves gradients once a step while the others move data in every layer.
"""

from collections import Counter
from collections.abc import Sequence
import math
from typing import Any

from jax.experimental import mesh_utils
import numpy as np


def slice_of(device: Any) -> int:
    """The number of a device's slice; 0 for devices that have none (CPUs)."""
    return getattr(device, "slice_index", None) or 0


def count_slices(devices: Sequence[Any]) -> int:
    """How many slices the devices are of."""
    return len({slice_of(device) for device in devices})


def between(sizes: Sequence[int], num_slices: int) -> tuple[int, ...]:
    """How many ways each axis of a mesh is split between slices; the rest of it lies within them.

    Args:
      sizes: of the axes, in the order in which they are to cross the network.
      num_slices: divides their product.
    """
    found, rest = [], num_slices
    for size in sizes:
        found.append(math.gcd(size, rest))
        rest //= found[-1]
    return tuple(found)


def arrange(sizes: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """Devices as an array of `sizes`, such that the first axes cross slices, and neighbours within them are linked.

    Raises:
      ValueError: the slices are of different sizes, or their number does not divide that of the devices.
    """
    counts = Counter(map(slice_of, devices))
    # Note: an axis of 16 devices on a slice of 8 x 8 splits a physical axis, which jax.make_mesh refuses.
    if len(counts) == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    if len(set(counts.values())) > 1:
        found = ", ".join(f"slice {index}: {count}" for index, count in sorted(counts.items()))
        raise ValueError(f"config.mesh: the slices must have the same number of devices, got {found}")
    outer = between(sizes, len(counts))
    inner = tuple(size // ways for size, ways in zip(sizes, outer))
    return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
