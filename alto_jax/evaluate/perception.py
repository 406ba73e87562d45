"""Mask perception: the model is asked what a mask shows, which stands in the question as its own mask tokens."""

from typing import Any

import jax
import numpy as np

from alto_jax.data.mask_perception import MARK
from alto_jax.data.source import Records
from alto_jax.data.transforms import soft_mask
from alto_jax.evaluate import choices
from alto_jax.evaluate.answerer import Answerer
from alto_jax.evaluate.device import Answers
from alto_jax.mllm import text as words
from alto_jax.mllm.generate import GenerateConfig
from alto_jax.stages.tokenizer import tokenizer_apply
from alto_jax.tokenizer.alto import ALTo

_MAX_NEW_TOKENS = 100  # As the data set's own evaluation.


class PerceptionTask:
    """Questions with a mask in them, encoded by adaptive or fixed length, or by so many tokens."""

    family = "mask_perception"

    def __init__(self, answerer: Answerer, name: str, source: Records, read: dict[str, Any], mode: str):
        """`read`: how the source is read, and how far, for the options; mode: "adaptive", "fixed", or a number."""
        self._answerer, self.source, self._programs, self._mode = answerer, source, answerer.programs, mode
        self.benchmark, self.name = name, f"{name}.{mode}"
        self._config = GenerateConfig(max_new_tokens=_MAX_NEW_TOKENS)
        self._params = {"tokenizer": answerer.params["tokenizer"]}
        self.options = {"mode": mode, "max_new_tokens": _MAX_NEW_TOKENS, **read}

    def __len__(self) -> int:
        return len(self.source)

    def example(self, index: int) -> dict[str, Any]:
        """A question ready for the device, with its mask and label."""
        record = self.source[index]
        example = self._answerer.example(record) | {k: record[k] for k in ("question", "label", "category")}
        return example | {"mask": soft_mask(record["mask"], self._answerer.cfg.tokenizer.mask_size)}

    def blank(self) -> dict[str, Any]:
        """An example to fill a batch with."""
        size = self._answerer.cfg.tokenizer.mask_size
        example = self._answerer.example({"key": "", "image": np.zeros((8, 8, 3), np.uint8)})
        return example | {"question": MARK, "label": "", "category": "", "mask": np.ones((size, size), np.float32)}

    def answer(self, examples: list[dict]) -> Answers:
        """The answers in words, to the questions with their masks as codes; the seconds are those of both."""
        answerer, masks = self._answerer, np.stack([example["mask"] for example in examples])
        coded = self._programs("tokenize", self._tokenize, self._params, masks)
        asked = []
        for row, example in enumerate(examples):
            counts = {"adaptive": int(coded.found["length"][row]), "fixed": coded.found["codes"].shape[1]}
            count = counts[self._mode] if self._mode in counts else int(self._mode)
            codes = "".join(words.code_token(int(code)) for code in coded.found["codes"][row, :count])
            question = example["question"].replace(MARK, f"{words.MASK_START}{codes}{words.MASK_END}")
            prompt = words.render_prompt(answerer.text, question, answerer.cfg.num_image_tokens, system=answerer.system)
            asked.append({**example, "prompt": prompt})
        found = answerer.answer(answerer.batch(asked, "prompt"), self._config)
        return Answers(found.found | coded.found, found.tokens, found.seconds + coded.seconds)

    def line(self, example: dict[str, Any], answers: Answers, row: int) -> dict[str, Any]:
        """The answer to a question, and the number of tokens that its mask took."""
        line = {"key": example["key"], "image": example["image_name"]}
        line |= {k: example[k] for k in ("category", "label")}
        return line | {"answer": self._answerer.words(answers.found, row)}

    def headline(self, lines: list[dict]) -> dict[str, float]:
        """Share of right answers of a batch."""
        good = [choices.is_right(line["answer"], line["label"]) for line in lines if "answer" in line]
        return {"accuracy of batch": float(np.mean(good))} if good else {}

    def _tokenize(self, params: dict, masks: jax.Array) -> dict[str, jax.Array]:
        codes, length = tokenizer_apply(ALTo(self._answerer.cfg.tokenizer), params)(masks, method="tokenize")
        return {"codes": codes, "length": length}
