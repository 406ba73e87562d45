"""What asking together saves: phrases about one image, images in batches, the first token of a stream.

    python benchmarks/requests.py [--checkpoint alto-tiny] [--rounds 5] [--images 64] [--batch_size 16] [--out FILE.md]

Pictures and phrases are built-in ones that training never showed. Each way is run once before it is timed, so that
nothing compiles; then the ways of a table take turns, and a row has the fastest of the rounds, and the least CPU time
(of all threads), which other programs on the machine disturb less.
"""

import argparse
from collections.abc import Callable, Mapping
import datetime
import os
from pathlib import Path
import platform
import sys
import tempfile
import time

import jax
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from alto_jax.data.composition import ScenesConfig
from alto_jax.data.scenes import ChatConfig, SceneChats
from alto_jax.evaluate.scene_answers import KINDS
from alto_jax.inference import bulk, bulk_work, decoding, requests, segmenter
from alto_jax.mllm import text as words


def pictures(count: int) -> tuple[list[np.ndarray], list[str]]:
    """Built-in pictures uint8[H, W, 3] and a phrase about each."""
    scene_options, chat_options = KINDS["names"]
    source = SceneChats(ScenesConfig(**scene_options, split="validation", seed=11), ChatConfig(**chat_options))
    images, phrases = [], []
    index = 0
    while len(images) < count:
        record = source[index]
        index += 1
        phrase = words.find_reference(record["conversations"][0]["value"])
        if phrase is not None and phrase.startswith(words.REF):
            images.append(record["image"])
            phrases.append(phrase.removeprefix(words.REF).removesuffix(words.REF_END))
    return images, phrases


def fastest(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, tuple[float, float]]:
    """Seconds and CPU seconds of each way, the least of the rounds, in which they take turns."""
    found = {name: (np.inf, np.inf) for name in ways}
    for way in ways.values():
        way()
    for _ in range(rounds):
        for name, way in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            way()
            now = time.perf_counter() - wall, time.process_time() - cpu
            found[name] = tuple(map(min, found[name], now))
    return found


def table(title: str, found: Mapping[str, tuple[float, float]]) -> list[str]:
    """A table whose first row is what the others are compared with."""
    first = next(iter(found.values()))
    lines = [f"| {title} | seconds | of the first row | CPU seconds | of the first row |", "|---|---|---|---|---|"]
    return lines + [
        f"| {name} | {wall:.3f} | {wall / first[0]:.2f} | {cpu:.3f} | {cpu / first[1]:.2f} |"
        for name, (wall, cpu) in found.items()
    ]


def first_token(model: segmenter.Segmenter, image: np.ndarray, phrase: str) -> tuple[float, float, float]:
    """Seconds of a stream of all tokens to its first token, to its answer, and of `segment`."""
    began = time.perf_counter()
    events = model.stream(image, phrase, length="full")
    next(events)
    first = time.perf_counter() - began
    for _ in events:
        pass
    whole = time.perf_counter() - began
    began = time.perf_counter()
    model.segment(image, phrase, length="full")
    return first, whole, time.perf_counter() - began


def arithmetic(model: segmenter.Segmenter, rounds: int) -> list[str]:
    """How fast the vision tower's widest products run, for one image and for sixteen: what a batch could gain there."""
    cfg = model.cfg.vision
    tokens = (cfg.image_size // cfg.patch_size) ** 2 + 1
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    kernels = jax.device_put((draw(cfg.embed_dim, cfg.mlp_dim), draw(cfg.mlp_dim, cfg.embed_dim)))
    product = jax.jit(lambda x, first, second: (x @ first) @ second)
    ways, flops, square = {}, {}, draw(1024, 1024)
    for count in (1, 16):
        x = jax.device_put(draw(count, tokens, cfg.embed_dim))
        name = f"{count} x {tokens} x {cfg.embed_dim} by {cfg.embed_dim} x {cfg.mlp_dim} and back, {320 // count} times"
        ways[name] = lambda x=x, n=320 // count: [jax.block_until_ready(product(x, *kernels)) for _ in range(n)]
        flops[name] = 320 * 4 * tokens * cfg.embed_dim * cfg.mlp_dim
    ways["1024 x 1024 by 1024 x 1024 (numpy), 10 times"] = lambda: [square @ square for _ in range(10)]
    flops["1024 x 1024 by 1024 x 1024 (numpy), 10 times"] = 10 * 2 * 1024**3
    lines = ["| products of matrices (float32) | GFLOP per CPU second |", "|---|---|"]
    return lines + [f"| {n} | {flops[n] / cpu / 1e9:.0f} |" for n, (_, cpu) in fastest(ways, rounds).items()]


def on_disk(model: segmenter.Segmenter, images: list[np.ndarray], phrase: str, batch_size: int) -> float:
    """Seconds of `predict --images` on the images as files, with masks, from reading to COCO results."""
    with tempfile.TemporaryDirectory() as folder:
        root, out = Path(folder) / "images", Path(folder) / "out"
        root.mkdir()
        for index, image in enumerate(images):
            Image.fromarray(image).save(root / f"{index}.png")
        asked = {"length": "adaptive"}
        work = bulk_work.SegmentWork(model, root, asked, prompt=None, exif="upright", batch_size=batch_size,
                                     save_masks=True, save_overlays=False)  # fmt: skip
        began = time.perf_counter()
        bulk.run(requests.of_folder(str(root), "--images", "image", {"text": phrase}), work, out)
        bulk_work.write_coco(out)
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="alto-tiny")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--out", type=Path, help="the tables as Markdown; default: printed alone")
    options = parser.parse_args()
    load_before = os.getloadavg()[0]
    model = segmenter.load(options.checkpoint)
    assert isinstance(model, segmenter.Segmenter)
    images, phrases = pictures(max(options.images, 10))
    ten, image = phrases[:10], images[0]
    encode_once = lambda seen: [model.segment(seen, phrase) for phrase in ten]
    asked = fastest(
        {
            "ten calls, each with the image": lambda: [model.segment(image, phrase) for phrase in ten],
            "ten calls, the image encoded once": lambda: encode_once(model.encode_image(image)),
            "one call with ten phrases": lambda: model.segment(image, ten),
        },
        options.rounds,
    )
    images, phrases = images[: options.images], phrases[: options.images]
    inputs = [model.inputs(one) for one in images]
    sizes = sorted({4, options.batch_size})
    batches = {f"batches of {n}": (lambda n=n: list(model.segment_batch(images, phrases, batch_size=n))) for n in sizes}
    one_by_one = {"one by one": lambda: [model.segment(*pair) for pair in zip(images, phrases, strict=True)]}
    seen = {"of which encoding, one by one": lambda: [jax.block_until_ready(encoded(model, [one])) for one in inputs]}
    batched = fastest(one_by_one | batches | seen, options.rounds)
    disk = min(on_disk(model, images, phrases[0], options.batch_size) for _ in range(2))
    first_token(model, image, ten[0])
    streams = np.array([first_token(model, image, ten[0]) for _ in range(options.rounds)])
    first, whole, direct = streams.min(axis=0)
    flags = f"--checkpoint {options.checkpoint} --rounds {options.rounds} --images {options.images}"
    lines = [
        "# Asking together", "",
        f"`python benchmarks/requests.py {flags} --batch_size {options.batch_size}`,",
        f"{os.cpu_count()} CPU cores ({platform.machine()}), {datetime.date.today()}, jax {jax.__version__}; load of "
        f"the machine before: {load_before:.1f}, after: {os.getloadavg()[0]:.1f}.",
        f"The least of {options.rounds} rounds, in which the ways take turns; nothing compiles in them.", "",
        *table("ten phrases about one image", asked), "",
        *table(f"{len(images)} images, a phrase each", batched), "",
        *arithmetic(model, options.rounds), "",
        f"`predict --images` on the {len(images)} images as files, in batches of {options.batch_size}, with masks as "
        f"PNG and COCO results: {disk:.3f} s, after compilation.", "",
        f"A stream of all {model.cfg.tokenizer.num_latent_tokens} tokens: first token with its mask after "
        f"{first:.3f} s, answer after {whole:.3f} s ({first / whole:.2f} of it);",
        f"`segment` gives the answer, without the masks in between, after {direct:.3f} s.",
    ]  # fmt: skip
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out is not None:
        options.out.write_text(text)


def encoded(model: segmenter.Segmenter, inputs: list[decoding.ImageInputs]) -> list[jax.Array]:
    """What the model sees of images, computed."""
    return [one.image_tokens for one in model.encode_inputs(inputs)]


if __name__ == "__main__":
    main()
