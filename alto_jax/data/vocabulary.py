"""The text tokenizer of a run: a checkpoint's, or one trained on the texts of the run's data."""

from collections.abc import Iterator
import os
import pathlib
from typing import Any

from alto_jax.checkpoint import foreign
from alto_jax.data import lessons, scenes
from alto_jax.data.glyphs import catalogue
from alto_jax.data.source import HasTexts
from alto_jax.data.sources import chat_source
from alto_jax.mllm.text import TextTokenizer, question

_RECORDS = 1000  # of a built-in source, whose texts train a tokenizer


def text_tokenizer(config: Any, directory: os.PathLike | None = None) -> TextTokenizer:
    """The tokenizer of the run in `directory`, else of the start checkpoint, else one trained on the texts of the data.

    Raises:
      ValueError: it has more tokens than the language model's vocabulary, or another number of codes than
        the mask tokenizer.
    """
    num_codes = config.model.tokenizer.codebook_size
    folders = [pathlib.Path(directory)] if directory else []
    if config.init_from:
        folders.append(foreign.run_of(config.init_from))
    file = next((f / "tokenizer.json" for f in folders if (f / "tokenizer.json").exists()), None)
    if file is not None:
        text = TextTokenizer.load(file, num_codes=num_codes)
    else:
        text = TextTokenizer.train_builtin(list(_texts(config)), config.data.base_vocab_size, num_codes)
    vocab_size = config.model.language_model.vocab_size
    if text.vocab_size > vocab_size:
        raise ValueError(
            f"config.model.language_model.vocab_size: the tokenizer has {text.vocab_size} tokens, got {vocab_size}"
        )
    return text


def _texts(config: Any) -> Iterator[str]:
    """What people and model say in the data, for training a tokenizer."""
    if config.data.source != "scenes":
        source = chat_source(config)
        if not isinstance(source, HasTexts):
            raise ValueError(f"config.data.source: no texts for a tokenizer in {config.data.source!r}")
        for record in source.texts():
            yield from record
        return

    if config.data.scenes.vocabulary is not None:
        # The language of few names, of lessons and of boxes: as often as it is said.
        for source in (lessons.SceneLessons(config.data.scenes, config.data.scene_lessons),
                       scenes.SceneChats(config.data.scenes, config.data.scene_chats)):  # fmt: skip
            for index in range(min(_RECORDS, len(source))):
                yield from (turn["value"] for turn in source[index]["conversations"])
        return
    for glyph in catalogue().glyphs:
        for place in ("", " on the left", " on the right", " at the top", " at the bottom", " in the centre"):
            phrase = f"the {glyph.colour + ' ' if glyph.colour else ''}{glyph.name}{place}"
            yield question(phrase, adaptive=True)
            yield question(f"all {phrase[4:]}", adaptive=False)
    yield from (
        "The mask appears at .",
        "Yes",
        "No",
        'Does the image contain ?\nAnswer "yes" or "no" directly.',
    ) * 50
