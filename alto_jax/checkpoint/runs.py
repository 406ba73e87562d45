"""Checkpoints: save, restore, init-from. This room has the only Orbax imports.

A run's directory holds `config.json`, `tokenizer.json` (stages 2 and 3) and `checkpoints/<step>/` with
the state (sharded arrays), the position in the data (Grain iterator) and `meta`: the model's configuration, and a
checksum of every array; `frozen/` has the frozen parameters, once for all steps (arrays.py). A converted checkpoint has
the same layout with parameters alone, a run with adapters (`alto_jax.lora`) has no frozen parameters in it. Saves are
asynchronous; a step's folder gets its final name only when it is complete. A step that cannot be read (damaged files,
wrong checksums) is passed over for the one before, with a message.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
from typing import Any, TypeVar, cast

from etils import epath
from flax import traverse_util
import jax
import orbax.checkpoint as ocp

from alto_jax.checkpoint import arrays, damage, foreign, nearby, position
from alto_jax.checkpoint.agreement import (
    CHECKPOINTS,
    Found,
    FrozenDamaged,
    Mismatch,
    Unreadable,
    checksums,
    complete_steps,
    flat,
    json_digest,
    known_steps,
    newest_readable,
)
from alto_jax.checkpoint.retention import Policy, Retention
from alto_jax.config import local_path
from alto_jax.parallel import distributed, replicas
from alto_jax.params import merge_params, refuse_quantized
from alto_jax.storage import fetched
from alto_jax.storage.bucket import checked, is_url
from alto_jax.storage.steps import FROZEN

MADE_BY = "python -m alto_jax.main --config=configs/quickstart.py --workdir=DIR"  # For who has no checkpoint yet.
_OWN = ("checksums", "frozen", "metric", "metric_name", "position", "unlogged")  # what a step says for this room alone
S = TypeVar("S")  # A dataclass of trees of arrays, such as TrainState.


class Checkpointer:
    """Saves and restores the state of one run, a dataclass whose fields are trees of arrays (`TrainState`).

    Attributes:
      directory: the run's directory.
      unlogged: metrics of the updates that were in no record of metrics.jsonl when the restored step was saved.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        keep: int | Retention = 2,
        *,
        is_apart: bool = False,
        has_local: bool = False,
        one_reader: bool = False,
    ):
        """Makes the folder; with `has_local` all processes call this together.

        Args:
          directory: of the run. keep: which steps stay.
          is_apart: each process has a directory of its own. Then process 0 gathers all arrays and writes alone, and the
            directories must be equal when a run is gone on with (`storage.mirror.of_each`).
          has_local: the last steps are kept on each machine too (`checkpoint.nearby`), where `save_local` is called.
          one_reader: of the processes that hold the same parts of all arrays one reads, for the others too.
        """
        self.directory = local_path(directory, "--workdir").absolute()
        self._folder = self.directory / CHECKPOINTS
        self._folder.mkdir(parents=True, exist_ok=True)
        self._retention = Retention(keep) if isinstance(keep, int) else keep
        self._metrics: dict[int, float | None] = {}
        self._is_apart, self._writes = is_apart, not is_apart or jax.process_index() == 0
        self._frozen = ""  # the name of those that are known to be there
        self.unlogged: list[dict[str, float]] = []
        self._nearby = nearby.Nearby(self.directory) if has_local else None
        self._one_reader = one_reader
        damage.quiet_saves()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=Policy(lambda steps: self._retention.keep({s: self._metric(s) for s in steps})),
            create=False,
            enable_async_checkpointing=True,
            multiprocessing_options=arrays.alone() if is_apart else arrays.processes(),
            # Note: folders are made before arrays are written: a writer waits 300 s for one that cannot be made.
            async_options=ocp.options.AsyncOptions(
                timeout_secs=int(os.environ.get("ALTO_SAVE_TIMEOUT", "1200")), create_directories_asynchronously=False
            ),
        )
        self._manager = ocp.CheckpointManager(epath.Path(self._folder), options=options)

    def latest_step(self) -> int | None:
        """Newest complete step that any process sees, or None."""
        return max(known_steps(self.directory), default=None)

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
          ConfigError: parameters of 8 bits.
        """
        from grain import checkpoint as grain_checkpoint  # late: keeps the start fast

        parts = _without_empty(state)
        refuse_quantized(flat(parts), str(self.directory))
        with self._told_failures():
            self._wait()
            if self._latest_saved() == step:
                return
            self._require_folder()
            self._metrics[step] = metric
            described = self._described(parts, data_iterator, meta | {"metric": metric})
            place: Any = grain_checkpoint.CheckpointSave(data_iterator)
            if self._is_apart:
                parts = arrays.on_first(parts)
                place = ocp.args.JsonSave({"positions": distributed.gather(data_iterator.get_state())})
                if not self._writes:
                    return
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(parts),
                    data=place,
                    meta=ocp.args.JsonSave(sealed(described)),
                ),
            )

    def save_local(self, step: int, state: Any, data_iterator: Any, meta: dict) -> None:
        """`save` on each machine alone, for the run's next start; arguments as there. Only after a first `save`.

        Raises:
          OSError: the frozen parameters, of which the run's directory has the one copy, cannot be written.
        """
        assert self._nearby is not None
        parts = _without_empty(state)
        with self._told_failures():
            described = self._described(parts, data_iterator, meta)
        self._nearby.save(step, parts, described | {"data": data_iterator.get_state()})

    def drop_local(self) -> None:
        """Removes the steps on this machine, which a `save` has made superfluous."""
        if self._nearby is not None:
            self._nearby.clear()

    def _described(self, parts: dict, data_iterator: Any, meta: dict) -> dict:
        """What a step says of itself; takes the frozen parameters out of the parts, to where all steps share them."""
        described = meta | {"checksums": checksums(parts), "position": json_digest(data_iterator.get_state())}
        return described | self._put_frozen_apart(parts, described["checksums"])

    def _put_frozen_apart(self, parts: dict, sums: dict[str, int]) -> dict:
        """Takes the frozen parameters out of a state, to where all steps share them; returns what a step says of it."""
        frozen = parts.pop("frozen", None)
        if frozen is None:
            return {}
        name = arrays.frozen_name(sums, frozen)
        if name != self._frozen:
            arrays.keep_frozen(self.directory, name, frozen, self._frozen_names, is_apart=self._is_apart)
            self._frozen = name
        return {"frozen": name}

    def _frozen_names(self) -> set[str]:
        """Those that complete steps belong to."""
        names = set()
        for step in complete_steps(self.directory):
            with contextlib.suppress(OSError, ValueError):
                names.add(read_meta(self._folder / str(step)).get("frozen", ""))
        return names

    def restore(self, abstract: S, data_iterator: Any, *, frozen: Any = None) -> S:
        """Restores the newest readable step onto the shapes, dtypes and shardings of `abstract`; moves the iterator.

        Steps after it, which cannot be read, are moved to `broken_checkpoints`.

        Args:
          abstract: ShapeDtypeStructs. data_iterator: of Grain.
          frozen: frozen parameters that were made again, since the saved ones cannot be read; they take their place.

        Raises:
          FrozenDamaged: the frozen parameters cannot be read, or those given are others.
          Unreadable: no step can be read; says how the run can begin anew.
        """
        wanted = _without_empty(abstract)
        if frozen is not None:
            del wanted["frozen"]
        readers = None
        if self._one_reader:
            roles = distributed.gather(replicas.role_of(flat(wanted).values()))
            readers = replicas.readers_of(roles, [True] * len(roles))

        def read(folder: pathlib.Path) -> Found:
            meta, state = read_meta(folder), position.read(folder / "data")
            if meta.get("position", json_digest(state)) != json_digest(state):
                raise ValueError(f"{folder / 'data'}: the position in the data is not what was saved")
            return dataclasses.replace(arrays.read(folder, meta, wanted, readers), plain=position.plain(meta, state))

        local = self._nearby and self._nearby.restore(wanted, self._folder, self.latest_step(), readers)
        try:
            found, step = local or newest_readable(self.directory, read)
        except Unreadable as error:
            raise Unreadable(f"{error}; with {self._folder} moved away the run begins anew") from error
        state, name, self.unlogged = found.plain
        if frozen is not None:
            self._replace_frozen(name, frozen)
            found.arrays["frozen"] = frozen
        data_iterator.set_state(state)
        distributed.from_first(functools.partial(self._set_aside, step))
        self._manager.reload()
        return dataclasses.replace(cast(Any, abstract), **found.arrays)

    def _replace_frozen(self, name: str, frozen: Any) -> None:
        """Puts frozen parameters where those of a name are damaged."""
        folder = self.directory / FROZEN / name
        if name != arrays.frozen_name(checksums({"frozen": frozen}), frozen):
            raise FrozenDamaged(folder, "those that the run began with are others now")
        distributed.from_first(lambda: arrays.set_aside(folder, self.directory) if folder.exists() else None)
        arrays.keep_frozen(self.directory, name, frozen, self._frozen_names, is_apart=self._is_apart)

    def _set_aside(self, step: int) -> None:
        """Moves every folder of a step after `step` out of the way."""
        for folder in [p for p in self._folder.iterdir() if p.name.isdigit() and int(p.name) > step]:
            arrays.set_aside(folder, self.directory)
        self._remove_leftovers()

    def kept_best(self) -> tuple[int, float] | None:
        """The best of the steps that are there (of equal ones the newest), with its metric, as process 0 sees them."""

        def find() -> tuple[int, float | None] | None:
            metrics = {step: self._metric(step) for step in complete_steps(self.directory)}
            return next(((step, metrics[step]) for step in self._retention.ranked(metrics)), None)

        self.wait()
        found = distributed.from_first(find)
        return None if found is None else (int(found[0]), float(cast(Any, found[1])))

    def _metric(self, step: int) -> float | None:
        """The metric that a step was saved with."""
        if step not in self._metrics:
            try:
                self._metrics[step] = self._retention.value(read_meta(self._folder / str(step)))
            except (OSError, ValueError):
                self._metrics[step] = None
        return self._metrics[step]

    def wait(self) -> None:
        """Waits until saves under way are complete; raises OSError as `save` does."""
        with self._told_failures():
            self._wait()

    def _require_folder(self) -> None:
        """Raises OSError where a mount is gone; else Orbax would make the folders anew, on what lies below it."""
        if not self._folder.is_dir():
            raise FileNotFoundError(f"the folder is gone (a lost mount?): {self._folder}")

    def _wait(self) -> None:
        if self._writes:
            self._manager.wait_until_finished()
            self._remove_leftovers()

    def _latest_saved(self) -> int | None:
        latest = self._manager.latest_step
        return distributed.from_first(latest) if self._is_apart else latest()

    def _remove_leftovers(self) -> None:
        """Removes half-written folders; no save may be under way."""
        if jax.process_index() == 0:
            for leftover in self._folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(leftover, ignore_errors=True)

    def close(self) -> None:
        """Waits for what is under way and ends the manager's threads; raises OSError as `save` does."""
        with self._told_failures():
            try:
                self._wait()
            finally:
                if self._nearby is not None:
                    self._nearby.close()
                self._manager.close()

    def _told_failures(self) -> damage.Failures:
        return damage.Failures(self._manager, self._folder)


def _without_empty(state: Any) -> dict:
    """The state as a dict without parts that hold no array (Orbax cannot write those)."""
    parts = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {name: part for name, part in parts.items() if jax.tree.leaves(part)}


def sealed(meta: dict) -> dict:
    """What a step says of itself, with a hash, so that a changed byte does not go unnoticed."""
    return {**meta, "digest": json_digest(meta)}


def read_meta(folder: pathlib.Path) -> dict:
    """`load_meta` of one step's folder, with the entries that are for this room alone.

    Raises:
      ValueError: it is not what was saved.
    """
    meta = json.loads((folder / "meta" / "metadata").read_text())
    digest = meta.pop("digest", None)
    if digest not in (None, json_digest(meta)):
        raise ValueError(f"{folder / 'meta'}: it is not what was saved")
    return meta


def find_run(directory: str | os.PathLike, *, made_by: str = "", step: int | None = None) -> tuple[pathlib.Path, int]:
    """Finds the newest complete checkpoint of a run.

    Args:
      directory: a run's directory (or its `checkpoints` folder), or a packed checkpoint (packed.py); or a URL of one.
      made_by: the command that makes such a checkpoint, for the message.
      step: the one that will be read (None: the newest), which is what is fetched of a URL.

    Returns:
      (the run's directory, step).

    Raises:
      FileNotFoundError: the directory is missing or holds no complete checkpoint.
    """
    given = checked(directory, "checkpoint")
    root = foreign.run_of(given, step).absolute()
    if isinstance(given, pathlib.Path) and root == given.absolute() and (found := foreign.explain(given)):
        raise FileNotFoundError(found)
    root = root.parent if root.name == CHECKPOINTS else root
    hint = f"; make it with: {made_by}" if made_by else ""
    if not (root / CHECKPOINTS).is_dir():
        raise FileNotFoundError(f"{directory}: no checkpoint there (expected a folder {CHECKPOINTS}/){hint}")
    steps = complete_steps(root)
    if not steps:
        raise FileNotFoundError(f"{directory}: {CHECKPOINTS}/ holds no complete step{hint}")
    return root, steps[-1]


def load_meta(directory: str | os.PathLike, step: int | None = None) -> dict:
    """What the run said of itself when it saved: {"stage", "model", "data", "step"}; step: None is the newest."""
    root, _ = find_run(directory, step=step)
    found, _ = newest_readable(root, lambda folder: Found(plain=read_meta(folder)), step)
    return described(found)


def described(found: Found) -> dict:
    """What a step says of itself, without what it says for this room alone."""
    return {name: value for name, value in found.plain.items() if name not in _OWN}


def identity(directory: str | os.PathLike, step: int | None = None) -> str:
    """Step and a hash that changes when the run's checkpoint (None: the newest) is saved anew."""
    if is_url(directory) and step is None:
        step, saved = fetched.newest(directory, "checkpoint")  # Note: without fetching it.
        return f"step {step} {hashlib.sha256(saved).hexdigest()[:12]}"
    root, newest = find_run(directory, step=step)
    step = newest if step is None else step
    saved = (root / CHECKPOINTS / str(step) / "_CHECKPOINT_METADATA").read_bytes()
    return f"step {step} {hashlib.sha256(saved).hexdigest()[:12]}"


def load_params(
    directory: str | os.PathLike, abstract: dict, *, only: str | None = None, step: int | None = None
) -> dict:
    """Reads parameters alone (no optimizer state), onto the shapes, dtypes and shardings of `abstract`.

    Trained parameters are those of the moving average, if the run has one. If the newest checkpoint cannot be read,
    the one before is taken, with a message.

    Args:
      directory: a run's directory.
      abstract: nested dict of ShapeDtypeStructs (with shardings); leaves that the checkpoint lacks are
        left out of the result.
      only: a top-level name ("tokenizer") to restrict to.
      step: this one and no other.

    Returns:
      A nested dict with the leaves found.

    Raises:
      ValueError: a parameter has another shape in the checkpoint, or no checkpoint can be read.
    """
    root, _ = find_run(directory, step=step)
    found, _ = newest_readable(root, functools.partial(read_params, str(directory), abstract, only), step)
    return joined(found)


def joined(found: Found) -> dict:
    """The parameters of `read_params`, trained and frozen, as one tree."""
    return merge_params(*found.arrays.values()) if found.arrays else {}


def read_params(name: str, abstract: dict, only: str | None, folder: pathlib.Path) -> Found:
    """`load_params` of one step, by part ("params", "frozen"); name is the run's, for messages."""
    meta = read_meta(folder)
    saved = arrays.structure(folder, meta)
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
    return dataclasses.replace(arrays.read(folder, meta, item), plain=meta)


def require_complete(params: dict, abstract: dict, directory: str) -> None:
    """Raises ValueError naming a parameter of `abstract` that `params`, read from `directory`, lacks."""
    missing = set(traverse_util.flatten_dict(abstract, sep="/")) - set(traverse_util.flatten_dict(params, sep="/"))
    if missing:
        raise Mismatch(f"{directory}: the checkpoint lacks {len(missing)} parameters, such as {min(missing)}")
