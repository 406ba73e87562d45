"""Several processes as one run: joining them, and checking that they agree.

Each process owns its devices and reads its part of the data; process 0 alone writes logs. `launch/` has
scripts that start the processes.
"""

import hashlib
import json
import os
from typing import Any

from alto_jax.config import ConfigError, to_dict


def initialize(mode: str) -> None:
    """Joins the processes of a run; must come before the first use of a device.

    Args:
      mode: "none": this process is alone. "env": ALTO_COORDINATOR (host:port), ALTO_NUM_PROCESSES and
        ALTO_PROCESS_ID say who belongs together. "auto": JAX finds out from SLURM, Open MPI, GKE or the
        TPU's metadata.

    Raises:
      ConfigError: a variable is missing or not a number, or the processes did not come together in
        ALTO_TIMEOUT seconds (300).
    """
    if mode not in ("env", "auto"):
        return
    import jax

    timeout = int(os.environ.get("ALTO_TIMEOUT", "300"))
    arguments: dict[str, Any] = {"initialization_timeout": timeout}
    if mode == "env":
        arguments |= {
            "coordinator_address": _variable("ALTO_COORDINATOR"),
            "num_processes": int(_variable("ALTO_NUM_PROCESSES", number=True)),
            "process_id": int(_variable("ALTO_PROCESS_ID", number=True)),
        }
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(**arguments)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"--distributed={mode}: the processes did not come together within {timeout} s"
            f" (is one missing, or its coordinator address wrong?): {error}"
        ) from error


def _variable(name: str, *, number: bool = False) -> str:
    value = os.environ.get(name, "")
    if not value or (number and not value.isdigit()):
        raise ConfigError(f"--distributed=env: {name} must be {'a number' if number else 'set'}, got {value!r}")
    return value


def check_same_config(config: Any) -> None:
    """Compares the configuration of all processes.

    Raises:
      ConfigError: this process's configuration differs from process 0's.
    """
    import jax

    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils
    import numpy as np

    text = json.dumps(to_dict(config), sort_keys=True)
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.int32)
    first = np.asarray(multihost_utils.broadcast_one_to_all(digest))
    if not np.array_equal(first, digest):
        raise ConfigError(f"process {jax.process_index()}: its configuration differs from the one of process 0")
