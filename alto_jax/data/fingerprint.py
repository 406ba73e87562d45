"""A short hash of what the samples of a data set are: keys, questions, annotations, and names and sizes of images.

Results of an evaluation carry it, so that those of one data set are never continued with another of the same length. It
does not depend on where the data lie. No image is read, only looked up; annotations and mask files are read. (What a
training run keeps of its data, identity.py, asks for less, so that it is cheap for millions of records.)
"""

from collections.abc import Iterable
import hashlib
import os
import pathlib
from typing import Any, Protocol, runtime_checkable

_BLOCK = 2**20


@runtime_checkable
class HasFingerprint(Protocol):
    """A source that can say which data it gives."""

    def fingerprint(self) -> str:
        """16 hexadecimal digits, see the module."""


class Fingerprint:
    """Collects what a data set is; `str` gives 16 hexadecimal digits."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=8)

    def values(self, *values: Any) -> None:
        """Adds plain values."""
        self._hash.update(f"{values!r}\n".encode("utf-8", "surrogatepass"))

    def contents(self, files: Iterable[str | os.PathLike]) -> None:
        """Adds names and contents of annotation and mask files; one that is missing by its name."""
        for file in map(pathlib.Path, files):
            self.values(file.name)
            try:
                with open(file, "rb") as opened:
                    while block := opened.read(_BLOCK):
                        self._hash.update(block)
            except OSError as error:
                self.values(type(error).__name__)

    def sizes(self, files: Iterable[str | os.PathLike]) -> None:
        """Adds names and sizes in bytes of (image) files, each once; of one that is missing -1."""
        for file in dict.fromkeys(map(pathlib.Path, files)):
            try:
                self.values(file.name, file.stat().st_size)
            except OSError:
                self.values(file.name, -1)

    def __str__(self) -> str:
        return self._hash.hexdigest()


def fingerprint_of(source: Any) -> str:
    """The fingerprint of a source; of one that has none, that of its length."""
    if isinstance(source, HasFingerprint):
        return source.fingerprint()
    found = Fingerprint()
    found.values(len(source))
    return str(found)
