"""Small checkpoints in the forms that users have: Hugging Face's own InternVL, PEFT adapters, tokenizer files."""

import json
import re

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

TEXTS = ["Segment the red square.", "It's 12:30 —  two  spaces\n\nand lines ", "你好, naïve café 🙂", "a\tb  \r\n c"]
ADDED = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>",
         "<ref>", "</ref>", "<box>", "</box>")  # fmt: skip

_TO_HF = (
    (r"vision_model\.embeddings\.class_embedding", "{vision}embeddings.cls_token"),
    (r"vision_model\.embeddings\.position_embedding", "{vision}embeddings.position_embeddings"),
    (r"vision_model\.embeddings\.patch_embedding\.", "{vision}embeddings.patch_embeddings.projection."),
    (r"vision_model\.encoder\.layers\.(\d+)\.ls([12])", r"{vision}encoder.layer.\1.lambda_\2"),
    (r"vision_model\.encoder\.layers\.(\d+)\.norm1\.", r"{vision}encoder.layer.\1.layernorm_before."),
    (r"vision_model\.encoder\.layers\.(\d+)\.norm2\.", r"{vision}encoder.layer.\1.layernorm_after."),
    (r"vision_model\.encoder\.layers\.(\d+)\.attn\.proj\.", r"{vision}encoder.layer.\1.attention.projection_layer."),
    (r"vision_model\.encoder\.layers\.(\d+)\.attn\.", r"{vision}encoder.layer.\1.attention."),
    (r"vision_model\.encoder\.layers\.(\d+)\.", r"{vision}encoder.layer.\1."),
    (r"mlp1\.0\.", "{projector}layer_norm."),
    (r"mlp1\.1\.", "{projector}linear_1."),
    (r"mlp1\.3\.", "{projector}linear_2."),
    (r"language_model\.lm_head\.", "{head}"),
    (r"language_model\.model\.", "{language}"),
)
NEW = {"vision": "model.vision_tower.", "projector": "model.multi_modal_projector.", "head": "lm_head.",
       "language": "model.language_model."}  # fmt: skip
OLD = {"vision": "vision_tower.", "projector": "multi_modal_projector.", "head": "language_model.lm_head.",
       "language": "language_model.model."}  # fmt: skip


def hf_state(state, names=NEW):
    """A state dict of InternVLChatModel under the names of Hugging Face's own InternVL, q, k and v apart."""
    out = {}
    for key, value in state.items():
        for pattern, name in _TO_HF:
            if re.match(pattern, key):
                for field, text in names.items():
                    name = name.replace("{" + field + "}", text)
                key = re.sub(pattern, name, key, count=1)
                break
        if ".attention.qkv." in key:
            for letter, part in zip("qkv", np.split(value, 3)):
                out[key.replace(".qkv.", f".{letter}_proj.")] = part.copy()
        else:
            out[key] = value
    return out


def hf_config(config):
    """The config.json of Hugging Face's own InternVL, from one of InternVLChatModel."""
    vision, language = dict(config["vision_config"]), dict(config["llm_config"])
    vision |= {"attention_bias": vision.pop("qkv_bias"), "use_qk_norm": vision.pop("qk_normalization")}
    vision |= {"image_size": [vision["image_size"]] * 2, "patch_size": [vision["patch_size"]] * 2}
    vision.pop("drop_path_rate")
    theta = language.pop("rope_theta")
    language["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    language.pop("rope_scaling")
    return {
        "architectures": ["InternVLForConditionalGeneration"], "model_type": "internvl", "vision_config": vision,
        "text_config": language, "downsample_ratio": 0.5, "image_seq_length": 4, "projector_hidden_act": "gelu",
        "vision_feature_layer": -1, "vision_feature_select_strategy": "default", "tie_word_embeddings": True,
    }  # fmt: skip


def qwen2_tokenizer(folder, names=ADDED):
    """Writes vocab.json, merges.txt and tokenizer_config.json; returns the number of tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.model.save(str(folder))
    size = tokenizer.get_vocab_size()
    added = {str(size + i): {"content": name, "special": True} for i, name in enumerate(names)}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added})
    )
    return size + len(names)


def peft_adapter(folder, shapes, *, rank=2, seed=0, extra=None, **config):
    """Writes a PEFT adapter for modules; returns what it adds to their weights.

    Args:
      folder: to make. shapes: module → (out, in). rank: of all, or module → rank. extra: further tensors.
      config: fields of adapter_config.json.
    """
    rng, tensors, deltas = np.random.default_rng(seed), dict(extra or {}), {}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "base_model_name_or_path": "nowhere"} | config
    for module, (outer, inner) in shapes.items():
        r = rank[module] if isinstance(rank, dict) else rank
        a, b = rng.normal(size=(r, inner)).astype(np.float32), rng.normal(size=(outer, r)).astype(np.float32)
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
        scale = config["lora_alpha"] / (r**0.5 if config.get("use_rslora") else r)
        deltas[module] = scale * (b.astype(np.float64) @ a)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return deltas
