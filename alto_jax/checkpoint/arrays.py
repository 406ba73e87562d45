"""The arrays of a step, by Orbax: those that training changes in its folder, the frozen ones once for all steps.

    checkpoints/STEP/state/    the state without its frozen parameters
    frozen/NAME/               these; a step's description says which NAME it belongs to

The name is a hash of what is in there, so that a step never meets other frozen parameters than its own. They are there
before the first step that belongs to them. Steps of earlier versions have theirs in `state`.
"""

from collections.abc import Callable, Collection
import functools
import itertools
import pathlib
import shutil
from typing import Any

from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp

from alto_jax.checkpoint import damage
from alto_jax.checkpoint.agreement import Found, FrozenDamaged, flat, json_digest
from alto_jax.parallel import distributed, replicas
from alto_jax.storage.steps import DONE, FROZEN

BROKEN = "broken_checkpoints"  # What could not be read on resume is moved here.


def processes() -> ocp.options.MultiprocessingOptions:
    """For writing, by all processes of the run."""
    # Note: with the processes named, Orbax waits for them at barriers of the coordination service, which have timeouts;
    # else it adds collectives of its own between those of the steps, and on a CPU these can meet in another order in
    # another process, and hang.
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    return ocp.options.MultiprocessingOptions(active_processes=set(range(jax.process_count())))


def alone() -> ocp.options.MultiprocessingOptions:
    """For what each process does by itself: reading, since one that cannot read must not leave the others waiting."""
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    index = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"process_{index}"
    )


def _array_checkpointer() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(), multiprocessing_options=alone())


def array_structure(folder: pathlib.Path) -> dict:
    """Shapes and dtypes of the arrays in a folder."""
    with _array_checkpointer() as checkpointer:
        found = checkpointer.metadata(epath.Path(folder)).item_metadata
    if found is None:
        raise ValueError(f"{folder}: the list of its arrays is missing or damaged")
    return found.tree


def restore_arrays(folder: pathlib.Path, wanted: Any) -> Any:
    """Reads a part of the arrays of a folder, onto the shapes, dtypes and shardings wanted."""
    # Note: the handler is named so that the restore may ask for a part of the tree.
    with _array_checkpointer() as checkpointer:
        restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
        args = ocp.args.PyTreeRestore(item=wanted, restore_args=restore_args, partial_restore=True)
        return checkpointer.restore(epath.Path(folder), args=args)


def frozen_name(sums: dict[str, int], frozen: Any) -> str:
    """The name of frozen parameters, with their checksums (`agreement.checksums` of {"frozen": frozen})."""
    outline = {path: [str(leaf.dtype), *leaf.shape, sums[path]] for path, leaf in flat({"frozen": frozen}).items()}
    return json_digest(outline)


def on_first(tree: Any) -> Any:
    """Arrays, whole, in the memory of process 0's machine, None in their place elsewhere; gathered one by one."""
    is_first = jax.process_index() == 0

    def whole(array: jax.Array) -> np.ndarray | None:
        found = multihost_utils.process_allgather(array, tiled=True)
        return np.asarray(found) if is_first else None

    return jax.tree.map(whole, tree)


def keep_frozen(
    directory: pathlib.Path, name: str, frozen: Any, named: Callable[[], Collection[str]], *, is_apart: bool = False
) -> None:
    """Writes frozen parameters, if they are not there yet; all processes call this together.

    Args:
      directory: the run's. name: `frozen_name`.
      named: gives the names that complete steps belong to; what has another one is removed.
      is_apart: process 0 writes alone.
    """
    folder = directory / FROZEN / name

    def is_there() -> bool:
        if (folder / DONE).exists():
            return True
        folder.parent.mkdir(exist_ok=True)
        used = named()
        for other in folder.parent.iterdir():
            if other.name not in used or not (other / DONE).exists():
                shutil.rmtree(other, ignore_errors=True)
        return False

    if distributed.from_first(is_there):
        return
    if is_apart:
        frozen = on_first(frozen)
        if jax.process_index() > 0:
            return
    options = alone() if is_apart else processes()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(), multiprocessing_options=options) as checkpointer:
        checkpointer.save(epath.Path(folder), args=ocp.args.PyTreeSave({"frozen": frozen}))


def set_aside(folder: pathlib.Path, directory: pathlib.Path) -> None:
    """Moves a folder that cannot be read to `broken_checkpoints` of a run's directory."""
    target = directory / BROKEN
    target.mkdir(exist_ok=True)
    names = (f"{folder.name}{'.' * bool(i)}{i or ''}" for i in itertools.count())
    folder.rename(next(target / name for name in names if not (target / name).exists()))


def places(step: pathlib.Path, meta: dict) -> dict[str, pathlib.Path]:
    """The folders with the arrays of a step, which all have trees of their own.

    Args:
      step: its folder. meta: its description, `runs.read_meta`.

    Returns:
      {"": of all parts but for those named here, "frozen": of the frozen parameters}.
    """
    name = meta.get("frozen")
    return {"": step / "state"} | ({"frozen": step.parents[1] / FROZEN / name} if name else {})


def structure(step: pathlib.Path, meta: dict) -> dict:
    """Shapes and dtypes of a step's arrays, by part ("params", "frozen", …); arguments as of `places`."""
    found: dict = {}
    for part, folder in places(step, meta).items():
        found |= _told(part, folder, functools.partial(array_structure, folder))
    return found


def read(step: pathlib.Path, meta: dict, wanted: dict, readers: frozenset[int] | None = None) -> Found:
    """A part of a step's arrays, with the checksums that they were saved with, but for those read in another type.

    Args:
      step, meta: as in `places`. wanted: by part, onto these shapes, dtypes and shardings.
      readers: processes that read for all others of their role (`parallel.replicas`), which give zeros here; None: all.

    Raises:
      FrozenDamaged: the frozen parameters cannot be read. Exception: others cannot.
    """
    folders = places(step, meta)
    found: dict = {}
    dtypes: dict = {}
    for part, folder in folders.items():
        chosen = {name: tree for name, tree in wanted.items() if (name if name in folders else "") == part}
        if chosen:
            is_reader = readers is None or jax.process_index() in readers
            give = functools.partial(restore_arrays, folder) if is_reader else replicas.blank
            found |= _told(part, folder, functools.partial(give, chosen))
            dtypes |= flat(_told(part, folder, functools.partial(array_structure, folder)))
    saved = meta.get("checksums") or {}
    is_as_saved = lambda path, leaf: path in dtypes and np.dtype(dtypes[path].dtype) == leaf.dtype
    sums = {path: saved[path] for path, leaf in flat(found).items() if path in saved and is_as_saved(path, leaf)}
    return Found(found, sums, frozen=str(folders.get("frozen", "")), readers=readers)


def _told(part: str, folder: pathlib.Path, read: Callable[[], Any]) -> Any:
    """`read()`; what goes wrong with a folder that all steps share is raised as FrozenDamaged."""
    try:
        return read()
    except Exception as error:
        if not part or isinstance(error, (MemoryError, jax.errors.JaxRuntimeError)):
            raise
        why = damage.reason(folder, error, is_step=False)
    # Note: out here, so that it does not hold what was read so far.
    raise FrozenDamaged(folder, why)
