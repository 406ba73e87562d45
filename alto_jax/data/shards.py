"""Random access to the records of array_record shards with few files open, from any thread or forked process.

In: shard files with their numbers of records. Out: the records' bytes. The readers that were used last stay open, a
quarter of the process's limit of open files at most; opening one takes a fraction of a millisecond.
"""

import bisect
from collections import OrderedDict
from collections.abc import Sequence
import itertools
import os
import pathlib
import resource
import threading
from typing import Any

_MOST_OPEN = 128


class _Open:
    """The open readers of one process."""

    def __init__(self) -> None:
        self.process, self.lock = os.getpid(), threading.Lock()
        self.readers: OrderedDict[int, Any] = OrderedDict()  # the one used last comes last


_inherited: list[_Open] = []  # Of the process that this one was forked from: their threads are not here to close them.


class Shards:
    """Random access to records, bytes each.

    Attributes:
      limit: most readers open at a time; each thread that reads may hold one more for a moment.
    """

    def __init__(self, files: Sequence[str | os.PathLike], counts: Sequence[int], *, limit: int | None = None):
        """Opens nothing yet.

        Args:
          files: the shards, in order; counts: records of each.
          limit: see the attribute; None: by the limit of open files (`ulimit -n`), at most 128.
        """
        self._files = [pathlib.Path(file) for file in files]
        self._ends = list(itertools.accumulate(counts))
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = _MOST_OPEN if soft == resource.RLIM_INFINITY else min(_MOST_OPEN, soft // 4)
        self.limit = max(most if limit is None else limit, 1)
        self._open = _Open()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        number = bisect.bisect_right(self._ends, index)
        row = index - (self._ends[number - 1] if number else 0)
        try:
            return self._reader(number).read([row])[0]
        except (RuntimeError, IndexError) as error:
            text = " ".join(str(error).split())
            raise ValueError(f"{self._files[number]}: record {row} of the shard cannot be read: {text}") from error

    def _reader(self, number: int) -> Any:
        from array_record.python import array_record_module  # late: only prepared sets need it, and it is slow to start

        if self._open.process != os.getpid():
            _inherited.append(self._open)
            self._open = _Open()
        opened = self._open
        with opened.lock:
            if number in opened.readers:
                opened.readers.move_to_end(number)
                return opened.readers[number]
        # Note: without the lock, so that a slow file system keeps nobody waiting. Two threads may open the same shard.
        reader = array_record_module.ArrayRecordReader(
            str(self._files[number]), options="readahead_buffer_size:0", file_reader_buffer_size=32768
        )
        with opened.lock:
            reader = opened.readers.setdefault(number, reader)
            opened.readers.move_to_end(number)
            # A reader closes its file when the last thread that uses it lets go of it.
            closed = [opened.readers.popitem(last=False) for _ in range(len(opened.readers) - self.limit)]
        del closed
        return reader

    def __reduce__(self) -> tuple:
        """Another process opens the files for itself."""
        counts = [end - start for start, end in zip([0, *self._ends], self._ends)]
        return Shards, (self._files, counts)
