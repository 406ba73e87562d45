"""How a request is answered: the options of a call, checked, and the wording of its question."""

import dataclasses
import math
from typing import Any

from alto_jax.inference.tokenizer import is_whole, token_count
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
        if prompt is not None and not prompt.strip():
            raise ValueError(f"prompt: expected a question, got {prompt!r}")
        exact = token_count(given["length"], num_tokens)
        limits = {"max_new_tokens": 1 << 16, "min_length": num_tokens, "max_length": num_tokens}
        for name, most in limits.items():
            if given[name] is not None and not is_whole(given[name], 1, most):
                raise ValueError(f"{name}: expected a whole number in 1..{most}, got {given[name]!r}")
        if not math.isfinite(given["end_bias"]):
            raise ValueError(f"end_bias: expected a finite number, got {given['end_bias']!r}")
        forced = prompt is None if given["forced_prefix"] is None else bool(given["forced_prefix"])
        longest = num_tokens + (1 if forced else 32)
        generate = GenerateConfig(
            max_new_tokens=longest if given["max_new_tokens"] is None else int(given["max_new_tokens"]),
            grammar=True,
            min_length=int(given["min_length"]),
            max_length=num_tokens if given["max_length"] is None else int(given["max_length"]),
            forced_length=exact,
            end_logit_bias=given["end_bias"],
            stop_at_mask_end=forced,
        )
        return cls(generate, forced, given["length"] == "full")

    def question(self, phrase: str) -> str:
        """The built-in wording of a request.

        Raises:
          ValueError: no object named.
        """
        if not any(c.isalnum() for c in phrase):
            raise ValueError(f"text: expected the name or description of an object, got {phrase!r}")
        return words.question(phrase, adaptive=not self.fixed)
