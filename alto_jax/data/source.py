"""What everything that gives records or batches has in common; what else it can do, it says by these protocols."""

from collections.abc import Iterator, Sized
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from alto_jax.data import identity

T_co = TypeVar("T_co", covariant=True)


class Source(Protocol[T_co]):
    """Random access to records (or examples); a record is a function of its index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> T_co: ...


Records = Source[dict[str, Any]]  # MaskRecords, ChatRecords, ReferringRecords, …: see the classes that give them


@runtime_checkable
class HasDraws(Protocol):
    """A source whose records are drawn (a crop, a wording), anew in every epoch."""

    def at_epoch(self, index: int, epoch: int, /) -> dict[str, Any]:
        """Record `index` as it is drawn in an epoch, a function of the two; in epoch 0 it is `self[index]`."""


def place(index: int, among: Sized, name: str = "record") -> int:
    """Index of a record, in -N..N-1 as in a list, as a number in 0..N-1.

    Raises:
      IndexError: there is none; the message calls it `name`.
    """
    if not -len(among) <= index < len(among):
        raise IndexError(f"{name} {index} of {len(among)}")
    return int(index) % len(among)


def read(source: Source[Any], index: int, epoch: int) -> Any:
    """Record `index` of a source as it is in an epoch."""
    return source.at_epoch(index, epoch) if isinstance(source, HasDraws) else source[index]


@runtime_checkable
class HasTexts(Protocol):
    """A source of ChatRecords whose texts can be read without its images, for training a text tokenizer."""

    def texts(self) -> Iterator[list[str]]:
        """The turns of every record."""


@runtime_checkable
class HasConversations(Protocol):
    """A source of ChatRecords that gives a record without reading its images."""

    def conversation(self, index: int, /) -> dict[str, Any]:
        """Record `index` with "key" and "conversations", and "image": None if it has no image, alone."""


@runtime_checkable
class HasImages(Protocol):
    """A source that says which images its records show without reading them, see split.py."""

    def image_hashes(self, index: int, /) -> tuple[int, ...]:
        """Hashes of the images of record `index`; () if it has none, or none can be told."""


class OneForOne:
    """Records that are made of those of a `source`, one of each: what they have in common with them."""

    source: Any

    def __len__(self) -> int:
        return len(self.source)

    def identity(self) -> identity.Identity:
        """What the data are, see identity.py."""
        return identity.of(self.source)

    def image_hashes(self, index: int) -> tuple[int, ...]:
        """Hashes of the images of record `index`, see split.py."""
        return self.source.image_hashes(index)


@runtime_checkable
class Chats(Source[dict[str, Any]], Protocol):
    """A source of ChatRecords that knows, without reading them, which ask for masks."""

    def num_prompts(self) -> np.ndarray:
        """How many requests for one mask each record has, int[N], see prompts.py; 1 if it is malformed."""


class Batches(Protocol[T_co]):
    """An iterator of batches that can be saved and moved: after `set_state` the same follow as after `get_state`."""

    def __iter__(self) -> Iterator[T_co]: ...

    def __next__(self) -> T_co: ...

    def get_state(self) -> Any:
        """The position in the data; plain values."""

    def set_state(self, state: Any) -> None:
        """Moves to the position."""
