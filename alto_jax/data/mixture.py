"""Several sources as one, by weight: record i comes from the same source and row every time.

A weight is the share of the stream. An epoch of the mixture ends when the source that is read slowest has been read
once, so that no record is lost; the others are read again (each time from the start). The seed draws the order.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from alto_jax.config import require
from alto_jax.data import caches
from alto_jax.data.source import HasConversations, HasImages, HasTexts, Records


class Mixture:
    """Random access to the records of named sources.

    Attributes:
      counts: records of each source in one epoch.
      caches: what all sources have cached (data/caches.py).
      conversation: reads a record without its images; there if every source has it.
    """

    def __init__(self, sources: Mapping[str, tuple[Records, float]], *, seed: int = 0):
        """ValueError: no source, an empty one, a weight that is not above 0, or different caches.

        Args:
          sources: name → (source, weight).
          seed: of the order.
        """
        require(bool(sources), "mixture", dict(sources), "at least one source")
        for name, (source, weight) in sources.items():
            require(weight > 0, f"mixture.{name}.weight", weight, "a number above 0")
            require(len(source) > 0, f"mixture.{name}", len(source), "at least one record")
        self._sources = [source for source, _ in sources.values()]
        self._names = list(sources)
        weights = np.array([weight for _, weight in sources.values()], float)
        shares, sizes = weights / weights.sum(), np.array([len(s) for s in self._sources])
        counts = np.maximum(sizes, np.round(shares * np.max(sizes / shares)).astype(np.int64))
        self.counts = dict(zip(self._names, counts.tolist()))
        rng = np.random.default_rng(seed)
        # Every source is spread evenly over the epoch, so that the shares hold in each stretch of it too.
        places = np.concatenate([(np.arange(count) + rng.random(count)) / count for count in counts])
        order = np.argsort(places, kind="stable")
        self._which = np.repeat(np.arange(len(counts), dtype=np.int32), counts)[order]
        self._row = np.zeros(len(self._which), np.int64)
        for number, size in enumerate(sizes):
            mine = self._which == number
            self._row[mine] = np.arange(int(mine.sum())) % size
        self.caches = caches.same({name: getattr(source, "caches", {}) for name, (source, _) in sources.items()})
        if all(isinstance(source, HasConversations) for source in self._sources):
            self.conversation = self._conversation

    def __len__(self) -> int:
        return len(self._which)

    def image_hashes(self, index: int) -> tuple[int, ...]:
        """Hashes of the images of record `index`, see split.py; () where its source can't tell."""
        source = self._sources[int(self._which[index])]
        return source.image_hashes(int(self._row[index])) if isinstance(source, HasImages) else ()

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._named(index, lambda source, row: source[row])

    def _conversation(self, index: int) -> dict[str, Any]:
        """Record `index` without images, where every source can give that."""
        return self._named(index, lambda source, row: source.conversation(row))

    def _named(self, index: int, read: Callable[[Any, int], dict[str, Any]]) -> dict[str, Any]:
        number = int(self._which[index])
        record = read(self._sources[number], int(self._row[index]))
        return {**record, "key": f"{self._names[number]}:{record['key']}"}

    def texts(self) -> Iterator[list[str]]:
        """The texts of all sources that have some."""
        for source in self._sources:
            if isinstance(source, HasTexts):
                yield from source.texts()
