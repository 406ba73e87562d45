"""From a run's configuration to its data: sources, iterators, held-out samples and the text tokenizer.

Every source is random access and the same on all processes, so that each reads its rows of the same batches, whatever
the source is: prepared sets and mixtures need nothing special with several processes.
"""

from collections.abc import Callable, Iterator
import dataclasses
import json
import os
import pathlib
from typing import Any

from alto_jax.batch import ChatBatch, MaskBatch, PromptBatch
from alto_jax.config import local_path
from alto_jax.data import benchmarks, caches, composition, pipeline, refcoco, scenes
from alto_jax.data.conversations import Conversations
from alto_jax.data.glyphs import catalogue
from alto_jax.data.mixture import Mixture
from alto_jax.data.prepared import Prepared
from alto_jax.data.sa1b import Sa1bMasks
from alto_jax.data.source import Batches, HasTexts, Records
from alto_jax.mllm.text import TextTokenizer, question
from alto_jax.parallel.shares import WHOLE, BatchShare

_SEED_OFFSET = 1_000_003  # Note: keeps the shuffling apart from the other uses of config.seed.


def mask_source(config: Any, *, held_out: bool = False) -> Records:
    """MaskRecords of `config.data`; held out: the built-in data's unseen shapes, or the same files in eval mode."""
    data = config.data
    if data.source == "scenes":
        return scenes.SceneMasks(_scenes(config, held_out), data.scene_masks)
    if data.source == "sa1b":
        return Sa1bMasks(data.root, seed=config.seed, train=not held_out)
    if data.source == "prepared":
        return Prepared(data.root, kind="masks", use_caches=data.use_caches)
    if data.source == "mixture":
        return _mixture(config, lambda part: mask_source(part, held_out=held_out))
    raise ValueError(
        f"config.data.source: {config.stage} reads 'scenes', 'sa1b', 'prepared' or 'mixture', got {data.source!r}"
    )


def chat_source(config: Any, *, held_out: bool = False, adaptive_only: bool = False) -> Records:
    """ChatRecords of `config.data`, see `mask_source`."""
    data = config.data
    if data.source == "scenes":
        chats = dataclasses.replace(data.scene_chats, adaptive_only=adaptive_only or data.scene_chats.adaptive_only)
        return scenes.SceneChats(_scenes(config, held_out), chats)
    if data.source == "jsonl":
        return Conversations(data.meta)
    if data.source == "prepared":
        return Prepared(data.root, kind="chat", use_caches=data.use_caches)
    if data.source == "referring":
        return _referring(config, adaptive_only)
    if data.source == "mixture":
        return _mixture(config, lambda part: chat_source(part, held_out=held_out, adaptive_only=adaptive_only))
    raise ValueError(
        f"config.data.source: {config.stage} reads 'scenes', 'jsonl', 'prepared', 'referring' or 'mixture', "
        f"got {data.source!r}"
    )


def _referring(config: Any, adaptive_only: bool) -> Records:
    """The training splits that `config.data.meta` names, each with a weight in proportion to its size."""
    parts: dict[str, tuple[Records, float]] = {}
    for name in config.data.meta.split(","):
        raw = benchmarks.train_split(name.strip(), config.data.root)
        chats: dict[str, Any] = {}
        if adaptive_only:
            chats = {"adaptive_fraction": 1.0, "yes_fraction": 0.0, "skip_no_target": True}
        source = refcoco.ReferringChats(raw, seed=config.seed, **chats)
        parts[name.strip()] = (source, float(len(source)))
    return next(iter(parts.values()))[0] if len(parts) == 1 else Mixture(parts, seed=config.seed)


def _mixture(config: Any, open_part: Callable[[Any], Records]) -> Records:
    """The sources of the JSON `config.data.meta`: {name: {"weight", "source", "root", "meta"}}; paths are relative."""
    file = pathlib.Path(config.data.meta)
    try:
        content = json.loads(file.read_bytes())
        parts = {name: (float(entry["weight"]), str(entry["source"]), entry) for name, entry in content.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"config.data.meta: {file}: expected JSON {{name: {{weight, source, …}}}}: {error!r}"
        ) from error
    sources: dict[str, tuple[Records, float]] = {}
    for name, (weight, source, entry) in parts.items():
        if source == "mixture":
            raise ValueError(f"{file}: {name}.source: a mixture in a mixture")
        for field in ("root", "meta"):
            local_path(entry.get(field) or "", f"{file}: {name}.{field}")
        paths = {"root": str(file.parent / entry["root"]) if entry.get("root") else "", "meta": entry.get("meta", "")}
        if source == "jsonl":
            paths["meta"] = str(file.parent / paths["meta"])
        try:
            data = dataclasses.replace(config.data, source=source, **paths)
            sources[name] = (open_part(dataclasses.replace(config, data=data)), weight)
        except ValueError as error:
            raise ValueError(f"{file}: {name}: {error}") from error
    return Mixture(sources, seed=config.seed)


def _scenes(config: Any, held_out: bool) -> composition.ScenesConfig:
    changes: dict[str, Any] = {"split": "validation", "num_scenes": max(config.eval.num_samples, 1)} if held_out else {}
    return dataclasses.replace(config.data.scenes, **changes)


def mask_iterator(config: Any, share: BatchShare = WHOLE, directory: os.PathLike | None = None) -> Batches[MaskBatch]:
    """Endless MaskBatches of stages 1 and 1.5, with get_state and set_state; `directory`: the run, if it has begun."""
    size, source = config.model.tokenizer, mask_source(config)
    _check_caches(source, config, "masks", directory)
    return iter(
        pipeline.mask_batches(
            source,
            image_size=size.image_size,
            mask_size=size.mask_size,
            **_options(config, share),
        )
    )


def chat_iterator(
    config: Any, text: TextTokenizer, share: BatchShare = WHOLE, directory: os.PathLike | None = None
) -> Batches[ChatBatch]:
    """Endless ChatBatches of stage 2, see `mask_iterator`."""
    source = chat_source(config)
    _check_caches(source, config, "chat", directory)
    return iter(
        pipeline.chat_batches(
            source,
            text,
            **_sizes(config),
            max_length=config.data.max_length,
            num_latent_tokens=config.model.tokenizer.num_latent_tokens,
            max_masks=config.data.max_masks,
            length_buckets=config.data.length_buckets,
            pack_samples=config.data.pack_samples,
            **_options(config, share),
        )
    )


def prompt_iterator(
    config: Any, text: TextTokenizer, share: BatchShare = WHOLE, directory: os.PathLike | None = None
) -> Batches[PromptBatch]:
    """Endless PromptBatches of stage 3, see `mask_iterator`."""
    source = chat_source(config, adaptive_only=True)
    _check_caches(source, config, "chat", directory)
    return iter(
        pipeline.prompt_batches(
            source,
            text,
            **_sizes(config),
            max_prompt_length=config.data.max_length,
            **_options(config, share),
        )
    )


def _check_caches(source: Records, config: Any, kind: str, directory: os.PathLike | None) -> None:
    """Refuses cached features and mask tokens of another tokenizer than the run's, see caches.check."""
    caches.check(getattr(source, "caches", {}), config, kind, directory)


def held_out_masks(config: Any) -> Iterator[MaskBatch]:
    """The first `config.eval.num_samples` held-out masks in batches (the last one may be smaller)."""
    source, size = mask_source(config, held_out=True), config.model.tokenizer
    return iter(
        pipeline.mask_batches(
            _First(source, config.eval.num_samples),
            image_size=size.image_size,
            mask_size=size.mask_size,
            **_once(config),
        )
    )


def held_out_prompts(config: Any, text: TextTokenizer) -> Iterator[PromptBatch]:
    """The first `config.eval.num_samples` held-out prompts, by adaptive length."""
    source = chat_source(config, held_out=True, adaptive_only=True)
    return iter(
        pipeline.prompt_batches(
            _First(source, config.eval.num_samples),
            text,
            **_sizes(config),
            max_prompt_length=config.data.max_length,
            system=config.data.system,
            **_once(config),
        )
    )


class _First:
    """The first n records of a source."""

    def __init__(self, source: Records, count: int):
        self._source, self._count = source, min(count, len(source))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._source[index]


def _options(config: Any, share: BatchShare) -> dict:
    options = {
        "batch_size": config.train.batch_size,
        "seed": config.seed + _SEED_OFFSET,
        "share": share,
        "num_threads": config.data.num_threads,
        "max_bad_fraction": config.data.max_bad_fraction,
    }
    return options | ({"system": config.data.system} if config.stage in ("stage2", "stage3") else {})


def _once(config: Any) -> dict:
    return {
        "batch_size": config.eval.batch_size,
        "seed": 0,
        "num_epochs": 1,
        "shuffle": False,
        "drop_remainder": False,
        "num_threads": config.data.num_threads,
        "max_bad_fraction": config.data.max_bad_fraction,
    }


def _sizes(config: Any) -> dict:
    model = config.model
    return {
        "vision_size": model.vision.image_size,
        "image_size": model.tokenizer.image_size,
        "mask_size": model.tokenizer.mask_size,
        "num_image_tokens": model.num_image_tokens,
    }


def text_tokenizer(config: Any, directory: os.PathLike | None = None) -> TextTokenizer:
    """The tokenizer of the run in `directory`, else of the start checkpoint, else one trained on the texts of the data.

    Raises:
      ValueError: it has more tokens than the language model's vocabulary, or another number of codes than
        the mask tokenizer.
    """
    num_codes = config.model.tokenizer.codebook_size
    folders = [pathlib.Path(folder) for folder in (directory, config.init_from) if folder]
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
