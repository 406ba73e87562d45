"""Several short conversations in one row of stage 2, so that less of a batch is padding.

The rule: the conversations come in the order of the shuffled stream. Each goes into the first row of the global batch
with room for its tokens and fewer than J conversations; the first one that fits nowhere begins the next batch. So a
batch is a run of the stream and a function of where that begins: one number is the whole state, and it means the
same whatever the number of processes. Every process lays out the whole batch and reads the images of its own rows.
That needs the texts alone where the source has `conversation(index)`, else whole records. Grain's packing
transformations would pack every process's share by itself, and know no images.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
import functools
from typing import Any

import grain
import numpy as np

from alto_jax.data.closing import ClosingIterator
from alto_jax.data.examples import Examples
from alto_jax.data.prefetch import Ahead
from alto_jax.data.stream import Numbers
from alto_jax.parallel.shares import WHOLE, BatchShare


def fill_rows(
    length_at: Callable[[int], int | None], start: int, *, num_rows: int, max_length: int, max_segments: int
) -> tuple[list[list[int]], int]:
    """Lays out one batch, first fit in the order of the stream.

    Args:
      length_at: tokens (at most max_length) of the conversation at a position of the stream; None: left out.
      start: the position where the batch begins.
      num_rows, max_length, max_segments: rows of the batch, tokens and conversations of a row.

    Returns:
      The positions in each row, and the position where the next batch begins. No row is empty.
    """
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    room = [max_length] * num_rows
    position = start
    while True:
        length = length_at(position)
        if length is not None:
            fits = (r for r in range(num_rows) if length <= room[r] and len(rows[r]) < max_segments)
            row = next(fits, None)
            if row is None:
                return rows, position
            rows[row].append(position)
            room[row] -= length
        position += 1


def pack_row(
    examples: Sequence[Mapping[str, np.ndarray]], blank: Mapping[str, np.ndarray], max_segments: int, img_context: int
) -> dict[str, np.ndarray]:
    """One packed row: the fields of ChatBatch without their batch axis.

    Args:
      examples: of `chat_example`, at most max_segments.
      blank: an example without text and masks, for the shapes and the padding.
      max_segments: J.
      img_context: id of `<IMG_CONTEXT>`.
    """
    # Image tokens are taken in order, so images that no text has come last.
    with_image = [bool((e["ids"] == img_context).any()) for e in examples]
    slots = {int(i): slot for slot, i in enumerate(np.argsort(np.logical_not(with_image), kind="stable"))}
    row = {name: np.array(blank[name]) for name in ("ids", "labels", "text_mask")}
    row["segment_ids"] = np.zeros(len(row["ids"]), np.int32)
    of_image = [name for name in ("image", "pixel_image", "features") if name in blank]
    of_mask = [name for name in ("masks", "mask_valid", "codes", "code_lengths") if name in blank]
    row |= {name: np.stack([blank[name]] * max_segments) for name in of_image}
    row |= {name: np.concatenate([blank[name]] * max_segments) for name in of_mask}
    row["mask_image"] = np.zeros(len(row["mask_valid"]), np.int32)
    token = mask = 0
    for i, example in enumerate(examples):
        length, num_masks = int(example["text_mask"].sum()), int(example["mask_valid"].sum())
        at, of = slice(token, token + length), slice(mask, mask + num_masks)
        for name in ("ids", "labels", "text_mask"):
            row[name][at] = example[name][:length]
        row["labels"][token] = blank["labels"][0]  # Note: the token before belongs to another conversation.
        row["segment_ids"][at] = i + 1
        for name in of_image:
            row[name][slots[i]] = example[name]
        for name in of_mask:
            row[name][of] = example[name][:num_masks]
        row["mask_image"][of] = slots[i]
        token, mask = token + length, mask + num_masks
    return row


class Packed(grain.IterDataset):
    """Endless batches of packed rows; iterators have get_state and set_state, see the module's docstring."""

    def __init__(
        self,
        examples: Examples,
        measure: Callable[[int], int | None] | None,
        make_batch: Callable[[list[list[Any]]], Any],
        *,
        num_rows: int,
        max_length: int,
        max_segments: int,
        seed: int,
        share: BatchShare = WHOLE,
    ):
        """Opens the stream.

        Args:
          examples: of `chat_example`; with threads or processes, a thread of its own prepares the next batch ahead.
          measure: tokens of record i without reading its images (None: bad); None reads the example.
          make_batch: makes a batch of the examples of each row.
          num_rows: of a batch over all processes.
          max_length, max_segments: see `fill_rows`.
          seed: of the shuffling, which differs from epoch to epoch.
          share: the rows that are read here.

        Raises:
          ValueError: rows that do not divide among the devices.
        """
        super().__init__()
        self.examples, self.measure, self.make_batch = examples, measure, make_batch
        self.shape = {"num_rows": num_rows, "max_length": max_length, "max_segments": max_segments}
        self.rows = share.rows(num_rows)
        self.order = Numbers(len(examples)).seed(seed).shuffle().repeat()

    def __iter__(self) -> grain.DatasetIterator:
        iterator = _PackedIterator(self)
        return Ahead(iterator) if self.examples.num_threads else iterator


class _PackedIterator(ClosingIterator):
    """Reads ahead as far as threads are free; its state is the position in the stream where the next batch begins."""

    def __init__(self, dataset: Packed):
        super().__init__()
        self._dataset, self._position = dataset, 0
        num_threads = max(dataset.examples.num_threads, 1)
        self._threads = ThreadPoolExecutor(max_workers=num_threads, thread_name_prefix="packing")
        self._found: dict[int, Future] = {}
        self.holds(functools.partial(self._threads.shutdown, wait=False, cancel_futures=True))

    def _example(self, position: int) -> Future:
        """The example at a position of the stream, being read; resolves to None if it is bad."""
        if position not in self._found:
            number = int(self._dataset.order[position])
            self._found[position] = self._threads.submit(self._dataset.examples.get, number)
        return self._found[position]

    def _length(self, position: int) -> int | None:
        dataset = self._dataset
        if dataset.measure is not None:
            return dataset.measure(int(dataset.order[position]))
        for ahead in range(2 * dataset.examples.num_threads):
            self._example(position + ahead)
        example = self._example(position).result()
        return None if example is None else int(example["text_mask"].sum())

    def __next__(self) -> Any:
        rows, following = fill_rows(self._length, self._position, **self._dataset.shape)
        reading = [[self._example(position) for position in rows[row]] for row in self._dataset.rows]
        # Where texts were measured without their images, one may turn out bad now: its place stays empty.
        examples = [[e for e in (future.result() for future in row) if e is not None] for row in reading]
        self._position = following
        self._found = {position: future for position, future in self._found.items() if position >= following}
        return self._dataset.make_batch(examples)

    def get_state(self) -> dict[str, Any]:
        return {"position": self._position}

    def set_state(self, state: dict[str, Any]) -> None:
        self._position = int(state["position"])
        self._found = {}
