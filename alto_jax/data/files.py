"""JSON files and pickles of annotations, read without trusting them; and where files are looked for."""

from collections.abc import Sequence
import os
import pathlib
import pickle
from typing import Any

from alto_jax.data import bad_data


class _PlainUnpickler(pickle._Unpickler):
    """Reads pickles of plain values; anything that names a class or function is refused.

    Note: the one written in Python. The one in C makes room for as many objects as a damaged file claims, up to all
    memory; a file of 50,000 referents takes 7 instead of 2 seconds.
    """

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it wants to load {module}.{name}, which a list of plain values does not need")


def load_pickle(path: str | os.PathLike) -> Any:
    """Reads a pickle of lists, dicts, texts and numbers, without ever running code of it.

    Python 2's texts are bytes of unknown encoding: each is read as UTF-8, or as Latin-1 where it is none.

    Raises:
      ValueError: missing, no pickle, or one that holds anything else.
    """
    try:
        with open(path, "rb") as file:
            try:
                return _PlainUnpickler(file, encoding="utf-8").load()
            except UnicodeDecodeError:
                file.seek(0)
                return _latin1_texts(_PlainUnpickler(file, encoding="utf-8", errors="surrogateescape").load())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except Exception as error:  # Note: a broken pickle raises nearly anything.
        raise ValueError(f"{path}: refused as a pickle: {bad_data.one_line(error)}") from error


def _latin1_texts(value: Any) -> Any:
    """Texts that hold bytes which are no UTF-8 (surrogates), decoded as Latin-1; the rest as it is."""
    if isinstance(value, dict):
        return {_latin1_texts(k): _latin1_texts(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_latin1_texts(v) for v in value)
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            return value.encode("utf-8", "surrogateescape").decode("latin-1")
    return value


def load_json(path: str | os.PathLike, kind: type = list) -> Any:
    """Reads a JSON file; ValueError names the file if it is missing, broken or of another kind."""
    try:
        content = bad_data.parse_json(pathlib.Path(path).read_bytes(), path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    if not isinstance(content, kind):
        raise ValueError(f"{path}: expected a JSON {kind.__name__}, got {type(content).__name__}")
    return content


def find(root: pathlib.Path, candidates: Sequence[str], what: str) -> pathlib.Path:
    """The first of `candidates` that exists below `root`; ValueError names them all."""
    for name in candidates:
        if (root / name).exists():
            return root / name
    raise ValueError(f"{what}: expected one of {', '.join(candidates)} in {root}; none is there")
