"""Tiny PyTorch checkpoints of every kind, written in the reference's layout, and how to compare them."""

import json

import numpy as np
from safetensors.numpy import save_file

from alto_jax.config import to_dict
from alto_jax.mllm.alto_llm import ModelConfig
from alto_jax.mllm.intern_vit import InternViTConfig
from alto_jax.mllm.language_model import LanguageModelConfig
from alto_jax.tokenizer.alto import TokenizerConfig
from alto_jax.tokenizer.encoder import ViTConfig
from alto_jax.tokenizer.pixel_decoder import PixelDecoderConfig
from alto_jax.tokenizer.sam_encoder import SamEncoderConfig
from tools.convert_torch_weights import configs_for_torch
from tools.convert_torch_weights.mapping import get_table
from tools.convert_torch_weights.sources import open_source


def language(embed_dim, num_layers, num_heads, num_kv_heads, mlp_dim, vocab_size, qkv_bias):
    return LanguageModelConfig(
        vocab_size, embed_dim, num_layers, num_heads, num_kv_heads, None, mlp_dim, qkv_bias=qkv_bias
    )


def tiny_mllm(language_model):
    return ModelConfig(TINY_TOKENIZER, TINY_VIT, language_model)


TINY_TOKENIZER = TokenizerConfig(
    mask_size=16, patch_size=8, num_latent_tokens=4, codebook_size=8, token_size=4,
    encoder=ViTConfig(8, 2, 2), decoder=ViTConfig(12, 1, 3),
    sam=SamEncoderConfig(32, 4, 8, 5, 2, 4, (1, 3), 3, 8),
    pixel_decoder=PixelDecoderConfig(6, 4, (1, 1, 2, 2), 2),
)  # fmt: skip
TINY_VIT = InternViTConfig(image_size=8, patch_size=2, embed_dim=8, num_layers=2, num_heads=2, mlp_dim=12)
TINY = {
    "alto": TINY_TOKENIZER,
    "sam": TINY_TOKENIZER.sam,
    "internvit": TINY_VIT,
    "internlm2": language(8, 3, 4, 2, 10, 11, False),
    "qwen2": language(8, 3, 4, 2, 10, 11, True),
    "internvl-internlm2": tiny_mllm(language(8, 1, 4, 2, 10, 11, False)),
    "internvl-qwen2": tiny_mllm(language(8, 1, 4, 2, 10, 11, True)),
    "altollm-internlm2": tiny_mllm(language(8, 2, 4, 4, 10, 11, False)),
    "altollm-qwen2": tiny_mllm(language(8, 2, 4, 1, 10, 11, True)),
}
KINDS = [*TINY, "titok"]
PARTS = {"alto": "tokenizer", "titok": "tokenizer", "sam": "sam", "internvit": "vision", "internlm2": "language_model",
         "qwen2": "language_model"}  # fmt: skip


def source_shapes(table):
    return {
        key: shape
        for rule in table.rules
        for row in rule.rows()
        for key, (_, shape) in zip(rule.keys(row), rule.sources)
    }


def synthetic(kind, config, dtype=np.float32):
    """A random state dict of a kind; buffers have their true values."""
    rng = np.random.default_rng(0)
    table = get_table(kind, config)
    state = {key: rng.normal(size=shape).astype(dtype) for key, shape in source_shapes(table).items()}
    for rule in table.rules:
        if not rule.targets:
            state.update(zip(rule.keys(None), rule.inverse()))
    return state


def own_values(kind):
    """Our configuration of a tiny kind, as plain ModelConfig values."""
    config = to_dict(TINY_TOKENIZER if kind == "titok" else TINY[kind])
    if kind == "sam":
        return {"tokenizer": {"sam": config}}
    return {PARTS[kind]: config} if kind in PARTS else config


def tiny_state(kind, dtype=np.float32):
    if kind != "titok":
        state = synthetic(kind, TINY[kind], dtype)
    else:
        rng, table = np.random.default_rng(0), get_table("titok", TINY_TOKENIZER)
        state = {
            key: rng.normal(size=[8 if n is None else n for n in shape]).astype(dtype)
            for key, shape in source_shapes(table).items()
        }
    return state


def write_source(folder, kind, dtype=np.float32, state=None):
    """A checkpoint of a tiny kind in the reference's layout: model.safetensors and config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    state = tiny_state(kind, dtype) if state is None else state
    save_file(state, folder / "model.safetensors")
    config = configs_for_torch.torch_config(kind, own_values(kind), {}, exported_headers(state))
    (folder / "config.json").write_text(json.dumps(config))
    return folder, state


def exported_headers(state):
    return {key: (value.shape, value.dtype, value.nbytes) for key, value in state.items()}


def read_all(path):
    """Every tensor of a PyTorch checkpoint."""
    source = open_source(path)
    return {key: source[key] for key in source}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype and actual[key].shape == value.shape, key
        assert actual[key].tobytes() == value.tobytes(), key
