"""Meshes over several slices or machines, of made-up devices: the data axis alone crosses the network where it can."""

import dataclasses

import jax
import numpy as np
import pytest

from alto_jax.parallel import devices, sharding, slices
from alto_jax.parallel.sharding import MeshConfig


@dataclasses.dataclass(frozen=True)
class Fake:
    """What JAX says of a device."""

    id: int
    slice_index: int
    coords: tuple[int, ...]
    platform: str = "tpu"
    device_kind: str = "TPU v5"
    core_on_chip: int = 0
    process_index: int = 0


def tpu_slices(count, sides=(2, 2, 4)):
    """`count` slices of v5p; JAX lists the last one first."""
    chips = [tuple(map(int, chip)) for chip in np.ndindex(sides)]
    return [Fake(1000 * s + i, s, chip) for s in reversed(range(count)) for i, chip in enumerate(chips)]


def machines(count, each=8):
    kind = "NVIDIA H100 80GB HBM3"
    return [Fake(i, i // each, (), "gpu", kind, process_index=i) for i in range(count * each)]


def slice_numbers(sizes, found):
    return np.vectorize(lambda device: device.slice_index)(slices.arrange(sizes, found))


@pytest.mark.parametrize("found", [tpu_slices(2), machines(2)])
def test_the_data_axis_lies_between_slices(found):
    each = len(found) // 2
    numbers = slice_numbers((2, each // 2, 2), found)
    assert (numbers[0] == 0).all() and (numbers[1] == 1).all()
    numbers = slice_numbers((4, each // 4, 2), found)
    assert (numbers[:2] == 0).all() and (numbers[2:] == 1).all()
    # Without a data axis the next one does: each half of it is one slice.
    numbers = slice_numbers((1, each, 2), found)
    assert (numbers[:, : each // 2] == 0).all() and (numbers[:, each // 2 :] == 1).all()
    assert len({device.id for device in slices.arrange((2, each, 1), found).flat}) == len(found)


def test_what_data_leaves_of_the_slices_goes_to_the_other_axes():
    assert slices.between((8, 4, 1), 2) == (2, 1, 1)
    assert slices.between((2, 8, 2), 8) == (2, 4, 1)
    assert slices.between((3, 4, 2), 6) == (3, 2, 1)
    assert slices.between((1, 1, 4), 4) == (1, 1, 4)
    numbers = slice_numbers((2, 16, 2), tpu_slices(4))
    assert [sorted(set(row.flat)) for row in numbers] == [[0, 1], [2, 3]]


def test_slices_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match=r"config.mesh: the slices must have the same .* slice 0: 8, slice 1: 4"):
        slices.arrange((12, 1, 1), machines(2)[:12])


def test_devices_without_slices_are_one():
    assert slices.count_slices(jax.devices()) == 1
    assert slices.count_slices(tpu_slices(3)) == 3


def test_auto_prefers_meshes_with_data_alone_between_slices():
    state = {"mlp": {"fc1": {"kernel": jax.ShapeDtypeStruct((64, 64), np.float32)}}}
    whole = 64 * 64 * 4
    choose = lambda memory, count: sharding.choose_sizes(state, 16, 16, int(memory), count)
    # Half of the state would fit: by fsdp 2, and in both slices there is one half.
    assert choose(whole / 2 / 0.4, 1) == choose(whole / 2 / 0.4, 2) == MeshConfig(8, 2, 1)
    # A sixteenth of it on one slice alone is fsdp over all, which cannot be had without crossing; then it crosses.
    assert choose(whole / 16 / 0.4, 1).data == choose(whole / 16 / 0.4, 2).data == 1
    # An eighth: one slice's fsdp of 8, in each of two; with four slices tensor 2 comes before crossing.
    assert choose(whole / 8 / 0.4, 2) == MeshConfig(2, 8, 1)
    assert choose(whole / 8 / 0.4, 4).data == 2


@pytest.mark.parametrize(
    "given, share",
    [({}, 0.9), ({"XLA_CLIENT_MEM_FRACTION": ".5"}, 0.5), ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.75"}, 0.75)],
)
def test_the_share_of_a_gpu_that_jax_takes(monkeypatch, given, share):
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert devices.DEVICES["h100-80g"].usable == round(share * devices.DEVICES["h100-80g"].memory)
    assert devices.DEVICES["v5e"].usable == devices.DEVICES["v5e"].memory
    monkeypatch.setattr(devices.os, "environ", environ := dict(devices.os.environ))
    devices.claim_gpu_memory()
    # One of the two names and never both, which JAX refuses.
    assert {name: environ[name] for name in names if name in environ} == (given or {names[0]: "0.9"})
    environ[names[0]] = "most"
    with pytest.raises(ValueError, match="XLA_CLIENT_MEM_FRACTION: expected a share of a GPU's memory .* 'most'"):
        devices.claim_gpu_memory()
