"""From record sources to batches, with Grain: shuffled, repeated, sliced over hosts, exactly resumable.

In: any random-access source (`len`, `[]`) of MaskRecords or ChatRecords. Out: a `grain.IterDataset` of
MaskBatch, ChatBatch or PromptBatch. Its iterator has `get_state()` and `set_state(state)`; after
`set_state` the same batches follow as after `get_state`. The stream is a function of the source, the seed
and the arguments; a process gets the rows of its `BatchShare` of every batch, so that the global batch is the same,
row by row, whatever mesh and processes are. A state counts batches: one that any process saved may be given to
every process of another number of them, and the same batches follow.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any, Literal

import numpy as np

from alto_jax.data import tiles
from alto_jax.data.chat_examples import chat_example, chat_text, prompt_example
from alto_jax.data.examples import Examples, mask_fields
from alto_jax.data.source import HasConversations, Records, Source
from alto_jax.mllm import text
from alto_jax.parallel.shares import WHOLE, BatchShare


def batches(
    examples: Examples | Source[Any],
    make_batch: Callable[[Sequence[Any]], Any],
    *,
    batch_size: int,
    seed: int,
    num_epochs: int | None = None,
    shuffle: bool = True,
    drop_remainder: bool = True,
    share: BatchShare = WHOLE,
    prefetch: int = 4,
    allow_changed: bool = False,
) -> Any:
    """The common part: shuffle, repeat, slice, batch, prefetch.

    Args:
      examples: random access to examples; `Examples` are read by their threads or processes, others by the caller.
      make_batch: makes a batch of a list of examples.
      batch_size: examples in a batch over all processes.
      seed: of the shuffling, which differs from epoch to epoch.
      num_epochs: None for an endless stream.
      shuffle: whether to shuffle.
      drop_remainder: leave out a last batch that is not full; several processes cannot share one.
      share: the rows of each batch that this process reads.
      prefetch: batches kept ready where the examples have threads or processes.
      allow_changed: see `Stream`.

    Returns:
      A grain.IterDataset, see `Stream`.

    Raises:
      ValueError: a batch size that does not divide among the devices, or too few examples for a batch.
    """
    import grain  # late: readers and their processes run without JAX, which Grain brings

    from alto_jax.data.stream import Numbers, Stream

    rows = share.rows(batch_size)
    if not share.is_whole and not drop_remainder:
        raise ValueError(f"drop_remainder: expected True with {share.num_processes} processes, got False")
    examples = examples if isinstance(examples, Examples) else Examples(examples, lambda _, example: example)
    if num_epochs is not None and drop_remainder and len(examples) * num_epochs < batch_size:
        raise ValueError(f"batch_size: {batch_size} is more than the {len(examples)} records of {num_epochs} epochs")
    dataset = Numbers(len(examples)).seed(seed)
    if shuffle:
        dataset = dataset.shuffle()
    dataset = dataset.repeat(num_epochs)
    if not share.is_whole:
        own = functools.partial(_own_row, dataset, batch_size, rows)
        dataset = grain.MapDataset.range(len(dataset) // batch_size * len(rows)).map(own)
    made = lambda numbers: make_batch(examples.many(numbers))
    dataset = dataset.batch(len(rows), drop_remainder=drop_remainder, batch_fn=made)
    # Note: the examples' threads and processes read; these here put batches together, one while the other waits.
    num_threads, prefetch = (2, prefetch) if examples.num_threads else (0, 0)
    dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch))
    return Stream(dataset, examples, allow_changed=allow_changed)


def _examples(
    source: Source, transform: Callable[[int, Any], Any], options: Mapping[str, Any]
) -> tuple[Examples, dict[str, Any]]:
    """The examples that the options ask for, and the options that are left."""
    own = ("max_bad_records", "max_bad_fraction", "num_threads", "num_workers", "kept_bytes")
    examples = Examples(source, transform, **{"num_threads": 4} | {k: v for k, v in options.items() if k in own})
    return examples, {k: v for k, v in options.items() if k not in own}


def _own_row(stream: Any, batch_size: int, rows: np.ndarray, index: int) -> Any:
    """Element `index` of the rows of this process, of which every batch of the stream has some."""
    batch, place = divmod(index, len(rows))
    return stream[batch * batch_size + int(rows[place])]


def mask_batches(
    source: Records,
    *,
    image_size: int,
    mask_size: int,
    batch_size: int,
    seed: int,
    **options: Any,
) -> Any:
    """Batches of stages 1 and 1.5.

    Args:
      source: MaskRecords.
      image_size, mask_size: sides of the images and masks in the batch, in pixels.
      batch_size, seed: see `batches`.
      **options: num_epochs, shuffle, drop_remainder, share, prefetch and allow_changed of `batches`;
        max_bad_records, max_bad_fraction, num_threads (4 by default), num_workers and kept_bytes of `Examples`.

    Returns:
      A grain.IterDataset of MaskBatch.
    """
    from alto_jax.batch import MaskBatch  # late: readers and their processes run without JAX

    transform = lambda _, record: mask_fields(record, image_size, mask_size)
    examples, options = _examples(source, transform, options)
    make_batch = lambda rows: MaskBatch(**{"image": None} | _stack(rows))
    return batches(examples, make_batch, batch_size=batch_size, seed=seed, **options)


def chat_batches(
    source: Records,
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
    pack_samples: int = 1,
    max_tiles: int = 1,
    max_images: int = 1,
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
      max_masks: mask slots of a conversation.
      batch_size, seed: see `batches`.
      system: the system message; None leaves it out.
      length_buckets: a batch is cut to the shortest of these lengths that all its rows fit in; with several
        processes, which must agree on a shape without asking each other, it stays at max_length.
      pack_samples: up to so many conversations share a row, see packing.py; more than 1 makes endless, shuffled
        batches and takes no length_buckets.
      max_tiles, max_images: tiles of a conversation without masks, and images of one at most, see tiles.py; more than 1
        of either gives images an axis of slots, as many as the batch needs (with several processes: as it may need).
      **options: as in `mask_batches`.

    Returns:
      A grain.IterDataset of ChatBatch.
    """
    texts: dict[str, Any] = dict(
        max_length=max_length,
        num_image_tokens=num_image_tokens,
        num_latent_tokens=num_latent_tokens,
        max_masks=max_masks,
        system=system,
    )
    sizes: dict[str, Any] = dict(vision_size=vision_size, image_size=image_size, mask_size=mask_size)
    slots = tiles.most_slots(max_tiles, max_images)
    shown: dict[str, Any] = {"max_tiles": max_tiles, "max_images": max_images}
    transform = lambda _, record: chat_example(record, tok, **sizes, **texts, **shown)
    examples, options = _examples(source, transform, options)
    if pack_samples > 1:
        if max_tiles > 1 or max_images > 1:
            raise ValueError(f"max_tiles, max_images: expected 1 with pack_samples {pack_samples}, got {shown}")
        if length_buckets:
            raise ValueError(f"length_buckets: expected () with pack_samples {pack_samples}, got {length_buckets!r}")
        return _packed_chat_batches(examples, source, tok, texts, pack_samples, batch_size, seed, options)
    # Note: processes see different rows, and must come to the same shape.
    is_alone = options.get("share", WHOLE).num_processes == 1
    buckets = sorted({*length_buckets, max_length}) if is_alone else [max_length]

    from alto_jax.batch import ChatBatch  # late: readers and their processes run without JAX

    def make_batch(rows: Sequence[dict[str, np.ndarray]]) -> ChatBatch:
        if max_tiles > 1 or max_images > 1:
            number = tiles.slots_for([len(row["image"]) for row in rows], slots) if is_alone else slots
            rows = [row | {"image": tiles.padded(row["image"], number)} for row in rows]
        batch = _stack(rows)
        longest = int(batch["text_mask"].sum(1).max())
        length = next(bucket for bucket in buckets if bucket >= longest)
        cut = {name: batch[name][:, :length] for name in ("ids", "labels", "text_mask")}
        return ChatBatch(**{"pixel_image": None} | batch | cut)

    return batches(examples, make_batch, batch_size=batch_size, seed=seed, **options)


def _packed_chat_batches(
    examples: Examples,
    source: Records,
    tok: text.TextTokenizer,
    texts: Mapping[str, Any],
    pack_samples: int,
    batch_size: int,
    seed: int,
    options: Mapping[str, Any],
) -> Any:
    """Packed batches of stage 2; `texts` are the options of `chat_text`."""
    from alto_jax.data import packing  # late: as in `batches`
    from alto_jax.data.stream import Stream

    conversation = source.conversation if isinstance(source, HasConversations) else source.__getitem__

    def measure(number: int) -> int | None:
        index = number % len(source)
        try:
            return len(chat_text(conversation(index), tok, **texts)[0])
        except (ValueError, OSError) as error:
            examples.bad.add(index, error)
            return None

    @functools.cache
    def blank() -> dict[str, np.ndarray]:
        shapes = {name: np.zeros_like(value) for name, value in examples[0].items()}
        fills = {"ids": tok.ids.pad, "labels": text.IGNORE}
        return shapes | {name: np.full_like(shapes[name], fill) for name, fill in fills.items()}

    from alto_jax.batch import ChatBatch  # late: readers and their processes run without JAX

    def make_batch(rows: Sequence[Sequence[dict[str, np.ndarray]]]) -> ChatBatch:
        packed = [packing.pack_row(row, blank(), pack_samples, tok.ids.img_context) for row in rows]
        return ChatBatch(**{"pixel_image": None} | _stack(packed))

    allow_changed = bool(options.get("allow_changed", False))
    options = {name: value for name, value in options.items() if name != "allow_changed"}
    packed = packing.Packed(
        examples,
        measure if isinstance(source, HasConversations) else None,
        make_batch,
        num_rows=batch_size,
        max_length=texts["max_length"],
        max_segments=pack_samples,
        seed=seed,
        **options,
    )
    return Stream(packed, examples, allow_changed=allow_changed)


def prompt_batches(
    source: Records,
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
    are_named: bool = False,
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
        i + e mod 7 in epoch e; "keep": the human turn as it stands.
      are_named: batches say which record each prompt is (`record`, `key`).
      **options: as in `mask_batches`.

    Returns:
      A grain.IterDataset of PromptBatch.

    Raises:
      ValueError: an unknown `templates`; later, naming the record: no reference, a number of masks other
        than one, or a prompt that is too long.
    """
    if templates not in ("first", "all", "keep"):
        raise ValueError(f"templates: expected 'first', 'all' or 'keep', got {templates!r}")

    length = len(source)

    def transform(number: int, record: Mapping[str, Any]) -> dict[str, np.ndarray]:
        epoch, index = divmod(number, length)
        example = prompt_example(
            record,
            tok,
            vision_size=vision_size,
            image_size=image_size,
            mask_size=mask_size,
            max_prompt_length=max_prompt_length,
            num_image_tokens=num_image_tokens,
            system=system,
            answer_prefix=answer_prefix,
            template={"first": 0, "all": index + epoch, "keep": None}[templates],
        )
        return example | ({"record": np.int32(index), "key": record["key"]} if are_named else {})

    from alto_jax.batch import PromptBatch, key_row  # late: readers and their processes run without JAX

    examples, options = _examples(source, transform, options)

    def make_batch(rows: Sequence[dict[str, Any]]) -> PromptBatch:
        rows = [row | {"key": key_row(row["key"])} for row in rows] if are_named else rows
        return PromptBatch(**{"pixel_image": None} | _stack(rows))

    return batches(examples, make_batch, batch_size=batch_size, seed=seed, **options)


def _stack(examples: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([e[name] for e in examples]) for name in examples[0]}
