"""Sizes and settings that the stage configurations share: plain values, no code of the package."""

import copy

import ml_collections

LANGUAGE_MODELS = {
    # InternVL2.5 family; the vocabulary of the published checkpoints (mask tokens are appended to it).
    "1b": {"embed_dim": 896, "num_layers": 24, "num_heads": 14, "num_kv_heads": 2, "mlp_dim": 4864, "qwen": True},
    "2b": {"embed_dim": 2048, "num_layers": 24, "num_heads": 16, "num_kv_heads": 8, "mlp_dim": 8192},
    "4b": {"embed_dim": 2048, "num_layers": 36, "num_heads": 16, "num_kv_heads": 2, "mlp_dim": 11008, "qwen": True},
    "8b": {"embed_dim": 4096, "num_layers": 32, "num_heads": 32, "num_kv_heads": 8, "mlp_dim": 14336},
    "26b": {
        "embed_dim": 6144,
        "num_layers": 48,
        "num_heads": 48,
        "num_kv_heads": 8,
        "mlp_dim": 16384,
        "rope_theta": 5e7,
    },
}
SAM_SIZES = {
    "vit_b": {"embed_dim": 768, "depth": 12, "num_heads": 12, "global_attn_indexes": [2, 5, 8, 11]},
    "vit_l": {"embed_dim": 1024, "depth": 24, "num_heads": 16, "global_attn_indexes": [5, 11, 17, 23]},
    "vit_h": {"embed_dim": 1280, "depth": 32, "num_heads": 16, "global_attn_indexes": [7, 15, 23, 31]},
}
NUM_CODES = 1024
NUM_SPECIAL = 11  # <img> … </box>, <ALTo_Start>, <ALTo_End>
SYSTEM = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
DEMO_SIZES = ("debug", "tiny", "small")
DEMO_MODELS = {
    "debug": {
        "vision": {"image_size": 56, "patch_size": 14, "embed_dim": 32, "num_layers": 1, "num_heads": 2, "mlp_dim": 64},
        "language_model": {"vocab_size": 512, "embed_dim": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1,
                           "mlp_dim": 64},
    },
    "tiny": {
        "vision": {"image_size": 128, "patch_size": 16, "embed_dim": 192, "num_layers": 5, "num_heads": 3,
                   "mlp_dim": 768},
        "language_model": {"vocab_size": 1312, "embed_dim": 192, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2,
                           "mlp_dim": 512},
    },
    "small": {
        "vision": {"image_size": 128, "patch_size": 8, "embed_dim": 192, "num_layers": 6, "num_heads": 3,
                   "mlp_dim": 768},
        "language_model": {"vocab_size": 1312, "embed_dim": 256, "num_layers": 5, "num_heads": 4, "num_kv_heads": 2,
                           "mlp_dim": 640},
    },
}  # fmt: skip


def internvit(size: str = "300m") -> dict:
    """InternViT-300M or -6B."""
    if size == "6b":
        return {
            "embed_dim": 3200, "num_layers": 45, "num_heads": 25, "mlp_dim": 12800, "norm_type": "rms_norm",
            "qkv_bias": False, "qk_norm": True, "drop_path_rate": 0.1,
        }  # fmt: skip
    return {"embed_dim": 1024, "num_layers": 24, "num_heads": 16, "mlp_dim": 4096, "drop_path_rate": 0.1}


def language_model(size: str, num_codes: int = NUM_CODES) -> dict:
    """The language model of InternVL2.5-`size`; its vocabulary has `num_codes` mask codes (0: as published)."""
    cfg = dict(LANGUAGE_MODELS[size])
    extra = num_codes + 2 if num_codes else 0
    if cfg.pop("qwen", False):
        return {**cfg, "vocab_size": 151674 + extra, "rope_theta": 1e6, "norm_eps": 1e-6, "qkv_bias": True}
    return {"rope_theta": 1e6, **cfg, "vocab_size": 92553 + extra, "norm_eps": 1e-5, "rope_scaling_factor": 2.0}


def tokenizer(size: str = "base") -> dict:
    """The mask tokenizer: "base" is the paper's (TiTok-L-32 with SAM ViT-L); "small" trains in minutes on a GPU, "tiny"
    and "debug" on a laptop.

    The small sizes are trained from scratch and use the corrected forms; the paper's keeps the forms that
    the published weights need (README, "Differences from the reference").
    """
    if size == "base":
        return {}
    corrected = {"legacy_reshape": False, "length_logit_scale": "divide", "length_rule": "unified"}
    if size == "debug":
        vit = {"embed_dim": 32, "num_layers": 1, "num_heads": 2}
        return {
            "mask_size": 32, "patch_size": 8, "num_latent_tokens": 8, "codebook_size": 64, "token_size": 6,
            "encoder": vit, "decoder": vit,
            "sam": {"image_size": 64, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2,
                    "global_attn_indexes": [1], "window_size": 4, "out_channels": 16},
            "pixel_decoder": {"z_channels": 16, "hidden_channels": 16, "channel_mult": [1, 1], "num_res_blocks": 1,
                              "out_patch": 4, "legacy_shortcut": False},
            **corrected,
        }  # fmt: skip
    if size == "small":
        encoder = {"embed_dim": 192, "num_layers": 3, "num_heads": 3}
        sam = {"embed_dim": 128, "depth": 4, "num_heads": 2, "global_attn_indexes": [1, 3], "out_channels": 128}
    else:
        encoder = {"embed_dim": 128, "num_layers": 2, "num_heads": 2}
        sam = {"embed_dim": 96, "depth": 2, "num_heads": 2, "global_attn_indexes": [1], "out_channels": 96}
    return {
        "mask_size": 64, "patch_size": 8, "num_latent_tokens": 32, "codebook_size": 512, "token_size": 12,
        "encoder": encoder, "decoder": {**encoder, "num_layers": encoder["num_layers"] + 1},
        "sam": {"image_size": 128, "patch_size": 16, "window_size": 4, **sam},
        "pixel_decoder": {"z_channels": sam["out_channels"], "hidden_channels": 64, "channel_mult": [1],
                          "num_res_blocks": 1, "num_groups": 8, "out_channels": 1, "out_patch": 8,
                          "legacy_shortcut": False},
        **corrected,
    }  # fmt: skip


def mllm(size: str) -> dict:
    """Vision tower and language model, with the mask tokenizer that belongs to the size."""
    if size in DEMO_MODELS:
        return {"tokenizer": tokenizer(size), **copy.deepcopy(DEMO_MODELS[size]), "pixel_input": "native"}
    return {
        "tokenizer": tokenizer(),
        "vision": internvit("6b" if size == "26b" else "300m"),
        "language_model": language_model(size),
    }


def large_model_types(model: dict) -> dict:
    """bfloat16 compute (norms, losses and what decides codes and lengths stay in float32) and rematerialisation for the
    paper's sizes; what products are left in float32 are the device's fast ones."""
    for name in ("vision", "language_model"):
        if name in model:
            model[name] |= {"dtype": "bfloat16", "remat": "full"}
    # Note: its sequences are short, so that keeping the products costs little.
    model["tokenizer"] |= {"dtype": "bfloat16", "remat": "dots"}
    model["tokenizer"]["sam"] = {"dtype": "bfloat16", "remat": "full"}
    model["tokenizer"]["pixel_decoder"] = {"dtype": "bfloat16"}
    model["matmul_precision"] = "default"
    return model


def base_config(stage: str, model: dict) -> ml_collections.ConfigDict:
    """Fields that every stage has."""
    return ml_collections.ConfigDict(
        {
            "stage": stage,
            "seed": 0,
            "init_from": "",
            "tokenizer_from": "",
            "model": model,
            "data": {
                "source": "scenes",
                "root": "",
                "meta": "",
                "num_threads": 0,
                "num_workers": 0,
                "scenes": {"image_size": 128, "num_scenes": 20000},
                "scene_masks": {},
                "scene_chats": {},
                "scene_lessons": {},
            },
            "optim": {},
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
            "train": {},
            "eval": {},
        }
    )


def check_size(size: str | None, sizes: tuple[str, ...], file: str) -> str:
    """The chosen size (the first one by default).

    Raises:
      ValueError: an unknown size.
    """
    size = size or sizes[0]
    if size not in sizes:
        raise ValueError(f"--config=configs/{file}:{size}: unknown size; expected one of {', '.join(sizes)}")
    return size


def debug_run(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """A handful of steps on tiny batches."""
    config.train.update({"steps": 4, "batch_size": 2, "log_every": 1, "checkpoint_every": 1})
    config.eval.update({"num_samples": 4, "batch_size": 4, "token_counts": [1, 8]})
    config.data.scenes.update({"image_size": 64, "num_scenes": 64})
    config.optim.warmup_steps = 1
    return config
