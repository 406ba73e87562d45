"""Which step several processes read: they agree before any of them does what waits for the others.

A process may not be able to read what another reads: its part of an array is damaged, or its file system shows an
older state. So reading (of files alone, `Found`) comes first, then a vote, then checksums (which need all processes),
then a vote on these. With one process the same happens without votes.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from alto_jax import cli
from alto_jax.checkpoint import damage
from alto_jax.config import ConfigError
from alto_jax.parallel import distributed, replicas

CHECKPOINTS = "checkpoints"
T = TypeVar("T")


class Mismatch(ValueError):
    """The checkpoint is sound but not what was asked for; an older one would not be either."""


class Unreadable(ValueError):
    """Of no step there is can a checkpoint be read; in all processes alike."""


class _Changed(ValueError):
    """Arrays were read whole, and are not what was saved."""


class FrozenDamaged(Mismatch):
    """The frozen parameters, of which there is one copy for all steps of a run, cannot be read; in all processes alike.

    Attributes:
      folder: where they are. why: in words.
    """

    def __init__(self, folder: str | os.PathLike, why: str):
        super().__init__(
            f"{folder}: the frozen parameters, which all checkpoints of the run share, cannot be read: {why}"
        )
        self.folder, self.why = str(folder), why


# What ends the command, since an older step would end like it.
_FATAL = (Mismatch, ConfigError, MemoryError, jax.errors.JaxRuntimeError)


@dataclasses.dataclass(frozen=True)
class Found:
    """What a process has read of a step; the same in all processes, but for the parts of arrays that each holds.

    Attributes:
      arrays: a tree of arrays on the devices.
      sums: of those that can be compared with what was saved, by path, see `checksums`.
      plain: what else was read; JSON can hold it.
      frozen: the folder of the arrays whose path begins with "frozen"; "": that of all others.
      readers: the processes that have read the arrays, for those of their role (`parallel.replicas`); None: all have.
    """

    arrays: Any = dataclasses.field(default_factory=dict)
    sums: dict[str, int] = dataclasses.field(default_factory=dict)
    plain: Any = None
    frozen: str = ""
    readers: frozenset[int] | None = None

    def digest(self) -> str:
        """What must be the same in all processes, before they may work together on the arrays."""
        outline = {path: [str(leaf.dtype), *leaf.shape] for path, leaf in flat(self.arrays).items()}
        return json_digest([outline, self.sums, self.plain])


def json_digest(value: Any) -> str:
    """A hash of what JSON can hold."""
    text = json.dumps(json.loads(json.dumps(value)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def flat(tree: Any) -> dict[str, Any]:
    """Leaves by path, the same for a TrainState's parts and what is read back from them."""
    name = lambda k: str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k))))
    return {"/".join(map(name, path)): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@jax.jit
def _sums(leaves: list[jax.Array]) -> list[jax.Array]:
    def total(leaf: jax.Array) -> jax.Array:
        bits = replicas.BITS[leaf.dtype.itemsize]
        leaf = leaf.astype(jnp.uint8) if leaf.dtype == bool else jax.lax.bitcast_convert_type(leaf, bits)
        return jnp.sum(leaf.astype(jnp.uint32), dtype=jnp.uint32)

    return [total(leaf) for leaf in leaves]


@functools.cache
def _met_sums() -> Callable:
    return distributed.meeting(_sums)


def _sum_here(leaf: jax.Array) -> np.uint32:
    """The same of an array in this machine's memory, which needs no program."""
    array = np.asarray(leaf)
    return np.sum(array.view(replicas.BITS[array.dtype.itemsize]), dtype=np.uint32)


def checksums(tree: Any) -> dict[str, int]:
    """Sum of the bits of every array, read as integers, modulo 2^32; the same on every mesh.

    Args:
      tree: arrays of any type, on the devices or in this machine's memory; all processes must call this together.

    Returns:
      {"a/b/c": sum}.
    """
    leaves = flat(tree)
    is_numpy = lambda leaf: isinstance(leaf, np.ndarray | np.generic)
    is_in_memory = lambda leaf: leaf.is_fully_addressable and all(d.platform == "cpu" for d in leaf.devices())
    if all(is_numpy(leaf) or is_in_memory(leaf) for leaf in leaves.values()):
        sums = [_sum_here(leaf) for leaf in leaves.values()]
    else:
        sums = jax.device_get(_met_sums()(list(leaves.values())))
    return dict(zip(leaves, map(int, sums)))


def complete_steps(directory: pathlib.Path) -> list[int]:
    """The complete steps of a run, as this process sees them, in rising order."""
    folder = directory / CHECKPOINTS
    if not folder.is_dir():
        return []
    names = [p.name for p in folder.iterdir() if p.name.isdigit() and (p / "_CHECKPOINT_METADATA").exists()]
    return sorted(map(int, names))


def known_steps(directory: pathlib.Path) -> list[int]:
    """The complete steps that any process sees, in rising order."""
    return sorted(set().union(*distributed.gather(complete_steps(directory))))


def newest_readable(
    directory: pathlib.Path, read: Callable[[pathlib.Path], Found], step: int | None = None
) -> tuple[Found, int]:
    """(read(folder), step) of the newest step for which no process fails; the rest as in `newest_in_parts`."""
    [found], step = newest_in_parts(directory, [read], lambda found: found, step)
    return found, step


def newest_in_parts(
    directory: pathlib.Path,
    reads: Sequence[Callable[[pathlib.Path], Found]],
    keep: Callable[[Found], T],
    step: int | None = None,
) -> tuple[list[T], int]:
    """The newest step for which no process fails, read part by part; says which steps it passes over.

    Args:
      directory: a run's.
      reads: each reads files alone, and must not wait for another process; as many in all processes.
      keep: what is kept of a part, before the next one is read.
      step: this one and no other; None: the newest that can be read.

    Returns:
      (what is kept of each part, step).

    Raises:
      ConfigError: there is no such step; names those that there are.
      Unreadable: none can be read.
    """
    steps, first = known_steps(directory)[::-1], None
    if step is not None:
        if step not in steps:
            raise ConfigError(f"--step={step}: {directory} has the steps {', '.join(map(str, steps[::-1]))}")
        steps = [step]
    for step in steps:
        folder, kept = directory / CHECKPOINTS / str(step), []
        for read in reads:
            found, why = take(functools.partial(_read_there, read, folder), folder)
            if found is None:
                break
            kept.append(keep(found))
            found = None  # Note: its memory is needed for the next part.
        else:
            return kept, step
        kept = []  # Note: their memory is needed for the next step.
        first = first or f"step {step}: {why}"
        older = [s for s in steps if s < step]
        if older and jax.process_index() == 0 and damage.is_news(folder):
            cli.tell(
                f"warning: {directory}: the checkpoint of step {step} cannot be read ({why});"
                f" going back to step {older[0]}"
            )
    raise Unreadable(f"{directory}: no checkpoint can be read ({first or 'there is none'})")


def take(read: Callable[[], Found], folder: pathlib.Path) -> tuple[Found | None, str]:
    """What all processes can read, and is what was saved; all call this together.

    Args:
      read: reads files alone, and must not wait for another process.
      folder: of the step, for messages.

    Returns:
      (what was read, ""), or in all processes (None, why not).

    Raises:
      Exception: what would end an older step too, see `_vote`.
    """
    found, error = attempt(read)
    why = _vote(folder, found, error)
    if why is None:
        assert found is not None
        if found.readers is not None:
            found = dataclasses.replace(found, arrays=replicas.spread(found.arrays, found.readers), readers=None)
        why = _vote(folder, found, _wrong_sums(found))
    return (None, why) if why is not None else (found, "")


def _read_there(read: Callable[[pathlib.Path], Found], folder: pathlib.Path) -> Found:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not there")
    return read(folder)


def attempt(read: Callable[[], Found]) -> tuple[Found | None, Exception | None]:
    """What `read` returns, or what it raises."""
    try:
        with damage.quiet():
            return read(), None
    except Exception as error:  # noqa: BLE001 - damaged files surface as almost anything
        # Note: without its frames, which keep what was read so far.
        return None, error.with_traceback(None)


def _wrong_sums(found: Found) -> Exception | None:
    """An error if an array differs from what was saved; all processes compute this together."""
    sums = checksums(found.arrays) if found.sums else {}
    wrong = [path for path, value in found.sums.items() if sums[path] != value]
    told = lambda paths: f"{len(paths)} arrays are not what was saved, such as {paths[0]}"
    frozen = [path for path in wrong if found.frozen and path.startswith("frozen/")]
    if frozen:
        return FrozenDamaged(found.frozen, told(frozen))
    return _Changed(told(wrong)) if wrong else None


def _vote(folder: pathlib.Path, found: Found | None, error: Exception | None) -> str | None:
    """Why the step cannot be taken, the same in all processes; None if it can.

    Raises:
      Exception: what would end an older step too: this process's own, or ConfigError with another one's.
    """
    is_fatal = isinstance(error, _FATAL)
    is_clear = is_fatal or isinstance(error, _Changed)
    text = None if error is None else str(error)[:300] if is_clear else damage.reason(folder, error)
    own = {"error": text, "is_fatal": is_fatal, "digest": found.digest() if found else ""}
    frozen = [error.folder, error.why] if isinstance(error, FrozenDamaged) else []
    votes = distributed.gather({**own, "frozen": frozen})
    name = lambda index: f"process {index}: " if len(votes) > 1 else ""
    for index, vote in enumerate(votes):
        if vote["frozen"]:
            where, why = vote["frozen"]
            raise FrozenDamaged(where, f"{name(index)}{why}")
    if error is not None and own["is_fatal"]:
        raise error
    for index, vote in enumerate(votes):
        if vote["is_fatal"]:
            raise ConfigError(f"{name(index)}{vote['error']}")
    for index, vote in enumerate(votes):
        if vote["error"] is not None:
            return f"{name(index)}{vote['error']}"
    other = [index for index, vote in enumerate(votes) if vote["digest"] != votes[0]["digest"]]
    return f"process {other[0]} reads something else than process 0" if other else None
