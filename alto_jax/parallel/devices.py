"""The one table of accelerators: memory, operations, bandwidths; and how much of a GPU's memory is used.

Figures are those of the makers' data sheets, of one device as JAX counts them (a whole chip, but half a chip of TPU7x).
"""

import dataclasses
import math
import os

from alto_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Device:
    """One accelerator.

    Attributes:
      kinds: what JAX calls it (`jax.Device.device_kind`), the usual name first.
      memory: HBM in bytes.
      flops: dense peak in bfloat16, FLOP/s.
      bandwidth: HBM, bytes per second.
      links: bytes per second and direction to other devices: the sum over a TPU's links to its neighbours; NVLink (or
        PCIe, where the name says so) of a GPU, within one machine.
      network: bytes per second and direction to devices of other slices (TPU) or machines (GPU, of the maker's own
        server, which has a network card for each); None where the makers do not say.
      node: how many GPUs of one machine `links` joins; None for TPUs, whose slices are of any size.
    """

    kinds: tuple[str, ...]
    memory: int
    flops: float
    bandwidth: float
    links: float
    network: float | None
    node: int | None = None

    @property
    def usable(self) -> int:
        """Bytes that a program can have: of a TPU all, of a GPU the share that JAX takes (`gpu_memory_share`)."""
        return self.memory if self.node is None else round(self.memory * gpu_memory_share())


_GIB = 2**30

# By the name that --topology takes.
DEVICES: dict[str, Device] = {
    "v4": Device(("TPU v4",), 32 * _GIB, 275e12, 1228e9, 270e9, None),
    "v5e": Device(("TPU v5 lite", "TPU v5e"), 16 * _GIB, 197e12, 819e9, 180e9, 3.125e9),
    "v5p": Device(("TPU v5", "TPU v5p"), 95 * _GIB, 459e12, 2765e9, 540e9, 6.25e9),
    "v6e": Device(("TPU v6 lite", "TPU v6e"), 32 * _GIB, 918e12, 1640e9, 360e9, 12.5e9),
    "tpu7x": Device(("TPU7x",), 96 * _GIB, 1153e12, 3690e9, 300e9, 6.25e9),
    # NVIDIA's DGX: a card of 200 (A100) or 400 Gb/s for each GPU.
    "a100-40g": Device(("NVIDIA A100-SXM4-40GB",), 40 * _GIB, 312e12, 1555e9, 300e9, 25e9, 8),
    "a100-80g": Device(("NVIDIA A100-SXM4-80GB",), 80 * _GIB, 312e12, 2039e9, 300e9, 25e9, 8),
    "h100-pcie": Device(("NVIDIA H100 PCIe",), 80 * _GIB, 756e12, 2000e9, 64e9, None, 8),
    "h100-80g": Device(("NVIDIA H100 80GB HBM3",), 80 * _GIB, 989e12, 3350e9, 450e9, 50e9, 8),
    "h200": Device(("NVIDIA H200",), 141 * 10**9, 989e12, 4800e9, 450e9, 50e9, 8),
}


def find_device(kind: str) -> Device | None:
    """The device that JAX calls `kind`; None if it is not in the table (a CPU)."""
    return next((device for device in DEVICES.values() if kind in device.kinds), None)


# Of a GPU's memory; JAX's own default is three quarters. The rest is for what does not come from JAX's allocator: the
# context, NCCL's buffers, libraries.
GPU_MEMORY_SHARE = 0.9
# JAX reads both, and refuses them together; the second is the older name.
_SHARES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


def gpu_memory_share() -> float:
    """The share of a GPU's memory that JAX takes: as the environment says, else GPU_MEMORY_SHARE.

    Raises:
      ConfigError: the variable is not a number above 0.
    """
    for name in _SHARES:
        given = os.environ.get(name, "")
        if given:
            try:
                share = float(given)
            except ValueError:
                share = math.nan
            if not 0 < share < math.inf:
                raise ConfigError(f"{name}: expected a share of a GPU's memory such as 0.9, got {given!r}")
            return share
    return GPU_MEMORY_SHARE


def claim_gpu_memory() -> None:
    """Has JAX take `gpu_memory_share` of each GPU; before its first use."""
    share = gpu_memory_share()
    if not any(os.environ.get(name) for name in _SHARES):
        os.environ[_SHARES[0]] = str(share)
