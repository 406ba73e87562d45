"""The one table of accelerators: memory, operations, bandwidths.

Figures are those of the makers' data sheets, of one device as JAX counts them (a whole chip, but half a chip of TPU7x).
"""

import dataclasses


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
    """

    kinds: tuple[str, ...]
    memory: int
    flops: float
    bandwidth: float
    links: float


_GIB = 2**30

# By the name that --topology takes.
DEVICES: dict[str, Device] = {
    "v4": Device(("TPU v4",), 32 * _GIB, 275e12, 1228e9, 270e9),
    "v5e": Device(("TPU v5 lite", "TPU v5e"), 16 * _GIB, 197e12, 819e9, 180e9),
    "v5p": Device(("TPU v5", "TPU v5p"), 95 * _GIB, 459e12, 2765e9, 540e9),
    "v6e": Device(("TPU v6 lite", "TPU v6e"), 32 * _GIB, 918e12, 1640e9, 360e9),
    "tpu7x": Device(("TPU7x",), 96 * _GIB, 1153e12, 3690e9, 300e9),
    "a100-40g": Device(("NVIDIA A100-SXM4-40GB",), 40 * _GIB, 312e12, 1555e9, 300e9),
    "a100-80g": Device(("NVIDIA A100-SXM4-80GB",), 80 * _GIB, 312e12, 2039e9, 300e9),
    "h100-pcie": Device(("NVIDIA H100 PCIe",), 80 * _GIB, 756e12, 2000e9, 64e9),
    "h100-80g": Device(("NVIDIA H100 80GB HBM3",), 80 * _GIB, 989e12, 3350e9, 450e9),
    "h200": Device(("NVIDIA H200",), 141 * 10**9, 989e12, 4800e9, 450e9),
}


def find_device(kind: str) -> Device | None:
    """The device that JAX calls `kind`; None if it is not in the table (a CPU)."""
    return next((device for device in DEVICES.values() if kind in device.kinds), None)
