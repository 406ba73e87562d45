"""The batches that travel from the data to the losses, and the legend of dimension letters.

B batch, G samples of a group, J conversations of a packed row, H W mask pixels, S pixels of the SAM image
side, V pixels of the MLLM image side (in shapes of images; elsewhere V is the vocabulary), P prompt tokens,
T text tokens, L mask tokens, M masks of a sample, N heads, K key/value heads, D width, C codebook.

Numpy arrays on the host, jax arrays (sharded over the batch) on the device. Images stay uint8 until
they are inside the jitted step.
"""

from typing import Any

from flax import struct
import numpy as np

Array = Any
KEY_BYTES = 96  # of a record's key in a batch


def key_row(key: str) -> np.ndarray:
    """A record's key as uint8[KEY_BYTES]: UTF-8 with zeros behind it; of one that is longer "…" and its end."""
    text = key.encode("utf-8", "surrogateescape")
    if len(text) > KEY_BYTES:
        mark = "…".encode()
        text = mark + text[len(mark) - KEY_BYTES :]
    return np.frombuffer(text.ljust(KEY_BYTES, b"\0"), np.uint8)


def key_of(row: np.ndarray) -> str:
    """The key of a `key_row`."""
    return row.tobytes().rstrip(b"\0").decode("utf-8", "replace")


@struct.dataclass
class MaskBatch:
    """Stages 1 and 1.5: image uint8[B, S, S, 3] RGB; mask float32[B, H, W] in 0..1.

    features bfloat16[B, s*g, s*g, F]: the SAM features where they are cached (data/caches.py); image is None then.
    """

    image: Array | None
    mask: Array
    features: Array | None = None


@struct.dataclass
class ChatBatch:
    """Stage 2: conversations with their images and masks.

    image uint8[B, V, V, 3]; pixel_image uint8[B, S, S, 3]; ids int32[B, T], right padded;
    labels int32[B, T], -100 where not supervised; text_mask bool[B, T]; masks float32[B, M, H, W] in
    0..1 in their order of appearance; mask_valid bool[B, M].

    Packed rows hold up to J conversations (data/packing.py). Then image uint8[B, J, V, V, 3] and pixel_image
    uint8[B, J, S, S, 3] are their images in order (zeros where there is none), segment_ids int32[B, T] numbers
    the conversations of a row from 1 (0: padding), and mask_image int32[B, M] is each mask's image, in 0..J-1.

    With tiles or several images (data/tiles.py) image is uint8[B, N, V, V, 3]: the tiles of a conversation in the order
    of their tokens, zeros behind them. A conversation with masks has one, and pixel_image is of it.

    Cached (data/caches.py): features bfloat16[B, s*g, s*g, F] (packed: [B, J, …]), and then pixel_image is None;
    codes int32[B, M, L] and code_lengths int32[B, M], the tokenizer's mask tokens.
    """

    image: Array
    pixel_image: Array | None
    ids: Array
    labels: Array
    text_mask: Array
    masks: Array
    mask_valid: Array
    segment_ids: Array | None = None
    mask_image: Array | None = None
    features: Array | None = None
    codes: Array | None = None
    code_lengths: Array | None = None


@struct.dataclass
class PromptBatch:
    """Stage 3 and prediction: prompt_ids int32[B, P], LEFT padded; prompt_mask bool[B, P]; mask
    float32[B, H, W] in 0..1 is the target; images and cached features as in ChatBatch (tiles: for answers in words).

    In training: record int32[B] is each prompt's place in the data set, key uint8[B, KEY_BYTES] its name (`key_of`).
    """

    image: Array
    pixel_image: Array | None
    prompt_ids: Array
    prompt_mask: Array
    mask: Array
    features: Array | None = None
    record: Array | None = None
    key: Array | None = None


@struct.dataclass
class Rollout:
    """G completions of each prompt of a PromptBatch, rewarded.

    completion_ids int32[B, G, T]; completion_mask bool[B, G, T], True up to and including the end of
    turn; old_per_token_logps and ref_per_token_logps float32[B, G, T]; advantages float32[B, G];
    rewards float32[B, G]; components: dict of float32[B, G], the parts of the reward and what else is logged.
    image_tokens float[B, I, D]: the frozen vision tower's output, computed once.
    """

    prompt: PromptBatch
    completion_ids: Array
    completion_mask: Array
    old_per_token_logps: Array
    ref_per_token_logps: Array
    advantages: Array
    rewards: Array
    components: dict
    image_tokens: Array


def abstract_batch(config: Any) -> MaskBatch | ChatBatch | PromptBatch:
    """Shapes and dtypes of the global batch that a run's data gives, without reading any.

    Args:
      config: an ExperimentConfig; rows have `config.data.max_length` tokens and as many tiles as they may have, and
        nothing is cached.
    """
    import jax  # late: keeps the start fast

    model, rows, length = config.model, config.train.batch_size, config.data.max_length
    size = model.tokenizer

    def array(dtype: str, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), np.dtype(dtype))

    pixel_image = array("uint8", size.image_size, size.image_size, 3)
    mask = (size.mask_size, size.mask_size)
    if config.stage in ("stage1", "stage1_5"):
        return MaskBatch(image=pixel_image, mask=array("float32", *mask))
    image = array("uint8", model.vision.image_size, model.vision.image_size, 3)
    packed = config.data.pack_samples if config.stage in ("stage0", "stage2") else 1
    if packed > 1:
        image, pixel_image = (array("uint8", packed, *a.shape[1:]) for a in (image, pixel_image))
    if config.data.tile_slots:
        image = array("uint8", config.data.tile_slots, *image.shape[1:])
    images = {"image": image, "pixel_image": pixel_image}
    if config.stage in ("stage0", "stage2"):
        masks = config.data.max_masks * packed
        return ChatBatch(
            **images,
            ids=array("int32", length),
            labels=array("int32", length),
            text_mask=array("bool", length),
            masks=array("float32", masks, *mask),
            mask_valid=array("bool", masks),
            segment_ids=array("int32", length) if packed > 1 else None,
            mask_image=array("int32", masks) if packed > 1 else None,
        )
    return PromptBatch(
        **images,
        prompt_ids=array("int32", length),
        prompt_mask=array("bool", length),
        mask=array("float32", *mask),
        record=array("int32"),
        key=array("uint8", KEY_BYTES),
    )
