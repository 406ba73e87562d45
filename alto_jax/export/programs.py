"""What is exported of a model: functions of (weights, *arrays), and the names, shapes and types of what they take.

The first dimension of every array is "b", the number of rows, which stays open. Weights are arguments: a program then
has kilobytes, all of a model's programs share one file of weights, and a fine-tuned model's fit the same programs.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alto_jax.batch import PromptBatch
from alto_jax.layers import told_precision
from alto_jax.mllm.alto_llm import segment
from alto_jax.mllm.generate import Controls, GenerateConfig
from alto_jax.mllm.text import SpecialIds
from alto_jax.tokenizer.alto import ALTo

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Program:
    """A function of (parameters, *arrays) that is exported under a name.

    Attributes:
      name: of its file and in the manifest.
      function: gives a tuple of arrays; of the parameters it gets a model's tree.
      inputs: (name, shape without the rows, type) of each array.
      outputs: names of the results.
    """

    name: str
    function: Callable[..., tuple[Array, ...]]
    inputs: Sequence[tuple[str, tuple[int, ...], Any]]
    outputs: Sequence[str]


def portable(cfg: Any) -> Any:
    """A model's configuration whose attention is in plain operations, which every platform has.

    The fast kernels belong to one platform each, and which one is decided while tracing, on the machine that exports.
    """
    changes = {}
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if field.name == "attention":
            changes[field.name] = "xla"
        elif dataclasses.is_dataclass(value):
            changes[field.name] = portable(value)
    return dataclasses.replace(cfg, **changes)


def tokenizer_programs(cfg: Any) -> list[Program]:
    """`encode`, `decode` and (with image features) `decode_with_image` of a model's mask tokenizer."""
    tokenizer, precision = cfg.tokenizer, cfg.matmul_precision
    side, tokens, pixels = tokenizer.mask_size, tokenizer.num_latent_tokens, tokenizer.image_size

    def apply(params: Mapping, *arrays: Any, method: str) -> Any:
        with told_precision(precision):
            return ALTo(tokenizer).apply({"params": params["tokenizer"]}, *arrays, method=method)

    def encode(params: Mapping, mask: Array) -> tuple[Array, ...]:
        return tuple(apply(params, mask, method="tokenize"))

    def decode(params: Mapping, codes: Array, length: Array, image: Array | None = None) -> tuple[Array, ...]:
        features = None if image is None else apply(params, image, method="image_features")
        return (jax.nn.sigmoid(apply(params, codes, length, features, method="decode_codes")),)

    coded = [("codes", (tokens,), np.int32), ("length", (), np.int32)]
    found = [
        Program("encode", encode, [("mask", (side, side), np.float32)], ["codes", "length"]),
        Program("decode", decode, coded, ["probability"]),
    ]
    if tokenizer.sam is not None:
        image = ("image", (pixels, pixels, 3), np.uint8)
        found.append(Program("decode_with_image", decode, [*coded, image], ["probability"]))
    return found


def segment_program(cfg: Any, generate: GenerateConfig, special: SpecialIds, prompt_tokens: int) -> Program:
    """`segment`: images and prompts, left padded to `prompt_tokens`, to answers with their first masks, greedily."""
    vision, pixels = cfg.need_vision().image_size, cfg.tokenizer.image_size

    def run(
        params: Mapping, image: Array, pixel_image: Array, ids: Array, mask: Array, low: Array, high: Array, bias: Array
    ) -> tuple[Array, ...]:
        batch = PromptBatch(image, pixel_image, ids, mask, jnp.zeros((0,)))
        controls = Controls(jnp.float32(1.0), low, high, bias)
        found = segment(cfg, dict(params), batch, generate.static(), special, jax.random.key(0), controls=controls)
        answer = found.generated
        masks = found.codes, found.length, found.masks.num_masks, jax.nn.sigmoid(found.mask_logits)
        return answer.ids, answer.mask, answer.per_token_logps, *masks

    inputs = [
        ("image", (vision, vision, 3), np.uint8),
        ("pixel_image", (pixels, pixels, 3), np.uint8),
        ("prompt_ids", (prompt_tokens,), np.int32),
        ("prompt_mask", (prompt_tokens,), np.bool_),
        ("min_length", (), np.int32),
        ("max_length", (), np.int32),
        ("end_bias", (), np.float32),
    ]
    outputs = ["token_ids", "token_mask", "token_logps", "codes", "length", "num_masks", "probability"]
    return Program("segment", run, inputs, outputs)
