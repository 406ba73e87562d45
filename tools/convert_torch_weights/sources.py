"""Reads PyTorch checkpoints lazily, one tensor at a time.

A checkpoint is a Hugging Face directory (safetensors or `.bin`, sharded or not), a `.safetensors` file or a
pickle (`.pth`, `.pt`, `.bin`). `Source` is a mapping key → numpy array that is loaded at each access; names,
shapes and dtypes are known from the headers, without loading. Pickles are read with `weights_only=True`
alone, and only they need torch.
"""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import json
import math
import os
from pathlib import Path
import pickle
import re
from typing import Any

import ml_dtypes
import numpy as np

SAFETENSORS, PICKLES = (".safetensors",), (".pth", ".pt", ".bin")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "BOOL": np.bool_,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8,
}  # fmt: skip
DTYPE_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_BLOCK = 1 << 19  # elements that are looked at together; small enough for the cache


class SourceError(ValueError):
    """A checkpoint that cannot be read; the message names the file."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a source: its shape and dtype, where it lies, and how to load it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    file: Path
    load: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Source(Mapping):
    """A state dict on disk: key → array, loaded at each access.

    Attributes:
      path: what was opened; directory: where its configuration and tokenizer files may lie.
      entries: key → Entry.
      dropped: what the files hold beside the state dict → why it is not used.
      config: the content of config.json beside the weights, {} without one.
    """

    def __init__(self, path: Path, entries: dict[str, Entry], dropped: dict[str, str]):
        self.path, self.entries, self.dropped = path, entries, dropped
        self.directory = path if path.is_dir() else path.parent
        self.config = _read_json(self.directory / "config.json")

    def __getitem__(self, key: str) -> np.ndarray:
        return self.entries[key].load()

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: entry.shape for key, entry in self.entries.items()}

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())


def open_source(path: str | os.PathLike) -> Source:
    """Opens a checkpoint and reads its headers.

    Keys lose `module.` segments (data-parallel training), and a top-level `model` entry of a pickle is
    unwrapped, as the reference does.

    Raises:
      FileNotFoundError: no such path, or no weights there.
      SourceError: a missing, damaged or refused file; named.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    files, index = ([path], None) if path.is_file() else _find_files(path)
    entries: dict[str, Entry] = {}
    dropped: dict[str, str] = {}
    for file in files:
        if file.suffix in SAFETENSORS:
            found = _safetensors_entries(file)
        elif file.suffix in PICKLES:
            found, others = _pickle_entries(file)
            dropped |= others
        else:
            raise SourceError(
                f"{file}: expected {', '.join(SAFETENSORS + PICKLES)}, got {file.suffix or 'no suffix'!r}"
            )
        if index is not None:
            _check_index(index, file, set(found))
        for key, entry in found.items():
            key = re.sub(r"(^|\.)module\.", r"\1", key)
            if key in entries:
                raise SourceError(f"{file}: {key} is also in {entries[key].file.name}")
            entries[key] = entry
    if not entries:
        raise SourceError(f"{path}: holds no tensors")
    return Source(path, entries, dropped)


def _find_files(directory: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The weight files of a directory, and the key → file index of a sharded checkpoint."""
    for name in _INDEXES:
        if not (directory / name).exists():
            continue
        index = _read_json(directory / name).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise SourceError(f"{directory / name}: holds no weight_map")
        files = [directory / shard for shard in sorted(set(index.values()))]
        if missing := [file.name for file in files if not file.is_file()]:
            raise SourceError(f"{directory}: missing shard {', '.join(missing)} (named in {name})")
        return files, index
    for suffixes in (SAFETENSORS, PICKLES):
        files = [f for f in sorted(directory.iterdir()) if f.suffix in suffixes and f.name != "training_args.bin"]
        if len(files) > 1:
            named = [f for f in files if f.stem in ("model", "pytorch_model")]
            if len(named) != 1:
                raise SourceError(
                    f"{directory}: several weight files without an index: {[f.name for f in files]}; name one"
                )
            files = named
        if files:
            return files, None
    raise FileNotFoundError(f"{directory}: holds no weights ({', '.join(SAFETENSORS + PICKLES)})")


def _check_index(index: Mapping[str, str], file: Path, found: set[str]) -> None:
    expected = {key for key, shard in index.items() if shard == file.name}
    if missing := sorted(expected - found):
        raise SourceError(f"{file}: lacks {missing[0]} (and {len(missing) - 1} more) that the index places there")
    if extra := sorted(found - expected):
        raise SourceError(f"{file}: holds {extra[0]} (and {len(extra) - 1} more) that the index does not place there")


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise SourceError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise SourceError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content


def _safetensors_entries(file: Path) -> dict[str, Entry]:
    """Reads the header. Note: the format is read here, not memory-mapped by the library, so that no more than
    the tensor in use stays in memory."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if start.startswith(b"version "):
            raise SourceError(f"{file}: a Git LFS pointer, not the weights; fetch them with: git lfs pull")
        if len(start) < 8 or length > size - 8:
            raise SourceError(f"{file}: cut short, or not a safetensors file ({size} bytes)")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise SourceError(f"{file}: the safetensors header is damaged: {error}") from error
    entries, end = {}, 0
    for key, value in header.items():
        if key == "__metadata__":
            continue
        name, shape, (first, last) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        if name not in _DTYPES:
            raise SourceError(f"{file}: {key} has dtype {name}, which is not known here")
        dtype = np.dtype(_DTYPES[name])
        if last - first != math.prod(shape) * dtype.itemsize:
            raise SourceError(f"{file}: {key} takes {last - first} bytes, its shape {shape} of {name} needs others")
        entries[key] = Entry(shape, dtype, file, _reader(file, 8 + length + first, shape, dtype))
        end = max(end, last)
    if 8 + length + end != size:
        word = "cut short" if size < 8 + length + end else "too long"
        raise SourceError(f"{file}: {word}: its header describes {8 + length + end} bytes, it has {size}")
    return entries


def _reader(file: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> Callable[[], np.ndarray]:
    def load() -> np.ndarray:
        array = np.empty(shape, dtype)
        with file.open("rb", buffering=0) as stream:
            stream.seek(offset)
            view, done = memoryview(array.reshape(-1).view(np.uint8)), 0
            while done < array.nbytes:
                count = stream.readinto(view[done:])
                if not count:
                    raise SourceError(f"{file}: cut short while it was read")
                done += count
        return array

    return load


def _pickle_entries(file: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{file}: a PyTorch pickle; reading it needs torch: pip install 'alto_jax[convert]' (safetensors need none)"
        ) from error
    try:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = re.search(r"Unsupported (?:global|operand)[^\n]*|GLOBAL [^\n]*", str(error))
        raise SourceError(
            f"{file}: refused: it is not made of tensors alone and would run code when loaded"
            f" ({reason.group(0).strip() if reason else str(error).splitlines()[0]})"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise SourceError(f"{file}: cut short, or not a PyTorch file: {str(error).splitlines()[0]}") from error
    if not isinstance(state, Mapping):
        raise SourceError(f"{file}: expected a state dict, got {type(state).__name__}")
    dropped = {}
    if isinstance(state.get("model"), Mapping):
        dropped = {key: "beside the state dict in `model`" for key in state if key != "model"}
        state = state["model"]
    entries = {}
    for key, value in state.items():
        if not isinstance(value, torch.Tensor):
            dropped[str(key)] = f"not a tensor but {type(value).__name__}"
            continue
        entries[str(key)] = Entry(tuple(value.shape), _torch_dtype(value, file, key), file, lambda t=value: to_numpy(t))
    return entries, dropped


def _torch_dtype(tensor: Any, file: Path, key: str) -> np.dtype:
    name = str(tensor.dtype).removeprefix("torch.")
    try:
        return np.dtype(getattr(ml_dtypes, name, None) or name)
    except TypeError as error:
        raise SourceError(f"{file}: {key} has dtype {name}, which is not known here") from error


def to_numpy(tensor: Any) -> np.ndarray:
    """A torch tensor as a numpy array, bfloat16 included."""
    import torch

    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def is_float(dtype: np.dtype) -> bool:
    """Whether a dtype is a floating-point one, bfloat16 included."""
    return dtype.kind == "f" or dtype in (np.dtype(ml_dtypes.bfloat16),) or "float8" in dtype.name


def has_nonfinite(array: np.ndarray) -> bool:
    """Whether a floating-point array holds NaN or infinity; looks at the exponent's bits, block by block."""
    masks = {np.dtype(ml_dtypes.bfloat16): (np.uint16, 0x7F80), np.dtype(np.float16): (np.uint16, 0x7C00),
             np.dtype(np.float32): (np.uint32, 0x7F800000)}  # fmt: skip
    if array.dtype not in masks:
        return is_float(array.dtype) and not bool(np.isfinite(array.astype(np.float64)).all())
    kind, bits = masks[array.dtype]
    flat = np.ascontiguousarray(array).reshape(-1).view(kind)
    masked = np.empty(min(flat.size, _BLOCK), kind)
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK]
        if np.bitwise_and(block, kind(bits), out=masked[: block.size]).max() == bits:
            return True
    return False
