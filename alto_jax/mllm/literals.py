"""Special tokens that stand written out in what people and model say, where they would be read as more than text."""

from typing import Any


def check_turn(tok: Any, speaker: str, value: str) -> None:
    """Refuses text that the tokenizer would read as more than text.

    `<IMG_CONTEXT>` in a request would take an image feature and shift the others, `<|im_end|>` end the turn. References
    and boxes (text.MARKUP) are allowed, and but for the system message masks: `<ALTo_Start>`, codes, `<ALTo_End>`.

    Args:
      tok: the text.TextTokenizer, which decides what a special token is.
      speaker: "system", "human" or "gpt".
      value: the turn as it is written, without the template.

    Raises:
      ValueError: a special token where none belongs; the message quotes it.
    """
    special, codes = tok.ids, -1  # Codes since the mask began; -1: outside a mask.
    for i in tok.encode(value):
        in_mask = codes >= 0
        if in_mask and special.code_0 <= i < special.code_0 + special.num_codes:
            codes += 1
        elif in_mask and codes > 0 and i == special.mask_end:
            codes = -1
        elif not in_mask and i == special.mask_start and speaker != "system":
            codes = 0
        elif in_mask or i in tok.reserved_ids:
            where = "inside a mask, where only codes belong" if in_mask else f"in a {speaker} turn, as text"
            raise ValueError(f"conversation: {tok.decode([i])!r} stands {where}: {value[:80]!r}")
    if codes >= 0:
        raise ValueError(f"conversation: a mask begins and does not end in the {speaker} turn {value[:80]!r}")
