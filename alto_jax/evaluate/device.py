"""Compiled programs of an evaluation, and the seconds that the device takes for them.

In: examples of this process as a batch on the host. Out: this process's rows of the results on the host, and the time
of the call alone: a program has run once at a shape before its time counts; reading, scoring and writing are outside.
"""

from collections.abc import Callable, Hashable
import dataclasses
import time
from typing import Any

import jax
import numpy as np

from alto_jax import layers
from alto_jax.parallel import distributed, sharding


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a batch of examples got.

    found: arrays with a row an example of this process. tokens: generated for those of all processes. seconds: of the
    device.
    """

    found: dict[str, np.ndarray]
    tokens: int
    seconds: float


class Programs:
    """Functions of (parameters, batch), compiled once a shape for a mesh, with the model's precision."""

    def __init__(self, mesh: Any, precision: str = ""):
        self.mesh, self._precision = mesh, precision
        self._functions: dict[Hashable, Callable] = {}
        self._warm: set[Hashable] = set()

    def __call__(
        self, key: Hashable, function: Callable[[dict, Any], dict[str, jax.Array]], params: dict, batch: Any
    ) -> Answers:
        """Runs a function on a batch of all processes.

        Args:
          key: names the function.
          function: traceable; its results have a row a sample, and "mask" is True at the tokens it generated.
          params: on the mesh; batch: this process's rows, on the host.

        Returns:
          This process's rows of the results, and the seconds from the call to their being there on the device.
        """
        share = sharding.batch_share(self.mesh)
        if key not in self._functions:

            def told(*args: Any) -> dict[str, jax.Array]:
                with layers.told_precision(self._precision):
                    return function(*args)

            jitted = jax.jit(sharding.on_mesh(self.mesh, told), out_shardings=sharding.replicated(self.mesh))
            self._functions[key] = distributed.meeting(jitted)
        num_rows = share.batch_size(len(jax.tree.leaves(batch)[0]))
        program = self._functions[key]
        placed = jax.block_until_ready(sharding.put_batch(batch, self.mesh, num_rows, "--batch-size"))
        shape = (key, tuple(leaf.shape for leaf in jax.tree.leaves(placed)))
        if shape not in self._warm:
            jax.block_until_ready(program(params, placed))
            self._warm.add(shape)
        began = time.perf_counter()
        found = jax.block_until_ready(program(params, placed))
        seconds = time.perf_counter() - began
        whole = {name: np.asarray(value) for name, value in jax.device_get(found).items()}
        tokens = int(whole["mask"].sum()) if "mask" in whole else 0
        return Answers({name: value[share.rows(num_rows)] for name, value in whole.items()}, tokens, seconds)


def device_name(mesh: Any) -> str:
    """Such as "4 x NVIDIA H100 80GB HBM3"; for a CPU its model, where the system says it."""
    devices = list(mesh.devices.flat)
    kind = devices[0].device_kind
    if devices[0].platform == "cpu":
        kind = _cpu_model() or kind
    return f"{len(devices)} x {kind}" if len(devices) > 1 else str(kind)


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = (line.partition(":") for line in file)
            return next((value.strip() for name, _, value in lines if name.strip() == "model name"), "")
    except OSError:
        return ""
