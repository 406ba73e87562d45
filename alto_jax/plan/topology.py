"""--topology: which devices a plan is for. Those of a TPU can only be compiled for; none has to be here."""

import dataclasses
import math
import os
import sys

from alto_jax.config import ConfigError
from alto_jax.parallel.devices import DEVICES, Device, find_device


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to plan for: the real or compile-only ones, or none but their number and kind (estimates)."""

    name: str
    number: int
    kind: str
    devices: list | None

    @property
    def device(self) -> Device | None:
        """Its figures, None if there are none (a CPU)."""
        return find_device(self.kind)

    @property
    def memory(self) -> int | None:
        """HBM of one device in bytes, None if it is unknown."""
        return None if self.device is None else self.device.memory


def find_target(topology: str, *, estimate: bool) -> Target:
    """What a --topology means.

    Raises:
      ConfigError: unknown, or its compiler or GPUs are not here.
    """
    kind, _, size = topology.partition(":")
    if estimate:
        sides = size.split("x")
        if kind not in DEVICES or not all(side.isdigit() and int(side) > 0 for side in sides):
            known = ", ".join(DEVICES)
            raise ConfigError(f"--topology={topology}: --estimate knows {known}, as in h100-80g:8 or v5e:4x4")
        return Target(topology, math.prod(map(int, sides)), DEVICES[kind].kinds[0], None)
    devices = find_devices(topology)
    return Target(topology, len(devices), devices[0].device_kind, devices)


def prepare_environment(topology: str | None) -> None:
    """Settings that must be there before JAX is: no real device is touched unless the topology is `gpu`."""
    kind, _, size = (topology or "").partition(":")
    if kind == "gpu":
        return
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Note: libtpu looks for the TPU's metadata server and takes a machine-wide lock otherwise.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    if kind == "cpu" and size.isdigit():
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={size}"


def find_devices(topology: str) -> list:
    """The devices of a topology; those of a TPU can only be compiled for.

    Raises:
      ConfigError: unknown, or its compiler or GPUs are not here.
    """
    import jax  # late: keeps the start fast

    kind, _, size = topology.partition(":")
    if kind in ("gpu", "cpu"):
        try:
            devices = jax.devices(kind)
        except RuntimeError as error:
            raise ConfigError(
                f"--topology={topology}: this machine has no {kind.upper()} that JAX can use; GPU programs are compiled"
                f" with the GPU present (or add --estimate, as with h100-80g:8): {error}"
            ) from error
        number = int(size) if size.isdigit() else len(devices)
        if not 1 <= number <= len(devices):
            raise ConfigError(f"--topology={topology}: this machine has {len(devices)} of them")
        return devices[:number]
    from jax.experimental import topologies  # late: keeps the start fast

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:
        hint = "" if "libtpu" in sys.modules or _has_libtpu() else "; it needs libtpu: pip install -e '.[plan]'"
        raise ConfigError(
            f"--topology={topology}: expected a TPU slice such as v5e:16x16, v5p:2x2x4 or v6e:8x8, gpu:N or cpu:N{hint}"
            f" ({' '.join(str(error).split())[:200]})"
        ) from error


def _has_libtpu() -> bool:
    import importlib.util  # late: keeps the start fast

    return importlib.util.find_spec("libtpu") is not None
