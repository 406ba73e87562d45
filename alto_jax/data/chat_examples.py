"""Rows of batches of stages 0, 2 and 3: ChatRecords with their text tokenised, their images and masks resized.

In: ChatRecords {"key", "image" (None: text alone), "masks", "conversations"}, with several images also "images", all of
them (`image` is the first). Out: what `pipeline.py` stacks to batches. Prepared records are taken as they are.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alto_jax.data import images, tiles, transforms
from alto_jax.data.bad_data import RecordError
from alto_jax.data.examples import check_not_empty, check_prepared, check_sizes
from alto_jax.mllm import text


def chat_text(
    record: Mapping[str, Any],
    tok: text.TextTokenizer,
    *,
    max_length: int,
    num_image_tokens: int,
    num_latent_tokens: int,
    max_masks: int,
    system: str | None,
    num_tiles: Sequence[int] | None = None,
) -> tuple[list[int], list[int]]:
    """The ids and labels of a ChatRecord, unpadded; needs its "key" and "conversations" alone.

    The text has `num_image_tokens` image tokens, or none if the record has "image": None; with `num_tiles`, those of
    each image, so many times as many. Without masks, it is cut at `max_length`, as in InternVL's training.

    Raises:
      ValueError: text with masks longer than `max_length`, no answer in what is left, or too many masks; the message
        names the record.
    """
    try:
        turns = [
            {**turn, "value": text.resize_placeholders(turn["value"], num_latent_tokens)}
            for turn in record["conversations"]
        ]
        if num_tiles is None:
            num_tiles = (1,) if record.get("image", True) is not None else ()
        image_tokens = [num_image_tokens * number for number in num_tiles]
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
    max_tiles: int = 1,
    max_images: int = 1,
) -> dict[str, np.ndarray]:
    """One example of stage 2: the fields of ChatBatch without their batch axis.

    With more than one of `max_tiles` or `max_images`, image is uint8[n, V, V, 3], the tiles that this record has.

    Raises:
      ValueError: text longer than `max_length`, more images than `max_images`, an empty mask, or masks that do not
        match their placeholders in number or the image in size; the message names the record.
    """
    key, image, masks = record["key"], record["image"], record["masks"]
    shown = tiles.images_of(record)
    if len(shown) > max_images:
        raise _unfit(key, f"{len(shown)} images, but max_images is {max_images}")
    if masks and len(shown) > 1:
        raise _unfit(key, f"{len(shown)} images and a mask; a mask belongs to one image")
    parts = _tiles(record, shown, max_tiles, vision_size) if max_tiles > 1 or max_images > 1 else None
    ids, labels = chat_text(
        record,
        tok,
        max_length=max_length,
        num_image_tokens=num_image_tokens,
        num_latent_tokens=num_latent_tokens,
        max_masks=max_masks,
        system=system,
        num_tiles=None if parts is None else [len(part) for part in parts],
    )
    placeholders = ids.count(tok.ids.mask_start)
    if placeholders != len(masks):
        raise _unfit(key, f"{len(masks)} masks, but {placeholders} mask placeholders in the text")
    padding = max_length - len(ids)
    prepared = bool(record.get("prepared"))
    if prepared:
        check_prepared(key, {f"mask {i}": (mask, mask_size) for i, mask in enumerate(masks)})
    if parts is None or masks or not parts:
        seen = _images(record, vision_size, image_size)
    else:  # Note: nobody asks for the pixels of an image without masks.
        seen = {"pixel_image": np.zeros((image_size, image_size, 3), np.uint8)}
    if parts is not None:
        seen["image"] = np.concatenate(parts) if parts else seen["image"][None]
    example = seen | {
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
        check_prepared(key, {"mask_size": (masks[0], mask_size)})
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


def _tiles(
    record: Mapping[str, Any], shown: Sequence[np.ndarray], max_tiles: int, vision_size: int
) -> list[np.ndarray]:
    """The tiles of each image of a ChatRecord, uint8[n, V, V, 3]."""
    key = record["key"]
    if record.get("prepared"):
        raise ValueError(f"record {key}: prepared at one tile; tiles are cut from the images themselves")
    for image in shown:
        images.check_size(image, f"of record {key}")
    has_tiles = tiles.has_tiles(record["conversations"], len(record["masks"]))
    return tiles.cut(shown, max_tiles if has_tiles else 1, vision_size)


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
        check_prepared(record["key"], sizes)
        return {"image": image, "features": record["features"]}
    check_prepared(record["key"], sizes | {"image_size": (record["pixel_image"], image_size)})
    return {"image": image, "pixel_image": record["pixel_image"]}
