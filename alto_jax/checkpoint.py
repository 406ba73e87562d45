"""Checkpoints: save, restore, init-from. The only Orbax import.

A run's directory holds `config.json`, `tokenizer.json` (stages 2 and 3) and `checkpoints/<step>/` with
the state (sharded arrays), the position in the data (Grain iterator) and the model's configuration. A
converted checkpoint has the same layout with parameters alone. Saves are asynchronous; a step's folder
gets its final name only when it is complete.
"""

import json
import os
import pathlib
from typing import Any

from etils import epath
from flax import traverse_util
import jax
import orbax.checkpoint as ocp

from alto_jax.train_state import TrainState, merge_params

CHECKPOINTS = "checkpoints"


class Checkpointer:
    """Saves and restores the TrainState of one run.

    Attributes:
      directory: the run's directory.
    """

    def __init__(self, directory: str | os.PathLike, keep: int = 2):
        self.directory = pathlib.Path(directory).absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(epath.Path(self.directory / CHECKPOINTS), options=options)

    def latest_step(self) -> int | None:
        """Newest complete step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, data_iterator: Any, meta: dict) -> None:
        """Starts an asynchronous save of step `step`; does nothing if that step is already saved."""
        if self._manager.latest_step() == step:
            return
        from grain import checkpoint as grain_checkpoint

        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_without_empty(state)),
                data=grain_checkpoint.CheckpointSave(data_iterator),
                meta=ocp.args.JsonSave(meta),
            ),
        )

    def restore(self, abstract: TrainState, data_iterator: Any) -> TrainState:
        """Restores the newest step onto the shapes, dtypes and shardings of `abstract`; moves the iterator there."""
        from grain import checkpoint as grain_checkpoint

        step = self._manager.latest_step()
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(_without_empty(abstract)),
                data=grain_checkpoint.CheckpointRestore(data_iterator),
            ),
        )
        saved = restored["state"]
        return abstract.replace(**{name: saved.get(name, getattr(abstract, name)) for name in _FIELDS})

    def wait(self) -> None:
        """Waits until saves under way are complete."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.wait_until_finished()
        self._manager.close()


_FIELDS = ("step", "params", "frozen", "opt_state", "stats")


def _without_empty(state: TrainState) -> dict:
    """The state as a dict without parts that hold no array (Orbax cannot write those)."""
    return {name: getattr(state, name) for name in _FIELDS if jax.tree.leaves(getattr(state, name))}


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
    folder = root / CHECKPOINTS
    if not folder.is_dir():
        raise FileNotFoundError(f"{directory}: no checkpoint there (expected a folder {CHECKPOINTS}/){hint}")
    steps = [int(p.name) for p in folder.iterdir() if p.name.isdigit() and (p / "_CHECKPOINT_METADATA").exists()]
    if not steps:
        raise FileNotFoundError(f"{directory}: {CHECKPOINTS}/ holds no complete step{hint}")
    return root, max(steps)


def load_meta(directory: str | os.PathLike) -> dict:
    """What the run said of itself when it saved: {"stage", "model", "data", "step"}."""
    root, step = find_run(directory)
    return json.loads((root / CHECKPOINTS / str(step) / "meta" / "metadata").read_text())


def load_params(directory: str | os.PathLike, abstract: dict, *, only: str | None = None) -> dict:
    """Reads parameters alone (no optimizer state), onto the shapes, dtypes and shardings of `abstract`.

    Args:
      directory: a run's directory.
      abstract: nested dict of ShapeDtypeStructs (with shardings); leaves that the checkpoint lacks are
        left out of the result.
      only: a top-level name ("tokenizer") to restrict to.

    Returns:
      A nested dict with the leaves found.

    Raises:
      ValueError: a parameter has another shape in the checkpoint.
    """
    root, step = find_run(directory)
    folder = epath.Path(root / CHECKPOINTS / str(step) / "state")
    # Note: the handler is named so that the restore may ask for a part of the tree.
    with ocp.PyTreeCheckpointer() as checkpointer:
        saved = checkpointer.metadata(folder).item_metadata.tree
        wanted = traverse_util.flatten_dict(abstract, sep="/")
        if only is not None:
            wanted = {p: v for p, v in wanted.items() if p.split("/")[0] == only}
        item: dict = {}
        for part in ("params", "frozen"):
            have = traverse_util.flatten_dict(saved.get(part) or {}, sep="/")
            chosen = {}
            for path, leaf in wanted.items():
                if path in have:
                    if tuple(have[path].shape) != tuple(leaf.shape):
                        raise ValueError(
                            f"{directory}: parameter {path} has shape {tuple(have[path].shape)} in the checkpoint,"
                            f" the model wants {tuple(leaf.shape)}"
                        )
                    chosen[path] = leaf
            if chosen:
                item[part] = traverse_util.unflatten_dict(chosen, sep="/")
        if not item:
            return {}
        restore_args = ocp.checkpoint_utils.construct_restore_args(item)
        restored = checkpointer.restore(
            folder, args=ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
        )
    return merge_params(*restored.values())


def require_complete(params: dict, abstract: dict, directory: str) -> None:
    """Raises ValueError naming a parameter of `abstract` that `params`, read from `directory`, lacks."""
    missing = set(traverse_util.flatten_dict(abstract, sep="/")) - set(traverse_util.flatten_dict(params, sep="/"))
    if missing:
        raise ValueError(f"{directory}: the checkpoint lacks {len(missing)} parameters, such as {min(missing)}")
