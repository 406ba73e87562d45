"""Images per second of the stage-2 pipeline: `python -m benchmarks.data [--images 48] [--rounds 9] [--format raw]`.

In one run, on the same files (images and masks) and the same number of threads: bare Pillow (decode; resize images to
448 and to 1024, masks to 256), the pipeline from raw files (images at both sizes, masks, tokens, batched) with threads
and with as many processes (`--workers`), and the pipeline from a prepared set. They take turns in every round, each
time in another order; printed are the medians over the rounds of the rates, and of each round's ratio to bare Pillow,
so that other load on the machine, which changes from minute to minute, falls out of them. Photos are scikit-image's.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
import json
import os
import pathlib
import shutil
import statistics
import tempfile
import time

import numpy as np
from PIL import Image

from alto_jax.data import pipeline, prepare
from alto_jax.data.conversations import Conversations
from alto_jax.data.prepared import Prepared
from alto_jax.mllm import text

PHOTOS = ("astronaut", "coffee", "chelsea", "rocket", "motorcycle_left", "hubble_deep_field", "retina", "ihc")
SIZES = {"vision_size": 448, "image_size": 1024, "mask_size": 256}


def write_files(root: pathlib.Path, count: int, long_side: int) -> pathlib.Path:
    """A meta file with JPEG photos (`long_side` pixels; 0: as they are) and masks; returns its path."""
    import skimage

    folder = pathlib.Path(skimage.__file__).parent / "data"
    photos = [p for p in sorted(folder.iterdir()) if p.suffix in (".png", ".jpg", ".jpeg") and p.stem in PHOTOS]
    root.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        image = Image.open(photos[number % len(photos)]).convert("RGB")
        if long_side:
            scale = long_side / max(image.size)
            image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        y, x = np.mgrid[: image.height, : image.width] / min(image.size)
        mask = (x - 0.5) ** 2 + (y - 0.4) ** 2 < 0.05 + 0.02 * np.sin(7 * x + number)
        image.save(root / f"{number}.jpg", quality=92)
        Image.fromarray(mask.astype(np.uint8) * 255).save(root / f"{number}.png")
        turns = [{"from": "human", "value": f"<image>\n{text.question(f'object {number}', adaptive=True)}"}]
        turns.append({"from": "gpt", "value": text.answer(adaptive=True)})
        lines.append(json.dumps({"image": f"{number}.jpg", "mask": f"{number}.png", "conversations": turns}))
    (root / "chat.jsonl").write_text("\n".join(lines) + "\n")
    entry = {"root": ".", "annotation": "chat.jsonl", "data_augment": False, "repeat_time": 1, "length": count}
    (root / "meta.json").write_text(json.dumps({"bench": entry}))
    return root / "meta.json"


def bare(root: pathlib.Path, count: int, threads: int) -> float:
    """Images per second of Pillow alone: decode and resizes."""

    def one(number: int) -> None:
        image = Image.open(root / f"{number}.jpg").convert("RGB")
        for side in (SIZES["vision_size"], SIZES["image_size"]):
            np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))
        mask = Image.open(root / f"{number}.png")
        np.asarray(mask.resize((SIZES["mask_size"],) * 2, Image.Resampling.BICUBIC))

    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, range(count)))
    return count / (time.perf_counter() - start)


def piped(source, tok: text.TextTokenizer, threads: int, batch: int, epochs: int, workers: int = 0) -> float:
    """Images per second of batches of the training pipeline, once it runs (from the first batch on)."""
    batches = pipeline.chat_batches(
        source, tok, **SIZES, max_length=512, num_image_tokens=256, num_latent_tokens=32, max_masks=1,
        batch_size=batch, seed=0, num_epochs=epochs, num_threads=threads, num_workers=workers,
        prefetch=2,
    )  # fmt: skip
    iterator, images = iter(batches), 0
    for _ in range(max(workers, 1)):  # Note: each process starts at its first record.
        next(iterator)
    start = time.perf_counter()
    for found in iterator:
        images += len(found.ids)
    rate = images / (time.perf_counter() - start)
    iterator.close()
    return rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--long-side", type=int, default=0, help="pixels of the photos' long side (SA-1B: 2250)")
    parser.add_argument("--format", default="raw", help="of the prepared data set: raw, png or jpeg")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="reading processes")
    args = parser.parse_args()
    work = pathlib.Path(tempfile.mkdtemp(prefix="alto_jax_bench_"))
    try:
        meta = write_files(work / "raw", args.images, args.long_side)
        raw = Conversations(meta)
        job = prepare.Job("bench", "chat", Conversations(meta, once=True), SIZES, args.format, 16, 0)
        prepared = Prepared(prepare.prepare(job, work / "prepared", max_bad_fraction=0, workers=args.threads))
        tok = text.TextTokenizer.train_builtin(["Segment the object by adaptive length."] * 50, 300, 1024)
        piped(prepared, tok, args.threads, args.batch_size, 1)  # imports and caches
        runs = {
            "bare Pillow": lambda: bare(work / "raw", args.images, args.threads),
            "pipeline, raw files": lambda: piped(raw, tok, args.threads, args.batch_size, 2),
            f"the same, {args.workers} processes": lambda: piped(
                raw, tok, args.threads, args.batch_size, 4, workers=args.workers
            ),
            "pipeline, prepared": lambda: piped(prepared, tok, args.threads, args.batch_size, 12),
        }
        rates: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(args.rounds):
            names = list(runs)[number % 4 :] + list(runs)[: number % 4]
            for name in names:
                rates[name].append(runs[name]())
        size = sum(f.stat().st_size for f in (work / "prepared").rglob("*") if f.is_file()) / args.images
        print(f"{args.threads} threads, {args.images} photos; prepared as {args.format}: {size / 1e6:.2f} MB an image")
        for name, values in rates.items():
            ratios = sorted(value / base for value, base in zip(values, rates["bare Pillow"]))
            print(
                f"{name:22s}{statistics.median(values):8.1f} images/s  {statistics.median(ratios):5.2f} x bare Pillow "
                f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
            )
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
