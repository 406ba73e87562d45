"""From record sources to batches, with Grain: shuffled, repeated, sliced over hosts, exactly resumable.

In: any random-access source (`len`, `[]`) of MaskRecords or ChatRecords. Out: a `grain.IterDataset` of
MaskBatch, ChatBatch or PromptBatch. Its iterator has `get_state()` and `set_state(state)`; after
`set_state` the same batches follow as after `get_state`. The stream is a function of the source, the seed
and the arguments; with P processes each gets the records p, p + P, … of it, so that the batches of all
processes together hold the same records whatever P is. A state counts batches: one that a process of P saved
may be given to every process of another P, and the same records follow.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from alto_jax.data import bad_data, transforms
from alto_jax.mllm import text

_REFERENCE_SHRINK = 4  # stage 1 of the reference: masks of 1024 to 256 pixels, without antialiasing


class Source(Protocol):
    """Random access to records; a record is a function of its index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


class Examples:
    """A source with a transformation, tolerant of a bounded number of bad records.

    A record whose reading or transformation raises ValueError or OSError is counted, logged with its path and line
    and replaced by the one after it, until more different ones have failed than `bad` allows (see bad_data.py).
    """

    def __init__(
        self,
        source: Source,
        transform: Callable[[int, Any], Any],
        max_bad_records: int = 0,
        max_bad_fraction: float = 0.0,
    ):
        if len(source) == 0:
            raise ValueError("the data source holds no record")
        self._source, self._transform = source, transform
        self.bad = bad_data.BadRecords(len(source), max_bad_fraction, max_bad_records)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Any:
        index = int(index)
        while True:
            try:
                return self._transform(index, self._source[index])
            except (ValueError, OSError) as error:
                self.bad.add(index, error)
                index = (index + 1) % len(self)


def batches(
    examples: Source,
    make_batch: Callable[[Sequence[Any]], Any],
    *,
    batch_size: int,
    seed: int,
    num_epochs: int | None = None,
    shuffle: bool = True,
    drop_remainder: bool = True,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 4,
    prefetch: int = 4,
) -> Any:
    """The common part: shuffle, repeat, slice, batch, prefetch.

    Args:
      examples: random access to examples.
      make_batch: makes a batch of a list of examples.
      batch_size: examples in a batch over all processes.
      seed: of the shuffling, which differs from epoch to epoch.
      num_epochs: None for an endless stream.
      shuffle: whether to shuffle.
      drop_remainder: leave out a last batch that is not full.
      process_index, process_count: which part of the stream this process reads.
      num_threads: reading threads; 0 reads in the caller's thread.
      prefetch: batches kept ready.

    Returns:
      A grain.IterDataset.

    Raises:
      ValueError: a batch size that does not divide among the processes, or too few examples for a batch.
    """
    import grain

    if batch_size < 1 or batch_size % process_count:
        raise ValueError(f"batch_size: expected a multiple of {process_count} processes, got {batch_size}")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index: expected 0..{process_count - 1}, got {process_index}")
    if num_epochs is not None and drop_remainder and len(examples) * num_epochs < batch_size:
        raise ValueError(f"batch_size: {batch_size} is more than the {len(examples)} records of {num_epochs} epochs")
    dataset = grain.MapDataset.source(examples).seed(seed)
    if shuffle:
        dataset = dataset.shuffle()
    dataset = dataset.repeat(num_epochs)
    if process_count > 1:
        dataset = dataset[process_index::process_count]
    dataset = dataset.batch(batch_size // process_count, drop_remainder=drop_remainder, batch_fn=make_batch)
    return dataset.to_iter_dataset(
        grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch if num_threads else 0)
    )


def mask_example(record: Mapping[str, Any], image_size: int, mask_size: int) -> tuple[np.ndarray, np.ndarray]:
    """One example of stages 1 and 1.5.

    A record that is not square is padded at the bottom and right. Images shrink with antialiasing and grow
    bilinearly; masks follow the reference's bilinear rule down to a quarter of their size.

    Returns:
      image uint8[S, S, 3] and mask float32[H, H] in 0..1.

    Raises:
      ValueError: an empty mask, or sizes of image and mask that differ; the message names the record.
    """
    image, mask = mask_arrays(record, image_size, mask_size)
    return image, mask.astype(np.float32) / np.float32(255)


def mask_arrays(record: Mapping[str, Any], image_size: int, mask_size: int) -> tuple[np.ndarray, np.ndarray]:
    """`mask_example` with the mask as uint8[H, H] in 0..255; a prepared record is taken as it is."""
    image, mask = record["image"], record["mask"]
    if record.get("prepared"):
        _check_prepared(record["key"], {"image_size": (image, image_size), "mask_size": (mask, mask_size)})
        return image, mask
    _check_sizes(record["key"], image, mask)
    if not mask.any():
        raise ValueError(f"record {record['key']}: the mask is empty")
    image, mask = transforms.pad_square(image, mask)
    if len(image) > image_size:
        image = transforms.squash(image, image_size)
    else:
        image = transforms.resize_uint8(image, image_size, image_size)
    if len(mask) > _REFERENCE_SHRINK * mask_size:  # thin parts would fall between the sampling points
        return image, transforms.squash(mask, mask_size)
    return image, transforms.resize_uint8(mask, mask_size, mask_size)


def mask_batches(
    source: Source,
    *,
    image_size: int,
    mask_size: int,
    batch_size: int,
    seed: int,
    max_bad_records: int = 0,
    max_bad_fraction: float = 0.0,
    **options: Any,
) -> Any:
    """Batches of stages 1 and 1.5.

    Args:
      source: MaskRecords.
      image_size, mask_size: sides of the images and masks in the batch, in pixels.
      batch_size, seed: see `batches`.
      max_bad_records, max_bad_fraction: bad records that are passed over, see `Examples`.
      **options: num_epochs, shuffle, drop_remainder, process_index, process_count, num_threads and
        prefetch of `batches`.

    Returns:
      A grain.IterDataset of MaskBatch.
    """
    from alto_jax.batch import MaskBatch

    def make_batch(examples: Sequence[tuple[np.ndarray, np.ndarray]]) -> MaskBatch:
        images, masks = zip(*examples, strict=True)
        return MaskBatch(image=np.stack(images), mask=np.stack(masks))

    examples = Examples(
        source, lambda _, record: mask_example(record, image_size, mask_size), max_bad_records, max_bad_fraction
    )
    return batches(examples, make_batch, batch_size=batch_size, seed=seed, **options)


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
      ValueError: text longer than `max_length`, or masks that do not match their placeholders in number or
        the image in size; the message names the record.
    """
    key, image, masks = record["key"], record["image"], record["masks"]
    try:
        turns = [
            {**turn, "value": text.resize_placeholders(turn["value"], num_latent_tokens)}
            for turn in record["conversations"]
        ]
        ids, labels = text.render_conversation(tok, turns, num_image_tokens, system=system)
    except ValueError as error:
        raise ValueError(f"record {key}: {error}") from error
    if len(ids) > max_length:
        raise ValueError(f"record {key}: {len(ids)} text tokens, but max_length is {max_length}")
    placeholders = ids.count(tok.ids.mask_start)
    if placeholders != len(masks):
        raise ValueError(f"record {key}: {len(masks)} masks, but {placeholders} mask placeholders in the text")
    if len(masks) > max_masks:
        raise ValueError(f"record {key}: {len(masks)} masks, but max_masks is {max_masks}")
    padding = max_length - len(ids)
    prepared = bool(record.get("prepared"))
    pixel_image = record["pixel_image"] if prepared else image
    if prepared:
        sizes = {f"mask {i}": (mask, mask_size) for i, mask in enumerate(masks)}
        _check_prepared(key, {"vision_size": (image, vision_size), "image_size": (pixel_image, image_size), **sizes})
    small, large = (image, pixel_image) if prepared else transforms.squash_all(image, vision_size, image_size)
    example = {
        "image": small,
        "pixel_image": large,
        "ids": np.array(ids + [tok.ids.pad] * padding, np.int32),
        "labels": np.array(list(labels) + [-100] * padding, np.int32),
        "text_mask": np.arange(max_length) < len(ids),
        "masks": np.zeros((max_masks, mask_size, mask_size), np.float32),
        "mask_valid": np.arange(max_masks) < len(masks),
    }
    for i, mask in enumerate(masks):
        if not prepared:
            _check_sizes(key, image, mask)
        example["masks"][i] = transforms.soft_mask(mask, mask_size)
    return example


def chat_batches(
    source: Source,
    tok: text.TextTokenizer,
    *,
    vision_size: int,
    image_size: int,
    mask_size: int,
    max_length: int,
    num_image_tokens: int,
    num_latent_tokens: int,
    max_masks: int,
    batch_size: int,
    seed: int,
    system: str | None = text.SYSTEM_MESSAGE,
    length_buckets: Sequence[int] = (),
    max_bad_records: int = 0,
    max_bad_fraction: float = 0.0,
    **options: Any,
) -> Any:
    """Batches of stage 2.

    Args:
      source: ChatRecords.
      tok: the model's tokenizer.
      vision_size, image_size, mask_size: sides of the MLLM image, the SAM image and the masks, in pixels.
      max_length: text tokens of a row.
      num_image_tokens: tokens that the image takes in the text.
      num_latent_tokens: placeholders a mask takes in the text; records have 32 in any case.
      max_masks: mask slots of a row.
      batch_size, seed: see `batches`.
      system: the system message; None leaves it out.
      length_buckets: a batch is cut to the shortest of these lengths that all its rows fit in; with several
        processes, which must agree on a shape without asking each other, it stays at max_length.
      max_bad_records, max_bad_fraction: bad records that are passed over, see `Examples`.
      **options: as in `mask_batches`.

    Returns:
      A grain.IterDataset of ChatBatch.
    """
    from alto_jax.batch import ChatBatch

    def transform(_: int, record: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return chat_example(
            record,
            tok,
            vision_size=vision_size,
            image_size=image_size,
            mask_size=mask_size,
            max_length=max_length,
            num_image_tokens=num_image_tokens,
            num_latent_tokens=num_latent_tokens,
            max_masks=max_masks,
            system=system,
        )

    examples = Examples(source, transform, max_bad_records, max_bad_fraction)
    buckets = sorted({*length_buckets, max_length}) if options.get("process_count", 1) == 1 else [max_length]

    def make_batch(rows: Sequence[dict[str, np.ndarray]]) -> ChatBatch:
        batch = _stack(rows)
        longest = int(batch["text_mask"].sum(1).max())
        length = next(bucket for bucket in buckets if bucket >= longest)
        return ChatBatch(**batch | {name: batch[name][:, :length] for name in ("ids", "labels", "text_mask")})

    return batches(examples, make_batch, batch_size=batch_size, seed=seed, **options)


def grpo_question(record: Mapping[str, Any], template: int | None) -> str:
    """The stage-3 request: the `<ref>` or `<box>` of the human turn in one of the seven adaptive wordings.

    Args:
      record: a ChatRecord.
      template: number of the wording, taken modulo 7; None keeps the turn as it is.

    Raises:
      ValueError: no human turn, or none with a reference; the message names the record.
    """
    human = next((turn["value"] for turn in record["conversations"] if turn["from"] == "human"), None)
    if human is None:
        raise ValueError(f"record {record['key']}: no human turn")
    if template is None:
        return human
    phrase = text.find_reference(human)
    if phrase is None:
        raise ValueError(f"record {record['key']}: no <ref> or <box> in the human turn {human[:80]!r}")
    return text.question(phrase, adaptive=True, template=template)


def prompt_batches(
    source: Source,
    tok: text.TextTokenizer,
    *,
    vision_size: int,
    image_size: int,
    mask_size: int,
    max_prompt_length: int,
    num_image_tokens: int,
    batch_size: int,
    seed: int,
    system: str | None = text.SYSTEM_MESSAGE,
    answer_prefix: str = "",
    templates: Literal["first", "all", "keep"] = "first",
    max_bad_records: int = 0,
    max_bad_fraction: float = 0.0,
    **options: Any,
) -> Any:
    """Batches of stage 3: prompts without their answers, and the target masks.

    Args:
      source: ChatRecords with one mask each.
      tok, vision_size, image_size, mask_size, num_image_tokens, batch_size, seed, system: as in
        `chat_batches`.
      max_prompt_length: tokens of a prompt, image tokens included.
      answer_prefix: start of the answer that is given to the model.
      templates: "first": the wording that the reference uses in effect; "all": record i has wording
        i mod 7; "keep": the human turn as it stands.
      max_bad_records, max_bad_fraction: bad records that are passed over, see `Examples`.
      **options: as in `mask_batches`.

    Returns:
      A grain.IterDataset of PromptBatch.

    Raises:
      ValueError: an unknown `templates`; later, naming the record: no reference, a number of masks other
        than one, or a prompt that is too long.
    """
    from alto_jax.batch import PromptBatch

    if templates not in ("first", "all", "keep"):
        raise ValueError(f"templates: expected 'first', 'all' or 'keep', got {templates!r}")

    def transform(index: int, record: Mapping[str, Any]) -> dict[str, np.ndarray]:
        key, image, masks = record["key"], record["image"], record["masks"]
        if len(masks) != 1:
            raise ValueError(f"record {key}: expected one mask, got {len(masks)}")
        pixel_image = record["pixel_image"] if record.get("prepared") else image
        if record.get("prepared"):
            sizes = {"vision_size": (image, vision_size), "image_size": (pixel_image, image_size)}
            _check_prepared(key, sizes | {"mask_size": (masks[0], mask_size)})
        else:
            _check_sizes(key, image, masks[0])
        question = grpo_question(record, {"first": 0, "all": index, "keep": None}[templates])
        ids = text.render_prompt(tok, question, num_image_tokens, system=system, answer_prefix=answer_prefix)
        padding = max_prompt_length - len(ids)
        if padding < 0:
            raise ValueError(f"record {key}: {len(ids)} prompt tokens, but max_prompt_length is {max_prompt_length}")
        prepared = bool(record.get("prepared"))
        small, large = (image, pixel_image) if prepared else transforms.squash_all(image, vision_size, image_size)
        return {
            "image": small,
            "pixel_image": large,
            "prompt_ids": np.array([tok.ids.pad] * padding + list(ids), np.int32),
            "prompt_mask": np.arange(max_prompt_length) >= padding,
            "mask": transforms.soft_mask(masks[0], mask_size),
        }

    examples = Examples(source, transform, max_bad_records, max_bad_fraction)
    return batches(examples, lambda e: PromptBatch(**_stack(e)), batch_size=batch_size, seed=seed, **options)


def _stack(examples: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([e[name] for e in examples]) for name in examples[0]}


def _check_prepared(key: str, arrays: Mapping[str, tuple[np.ndarray, int]]) -> None:
    for name, (array, size) in arrays.items():
        if array.shape[:2] != (size, size):
            raise ValueError(
                f"record {key}: prepared with {name} {array.shape[1]}x{array.shape[0]}, the model wants {size}x{size}; "
                "prepare the data set for this model"
            )


def _check_sizes(key: str, image: np.ndarray, mask: np.ndarray) -> None:
    transforms.check_size(image, f"of record {key}")
    if image.shape[:2] != mask.shape:
        raise ValueError(
            f"record {key}: the image is {image.shape[1]}x{image.shape[0]}, "
            f"but a mask is {mask.shape[1]}x{mask.shape[0]}"
        )
