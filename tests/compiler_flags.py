"""XLA's flags by which tests compile quickly."""

from collections.abc import Iterable
import importlib.metadata
import os
import subprocess
import sys

# LLVM's optimisations are left out, loops are written without MLIR, and a program is not split among threads,
# since two workers already fill two cores.
QUICK_TO_COMPILE = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)


def taken(flags: Iterable[str] = QUICK_TO_COMPILE) -> list[str]:
    """Those of the flags that the installed JAX takes; one that it does not know ends a process without a word.

    JAX 0.10, which takes all, is not asked.
    """
    flags = list(flags)
    if importlib.metadata.version("jax").startswith("0.10."):
        return flags

    def takes(given: list[str]) -> bool:
        environment = os.environ | {"XLA_FLAGS": " ".join(given), "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", "import jax; jax.devices()"]
        return subprocess.run(command, env=environment, capture_output=True).returncode == 0

    return flags if takes(flags) else [flag for flag in flags if takes([flag])]
