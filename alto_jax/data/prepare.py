"""Preparation of data sets: read once, resized as the model takes them, stored for fast random access.

    python -m alto_jax.data.prepare NAME --source DIR --out DIR [--vision-size 448 --image-size 1024 --mask-size 256]
        [--cache-features CHECKPOINT] [--cache-tokens CHECKPOINT]
    python -m alto_jax.data.prepare NAME --source DIR --check

NAME: sa1b, sa1b_chats, conversations, refcoco_train (refcoco+_, refcocog_, grefcoco_, reasonseg_), scene_masks,
scene_chats, or a benchmark with masks. Writes a TFDS data set (array_record; no TensorFlow) to OUT/{name}/1.0.0, in the
order of the raw reader, with `manifest.json`: counts, hashes, bad records. Killed and started again it goes on with the
shards that are missing, and ends byte for byte as without the kill. --check writes nothing and lists everything that is
wrong.

Note: shards are written here rather than by TFDS's writer, which starts from nothing after a kill; the metadata
is TFDS's own, so that `tfds.data_source(name, data_dir=OUT)` reads the result.
"""

import argparse
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
import dataclasses
import functools
import hashlib
import io
import json
import os
import pathlib
import shutil
import time
from typing import Any

import numpy as np

from alto_jax import cli
from alto_jax.cli import Progress
from alto_jax.config import ConfigError, write_whole
from alto_jax.data import bad_data, masks, prepared, prompts
from alto_jax.data.caches import CacheMaker
from alto_jax.data.fingerprint import HasFingerprint
from alto_jax.data.images import noting
from alto_jax.data.jobs import Job, example, open_source
from alto_jax.data.reading import AS_STORED, EXIF, Reading

SPLIT = "train"  # Of the TFDS data set; the benchmark's own split is part of the name.
VERSION = "1.0.0"
_SECONDS_PER_LINE = 5  # Between two progress lines, however fast shards are written.


def prepare(job: Job, out: str | os.PathLike, *, max_bad_fraction: float, workers: int = 2) -> pathlib.Path:
    """Prepares a data set, or goes on where a killed run stopped.

    Args:
      job: what.
      out: the folder of prepared data sets.
      max_bad_fraction: share of the records that may be bad; they are left out and listed in the manifest.
      workers: threads, each writing a shard.

    Returns:
      The data set's folder.

    Raises:
      ConfigError: there is one already with other options.
      ValueError: too many bad records.
    """
    folder = pathlib.Path(out) / job.dataset / VERSION
    work, options = folder / ".work", job.options()
    if (folder / prepared.MANIFEST).is_file():
        _same_options(json.loads((folder / prepared.MANIFEST).read_text()), options, folder)
        shutil.rmtree(work, ignore_errors=True)
        print(f"[{job.name}] {folder} is already complete")
        return folder
    work.mkdir(parents=True, exist_ok=True)
    if (work / "options.json").is_file():
        _same_options(json.loads((work / "options.json").read_text()), options, folder)
    write_whole(work / "options.json", json.dumps(options))
    total = len(job.source)
    count = -(-total // job.records_per_shard)
    bad = bad_data.BadRecords(total, max_bad_fraction, name=job.name, option="--max-bad-fraction")
    shards: dict[int, dict] = {}
    for number in range(count):
        if (work / f"{number:05d}.json").is_file() and _shard_file(job, folder, number, count).is_file():
            shard = json.loads((work / f"{number:05d}.json").read_text())
            complete = "images" in shard and "requests" in shard  # Earlier versions kept neither.
            shards |= {number: shard} if complete else {}
    done = sum(s["seen"] for s in shards.values())
    progress, shown = Progress(job.name, total, done), 0.0
    if done:
        print(f"[{job.name}] resumed: {len(shards)} of {count} shards are there")
    for number in sorted(shards):
        _count_bad(bad, shards[number])
    write = functools.partial(_write_shard, job, _serializer(job), folder, work, count)
    with ThreadPoolExecutor(max_workers=workers) as pool:
        waiting = iter([n for n in range(count) if n not in shards])
        running = {pool.submit(write, n) for _, n in zip(range(2 * workers), waiting)}
        while running:
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                shard = future.result()
                shards[shard["number"]] = shard
                done += shard["seen"]
                try:
                    _count_bad(bad, shard)
                except ValueError:
                    pool.shutdown(cancel_futures=True)
                    raise
            if time.monotonic() - shown > _SECONDS_PER_LINE or done == total:
                progress.line(done, {"bad": len(bad)})
                shown = time.monotonic()
            running |= {pool.submit(write, n) for _, n in zip(range(len(finished)), waiting)}
    _finish(job, folder, [shards[n] for n in range(count)], options)
    shutil.rmtree(work)
    return folder


def _same_options(old: dict, new: dict, folder: pathlib.Path) -> None:
    old = {"caches": {}, "reading": dataclasses.asdict(AS_STORED)} | old  # Data sets of earlier versions have none.
    different = [f"{k} {old.get(k)!r} (now {v!r})" for k, v in new.items() if old.get(k) != v]
    if different:
        raise ConfigError(f"--out: {folder} holds a data set with {'; '.join(different)}; choose another folder")


def _count_bad(bad: bad_data.BadRecords, shard: dict) -> None:
    for entry in shard["bad"]:
        bad.add(entry["index"], entry["message"], entry["kind"])


def _shard_file(job: Job, folder: pathlib.Path, number: int, count: int) -> pathlib.Path:
    return folder / f"{job.dataset}-{SPLIT}.array_record-{number:05d}-of-{count:05d}"


def _serializer(job: Job) -> Callable[[dict], bytes]:
    """Examples as serialised tf.Example protos, the same bytes every time."""
    from tensorflow_datasets.core import example_serializer  # late: only prepared sets need it, and it is slow to start

    features = job.features()
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
    # Note: protobuf writes maps in any order unless told not to.
    return lambda e: serializer.get_tf_example(features.encode_example(e)).SerializeToString(deterministic=True)


def _write_shard(
    job: Job, serialize: Callable, folder: pathlib.Path, work: pathlib.Path, count: int, number: int
) -> dict:
    """Writes a shard and says what is in it; both get their final names when they are complete."""
    from array_record.python import array_record_module  # late: only prepared sets need it, and it is slow to start

    file, temporary = _shard_file(job, folder, number, count), work / f"{number:05d}.tmp"
    start = number * job.records_per_shard
    stop = min(start + job.records_per_shard, len(job.source))
    bad: list[dict[str, Any]] = []
    images: list[str] = []
    requests: list[tuple[int, int]] = []
    # Note: images are compressed as they should be; unpacking "raw" ones would cost more than reading them.
    writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
    for index in range(start, stop):
        try:
            raw = job.source[index]
            record = serialize(example(job, raw))
        except (ValueError, OSError) as error:
            bad.append(_problem(index, error))
            continue
        writer.write(record)
        images.append(raw.get("image_name", raw["key"]))
        if job.kind == "chat":
            requests.append((prompts.count_requests(raw["conversations"], len(raw["masks"])), len(raw["masks"])))
    writer.close()
    with open(temporary, "rb") as written_file:
        digest = hashlib.file_digest(written_file, "sha256").hexdigest()
    shard: dict[str, Any] = {
        "number": number,
        "seen": stop - start,
        "records": len(images),
        "bytes": temporary.stat().st_size,
    }
    shard |= {"sha256": digest, "bad": bad, "images": images, "requests": requests}
    temporary.replace(file)
    write_whole(work / f"{number:05d}.json", json.dumps(shard))
    return shard


def _finish(job: Job, folder: pathlib.Path, shards: list[dict], options: dict) -> None:
    """Writes TFDS's metadata, and the manifest last."""
    import tensorflow_datasets as tfds  # late: only prepared sets need it, and it is slow to start

    template = tfds.core.ShardedFileTemplate(
        dataset_name=job.dataset, split=SPLIT, filetype_suffix="array_record", data_dir=folder
    )
    lengths = [shard["records"] for shard in shards]
    split = tfds.core.SplitInfo(
        name=SPLIT, shard_lengths=lengths, num_bytes=sum(s["bytes"] for s in shards), filename_template=template
    )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=job.features(),
        split_infos=[split],
        filename_template=None,
        check_data=False,
        version=VERSION,
    )
    if job.kind == "chat":
        counts = [request for shard in shards for request in shard["requests"]]
        buffer = io.BytesIO()
        np.save(buffer, np.array(counts, np.uint16).reshape(-1, 2))
        write_whole(folder / prepared.REQUESTS, buffer.getvalue())
    bad = [entry for shard in shards for entry in shard["bad"]]
    manifest = options | {
        "written": sum(lengths),
        "fingerprint": job.source.fingerprint() if isinstance(job.source, HasFingerprint) else "",
        "bad": bad,
        "bad_by_kind": dict(sorted(Counter(entry["kind"] for entry in bad).items())),
        "shards": [{k: s[k] for k in ("records", "bytes", "sha256")} for s in shards],
    }
    write_whole(folder / prepared.IMAGES, prepared.encode_names(n for shard in shards for n in shard["images"]))
    write_whole(folder / prepared.MANIFEST, json.dumps(manifest, indent=1) + "\n")


def _problem(index: int, error: Exception) -> dict[str, Any]:
    return {"index": index, "kind": bad_data.kind_of(error), "message": bad_data.one_line(error)}


def check(job: Job, workers: int = 2) -> dict[str, Any]:
    """Reads everything and lists what is wrong.

    Returns:
      {"records", "bad": [{"index", "kind", "message"}], "converted": [{"file", "what"}]}; `converted` are images
      that are used, but are no plain 8-bit RGB or have an EXIF orientation.
    """
    problems = getattr(job.source, "problems", None)

    def one(index: int) -> tuple[list[Exception], list[tuple[str, str]]]:
        with noting() as notes:
            try:
                found = problems(index) if problems else []
                if not problems:
                    example(job, job.source[index])
            except (ValueError, OSError) as error:
                found = [error]
        return found, notes

    bad: list[dict[str, Any]] = []
    converted: dict[tuple[str, str], dict[str, str]] = {}
    with ThreadPoolExecutor(max_workers=workers) as pool:
        for index, (found, notes) in enumerate(pool.map(one, range(len(job.source)))):
            bad += [_problem(index, error) for error in found]
            converted |= {note: {"file": note[0], "what": note[1]} for note in notes}
    return {"records": len(job.source), "bad": bad, "converted": list(converted.values())}


def main() -> int:
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m alto_jax.data.prepare", description="Prepare a data set.")
    parser.add_argument("name")
    parser.add_argument("--source", default=".", metavar="DIR", help="the data folder (conversations: the meta file)")
    parser.add_argument("--out", metavar="DIR")
    parser.add_argument("--check", action="store_true", help="only list what is wrong; exit code 1 if anything is")
    parser.add_argument("--vision-size", type=int, default=0, help="side of the MLLM's image (0: images as they are)")
    parser.add_argument("--image-size", type=int, default=0, help="side of the SAM image")
    parser.add_argument("--mask-size", type=int, default=0, help="side of the training masks")
    parser.add_argument(
        "--format", choices=prepared.FORMATS, default="png", help="raw: fastest; jpeg: smallest, not exact"
    )
    parser.add_argument("--cache-features", default="", metavar="CHECKPOINT", help="store SAM features made with it")
    parser.add_argument("--cache-tokens", default="", metavar="CHECKPOINT", help="store mask tokens made with it")
    parser.add_argument(
        "--pixel-input", choices=("mllm", "native"), help="what the SAM features are made of, if not as the checkpoint"
    )
    parser.add_argument("--protocol", choices=("joined", "per_sentence"), default="joined")
    parser.add_argument("--images", metavar="DIR", help="the COCO images, if not at a usual place")
    parser.add_argument("--draws-per-image", type=int, default=1, help="sa1b, sa1b_chats: records made of each image")
    parser.add_argument("--num-scenes", type=int, default=20000, help="scene_masks, scene_chats: how many")
    parser.add_argument("--exif", choices=EXIF, default="stored", help="EXIF orientation: see docs/data.md")
    parser.add_argument("--mask-rule", default=masks.AUTO, help=f"of mask files: {masks.RULES} (docs/data.md)")
    parser.add_argument("--records-per-shard", type=int, default=256)
    parser.add_argument("--max-bad-fraction", type=float, default=0.001)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    names = ("source", "out", "images", "cache_features", "cache_tokens")
    cli.check_paths({f"--{name.replace('_', '-')}": getattr(options, name) for name in names})
    masks.parse_rule(options.mask_rule, "--mask-rule")
    reading = Reading(options.exif, options.mask_rule).announce()
    name, kind, source = open_source(
        options.name, options.source, seed=options.seed, protocol=options.protocol, images=options.images,
        draws=options.draws_per_image, num=options.num_scenes, reading=reading,
    )  # fmt: skip
    sizes = {"vision_size": options.vision_size, "image_size": options.image_size, "mask_size": options.mask_size}
    needed = {"masks": ("image_size", "mask_size"), "chat": tuple(sizes), "referring": ("vision_size", "image_size")}[
        kind
    ]
    given = [size for size in needed if sizes[size]]
    if given and len(given) < len(needed):
        raise ConfigError(
            f"{options.name} needs all of {', '.join('--' + n.replace('_', '-') for n in needed)}, or none"
        )
    sizes = {k: v if k in needed else 0 for k, v in sizes.items()}
    if options.records_per_shard < 1 or options.workers < 1:
        raise ConfigError("--records-per-shard, --workers: expected at least 1")
    caches = None
    if (options.cache_features or options.cache_tokens) and not options.check:
        caches = CacheMaker(kind, sizes, options.cache_features, options.cache_tokens, options.pixel_input)
    job = Job(name, kind, source, sizes, options.format, options.records_per_shard, options.seed, caches, reading)
    if options.check:
        found = check(job, options.workers)
        for entry in found["bad"]:
            print(f"{entry['kind']}: {entry['message']}")
        for entry in found["converted"]:
            print(f"converted: {bad_data.one_line(entry['file'])}: {entry['what']}")
        turned = sum(entry["what"].startswith("EXIF orientation") for entry in found["converted"])
        print(f"{found['records']} records, {len(found['bad'])} problems, {len(found['converted'])} images converted")
        if turned:
            print(f"{turned} images have an EXIF orientation; --exif is {options.exif!r}")
        return 1 if found["bad"] else 0
    if not options.out:
        raise ConfigError("--out is required (see --help)")
    folder = prepare(job, options.out, max_bad_fraction=options.max_bad_fraction, workers=options.workers)
    manifest = json.loads((folder / prepared.MANIFEST).read_text())
    print(f"{manifest['written']} of {manifest['records']} records in {folder}, {len(manifest['bad'])} left out")
    return 0


def command() -> None:
    """The installed command: `main`, with one line for bad input."""
    cli.run(main)


if __name__ == "__main__":
    command()
