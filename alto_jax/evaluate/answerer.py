"""Prompts in, answers out: with a mask each, or in words."""

from typing import Any

import jax
import numpy as np

from alto_jax.batch import PromptBatch
from alto_jax.data import images, transforms
from alto_jax.evaluate.device import Answers, Programs
from alto_jax.layers import apply_module
from alto_jax.mllm import text as words
from alto_jax.mllm.alto_llm import ALToLLM, ModelConfig, segment
from alto_jax.mllm.generate import GenerateConfig, bucket_length, generate
from alto_jax.mllm.language_model import LanguageModel
from alto_jax.parallel import distributed


class Answerer:
    """A model with its text tokenizer, as the tasks of an evaluation ask it."""

    def __init__(self, cfg: ModelConfig, params: dict, text: Any, system: str | None, programs: Programs):
        self.cfg, self.params, self.text, self.system, self._programs = cfg, params, text, system, programs

    def example(self, record: dict[str, Any], *, prefix: str = "", **questions: str) -> dict[str, Any]:
        """Images and prompt ids (a list a question) of a record; `prefix` begins the answer to the "prompt"."""
        image, size = record["image"], self.cfg
        images.check_size(image, f"of record {record['key']}")
        example = {"image": transforms.squash(image, size.need_vision().image_size), "key": record["key"]}
        example["image_name"] = record.get("image_name", record["key"])
        example["pixel_image"] = transforms.squash(record.get("pixel_image", image), size.tokenizer.image_size)
        for name, question in questions.items():
            begin = prefix if name == "prompt" else ""
            example[name] = words.render_prompt(
                self.text, question, size.num_image_tokens, system=self.system, answer_prefix=begin
            )
        return example

    def batch(self, examples: list[dict], name: str) -> PromptBatch:
        """The prompts `name` of examples, left padded to a common length of all processes."""
        longest = max(len(e[name]) for e in examples)
        length = bucket_length(max(distributed.gather(longest)))  # Note: all processes must come to the same shape.
        pad, size = self.text.ids.pad, self.cfg.tokenizer.mask_size
        return PromptBatch(
            image=np.stack([e["image"] for e in examples]),
            pixel_image=np.stack([e["pixel_image"] for e in examples]),
            prompt_ids=np.array([[pad] * (length - len(e[name])) + e[name] for e in examples], np.int32),
            prompt_mask=np.array([np.arange(length) >= length - len(e[name]) for e in examples]),
            mask=np.zeros((len(examples), size, size), np.float32),
        )

    def segment(self, batch: PromptBatch, config: GenerateConfig) -> Answers:
        """Of this process's rows: probability [B, h, w], length and valid of the first mask, num_masks, ids, mask."""

        def run(params: dict, batch: PromptBatch) -> dict[str, jax.Array]:
            found = segment(self.cfg, params, batch, config, self.text.ids, jax.random.key(0))
            return {
                "probability": jax.nn.sigmoid(found.mask_logits),
                "ids": found.generated.ids,
                "mask": found.generated.mask,
                "length": found.length,
                "valid": found.valid,
                "num_masks": found.masks.num_masks,
            }

        return self._programs(("segment", config), run, self.params, batch)

    def answer(self, batch: PromptBatch, config: GenerateConfig) -> Answers:
        """Ids and mask of answers in words."""

        def run(params: dict, batch: PromptBatch) -> dict[str, jax.Array]:
            model = ALToLLM(self.cfg)
            tokens = apply_module(model, params, batch.image, method="image_tokens")
            inputs = apply_module(model, params, batch.prompt_ids, tokens, self.text.ids.img_context, method="embed")
            language = LanguageModel(self.cfg.need_language_model()), params["language_model"]
            found = generate(*language, inputs, batch.prompt_mask, config, self.text.ids, jax.random.key(0))
            return {"ids": found.ids, "mask": found.mask}

        return self._programs(("answer", config), run, self.params, batch)

    def words(self, found: dict[str, np.ndarray], row: int) -> str:
        """The answer of a row as text."""
        return words.answer_text(self.text, found["ids"][row][found["mask"][row]].tolist())
