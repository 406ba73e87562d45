"""The model's configuration from a PyTorch checkpoint: from config.json, and from the keys and shapes.

Everything that the shapes tell is taken from them, and a config.json that says otherwise is an error. Goes
out: nested plain values for `alto_jax.mllm.alto_llm.ModelConfig` (or for one of its parts). What neither
tells (the heads of a mask tokenizer of unusual width) must be given.
"""

from collections.abc import Mapping
import math
import os
import re
from typing import Any

from alto_jax.config import ConfigError

from .files import short
from .rules import MappingError
from .stated import Stated

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

    def of(self, key: str, ndim: int) -> tuple[int, ...]:
        """The shape of a tensor with so many axes."""
        if key not in self.shapes:
            raise MappingError(f"missing in the source: {self.prefix}{key}")
        if len(self.shapes[key]) != ndim:
            raise MappingError(f"{self.prefix}{key}: expected {ndim} axes, got shape {self.shapes[key]}")
        return self.shapes[key]

    def count(self, pattern: str) -> int:
        """Number of layers: one more than the largest number that `pattern` catches."""
        found = {int(m.group(1)) for key in self.shapes if (m := re.match(pattern, key)) and len(m.group(1)) < 5}
        return max(found, default=-1) + 1


def _grid(positions: int, key: str) -> int:
    grid = math.isqrt(positions - 1)
    if grid * grid + 1 != positions:
        raise MappingError(f"{key}: expected one more than a square number of rows, got {positions}")
    return grid


def sam_values(shapes: Shapes, prefix: str = "image_encoder.", *, official: bool = True) -> dict[str, Any]:
    """SamEncoderConfig; `official` weights need the official relative positions, ALTo's the scaled ones."""
    w = _Weights(shapes, prefix)
    _, grid, _, width = w.of("pos_embed", 4)
    patch, depth = w.of("patch_embed.proj.weight", 4)[2], w.count(r"blocks\.(\d+)\.")
    rows = [w.of(f"blocks.{i}.attn.rel_pos_h", 2)[0] for i in range(depth)]
    windows = sorted({(n + 1) // 2 for n in rows if n != 2 * grid - 1})
    if len(windows) > 1:
        raise MappingError(f"{prefix}blocks: windows of different sizes {windows} in the tables rel_pos_h")
    values = {
        "image_size": grid * patch, "patch_size": patch, "embed_dim": width, "depth": depth,
        "num_heads": width // w.of("blocks.0.attn.rel_pos_h", 2)[1],
        "mlp_ratio": w.of("blocks.0.mlp.lin1.weight", 2)[0] // width,
        "global_attn_indexes": [i for i, n in enumerate(rows) if n == 2 * grid - 1],
        "out_channels": w.of("neck.0.weight", 4)[0], "scaled_rel_pos_query": not official,
    }  # fmt: skip
    return {**values, "window_size": windows[0]} if windows else values


def _vit_values(w: _Weights, side: str, width: int) -> dict[str, Any]:
    values = {
        "embed_dim": width,
        "num_layers": w.count(rf"{side}\.transformer\.(\d+)\."),
        "mlp_ratio": w.of(f"{side}.transformer.0.mlp.c_fc.weight", 2)[0] // width,
    }
    return {**values, "num_heads": _VIT_HEADS[width]} if width in _VIT_HEADS else values


def _pixel_decoder_values(w: _Weights, z_channels: int) -> dict[str, Any]:
    levels = w.count(r"pixel_decoder\.up\.(\d+)\.")
    blocks = w.count(r"pixel_decoder\.up\.0\.block\.(\d+)\.")
    channels = [w.of(f"pixel_decoder.up.{level}.block.{blocks - 1}.conv2.weight", 4)[0] for level in range(levels)]
    values = {
        "z_channels": z_channels, "hidden_channels": channels[0], "channel_mult": [c // channels[0] for c in channels],
        "num_res_blocks": blocks, "out_channels": w.of("pixel_decoder.conv_out.weight", 4)[0],
    }  # fmt: skip
    shortcuts = [key for key in w.shapes if key.endswith(".nin_shortcut.weight")]
    if shortcuts:
        values["legacy_shortcut"] = all(w.of(key, 4)[0] == w.of(key, 4)[1] for key in shortcuts)
    return values


def tokenizer_values(shapes: Shapes, prefix: str = "") -> dict[str, Any]:
    """TokenizerConfig of an ALTo or TiTok checkpoint; heads only where the width is one of TiTok's."""
    w = _Weights(shapes, prefix)
    width, _, patch, _ = w.of("encoder.patch_embed.weight", 4)
    rows, token_size = w.of("quantize.embedding.weight", 2)
    is_titok = "encoder.length_encoder.fc1.weight" not in w
    grid = _grid(w.of("encoder.positional_embedding", 2)[0], f"{prefix}encoder.positional_embedding")
    values = {
        "mask_size": grid * patch, "patch_size": patch,
        "num_latent_tokens": w.of("latent_tokens", 2)[0], "token_size": token_size,
        # TiTok's codebook of 4096 is cropped to ALTo's.
        "codebook_size": min(rows, 1024) if is_titok else rows,
        "encoder": _vit_values(w, "encoder", width),
        "decoder": _vit_values(w, "decoder", w.of("decoder.decoder_embed.weight", 2)[0]),
        "pixel_decoder": _pixel_decoder_values(w, w.of("decoder.ffn.2.weight", 4)[0]),
    }  # fmt: skip
    if "sam.image_encoder.pos_embed" in w:
        values["sam"] = sam_values(shapes, f"{prefix}sam.image_encoder.", official=False)
    elif not is_titok:
        values["sam"] = None
    return values


def vision_values(shapes: Shapes, prefix: str, stated: Stated) -> dict[str, Any]:
    """InternViTConfig from the keys below `prefix` and a `vision_config`."""
    w = _Weights(shapes, prefix)
    key = "embeddings.patch_embedding.weight"
    width, _, patch, _ = w.of(key, 4)
    positions = w.of("embeddings.position_embedding", 3)[1]
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
        "mlp_dim": stated.agree(
            "intermediate_size", w.of(f"{block}mlp.fc1.weight", 2)[0], f"{prefix}{block}mlp.fc1.weight"
        ),
        "num_heads": _divisor(stated, "num_attention_heads", width, _INTERNVIT_HEADS.get(width)),
        "qkv_bias": stated.agree("qkv_bias", f"{block}attn.qkv.bias" in w, f"{prefix}{block}attn.qkv"),
        "qk_norm": stated.agree("qk_normalization", f"{block}attn.q_norm.weight" in w, f"{prefix}{block}attn"),
        "norm_type": stated.agree(
            "norm_type", "layer_norm" if f"{block}norm1.bias" in w else "rms_norm", f"{prefix}{block}norm1"
        ),
        "norm_eps": stated.number("layer_norm_eps", 1e-6),
        "drop_path_rate": stated.number("drop_path_rate", 0.0),
    }


def _divisor(stated: Stated, field: str, width: int, default: int | None) -> int:
    """A whole number that divides the width."""
    value = stated.whole(field, default)
    if width % value:
        raise ConfigError(f"{stated.name(field)}: expected a divisor of the width {width}, got {value}")
    return value


def language_values(
    family: str, shapes: Shapes, prefix: str, stated: Stated, *, whole: Stated | None = None
) -> dict[str, Any]:
    """LanguageModelConfig from the keys below `prefix` and an `llm_config`.

    Args:
      family: "internlm2" or "qwen2". shapes, prefix: the tensors. stated: the fields.
      whole: the fields of the multimodal model around it; None: the language model alone.
    """
    w, where = _Weights(shapes, prefix), stated.where
    embed, mlp, head = {
        "internlm2": ("model.tok_embeddings.weight", "model.layers.0.feed_forward.w1.weight", "output.weight"),
        "qwen2": ("model.embed_tokens.weight", "model.layers.0.mlp.gate_proj.weight", "lm_head.weight"),
    }[family]
    vocab_size, width = w.of(embed, 2)
    heads = stated.whole("num_attention_heads")
    kv_heads = stated.whole("num_key_value_heads", heads)
    head_dim = stated.whole("head_dim", max(width // heads, 1))
    if heads % kv_heads:
        raise ConfigError(f"{where}.num_key_value_heads: expected a divisor of the {heads} heads, got {kv_heads}")
    if family == "internlm2":
        key, rows = "attention.wqkv.weight", (heads + 2 * kv_heads) * head_dim
        found = w.of(f"model.layers.0.{key}", 2)[0]
    else:
        key, rows = "self_attn.k_proj.weight", kv_heads * head_dim
        found = w.of(f"model.layers.0.{key}", 2)[0]
        query = w.of("model.layers.0.self_attn.q_proj.weight", 2)[0]
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
    tied = _is_tied(stated, whole, head in w, prefix + head)
    return {
        "vocab_size": stated.agree("vocab_size", vocab_size, prefix + embed),
        "embed_dim": stated.agree("hidden_size", width, prefix + embed),
        "num_layers": stated.agree("num_hidden_layers", w.count(r"model\.layers\.(\d+)\."), f"{prefix}model.layers"),
        "mlp_dim": stated.agree("intermediate_size", w.of(mlp, 2)[0], prefix + mlp),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim if head_dim * heads != width else None,
        "rope_theta": stated.number("rope_theta", _rope(stated).number("rope_theta", 10000.0, low=1.0), low=1.0),
        "norm_eps": stated.number("rms_norm_eps", 1e-6),
        "qkv_bias": has_bias,
        "tie_embeddings": tied,
        "max_position_embeddings": stated.whole("max_position_embeddings", 32768),
        "rope_scaling_factor": _rope_factor(stated),
    }


def _is_tied(stated: Stated, whole: Stated | None, has_head: bool, head: str) -> bool:
    """Whether the embedding table serves as the head too.

    Note: a multimodal checkpoint that has a head uses it, whatever its configurations say: many repeat the default of
    a class that is not theirs.
    """
    says = [part.flag("tie_word_embeddings") for part in (stated, whole) if part is not None]
    if has_head:
        return whole is None and says[0] is True
    if False in says and True not in says:
        raise ConfigError(f"{stated.name('tie_word_embeddings')}: says False, but the weights have no {head}")
    return True


def _rope(stated: Stated) -> Stated:
    """The fields of the rotary positions."""
    return stated.group("rope_scaling" if stated.get("rope_scaling") is not None else "rope_parameters")


def _rope_factor(stated: Stated) -> float | None:
    scaling = _rope(stated)
    kinds = [value for name in ("type", "rope_type") if (value := scaling.get(name)) is not None]
    kind = kinds[0] if kinds else "default"
    if kind == "default":
        return None
    if kind != "dynamic":
        raise ConfigError(f"{scaling.where}: expected type 'dynamic' (what is implemented), got {short(kind)}")
    return scaling.number("factor", low=1.0)


# Our names of fields → those of Hugging Face's own InternVL.
_HF = {"llm_config": "text_config", "select_layer": "vision_feature_layer"}
_HF_VISION = {"qkv_bias": "attention_bias", "qk_normalization": "use_qk_norm"}


def is_hf(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of Hugging Face's own InternVL."""
    return "text_config" in config and "llm_config" not in config


def model_values(
    kind: str, shapes: Shapes, config: Mapping[str, Any], where: str | os.PathLike = "config.json"
) -> dict[str, Any]:
    """Nested plain values of ModelConfig (of its parts that the kind has).

    Args:
      kind: one of `mapping.KINDS`; shapes: key → shape; config: the content of config.json, {} without one.
      where: the file, for messages.

    Raises:
      ConfigError: config.json contradicts the weights, lacks a field that they do not tell, has one of another type, or
        asks for something that is not implemented.
      MappingError: a key that the sizes are read from is missing.
    """
    if kind in ("alto", "titok"):
        return {"tokenizer": tokenizer_values(shapes)}
    if kind == "sam":
        return {"tokenizer": {"sam": sam_values(shapes)}}
    hf = is_hf(config)
    stated = Stated(config, str(where), _HF if hf else None)
    sections = {name: stated.group(name, names, ": ")
                for name, names in (("vision_config", _HF_VISION if hf else None), ("llm_config", None))}  # fmt: skip
    if kind == "internvit":
        part = sections["vision_config"] if "vision_config" in config else stated
        return {"vision": vision_values(shapes, "", part)}
    if kind in ("internlm2", "qwen2"):
        part = sections["llm_config"] if sections["llm_config"].values else stated
        return {"language_model": language_values(kind, shapes, "", part)}
    family = kind.rpartition("-")[2]
    stated.only("template", "internvl2_5")
    stated.only("downsample_ratio", 0.5)
    stated.only("vision_feature_select_strategy", "default")
    stated.only("projector_hidden_act", "gelu")
    vision = vision_values(shapes, "vision_model.", sections["vision_config"])
    stated.agree("force_image_size", vision["image_size"], "vision_model.embeddings.position_embedding")
    language = language_values(family, shapes, "language_model.", sections["llm_config"], whole=stated)
    vision["select_layer"] = stated.whole("select_layer", -1, low=-(2**31))
    values = {
        "vision": vision, "language_model": language, "pixel_input": "mllm",
        "pixel_shuffle_version": "v2" if stated.get("ps_version") is None else stated.get("ps_version"),
    }  # fmt: skip
    if kind.startswith("altollm-"):
        values["tokenizer"] = tokenizer_values(shapes, "mask_decoder.")
    return values


# Sizes that the weights tell; what an earlier export of ours wrote beside them must agree.
_SIZES = ("num_layers", "depth", "embed_dim", "mlp_dim", "vocab_size", "token_size", "num_latent_tokens")


def own_values(config: Mapping[str, Any], found: Mapping[str, Any], where: str | os.PathLike) -> dict[str, Any]:
    """The section of a config.json that an export of ours wrote, {} without one.

    Args:
      config: the content of config.json. found: nested values that the weights tell. where: the file, for messages.

    Raises:
      ConfigError: a field of another type, or one that contradicts the weights.
    """
    stated = Stated(config, str(where)).group(OWN_SECTION, sep=": ")

    def check(values: Mapping[str, Any], known: Any, name: str) -> None:
        for field, value in values.items():
            other = known.get(field) if isinstance(known, Mapping) else None
            if isinstance(value, Mapping):
                check(value, other, f"{name}.{field}")
            elif isinstance(other, Mapping) and value is not None:
                raise ConfigError(f"{name}.{field}: expected a group of fields, got {short(value)}")
            elif isinstance(value, (int, float)) and not -(2**31) < value < 2**31:
                raise ConfigError(f"{name}.{field}: expected a finite number, got {short(value)}")
            elif field in _SIZES and other is not None and value != other:
                raise ConfigError(f"{name}.{field}: says {short(value)}, but the weights say {other!r}")

    check(stated.values, found, stated.where)
    return {name: value for name, value in stated.values.items() if name in found}


def check_heads(values: Mapping[str, Any]) -> None:
    """Raises ConfigError if the heads of the mask tokenizer are still unknown."""
    tokenizer = values.get("tokenizer")
    for side in ("encoder", "decoder") if isinstance(tokenizer, Mapping) else ():
        part = tokenizer.get(side)
        if isinstance(part, Mapping) and "num_heads" not in part:
            raise ConfigError(
                f"tokenizer.{side}.num_heads: the weights do not tell it at width {part['embed_dim']}; give it:"
                f' --config \'{{"tokenizer": {{"{side}": {{"num_heads": N}}}}}}\''
            )


def merge(values: dict[str, Any], changes: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Nested values with the leaves of `changes` in their place.

    Raises:
      ConfigError: a value in the place of a group of fields; `where` stands before its name.
    """
    merged = dict(values)
    for name, value in changes.items():
        old = merged.get(name)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            merged[name] = merge(merged[name], value, f"{where}{name}.")
        elif isinstance(old, Mapping) and value is not None:
            raise ConfigError(f"{where}{name}: expected a group of fields, got {short(value)}")
        else:
            merged[name] = value
    return merged
