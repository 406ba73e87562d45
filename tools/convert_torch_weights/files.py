"""Files as users have them: what one is that is not what its name says, JSON of any content, and one tensor.

Whatever cannot be read becomes a `SourceError`: one line with the file, what it is and what to do.
"""

from collections.abc import Callable
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

_HTML = (b"<!doctype", b"<html", b"<head", b"<?xml")


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


def short(value: Any, limit: int = 60) -> str:
    """`repr` of a value, cut where it would fill a message."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def check_content(file: Path) -> bytes:
    """Returns the first bytes of a file.

    Raises:
      SourceError: a folder, an empty file, a Git LFS pointer or an HTML page, which stand where something else should;
        or a file whose download has not ended.
    """
    if file.is_dir():
        raise SourceError(f"{file}: a folder, expected a file")
    # Note: aria2 gives a file its whole size first, and zeros where nothing has arrived yet.
    if (control := file.with_name(f"{file.name}.aria2")).exists():
        raise SourceError(f"{file}: its download by aria2 has not ended ({control.name} lies beside it); let it go on")
    with file.open("rb") as stream:
        head = stream.read(512)
    if not head:
        raise SourceError(f"{file}: empty (0 bytes); copy or download it again")
    if head.startswith(b"version ") and (b"git-lfs" in head or b"oid " in head):
        raise SourceError(f"{file}: a Git LFS pointer, not the file itself; fetch it with: git lfs pull")
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_HTML):
        raise SourceError(
            f"{file}: an HTML page, saved in place of the file (of a login or an error?); download it again"
        )
    return head


def check_weights(file: Path, is_safetensors: bool) -> None:
    """Raises SourceError if a file of weights is something else, in words."""
    head = check_content(file)
    kind = ".safetensors" if is_safetensors else "a PyTorch pickle"
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"\x28\xb5\x2f\xfd")):
        raise SourceError(f"{file}: a compressed archive, expected {kind}; unpack it first")
    if head.startswith(b"GGUF"):
        raise SourceError(f"{file}: a GGUF file, whose weights are quantised; import the original checkpoint")
    if is_safetensors and head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")):
        raise SourceError(f"{file}: a PyTorch pickle under another name; rename it to {file.stem}.pth")
    if not is_safetensors and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < file.stat().st_size:
        raise SourceError(f"{file}: a safetensors file under another name; rename it to {file.stem}.safetensors")
    if all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in head):
        raise SourceError(f"{file}: text that begins with {short(head[:40].decode())}, expected {kind}")


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object of a file; {} where there is no such file.

    Raises:
      SourceError: a file that is something else, or not readable as a JSON object.
    """
    if not file.exists():
        if file.is_symlink():
            raise SourceError(f"{file}: a link to {file.readlink()}, which is not there")
        return {}
    check_content(file)
    try:
        content = json.loads(file.read_bytes())
    except RecursionError:
        raise SourceError(f"{file}: not readable as JSON: nested too deeply") from None
    except ValueError as error:
        raise SourceError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise SourceError(f"{file}: expected a JSON object, got {type(content).__name__} {short(content)}")
    return content
