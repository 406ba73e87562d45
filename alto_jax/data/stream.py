"""Batches in their order, with positions that say which data set they belong to.

A state of an iterator is the state of the one inside and the identity of the data set (identity.py); one that is given
back is compared with the data set that is there.
"""

import functools
from typing import Any

import grain

from alto_jax import cli
from alto_jax.config import ConfigError
from alto_jax.data import identity
from alto_jax.data.closing import ClosingIterator

DATA_SET = "data_set"  # in the state of an iterator: what data set it is of


class Numbers(grain.MapDataset):
    """The numbers 0, 1, 2, …; the first `length` are an epoch, and those of later epochs go on from there."""

    def __init__(self, length: int):
        super().__init__()
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        return self.slice(index) if isinstance(index, slice) else index


class Stream(grain.IterDataset):
    """A dataset of batches; closing an iterator ends the threads and processes that read the examples."""

    def __init__(self, dataset: grain.IterDataset, examples: Any, *, allow_changed: bool = False):
        """Takes a dataset.

        Args:
          dataset: of batches.
          examples: the `Examples` that they are made of.
          allow_changed: a state of another data set is taken all the same, at its place, with a warning.
        """
        super().__init__(dataset)
        self._examples, self._allow_changed = examples, allow_changed

    def __iter__(self) -> grain.DatasetIterator:
        return _StreamIterator(iter(self._parent), self._examples, self._allow_changed)


class _StreamIterator(ClosingIterator):
    def __init__(self, iterator: grain.DatasetIterator, examples: Any, allow_changed: bool):
        super().__init__(iterator)
        self._examples, self._allow_changed = examples, allow_changed
        examples.open()
        self.holds(examples.close, iterator.close)

    @functools.cached_property
    def _identity(self) -> identity.Identity:
        return self._examples.identity()

    def __next__(self) -> Any:
        return next(self._parent)

    def get_state(self) -> dict[str, Any]:
        """The position and the data set."""
        return {**self._parent.get_state(), DATA_SET: self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Moves there.

        Raises:
          ConfigError: the state belongs to another data set, and `allow_changed` is False.
        """
        if DATA_SET not in state:
            _warn("the checkpoint, of an earlier version, does not say which data set it was trained on; going on at "
                  "the same place of the one that is given")  # fmt: skip
        elif changed := identity.difference(state[DATA_SET], self._identity):
            if not self._allow_changed:
                raise ConfigError(
                    f"config.data: the data set is not the one that this run was trained on: {changed}; give that one,"
                    " or go on with this one, at the same place of its order, by --config.data.allow_changed=True"
                )
            _warn(f"config.data.allow_changed: going on with another data set: {changed}")
        self._parent.set_state({name: value for name, value in state.items() if name != DATA_SET})


def _warn(text: str) -> None:
    import jax  # late: keeps the start fast

    if jax.process_index() == 0:
        cli.tell(f"warning: {text}")
