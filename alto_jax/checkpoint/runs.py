"""Checkpoints: save, restore, init-from. This room has the only Orbax imports.

A run's directory holds `config.json`, `tokenizer.json` (stages 2 and 3) and `checkpoints/<step>/` with
the state (sharded arrays), the position in the data (Grain iterator) and `meta`: the model's configuration, and a
checksum of every array. A converted checkpoint has the same layout with parameters alone, a run with adapters
(`alto_jax.lora`) has no frozen parameters in it. Saves are asynchronous; a step's folder gets its final name only
when it is complete. A step that cannot be read (damaged files, wrong checksums) is passed over for the one before,
with a message.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import shutil
import sys
from typing import Any, TypeVar, cast

from etils import epath
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from alto_jax.config import ConfigError
from alto_jax.params import merge_params

CHECKPOINTS = "checkpoints"
BROKEN = "broken_checkpoints"  # What could not be read on resume is moved here.
T = TypeVar("T")
S = TypeVar("S")  # A dataclass of trees of arrays, such as TrainState.


class Mismatch(ValueError):
    """The checkpoint is sound but not what was asked for; an older one would not be either."""


@dataclasses.dataclass(frozen=True)
class Retention:
    """Which steps stay: the `newest` ones, and beside them the `best` by the metric that they were saved with.

    mode: "min" or "max" is best. Steps without the metric (or with NaN) are none of the best.
    """

    newest: int = 2
    best: int = 0
    mode: str = "min"

    def keep(self, metrics: Mapping[int, float | None]) -> set[int]:
        """The steps to keep of {step: metric}."""
        known = {s: value for s, value in metrics.items() if value is not None and not math.isnan(value)}
        sign = 1 if self.mode == "min" else -1
        ranked = sorted(known, key=lambda s: (sign * known[s], -s))
        return {*sorted(metrics)[-self.newest :], *ranked[: self.best]}


class Checkpointer:
    """Saves and restores the state of one run, a dataclass whose fields are trees of arrays (`TrainState`).

    Attributes:
      directory: the run's directory.
    """

    def __init__(self, directory: str | os.PathLike, keep: int | Retention = 2):
        self.directory = pathlib.Path(directory).absolute()
        self._folder = self.directory / CHECKPOINTS
        self._folder.mkdir(parents=True, exist_ok=True)
        self._retention = Retention(keep) if isinstance(keep, int) else keep
        self._metrics: dict[int, float | None] = {}
        # Note: with the processes named, Orbax waits for them at barriers of the coordination service, which have
        # timeouts; else it adds collectives of its own between those of the steps, and on a CPU these can meet in
        # another order in another process, and hang.
        processes = ocp.options.MultiprocessingOptions()
        if jax.process_count() > 1:
            processes = ocp.options.MultiprocessingOptions(active_processes=set(range(jax.process_count())))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_Policy(lambda steps: self._retention.keep({s: self._metric(s) for s in steps})),
            create=False,
            enable_async_checkpointing=True,
            multiprocessing_options=processes,
            async_options=ocp.options.AsyncOptions(timeout_secs=int(os.environ.get("ALTO_SAVE_TIMEOUT", "1200"))),
        )
        self._manager = ocp.CheckpointManager(epath.Path(self._folder), options=options)

    def latest_step(self) -> int | None:
        """Newest complete step, or None."""
        return max(complete_steps(self.directory), default=None)

    def save(self, step: int, state: Any, data_iterator: Any, meta: dict, *, metric: float | None = None) -> None:
        """Starts an asynchronous save of step `step`; does nothing if that step is already saved.

        Args:
          step: updates done.
          state: a dataclass (`TrainState`); its fields are saved, but for empty ones.
          data_iterator: of Grain.
          meta: plain values; checksums and the metric are added.
          metric: by which the best checkpoints are kept.

        Raises:
          OSError: this save or the one before it failed (such as: the disk is full). The checkpoints of before are
            still there, and the next save may succeed.
        """
        from grain import checkpoint as grain_checkpoint  # late: keeps the start fast

        parts = _without_empty(state)
        with self._told_failures():
            self._manager.wait_until_finished()
            self._remove_leftovers()
            if self._manager.latest_step() == step:
                return
            self._metrics[step] = metric
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(parts),
                    data=grain_checkpoint.CheckpointSave(data_iterator),
                    meta=ocp.args.JsonSave({**meta, "metric": metric, "checksums": checksums(parts)}),
                ),
            )

    def restore(self, abstract: S, data_iterator: Any) -> S:
        """Restores the newest readable step onto the shapes, dtypes and shardings of `abstract`; moves the iterator.

        Steps after it, which cannot be read, are moved to `broken_checkpoints`.

        Raises:
          ValueError: no step can be read.
        """

        def read(folder: pathlib.Path) -> tuple[dict, Any]:
            wanted = _without_empty(abstract)
            restored = _restore_arrays(folder / "state", wanted)
            _check_sums(folder, restored)
            return restored, _data_state(folder / "data")

        (saved, position), step = newest_readable(self.directory, read)
        data_iterator.set_state(position)
        self._set_aside(step)
        return dataclasses.replace(cast(Any, abstract), **saved)

    def _set_aside(self, step: int) -> None:
        """Moves every folder of a step after `step` out of the way."""
        names = [p.name for p in self._folder.iterdir() if p.name.isdigit() and int(p.name) > step]
        if jax.process_index() == 0:
            for name in names:
                target = self.directory / BROKEN / name
                target.parent.mkdir(exist_ok=True)
                shutil.rmtree(target, ignore_errors=True)
                (self._folder / name).rename(target)
        self._remove_leftovers()
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils  # late: only several processes need it

            multihost_utils.sync_global_devices("alto_jax.checkpoint.set_aside")
        self._manager.reload()

    def _metric(self, step: int) -> float | None:
        """The metric that a step was saved with."""
        if step not in self._metrics:
            try:
                self._metrics[step] = read_meta(self._folder / str(step)).get("metric")
            except (OSError, ValueError):
                self._metrics[step] = None
        return self._metrics[step]

    def wait(self) -> None:
        """Waits until saves under way are complete; raises OSError as `save` does."""
        with self._told_failures():
            self._manager.wait_until_finished()
            self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        """Removes half-written folders; no save may be under way."""
        if jax.process_index() == 0:
            for leftover in self._folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(leftover, ignore_errors=True)

    def close(self) -> None:
        """Waits for what is under way and ends the manager's threads."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def _told_failures(self) -> "_Failures":
        return _Failures(self._manager, self._folder)


class _Failures:
    """Turns what Orbax raises when files cannot be written into OSError."""

    def __init__(self, manager: ocp.CheckpointManager, folder: pathlib.Path):
        self._manager, self._folder = manager, folder

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or not isinstance(error, Exception):
            return
        text = " ".join(str(error).split())
        is_disk = isinstance(error, OSError) or any(
            word in text for word in ("No space left", "RESOURCE_EXHAUSTED", "File too large", "Disk quota", "errno")
        )
        if not is_disk:
            return
        self._manager.reload()
        raise OSError(f"{self._folder}: a checkpoint could not be written: {text}") from error


class _Policy:
    """Orbax's form of `Retention`."""

    def __init__(self, keep: Callable[[list[int]], set[int]]):
        self._keep = keep

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        """Which of the checkpoints (with a `step` each) stay."""
        kept = self._keep([info.step for info in checkpoints])
        return [info.step in kept for info in checkpoints]


def _without_empty(state: Any) -> dict:
    """The state as a dict without parts that hold no array (Orbax cannot write those)."""
    parts = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {name: part for name, part in parts.items() if jax.tree.leaves(part)}


def _flat(tree: Any) -> dict[str, Any]:
    """Leaves by path, the same for a TrainState's parts and what is read back from them."""
    name = lambda k: str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k))))
    return {"/".join(map(name, path)): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@jax.jit
def _sums(leaves: list[jax.Array]) -> list[jax.Array]:
    def total(leaf: jax.Array) -> jax.Array:
        bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}[leaf.dtype.itemsize]
        leaf = leaf.astype(jnp.uint8) if leaf.dtype == bool else jax.lax.bitcast_convert_type(leaf, bits)
        return jnp.sum(leaf.astype(jnp.uint32), dtype=jnp.uint32)

    return [total(leaf) for leaf in leaves]


def checksums(tree: Any) -> dict[str, int]:
    """Sum of the bits of every array, read as integers, modulo 2^32; the same on every mesh.

    Args:
      tree: arrays of any type, on the devices.

    Returns:
      {"a/b/c": sum}.
    """
    flat = _flat(tree)
    return dict(zip(flat, (int(s) for s in jax.device_get(_sums(list(flat.values()))))))


def _check_sums(folder: pathlib.Path, restored: dict) -> None:
    """Raises ValueError if an array differs from what was saved (arrays read in another type are not compared)."""
    saved = read_meta(folder).get("checksums") or {}
    dtypes = {path: np.dtype(leaf.dtype) for path, leaf in _flat(array_structure(folder / "state")).items()}
    same = {p: leaf for p, leaf in _flat(restored).items() if p in saved and dtypes.get(p) == leaf.dtype}
    found = dict(zip(same, (int(s) for s in jax.device_get(_sums(list(same.values()))))))
    wrong = [path for path in found if found[path] != saved[path]]
    if wrong:
        raise ValueError(f"{len(wrong)} arrays are not what was saved, such as {wrong[0]}")


def complete_steps(directory: pathlib.Path) -> list[int]:
    """The complete steps of a run, in rising order."""
    folder = directory / CHECKPOINTS
    if not folder.is_dir():
        return []
    names = [p.name for p in folder.iterdir() if p.name.isdigit() and (p / "_CHECKPOINT_METADATA").exists()]
    return sorted(map(int, names))


def newest_readable(directory: pathlib.Path, read: Callable[[pathlib.Path], T]) -> tuple[T, int]:
    """(read(folder), step) of the newest step for which no process fails; says which steps it passes over.

    Raises:
      ValueError: none can be read.
    """
    steps, first = complete_steps(directory)[::-1], None
    for step in steps:
        result, failure = None, None
        try:
            result = read(directory / CHECKPOINTS / str(step))
        except (Mismatch, ConfigError, MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # noqa: BLE001 - damaged files surface as almost anything
            failure = error
        if _all_agree(failure is None):
            return cast(T, result), step
        text = " ".join(str(failure).split())[:300] if failure is not None else "another process cannot read it"
        first = first or f"step {step}: {text}"
        older = [s for s in steps if s < step]
        going_on = f"going back to step {older[0]}" if older else "there is no other"
        print(
            f"warning: {directory}: the checkpoint of step {step} cannot be read ({text}); {going_on}", file=sys.stderr
        )
    raise ValueError(f"{directory}: no checkpoint can be read ({first})")


def _all_agree(value: bool) -> bool:
    """Whether `value` is true in every process."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils  # late: only several processes need it

    return bool(np.all(multihost_utils.process_allgather(np.array(value))))


def _alone() -> ocp.options.MultiprocessingOptions:
    """For reading without barriers, since a process that cannot read must not leave the others waiting."""
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    index = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"process_{index}"
    )


def _array_checkpointer() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(), multiprocessing_options=_alone())


def array_structure(folder: pathlib.Path) -> dict:
    """Shapes and dtypes of the arrays in a folder."""
    with _array_checkpointer() as checkpointer:
        return checkpointer.metadata(epath.Path(folder)).item_metadata.tree


def _restore_arrays(folder: pathlib.Path, wanted: Any) -> Any:
    """Reads a part of the arrays of a folder, onto the shapes, dtypes and shardings wanted."""
    # Note: the handler is named so that the restore may ask for a part of the tree.
    with _array_checkpointer() as checkpointer:
        restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
        args = ocp.args.PyTreeRestore(item=wanted, restore_args=restore_args, partial_restore=True)
        return checkpointer.restore(epath.Path(folder), args=args)


def _data_state(folder: pathlib.Path) -> Any:
    """Position of this process's iterator; that of any other if the number of processes has changed.

    Raises:
      ValueError: the positions of the processes differ, so that they mean nothing to another number of processes.
    """
    own = folder / f"process_{jax.process_index()}-of-{jax.process_count()}.json"
    if own.exists():
        return json.loads(own.read_text())
    states = [json.loads(file.read_text()) for file in sorted(folder.glob("process_*-of-*.json"))]
    if not states:
        raise FileNotFoundError(f"{folder}: no position in the data")
    if any(state != states[0] for state in states):
        raise ValueError(f"{folder}: positions in the data of {len(states)} processes, which differ; start as many")
    return states[0]


def read_meta(folder: pathlib.Path) -> dict:
    """`load_meta` of one step's folder."""
    return json.loads((folder / "meta" / "metadata").read_text())


def find_run(directory: str | os.PathLike, *, made_by: str = "") -> tuple[pathlib.Path, int]:
    """Finds the newest complete checkpoint of a run.

    Args:
      directory: a run's directory (or its `checkpoints` folder).
      made_by: the command that makes such a checkpoint, for the message.

    Returns:
      (the run's directory, step).

    Raises:
      FileNotFoundError: the directory is missing or holds no complete checkpoint.
    """
    root = pathlib.Path(directory).absolute()
    if root.name == CHECKPOINTS:
        root = root.parent
    hint = f"; make it with: {made_by}" if made_by else ""
    if not (root / CHECKPOINTS).is_dir():
        raise FileNotFoundError(f"{directory}: no checkpoint there (expected a folder {CHECKPOINTS}/){hint}")
    steps = complete_steps(root)
    if not steps:
        raise FileNotFoundError(f"{directory}: {CHECKPOINTS}/ holds no complete step{hint}")
    return root, steps[-1]


def load_meta(directory: str | os.PathLike) -> dict:
    """What the run said of itself when it saved: {"stage", "model", "data", "step"}."""
    root, _ = find_run(directory)
    meta, _ = newest_readable(root, read_meta)
    return {name: value for name, value in meta.items() if name not in ("checksums", "metric")}


def identity(directory: str | os.PathLike) -> str:
    """Step and a hash that changes when the run's newest checkpoint is saved anew."""
    root, step = find_run(directory)
    saved = (root / CHECKPOINTS / str(step) / "_CHECKPOINT_METADATA").read_bytes()
    return f"step {step} {hashlib.sha256(saved).hexdigest()[:12]}"


def load_params(directory: str | os.PathLike, abstract: dict, *, only: str | None = None) -> dict:
    """Reads parameters alone (no optimizer state), onto the shapes, dtypes and shardings of `abstract`.

    Trained parameters are those of the moving average, if the run has one. If the newest checkpoint cannot be read,
    the one before is taken, with a message.

    Args:
      directory: a run's directory.
      abstract: nested dict of ShapeDtypeStructs (with shardings); leaves that the checkpoint lacks are
        left out of the result.
      only: a top-level name ("tokenizer") to restrict to.

    Returns:
      A nested dict with the leaves found.

    Raises:
      ValueError: a parameter has another shape in the checkpoint, or no checkpoint can be read.
    """
    root, _ = find_run(directory)
    return newest_readable(root, functools.partial(read_params, str(directory), abstract, only))[0]


def read_params(name: str, abstract: dict, only: str | None, folder: pathlib.Path) -> dict:
    """`load_params` of one step: its folder; name is the run's, for messages."""
    saved = array_structure(folder / "state")
    wanted = traverse_util.flatten_dict(abstract, sep="/")
    if only is not None:
        wanted = {p: v for p, v in wanted.items() if p.split("/")[0] == only}
    item: dict = {}
    for part in ("ema" if saved.get("ema") else "params", "frozen"):
        have = traverse_util.flatten_dict(saved.get(part) or {}, sep="/")
        chosen = {}
        for path, leaf in wanted.items():
            if path in have:
                if tuple(have[path].shape) != tuple(leaf.shape):
                    raise Mismatch(
                        f"{name}: parameter {path} has shape {tuple(have[path].shape)} in the checkpoint,"
                        f" the model wants {tuple(leaf.shape)}"
                    )
                chosen[path] = leaf
        if chosen:
            item[part] = traverse_util.unflatten_dict(chosen, sep="/")
    if not item:
        return {}
    restored = _restore_arrays(folder / "state", item)
    _check_sums(folder, restored)
    return merge_params(*restored.values())


def require_complete(params: dict, abstract: dict, directory: str) -> None:
    """Raises ValueError naming a parameter of `abstract` that `params`, read from `directory`, lacks."""
    missing = set(traverse_util.flatten_dict(abstract, sep="/")) - set(traverse_util.flatten_dict(params, sep="/"))
    if missing:
        raise Mismatch(f"{directory}: the checkpoint lacks {len(missing)} parameters, such as {min(missing)}")
