"""Answers in words: no mask is decoded. What has masks is `alto_llm.segment`."""

import functools

import jax

from alto_jax.batch import PromptBatch
from alto_jax.layers import apply_module, told_precision
from alto_jax.mllm.alto_llm import ALToLLM, ModelConfig
from alto_jax.mllm.generate import GenerateConfig, Generated, generate
from alto_jax.mllm.language_model import LanguageModel
from alto_jax.mllm.text import SpecialIds


def answer(
    cfg: ModelConfig,
    params: dict,
    batch: PromptBatch,
    generate_cfg: GenerateConfig,
    special: SpecialIds,
    rng: jax.Array,
) -> Generated:
    """Answers prompts about images, each of one or several tiles, or several images; jittable.

    Args:
      cfg: the model; params: its parameters.
      batch: prompts, and images uint8[B, V, V, 3] or uint8[B, N, V, V, 3], whose tokens stand in the prompts in order;
        its pixel_image and mask are not used.
      generate_cfg, special, rng: see `generate.generate`.
    """
    apply = functools.partial(apply_module, ALToLLM(cfg), params)
    with told_precision(cfg.matmul_precision):
        tokens = apply(batch.image, method="image_tokens")
        inputs = apply(batch.prompt_ids, tokens, special.img_context, method="embed")
        language = LanguageModel(cfg.need_language_model()), params["language_model"]
        return generate(*language, inputs, batch.prompt_mask, generate_cfg, special, rng, prompt_ids=batch.prompt_ids)
