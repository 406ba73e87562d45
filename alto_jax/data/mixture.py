"""Several sources as one, by weight: record i comes from the same source and row every time.

A weight is the share of the stream. An epoch of the mixture ends when the source that is read slowest has been read
once, so that no record is lost; the others are read again (each time from the start, and drawn anew where their records
are drawn). Which source record i comes from, and which of its rows, is computed of i: nothing is stored for a record.

A source with a of n records gets record i if floor((i a + c) / n) grows from i to i + 1, and that quotient is the row:
its records are spread evenly over each stretch. The records that are left go to the other sources in the same way. The
seed draws the c.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from alto_jax.config import require
from alto_jax.data import caches, identity
from alto_jax.data.source import HasConversations, HasImages, HasTexts, Records, place, read

_LONGEST = 2**32 - 1  # of an epoch that Grain can shuffle


class Mixture:
    """Random access to the records of named sources.

    Attributes:
      counts: records of each source in one epoch.
      caches: what all sources have cached (data/caches.py).
      conversation: reads a record without its images; there if every source has it.
    """

    def __init__(self, sources: Mapping[str, tuple[Records, float]], *, seed: int = 0):
        """ValueError: no source, an empty one, a weight that is not above 0 or too small, or different caches.

        Args:
          sources: name → (source, weight).
          seed: of the order.
        """
        require(bool(sources), "mixture", dict(sources), "at least one source")
        for name, (source, weight) in sources.items():
            require(0 < weight < float("inf"), f"mixture.{name}.weight", weight, "a number above 0")
            require(len(source) > 0, f"mixture.{name}", len(source), "at least one record")
        self._sources = [source for source, _ in sources.values()]
        self._names, self._seed = list(sources), seed
        sizes, weights = [len(source) for source in self._sources], [weight for _, weight in sources.values()]
        # Epochs are as long as the slowest source needs.
        pace = max(size / weight for size, weight in zip(sizes, weights))
        if pace * sum(weights) > _LONGEST:
            slow = max(sources, key=lambda name: len(sources[name][0]) / sources[name][1])
            raise ValueError(
                f"mixture.{slow}.weight: with {sources[slow][1]!r} of {sum(weights)!r} an epoch, which reads all of its"
                f" {len(sources[slow][0])} records, has {pace * sum(weights):.3g} in all; at most {_LONGEST} can be"
                " shuffled"
            )
        self._counts = [max(size, round(weight * pace)) for size, weight in zip(sizes, weights)]
        self.counts = dict(zip(self._names, self._counts))
        rng = np.random.default_rng(seed)
        self._left = [sum(self._counts[number:]) for number in range(len(sizes))]  # when source `number` chooses
        self._phases = [int(rng.integers(left)) for left in self._left]
        self.caches = caches.same({name: getattr(source, "caches", {}) for name, (source, _) in sources.items()})
        if all(isinstance(source, HasConversations) for source in self._sources):
            self.conversation = self._conversation

    def __len__(self) -> int:
        return self._left[0]

    def place(self, index: int) -> tuple[int, int]:
        """Which source record `index` comes from, and the how manieth of an epoch it is there."""
        for number, (count, left, phase) in enumerate(zip(self._counts, self._left, self._phases)):
            before, after = (index * count + phase) // left, ((index + 1) * count + phase) // left
            if after > before:
                return number, before
            index -= before
        raise IndexError(f"record {index} of {len(self)}")

    def image_hashes(self, index: int) -> tuple[int, ...]:
        """Hashes of the images of record `index`, see split.py; () where its source can't tell."""
        number, nth = self.place(index)
        source = self._sources[number]
        return source.image_hashes(nth % len(source)) if isinstance(source, HasImages) else ()

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.at_epoch(index, 0)

    def at_epoch(self, index: int, epoch: int) -> dict[str, Any]:
        """Record `index` as it is drawn in an epoch of the mixture."""
        return self._named(index, read, epoch)

    def _conversation(self, index: int) -> dict[str, Any]:
        """Record `index` without images, where every source can give that."""
        return self._named(index, lambda source, row, again: source.conversation(row))

    def _named(self, index: int, read: Callable[[Any, int, int], dict[str, Any]], epoch: int = 0) -> dict[str, Any]:
        number, nth = self.place(place(index, self))
        source, count = self._sources[number], self._counts[number]
        # How often the source was read before: each of its rows up to `rounds` times in an epoch of the mixture.
        rounds = -(-count // len(source))
        record = read(source, nth % len(source), epoch * rounds + nth // len(source))
        return {**record, "key": f"{self._names[number]}:{record['key']}"}

    def identity(self) -> identity.Identity:
        """What the data are, see identity.py."""
        found: identity.Identity = {}
        for name, source in zip(self._names, self._sources):
            parts = identity.of(source)
            for part, known in parts.items():
                # The share belongs to it: with another one the same place in the order is another record.
                added = {"hash": identity.digest(known["hash"], self.counts[name], self._seed)}
                found[f"{name}/{part}" if part else name] = {**known, **added}
        return found

    def texts(self) -> Iterator[list[str]]:
        """The texts of all sources that have some."""
        for source in self._sources:
            if isinstance(source, HasTexts):
                yield from source.texts()
