"""From records to examples: one row of a batch, checked, resized and tokenised; tolerant of a few bad records.

In: a random-access source of MaskRecords {"key", "image", "mask"} or ChatRecords (chat_examples.py), raw or prepared.
Out: what `pipeline.py` stacks to batches.
"""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
import ctypes
import functools
import os
import threading
from typing import Any

import numpy as np

from alto_jax.data import bad_data, identity, images, transforms
from alto_jax.data.bad_data import RecordError
from alto_jax.data.source import Source, read
from alto_jax.data.workers import Workers

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_KEPT_BYTES, _LARGEST_KEPT = 2**30, 2**25
_REFERENCE_SHRINK = 4  # stage 1 of the reference: masks of 1024 to 256 pixels, without antialiasing


@functools.cache
def keep_freed_memory() -> bool:
    """Has the C library keep up to 1 GiB of freed memory for the next records; returns whether it does.

    Images are some megabytes, which glibc maps afresh for each and unmaps when it is freed. The page faults of that
    took six times as long as the reading of a prepared record (benchmarks/results/data.md). Other C libraries, and
    processes that set MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_ or GLIBC_TUNABLES, are left alone.
    """
    chosen = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
    names = getattr(os, "confstr_names", {})
    if any(name in os.environ for name in chosen) or "CS_GNU_LIBC_VERSION" not in names:
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT) and mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES))


class Examples:
    """A source with a transformation, tolerant of a bounded number of bad records.

    Examples are numbered through all epochs: number n is record n mod N as it is in epoch n // N.
    A record whose reading or transformation raises ValueError or OSError is counted, logged with its path and line
    and replaced by the one after it, until more different ones have failed than `bad` allows (see bad_data.py).

    Attributes:
      bad: the bad records so far.
      num_threads: threads that `many` reads with when opened; 0: the caller's.
    """

    def __init__(
        self,
        source: Source[Mapping[str, Any]],
        transform: Callable[[int, Any], Any],
        max_bad_records: int = 0,
        max_bad_fraction: float = 0.0,
        *,
        num_threads: int = 0,
        num_workers: int = 0,
        kept_bytes: int = 0,
    ):
        """Reads nothing yet.

        Args:
          source: records.
          transform: `transform(number, record) -> example`.
          max_bad_records, max_bad_fraction: see bad_data.py.
          num_threads: that `many` reads with; 0: the caller's.
          num_workers: processes that read (workers.py); 0: this one.
          kept_bytes: examples are kept until they have so many bytes, and serve later epochs as they were; what an
            epoch draws anew (one phrase of several) then stays.
        """
        if len(source) == 0:
            raise ValueError("the data source holds no record")
        self.bad = bad_data.BadRecords(len(source), max_bad_fraction, max_bad_records)
        self._source, self._length = source, len(source)
        self._local = functools.partial(_attempt, source, transform, len(source))
        # Note: with a thread more than processes, one is ready to ask when a process is done.
        self.num_threads = num_workers + 1 if num_workers else num_threads
        self._num_workers = num_workers
        self._users, self._lock = 0, threading.Lock()
        self._kept: dict[int, Any] = {}
        self._free_bytes = kept_bytes
        self._threads: ThreadPoolExecutor | None = None
        self._workers: Workers | None = None

    def __len__(self) -> int:
        return self._length

    def identity(self) -> identity.Identity:
        """What data set they are of, see identity.py."""
        return identity.of(self._source)

    def __getitem__(self, number: int) -> Any:
        number = int(number)
        while (example := self.get(number)) is None:
            epoch, index = divmod(number, len(self))
            number = epoch * len(self) + (index + 1) % len(self)
        return example

    def get(self, number: int) -> Any:
        """The example of `number` itself; None if its record is bad."""
        index = number % len(self)
        if index in self._kept:
            return self._kept[index]
        if self._workers is None:
            example, error, kind = self._local(number)
        else:
            example, error, kind = self._workers(number, f"record {index}")
        if error is not None:
            self.bad.add(index, error, kind)
        elif self._free_bytes > 0:
            with self._lock:
                self._kept[index] = example
                self._free_bytes -= _num_bytes(example)
        return example

    def many(self, numbers: Iterable[int]) -> list[Any]:
        """The examples of several numbers, in order."""
        return list((self._threads.map if self._threads else map)(self.__getitem__, numbers))

    def open(self) -> None:
        """Has threads and processes read from now on; until then, everything is read by the caller."""
        with self._lock:
            self._users += 1
            if self._users == 1 and self.num_threads:
                self._threads = ThreadPoolExecutor(self.num_threads, thread_name_prefix="reading")
                self._workers = Workers(self._local, self._num_workers) if self._num_workers else None

    def close(self) -> None:
        """Ends them when the last who opened them closes; what is being read is dropped."""
        with self._lock:
            self._users -= 1
            if self._users:
                return
            if self._threads is not None:
                self._threads.shutdown(wait=False, cancel_futures=True)
            if self._workers is not None:
                self._workers.close()


def _num_bytes(example: Any) -> int:
    """Bytes of the arrays of an example, and some for each thing that is none."""
    if isinstance(example, Mapping):
        return sum(map(_num_bytes, example.values()))
    if isinstance(example, (tuple, list)):
        return sum(map(_num_bytes, example))
    return getattr(example, "nbytes", 0) + 100


def _attempt(
    source: Source, transform: Callable[[int, Any], Any], length: int, number: int
) -> tuple[Any, Exception | None, str]:
    """(example, None, ""), or (None, what is wrong with the record, of what kind it is)."""
    keep_freed_memory()
    epoch, index = divmod(number, length)
    try:
        return transform(number, read(source, index, epoch)), None, ""
    except (ValueError, OSError) as error:
        return None, error, bad_data.kind_of(error)  # Note: the kind may be the cause's, which another process keeps.


def mask_example(record: Mapping[str, Any], image_size: int, mask_size: int) -> tuple[np.ndarray, np.ndarray]:
    """One example of stages 1 and 1.5.

    A record that is not square is padded at the bottom and right. Images shrink with antialiasing and grow
    bilinearly; masks follow the reference's bilinear rule down to a quarter of their size, and `transforms.keep_small`.

    Returns:
      image uint8[S, S, 3] and mask float32[H, H] in 0..1.

    Raises:
      ValueError: an empty mask, or sizes of image and mask that differ; the message names the record.
    """
    image, mask = mask_arrays(record, image_size, mask_size)
    return image, mask.astype(np.float32) / np.float32(255)


def mask_fields(record: Mapping[str, Any], image_size: int, mask_size: int) -> dict[str, np.ndarray]:
    """The fields of MaskBatch without their batch axis: `mask_example`, with cached features in place of the image."""
    if "features" not in record:
        image, mask = mask_example(record, image_size, mask_size)
        return {"image": image, "mask": mask}
    check_prepared(record["key"], {"mask_size": (record["mask"], mask_size)})
    mask = transforms.keep_small(record["mask"], record["mask"])
    return {"features": record["features"], "mask": mask.astype(np.float32) / np.float32(255)}


def mask_arrays(record: Mapping[str, Any], image_size: int, mask_size: int) -> tuple[np.ndarray, np.ndarray]:
    """`mask_example` with the mask as uint8[H, H] in 0..255; a prepared record is taken as it is."""
    image, mask = record["image"], record["mask"]
    if record.get("prepared"):
        check_prepared(record["key"], {"image_size": (image, image_size), "mask_size": (mask, mask_size)})
        return image, transforms.keep_small(mask, mask)
    check_sizes(record["key"], image, mask)
    check_not_empty(record["key"], mask)
    image, mask = transforms.pad_square(image, mask)
    if len(image) > image_size:
        image = transforms.squash(image, image_size)
    else:
        image = transforms.resize_uint8(image, image_size, image_size)
    if len(mask) > _REFERENCE_SHRINK * mask_size:  # thin parts would fall between the sampling points
        return image, transforms.squash_mask(mask, mask_size)
    return image, transforms.keep_small(transforms.resize_uint8(mask, mask_size, mask_size), mask)


def check_prepared(key: str, arrays: Mapping[str, tuple[np.ndarray, int]]) -> None:
    """Raises ValueError, naming record `key`, if an array of {name: (array, side)} is of another size."""
    for name, (array, size) in arrays.items():
        if array.shape[:2] != (size, size):
            raise ValueError(
                f"record {key}: prepared with {name} {array.shape[1]}x{array.shape[0]}, the model wants {size}x{size}; "
                "prepare the data set for this model"
            )


def check_not_empty(key: str, mask: np.ndarray) -> None:
    """Raises RecordError, naming record `key`, if nothing is in the mask."""
    if not mask.any():
        raise RecordError(f"record {key}: the mask is empty", "empty mask")


def check_sizes(key: str, image: np.ndarray, mask: np.ndarray) -> None:
    """Raises RecordError, naming record `key`, if the image is too small or the mask of another size."""
    images.check_size(image, f"of record {key}")
    if image.shape[:2] != mask.shape:
        raise RecordError(
            f"record {key}: the image is {image.shape[1]}x{image.shape[0]}, "
            f"but a mask is {mask.shape[1]}x{mask.shape[0]}",
            "size of mask and image",
        )
