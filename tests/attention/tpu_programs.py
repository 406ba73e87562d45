"""What a TPU's compiler makes of attention and of the loop of tokens, ahead of time.

    python tests/attention/tpu_programs.py

Needs `pip install -e '.[plan]'` (libtpu) and no TPU. Prints a line of JSON: for each program how many kernels it calls,
and its arrays of all pairs of positions; of the loop of tokens, what it moves that is as large as a weight.
In a process of its own, since libtpu ends one that has XLA's flags for CPUs.
"""

import functools
import json
import re

import jax
import jax.numpy as jnp

from alto_jax.layers import SelfAttention, apply_module
from alto_jax.mllm import generate as generation
from alto_jax.mllm.generate import GenerateConfig
from alto_jax.mllm.language_model import LanguageModel, LanguageModelConfig, for_inference
from alto_jax.parallel import sharding
from alto_jax.plan import topology
from alto_jax.tokenizer.sam_encoder import SamBlock, SamEncoderConfig
from tests.mllm.test_cache import SPECIAL
from tests.mllm.test_decode_program import lines_in_loops, moved_in_loops


@functools.cache
def mesh():
    topology.prepare_environment("v5p:2x2x1")
    return sharding.make_mesh(sharding.MeshConfig(1, 1, 1), topology.find_devices("v5p:2x2x1")[:1])


def compiled(function, *shapes):
    place = jax.sharding.NamedSharding(mesh(), jax.sharding.PartitionSpec())
    given = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes)
    return jax.jit(sharding.on_mesh(mesh(), function)).lower(*given).compile().as_text()


def arrays_of_pairs(text: str, length: int) -> list[str]:
    """Types of arrays with two dimensions of a sequence's length, or of what a kernel fills it up to."""
    shapes = set(re.findall(r"\w+\[[\d,]+\]", text))
    long = lambda shape: [
        d for d in map(int, re.findall(r"\d+", shape.partition("[")[2])) if length <= d < length + 128
    ]
    return [shape for shape in shapes if len(long(shape)) > 1]


def gradient_of(module):
    return jax.grad(lambda params, x: jnp.sum(jax.tree.leaves(apply_module(module, params, x))[0].astype(jnp.float32)))


def attention_of(module, shape):
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    params = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    return compiled(gradient_of(module), params, x)


LANGUAGE = LanguageModelConfig(
    vocab_size=1024, embed_dim=512, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=1024, dtype="bfloat16",
    param_dtype="bfloat16",
)  # fmt: skip


def language_params():
    ids = jax.ShapeDtypeStruct((2, 64), jnp.int32)
    init = functools.partial(LanguageModel(LANGUAGE).init, method="forward")
    return jax.eval_shape(init, jax.random.key(0), ids, ids)["params"]


def prompt(length):
    """The gradient of a prompt's hidden states."""
    model, like = LanguageModel(LANGUAGE), jax.ShapeDtypeStruct
    run = lambda params, x, positions: apply_module(model, params, x, positions)[0].astype(jnp.float32)
    total = jax.grad(lambda *given: jnp.sum(run(*given)))
    x = like((1, length, LANGUAGE.embed_dim), jnp.bfloat16)
    return compiled(total, language_params(), x, like((1, length), jnp.int32))


def moved_for_a_token():
    """What the loop of tokens moves that is as large as the smallest weight."""
    model, cfg, like = LanguageModel(LANGUAGE), GenerateConfig(max_new_tokens=10, grammar=True), jax.ShapeDtypeStruct
    params = jax.eval_shape(functools.partial(for_inference, LANGUAGE), language_params())
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2))
    controls = jax.eval_shape(cfg.controls)

    def run(params, embedded, mask, inside, count, controls, keys):
        start = inside, count
        return generation._generate(model, cfg.static(), SPECIAL, 1, params, embedded, mask, start, controls, keys)

    text = compiled(run, params, like((2, 64, LANGUAGE.embed_dim), jnp.bfloat16), like((2, 64), bool), like((2,), bool),
                    like((2,), jnp.int32), controls, keys)  # fmt: skip
    assert lines_in_loops(text)
    return moved_in_loops(text, min(a.size for a in jax.tree.leaves(params["blocks"]) if len(a.shape) > 1))


def main():
    found = {}
    sam, vit = (
        SamEncoderConfig(dtype="bfloat16", param_dtype="bfloat16"),
        {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16},
    )
    for name, text, length in (
        ("sam", attention_of(SamBlock(sam, 0), (1, 64, 64, 1024)), 4096),
        ("vit", attention_of(SelfAttention(16, **vit), (1, 1025, 1024)), 1025),
        ("language", prompt(2048), 2048),
    ):
        found[name] = {"kernels": text.count("tpu_custom_call"), "pairs": arrays_of_pairs(text, length)}
    print(json.dumps(found | {"moved": moved_for_a_token()}))


if __name__ == "__main__":
    main()
