"""Checkpoints: save, restore, init-from. The only Orbax import.

A run's directory holds `config.json`, `tokenizer.json` (stages 2 and 3) and `checkpoints/<step>/` with
the state (sharded arrays), the position in the data (Grain iterator) and the model's configuration. A
converted checkpoint has the same layout with parameters alone. Saves are asynchronous; a step's folder
gets its final name only when it is complete.
"""

from collections.abc import Callable, Mapping
import dataclasses
import hashlib
import json
import math
import os
import pathlib
from typing import Any

from etils import epath
from flax import traverse_util
import jax
import numpy as np
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


# --- Parameters row by row (conversion): no more than one layer of one parameter is ever in memory ---------

_MAX_CHUNK_BYTES = 1 << 26
_MAX_PENDING_BYTES = 1 << 28


class _Sink:
    """A parameter that is written by assignment: `sink[row] = value`, `sink[...] = value`."""

    def __init__(self, shape: tuple[int, ...], dtype: Any):
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)

    def open(self, directory: str, pending: list) -> None:
        """Makes the array on disk; `pending` collects the writes under way, of all sinks."""
        import tensorstore as ts

        # Note: uncompressed (weights hardly shrink), one file per layer, so that hosts read what they need.
        metadata = {
            "shape": self.shape,
            "chunks": _chunk_shape(self.shape, self.dtype.itemsize),
            "dtype": self.dtype.name if self.dtype.kind == "V" else self.dtype.str,
            "compressor": None,
        }
        spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": directory}, "metadata": metadata}
        self._store = ts.open(spec, create=True, context=ts.Context({"file_io_sync": False})).result()
        self._pending = pending

    def __setitem__(self, index: Any, value: np.ndarray) -> None:
        value = np.asarray(value)
        write = self._store[index].write(value, can_reference_source_data_indefinitely=True)
        self._pending.append((value.nbytes, write))
        while sum(nbytes for nbytes, _ in self._pending[:-1]) > _MAX_PENDING_BYTES:
            self._pending.pop(0)[1].result()


class _SinkHandler(ocp.type_handlers.NumpyHandler):
    """Lets Orbax save a tree of sinks: opens them all, then calls `fill`."""

    def __init__(self, fill: Callable[[], None]):
        super().__init__()
        self._fill = fill

    async def serialize(self, values: Any, infos: Any, args: Any = None) -> list:
        pending: list = []
        for sink, info in zip(values, infos):
            sink.open(str(info.parent_dir / info.name), pending)
        self._fill()
        for _, write in pending:
            write.result()
        return []


def _chunk_shape(shape: tuple[int, ...], itemsize: int) -> list[int]:
    """One layer of a stack (or rows of a matrix) per chunk, at most _MAX_CHUNK_BYTES."""
    chunk = [1 if len(shape) > 2 else n for n in shape[:1]] + list(shape[1:])
    for axis in range(len(chunk)):
        excess = math.prod(chunk) * itemsize / _MAX_CHUNK_BYTES
        if excess > 1:
            chunk[axis] = max(1, int(chunk[axis] / math.ceil(excess)))
    return [max(n, 1) for n in chunk]


def save_params(
    directory: str | os.PathLike, shapes: Mapping[str, tuple[tuple[int, ...], Any]], fill: Callable, meta: dict
) -> None:
    """Saves parameters alone as step 0 of a run's directory, without ever holding them all; not atomic.

    Args:
      directory: the run's directory; gets `checkpoints/0`.
      shapes: "a/b/c" → (shape, dtype) of every parameter.
      fill: called once with {path: sink}; assigns every element, as `sink[...] = array` or row by row of the
        leading axis. An assigned array must not change afterwards.
      meta: as `Checkpointer.save` has it.
    """
    sinks = {path: _Sink(shape, dtype) for path, (shape, dtype) in shapes.items()}
    registry = ocp.type_handlers.create_type_handler_registry(
        (_Sink, _SinkHandler(lambda: fill(sinks))), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    step = epath.Path(pathlib.Path(directory).absolute() / CHECKPOINTS / "0")
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(meta=ocp.JsonCheckpointHandler())) as checkpointer:
        checkpointer.save(step, args=ocp.args.Composite(meta=ocp.args.JsonSave(meta)))
    # Note: a Checkpointer would call the handler before its folder exists; called by itself it works in this thread.
    (step / "state").mkdir()
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry)
    handler.save(step / "state", args=ocp.args.PyTreeSave({"params": traverse_util.unflatten_dict(sinks, sep="/")}))


class LazyArray:
    """A parameter on disk: shape, dtype, `array[row]` along the leading axis, and `np.asarray(array)`."""

    def __init__(self, store: Any):
        self._store, self._whole = store, None
        self.shape, self.dtype = tuple(store.shape), np.dtype(store.dtype.numpy_dtype)
        self.nbytes = math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, row: int) -> np.ndarray:
        if self._store.chunk_layout.read_chunk.shape[0] == 1:
            return np.asarray(self._store[row].read().result())
        if self._whole is None:
            self._whole = self.__array__()
        array = self._whole[row]
        if row == self.shape[0] - 1:
            self._whole = None  # Note: rows are asked for in order; afterwards the memory is free again.
        return array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = np.asarray(self._store.read().result())
        return array if dtype is None else array.astype(dtype)


def open_params(directory: str | os.PathLike) -> dict[str, LazyArray]:
    """All parameters of the newest step, trained and frozen, by their path "a/b/c", not yet read."""
    import tensorstore as ts

    root, step = find_run(directory)
    folder = root / CHECKPOINTS / str(step) / "state"
    with ocp.PyTreeCheckpointer() as checkpointer:
        saved = checkpointer.metadata(epath.Path(folder)).item_metadata.tree
    is_ocdbt, opened = (folder / "manifest.ocdbt").exists(), {}
    for part in ("params", "frozen"):
        for path in traverse_util.flatten_dict(saved.get(part) or {}, sep="/"):
            name = ".".join([part, *path.split("/")])
            files: dict[str, Any] = {"driver": "file", "path": str(folder / name)}
            if is_ocdbt:
                files = {"driver": "ocdbt", "base": f"file://{folder}/", "path": f"{name}/"}
            opened[path] = ts.open({"driver": "zarr", "kvstore": files}, open=True, read=True)
    return {path: LazyArray(store.result()) for path, store in opened.items()}


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A checkpoint opened for use: its directory, what it said of itself, model configuration, parameters and (with a
    language model) text tokenizer. `identity` changes when the checkpoint is saved anew."""

    directory: pathlib.Path
    meta: dict
    cfg: Any
    params: dict
    text: Any
    identity: str


def load_model(directory: str | os.PathLike, mesh: jax.sharding.Mesh) -> LoadedModel:
    """Opens the newest checkpoint of a run with its parameters placed on the mesh.

    Raises:
      FileNotFoundError: no complete checkpoint there.
      ValueError: the checkpoint lacks parameters of its own model.
    """
    from alto_jax import sharding
    from alto_jax.config import build
    from alto_jax.mllm.alto_llm import ModelConfig, init_params
    from alto_jax.mllm.text import TextTokenizer

    root, step = find_run(directory, made_by="python -m alto_jax.main --config=configs/quickstart.py --workdir=DIR")
    meta = load_meta(root)
    cfg = build(ModelConfig, meta["model"], f"{root}: model")
    if meta["stage"] in ("stage1", "stage1_5"):
        cfg = dataclasses.replace(cfg, vision=None, language_model=None)
    shapes = jax.eval_shape(lambda key: init_params(cfg, key), jax.random.key(0))
    abstract = jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
        shapes,
        sharding.tree_shardings(shapes, mesh),
    )
    params = load_params(root, abstract)
    require_complete(params, abstract, str(directory))
    saved = (root / CHECKPOINTS / str(step) / "_CHECKPOINT_METADATA").read_bytes()
    identity = f"{meta['stage']} step {step} {hashlib.sha256(saved).hexdigest()[:12]}"
    text = TextTokenizer.load(root) if cfg.language_model is not None else None
    return LoadedModel(root, meta, cfg, params, text, identity)
