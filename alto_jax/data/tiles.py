"""The tiles of questions: an image in up to 12 squares and a thumbnail, as InternVL 2.5 sees it; several images too.

A conversation with masks, or one that asks about a `<ref>` or `<box>`, stays at one tile (the paper's mask path): what
is asked must not show by the number of tiles whether there is a mask in the answer. All others have tiles, up to
`max_tiles` for all images together, and a thumbnail of each image of more than one.

Shapes: the tiles of a conversation lie in slots uint8[N, V, V, 3], zeros behind the last one. N is one of few numbers
(`slot_counts`), the smallest that holds every conversation of a batch, so that few programs are compiled.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from alto_jax.data import transforms
from alto_jax.mllm import text


def most_slots(max_tiles: int, max_images: int = 1) -> int:
    """The most tiles, thumbnails included, that a conversation of up to `max_images` images has."""
    each = (max(max_tiles // images, 1) for images in range(1, max_images + 1))
    return max(images * (tiles + (tiles > 1)) for images, tiles in enumerate(each, 1))


def slot_counts(most: int) -> list[int]:
    """The numbers of slots that a batch may have, rising: `most`, half of it, a quarter …, 1."""
    counts = [most]
    while counts[-1] > 1:
        counts.append(-(-counts[-1] // 2))
    return counts[::-1]


def slots_for(numbers: Iterable[int], most: int) -> int:
    """The slots of a batch whose conversations have these numbers of tiles."""
    longest = max(numbers)
    return next(count for count in slot_counts(most) if count >= longest)


def has_tiles(conversations: Sequence[Mapping[str, str]], num_masks: int) -> bool:
    """Whether the images of a conversation are cut to tiles, see the module."""
    asked = (turn["value"] for turn in conversations if turn["from"] == "human")
    return num_masks == 0 and not any(mark in said for said in asked for mark in (text.REF, text.BOX))


def images_of(record: Mapping[str, Any]) -> list[np.ndarray]:
    """The images of a ChatRecord, in order: none, `image`, or all of `images`."""
    if record.get("images") is not None:
        return list(record["images"])
    return [] if record["image"] is None else [record["image"]]


def cut(images: Sequence[np.ndarray], max_tiles: int, size: int) -> list[np.ndarray]:
    """The tiles of each image, with its thumbnail last: [uint8[H, W, 3], …] → [uint8[n, size, size, 3], …].

    Several images share `max_tiles`, as in InternVL 2.5's training; each has one at least.
    """
    each = max(max_tiles // max(len(images), 1), 1)
    return [transforms.tiles(image, each, size, thumbnail=True) for image in images]


def padded(tiles: np.ndarray, slots: int) -> np.ndarray:
    """uint8[n, V, V, 3] → uint8[slots, V, V, 3], zeros behind."""
    return np.concatenate([tiles, np.zeros((slots - len(tiles), *tiles.shape[1:]), tiles.dtype)])
