"""Parameters written and read row by row (conversion): no more than one layer of one parameter is ever in memory.

In and out: step 0 of a run's directory, in the layout of `alto_jax.checkpoint.runs`.
"""

from collections.abc import Callable, Mapping
import math
import os
import pathlib
import shutil
from typing import Any

from etils import epath
from flax import traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp

from alto_jax.checkpoint import arrays
from alto_jax.checkpoint.runs import CHECKPOINTS, Found, find_run, newest_readable, read_meta, sealed
from alto_jax.config import local_path
from alto_jax.params import refuse_quantized

_MAX_CHUNK_BYTES = 1 << 26
_MAX_PENDING_BYTES = 1 << 28


class _Sink:
    """A parameter that is written by assignment: `sink[row] = value`, `sink[...] = value`."""

    def __init__(self, shape: tuple[int, ...], dtype: Any):
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)

    def open(self, directory: str, pending: list) -> None:
        """Makes the array on disk; `pending` collects the writes under way, of all sinks."""
        import tensorstore as ts  # late: keeps the start fast

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
    """Saves parameters alone as step 0 of a run's directory, without ever holding them all.

    The step has its name when it is complete; an interrupted one is no checkpoint, and the next call replaces it.

    Args:
      directory: the run's directory; gets `checkpoints/0`.
      shapes: "a/b/c" → (shape, dtype) of every parameter.
      fill: called once with {path: sink}; assigns every element, as `sink[...] = array` or row by row of the
        leading axis. An assigned array must not change afterwards.
      meta: as `Checkpointer.save` has it.

    Raises:
      ConfigError: parameters of 8 bits.
      FileExistsError: there is a step 0 already.
    """
    refuse_quantized(shapes, str(directory))
    sinks = {path: _Sink(shape, dtype) for path, (shape, dtype) in shapes.items()}
    registry = ocp.type_handlers.create_type_handler_registry(
        (_Sink, _SinkHandler(lambda: fill(sinks))), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    step = local_path(directory, "the directory to write").absolute() / CHECKPOINTS / "0"
    if step.exists():
        raise FileExistsError(f"{step}: there is a checkpoint already")
    # Note: as Orbax names what is not complete, so that a run in this directory clears it away.
    partial = step.with_name("0.orbax-checkpoint-tmp-params")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(meta=ocp.JsonCheckpointHandler())) as checkpointer:
            checkpointer.save(epath.Path(partial), args=ocp.args.Composite(meta=ocp.args.JsonSave(sealed(meta))))
        # Note: a Checkpointer would call the handler before its folder exists; called by itself it works in this
        # thread.
        state = epath.Path(partial / "state")
        state.mkdir()
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry)
        handler.save(state, args=ocp.args.PyTreeSave({"params": traverse_util.unflatten_dict(sinks, sep="/")}))
        partial.rename(step)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


class LazyArray:
    """A parameter on disk: shape, dtype, `array[row]` along the leading axis, and `np.asarray(array)`."""

    def __init__(self, store: Any):
        self._store = store
        self._whole: np.ndarray | None = None
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


def open_params(directory: str | os.PathLike, step: int | None = None) -> dict[str, LazyArray]:
    """All parameters, trained and frozen, by their path "a/b/c", not yet read.

    Args:
      directory: of the run. step: which one; None: the newest that can be opened.

    Raises:
      ConfigError: there is no such step. ValueError: none can be opened.
    """
    root, _ = find_run(directory, step=step)
    _, step = newest_readable(root, lambda folder: Found(plain=sorted(_open(folder))), step)
    return _open(root / CHECKPOINTS / str(step))


def _open(folder: pathlib.Path) -> dict[str, LazyArray]:
    """`open_params` of one step's folder."""
    import tensorstore as ts  # late: keeps the start fast

    meta, opened = read_meta(folder), {}
    saved, places = arrays.structure(folder, meta), arrays.places(folder, meta)
    for part in ("params", "frozen"):
        folder = places.get(part, places[""])
        is_ocdbt = (folder / "manifest.ocdbt").exists()
        for path in traverse_util.flatten_dict(saved.get(part) or {}, sep="/"):
            name = ".".join([part, *path.split("/")])
            files: dict[str, Any] = {"driver": "file", "path": str(folder / name)}
            if is_ocdbt:
                files = {"driver": "ocdbt", "base": f"file://{folder}/", "path": f"{name}/"}
            opened[path] = ts.open({"driver": "zarr", "kvstore": files}, open=True, read=True)
    return {path: LazyArray(store.result()) for path, store in opened.items()}
