"""Where things are in large data: the records of a file, the files of a folder. Found once, kept, and mapped.

In: a file or a folder. Out: an `Index` (what chat_lines.py finds in a JSONL file) or `FileNames` (a file takes 8 bytes
and its name): numpy arrays, mapped from a file in the cache folder, which is ALTO_CACHE, else XDG_CACHE_HOME/alto_jax,
else ~/.cache/alto_jax; the data's own folder may be read-only. A kept index counts while size, time of change, head and
tail of the file, or the times of change of the folder and of all folders in it, are what they were. Where the cache
folder cannot be written, the index is found anew at every start.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import time
from typing import Any

import numpy as np

from alto_jax.config import cache_folder, write_whole
from alto_jax.data.source import place
from alto_jax.data.split import file_hash

_log = logging.getLogger(__name__)
_FORM = 1  # of the kept files
_ENDS = 2**16  # bytes at head and tail that are compared
_unkept: dict[pathlib.Path, "Index"] = {}  # what could not be written, for the next time that this process asks
_SETTLED = 2.0  # seconds; a folder that was changed later than this may be changed again with the same time


# --- kept arrays ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Index:
    """Arrays with what else is known of them, and the file that they are mapped from (None: they are in memory)."""

    about: dict[str, Any]
    arrays: dict[str, np.ndarray]
    file: pathlib.Path | None = None

    def __reduce__(self) -> tuple:
        """Another process maps the same file instead of getting a copy."""
        return (Index, (self.about, self.arrays)) if self.file is None else (_map_again, (self.file, self.about))


def _map_again(file: pathlib.Path, about: dict[str, Any]) -> Index:
    found = _map(file)
    if found is None or found.about != about:
        raise ValueError(f"{file}: the data were indexed anew meanwhile; start the run again")
    return found


def _map(file: pathlib.Path) -> Index | None:
    """Maps a kept index; None if there is none that is whole."""
    if file in _unkept:
        return _unkept[file]
    try:
        with open(file, "rb") as opened:
            header = json.loads(opened.readline())
            start, size = opened.tell(), os.fstat(opened.fileno()).st_size
            if header["form"] != _FORM or size != start + header["bytes"]:
                return None
            arrays = {}
            for name, dtype, count in header["arrays"]:
                arrays[name] = np.zeros(0, dtype)
                if count:  # Note: nothing cannot be mapped.
                    arrays[name] = np.memmap(file, dtype, "r", start, (count,))
                start += arrays[name].nbytes
        return Index(header["about"], arrays, file)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep(file: pathlib.Path, index: Index) -> Index:
    """Writes an index and maps it; returns it as it is where it cannot be written."""
    arrays = [(name, array.dtype.str, len(array)) for name, array in index.arrays.items()]
    total = sum(array.nbytes for array in index.arrays.values())
    header = json.dumps({"form": _FORM, "bytes": total, "arrays": arrays, "about": index.about}).encode()
    header += b" " * (-(len(header) + 1) % 64) + b"\n"  # Note: numbers stay aligned.
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, header + b"".join(array.tobytes() for array in index.arrays.values()))
    except OSError as error:
        _log.info("%s: the index cannot be kept, it is found anew at every start: %s", file, error)
        _unkept[file] = index
        return index
    return _map(file) or index


def _kept_file(kind: str, path: pathlib.Path) -> pathlib.Path:
    digest = hashlib.blake2b(os.fsencode(path.resolve()), digest_size=16).hexdigest()
    return cache_folder() / f"{kind}-{digest}.index"


# --- one file ---------------------------------------------------------------------------------------


def of_file(kind: str, form: int, file: pathlib.Path, find: Callable[[], Index]) -> Index:
    """What `find` finds in a file, kept while the file is what it was; with its hash as `about["digest"]`.

    Args:
      kind: of index; form: of what is found, for changes of the code that finds it.
      file: the file; find: reads it and says what it found.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is being written; and what `find` raises.
    """
    kept, stamp = _kept_file(kind, file), {"form": form, **_stamp(file)}
    index = _map(kept)
    if index is None or index.about["stamp"] != stamp:
        found = find()
        with open(file, "rb") as opened:
            digest = hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        if stamp != {"form": form, **_stamp(file)}:
            raise ValueError(f"{file} changed while it was read; start again when it is complete")
        index = _keep(kept, Index({**found.about, "stamp": stamp, "digest": digest}, found.arrays))
    return index


def _stamp(file: pathlib.Path) -> dict[str, Any]:
    """What a file is known by without reading it all."""
    with open(file, "rb") as opened:
        status = os.fstat(opened.fileno())
        ends = opened.read(_ENDS)
        opened.seek(max(status.st_size - _ENDS, 0))
        ends += opened.read(_ENDS)
    digest = hashlib.blake2b(ends, digest_size=16).hexdigest()
    return {"size": status.st_size, "time": status.st_mtime_ns, "ends": digest}


# --- files ------------------------------------------------------------------------------------------


class FileNames(Sequence[pathlib.Path]):
    """The files PREFIX*SUFFIX of a folder and of all folders in it, in the order of `sorted(root.rglob(…))`.

    Attributes:
      root: the folder.
      digest: hash of the names below it.
    """

    def __init__(self, root: str | os.PathLike, prefix: str, suffix: str):
        """Lists the folder, or takes the kept list.

        Raises:
          OSError: a folder cannot be read.
        """
        self.root = pathlib.Path(root)
        self._kind = f"files-{prefix}-{suffix.strip('.')}"
        kept = _kept_file(self._kind, self.root)
        index = _map(kept)
        if index is None or not _same_times(self.root, index.about["times"]):
            listing = _Listing(self.root, prefix, suffix)
            index, newest = listing.index(), max(listing.times.values()) / 1e9
            index = _keep(kept, index) if newest < time.time() - _SETTLED else index
        self._index, self.digest = index, str(index.about["digest"])
        self._rows: np.ndarray | None = None

    def take(self, rows: np.ndarray) -> "FileNames":
        """The files int[N] of these, in that order."""
        found = object.__new__(FileNames)
        found.root, found._index, found._kind = self.root, self._index, self._kind
        found._rows = rows if self._rows is None else self._rows[rows]
        found.digest = hashlib.blake2b(self.digest.encode() + found._rows.tobytes(), digest_size=16).hexdigest()
        return found

    def hashes(self) -> np.ndarray:
        """Hashes of the names as those of images, uint64[N], see split.py; kept beside the list."""
        kept, digest = _kept_file(f"{self._kind}-hashes", self.root), self._index.about["digest"]
        index = _map(kept)
        if index is None or index.about["digest"] != digest:
            count = len(self._index.arrays["ends"])
            index = Index(
                {"digest": digest}, {"hashes": np.fromiter(map(file_hash, map(self._name, range(count))), np.uint64)}
            )
            index = _keep(kept, index) if self._index.file is not None else index
        found = index.arrays["hashes"]
        return found if self._rows is None else found[self._rows]

    def __len__(self) -> int:
        return len(self._index.arrays["ends"] if self._rows is None else self._rows)

    def name(self, number: int) -> str:
        """The name of file `number`, without its folder."""
        return self._name(self._row(number))

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        row = self._row(number)
        runs = self._index.arrays["runs"]
        folder = self._index.about["folders"][int(np.searchsorted(runs, row, side="right")) - 1]
        return self.root / folder / self._name(row)

    def __iter__(self) -> Iterator[pathlib.Path]:
        return (self[number] for number in range(len(self)))

    def _row(self, number: int) -> int:
        number = place(number, self, "file")
        return number if self._rows is None else int(self._rows[number])

    def _name(self, row: int) -> str:
        ends = self._index.arrays["ends"]
        start = int(ends[row - 1]) if row else 0
        return os.fsdecode(self._index.arrays["names"][start : int(ends[row])].tobytes())


def _same_times(root: pathlib.Path, times: dict[str, int]) -> bool:
    try:
        return all(os.stat(root / folder).st_mtime_ns == wanted for folder, wanted in times.items())
    except OSError:
        return False


class _Listing:
    """One walk through a folder; names are packed folder by folder."""

    def __init__(self, root: pathlib.Path, prefix: str, suffix: str):
        self.times: dict[str, int] = {}  # of every folder: when it was changed
        self._prefix, self._suffix = prefix, suffix
        self._names: list[np.ndarray] = []  # uint8, of one run each
        self._lengths: list[np.ndarray] = []  # int64, of each name
        self._folders: list[str] = []  # of each run: files that follow each other in one folder
        self._walk(root, "")

    def index(self) -> Index:
        """What was found."""
        nothing = np.zeros(0, np.int64)
        names = np.concatenate([np.zeros(0, np.uint8), *self._names])
        runs = np.cumsum([0, *map(len, self._lengths)], dtype=np.int64)[:-1]
        ends = np.cumsum(np.concatenate([nothing, *self._lengths]), dtype=np.int64)
        digest = hashlib.blake2b(json.dumps(self._folders).encode(), digest_size=16)
        for array in (runs, ends, names):
            digest.update(array.data)
        about = {"times": self.times, "folders": self._folders, "digest": digest.hexdigest()}
        return Index(about, {"ends": ends, "runs": runs, "names": names})

    def _walk(self, root: pathlib.Path, folder: str) -> None:
        self.times[folder] = os.stat(root / folder).st_mtime_ns
        parts, batch, folders = [], [], []
        with os.scandir(root / folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.name)
                elif entry.name.startswith(self._prefix) and entry.name.endswith(self._suffix):
                    batch.append(os.fsencode(entry.name))
                    if len(batch) == 2**16:  # Note: as Python's own objects 11 million names would take a gigabyte.
                        parts.append(np.array(batch))
                        batch = []
        names = np.sort(np.concatenate([np.zeros(0, "S1"), *parts, np.array(batch, "S")]))
        done = 0
        for inner in sorted(folders):
            until = int(np.searchsorted(names, np.array(os.fsencode(inner))))
            self._add(folder, names[done:until])
            self._walk(root, os.path.join(folder, inner))
            done = until
        self._add(folder, names[done:])

    def _add(self, folder: str, names: np.ndarray) -> None:
        """Appends sorted names, bytes[N] padded with zeros."""
        if len(names):
            bytes_of = np.ascontiguousarray(names).view(np.uint8).reshape(len(names), -1)
            self._folders.append(folder)
            self._lengths.append(np.count_nonzero(bytes_of, axis=1).astype(np.int64))
            self._names.append(bytes_of[bytes_of != 0])
