"""What packing saves: `python -m benchmarks.packing [--steps 5]`.

Prints the share of padding in stage-2 batches of the built-in conversations, with a row of its own for each and packed,
at the tiny model's sizes and at those of the 8B model's text (256 image tokens, its system prompt, rows of 1,024), and
how many of the packed rows' image slots are used. Then, in one run and taking turns, the text tokens per second of loss
and gradients of the tiny model on both kinds of batches (compiled before; medians over the steps).
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import time

import jax
import numpy as np

from alto_jax import experiment, main
from alto_jax.batch import ChatBatch
from alto_jax.data import pipeline, sources, vocabulary
from alto_jax.mllm.alto_llm import init_params
from alto_jax.mllm.text import SYSTEM_MESSAGE
from alto_jax.stages import sft

# Data options and how many of `--rows` a batch has; 192 is to the tiny model's conversations what 1,024 is to the 8B's.
TINY = {
    "own rows of 128": ({"max_length": 128}, 1.0),
    "own rows of 192": ({"max_length": 192}, 1.0),
    "packed by 2 in rows of 192": ({"max_length": 192, "pack_samples": 2}, 0.5),
    "packed by 5 in rows of 512": ({"max_length": 512, "pack_samples": 5}, 0.25),
}
PAPER = {
    "own rows of 1,024": {"max_length": 1024},
    "packed by 2 in rows of 1,024": {"max_length": 1024, "pack_samples": 2},
}


def padding(batches: list[ChatBatch]) -> float:
    """Share of the text positions that hold no token."""
    return 1 - float(np.mean([batch.text_mask.mean() for batch in batches]))


def slots_used(batches: list[ChatBatch]) -> float:
    """Share of the packed rows' image slots that hold an image."""
    return float(np.mean([batch.segment_ids.max(1).mean() / batch.image.shape[1] for batch in batches]))


def paper_batches(config: experiment.ExperimentConfig, text: sources.TextTokenizer, count: int, **data) -> list:
    """Batches with the 8B model's text sizes and small images."""
    stream = pipeline.chat_batches(
        sources.chat_source(config), text, vision_size=28, image_size=28, mask_size=16, num_image_tokens=256,
        num_latent_tokens=32, max_masks=1, system=SYSTEM_MESSAGE, batch_size=16, seed=0, **data,
    )  # fmt: skip
    return list(itertools.islice(iter(stream), count))


def make_run(config: experiment.ExperimentConfig, special, params: dict):
    """`run(batch)`: loss and gradients of stage 2, waited for."""
    loss_fn = sft.make_loss(config, special)
    frozen = {"tokenizer": params["tokenizer"]}
    trained = {name: value for name, value in params.items() if name != "tokenizer"}

    def loss(trained, batch):
        return loss_fn({**frozen, **trained}, batch, jax.random.key(0), 0)[0]

    step = jax.jit(jax.value_and_grad(loss))
    return lambda batch: jax.block_until_ready(step(trained, batch))


def measure() -> dict:
    """The command; returns what it prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rows", type=int, default=16, help="conversations of a batch")
    args = parser.parse_args()
    config = experiment.make_experiment(main.load_config("configs/stage2.py:tiny"))
    text = vocabulary.text_tokenizer(config)
    params = jax.jit(lambda key: init_params(config.model, key))(jax.random.key(0))
    found, runs, batches = {}, {}, {}
    for kind, data in PAPER.items():
        found[f"8B text, {kind}"] = {"padding": round(padding(paper_batches(config, text, 8, **data)), 3)}
    for kind, (data, share) in TINY.items():
        changed = dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, **data),
            train=dataclasses.replace(config.train, batch_size=int(args.rows * share)),
        )
        batches[kind] = list(itertools.islice(sources.chat_iterator(changed, text), args.steps))
        runs[kind] = make_run(changed, text.ids, params)
        runs[kind](batches[kind][0])
        found[f"tiny, {kind}"] = {"padding": round(padding(batches[kind]), 3)}
        if "pack_samples" in data:
            found[f"tiny, {kind}"]["image slots used"] = round(slots_used(batches[kind]), 3)
    speeds: dict[str, list[float]] = {kind: [] for kind in TINY}
    for step in range(args.steps):
        for kind, run in runs.items():
            batch, began = batches[kind][step], time.perf_counter()
            run(batch)
            speeds[kind].append(int(batch.text_mask.sum()) / (time.perf_counter() - began))
    for kind, values in speeds.items():
        found[f"tiny, {kind}"]["text tokens/s"] = round(statistics.median(values), 1)
    return found


if __name__ == "__main__":
    print(json.dumps(measure(), indent=1))
