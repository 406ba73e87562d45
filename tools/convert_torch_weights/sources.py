"""Reads PyTorch checkpoints lazily, one tensor at a time.

A checkpoint is a Hugging Face directory (safetensors or `.bin`, sharded or not), a `.safetensors` file or a
pickle. `Source` is a mapping key → numpy array that is loaded at each access; names, shapes and dtypes are known
from the headers, without loading. Keys come out in the names of the reference, whatever was around them
(`layouts`), with PEFT adapters merged (`peft`).
"""

from collections.abc import Iterator, Mapping
import os
from pathlib import Path
import re

import ml_dtypes
import numpy as np

from . import layouts, peft, pickles
from .files import Entry, SourceError, read_json, short
from .safetensors_files import safetensors_entries

SAFETENSORS, PICKLES = (".safetensors",), pickles.SUFFIXES
CHECKPOINTS = "checkpoints"
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)$")
# What training leaves beside the weights under the same suffixes.
_BESIDE = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state.*|random_states.*|adapter_model)\.\w+$")
_BLOCK = 1 << 19  # elements that are looked at together; small enough for the cache


class Source(Mapping):
    """A state dict on disk: key → array, loaded at each access.

    Attributes:
      path: what was opened; directory: where its configuration and tokenizer files may lie.
      entries: key → Entry.
      dropped: what the files hold beside the state dict → why it is not used.
      notes: what was done to the keys, in words.
      config: the content of config.json beside the weights, {} without one; config_file: its path.
    """

    def __init__(
        self, path: Path, entries: dict[str, Entry], dropped: dict[str, str], notes: list[str], directory: Path
    ):
        self.path, self.entries, self.dropped, self.notes, self.directory = path, entries, dropped, notes, directory
        self.config_file = directory / "config.json"
        self.config = read_json(self.config_file)

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


def open_source(path: str | os.PathLike, *, entry: str | None = None, adapter: Path | None = None) -> Source:
    """Opens a checkpoint and reads its headers.

    Args:
      path: a directory or a file. A PEFT adapter whose base lies on this machine stands for both, merged.
      entry: dotted name of the state dict in a pickle; None: found by itself.
      adapter: a PEFT adapter's directory, which is merged into the weights.

    Raises:
      FileNotFoundError: no such path, or no weights there.
      SourceError: a missing, damaged or refused file; named.
    """
    path = Path(path)
    if not path.exists():
        if path.is_symlink():
            raise SourceError(f"{path}: a link to {path.readlink()}, which is not there")
        raise FileNotFoundError(f"{path}: no such checkpoint")
    if adapter is None and peft.is_adapter(path) and not _has_weights(path):
        path, adapter = peft.base_of(path), path
    raw, dropped = read_entries(path, entry)
    if empty := [key for key, value in raw.items() if 0 in value.shape]:
        raise SourceError(
            f"{raw[empty[0]].file}: {len(empty)} of {len(raw)} tensors are empty, such as {empty[0]}: what DeepSpeed"
            " ZeRO-3 saves without gathering; make a checkpoint with: python zero_to_fp32.py FOLDER OUT"
        )
    directory = path if path.is_dir() else path.parent
    if path.is_dir() and path.suffix in PICKLES and not (path / "config.json").exists():
        directory = path.parent  # Note: the folder pytorch_model.bin/ of zero_to_fp32.py; its model's files lie beside.
    named, notes = layouts.renamed(raw)
    named, parts = peft.split_unmerged(named, path, read_json(directory / "config.json"))
    if adapter is not None:
        parts = [*parts, peft.open_adapter(adapter)]
    for part in parts:
        named = peft.merged(named, part)
        notes.append(f"merged: {part.describe()}")
    return Source(path, layouts.joined(named), dropped, notes, directory)


def read_entries(path: Path, entry: str | None = None) -> tuple[dict[str, Entry], dict[str, str]]:
    """(key → Entry, what is not used → why) of all files of a checkpoint, keys as the files have them."""
    files, index = ([path], None) if path.is_file() else _find_files(path)
    entries: dict[str, Entry] = {}
    dropped: dict[str, str] = {}
    for file in files:
        if file.suffix in SAFETENSORS:
            if entry is not None:
                raise SourceError(f"{file}: --entry {entry}: safetensors have no entries")
            found = safetensors_entries(file)
        elif file.suffix in PICKLES:
            found, others = pickles.pickle_entries(file, entry)
            dropped |= others
        else:
            raise SourceError(
                f"{file}: expected {', '.join(SAFETENSORS + PICKLES)}, got {file.suffix or 'no suffix'!r}"
            )
        if index is not None:
            _check_index(index, file, set(found))
        for key, value in found.items():
            if key in entries:
                raise SourceError(f"{file}: {key} is also in {entries[key].file.name}")
            entries[key] = value
    if not entries:
        raise SourceError(f"{path}: holds no tensors")
    return entries, dropped


def _has_weights(directory: Path) -> bool:
    """Whether a directory with an adapter holds a whole model too."""
    names = ("model.safetensors", "pytorch_model.bin", *_INDEXES)
    return any((directory / name).exists() for name in names)


def _find_files(directory: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The weight files of a directory, and the key → file index of a sharded checkpoint."""
    for name in _INDEXES:
        if not (directory / name).exists():
            continue
        index = read_json(directory / name).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise SourceError(f"{directory / name}: holds no weight_map")
        for key, shard in index.items():
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise SourceError(f"{directory / name}: weight_map.{key}: expected a file's name, got {short(shard)}")
        files = [directory / shard for shard in sorted(set(index.values()))]
        if missing := [file.name for file in files if not file.exists()]:
            raise SourceError(f"{directory}: missing shard {', '.join(missing)} (named in {name})")
        return files, index
    found = [f for f in sorted(directory.iterdir()) if not _BESIDE.match(f.name) and not pickles.is_deepspeed(f.name)]
    for suffixes in (SAFETENSORS, PICKLES):
        files = [f for f in found if f.suffix in suffixes]
        if folders := [f for f in files if f.is_dir()]:
            raise SourceError(
                f"{folders[0]}: a folder named like a file, as zero_to_fp32.py writes large checkpoints; import that"
                " folder itself (config.json and the tokenizer's files may lie beside it)"
            )
        named = [f for f in files if f.stem in ("model", "pytorch_model")]
        if len(files) > 1 and len(named) != 1:
            raise SourceError(_several(directory, files))
        if files:
            return named or files, None
    raise _no_weights(directory)


def _several(directory: Path, files: list[Path]) -> str:
    """What several weight files without an index are, in words."""
    shards = [m for file in files if (m := _SHARD.match(file.stem))]
    if len(shards) < len(files) or len({(m.group(1), m.group(3)) for m in shards}) > 1:
        return f"{directory}: several weight files without an index: {[f.name for f in files]}; name one"
    name, total, have = shards[0].group(1), int(shards[0].group(3)), {int(m.group(2)) for m in shards}
    lacking = sorted(set(range(1, total + 1)) - have) if total < 10**4 else []
    also = f" (and of the {total} shards, {', '.join(map(str, lacking[:8]))} are missing too)" if lacking else ""
    index = f"{name}{files[0].suffix}.index.json"
    return f"{directory}: shards without an index: {index} is missing{also}; download it into the same folder"


def _no_weights(directory: Path) -> Exception:
    """Why a directory holds no weights, with what to do."""
    inside = sorted(directory.iterdir())
    names = [file.name for file in inside]
    if (directory / CHECKPOINTS).is_dir() or directory.name == CHECKPOINTS:
        return SourceError(f"{directory}: a checkpoint of alto_jax already, with nothing to import; use it as it is")
    deep = [f for f in inside if f.is_dir() and any(pickles.is_deepspeed(part.name) for part in f.glob("*.pt"))]
    if deep or any(pickles.is_deepspeed(name) for name in names) or "zero_to_fp32.py" in names:
        return SourceError(f"{directory}: {pickles.DEEPSPEED_HELP}")
    if peft.is_adapter(directory):
        return SourceError(f"{directory}: a PEFT adapter, not a model; import its base with --adapter {directory}")
    if any(name.endswith(".distcp") for name in names):
        return SourceError(
            f"{directory}: PyTorch's distributed form; make one file of it: python -m"
            " torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER OUT.pth"
        )
    if other := [name for name in names if name.endswith((".gguf", ".h5", ".msgpack", ".onnx", ".npz"))]:
        return SourceError(f"{directory}: {other[0]} is of a form that is not read; import the PyTorch weights")
    suffixes = SAFETENSORS + PICKLES
    deeper = next((f.parent for f in sorted(directory.glob("*/*")) + sorted(directory.glob("*/*/*"))
                   if f.suffix in suffixes and not _BESIDE.match(f.name)), None)  # fmt: skip
    hint = f"; there are some in {deeper}" if deeper else ""
    return FileNotFoundError(f"{directory}: holds no weights ({', '.join(suffixes)}){hint}")


def _check_index(index: Mapping[str, str], file: Path, found: set[str]) -> None:
    expected = {key for key, shard in index.items() if shard == file.name}
    if missing := sorted(expected - found):
        raise SourceError(f"{file}: lacks {missing[0]} (and {len(missing) - 1} more) that the index places there")
    if extra := sorted(found - expected):
        raise SourceError(f"{file}: holds {extra[0]} (and {len(extra) - 1} more) that the index does not place there")


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
