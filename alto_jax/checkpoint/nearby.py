"""The last steps of a run on each machine: a tier above the run's directory, in memory (`/dev/shm`) or on a fast disk.

    ALTO_LOCAL/RUN/PROCESS-of-PROCESSES/STEP/    arrays.npz: the parts of the arrays that the process's devices hold,
                                                 as integers of their bits; about.json: what the step says of itself

Each process writes its own parts, in a thread. RUN is made of the run's directory and a name that it holds
(`local_tier.json`), so that what is left of another run is never taken for this one's. A step counts where one process
of each role (see `parallel.replicas`) can still read it; the others, such as a machine that came anew, get their parts
from these.
"""

import concurrent.futures
import functools
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from typing import Any
import uuid

import jax
import numpy as np

from alto_jax import cli
from alto_jax.checkpoint import agreement, arrays, position
from alto_jax.checkpoint.agreement import Found, FrozenDamaged, flat, json_digest
from alto_jax.config import write_whole
from alto_jax.parallel import distributed, replicas

NAME = "local_tier.json"  # In the run's directory: its name in ALTO_LOCAL.


def place() -> pathlib.Path:
    """ALTO_LOCAL, else a folder in this machine's memory, else (where there is none) of temporary files."""
    memory = pathlib.Path("/dev/shm")
    default = memory if memory.is_dir() else pathlib.Path(tempfile.gettempdir())
    return pathlib.Path(os.environ.get("ALTO_LOCAL") or default / f"alto_jax_{os.getuid()}")


def _run_name(directory: pathlib.Path) -> str:
    """The run's name, made if it has none; a copy of its directory has another one."""
    file = directory / NAME
    try:
        made = str(json.loads(file.read_text())["run"])
    except (OSError, ValueError, KeyError, TypeError):
        made = uuid.uuid4().hex
        write_whole(file, json.dumps({"run": made}) + "\n")
    return hashlib.sha256(f"{made} {directory.resolve()}".encode()).hexdigest()[:16]


def steps_here(directory: pathlib.Path) -> list[int]:
    """The steps that any process has left on this machine, in rising order; [] if the run has no such tier."""
    if not (directory / NAME).exists():
        return []
    return sorted({int(folder.name) for folder in _folders(place() / _run_name(directory))})


def _folders(run: pathlib.Path) -> list[pathlib.Path]:
    """The complete steps on this machine; a step has its name when it is complete."""
    return [folder for folder in sorted(run.glob("*-of-*/*")) if folder.name.isdigit()]


class Nearby:
    """What this process keeps on its machine of a run, the two newest steps.

    Attributes:
      folder: of the run, on this machine.
    """

    def __init__(self, directory: pathlib.Path):
        """Finds or makes the run's name; all processes call this together.

        Args:
          directory: the run's.
        """
        self.folder = place() / distributed.from_first(lambda: _run_name(directory))
        self._own = self.folder / f"{jax.process_index()}-of-{jax.process_count()}"
        self._writer = concurrent.futures.ThreadPoolExecutor(1, "nearby")
        self._writing: concurrent.futures.Future | None = None

    def save(self, step: int, parts: dict, about: dict) -> None:
        """Copies a step's arrays into this machine's memory, and begins to write them.

        What cannot be written is told, and nothing else happens: the run's own checkpoints are as they were.

        Args:
          step: updates done. parts: trees of arrays. about: what JSON can hold.
        """
        self.wait()
        leaves = flat(parts)
        held: dict[str, np.ndarray] = {}
        for number, leaf in enumerate(leaves.values()):
            for shard in leaf.addressable_shards:
                key = _key(number, replicas.bounds(shard.index, leaf.shape))
                if key not in held:
                    # Note: a copy, since the next update may take the array's memory.
                    held[key] = np.array(shard.data, copy=True).view(replicas.BITS[leaf.dtype.itemsize])
        outline = {path: [str(leaf.dtype), *leaf.shape] for path, leaf in leaves.items()}
        about = {"about": about, "arrays": outline, "role": replicas.role_of(leaves.values())}
        self._writing = self._writer.submit(self._write, step, held, about)

    def _write(self, step: int, held: dict[str, np.ndarray], about: dict) -> None:
        older = [kept for kept in self._own_steps() if kept < step]
        for other in {*self._own_steps()} - {*older[-1:]}:
            # Note: before the new one is written, so that memory for two is enough.
            shutil.rmtree(self._own / f"{other}", ignore_errors=True)
        for begun in self._own.glob("*.tmp"):  # Of a process that was killed.
            shutil.rmtree(begun, ignore_errors=True)
        begun = self._own / f"{step}.tmp"
        try:
            begun.mkdir(parents=True)
            np.savez(begun / "arrays.npz", allow_pickle=False, **held)
            (begun / "about.json").write_text(json.dumps({**about, "digest": json_digest(about)}))
            begun.rename(self._own / f"{step}")
        except OSError:
            shutil.rmtree(begun, ignore_errors=True)
            raise

    def _own_steps(self) -> list[int]:
        return sorted(int(folder.name) for folder in self._own.glob("*") if folder.name.isdigit())

    def wait(self) -> None:
        """Waits until what is under way is written, or told."""
        if self._writing is None:
            return
        try:
            self._writing.result()
        except OSError as error:
            where = f"process {jax.process_index()}: " if jax.process_count() > 1 else ""
            cli.tell(f"warning: {where}ALTO_LOCAL: a step could not be kept on this machine: {error}")
        self._writing = None

    def restore(
        self, wanted: dict, folder: pathlib.Path, oldest: int | None, readers: frozenset[int] | None
    ) -> tuple[Found, int] | None:
        """The newest step that the machines have, with its number; all processes call this together.

        Args:
          wanted: ShapeDtypeStructs by part; frozen parameters are read in the run's directory.
          folder: of the run's checkpoints. oldest: the newest of these; what is older does not count.
          readers: of the frozen parameters, as of `arrays.read`.

        Returns:
          None: there is none, or none that can be read, or the run has no checkpoint yet.

        Raises:
          FrozenDamaged: the frozen parameters cannot be read.
        """
        if oldest is None:
            return None
        here = {name: part for name, part in wanted.items() if name != "frozen"}
        role = replicas.role_of(flat(here).values())
        mine = {
            int(at.name): at
            for at in _folders(self.folder)
            if int(at.name) >= oldest and (_about(at) or {}).get("role") == role
        }
        everyone = distributed.gather({"role": role, "steps": sorted(mine)})
        roles = [each["role"] for each in everyone]
        for step in sorted({step for each in everyone for step in each["steps"]}, reverse=True):
            at = folder / f"{step}"
            if replicas.readers_of(roles, [step in each["steps"] for each in everyone]) is None:
                continue
            given, about = _together(mine.get(step), here, roles, at)
            if given is None:
                continue
            if "frozen" in wanted:
                chosen = {"frozen": wanted["frozen"]}
                frozen, why = agreement.take(functools.partial(arrays.read, at, about, chosen, readers), at)
                if frozen is None:
                    raise FrozenDamaged(arrays.places(at, about)["frozen"], why)
                given = given | frozen.arrays
            return Found(given, plain=position.plain(about, about["data"])), step
        return None

    def clear(self) -> None:
        """Removes what this process has kept; the run's directory has a newer step."""
        self.wait()
        shutil.rmtree(self._own, ignore_errors=True)
        try:
            self.folder.rmdir()
        except OSError:  # Other processes' steps are there, or nothing was.
            pass

    def close(self) -> None:
        """Waits, and ends the thread."""
        self.wait()
        self._writer.shutdown()


def _together(own: pathlib.Path | None, wanted: dict, roles: list[str], at: pathlib.Path) -> tuple[dict | None, dict]:
    """A step's arrays, of what the processes have on their machines, and what it says of itself.

    Args:
      own: where this process has it (None: it has it not). wanted: ShapeDtypeStructs by part.
      roles: of all processes. at: where the run's directory would have it.

    Returns:
      (None, {}) in all processes, of which the first says why: of a role no process can read it.
    """
    found, error = (None, None) if own is None else agreement.attempt(functools.partial(_read, own, wanted))
    about = {} if found is None else found.plain
    told = distributed.gather([json_digest(about) if found else "", " ".join(str(error or "").split())[:200]])
    known = next((digest for digest, _ in told if digest), None)
    able = [bool(digest) and digest == known for digest, _ in told]
    readers, why = replicas.readers_of(roles, able), "the machines' differ"
    for process, (_, said) in enumerate(told):
        if said:
            why = f"process {process}: {said}" if len(told) > 1 else said
            break
    if readers is not None:
        giver = able.index(True)
        about = distributed.gather(about if jax.process_index() == giver else None)[giver]
        given = found.arrays if found is not None and able[jax.process_index()] else replicas.blank(wanted)
        sums = {path: about["checksums"][path] for path in flat(wanted)}
        ready = Found(given, sums, readers=None if all(able) else readers)
        found, why = agreement.take(lambda: ready, at)
        if found is not None:
            return found.arrays, about
    if jax.process_index() == 0:
        cli.tell(f"warning: ALTO_LOCAL: step {at.name} cannot be read ({why})")
    return None, {}


def _read(folder: pathlib.Path, wanted: dict) -> Found:
    """What a step on this machine holds, onto these shapes, dtypes and shardings; as `plain` what it says of itself.

    Raises:
      Exception: it is damaged or does not fit.
    """
    known = _about(folder) or {}
    outline = {path: [str(leaf.dtype), *leaf.shape] for path, leaf in flat(wanted).items()}
    if known.get("arrays") != outline:
        raise ValueError(f"{folder}: holds other arrays than the run has")
    with np.load(folder / "arrays.npz") as held:  # Note: a ZIP file, with a checksum of each member.
        numbers = iter(range(len(outline)))
        found = jax.tree.map(lambda leaf: _assemble(leaf, next(numbers), held), wanted)
    return Found(found, plain=known["about"])


def _assemble(leaf: Any, number: int, held: Any) -> jax.Array:
    """An array from the parts in a file."""
    read: dict[str, np.ndarray] = {}

    def part(index: Any) -> np.ndarray:
        key = _key(number, replicas.bounds(index, leaf.shape))
        if key not in read:
            read[key] = held[key].view(leaf.dtype)
        return read[key]

    return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)


def _key(number: int, part: tuple[tuple[int, int], ...]) -> str:
    return "_".join([str(number), *(f"{a}-{b}" for a, b in part)])


def _about(folder: pathlib.Path) -> dict | None:
    """What a step on this machine says of itself; None if it cannot be read, or is not what was written."""
    try:
        known = json.loads((folder / "about.json").read_text())
        digest = known.pop("digest")
        return known if digest == json_digest(known) else None
    except (OSError, ValueError, KeyError, AttributeError):
        return None
