"""Bad records: what a reader raises, counted by kind, logged with path and line, passed over up to a limit."""

from collections import Counter
import json
import logging
import threading
from typing import Any, Literal, get_args

from alto_jax.config import require

Kind = Literal[
    "file of 0 bytes",
    "truncated file",
    "unreadable file",
    "missing image",
    "missing mask",
    "size of mask and image",
    "segmentation",
    "empty mask",
    "ambiguous mask",
    "image too small",
    "image too large",
    "colour mode",
    "malformed JSON",
    "conversation",
    "malformed entry",
    "other",
]
KINDS: tuple[str, ...] = get_args(Kind)
_log = logging.getLogger(__name__)


class RecordError(ValueError):
    """A record that can't be used; the message names file, entry and value.

    Attributes:
      kind: one of KINDS, what is wrong with it.
    """

    def __init__(self, message: str, kind: Kind = "malformed entry"):
        super().__init__(message)
        self.kind: Kind = kind

    def __reduce__(self) -> tuple[type, tuple[str, Kind]]:
        return type(self), (str(self), self.kind)  # Note: readers may run in other processes.


def at(where: object, error: Exception) -> RecordError:
    """`error` with the place in front ("FILE line 3: …"), of the same kind."""
    return RecordError(f"{where}: {error}", kind_of(error))


def kind_of(error: BaseException) -> Kind:
    """What kind of bad record an exception tells of: that of the RecordError that it is or was raised from."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, RecordError):
            return found.kind
        found = found.__cause__
    return "malformed entry" if isinstance(error, ValueError) else "unreadable file"


def one_line(error: object) -> str:
    """A message without line breaks and characters that a terminal can't show, such as those of a damaged path."""
    text = " ".join(str(error).split())
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def parse_json(content: str | bytes, where: object) -> Any:
    """The value of a JSON text.

    Args:
      content: the text.
      where: file, and line if it is one of several, for the message.

    Raises:
      RecordError: no JSON, or one that nests too deeply.
    """
    try:
        return json.loads(content)
    except (ValueError, RecursionError, MemoryError) as error:
        raise RecordError(f"{where} is no JSON: {one_line(error)}", "malformed JSON") from error


class BadRecords:
    """Counts different bad records of a data set of `total`.

    Attributes:
      limit: how many are passed over: `max_fraction` of the total, rounded down, or `at_least` if that is more.
      kinds: number of bad records of each kind.
    """

    def __init__(
        self,
        total: int,
        max_fraction: float = 0.0,
        at_least: int = 0,
        *,
        name: str = "",
        option: str = "data.max_bad_fraction",
    ):
        """`name` of the data set and the `option` that sets `max_fraction` are for messages."""
        require(0 <= max_fraction <= 1, option, max_fraction, "0..1")
        self.total, self._fraction = total, max_fraction
        self._name, self._option = f"{name}: " if name else "", option
        self.limit = max(int(max_fraction * total), at_least)
        self.kinds: Counter[str] = Counter()
        self._seen: set[int] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._seen)

    def by_kind(self) -> str:
        """Such as "2 empty mask, 1 missing image"."""
        return ", ".join(f"{n} {kind}" for kind, n in sorted(self.kinds.items()))

    def add(self, index: int, error: Exception | str, kind: str = "") -> None:
        """Counts record `index` once.

        Args:
          index: of the record.
          error: what its reading raised, or the stored message.
          kind: one of KINDS, for a stored message; "" takes it from the exception.

        Raises:
          ValueError: there are now more than `limit`, or nothing but bad records.
        """
        message = one_line(error)
        with self._lock:
            if index not in self._seen:
                self._seen.add(index)
                kind = kind or (kind_of(error) if isinstance(error, BaseException) else "other")
                self.kinds[kind] += 1
                place = f"{self._name}record {index} left out ({len(self._seen)} bad of {self.total}, {kind})"
                _log.warning("%s: %s", place, message)
            count = len(self._seen)
        if count > self.limit or count == self.total:
            raise ValueError(
                f"{self._name}{message} ({count} bad of {self.total} records ({self.by_kind()}); at most {self.limit} "
                f"are left out, {self._option} is {self._fraction})"
            )
