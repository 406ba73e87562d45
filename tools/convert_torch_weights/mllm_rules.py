"""Rules for the multimodal model: InternViT, projector, InternLM2 and Qwen2 (reference/NUMERICS.md §9)."""

import numpy as np

from alto_jax.mllm.intern_vit import InternViTConfig
from alto_jax.mllm.language_model import LanguageModelConfig

from .rules import Rule, conv, dense, norm, reshaped


def vision_rules(cfg: InternViTConfig) -> list[Rule]:
    """InternViT; keys without prefix."""
    dim, heads = cfg.embed_dim, (cfg.num_heads, cfg.embed_dim // cfg.num_heads)
    positions = cfg.grid**2 + 1
    bias = cfg.norm_type == "layer_norm"
    block = [
        reshaped("ls1", "ls1", (dim,)),
        reshaped("ls2", "ls2", (dim,)),
        *norm("norm1", "norm1", dim, bias),
        *norm("norm2", "norm2", dim, bias),
        *dense("attn.qkv", "attn/qkv", (dim,), (3, *heads), bias=cfg.qkv_bias),
        *dense("attn.proj", "attn/out", heads, (dim,)),
        *dense("mlp.fc1", "mlp/fc1", (dim,), (cfg.mlp_dim,)),
        *dense("mlp.fc2", "mlp/fc2", (cfg.mlp_dim,), (dim,)),
    ]
    if cfg.qk_norm:
        block += [*norm("attn.q_norm", "attn/q_norm", dim, False), *norm("attn.k_norm", "attn/k_norm", dim, False)]
    return [
        reshaped("embeddings.class_embedding", "class_embedding", (1, 1, dim), (dim,)),
        reshaped("embeddings.position_embedding", "position_embedding", (1, positions, dim), (positions, dim)),
        *conv("embeddings.patch_embedding", "patch_embed", cfg.patch_size, 3, dim),
        *(rule.at("encoder.layers.{}.", "blocks/layers/", tuple(range(cfg.num_layers))) for rule in block),
    ]


def projector_rules(vision_dim: int, out_dim: int) -> list[Rule]:
    """`mlp1`, for tokens of 2x2 merged patches; keys without prefix."""
    return [
        *norm("0", "norm", 4 * vision_dim),
        *dense("1", "fc1", (4 * vision_dim,), (out_dim,)),
        *dense("3", "fc2", (out_dim,), (out_dim,)),
    ]


def _head(cfg: LanguageModelConfig, key: str) -> list[Rule]:
    """The output projection, unless the embedding table serves as one."""
    return [] if cfg.tie_embeddings else dense(key, "head", (cfg.embed_dim,), (cfg.vocab_size,), False)


def packed_wqkv(cfg: LanguageModelConfig) -> Rule:
    """InternLM2's wqkv: for each key head its query heads, then its key, then its value."""
    dim, head_dim, groups = cfg.embed_dim, cfg.head_width, cfg.num_heads // cfg.num_kv_heads
    packed = (cfg.num_kv_heads, groups + 2, head_dim, dim)

    def forward(weight):
        parts = weight.reshape(packed).transpose(3, 0, 1, 2)
        query = parts[:, :, :groups].reshape(dim, cfg.num_heads, head_dim)
        return query, parts[:, :, groups:].transpose(0, 2, 1, 3)

    def inverse(query, key_value):
        query = query.reshape(dim, cfg.num_kv_heads, groups, head_dim)
        parts = np.concatenate([query, key_value.transpose(0, 2, 1, 3)], axis=2)
        return (parts.transpose(1, 2, 3, 0).reshape(-1, dim),)

    return Rule(
        (("attention.wqkv.weight", (cfg.num_kv_heads * (groups + 2) * head_dim, dim)),),
        (
            ("attn/q/kernel", (dim, cfg.num_heads, head_dim)),
            ("attn/kv/kernel", (dim, 2, cfg.num_kv_heads, head_dim)),
        ),
        forward,
        inverse,
    )


def internlm2_rules(cfg: LanguageModelConfig) -> list[Rule]:
    """InternLM2 (no biases); keys without prefix."""
    dim, heads, mlp_dim = cfg.embed_dim, (cfg.num_heads, cfg.head_width), cfg.mlp_dim
    block = [
        *norm("attention_norm", "attn_norm", dim, False),
        packed_wqkv(cfg),
        *dense("attention.wo", "attn/out", heads, (dim,), False),
        *norm("ffn_norm", "mlp_norm", dim, False),
        *dense("feed_forward.w1", "mlp/gate", (dim,), (mlp_dim,), False),
        *dense("feed_forward.w3", "mlp/up", (dim,), (mlp_dim,), False),
        *dense("feed_forward.w2", "mlp/down", (mlp_dim,), (dim,), False),
    ]
    return [
        reshaped("model.tok_embeddings.weight", "embed/embedding", (cfg.vocab_size, dim)),
        *(rule.at("model.layers.{}.", "blocks/layers/", tuple(range(cfg.num_layers))) for rule in block),
        *norm("model.norm", "norm", dim, False),
        *_head(cfg, "output"),
    ]


def key_value(cfg: LanguageModelConfig) -> list[Rule]:
    """Separate k_proj and v_proj ↔ one packed kv."""
    dim, kv = cfg.embed_dim, (cfg.num_kv_heads, cfg.head_width)
    rows = cfg.num_kv_heads * cfg.head_width
    keys = ("self_attn.k_proj", "self_attn.v_proj")
    kernel = Rule(
        tuple((f"{key}.weight", (rows, dim)) for key in keys),
        (("attn/kv/kernel", (dim, 2, *kv)),),
        lambda k, v: (np.stack([k.T.reshape(dim, *kv), v.T.reshape(dim, *kv)], axis=1),),
        lambda packed: tuple(packed[:, i].reshape(dim, rows).T for i in (0, 1)),
    )
    bias = Rule(
        tuple((f"{key}.bias", (rows,)) for key in keys),
        (("attn/kv/bias", (2, *kv)),),
        lambda k, v: (np.stack([k.reshape(kv), v.reshape(kv)]),),
        lambda packed: tuple(packed[i].reshape(rows) for i in (0, 1)),
    )
    return [kernel, bias] if cfg.qkv_bias else [kernel]


def qwen2_rules(cfg: LanguageModelConfig) -> list[Rule]:
    """Qwen2, and Llama where qkv_bias is False; keys without prefix."""
    dim, heads, mlp_dim = cfg.embed_dim, (cfg.num_heads, cfg.head_width), cfg.mlp_dim
    block = [
        *norm("input_layernorm", "attn_norm", dim, False),
        *dense("self_attn.q_proj", "attn/q", (dim,), heads, cfg.qkv_bias),
        *key_value(cfg),
        *dense("self_attn.o_proj", "attn/out", heads, (dim,), False),
        *norm("post_attention_layernorm", "mlp_norm", dim, False),
        *dense("mlp.gate_proj", "mlp/gate", (dim,), (mlp_dim,), False),
        *dense("mlp.up_proj", "mlp/up", (dim,), (mlp_dim,), False),
        *dense("mlp.down_proj", "mlp/down", (mlp_dim,), (dim,), False),
    ]
    return [
        reshaped("model.embed_tokens.weight", "embed/embedding", (cfg.vocab_size, dim)),
        *(rule.at("model.layers.{}.", "blocks/layers/", tuple(range(cfg.num_layers))) for rule in block),
        *norm("model.norm", "norm", dim, False),
        *_head(cfg, "lm_head"),
    ]
