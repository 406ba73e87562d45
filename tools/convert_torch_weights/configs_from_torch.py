"""The model's configuration from a PyTorch checkpoint: from config.json, and from the keys and shapes.

Everything that the shapes tell is taken from them, and a config.json that says otherwise is an error. Goes
out: nested plain values for `alto_jax.mllm.alto_llm.ModelConfig` (or for one of its parts). What neither
tells (the heads of a mask tokenizer of unusual width) must be given.
"""

from collections.abc import Mapping
import math
import re
from typing import Any

from alto_jax.config import ConfigError
from tools.convert_torch_weights.rules import MappingError

Shapes = Mapping[str, tuple[int, ...]]
_VIT_HEADS = {512: 8, 768: 12, 1024: 16}  # TiTok's three sizes
_INTERNVIT_HEADS = {1024: 16, 3200: 25}  # 300M and 6B
OWN_SECTION = "alto_jax"  # the part of an exported config.json that repeats our ModelConfig


class _Weights:
    """Shapes below a prefix; a missing key is an error that names it."""

    def __init__(self, shapes: Shapes, prefix: str):
        self.prefix = prefix
        self.shapes = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}

    def __contains__(self, key: str) -> bool:
        return key in self.shapes

    def __getitem__(self, key: str) -> tuple[int, ...]:
        if key not in self.shapes:
            raise MappingError(f"missing in the source: {self.prefix}{key}")
        return self.shapes[key]

    def count(self, pattern: str) -> int:
        """Number of layers: one more than the largest number that `pattern` catches."""
        found = [int(m.group(1)) for key in self.shapes if (m := re.match(pattern, key))]
        return max(found, default=-1) + 1


class _Stated:
    """A config.json (or a part of it); `agree` compares a field with what the weights say."""

    def __init__(self, values: Any, where: str):
        if not isinstance(values, Mapping):
            raise ConfigError(f"{where}: expected a group of fields, got {values!r}")
        self.values, self.where = values, where

    def agree(self, field: str, found: Any, key: str) -> Any:
        stated = self.values.get(field)
        if stated is not None and stated != found:
            raise ConfigError(f"{self.where}.{field}: says {stated!r}, but the weights ({key}) say {found!r}")
        return found

    def only(self, field: str, allowed: Any) -> None:
        stated = self.values.get(field)
        if stated is not None and stated != allowed:
            raise ConfigError(f"{self.where}.{field}: expected {allowed!r} (what is implemented), got {stated!r}")

    def need(self, field: str, default: Any = None) -> Any:
        value = self.values.get(field, default)
        if value is None:
            raise ConfigError(f"{self.where}.{field}: missing, and the weights do not tell it")
        return value


def _grid(positions: int, key: str) -> int:
    grid = math.isqrt(positions - 1)
    if grid * grid + 1 != positions:
        raise MappingError(f"{key}: expected one more than a square number of rows, got {positions}")
    return grid


def sam_values(shapes: Shapes, prefix: str = "image_encoder.", *, official: bool = True) -> dict[str, Any]:
    """SamEncoderConfig; `official` weights need the official relative positions, ALTo's the scaled ones."""
    w = _Weights(shapes, prefix)
    _, grid, _, width = w["pos_embed"]
    patch, depth = w["patch_embed.proj.weight"][2], w.count(r"blocks\.(\d+)\.")
    rows = [w[f"blocks.{i}.attn.rel_pos_h"][0] for i in range(depth)]
    windows = sorted({(n + 1) // 2 for n in rows if n != 2 * grid - 1})
    if len(windows) > 1:
        raise MappingError(f"{prefix}blocks: windows of different sizes {windows} in the tables rel_pos_h")
    values = {
        "image_size": grid * patch, "patch_size": patch, "embed_dim": width, "depth": depth,
        "num_heads": width // w["blocks.0.attn.rel_pos_h"][1],
        "mlp_ratio": w["blocks.0.mlp.lin1.weight"][0] // width,
        "global_attn_indexes": [i for i, n in enumerate(rows) if n == 2 * grid - 1],
        "out_channels": w["neck.0.weight"][0], "scaled_rel_pos_query": not official,
    }  # fmt: skip
    return {**values, "window_size": windows[0]} if windows else values


def _vit_values(w: _Weights, side: str, width: int) -> dict[str, Any]:
    values = {
        "embed_dim": width,
        "num_layers": w.count(rf"{side}\.transformer\.(\d+)\."),
        "mlp_ratio": w[f"{side}.transformer.0.mlp.c_fc.weight"][0] // width,
    }
    return {**values, "num_heads": _VIT_HEADS[width]} if width in _VIT_HEADS else values


def _pixel_decoder_values(w: _Weights, z_channels: int) -> dict[str, Any]:
    levels = w.count(r"pixel_decoder\.up\.(\d+)\.")
    blocks = w.count(r"pixel_decoder\.up\.0\.block\.(\d+)\.")
    channels = [w[f"pixel_decoder.up.{level}.block.{blocks - 1}.conv2.weight"][0] for level in range(levels)]
    values = {
        "z_channels": z_channels, "hidden_channels": channels[0], "channel_mult": [c // channels[0] for c in channels],
        "num_res_blocks": blocks, "out_channels": w["pixel_decoder.conv_out.weight"][0],
    }  # fmt: skip
    shortcuts = [key for key in w.shapes if key.endswith(".nin_shortcut.weight")]
    if shortcuts:
        values["legacy_shortcut"] = all(w[key][0] == w[key][1] for key in shortcuts)
    return values


def tokenizer_values(shapes: Shapes, prefix: str = "") -> dict[str, Any]:
    """TokenizerConfig of an ALTo or TiTok checkpoint; heads only where the width is one of TiTok's."""
    w = _Weights(shapes, prefix)
    width, _, patch, _ = w["encoder.patch_embed.weight"]
    rows, token_size = w["quantize.embedding.weight"]
    is_titok = "encoder.length_encoder.fc1.weight" not in w
    grid = _grid(w["encoder.positional_embedding"][0], f"{prefix}encoder.positional_embedding")
    values = {
        "mask_size": grid * patch, "patch_size": patch,
        "num_latent_tokens": w["latent_tokens"][0], "token_size": token_size,
        # TiTok's codebook of 4096 is cropped to ALTo's.
        "codebook_size": min(rows, 1024) if is_titok else rows,
        "encoder": _vit_values(w, "encoder", width),
        "decoder": _vit_values(w, "decoder", w["decoder.decoder_embed.weight"][0]),
        "pixel_decoder": _pixel_decoder_values(w, w["decoder.ffn.2.weight"][0]),
    }  # fmt: skip
    if "sam.image_encoder.pos_embed" in w:
        values["sam"] = sam_values(shapes, f"{prefix}sam.image_encoder.", official=False)
    elif not is_titok:
        values["sam"] = None
    return values


def vision_values(shapes: Shapes, prefix: str, config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """InternViTConfig from the keys below `prefix` and a `vision_config`."""
    w, stated = _Weights(shapes, prefix), _Stated(config, where)
    key = "embeddings.patch_embedding.weight"
    width, _, patch, _ = w[key]
    positions = w["embeddings.position_embedding"][1]
    image_size = _grid(positions, f"{prefix}embeddings.position_embedding") * patch
    block = "encoder.layers.0."
    stated.only("hidden_act", "gelu")
    return {
        "embed_dim": stated.agree("hidden_size", width, prefix + key),
        "patch_size": stated.agree("patch_size", patch, prefix + key),
        "image_size": stated.agree("image_size", image_size, f"{prefix}embeddings.position_embedding"),
        "num_layers": stated.agree(
            "num_hidden_layers", w.count(r"encoder\.layers\.(\d+)\."), f"{prefix}encoder.layers"
        ),
        "mlp_dim": stated.agree("intermediate_size", w[f"{block}mlp.fc1.weight"][0], f"{prefix}{block}mlp.fc1.weight"),
        "num_heads": stated.need("num_attention_heads", _INTERNVIT_HEADS.get(width)),
        "qkv_bias": stated.agree("qkv_bias", f"{block}attn.qkv.bias" in w, f"{prefix}{block}attn.qkv"),
        "qk_norm": stated.agree("qk_normalization", f"{block}attn.q_norm.weight" in w, f"{prefix}{block}attn"),
        "norm_type": stated.agree(
            "norm_type", "layer_norm" if f"{block}norm1.bias" in w else "rms_norm", f"{prefix}{block}norm1"
        ),
        "norm_eps": float(stated.values.get("layer_norm_eps", 1e-6)),
        "drop_path_rate": float(stated.values.get("drop_path_rate", 0.0)),
    }


def language_values(
    family: str, shapes: Shapes, prefix: str, config: Mapping[str, Any], where: str, *, untied: bool = False
) -> dict[str, Any]:
    """LanguageModelConfig from the keys below `prefix` and an `llm_config`; `untied`: whatever the config says."""
    w, stated = _Weights(shapes, prefix), _Stated(config, where)
    embed, mlp, head = {
        "internlm2": ("model.tok_embeddings.weight", "model.layers.0.feed_forward.w1.weight", "output.weight"),
        "qwen2": ("model.embed_tokens.weight", "model.layers.0.mlp.gate_proj.weight", "lm_head.weight"),
    }[family]
    vocab_size, width = w[embed]
    heads = stated.need("num_attention_heads")
    kv_heads = stated.values.get("num_key_value_heads") or heads
    head_dim = stated.values.get("head_dim") or width // heads
    if family == "internlm2":
        key, rows = "attention.wqkv.weight", (heads + 2 * kv_heads) * head_dim
        found = w[f"model.layers.0.{key}"][0]
    else:
        key, rows = "self_attn.k_proj.weight", kv_heads * head_dim
        found = w[f"model.layers.0.{key}"][0]
        query = w["model.layers.0.self_attn.q_proj.weight"][0]
        if query != heads * head_dim:
            raise ConfigError(
                f"{where}.num_attention_heads: says {heads}, of width {head_dim}, but the weights"
                f" ({prefix}model.layers.0.self_attn.q_proj.weight) have {query} rows"
            )
    if found != rows:
        raise ConfigError(
            f"{where}.num_key_value_heads: says {kv_heads} (with {heads} heads of width {head_dim}: {rows} rows), but"
            f" the weights ({prefix}model.layers.0.{key}) have {found}"
        )
    stated.only("hidden_act", "silu")
    stated.only("use_sliding_window", False)
    has_bias = "model.layers.0.self_attn.q_proj.bias" in w
    if family == "internlm2":
        stated.only("bias", False)
    tied = not untied and head not in w
    if not untied and not tied and stated.values.get("tie_word_embeddings"):
        tied = True
    return {
        "vocab_size": stated.agree("vocab_size", vocab_size, prefix + embed),
        "embed_dim": stated.agree("hidden_size", width, prefix + embed),
        "num_layers": stated.agree("num_hidden_layers", w.count(r"model\.layers\.(\d+)\."), f"{prefix}model.layers"),
        "mlp_dim": stated.agree("intermediate_size", w[mlp][0], prefix + mlp),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim if head_dim * heads != width else None,
        "rope_theta": float(stated.values.get("rope_theta") or _rope(stated).get("rope_theta") or 10000.0),
        "norm_eps": float(stated.values.get("rms_norm_eps", 1e-6)),
        "qkv_bias": has_bias,
        "tie_embeddings": tied,
        "max_position_embeddings": stated.values.get("max_position_embeddings", 32768),
        "rope_scaling_factor": _rope_factor(stated),
    }


def _rope(stated: _Stated) -> dict[str, Any]:
    return stated.values.get("rope_scaling") or stated.values.get("rope_parameters") or {}


def _rope_factor(stated: _Stated) -> float | None:
    scaling = _rope(stated)
    kind = scaling.get("type") or scaling.get("rope_type") or "default"
    if kind == "default":
        return None
    if kind != "dynamic":
        raise ConfigError(f"{stated.where}.rope_scaling: expected type 'dynamic' (what is implemented), got {kind!r}")
    return float(scaling["factor"])


def model_values(kind: str, shapes: Shapes, config: Mapping[str, Any]) -> dict[str, Any]:
    """Nested plain values of ModelConfig (of its parts that the kind has).

    Args:
      kind: one of `mapping.KINDS`; shapes: key → shape; config: the content of config.json, {} without one.

    Raises:
      ConfigError: config.json contradicts the weights, lacks a field that they do not tell, or asks for
        something that is not implemented.
      MappingError: a key that the sizes are read from is missing.
    """
    if kind in ("alto", "titok"):
        return {"tokenizer": tokenizer_values(shapes)}
    if kind == "sam":
        return {"tokenizer": {"sam": sam_values(shapes)}}
    if kind == "internvit":
        return {"vision": vision_values(shapes, "", config.get("vision_config", config), "config.json")}
    if kind in ("internlm2", "qwen2"):
        return {"language_model": language_values(kind, shapes, "", config.get("llm_config", config), "config.json")}
    stated, family = _Stated(config, "config.json"), kind.rpartition("-")[2]
    stated.only("template", "internvl2_5")
    stated.only("downsample_ratio", 0.5)
    vision = vision_values(shapes, "vision_model.", config.get("vision_config", {}), "config.json: vision_config")
    stated.agree("force_image_size", vision["image_size"], "vision_model.embeddings.position_embedding")
    language = language_values(
        family, shapes, "language_model.", config.get("llm_config", {}), "config.json: llm_config", untied=True
    )
    vision["select_layer"] = stated.values.get("select_layer", -1)
    values = {
        "vision": vision, "language_model": language, "pixel_input": "mllm",
        "pixel_shuffle_version": stated.values.get("ps_version", "v2"),
    }  # fmt: skip
    if kind.startswith("altollm-"):
        values["tokenizer"] = tokenizer_values(shapes, "mask_decoder.")
    return values


def check_heads(values: Mapping[str, Any]) -> None:
    """Raises ConfigError if the heads of the mask tokenizer are still unknown."""
    for side in ("encoder", "decoder"):
        part = values.get("tokenizer", {}).get(side)
        if part is not None and "num_heads" not in part:
            raise ConfigError(
                f"tokenizer.{side}.num_heads: the weights do not tell it at width {part['embed_dim']}; give it:"
                f' --config \'{{"tokenizer": {{"{side}": {{"num_heads": N}}}}}}\''
            )


def merge(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values with the leaves of `changes` in their place."""
    merged = dict(values)
    for name, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = merge(merged[name], value) if both else value
    return merged
