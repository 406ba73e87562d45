"""Prompts in, answers out: with a mask each, or in words."""

from typing import Any

import jax
import numpy as np

from alto_jax.batch import PromptBatch
from alto_jax.data import images, tiles, transforms
from alto_jax.evaluate.device import Answers, Programs
from alto_jax.mllm import text as words
from alto_jax.mllm.alto_llm import ModelConfig, segment
from alto_jax.mllm.answers import answer
from alto_jax.mllm.generate import GenerateConfig, bucket_length
from alto_jax.parallel import distributed


class Answerer:
    """A model with its text tokenizer, as the tasks of an evaluation ask it."""

    def __init__(self, cfg: ModelConfig, params: dict, text: Any, system: str | None, programs: Programs):
        self.cfg, self.params, self.text, self.system, self.programs = cfg, params, text, system, programs

    def example(
        self, record: dict[str, Any], *, prefix: str = "", max_tiles: int = 1, **questions: str
    ) -> dict[str, Any]:
        """Images and prompt ids (a list a question) of a record; `prefix` begins the answer to the "prompt".

        With `max_tiles` above 1 the image is in tiles, uint8[n, V, V, 3], for answers in words.
        """
        image, size = record["image"], self.cfg
        images.check_size(image, f"of record {record['key']}")
        example = {"image": transforms.squash(image, size.need_vision().image_size), "key": record["key"]}
        example["image_name"] = record.get("image_name", record["key"])
        example["pixel_image"] = transforms.squash(record.get("pixel_image", image), size.tokenizer.image_size)
        num_tokens = size.num_image_tokens
        if max_tiles > 1:
            [example["image"]] = tiles.cut([image], max_tiles, size.need_vision().image_size)
            num_tokens *= len(example["image"])
        for name, question in questions.items():
            begin = prefix if name == "prompt" else ""
            example[name] = words.render_prompt(
                self.text, question, num_tokens, system=self.system, answer_prefix=begin
            )
        return example

    def batch(self, examples: list[dict], name: str, max_tiles: int = 1) -> PromptBatch:
        """The prompts `name` of examples, left padded to a common length of all processes; likewise their tiles."""
        longest = max(len(e[name]) for e in examples)
        length = bucket_length(max(distributed.gather(longest)))  # Note: all processes must come to the same shape.
        pad, size = self.text.ids.pad, self.cfg.tokenizer.mask_size
        shown = [e["image"] for e in examples]
        if max_tiles > 1:
            slots = tiles.slots_for(distributed.gather(max(map(len, shown))), tiles.most_slots(max_tiles))
            shown = [tiles.padded(image, slots) for image in shown]
        return PromptBatch(
            image=np.stack(shown),
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

        return self.programs(("segment", config), run, self.params, batch)

    def answer(self, batch: PromptBatch, config: GenerateConfig) -> Answers:
        """Ids and mask of answers in words."""

        def run(params: dict, batch: PromptBatch) -> dict[str, jax.Array]:
            found = answer(self.cfg, params, batch, config, self.text.ids, jax.random.key(0))
            return {"ids": found.ids, "mask": found.mask}

        return self.programs(("answer", config), run, self.params, batch)

    def words(self, found: dict[str, np.ndarray], row: int) -> str:
        """The answer of a row as text."""
        return words.answer_text(self.text, found["ids"][row][found["mask"][row]].tolist())
