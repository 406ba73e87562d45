"""Weights of the reference's small models (tests/golden/*_weights.npz) as our parameters, and comparisons."""

import functools
import json
from pathlib import Path
from typing import Any
import zipfile

import jax
import numpy as np
from safetensors.numpy import save_file

from alto_jax.mllm.alto_llm import ModelConfig
from alto_jax.mllm.intern_vit import InternViTConfig
from alto_jax.mllm.language_model import LanguageModelConfig
from alto_jax.mllm.text import SpecialIds
from alto_jax.tokenizer.alto import ALTo, TokenizerConfig
from alto_jax.tokenizer.encoder import ViTConfig
from alto_jax.tokenizer.length import LengthPrediction
from alto_jax.tokenizer.pixel_decoder import PixelDecoderConfig
from alto_jax.tokenizer.sam_encoder import SamEncoder, SamEncoderConfig
from tests.golden_io import golden, tolerance
from tools.convert_torch_weights import rules, tokenizer_rules
from tools.convert_torch_weights.mapping import import_state_dict

# The sizes of the fixtures, as their meta.json gives them.
ALTO_CONFIG = TokenizerConfig(
    mask_size=64,
    encoder=ViTConfig(embed_dim=64, num_layers=2, num_heads=4),
    decoder=ViTConfig(embed_dim=48, num_layers=2, num_heads=3),
    sam=SamEncoderConfig(
        image_size=256, embed_dim=48, depth=4, num_heads=4, global_attn_indexes=(2,), window_size=6, out_channels=32
    ),
    pixel_decoder=PixelDecoderConfig(z_channels=64, hidden_channels=32),
)
INTERNVIT_300M = InternViTConfig(image_size=56, embed_dim=32, num_layers=2, num_heads=4, mlp_dim=64)
INTERNVIT_6B = InternViTConfig(
    image_size=56,
    embed_dim=32,
    num_layers=2,
    num_heads=4,
    mlp_dim=64,
    norm_type="rms_norm",
    qkv_bias=False,
    qk_norm=True,
)

ALTOLLM_CONFIG = ModelConfig(
    tokenizer=ALTO_CONFIG,
    vision=INTERNVIT_300M,
    language_model=LanguageModelConfig(vocab_size=1547, rope_scaling_factor=2.0),
)

SPECIAL = SpecialIds(
    pad=2, bos=1, im_start=511, im_end=510, img=512, img_end=513, img_context=514, ref=517, ref_end=518, box=519,
    box_end=520, mask_start=521, mask_end=522, code_0=523, num_codes=1024,
)  # fmt: skip


def golden_weights(name: str) -> dict[str, np.ndarray]:
    """The state dict of tests/golden/{name}_weights.npz."""
    return golden(f"{name}_weights")


@functools.cache
def alto_params() -> dict[str, Any]:
    """Parameters of the tokenizer of ALTO_CONFIG."""
    return import_state_dict("alto", golden_weights("alto"), ALTO_CONFIG)


def golden_tokenizer_files(folder: Path) -> Path:
    """Unpacks the small InternLM2 tokenizer directory of the reference into `folder`."""
    with zipfile.ZipFile(Path(__file__).parent / "golden" / "internlm2_tokenizer.zip") as files:
        files.extractall(folder)
    return folder


def altollm_weights() -> dict[str, np.ndarray]:
    """The state dict of the small ALToLLM; embeddings that no fixture uses are zero."""
    weights = golden_weights("altollm_llm")
    table = np.zeros((1547, 64), np.float32)
    name = "language_model.model.tok_embeddings.weight"
    table[weights.pop("embedded_ids")] = weights[name]
    tokenizer = {f"mask_decoder.{key}": value for key, value in golden_weights("alto").items()}
    return {**weights, name: table, **tokenizer}


@functools.cache
def altollm_params() -> dict[str, Any]:
    """Parameters of the small ALToLLM."""
    return import_state_dict("altollm-internlm2", altollm_weights(), ALTOLLM_CONFIG)


def write_altollm(folder: Path) -> Path:
    """Writes the small ALToLLM in the reference's layout: two shards, their index, config.json, tokenizer files."""
    golden_tokenizer_files(folder)
    weights, index = altollm_weights(), {}
    for number, keys in enumerate((sorted(weights)[::2], sorted(weights)[1::2]), 1):
        name = f"model-{number:05d}-of-00002.safetensors"
        save_file({key: weights[key] for key in keys}, folder / name)
        index |= dict.fromkeys(keys, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    vision = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 56,
        "patch_size": 14, "norm_type": "layer_norm", "qk_normalization": False, "qkv_bias": True,
        "layer_norm_eps": 1e-6,
    }  # fmt: skip
    language = {
        "architectures": ["InternLM2ForCausalLM"], "vocab_size": 1547, "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128, "bias": False,
        "rope_theta": 1000000, "rope_scaling": {"type": "dynamic", "factor": 2.0}, "hidden_act": "silu",
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    config = {
        "vision_config": vision, "llm_config": language, "template": "internvl2_5", "downsample_ratio": 0.5,
        "ps_version": "v2", "select_layer": -1, "force_image_size": 56,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# What no shape tells: the heads of the small mask tokenizer.
ALTO_HEADS = {"tokenizer": {"encoder": {"num_heads": 4}, "decoder": {"num_heads": 3}}}


def sam_features(sizes: dict[str, Any], state: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """Output [B, F, h, w] of the SAM encoder of a fixture's sizes and state dict for its input [B, 3, S, S]."""
    cfg = SamEncoderConfig(
        image_size=sizes["img_size"], patch_size=sizes["patch_size"], embed_dim=sizes["embed_dim"],
        depth=sizes["depth"], num_heads=sizes["num_heads"], global_attn_indexes=tuple(sizes["global_attn_indexes"]),
        window_size=sizes["window_size"], out_channels=sizes["out_chans"],
    )  # fmt: skip
    params = import_state_dict("sam", {f"image_encoder.{key}": value for key, value in state.items()}, cfg)
    out = jax.jit(lambda x: SamEncoder(cfg).apply({"params": params}, x))(nhwc(x))
    return np.moveaxis(np.asarray(out), -1, 1)


def encode_masks(
    sizes: dict[str, int], state: dict[str, np.ndarray], latent_tokens: np.ndarray, x: np.ndarray, legacy: bool
) -> tuple[np.ndarray, LengthPrediction]:
    """z [B, D, 1, L] and lengths from the mask encoder of a fixture's sizes and state dict for x [B, 3, H, H]."""
    vit = ViTConfig(embed_dim=sizes["width"], num_layers=sizes["layers"], num_heads=sizes["heads"])
    levels = sizes["patch"].bit_length()  # the pixel decoder is not used, but must fit
    cfg = TokenizerConfig(
        mask_size=sizes["crop"], patch_size=sizes["patch"], num_latent_tokens=sizes["latents"],
        token_size=sizes["token"], encoder=vit, decoder=vit, sam=None, legacy_reshape=legacy,
        pixel_decoder=PixelDecoderConfig(channel_mult=(1,) * levels),
    )  # fmt: skip
    encoder_rules = (*tokenizer_rules.encoder_rules(cfg), *tokenizer_rules.length_rules(cfg))
    table = rules.Table(encoder_rules, ((r"encoder\.attn_mask", "a constant"),))
    tensors = {f"encoder.{key}": value for key, value in state.items()} | {"latent_tokens": latent_tokens}
    params = rules.unflatten(rules.import_tensors(table, tensors))

    @jax.jit
    def run(x):
        encoded = ALTo(cfg).apply({"params": params}, x, method="encode")
        return encoded.z, ALTo(cfg).apply({"params": params}, encoded, method="predict_length")

    z, length = run(nhwc(x))
    return np.asarray(z).swapaxes(1, 2)[:, :, None], length


def random_params(module: Any, *args: Any) -> dict[str, Any]:
    """Parameters drawn with numpy, scaled by fan-in: initialising by jax compiles for seconds."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        offset = 1.0 if path[-1].key == "scale" else 0.0
        fan_in = np.prod(leaf.shape[:-1]) if path[-1].key == "kernel" else 16
        return (offset + rng.normal(size=leaf.shape) * max(fan_in, 1) ** -0.5).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(module.init, jax.random.key(0), *args)["params"])


def nhwc(array: np.ndarray) -> np.ndarray:
    """[B, D, H, W] → [B, H, W, D]."""
    return np.moveaxis(array, 1, -1)


def assert_golden(name: str, key: str, actual: Any, expected: np.ndarray) -> None:
    """Compares with fixture `name`, within the tolerance of its array `key`."""
    actual = np.asarray(actual)
    assert actual.shape == expected.shape, f"{name}.{key}: shape {actual.shape}, expected {expected.shape}"
    error = np.max(np.abs(actual.astype(np.float64) - expected))
    assert error <= tolerance(name, key), f"{name}.{key}: error {error:.3g}, tolerance {tolerance(name, key):.3g}"
