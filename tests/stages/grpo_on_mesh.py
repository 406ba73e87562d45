"""Packed and naive policy passes on the mesh (2, 2, 2): prints how far log-probabilities and gradients differ.

Run by test_grpo.py in a process with eight virtual devices. Parameters and batch are split by the rules of
`sharding`; completions are ragged. Gradients are those of the language model, relative to the largest entry of each
parameter's gradient.
"""

import functools
import json

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from alto_jax.batch import PromptBatch
from alto_jax.losses.grpo import GrpoLossConfig, grpo_loss
from alto_jax.mllm import generate as generation
from alto_jax.mllm.alto_llm import ALToLLM
from alto_jax.mllm.generate import GenerateConfig
from alto_jax.mllm.language_model import LanguageModel, for_inference
from alto_jax.parallel import sharding
from tests.debug_model import random_params
from tests.mllm.test_decode_program import moved_in_loops
from tests.stages import test_grpo as case

BATCH, GROUP, PROMPT, LENGTH = 8, 3, 7, 6


@functools.partial(jax.jit, static_argnums=5)
def slope(logps, wanted, noise, advantages, mask, cfg):
    """Gradient of the objective in the log-probabilities; the old and the reference policy's lie about `wanted`."""
    old, reference = wanted + 0.3 * noise[:, 0], wanted + 0.3 * noise[:, 1]
    return jax.grad(lambda x: grpo_loss(x, old, reference, advantages, mask, cfg)[0])(logps)


def main() -> None:
    mesh = sharding.make_mesh(sharding.MeshConfig(2, 2, 2))
    found = sharding.on_mesh(mesh, compare)(mesh)
    params, ids, logits = found.pop("in_8_bits")  # to be compared with those of one device, outside of the mesh
    found["logits_in_8_bits"] = float(np.max(np.abs(logits - jax.device_get(logits_in_8_bits(params, ids)))))
    print(json.dumps(found))


def gathered_in_loop(params: dict, batch: PromptBatch, quantize: str) -> list[str]:
    """Collectives of a weight's size in the loop of tokens; the weights are split over fsdp and tensor."""
    model = LanguageModel(case.CONFIG.need_language_model())
    cfg = GenerateConfig(max_new_tokens=5, temperature=1.0, quantize=quantize)
    rows = len(batch.prompt_ids)
    embedded = jnp.zeros((*batch.prompt_ids.shape, model.cfg.embed_dim))
    start, keys = (jnp.zeros(rows, bool), jnp.zeros(rows, jnp.int32)), jax.random.split(jax.random.key(0), rows)
    args = params, embedded, batch.prompt_mask, start, cfg.controls(), keys
    lowered = generation._generate.lower(model, cfg.static(), case.SPECIAL, GROUP, *args)
    kinds = frozenset({"all-gather", "all-gather-start", "all-to-all", "collective-permute"})
    # Of the smallest kernel, as the mesh's tensor axis leaves it; rows of the batch and of the embedding are smaller.
    return moved_in_loops(lowered.compile().as_text(), 32 * 2 * 1 * 8, kinds)


def split_in_8_bits(params: dict) -> dict[str, list]:
    """Type, shape and shape on a device of a layer's parameters for the loop of tokens."""
    convert = functools.partial(for_inference, case.CONFIG.need_language_model(), quantize="int8")
    found = jax.jit(convert)(params)
    leaves = jax.tree_util.tree_leaves_with_path(found["blocks"]["layers"][1])
    return {
        sharding.param_path(path): [str(leaf.dtype), leaf.shape, leaf.sharding.shard_shape(leaf.shape)]
        for path, leaf in leaves
    }


@jax.jit
def logits_in_8_bits(params: dict, ids: jax.Array) -> jax.Array:
    """Logits float32[B, T, V] of a language model whose kernels are rounded to 8 bits."""
    model = LanguageModel(case.CONFIG.need_language_model())
    return model.apply({"params": for_inference(model.cfg, params, "int8")}, ids, method="forward")


def compare(mesh: jax.sharding.Mesh) -> dict:
    """The differences, with parameters, batch and activations split over the mesh."""
    rng = np.random.default_rng(0)
    params = traverse_util.unflatten_dict(random_params(case.CONFIG), sep="/")
    params = jax.device_put(params, sharding.tree_shardings(params, mesh))
    ids = rng.integers(13, 40, (BATCH, PROMPT)).astype(np.int32)
    ids[:, 3] = case.SPECIAL.img_context
    prompt_mask = np.arange(PROMPT) >= rng.integers(0, 3, (BATCH, 1))
    lengths = rng.integers(1, LENGTH + 1, (BATCH, GROUP, 1))
    batch = PromptBatch(
        image=rng.integers(0, 256, (BATCH, 28, 28, 3)).astype(np.uint8),
        pixel_image=np.zeros((BATCH, 16, 16, 3), np.uint8),
        prompt_ids=np.where(prompt_mask, ids, case.SPECIAL.pad),
        prompt_mask=prompt_mask,
        mask=np.zeros((BATCH, 16, 16), np.float32),
    )
    mask = np.arange(LENGTH) < lengths
    completions = np.where(mask, rng.integers(0, 40, (BATCH, GROUP, LENGTH)), case.SPECIAL.pad).astype(np.int32)
    noise = rng.normal(size=(2, BATCH, GROUP, LENGTH)).astype(np.float32).swapaxes(0, 1)
    advantages = rng.normal(size=(BATCH, GROUP)).astype(np.float32)
    data = sharding.put_batch((batch, completions, mask, noise, advantages), mesh, BATCH)

    batch, completions, mask, noise, advantages = data
    apply = lambda p, image: ALToLLM(case.CONFIG).apply({"params": p}, image, method="image_tokens")
    arguments = params, batch, jax.jit(apply)(params, batch.image), completions
    logps = {
        f: case.logps_and_gradients(f, *arguments, jnp.zeros(completions.shape))[0]
        for f in (case.first_of_packed, case.naive_logps)
    }
    got, want = logps.values()
    gradients = {}
    for objective in ("paper", "reference", "dr_grpo", "dapo", "gspo"):
        cfg = GrpoLossConfig(objective=objective, beta=0.1, loss_cap=100.0)
        both = [
            case.logps_and_gradients(f, *arguments, slope(values, want, noise, advantages, mask, cfg))[1]
            for f, values in logps.items()
        ]
        pairs = zip(*map(jax.tree.leaves, jax.device_get(both)))
        gradients[objective] = max(float(np.max(np.abs(a - b)) / np.max(np.abs(b))) for a, b in pairs)
    split = sum(not leaf.is_fully_replicated for leaf in jax.tree.leaves(params["language_model"]))
    return {
        "gathered_in_loop": [
            line for kind in ("", "int8") for line in gathered_in_loop(params["language_model"], batch, kind)
        ],
        "split_in_8_bits": split_in_8_bits(params["language_model"]),
        "in_8_bits": jax.device_get(
            (params["language_model"], batch.prompt_ids, logits_in_8_bits(params["language_model"], batch.prompt_ids))
        ),
        "devices": jax.device_count(),
        "images_per_device": batch.image.addressable_shards[0].data.shape[0],
        "split_parameters": split,
        "logps": float(np.max(np.abs(np.where(*jax.device_get((mask, got - want)), 0)))),
        "gradients": gradients,
    }


if __name__ == "__main__":
    main()
