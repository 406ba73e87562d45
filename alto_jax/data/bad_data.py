"""Bad records: counted by kind, logged with path and line, passed over up to a limit, then one clear error."""

from collections import Counter
import logging
import re
import threading

from alto_jax.config import require

_log = logging.getLogger(__name__)

# (what is found in the message, kind); the first that matches. The readers' messages carry path and line.
_KINDS = (
    (r"cannot be read: a file of 0 bytes", "file of 0 bytes"),
    (r"cannot be read: .*([Tt]runcated|[Bb]roken)", "truncated file"),
    (r"cannot be read: ", "unreadable file"),
    (r"(^|: )image .* does not exist", "missing image"),
    (r"(^|: )(mask|label map) .* does not exist", "missing mask"),
    (r"segmentation\.size differs|its image is \d|but a mask is \d|x\d+, but .* differs", "size of mask and image"),
    (r"counts does not decode|segmentation: ", "segmentation"),
    (r"is empty|an empty mask|have empty masks", "empty mask"),
    (r"sides must be at least", "image too small"),
    (r"expected one channel or a palette, got mode", "colour mode"),
    (r"is no JSON|no readable JSON|no JSON: ", "malformed JSON"),
    (r"conversations?(\[\d+\]\.from)?: |mask placeholders|max_masks is|max_length is|prompt tokens", "conversation"),
    (r"field|expected|missing|malformed|is not in|no sentence", "malformed entry"),
)


def kind_of(error: Exception | str) -> str:
    """What kind of bad record a reader's message tells of."""
    message = str(error)
    return next((kind for pattern, kind in _KINDS if re.search(pattern, message)), "other")


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

    def add(self, index: int, error: Exception | str) -> None:
        """Counts record `index` once.

        Raises:
          ValueError: there are now more than `limit`, or nothing but bad records.
        """
        message = " ".join(str(error).split())
        with self._lock:
            if index not in self._seen:
                self._seen.add(index)
                self.kinds[kind_of(message)] += 1
                count = len(self._seen)
                _log.warning("%srecord %d left out (%d bad of %d): %s", self._name, index, count, self.total, message)
            count = len(self._seen)
        if count > self.limit or count == self.total:
            raise ValueError(
                f"{self._name}{message} ({count} bad of {self.total} records ({self.by_kind()}); at most {self.limit} "
                f"are left out, {self._option} is {self._fraction})"
            )
