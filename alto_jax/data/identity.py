"""Which data set a position belongs to: the number of records and a hash of each of its parts, kept in checkpoints.

A position in the data is a number; on another data set it would mean other records without a word. A source says what
it is with `identity()`: {part: {"records", "hash"}}, cheap (keys, indexes and manifests, no images), and the same
wherever the data lie. The states of `stream.Stream` hold it.
"""

from collections.abc import Mapping
import hashlib
from typing import Any

Identity = dict[str, dict[str, Any]]


def digest(*values: Any) -> str:
    """A short hash of plain values, 16 hexadecimal digits."""
    found = hashlib.blake2b(digest_size=8)
    for value in values:
        found.update(f"{value!r}\n".encode("utf-8", "surrogatepass"))
    return found.hexdigest()


def of(source: Any) -> Identity:
    """The identity of a source; of one that does not say it (such as a list), its length alone."""
    return source.identity() if hasattr(source, "identity") else {"": {"records": len(source), "hash": ""}}


def difference(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two identities, such as "x: 6 records (1f0c…) then, 3 records (9a41…) now"; "": nothing."""

    def told(part: Mapping[str, Any] | None) -> str:
        return "none" if part is None else f"{part['records']} records ({str(part['hash'])[:8] or 'no hash'})"

    parts = [name for name in {**saved, **now} if saved.get(name) != now.get(name)]
    named = lambda name: f"{name}: " if name else ""
    return "; ".join(f"{named(name)}{told(saved.get(name))} then, {told(now.get(name))} now" for name in parts[:4]) + (
        f"; and {len(parts) - 4} more" if len(parts) > 4 else ""
    )
