"""Images in a conversation: each `<image>` becomes the image tokens of the image whose turn it is.

An image of several tiles is one `<image>`: its tiles' tokens follow each other between `<img>` and `</img>`, as in
InternVL 2.5.
"""

from collections.abc import Iterator, Mapping, Sequence
import functools
import re

IMAGE = "<image>"  # Where an image stands in a conversation; never a token.
IMG, IMG_END, IMG_CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"


@functools.lru_cache(maxsize=64)
def image_text(num_image_tokens: int) -> str:
    """Returns what `<image>` becomes: `<img>`, `num_image_tokens` x `<IMG_CONTEXT>`, `</img>`."""
    return IMG + IMG_CONTEXT * num_image_tokens + IMG_END


def image_prefix(count: int) -> str:
    """Returns what stands in front of a question about `count` images that does not say where they are."""
    if count < 2:
        return f"{IMAGE}\n" * count
    return "".join(f"Image-{number}: {IMAGE}\n" for number in range(1, count + 1))


def place_images(turns: Sequence[Mapping[str, str]], num_image_tokens: int | Sequence[int]) -> list[dict[str, str]]:
    """Returns the turns with the image tokens in place of each `<image>`, in order.

    Where no turn has an `<image>`, `image_prefix` is put in front of the first human turn.

    Args:
      turns: `{"from", "value"}`, already checked (literals.check_turn); `<image>` stands in human turns alone.
      num_image_tokens: of the image, or of each of several; 0 or (): text only.

    Raises:
      ValueError: another number of `<image>` than of images.
    """
    several = num_image_tokens
    if isinstance(several, int):
        several = (several,) if several else ()
    found = [dict(turn) for turn in turns]
    count = sum(turn["value"].count(IMAGE) for turn in found)
    if len(several) < 2 and count > 1:
        raise ValueError(f"conversations: expected at most one {IMAGE}, got {count}")
    if count and not several:
        raise ValueError(f"conversations: {IMAGE} stands in the text, but there is no image")
    if count not in (0, len(several)):
        raise ValueError(f"conversations: expected one {IMAGE} for each of the {len(several)} images, got {count}")
    if several and not count:
        first = next((turn for turn in found if turn["from"] == "human"), None)
        if first is not None:
            first["value"] = image_prefix(len(several)) + first["value"]
    tokens: Iterator[int] = iter(several)
    for turn in found:
        turn["value"] = re.sub(IMAGE, lambda _: image_text(next(tokens)), turn["value"])
    return found
