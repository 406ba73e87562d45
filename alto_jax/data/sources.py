"""From a run's configuration to its data: sources, iterators, held-out samples and the text tokenizer.

Every source is random access and the same on all processes, so that each reads its rows of the same batches, whatever
the source is: prepared sets and mixtures need nothing special with several processes.
"""

from collections.abc import Callable, Iterator
import dataclasses
import logging
import os
import pathlib
from typing import Any, TypeVar

from alto_jax.batch import ChatBatch, MaskBatch, PromptBatch
from alto_jax.config import local_path
from alto_jax.data import bad_data, benchmarks, caches, composition, comprehension, lessons, pipeline, refcoco, scenes
from alto_jax.data.conversations import Conversations
from alto_jax.data.mixture import Mixture
from alto_jax.data.prepared import Prepared, check_root
from alto_jax.data.prompts import NoPrompts, Prompts
from alto_jax.data.reading import Reading
from alto_jax.data.sa1b import Sa1bMasks
from alto_jax.data.sa1b_chats import Sa1bChats, Sa1bTargets
from alto_jax.data.source import Batches, HasImages, Records
from alto_jax.data.split import EmptySplit, ImageSplit
from alto_jax.mllm.text import TextTokenizer
from alto_jax.parallel import distributed
from alto_jax.parallel.shares import WHOLE, BatchShare
from alto_jax.storage.bucket import is_url, place

S = TypeVar("S", Conversations, Prepared, Sa1bMasks, Sa1bChats, refcoco.Referring)
_log = logging.getLogger(__name__)
_MOST_THREADS = 16  # more wait for each other
_SEED_OFFSET = 1_000_003  # Note: keeps the shuffling apart from the other uses of config.seed.


def mask_source(config: Any, *, held_out: bool = False) -> Records:
    """MaskRecords to train on, or those to evaluate on (`held_out`): see `evaluated_on`."""
    config, field, split = _place(config, held_out)
    data = config.data
    if data.source == "scenes":
        return scenes.SceneMasks(_scenes(config, held_out), data.scene_masks)
    if data.source == "sa1b":
        return _part(Sa1bMasks(data.root, seed=config.seed, train=not held_out, reading=_reading(data)), split)
    if data.source == "prepared":
        return _part(Prepared(data.root, kind="masks", use_caches=data.use_caches), split)
    if data.source == "mixture":
        return _mixture(config, field, lambda part: mask_source(part, held_out=held_out))
    raise ValueError(
        f"{field}.source: {config.stage} reads 'scenes', 'sa1b', 'prepared' or 'mixture', got {data.source!r}"
    )


def chat_source(config: Any, *, held_out: bool = False, adaptive_only: bool = False) -> Records:
    """ChatRecords, see `mask_source`; `adaptive_only`: requests for one mask alone, see prompts.py. In stage 0, those
    without masks."""
    config, field, split = _place(config, held_out)
    data = config.data
    if data.source == "scenes" and config.stage == "stage0":
        return lessons.SceneLessons(_scenes(config, held_out), data.scene_lessons)
    if data.source == "scenes":
        chats = dataclasses.replace(data.scene_chats, adaptive_only=adaptive_only or data.scene_chats.adaptive_only)
        return scenes.SceneChats(_scenes(config, held_out), chats)
    max_masks = 0 if config.stage == "stage0" else None if adaptive_only else data.max_masks
    max_images = None if adaptive_only else data.max_images
    if data.source == "jsonl":
        if not os.path.isfile(data.meta):
            raise ValueError(f"{field}.meta: no file {data.meta}; python -m alto_jax.data.convert writes one")
        lines = Conversations(data.meta, once=held_out, max_masks=max_masks, max_images=max_images,
                              reading=_reading(data))  # fmt: skip
        found = _part(lines, split)
        return Prompts(found, f"{field}.meta {data.meta}") if adaptive_only else found
    if data.source == "prepared":
        if data.tile_slots and not adaptive_only:
            given = f"max_tiles {data.max_tiles} and max_images {data.max_images}"
            expected = f"expected the raw files with {given}, got 'prepared'"
            raise ValueError(f"{field}.source: prepared sets hold one image of one tile a record; {expected}")
        stored = Prepared(data.root, kind="chat", use_caches=data.use_caches, max_masks=max_masks)
        prepared = _part(stored, split)
        return Prompts(prepared, f"{field}.root {data.root}") if adaptive_only else prepared
    if data.source in ("referring", "comprehension"):
        return _referring(config, field, split, adaptive_only)
    if data.source == "sa1b_chats" and config.stage != "stage0":
        return _part(_sa1b_chats(config, held_out, adaptive_only), split)
    if data.source == "mixture":
        return _mixture(config, field, lambda part: chat_source(part, held_out=held_out, adaptive_only=adaptive_only))
    raise ValueError(
        f"{field}.source: {config.stage} reads 'scenes', 'jsonl', 'prepared', 'referring', 'comprehension', 'mixture' "
        f"or, with masks, 'sa1b_chats'; got {data.source!r}"
    )


def replayed(config: Any) -> Any:
    """The configuration whose data are the built-in ones that `config.data.replay` mixes in."""
    changes = {"source": "scenes", "root": "", "meta": "", "replay": 0.0, "validation_fraction": 0.0}
    evaluation = dataclasses.replace(config.eval, source="", root="", meta="")
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes), eval=evaluation)


def evaluated_on(config: Any) -> str:
    """What evaluation in training measures: "eval", or "eval_train" where it is the training data itself.

    Held out are the samples of `config.eval.source`; else the images that `config.data.validation_fraction` keeps from
    training; else the shapes that the built-in data keeps from it. Other data have nothing held out of themselves, nor
    has an evaluation source that is the training source.
    """
    data, held_out = config.data, _place(config, True)[0].data
    named = ("referring", "comprehension")
    places = lambda of: (of.source, _resolved(of.root), of.meta if of.source in named else _resolved(of.meta))
    if data.source == "scenes":
        return "eval"
    if config.eval.source:
        return "eval" if places(data) != places(held_out) else "eval_train"
    built_in = data.source == "mixture" and all(
        entry["source"] == "scenes" for _, entry in _entries(config, "config.data").values()
    )
    return "eval" if built_in or data.validation_fraction > 0 else "eval_train"


def count_shared_images(config: Any) -> tuple[int, int]:
    """Of the images that are evaluated, how many are in the training data too, and how many there are.

    Reads no image, but the name of every image that is trained on; (0, 0) where a source can't tell them.
    """
    if config.stage in ("stage1", "stage1_5"):
        held_out, training = mask_source(config, held_out=True), mask_source(config)
    else:
        prompts = config.stage != "stage0"
        held_out, training = chat_source(config, held_out=True, adaptive_only=prompts), chat_source(config)
    if not (isinstance(held_out, HasImages) and isinstance(training, HasImages)):
        return 0, 0
    evaluated = {n for i in range(min(config.eval.num_samples, len(held_out))) for n in held_out.image_hashes(i)}
    found: set[int] = set()
    for index in range(len(training)):
        found.update(evaluated.intersection(training.image_hashes(index)))
    return len(found), len(evaluated)


def _place(config: Any, held_out: bool) -> tuple[Any, str, ImageSplit | None]:
    """The configuration whose `data` is read, the name of that field, and the side of its images (None: all)."""
    if held_out and config.eval.source:
        changes = {"source": config.eval.source, "root": config.eval.root, "meta": config.eval.meta}
        data = dataclasses.replace(config.data, validation_fraction=0.0, **changes)
        evaluation = dataclasses.replace(config.eval, source="", root="", meta="")
        return dataclasses.replace(config, data=data, eval=evaluation), "config.eval", None
    fraction = config.data.validation_fraction
    return config, "config.data", ImageSplit(fraction, held_out) if fraction else None


def _resolved(path: str) -> str:
    return place(path) if path else ""


def _part(source: S, split: ImageSplit | None) -> S:
    """One side of a source; all of it without a split."""
    return source if split is None else source.part(split)


def _sa1b_chats(config: Any, held_out: bool, adaptive_only: bool) -> Sa1bChats:
    data = config.data
    targets = Sa1bTargets(data.root, train=not held_out, seed=config.seed, max_targets=data.max_targets,
                          reading=_reading(data))  # fmt: skip
    return Sa1bChats(targets, seed=config.seed, adaptive_fraction=1.0 if adaptive_only else 0.5)


def _referring(config: Any, field: str, split: ImageSplit | None, adaptive_only: bool) -> Records:
    """The training splits that `config.data.meta` names (or other ones, as "refcoco_val"), by their sizes."""
    parts: dict[str, tuple[Records, float]] = {}
    empty: list[ValueError] = []
    for name in (name.strip() for name in config.data.meta.split(",")):
        try:
            raw = _part(_referring_split(name, config.data.root, field, _reading(config.data)), split)
            boxes = config.data.source == "comprehension"
            raw = raw.with_targets() if adaptive_only or boxes else raw
            if boxes and adaptive_only:
                raise NoPrompts(f"{field}.meta {name}: comprehension asks for boxes, not for masks")
        except (EmptySplit, NoPrompts) as error:
            empty.append(error)
            continue
        chats = {"adaptive_fraction": 1.0, "yes_fraction": 0.0} if adaptive_only else {}
        source = (comprehension.ComprehensionChats(comprehension.Comprehension(raw)) if boxes
                  else refcoco.ReferringChats(raw, seed=config.seed, **chats))  # fmt: skip
        parts[name] = (source, float(len(source)))
    _name_empty(parts, empty)
    return next(iter(parts.values()))[0] if len(parts) == 1 else Mixture(parts, seed=config.seed)


def _referring_split(name: str, root: str, field: str, reading: Reading) -> refcoco.Referring:
    """The training split of a data set; for evaluation also another split by its benchmark's name."""
    if name in benchmarks.TRAINING:
        return benchmarks.train_split(name, root, reading=reading)
    others = [n for n, found in benchmarks.BENCHMARKS.items() if found.dataset in benchmarks.TRAINING]
    if field == "config.eval" and name in others:
        found = benchmarks.open_benchmark(name, root, protocol="per_sentence", reading=reading)
        if not isinstance(found, refcoco.Referring):
            raise ValueError(f"{field}.root: {root} holds a prepared data set; expected the data folder")
        return found
    expected = ", ".join((*benchmarks.TRAINING, *(others if field == "config.eval" else ())))
    raise ValueError(f"{field}.meta: expected some of {expected}, got {name!r}")


def _name_empty(parts: dict, empty: list[ValueError]) -> None:
    """Logs which parts have no record of what was asked for; raises EmptySplit or NoPrompts if none has one."""
    if not parts:
        raise empty[0]
    for error in empty:
        _log.warning("left out: %s", error)


def _entries(config: Any, field: str) -> dict[str, tuple[float, dict[str, Any]]]:
    """The checked entries {name: (weight, {"source", "root", "meta"})} of the JSON `config.data.meta`."""
    file = pathlib.Path(config.data.meta)
    try:
        content = bad_data.parse_json(file.read_bytes(), file)
        found = {n: (float(e["weight"]), {**e, "source": str(e["source"])}) for n, e in content.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{field}.meta: {file}: expected JSON {{name: {{weight, source, …}}}}: {error!r}") from error
    for name, (_, entry) in found.items():
        if entry["source"] == "mixture":
            raise ValueError(f"{file}: {name}.source: a mixture in a mixture")
        check_root(entry["source"], entry.get("root") or "", f"{file}: {name}.root")
        local_path(entry.get("meta") or "", f"{file}: {name}.meta")
    return found


def _mixture(config: Any, field: str, open_part: Callable[[Any], Records]) -> Records:
    """The sources of the JSON `config.data.meta`: {name: {"weight", "source", "root", "meta", "exif", "mask_rule"}}.

    Paths are relative to the file; exif and mask_rule are those of `config.data` if an entry has none.
    """
    file = pathlib.Path(config.data.meta)
    sources: dict[str, tuple[Records, float]] = {}
    empty: list[ValueError] = []
    for name, (weight, entry) in _entries(config, field).items():
        source = entry["source"]
        root = entry.get("root") or ""
        root = root if is_url(root) or not root else str(file.parent / root)
        paths = {"root": root, "meta": entry.get("meta", "")}
        if source == "jsonl":
            paths["meta"] = str(file.parent / paths["meta"])
        paths |= {rule: entry[rule] for rule in ("exif", "mask_rule") if rule in entry}
        fraction = 0.0 if source == "scenes" else config.data.validation_fraction
        try:
            data = dataclasses.replace(config.data, source=source, validation_fraction=fraction, **paths)
            sources[name] = (open_part(dataclasses.replace(config, data=data)), weight)
        except (EmptySplit, NoPrompts) as error:
            empty.append(error)
        except ValueError as error:
            raise ValueError(f"{file}: {name}: {error}") from error
    if empty:
        _name_empty(sources, empty)
    return Mixture(sources, seed=config.seed)


def _reading(data: Any) -> Reading:
    """How the files of `config.data` are read; what is not the default is logged."""
    return Reading(data.exif, data.mask_rule).announce()


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
    if config.data.replay:
        known, weight = chat_source(replayed(config)), config.data.replay
        source = Mixture({"data": (source, 1 - weight), "replay": (known, weight)}, seed=config.seed)
    _check_caches(source, config, "chat", directory)
    return iter(
        pipeline.chat_batches(
            source,
            text,
            **_sizes(config),
            **_chat_sizes(config),
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
            are_named=True,
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
            **_once(config, source),
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
            **_once(config, source),
        )
    )


def held_out_chats(config: Any, text: TextTokenizer) -> dict[str, Iterator[ChatBatch]]:
    """The first `config.eval.num_samples` held-out conversations in batches: "" all kinds, and of the built-in lessons
    "/KIND" for each, a question a picture."""
    found: dict[str, Records] = {"": chat_source(config, held_out=True)}
    if config.data.source == "scenes" and not config.eval.source:
        for kind in config.data.scene_lessons.kinds:
            one = dataclasses.replace(config.data.scene_lessons, kinds=(kind,), turns=1)
            found[f"/{kind}"] = lessons.SceneLessons(_scenes(config, True), one)
    options = {"system": config.data.system, **_sizes(config), **_chat_sizes(config)}
    first = {name: _First(source, config.eval.num_samples) for name, source in found.items()}
    return {
        name: iter(pipeline.chat_batches(source, text, **options, **_once(config, source)))
        for name, source in first.items()
    }


def _chat_sizes(config: Any) -> dict:
    return {
        "max_length": config.data.max_length,
        "num_latent_tokens": config.model.tokenizer.num_latent_tokens,
        "max_masks": config.data.max_masks,
        "max_tiles": config.data.max_tiles,
        "max_images": config.data.max_images,
    }


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
        "allow_changed": config.data.allow_changed,
        "max_bad_fraction": config.data.max_bad_fraction,
    }
    options |= readers(config.data.num_threads, config.data.num_workers)
    options["kept_bytes"] = int(config.data.memory_gb * 1e9)
    return options | ({"system": config.data.system} if config.stage in ("stage0", "stage2", "stage3") else {})


def _once(config: Any, source: Records) -> dict[str, Any]:
    """Options of a pass over the first held-out records; as many of them may be bad as of the whole source."""
    return {
        "batch_size": config.eval.batch_size,
        "seed": 0,
        "num_epochs": 1,
        "shuffle": False,
        "drop_remainder": False,
        "max_bad_records": int(config.data.max_bad_fraction * len(source)),
        "max_bad_fraction": config.data.max_bad_fraction,
        **readers(config.data.num_threads, 0),
    }


def readers(num_threads: int, num_workers: int) -> dict[str, int]:
    """Numbers of reading threads and processes for the configured ones (see DataConfig), by the cores of this machine.

    Several processes of a run on one machine share its cores.
    """
    if num_threads and num_workers >= 0:
        return {"num_threads": num_threads, "num_workers": num_workers}
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = max(here // distributed.processes_here(), 1)
    return {
        "num_threads": num_threads or min(cores, _MOST_THREADS),
        "num_workers": max(cores - 2, 1) if num_workers < 0 else num_workers,
    }


def _sizes(config: Any) -> dict:
    model = config.model
    return {
        "vision_size": model.vision.image_size,
        "image_size": model.tokenizer.image_size,
        "mask_size": model.tokenizer.mask_size,
        "num_image_tokens": model.num_image_tokens,
    }
