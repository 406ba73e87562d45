"""Bad records: counted by kind, logged with path and line, passed over up to a limit, then one clear error."""

from collections import Counter
import logging
import re
import threading

from alto_jax.config import require

_log = logging.getLogger(__name__)

# (what is found in the message, kind); the first that matches. The readers' messages carry path and line.
_KINDS = (
    (r"a file of 0 bytes", "file of 0 bytes"),
    (r"(image|mask|label map) .* does not exist", "missing file"),
    (r"counts does not decode|size differs from the image|annotations\[\d+\]\.segmentation", "segmentation"),
    (r"truncated|cut short", "truncated file"),
    (r"is no JSON|no readable JSON|no JSON", "malformed JSON"),
    (r"empty", "empty mask"),
    (r"sides must be at least", "image too small"),
    (r"its image is|but a mask is|but the image differs|differs$", "size of mask and image"),
    (r"placeholder|max_masks|max_length|conversation", "conversation"),
    (r"cannot be read|cannot identify", "unreadable file"),
    (r"field|expected|missing|malformed|is not in", "malformed entry"),
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

    def __init__(self, total: int, max_fraction: float = 0.0, at_least: int = 0):
        require(0 <= max_fraction <= 1, "max_bad_fraction", max_fraction, "0..1")
        self.total, self._fraction = total, max_fraction
        self.limit = max(int(max_fraction * total), at_least)
        self.kinds: Counter[str] = Counter()
        self._seen: set[int] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._seen)

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
                _log.warning("record %d left out (%d bad of %d): %s", index, len(self._seen), self.total, message)
            count = len(self._seen)
        if count > self.limit or count == self.total:
            kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(self.kinds.items()))
            raise ValueError(
                f"{message} ({count} bad of {self.total} records ({kinds}); at most {self.limit} are left out, "
                f"data.max_bad_fraction is {self._fraction})"
            )
