"""Several processes as one run: joining them, and checking that they agree.

Each process owns its devices and reads its part of the data; process 0 alone writes logs. `launch/` has
scripts that start the processes.
"""

from collections.abc import Callable, Iterator
import contextlib
import functools
import itertools
import json
import os
import re
import socket
import sys
from typing import Any, TypeVar

from alto_jax.config import ConfigError, differences

_joined = False
_meetings = itertools.count()
T = TypeVar("T")

# Seconds that processes wait for each other where nothing is wrong: the slowest compilation. A dead one is noticed
# before, by its heartbeat.
_PATIENCE = 3600


class ProcessLost(RuntimeError):
    """Another process of the run ended or cannot be reached; all must be started again."""


def initialize(mode: str) -> None:
    """Joins the processes of a run; must come before the first use of a device.

    Args:
      mode: "none": this process is alone. "env": ALTO_COORDINATOR (host:port), ALTO_NUM_PROCESSES and
        ALTO_PROCESS_ID say who belongs together. "auto": JAX finds out from SLURM, Open MPI, GKE or the
        TPU's metadata. ALTO_HEARTBEAT (100): seconds after which a silent process counts as lost.

    Raises:
      ConfigError: a variable is missing or not a number, or the processes did not come together in
        ALTO_TIMEOUT seconds (300).
    """
    global _joined
    if mode not in ("env", "auto"):
        return
    import jax  # late: keeps the start fast

    timeout = _seconds("ALTO_TIMEOUT", 300)
    arguments: dict[str, Any] = {
        "initialization_timeout": timeout,
        "heartbeat_timeout_seconds": _seconds("ALTO_HEARTBEAT", 100),
    }
    if mode == "env":
        arguments |= {
            "coordinator_address": _variable("ALTO_COORDINATOR"),
            "num_processes": int(_variable("ALTO_NUM_PROCESSES", number=True)),
            "process_id": int(_variable("ALTO_PROCESS_ID", number=True)),
        }
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        # Note: programs that run beside each other may reach their collectives in another order in another process,
        # and each then waits for ever for the other.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        # Note: within a program too: the scheduler that is the default lets two collectives overtake each other.
        ordered = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {ordered}".strip()
    try:
        jax.distributed.initialize(**arguments)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"--distributed={mode}: the processes did not come together within {timeout} s"
            f" (is one missing, or its coordinator address wrong?): {error}"
        ) from error
    _joined = jax.process_count() > 1


def _seconds(name: str, default: int) -> int:
    value = os.environ.get(name, "") or str(default)
    if not value.isdigit() or int(value) < 1:
        raise ConfigError(f"--distributed: {name} must be a number of seconds, got {value!r}")
    return int(value)


def _variable(name: str, *, number: bool = False) -> str:
    value = os.environ.get(name, "")
    if not value or (number and not value.isdigit()):
        raise ConfigError(f"--distributed=env: {name} must be {'a number' if number else 'set'}, got {value!r}")
    return value


def require_alone(what: str) -> None:
    """Raises ConfigError if there are several processes: `what` is for one."""
    if _joined:
        raise ConfigError(f"--distributed: {what} are for one process; start each stage by its own command")


def gather(value: Any) -> list[Any]:
    """What each process gives, in order of the processes; every process gets it all. For values that JSON can hold.

    Raises:
      ConfigError: a process has failed instead, see `opening`; names it.
    """
    if count() == 1:
        return [value]
    found = _exchange({"value": value})
    failed = next((index for index, given in enumerate(found) if "failed" in given), None)
    if failed is not None:
        raise _Told(f"process {failed}: {found[failed]['failed']}")
    return [given["value"] for given in found]


class _Told(ConfigError):
    """Another process has failed, as all have heard."""


@contextlib.contextmanager
def opening() -> Iterator[None]:
    """Around what each process opens for itself, before work on devices: an error of one ends all, with its name.

    Inside of it processes may `gather`, but use no devices together.

    Raises:
      ConfigError: what was a ValueError or OSError in this process or another one, with that process's number.
    """
    try:
        yield
    except _Told:
        raise
    except (ValueError, OSError) as error:
        if count() == 1:
            raise
        _exchange({"failed": " ".join(str(error).split())})
        import jax  # late: keeps the start fast

        raise ConfigError(f"process {jax.process_index()}: {error}") from error
    gather(None)


def meet() -> None:
    """Waits until all processes are here: at the coordination service, not in a collective.

    For before collectives that one process may reach long before another, which still compiles what the first found in
    a cache: Gloo gives up after 30 seconds. All processes meet in the same order.
    """
    if not _joined:
        return
    from orbax.checkpoint.multihost import get_barrier_sync_fn  # late: only several processes need it

    get_barrier_sync_fn()(key=f"alto_jax/{next(_meetings)}", timeout_ms=_PATIENCE * 1000)


def meeting(program: Any) -> Callable:
    """The jitted `program`, of which every process has compiled the variant at hand before any of them runs it."""
    if count() == 1:
        return program
    import jax  # late: keeps the start fast
    import numpy as np  # late: keeps the start fast

    compiled = set()

    @functools.wraps(program)
    def met(*args: Any) -> Any:
        leaves, structure = jax.tree.flatten(args)
        variant = (structure, *((np.shape(leaf), getattr(leaf, "dtype", type(leaf))) for leaf in leaves))
        if variant not in compiled:
            program.lower(*args).compile()
            meet()
            compiled.add(variant)
        return program(*args)

    return met


def _exchange(value: dict[str, Any]) -> list[dict[str, Any]]:
    """`gather` of several processes."""
    from jax.experimental import multihost_utils  # late: only several processes need it
    import numpy as np  # late: keeps the start fast

    meet()
    mine = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.array([len(mine)]))).reshape(-1)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(mine)] = mine
    parts = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return [json.loads(part[:size].tobytes()) for part, size in zip(parts, sizes)]


def from_first(function: Callable[[], T]) -> T:
    """What `function` returns in process 0 (something that JSON can hold); the others do not call it.

    For what is read of files: the processes may not see the same ones, and must not go different ways.

    Raises:
      ConfigError: in every process, with what `function` raised in process 0 (ValueError, OSError).
    """
    import jax  # late: keeps the start fast

    if count() == 1:
        return function()
    found: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            found["value"] = function()
        except (ValueError, OSError) as error:
            found["error"] = str(error)
    found = gather(found)[0]
    if "error" in found:
        raise ConfigError(found["error"])
    return found["value"]


def count() -> int:
    """How many processes the run has."""
    import jax  # late: keeps the start fast

    return jax.process_count()


@functools.cache
def processes_here() -> int:
    """How many processes of the run this machine has; all of them must ask."""
    here = socket.gethostname()
    return gather(here).count(here)


def require_same(what: str, value: Any) -> None:
    """Compares what all processes have of something that must be the same; all must ask together.

    Args:
      what: in words, for the message.
      value: nested dicts of what JSON can hold.

    Raises:
      ConfigError: in every process, naming the first process that differs from process 0, and in what.
    """
    all_values = gather(value)
    for index, other in enumerate(all_values):
        differing = differences(all_values[0], other)
        if differing:
            told = "; ".join(f"{name or what}: {here!r}, {first!r} in process 0" for name, first, here in differing[:3])
            rest = f" (and {len(differing) - 3} more)" if len(differing) > 3 else ""
            raise ConfigError(f"process {index} has another {what} than process 0: {told}{rest}")


# Statuses of JAX's errors that say by themselves that another process is gone.
_LOST = {"UNAVAILABLE", "ABORTED", "CANCELLED", "DEADLINE_EXCEEDED"}
# Statuses of anything, which say so where a collective or the coordination service reports them.
_ANY = {"UNKNOWN", "INTERNAL", "FAILED_PRECONDITION"}
_REPORTERS = re.compile(r"\bGloo [\w -]+ failed|\bNCCL\b|\bnccl[A-Z]|CoordinationService|\bcoordination service\b")
# A step on the CPU that runs in the call itself fails with a plain ValueError of exactly this form.
_GLOO = re.compile(r"(UNKNOWN|INTERNAL|DEADLINE_EXCEEDED): Gloo [\w -]+ failed: ")


class OutOfMemory(MemoryError):
    """A device's memory was not enough."""


def _cause(error: BaseException) -> tuple[str, str]:
    """(status, message) of the JAX error that `error` is or was raised from; ("", "") if there is none.

    JAX has one type for all of them; the status is the word at the head of its message.
    """
    import jax  # late: keeps the start fast

    seen: BaseException | None = error
    while seen is not None:
        text = " ".join(str(seen).split())
        if isinstance(seen, jax.errors.JaxRuntimeError) or (type(seen) is ValueError and _GLOO.match(text)):
            return text.partition(":")[0], text
        seen = seen.__cause__
    return "", ""


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turns the errors that a lost process causes in the others into ProcessLost, and a full device into OutOfMemory.

    Only errors of JAX's runtime are looked at: what files, data or other packages raise stays what it is, whatever
    words it uses.
    """
    try:
        yield
    except Exception as error:
        status, text = _cause(error)
        if isinstance(error, (ConfigError, ProcessLost, OutOfMemory)) or not status:
            raise
        if status == "RESOURCE_EXHAUSTED" and not isinstance(error, OSError):
            import jax  # late: keeps the start fast

            where = f"process {jax.process_index()}: " if _joined else ""
            raise OutOfMemory(
                f"{where}a device's memory is not enough (config.train.batch_size, train.accumulate, model.*.remat and"
                f" mesh.fsdp change what is needed): {text[:300]}"
            ) from error
        if not _joined or not (status in _LOST or (status in _ANY and _REPORTERS.search(text))):
            raise
        raise ProcessLost(
            f"another process of this run ended or cannot be reached; start all of them again, and they go on from the"
            f" last checkpoint ({text[:300]})"
        ) from error


def is_joined() -> bool:
    """Whether this process is one of several of a run."""
    return _joined


def leave(code: int) -> None:
    """Exits after an error: at once among several processes, without waiting for the others at JAX's last barrier."""
    if not _joined:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
