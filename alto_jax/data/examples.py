"""From records to examples: one row of a batch, checked, resized and tokenised; tolerant of a few bad records.

In: a random-access source of MaskRecords {"key", "image", "mask"} or ChatRecords {"key", "image" (None: text alone),
"masks", "conversations"}, raw or prepared. Out: what `pipeline.py` stacks to batches.
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
from alto_jax.mllm import text

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
    _check_prepared(record["key"], {"mask_size": (record["mask"], mask_size)})
    mask = transforms.keep_small(record["mask"], record["mask"])
    return {"features": record["features"], "mask": mask.astype(np.float32) / np.float32(255)}


def mask_arrays(record: Mapping[str, Any], image_size: int, mask_size: int) -> tuple[np.ndarray, np.ndarray]:
    """`mask_example` with the mask as uint8[H, H] in 0..255; a prepared record is taken as it is."""
    image, mask = record["image"], record["mask"]
    if record.get("prepared"):
        _check_prepared(record["key"], {"image_size": (image, image_size), "mask_size": (mask, mask_size)})
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


def chat_text(
    record: Mapping[str, Any],
    tok: text.TextTokenizer,
    *,
    max_length: int,
    num_image_tokens: int,
    num_latent_tokens: int,
    max_masks: int,
    system: str | None,
) -> tuple[list[int], list[int]]:
    """The ids and labels of a ChatRecord, unpadded; needs its "key" and "conversations" alone.

    The text has `num_image_tokens` image tokens, or none if the record has "image": None. Without masks, it is cut at
    `max_length`, as in InternVL's training.

    Raises:
      ValueError: text with masks longer than `max_length`, no answer in what is left, or too many masks; the message
        names the record.
    """
    try:
        turns = [
            {**turn, "value": text.resize_placeholders(turn["value"], num_latent_tokens)}
            for turn in record["conversations"]
        ]
        image_tokens = num_image_tokens if record.get("image", True) is not None else 0
        ids, labels = text.render_conversation(tok, turns, image_tokens, system=system)
    except ValueError as error:
        raise _unfit(record["key"], str(error)) from error
    placeholders = ids.count(tok.ids.mask_start)
    has_answer = any(label != text.IGNORE for label in labels[:max_length])
    if len(ids) > max_length and (placeholders or not has_answer):
        raise _unfit(record["key"], f"{len(ids)} text tokens, but max_length is {max_length}")
    if not has_answer:
        raise _unfit(record["key"], "conversations: there is no answer to learn from")
    ids, labels = ids[:max_length], labels[:max_length]
    if placeholders > max_masks:
        raise _unfit(record["key"], f"{placeholders} masks, but max_masks is {max_masks}")
    return ids, labels


def chat_example(
    record: Mapping[str, Any],
    tok: text.TextTokenizer,
    *,
    vision_size: int,
    image_size: int,
    mask_size: int,
    max_length: int,
    num_image_tokens: int,
    num_latent_tokens: int,
    max_masks: int,
    system: str | None,
) -> dict[str, np.ndarray]:
    """One example of stage 2: the fields of ChatBatch without their batch axis.

    Raises:
      ValueError: text longer than `max_length`, an empty mask, or masks that do not match their placeholders in number
        or the image in size; the message names the record.
    """
    key, image, masks = record["key"], record["image"], record["masks"]
    ids, labels = chat_text(
        record,
        tok,
        max_length=max_length,
        num_image_tokens=num_image_tokens,
        num_latent_tokens=num_latent_tokens,
        max_masks=max_masks,
        system=system,
    )
    placeholders = ids.count(tok.ids.mask_start)
    if placeholders != len(masks):
        raise _unfit(key, f"{len(masks)} masks, but {placeholders} mask placeholders in the text")
    padding = max_length - len(ids)
    prepared = bool(record.get("prepared"))
    if prepared:
        _check_prepared(key, {f"mask {i}": (mask, mask_size) for i, mask in enumerate(masks)})
    example = _images(record, vision_size, image_size) | {
        "ids": np.array(ids + [tok.ids.pad] * padding, np.int32),
        "labels": np.array(list(labels) + [-100] * padding, np.int32),
        "text_mask": np.arange(max_length) < len(ids),
        "masks": np.zeros((max_masks, mask_size, mask_size), np.float32),
        "mask_valid": np.arange(max_masks) < len(masks),
    }
    for name in ("codes", "code_lengths"):
        if name in record:
            example[name] = np.zeros((max_masks, *record[name].shape[1:]), np.int32)
            example[name][: len(masks)] = record[name]
    for i, mask in enumerate(masks):
        if not prepared:
            check_sizes(key, image, mask)
        check_not_empty(key, mask)
        example["masks"][i] = transforms.soft_mask(mask, mask_size)
    return example


def grpo_question(record: Mapping[str, Any], template: int | None) -> str:
    """The stage-3 request: the `<ref>` or `<box>` of the human turn in one of the seven adaptive wordings.

    Args:
      record: a ChatRecord.
      template: number of the wording, taken modulo 7; None keeps the turn as it is.

    Raises:
      ValueError: no human turn, or none with a reference.
    """
    human = next((turn["value"] for turn in record["conversations"] if turn["from"] == "human"), None)
    if human is None:
        raise ValueError("no human turn")
    if template is None:
        return human
    phrase = text.find_reference(human)
    if phrase is None:
        raise ValueError(f"no <ref> or <box> in the human turn {human[:80]!r}")
    return text.question(phrase, adaptive=True, template=template)


def prompt_example(
    record: Mapping[str, Any],
    tok: text.TextTokenizer,
    *,
    vision_size: int,
    image_size: int,
    mask_size: int,
    max_prompt_length: int,
    num_image_tokens: int,
    system: str | None,
    answer_prefix: str,
    template: int | None,
) -> dict[str, np.ndarray]:
    """One example of stage 3: the fields of PromptBatch without their batch axis.

    Args:
      record: a ChatRecord with one mask; template: see `grpo_question`; the rest: see `prompt_batches`.

    Raises:
      ValueError: no reference, a number of masks other than one, an empty one (an empty answer would meet it), or a
        prompt that is too long; names the record.
    """
    key, image, masks = record["key"], record["image"], record["masks"]
    if len(masks) != 1:
        raise _unfit(key, f"expected one mask, got {len(masks)}")
    if record.get("prepared"):
        _check_prepared(key, {"mask_size": (masks[0], mask_size)})
    else:
        check_sizes(key, image, masks[0])
    check_not_empty(key, masks[0])
    try:
        question = grpo_question(record, template)
        ids = text.render_prompt(tok, question, num_image_tokens, system=system, answer_prefix=answer_prefix)
    except ValueError as error:
        raise _unfit(key, str(error)) from error
    padding = max_prompt_length - len(ids)
    if padding < 0:
        raise _unfit(key, f"{len(ids)} prompt tokens, but max_prompt_length is {max_prompt_length}")
    return _images(record, vision_size, image_size) | {
        "prompt_ids": np.array([tok.ids.pad] * padding + list(ids), np.int32),
        "prompt_mask": np.arange(max_prompt_length) >= padding,
        "mask": transforms.soft_mask(masks[0], mask_size),
    }


def _unfit(key: str, what: str) -> RecordError:
    """A conversation that the model or the stage has no use for."""
    return RecordError(f"record {key}: {what}", "conversation")


def _images(record: Mapping[str, Any], vision_size: int, image_size: int) -> dict[str, np.ndarray]:
    """The MLLM's image of a ChatRecord, and the SAM encoder's image or, where they are cached, its features."""
    image = record["image"]
    if image is None:  # Note: no text refers to it, and a row of a batch must have one.
        features = {"features": record["features"]} if "features" in record else {}
        blank = lambda size: np.zeros((size, size, 3), np.uint8)
        return {"image": blank(vision_size)} | (features or {"pixel_image": blank(image_size)})
    if not record.get("prepared"):
        small, large = transforms.squash_all(image, vision_size, image_size)
        return {"image": small, "pixel_image": large}
    sizes = {"vision_size": (image, vision_size)}
    if "features" in record:
        _check_prepared(record["key"], sizes)
        return {"image": image, "features": record["features"]}
    _check_prepared(record["key"], sizes | {"image_size": (record["pixel_image"], image_size)})
    return {"image": image, "pixel_image": record["pixel_image"]}


def _check_prepared(key: str, arrays: Mapping[str, tuple[np.ndarray, int]]) -> None:
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
