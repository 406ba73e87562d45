"""Layers of the PyTorch side for `verify`: independent implementations, filled from a source one at a time.

transformers' Qwen2, Llama (for InternLM2), InternVL vision and SAM vision layers, and torch's own
TransformerEncoderLayer for the mask tokenizer. All in float32, in evaluation mode. Needs torch.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from .sources import Source


class Weights:
    """Tensors of a source below a prefix, as float32 torch tensors, loaded at access."""

    def __init__(self, source: Source, prefix: str):
        self.source, self.prefix = source, prefix

    def __getitem__(self, key: str) -> torch.Tensor:
        return torch.from_numpy(self.source[self.prefix + key].astype(np.float32))

    def __contains__(self, key: str) -> bool:
        return self.prefix + key in self.source

    def renamed(self, names: Mapping[str, str], at: str) -> dict[str, torch.Tensor]:
        """{their name: tensor} of names "theirs": "ours", each with `.weight` and (where there) `.bias`."""
        found = {}
        for theirs, ours in names.items():
            for end in (".weight", ".bias"):
                if f"{at}{ours}{end}" in self:
                    found[theirs + end] = self[f"{at}{ours}{end}"]
        return found


def numpy_call(function: Callable) -> Callable[..., np.ndarray]:
    """A torch function as one of numpy arrays."""

    def call(*arrays):
        with torch.inference_mode():
            return function(*(torch.from_numpy(np.array(a)) for a in arrays)).numpy()

    return call


def _load(module: torch.nn.Module, state: dict[str, torch.Tensor]) -> torch.nn.Module:
    module.load_state_dict(state, strict=True)
    return module.eval()


def language_layer(family: str, weights: Weights, index: int, cfg: Any, positions: np.ndarray) -> Callable:
    """Layer `index` on hidden states [B, T, D] with a causal mask."""
    from transformers.models.llama import modeling_llama as llama
    from transformers.models.qwen2 import modeling_qwen2 as qwen2

    sizes = dict(
        vocab_size=8, hidden_size=cfg.embed_dim, num_hidden_layers=1, num_attention_heads=cfg.num_heads,
        num_key_value_heads=cfg.num_kv_heads, intermediate_size=cfg.mlp_dim, rms_norm_eps=cfg.norm_eps,
        head_dim=cfg.head_width, rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta},
        max_position_embeddings=cfg.max_position_embeddings, attn_implementation="eager",
    )  # fmt: skip
    at = f"model.layers.{index}."
    if family == "qwen2":
        config = qwen2.Qwen2Config(**sizes)
        layer, rotary = qwen2.Qwen2DecoderLayer(config, 0), qwen2.Qwen2RotaryEmbedding(config)
        if not cfg.qkv_bias:  # Note: Llama, of which Hugging Face's own InternVL makes InternLM2 a case.
            config = llama.LlamaConfig(**sizes)
            layer, rotary = llama.LlamaDecoderLayer(config, 0), llama.LlamaRotaryEmbedding(config)
        names = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
        names += ["input_layernorm", "post_attention_layernorm"]
        state = weights.renamed({name: name for name in names}, at)
    else:
        config = llama.LlamaConfig(**sizes)
        layer, rotary = llama.LlamaDecoderLayer(config, 0), llama.LlamaRotaryEmbedding(config)
        names = {
            "self_attn.o_proj": "attention.wo",
            "mlp.gate_proj": "feed_forward.w1",
            "mlp.up_proj": "feed_forward.w3",
            "mlp.down_proj": "feed_forward.w2",
            "input_layernorm": "attention_norm",
            "post_attention_layernorm": "ffn_norm",
        }
        state = weights.renamed(names, at)
        # Each key head's group: its query heads, its key, its value.
        packed = weights[f"{at}attention.wqkv.weight"]
        groups = packed.view(cfg.num_kv_heads, -1, cfg.head_width, cfg.embed_dim)
        for name, part in (("q", groups[:, :-2]), ("k", groups[:, -2]), ("v", groups[:, -1])):
            state[f"self_attn.{name}_proj.weight"] = part.reshape(-1, cfg.embed_dim)
    _load(layer, state)
    ids = torch.from_numpy(np.asarray(positions, np.int64))
    length = ids.shape[1]
    mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]

    def run(x):
        return layer(x, attention_mask=mask, position_ids=ids, position_embeddings=rotary(x, ids))

    return numpy_call(run)


def language_head(family: str, weights: Weights, cfg: Any) -> Callable:
    """Final norm and output projection: hidden states [B, T, D] → logits."""
    embed, head = {
        "internlm2": ("model.tok_embeddings.weight", "output.weight"),
        "qwen2": ("model.embed_tokens.weight", "lm_head.weight"),
    }[family]
    scale, table = weights["model.norm.weight"], weights[embed if cfg.tie_embeddings else head]
    return numpy_call(lambda x: functional.rms_norm(x, x.shape[-1:], scale, cfg.norm_eps) @ table.T)


def vision_layer(weights: Weights, index: int, cfg: Any) -> Callable:
    """Layer `index` of InternViT on [B, 1 + P, D]."""
    from transformers.models.internvl import configuration_internvl, modeling_internvl

    config = configuration_internvl.InternVLVisionConfig(
        hidden_size=cfg.embed_dim, num_attention_heads=cfg.num_heads, intermediate_size=cfg.mlp_dim,
        norm_type=cfg.norm_type, layer_norm_eps=cfg.norm_eps, attention_bias=cfg.qkv_bias, use_qk_norm=cfg.qk_norm,
        image_size=cfg.image_size, patch_size=cfg.patch_size, attn_implementation="eager",
    )  # fmt: skip
    at = f"encoder.layers.{index}."
    names = {"attention.projection_layer": "attn.proj", "layernorm_before": "norm1", "layernorm_after": "norm2"}
    names |= {f"attention.{name}": f"attn.{name}" for name in ("q_norm", "k_norm")}
    names |= {f"mlp.{name}": f"mlp.{name}" for name in ("fc1", "fc2")}
    state = weights.renamed(names, at) | {"lambda_1": weights[f"{at}ls1"], "lambda_2": weights[f"{at}ls2"]}
    for end in (".weight", ".bias") if cfg.qkv_bias else (".weight",):
        for name, part in zip("qkv", weights[f"{at}attn.qkv{end}"].chunk(3)):
            state[f"attention.{name}_proj{end}"] = part
    return numpy_call(_load(modeling_internvl.InternVLVisionLayer(config), state))


def vision_embedding(weights: Weights) -> Callable:
    """Image [B, V, V, 3] → [B, 1 + P, D]."""
    kernel, bias = weights["embeddings.patch_embedding.weight"], weights["embeddings.patch_embedding.bias"]
    cls, position = weights["embeddings.class_embedding"], weights["embeddings.position_embedding"]

    def run(image):
        x = (
            functional.conv2d(image.permute(0, 3, 1, 2), kernel, bias, stride=kernel.shape[-1])
            .flatten(2)
            .transpose(1, 2)
        )
        return torch.cat([cls.expand(len(x), -1, -1), x], dim=1) + position

    return numpy_call(run)


def _sam_config(cfg: Any) -> Any:
    from transformers.models.sam import configuration_sam

    return configuration_sam.SamVisionConfig(
        hidden_size=cfg.embed_dim, output_channels=cfg.out_channels, num_attention_heads=cfg.num_heads,
        image_size=cfg.image_size, patch_size=cfg.patch_size, mlp_dim=cfg.mlp_ratio * cfg.embed_dim,
        window_size=cfg.window_size, num_hidden_layers=1, attn_implementation="eager",
    )  # fmt: skip


def sam_layer(weights: Weights, index: int, cfg: Any) -> Callable:
    """Block `index` of SAM on [B, g, g, D]; ALTo's form is the official one with scaled tables."""
    from transformers.models.sam import modeling_sam

    at, window = f"blocks.{index}.", 0 if index in cfg.global_attn_indexes else cfg.window_size
    names = {"layer_norm1": "norm1", "layer_norm2": "norm2", "attn.qkv": "attn.qkv", "attn.proj": "attn.proj",
             "mlp.lin1": "mlp.lin1", "mlp.lin2": "mlp.lin2"}  # fmt: skip
    scale = (cfg.embed_dim // cfg.num_heads) ** -0.5 if cfg.scaled_rel_pos_query else 1.0
    state = weights.renamed(names, at)
    state |= {f"attn.rel_pos_{a}": weights[f"{at}attn.rel_pos_{a}"] * scale for a in "hw"}
    return numpy_call(_load(modeling_sam.SamVisionLayer(_sam_config(cfg), window), state))


def sam_embedding(weights: Weights) -> Callable:
    """Normalised image [B, S, S, 3] → [B, g, g, D]."""
    kernel, bias, position = weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], weights["pos_embed"]
    return numpy_call(
        lambda x: (
            functional.conv2d(x.permute(0, 3, 1, 2), kernel, bias, stride=kernel.shape[-1]).permute(0, 2, 3, 1)
            + position
        )
    )


def sam_neck(weights: Weights, cfg: Any) -> Callable:
    """[B, g, g, D] → features [B, g, g, F]."""
    from transformers.models.sam import modeling_sam

    names = {"conv1": "0", "layer_norm1": "1", "conv2": "2", "layer_norm2": "3"}
    neck = _load(modeling_sam.SamVisionNeck(_sam_config(cfg)), weights.renamed(names, "neck."))
    return numpy_call(lambda x: neck(x).permute(0, 2, 3, 1))


def tokenizer_layer(weights: Weights, side: str, index: int, cfg: Any, blocked: np.ndarray | None) -> Callable:
    """Layer `index` of the mask encoder or decoder on [B, T, D]; `blocked` bool[T, T]: who may not attend to whom."""
    at = f"{side}.transformer.{index}."
    layer = torch.nn.TransformerEncoderLayer(
        cfg.embed_dim,
        cfg.num_heads,
        cfg.mlp_ratio * cfg.embed_dim,
        0.0,
        "gelu",
        1e-5,
        batch_first=True,
        norm_first=True,
    )
    names = {
        "norm1": "ln_1",
        "norm2": "ln_2",
        "self_attn.out_proj": "attn.out_proj",
        "linear1": "mlp.c_fc",
        "linear2": "mlp.c_proj",
    }
    state = weights.renamed(names, at)
    state |= {f"self_attn.in_proj_{end}": weights[f"{at}attn.in_proj_{end}"] for end in ("weight", "bias")}
    mask = None if blocked is None else torch.from_numpy(blocked)
    _load(layer, state)
    return numpy_call(lambda x: layer(x, src_mask=mask))
