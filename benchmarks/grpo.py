"""Cost of one GRPO step with a shared prompt and without (`naive`), in one run: `python benchmarks/grpo.py`.

The paper's shape: groups of 12, 256 image and 60 prompt tokens, 34 new tokens; rollout, reference pass, policy pass
and update by the stage's own functions. A language model of two wide, unrolled layers, whose head costs about as large
a part of it as the 8B model's; vision tower and mask tokenizer are small and run once per image in both programs,
which is to the naive one's favour. FLOPs are XLA's own count of the compiled programs; the body of the rollout's
`while_loop`, which XLA counts once, is counted apart and multiplied. Targets: 0.25 of the FLOPs, 0.4 of the wall time.
"""

import argparse
import functools
from pathlib import Path
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).parents[1]))

from alto_jax.batch import PromptBatch
from alto_jax.config import build
from alto_jax.experiment import ExperimentConfig
from alto_jax.layers import unstacked
from alto_jax.mllm.alto_llm import init_params
from alto_jax.mllm.language_model import KVCache, LanguageModel, for_inference
from alto_jax.mllm.text import SpecialIds
from alto_jax.stages import grpo

GROUP, IMAGE_TOKENS, TEXT_TOKENS, NEW_TOKENS = 12, 256, 60, 34
# Note: no id of these can be sampled (there are 1,024 tokens), so that no answer ends early.
SPECIAL = SpecialIds(
    pad=0, bos=None, im_start=2001, im_end=2002, img=2003, img_end=2004, img_context=1, ref=2006, ref_end=2007,
    box=2008, box_end=2009, mask_start=2010, mask_end=2011, code_0=2012, num_codes=64,
)  # fmt: skip


def make_config(width: int, share_prompt: bool) -> ExperimentConfig:
    """Stage 3 with one of the two modes."""
    vit = {"embed_dim": 32, "num_layers": 1, "num_heads": 2}
    heads = width // 64
    return build(
        ExperimentConfig,
        {
            "stage": "stage3",
            "model": {
                "tokenizer": {
                    "mask_size": 32, "patch_size": 8, "num_latent_tokens": 32, "codebook_size": 64, "token_size": 6,
                    "encoder": vit, "decoder": vit, "sam": None,
                    "pixel_decoder": {"z_channels": 16, "hidden_channels": 16, "channel_mult": [1], "out_patch": 8,
                                      "num_res_blocks": 1},
                },
                "vision": {"image_size": 256, "patch_size": 8, "embed_dim": 32, "num_layers": 1, "num_heads": 2,
                           "mlp_dim": 64},
                "language_model": {"vocab_size": 1024, "embed_dim": width, "num_layers": 2, "num_heads": heads,
                                   "num_kv_heads": max(heads // 4, 1), "mlp_dim": width * 7 // 2, "unroll": 2},
            },
            "grpo": {
                "num_generations": GROUP,
                "generate": {"max_new_tokens": NEW_TOKENS, "temperature": 1.0, "share_prompt": share_prompt},
            },
        },
    )  # fmt: skip


def make_batch(images: int, size: int) -> PromptBatch:
    """Prompts of 316 tokens without padding."""
    rng = np.random.default_rng(0)
    text = rng.integers(2, 1024, (images, TEXT_TOKENS))
    ids = np.concatenate([np.full((images, IMAGE_TOKENS), SPECIAL.img_context), text], axis=1).astype(np.int32)
    return PromptBatch(
        image=rng.integers(0, 256, (images, size, size, 3)).astype(np.uint8),
        pixel_image=np.zeros((images, 32, 32, 3), np.uint8),
        prompt_ids=ids,
        prompt_mask=np.ones(ids.shape, bool),
        mask=(rng.random((images, 32, 32)) < 0.5).astype(np.float32),
    )


def programs(config: ExperimentConfig):
    """(rollout with the reference pass, update), not yet compiled."""
    loss_fn, optimizer = grpo.make_loss(config, SPECIAL), optax.adamw(1e-5)

    def rollout(params, batch, key):
        return grpo.rollout(config, SPECIAL, params, batch, key)

    def update(params, opt_state, rollout):
        def loss(language_model):
            return loss_fn({**params, "language_model": language_model}, rollout, None, 0)[0]

        grads = jax.grad(loss)(params["language_model"])
        updates, opt_state = optimizer.update(grads, opt_state, params["language_model"])
        return {**params, "language_model": optax.apply_updates(params["language_model"], updates)}, opt_state

    return jax.jit(rollout), jax.jit(update), optimizer


def decode_flops(config: ExperimentConfig, params: dict, images: int) -> float:
    """FLOPs of one iteration of the rollout's loop: one token of every answer, prompt and answers cached."""
    model = LanguageModel(config.model.language_model)
    rows, prompt = images * GROUP, IMAGE_TOKENS + TEXT_TOKENS
    prefixes = images if config.grpo.generate.share_prompt else rows

    @jax.jit
    def step(params, token, cache, prefix):
        apply = functools.partial(model.apply, {"params": for_inference(model.cfg, params)})
        cache, prefix = (unstacked(kept, model.cfg.num_layers) for kept in (cache, prefix))
        hidden, cache = apply(
            apply(token, method="embed"), jnp.full((rows, 1), prompt), cache=cache, cache_index=5, prefix=prefix
        )
        return apply(hidden[:, 0], method="logits"), cache

    caches = [KVCache.create(config.model.language_model, r, n) for r, n in ((rows, NEW_TOKENS), (prefixes, prompt))]
    compiled = step.lower(params["language_model"], jnp.zeros((rows, 1), jnp.int32), *caches).compile()
    return compiled.cost_analysis()["flops"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="0: FLOPs only")
    options = parser.parse_args()
    configs = {name: make_config(options.width, name == "packed") for name in ("packed", "naive")}
    params = jax.jit(lambda key: init_params(configs["packed"].model, key))(jax.random.key(0))
    params["reference"] = params["language_model"]
    batch = make_batch(options.images, 256)
    flops, steps = {}, {}
    for name, config in configs.items():
        rollout, update, optimizer = programs(config)
        opt_state = optimizer.init(params["language_model"])
        args = params, batch, jax.random.key(0)
        compiled_rollout = rollout.lower(*args).compile()
        rolled = jax.eval_shape(rollout, *args)
        compiled_update = update.lower(params, opt_state, rolled).compile()
        loop = (NEW_TOKENS - 2) * decode_flops(config, params, options.images)
        count = lambda compiled: compiled.cost_analysis()["flops"]
        flops[name] = {"rollout, reference": count(compiled_rollout) + loop, "policy, update": count(compiled_update)}
        steps[name] = functools.partial(_step, compiled_rollout, compiled_update, args, opt_state)
    for part in (*flops["packed"], "total"):
        values = [sum(f.values()) if part == "total" else f[part] for f in flops.values()]
        print(f"{part:20} packed {values[0] / 1e9:8.1f} GFLOP  naive {values[1] / 1e9:8.1f} GFLOP  "
              f"ratio {values[0] / values[1]:.3f}", flush=True)  # fmt: skip
    if not options.rounds:
        return
    times: dict[str, list] = {name: [] for name in steps}
    for step in steps.values():
        lengths = step()
        assert int(lengths.min()) == NEW_TOKENS, "an answer ended early"
    for _ in range(options.rounds):
        for name, step in steps.items():
            wall, cpu = time.perf_counter(), time.process_time()
            step()
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    medians = {name: [statistics.median(column) for column in zip(*rows)] for name, rows in times.items()}
    (wall, cpu), (naive_wall, naive_cpu) = medians["packed"], medians["naive"]
    print(
        f"wall time            packed {wall:8.2f} s      naive {naive_wall:8.2f} s      ratio {wall / naive_wall:.3f}"
    )
    print(f"CPU time             packed {cpu:8.2f} s      naive {naive_cpu:8.2f} s      ratio {cpu / naive_cpu:.3f}")


def _step(rollout, update, args, opt_state):
    """One whole step; returns the answers' lengths."""
    rolled = rollout(*args)
    jax.block_until_ready(update(args[0], opt_state, rolled))
    return np.asarray(rolled.completion_mask).sum(axis=-1)


if __name__ == "__main__":
    main()
