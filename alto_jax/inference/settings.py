"""How a request is answered: the options of a call, checked, and the wording of its question."""

import dataclasses
import math
import numbers
from typing import Any

from alto_jax.inference.tokenizer import is_whole, token_count
from alto_jax.mllm import boxes as box_text
from alto_jax.mllm import text as words
from alto_jax.mllm.generate import GenerateConfig


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a request is answered, whether the answer's start is forced, and whether all mask tokens are asked for."""

    generate: GenerateConfig
    forced: bool
    fixed: bool

    @classmethod
    def of(cls, num_tokens: int, prompt: str | None, options: dict[str, Any]) -> "Settings":
        """The options of `Segmenter.segment_batch`, checked.

        Args:
          num_tokens: mask tokens of the model.
          prompt: the whole question, or None: the built-in wording, whose answer's start is forced by default.
          options: by name.

        Raises:
          TypeError: an unknown option.
          ValueError: one of a wrong value.
        """
        default = {"length": "adaptive", "max_new_tokens": None, "min_length": 1, "max_length": None, "end_bias": 0.0,
                   "forced_prefix": None}  # fmt: skip
        if unknown := options.keys() - default.keys():
            raise TypeError(f"segment() got an unexpected keyword argument {min(unknown)!r}")
        given = default | options
        if prompt is not None and not (isinstance(prompt, str) and prompt.strip()):
            raise ValueError(f"prompt: expected a question, got {prompt!r}")
        exact = token_count(given["length"], num_tokens)
        limits = {"max_new_tokens": 1 << 16, "min_length": num_tokens, "max_length": num_tokens}
        for name, most in limits.items():
            if given[name] is not None and not is_whole(given[name], 1, most):
                raise ValueError(f"{name}: expected a whole number in 1..{most}, got {given[name]!r}")
        if not isinstance(given["end_bias"], numbers.Real) or not math.isfinite(given["end_bias"]):
            raise ValueError(f"end_bias: expected a finite number, got {given['end_bias']!r}")
        forced = prompt is None if given["forced_prefix"] is None else bool(given["forced_prefix"])
        longest = num_tokens + (1 if forced else 32)
        generate = GenerateConfig(
            max_new_tokens=longest if given["max_new_tokens"] is None else int(given["max_new_tokens"]),
            grammar=True,
            min_length=int(given["min_length"]),
            max_length=num_tokens if given["max_length"] is None else int(given["max_length"]),
            forced_length=exact,
            end_logit_bias=float(given["end_bias"]),
            stop_at_mask_end=forced,
        )
        return cls(generate, forced, given["length"] == "full")

    def question(self, phrase: str) -> str:
        """The built-in wording of a request.

        Raises:
          ValueError: no object named.
        """
        if not isinstance(phrase, str) or not any(c.isalnum() for c in phrase):
            raise ValueError(f"text: expected the name or description of an object, got {phrase!r:.80}")
        return words.question(phrase, adaptive=not self.fixed)


def box_phrase(boxes: Any, size: tuple[int, int], step: int) -> str:
    """Boxes as the model reads them.

    Args:
      boxes: (x1, y1, x2, y2) each, in pixels.
      size: (height, width) of the image.
      step: coordinates are rounded to multiples of so many thousandths.

    Raises:
      ValueError: none, or one that is not inside of the image.
    """
    height, width = size
    corners = []
    try:
        given = [(box, tuple(map(float, box))) for box in boxes]
    except (TypeError, ValueError) as error:
        message = f"boxes: expected a list of boxes (x1, y1, x2, y2), got {boxes!r:.80}"
        raise ValueError(message) from error
    for box, four in given:
        x1, y1, x2, y2 = four if len(four) == 4 else (0, 0, 0, 0)
        if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
            raise ValueError(f"boxes: expected x1 < x2 <= {width} and y1 < y2 <= {height} in pixels, got {box!r}")
        corners.append((x1, y1, x2 - x1, y2 - y1))
    return box_text.format_boxes(corners, size, step)
