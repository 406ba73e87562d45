"""--topology: which devices a plan is for. Those of a TPU can only be compiled for; none has to be here."""

import dataclasses
import math
import os
import re
import sys

from alto_jax.config import ConfigError
from alto_jax.parallel.devices import DEVICES, Device, find_device

_HELP = "a TPU slice such as v5e:16x16, v5p:2x2x4 or v6e:8x8 (several: v5p:2x2x4*2), gpu:N or cpu:N"


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to plan for: the real or compile-only ones, or none but their number and kind (estimates).

    Attributes:
      name: as --topology has it.
      number: of devices, of all slices.
      kind: what JAX calls them.
      devices: None for an estimate.
      slices: groups with fast links inside (TPU slices, or machines with GPUs) and a network between them.
      network: bytes per second and direction of one device to other slices; None with one slice.
    """

    name: str
    number: int
    kind: str
    devices: list | None
    slices: int = 1
    network: float | None = None

    @property
    def device(self) -> Device | None:
        """Its figures, None if there are none (a CPU)."""
        return find_device(self.kind)

    @property
    def memory(self) -> int | None:
        """Bytes of one device that a program can have, None if that is unknown."""
        return None if self.device is None else self.device.usable


def _divide(topology: str) -> tuple[str, str, int]:
    """(kind, size of one slice, slices) of KIND:SIZE[*SLICES]; 0 slices: it does not say."""
    kind, _, size = topology.partition(":")
    size, star, count = size.partition("*")
    if star and not re.fullmatch(r"[1-9]\d*", count):
        raise ConfigError(f"--topology={topology}: expected a number of slices after the *, as in v5p:2x2x4*2")
    return kind, size, int(count) if star else 0


def find_target(topology: str, *, estimate: bool, network: float = 0.0) -> Target:
    """What a --topology means.

    Args:
      topology: KIND:SIZE, or KIND:SIZE*SLICES. GPUs beyond one machine's are several machines full of them.
      estimate: no devices are needed.
      network: GB per second and direction of one device to other slices; 0: as the table of accelerators says.

    Raises:
      ConfigError: unknown, or its compiler or GPUs are not here; the network's rate is not known.
    """
    kind, size, slices = _divide(topology)
    if estimate:
        sides = size.split("x")
        if kind not in DEVICES or not all(side.isdigit() and int(side) > 0 for side in sides):
            known = ", ".join(DEVICES)
            raise ConfigError(
                f"--topology={topology}: --estimate knows {known}, as in h100-80g:8, h100-80g:8*2 or v5e:4x4"
            )
        number, node = math.prod(map(int, sides)), DEVICES[kind].node
        if node and number > node and (slices or number % node):
            raise ConfigError(
                f"--topology={topology}: links join {node} of these in a machine; expected at most as many, or machines"
                f" full of them, as in {kind}:{node}*{-(-number // node) * (slices or 1)}"
            )
        slices = slices or (number // node if node and number > node else 1)
        number = number if node and number > node else number * slices
        found = Target(topology, number, DEVICES[kind].kinds[0], None, slices)
    else:
        devices = find_devices(topology)
        found = Target(topology, len(devices), devices[0].device_kind, devices, max(slices, 1))
    if found.slices == 1:
        return found
    rate = network * 1e9 or (found.device.network if found.device else None)
    if rate is None:
        raise ConfigError(f"--topology={topology}: the network's rate is not known; give --network=GB/S of one device")
    return dataclasses.replace(found, network=rate)


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

    kind, size, slices = _divide(topology)
    if kind in ("gpu", "cpu"):
        if slices:
            raise ConfigError(f"--topology={topology}: this machine is one; for several --estimate (h100-80g:8*2)")
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
        name, options = f"{kind}:{size}", {"num_slices": slices} if slices > 1 else {}
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except Exception as error:
        hint = "" if "libtpu" in sys.modules or _has_libtpu() else "; it needs libtpu: pip install -e '.[plan]'"
        raise ConfigError(
            f"--topology={topology}: expected {_HELP}{hint} ({' '.join(str(error).split())[:200]})"
        ) from error


def _has_libtpu() -> bool:
    import importlib.util  # late: keeps the start fast

    return importlib.util.find_spec("libtpu") is not None
