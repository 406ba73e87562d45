"""What `alto_jax.data.prepare` is asked to prepare: the source by its name, and how a record of it is stored."""

import dataclasses
import functools
import json
import pathlib
import re
from typing import Any

import numpy as np

from alto_jax.config import ConfigError
from alto_jax.data import benchmarks, examples, prepared, refcoco, transforms
from alto_jax.data.caches import CacheMaker
from alto_jax.data.conversations import Conversations
from alto_jax.data.images import check_size
from alto_jax.data.reading import AS_STORED, Reading
from alto_jax.data.sa1b import Sa1bMasks
from alto_jax.data.sa1b_chats import Sa1bChats, Sa1bTargets
from alto_jax.data.scenes import SceneChats, SceneMasks, ScenesConfig

SPLIT = "train"  # Of the TFDS data set; the benchmark's own split is part of the name.


@dataclasses.dataclass(frozen=True)
class Job:
    """What is prepared: raw source, kind, name in the manifest, and the options that the bytes depend on.

    caches: what is computed beside (caches.CacheMaker), or None. reading: of the raw files.
    """

    name: str
    kind: str
    source: Any
    sizes: dict[str, int]
    image_format: str
    records_per_shard: int
    seed: int
    caches: CacheMaker | None = None
    reading: Reading = AS_STORED

    @property
    def dataset(self) -> str:
        """The name as TFDS takes it."""
        return re.sub(r"[^a-z0-9]+", "_", self.name.replace("+", "plus").lower()).strip("_")

    def options(self) -> dict[str, Any]:
        """All that the result depends on, besides the files."""
        return {
            "name": self.name,
            "kind": self.kind,
            "sizes": self.sizes,
            "format": self.image_format,
            "records_per_shard": self.records_per_shard,
            "seed": self.seed,
            "records": len(self.source),
            "split": SPLIT,
            "no_target": bool(getattr(self.source, "no_target", False)),
            "caches": self.caches.manifest if self.caches else {},
            "reading": dataclasses.asdict(self.reading),
        }

    def features(self) -> Any:
        """The TFDS features of its records."""
        return prepared.features(self.kind, self.image_format, self.caches.manifest if self.caches else None)


def open_source(
    name: str,
    source: str,
    *,
    seed: int,
    protocol: refcoco.Protocol,
    images: str | None,
    draws: int,
    num: int,
    reading: Reading = AS_STORED,
) -> tuple[str, str, Any]:
    """The raw source of a name: (name in the manifest, kind, source).

    Raises:
      ValueError: an unknown name, or files that are missing; the message says what was expected where.
    """
    path = pathlib.Path(source)
    if name == "sa1b":
        return name, "masks", Sa1bMasks(path, seed=seed, draws_per_image=draws, reading=reading)
    if name == "sa1b_chats":
        targets = Sa1bTargets(path, seed=seed, draws_per_image=draws, reading=reading)
        return name, "chat", Sa1bChats(targets, seed=seed)
    if name == "conversations":
        file = path / "meta.json" if path.is_dir() else path
        return name, "chat", Conversations(file, seed=seed, once=True, reading=reading)
    if name in ("scene_masks", "scene_chats"):
        config = ScenesConfig(image_size=128, num_scenes=num)
        return (name, "masks", SceneMasks(config)) if name == "scene_masks" else (name, "chat", SceneChats(config))
    if name.endswith("_train") and name.removesuffix("_train") in benchmarks.TRAINING:
        dataset = name.removesuffix("_train")
        raw = benchmarks.train_split(dataset, path, protocol=protocol, images=images, reading=reading)
        return f"{name}.{protocol}", "chat", refcoco.ReferringChats(raw, seed=seed)
    with_masks = [n for n, found in benchmarks.BENCHMARKS.items() if found.family in benchmarks.MASK_FAMILIES]
    if name not in with_masks:
        training = ",".join(benchmarks.TRAINING)
        own = f"sa1b, sa1b_chats, conversations, scene_masks, scene_chats, {{{training}}}_train"
        raise ConfigError(f"NAME: expected one of {own}, {', '.join(with_masks)}; got {name!r}")
    opened = benchmarks.open_benchmark(name, path, protocol=protocol, images=images, reading=reading)
    return f"{name}.{protocol}", "referring", opened


def example(job: Job, record: dict[str, Any]) -> dict[str, Any]:
    """A record of the job's source as TFDS features.

    Raises:
      ValueError, OSError: a bad record.
    """
    sizes = job.sizes
    encode = functools.partial(prepared.encode_image, image_format=job.image_format)
    key, image = record["key"], record["image"]
    if job.kind == "masks":
        mask = record["mask"]
        if any(sizes.values()):
            image, mask = examples.mask_arrays(record, sizes["image_size"], sizes["mask_size"])
        else:
            examples.check_sizes(key, image, mask)
            examples.check_not_empty(key, mask)
        found = {"key": key, "image": encode(image), "masks": [prepared.encode_mask(mask)]}
        return found | (job.caches(image, image, [mask]) if job.caches else {})
    masks = record["masks"] if job.kind == "chat" else [record["mask"]]
    if image is None:
        return _text_example(job, record)
    check_size(image, f"of record {key}")
    for mask in masks:
        examples.check_sizes(key, image, mask)
    small, pixel = image, np.zeros((1, 1, 3), np.uint8)
    if sizes["vision_size"]:
        small, pixel = transforms.squash(image, sizes["vision_size"]), transforms.squash(image, sizes["image_size"])
        if job.kind == "chat":
            masks = [transforms.squash_mask(mask, sizes["mask_size"]) for mask in masks]
    found = {"key": key, "image": encode(small), "masks": [prepared.encode_mask(mask) for mask in masks]}
    found["pixel_image"] = encode(pixel)
    found |= job.caches(small, pixel, masks) if job.caches else {}
    if job.kind == "chat":
        return found | {"conversations": json.dumps(record["conversations"], ensure_ascii=False)}
    ignore = [prepared.encode_mask(record["ignore"])] if "ignore" in record else []
    return found | {"phrase": record["phrase"], "ignore": ignore}


def _text_example(job: Job, record: dict[str, Any]) -> dict[str, Any]:
    """A record of kind "chat" without an image, which is stored as one of a single pixel."""
    encode = functools.partial(prepared.encode_image, image_format=job.image_format)
    none = encode(np.zeros((1, 1, 3), np.uint8))
    found = {"key": record["key"], "image": none, "pixel_image": none, "masks": []}
    found["conversations"] = json.dumps(record["conversations"], ensure_ascii=False)
    blank = lambda name: np.zeros((job.sizes[name], job.sizes[name], 3), np.uint8)
    return found | (job.caches(blank("vision_size"), blank("image_size"), []) if job.caches else {})
