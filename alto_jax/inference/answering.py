"""Questions answered in words: about an image in tiles, about several images, after earlier turns."""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import functools
import sys
import time
from typing import Any

import jax
import numpy as np

from alto_jax.batch import PromptBatch
from alto_jax.data import images, tiles
from alto_jax.inference.decoding import EncodedImage
from alto_jax.inference.tokenizer import is_whole
from alto_jax.mllm import text as words
from alto_jax.mllm.alto_llm import ModelConfig
from alto_jax.mllm.answers import answer
from alto_jax.mllm.generate import GenerateConfig, Generated, bucket_length


@dataclasses.dataclass(frozen=True)
class Reply:
    """An answer in words.

    Attributes:
      text: the answer.
      token_ids: its ids.
      num_tiles: tiles of each image, its thumbnail included.
      seconds: wall time of the call.
    """

    text: str
    token_ids: list[int] = dataclasses.field(repr=False)
    num_tiles: list[int]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """All of it, JSON-compatible."""
        return dataclasses.asdict(self)


def reply(
    cfg: ModelConfig,
    params: dict,
    tokenizer: words.TextTokenizer,
    system: str | None,
    pictures: Sequence[Any],
    question: str | Sequence[Mapping[str, str]],
    *,
    max_tiles: int,
    max_new_tokens: int,
) -> Reply:
    """Answers a question greedily.

    Programs are compiled for a number of tiles (`tiles.slot_counts`) and a length of the prompt in steps of 32.

    Args:
      cfg, params, tokenizer, system: of the model.
      pictures: any number, each as for `Segmenter.encode_image`.
      question: about them, or turns {"from": "human" | "gpt", "value"} that end with one. Each `<image>` in it is the
        next picture; without any, the pictures come first.
      max_tiles: of all pictures together, see tiles.py.
      max_new_tokens: longest answer.

    Raises:
      ValueError: no such image, a number that is not at least 1, or a question that does not fit.
    """
    began = time.monotonic()
    for name, value in (("max_tiles", max_tiles), ("max_new_tokens", max_new_tokens)):
        if not is_whole(value, 1, sys.maxsize):
            raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")
    max_tiles, max_new_tokens = int(max_tiles), int(max_new_tokens)
    turns = [{"from": "human", "value": question}] if isinstance(question, str) else _check_turns(question)
    if not turns or not turns[-1]["value"].strip():
        raise ValueError(f"question: expected some text, got {question!r:.80}")
    if any(isinstance(picture, EncodedImage) for picture in pictures):
        raise ValueError("pictures: expected images, got an EncodedImage, which holds no tiles")
    shown = [images.as_array(picture) for picture in pictures]
    num_masks = sum(turn["value"].count(words.MASK_START) for turn in turns)
    each, size = max_tiles if tiles.has_tiles(turns, num_masks) else 1, cfg.need_vision().image_size
    parts = tiles.cut(shown, each, size)
    counts = [len(part) for part in parts]
    ids = words.render_prompt(tokenizer, turns, [cfg.num_image_tokens * n for n in counts], system=system)
    slots = tiles.slots_for([max(sum(counts), 1)], tiles.most_slots(max_tiles, max(len(shown), 1)))
    seen = np.concatenate(parts) if parts else np.zeros((0, size, size, 3), np.uint8)
    length = bucket_length(len(ids))
    batch = PromptBatch(
        image=tiles.padded(seen, slots)[None],
        pixel_image=None,
        prompt_ids=np.array([[tokenizer.ids.pad] * (length - len(ids)) + ids], np.int32),
        prompt_mask=np.arange(length)[None] >= length - len(ids),
        mask=np.zeros((1, 0, 0), np.float32),
    )
    found = jax.device_get(_answer(cfg, GenerateConfig(max_new_tokens=max_new_tokens), tokenizer.ids, params, batch))
    chosen = found.ids[0][found.mask[0]].tolist()
    said = words.answer_text(tokenizer, chosen)
    return Reply(said, chosen, counts, round(time.monotonic() - began, 4))


def _check_turns(turns: Any) -> list[Mapping[str, str]]:
    """The turns as a list; ValueError names the first that is none."""
    if isinstance(turns, Mapping) or not isinstance(turns, Iterable):
        raise ValueError(f"question: expected text, or a list of turns, got {turns!r:.80}")
    found = list(turns)
    for index, turn in enumerate(found):
        fits = isinstance(turn, Mapping) and turn.get("from") in ("human", "gpt") and isinstance(turn.get("value"), str)
        if not fits:
            expected = '{"from": "human" | "gpt", "value": text}'
            raise ValueError(f"question[{index}]: expected {expected}, got {turn!r:.80}")
    return found


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _answer(
    cfg: ModelConfig, generate: GenerateConfig, special: words.SpecialIds, params: dict, batch: PromptBatch
) -> Generated:
    """`answer`, compiled."""
    return answer(cfg, params, batch, generate, special, jax.random.key(0))
