"""Reads the header of a safetensors file; its tensors are loaded one at a time.

Note: the format is read here, not memory-mapped by the library, so that no more than the tensor in use stays in memory.
"""

from collections.abc import Callable
import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from .files import Entry, SourceError, check_weights, short

_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "BOOL": np.bool_,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8,
}  # fmt: skip
DTYPE_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}


def safetensors_entries(file: Path) -> dict[str, Entry]:
    """Key → Entry of a file.

    Raises:
      SourceError: cut short, too long, or with a header that is damaged.
    """
    check_weights(file, is_safetensors=True)
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            raise SourceError(f"{file}: cut short, or not a safetensors file ({size} bytes)")
        try:
            header = json.loads(stream.read(length))
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{file}: the safetensors header is damaged: {error}") from error
    if not isinstance(header, dict):
        raise SourceError(f"{file}: the safetensors header is damaged: expected an object, got {short(header)}")
    entries, end = {}, 0
    for key, value in header.items():
        if key == "__metadata__":
            continue
        name, shape, (first, last) = _header_fields(file, key, value)
        if name not in _DTYPES:
            raise SourceError(f"{file}: {key} has dtype {short(name)}, which is not known here")
        dtype = np.dtype(_DTYPES[name])
        if last - first != math.prod(shape) * dtype.itemsize:
            raise SourceError(f"{file}: {key} takes {last - first} bytes, its shape {shape} of {name} needs others")
        entries[key] = Entry(shape, dtype, file, _reader(file, 8 + length + first, shape, dtype))
        end = max(end, last)
    if 8 + length + end != size:
        word = "cut short" if size < 8 + length + end else "too long"
        raise SourceError(f"{file}: {word}: its header describes {8 + length + end} bytes, it has {size}")
    return entries


def _header_fields(file: Path, key: str, value: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """(dtype, shape, (first byte, end)) of a tensor's description."""

    def counts(numbers: Any) -> bool:
        return isinstance(numbers, list) and all(type(n) is int and 0 <= n < 2**63 for n in numbers)

    fields = value if isinstance(value, dict) else {}
    name, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not (isinstance(name, str) and counts(shape) and counts(offsets) and len(offsets) == 2):
        raise SourceError(
            f"{file}: the safetensors header is damaged: {key} is described by {short(value)}, expected dtype, shape"
            " and data_offsets"
        )
    return name, tuple(shape), (offsets[0], offsets[1])


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
