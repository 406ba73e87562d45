"""config.json for the PyTorch code from our model's configuration, and what that code cannot run."""

from collections.abc import Mapping
from typing import Any

from alto_jax.config import ConfigError, to_dict

from . import configs_from_torch
from .plans import mapping_config

# Field of the mask tokenizer → the only value that the PyTorch code has.
_FORMS = {
    "length_logit_scale": "multiply", "length_gate": "sigmoid", "length_rule": "reference",
    "pixel_decoder.out_patch": 1, "pixel_decoder.out_channels": 3, "pixel_decoder.legacy_shortcut": True,
    "sam.scaled_rel_pos_query": True,
}  # fmt: skip
_ARCHITECTURES = {"internlm2": "InternLM2ForCausalLM", "qwen2": "Qwen2ForCausalLM"}


def check_forms(kind: str, model: Mapping[str, Any]) -> None:
    """Raises ConfigError if the PyTorch code would compute something else than this model.

    Note: `legacy_reshape` is not among the forms: the PyTorch code has both (`is_legacy` of its own file).
    """
    if kind != "alto" and not kind.startswith("altollm-"):
        return
    tokenizer = to_dict(mapping_config("alto", model))
    different = []
    for name, wanted in _FORMS.items():
        value: Any = tokenizer
        for part in name.split("."):
            value = None if value is None else value[part]
        if value is not None and value != wanted:
            different.append(f"tokenizer.{name} is {value!r}, the PyTorch code has {wanted!r} only")
    if different:
        raise ConfigError(f"model: {'; '.join(different)}; export it all the same with --force")


def torch_config(kind: str, model: Mapping[str, Any], kept: Mapping[str, Any], headers: Mapping) -> dict[str, Any]:
    """The content of config.json.

    Args:
      kind: of the export; model: nested ModelConfig values; kept: the source's config.json, {} without one.
      headers: key → (shape, dtype, bytes), for the dtype.

    Returns:
      `kept` with the sizes of this model, and our own configuration in the section "alto_jax".
    """
    own = {name: value for name, value in model.items() if value is not None}
    if configs_from_torch.is_hf(kept):
        kept = {}  # Note: of Hugging Face's own InternVL; what is exported is the reference's.
    if kind in ("alto", "titok", "sam"):
        return {**kept, configs_from_torch.OWN_SECTION: own}
    dtypes = {dtype.name for _, dtype, _ in headers.values() if dtype.name != "bool"}
    dtype = "bfloat16" if "bfloat16" in dtypes else sorted(dtypes)[0]
    if kind == "internvit":
        return {**kept, **_vision(model["vision"]), "torch_dtype": dtype, configs_from_torch.OWN_SECTION: own}
    family = kind.rpartition("-")[2]
    if kind == family:
        return {
            **kept,
            **_language(family, model["language_model"]),
            "torch_dtype": dtype,
            configs_from_torch.OWN_SECTION: own,
        }
    vision, language = dict(kept.get("vision_config", {})), dict(kept.get("llm_config", {}))
    return {
        "architectures": ["InternVLChatModel"], "model_type": "internvl_chat", "template": "internvl2_5",
        "downsample_ratio": 0.5, "dynamic_image_size": False, "max_dynamic_patch": 1, "min_dynamic_patch": 1,
        "use_thumbnail": False,
        **kept,
        "force_image_size": model["vision"]["image_size"], "select_layer": model["vision"].get("select_layer", -1),
        "ps_version": model.get("pixel_shuffle_version", "v2"), "torch_dtype": dtype,
        "vision_config": vision | _vision(model["vision"]),
        "llm_config": language | _language(family, model["language_model"]),
        configs_from_torch.OWN_SECTION: own,
    }  # fmt: skip


def _vision(values: Mapping[str, Any]) -> dict[str, Any]:
    names = {
        "hidden_size": "embed_dim", "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads",
        "intermediate_size": "mlp_dim", "image_size": "image_size", "patch_size": "patch_size",
        "norm_type": "norm_type", "qkv_bias": "qkv_bias", "qk_normalization": "qk_norm",
        "layer_norm_eps": "norm_eps", "drop_path_rate": "drop_path_rate",
    }  # fmt: skip
    return {"hidden_act": "gelu", **{theirs: values[ours] for theirs, ours in names.items() if ours in values}}


def _language(family: str, values: Mapping[str, Any]) -> dict[str, Any]:
    names = {
        "vocab_size": "vocab_size", "hidden_size": "embed_dim", "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads", "num_key_value_heads": "num_kv_heads", "intermediate_size": "mlp_dim",
        "rope_theta": "rope_theta", "rms_norm_eps": "norm_eps", "max_position_embeddings": "max_position_embeddings",
        "tie_word_embeddings": "tie_embeddings",
    }  # fmt: skip
    config = {theirs: values[ours] for theirs, ours in names.items() if ours in values}
    factor = values.get("rope_scaling_factor")
    config |= {"architectures": [_ARCHITECTURES[family]], "model_type": family, "hidden_act": "silu"}
    config["rope_scaling"] = None if factor is None else {"type": "dynamic", "factor": factor}
    if values.get("head_dim"):
        config["head_dim"] = values["head_dim"]
    return config | ({"bias": False} if family == "internlm2" else {"use_sliding_window": False})
