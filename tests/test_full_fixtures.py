"""Fixtures that tests/golden has no room for, of whatever sizes their meta.json gives.

Skipped unless the environment variable ALTO_JAX_FIXTURES names a directory of fixtures of the PyTorch reference:
NAME.npz, NAME.weights.safetensors, meta.json (sizes) and tolerances.json (absolute, or "exact").
"""

import functools
import json
import os
import pathlib

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from alto_jax.batch import PromptBatch
from alto_jax.config import build
from alto_jax.mllm.alto_llm import ALToLLM, ModelConfig
from alto_jax.mllm.intern_vit import InternViT, InternViTConfig
from alto_jax.mllm.language_model import LanguageModel, LanguageModelConfig
from alto_jax.stages import grpo
from alto_jax.tokenizer.sam_encoder import IMAGENET_MEAN, IMAGENET_STD
from tests.golden_models import ALTO_HEADS, SPECIAL, encode_masks, nhwc, sam_features
from tools.convert_torch_weights import configs_from_torch
from tools.convert_torch_weights.mapping import import_state_dict

FOLDER = pathlib.Path(os.environ.get("ALTO_JAX_FIXTURES", ""))
pytestmark = pytest.mark.skipif("ALTO_JAX_FIXTURES" not in os.environ, reason="ALTO_JAX_FIXTURES is not set")


@functools.cache
def fixture(name):
    with np.load(FOLDER / f"{name}.npz") as arrays:
        return {key: arrays[key] for key in arrays.files}


def weights(name):
    return load_file(FOLDER / f"{name}.weights.safetensors")


def config(name):
    return json.loads((FOLDER / "meta.json").read_text())[name]["config"]


def assert_close(name, key, actual, where=...):
    """Compares with array `key` of fixture `name` within its tolerance."""
    expected, actual = fixture(name)[key], np.asarray(actual)
    allowed = json.loads((FOLDER / "tolerances.json").read_text())[name][key]
    assert actual.shape == expected.shape
    error = np.max(np.abs(actual[where].astype(np.float64) - expected[where]))
    assert error <= (0 if allowed == "exact" else allowed), f"{name}.{key}: error {error:.3g}, tolerance {allowed}"


@pytest.mark.parametrize("name", ["sam_win14", "sam_grid10"])
def test_sam_encoder(name):
    assert_close(name, "out", sam_features(config(name), weights(name), fixture(name)["x"]))


@pytest.mark.parametrize("legacy", [True, False])
def test_mask_encoder(legacy):
    arrays = fixture("mt_alt")
    z, length = encode_masks(config("mt_alt"), weights("mt_alt"), arrays["latent_tokens"], arrays["x"], legacy)
    assert_close("mt_alt", f"z_legacy{int(legacy)}", z)
    if legacy:
        assert_close("mt_alt", "keep", length.keep)
        assert_close("mt_alt", "lengths_to_keep", length.num_kept)


@pytest.mark.parametrize("name", ["internvit_300m", "internvit_6b"])
def test_vision_tower(name):
    shapes = {key: value.shape for key, value in weights(name).items()}
    cfg = build(InternViTConfig, configs_from_torch.vision_values(shapes, "", config(name), "meta.json"))
    params = import_state_dict("internvit", weights(name), cfg)
    for suffix in ("", "_larger"):
        x = nhwc(fixture(name)[f"x{suffix}"])
        out = jax.jit(lambda x: InternViT(cfg).apply({"params": params}, x))(x)
        key = f"last_hidden_state{suffix}"
        cls = fixture(name)[key][:, :1]  # our tower leaves the class token out
        assert_close(name, key, np.concatenate([cls, out], axis=1))


@pytest.mark.parametrize("name", ["internlm2", "qwen2"])
def test_language_model(name):
    arrays, tensors = fixture(name), weights(name)
    shapes = {key: value.shape for key, value in tensors.items()}
    cfg = build(LanguageModelConfig, configs_from_torch.language_values(name, shapes, "", config(name), "meta.json"))
    params = import_state_dict(name, tensors, cfg)
    forward = jax.jit(lambda *args: LanguageModel(cfg).apply({"params": params}, *args, method="forward"))
    assert_close(name, "logits_nopad", forward(arrays["ids"], None, None))
    causal = np.tril(np.ones((arrays["ids"].shape[1],) * 2, bool))
    for key, side, positions in (("logits_right", "right", None), ("logits_left_with_pos", "left", "pos_left")):
        mask = arrays[f"mask_{side}"].astype(bool)
        logits = forward(arrays["ids"], None if positions is None else arrays[positions], causal & mask[:, None])
        assert_close(name, key, logits, where=mask)


def test_reference_policy_of_grpo():
    """Log-probabilities of the group under the policy and under the frozen reference, from one shared prompt."""
    arrays, texts = fixture("grpo"), json.loads((FOLDER / "altollm.json").read_text())
    policy = weights("altollm_llm") | {f"mask_decoder.{key}": value for key, value in weights("alto").items()}
    values = configs_from_torch.model_values(
        "altollm-internlm2", {key: value.shape for key, value in policy.items()}, texts
    )
    cfg = build(ModelConfig, configs_from_torch.merge(values, ALTO_HEADS))
    image = nhwc(arrays["pixel_values"]) * np.array(IMAGENET_STD) + np.array(IMAGENET_MEAN)
    batch = PromptBatch(
        image=np.round(image * 255).astype(np.uint8), pixel_image=None, prompt_ids=arrays["prompt_ids"],
        prompt_mask=np.ones(arrays["prompt_ids"].shape, bool), mask=None,
    )  # fmt: skip
    for key, state in (("logps", policy), ("ref_logps", policy | weights("grpo_ref_output"))):
        params = import_state_dict("altollm-internlm2", state, cfg)
        image_tokens = ALToLLM(cfg).apply({"params": params}, batch.image, method="image_tokens")
        logps, _ = grpo.completion_logps(cfg, params, SPECIAL, batch, image_tokens, arrays["completion_ids"][None])
        assert_close("grpo", key, logps[0])
