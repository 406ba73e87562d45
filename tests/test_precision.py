"""float32 means float32 on every device: what the programs ask of matrix products, and what rounded ones would do."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alto_jax import layers
from alto_jax.batch import MaskBatch
from alto_jax.config import ConfigError
from alto_jax.evaluate import device
from alto_jax.evaluate.reconstruction import Reconstruction
from alto_jax.experiment import make_experiment
from alto_jax.inference.tokenizer import TokenizerModel
from alto_jax.main import load_config
from alto_jax.mllm.alto_llm import ModelConfig
from alto_jax.parallel import sharding
from alto_jax.plan import programs
from alto_jax.tokenizer.alto import ALTo
from tests import rounding
from tests.conftest import ROOT
from tests.golden_io import golden
from tests.golden_models import ALTO_CONFIG, alto_params

STEPS = [("stage1", "train"), ("stage1_5", "train"), ("stage2", "train"), ("stage3", "train"), ("stage2", "predict")]


def one_device():
    return sharding.make_mesh(sharding.MeshConfig(1, 1, 1), jax.devices()[:1])


@functools.cache
def products_of(stage, step, precision="", bfloat16=False, rank=0):
    """The products of the programs of a step at debug size."""
    values = load_config(str(ROOT / f"configs/{stage}.py:debug")).to_dict()
    if bfloat16:
        values["model"]["tokenizer"]["dtype"] = values["model"]["tokenizer"]["sam"]["dtype"] = "bfloat16"
    values["model"]["matmul_precision"] = precision
    values["lora"]["rank"] = rank
    lowered = programs.lower_programs(make_experiment(values), step, one_device())[2]
    return [p for _, function, args in lowered for p in rounding.products(function.trace(*args).jaxpr.jaxpr)]


@pytest.mark.parametrize("stage, step", STEPS)
def test_every_product_of_a_float32_model_keeps_all_digits(stage, step):
    """Training, rollouts and answers, forward and backward."""
    found = products_of(stage, step)
    assert len(found) > 30
    assert [p for p in found if not p.is_highest] == []


def test_adapters_keep_all_digits_too():
    assert all(p.is_highest for p in products_of("stage3", "update", rank=2))


@pytest.mark.parametrize("stage, step", [("stage1_5", "train"), ("stage2", "train"), ("stage3", "rollout")])
def test_what_is_told_reaches_all_but_what_decides_codes_and_lengths(stage, step):
    found = products_of(stage, step, "default")
    assert any(p.decides for p in found)
    assert [p for p in found if p.is_highest != p.decides] == []


def test_a_bfloat16_model_decides_in_float32():
    """Its other products are as the device likes; codes and lengths are not."""
    found = products_of("stage1_5", "train", bfloat16=True)
    deciding = [p for p in found if p.decides]
    assert len(deciding) > 6
    assert all(p.is_highest and p.dtypes == ("float32", "float32") for p in deciding)
    others = [p for p in found if not p.decides]
    assert sum("bfloat16" in p.dtypes for p in others) > 30
    assert not any(p.is_highest for p in others if "bfloat16" in p.dtypes)


def test_large_configurations_leave_their_last_float32_parts_to_the_device():
    for name in ("stage1.py:base", "stage3.py:8b"):
        model = make_experiment(load_config(str(ROOT / "configs" / name)).to_dict()).model
        assert model.tokenizer.dtype == "bfloat16" and model.matmul_precision == "default"


@pytest.mark.parametrize("precision", ["", "default"])
def test_prediction_and_evaluation_do_as_told(precision, monkeypatch):
    """The tokenizer's calls of `predict` and `tokenize`, and those of `evaluate`."""
    values = load_config(str(ROOT / "configs/stage1.py:debug")).to_dict()["model"]
    cfg = dataclasses.replace(make_experiment_model(values), matmul_precision=precision)
    size, model = cfg.tokenizer, ALTo(cfg.tokenizer)
    mask = jax.ShapeDtypeStruct((2, size.mask_size, size.mask_size), jnp.float32)
    image = jax.ShapeDtypeStruct((2, size.image_size, size.image_size, 3), jnp.uint8)
    params = jax.eval_shape(model.init, jax.random.key(0), mask, image)["params"]
    encode = TokenizerModel(cfg, {}, "").method("tokenize").trace(params, mask)

    class Built(Exception):
        """The program is there; it need not run."""

    def stop(*args):
        raise Built

    monkeypatch.setattr(device.sharding, "put_batch", stop)
    evaluated = device.Programs(one_device(), cfg.matmul_precision)
    evaluation = Reconstruction(cfg, {"tokenizer": params}, "tokenizer_scenes", [], {}, evaluated)
    with pytest.raises(Built):
        evaluation.answer([evaluation.blank()])
    reconstruct = evaluated._functions["reconstruct"]
    for traced in (encode, reconstruct.trace({"tokenizer": params}, MaskBatch(image=image, mask=mask))):
        found = rounding.products(traced.jaxpr.jaxpr)
        assert sum(p.decides for p in found) >= 6
        assert all(p.is_highest for p in found if p.decides)
        assert all(p.is_highest == (precision == "") for p in found if not p.decides)


def make_experiment_model(values):
    return make_experiment({"stage": "stage1", "model": values}).model


def test_the_lowered_program_says_so():
    """What XLA is given, not only what JAX intends."""
    text = jax.jit(golden_tokenize).lower(jax.ShapeDtypeStruct((2, 64, 64), jnp.float32)).as_text()
    lines = [line for line in text.splitlines() if re.search(r"stablehlo\.(dot_general|convolution)", line)]
    assert len(lines) > 10
    for line in lines:
        highest = ("precision = [HIGHEST, HIGHEST]", "#stablehlo<precision HIGHEST>, #stablehlo<precision HIGHEST>")
        assert any(form in line for form in highest), line


def test_unknown_precision_is_named():
    with pytest.raises(ConfigError, match=r"config.model.matmul_precision: expected one of .*got 'bf16'"):
        make_experiment({"stage": "stage1", "model": {"matmul_precision": "bf16"}})
    with pytest.raises(ValueError, match="matmul_precision.*'bf16'"):
        layers.told_precision("bf16")
    assert ModelConfig().matmul_precision == ""


def test_this_file_reads_golden_arrays(request):
    """The mark by which `pytest -m golden` finds what to run on an accelerator, see docs/numerics.md."""
    assert request.node.get_closest_marker("golden")


# --- what rounding would do ------------------------------------------------------------------------


def golden_tokenize(masks):
    return ALTo(ALTO_CONFIG).apply({"params": alto_params()}, masks, method="tokenize")


def golden_decide(encoded):
    """Codes and lengths from what the encoder gives."""
    call = lambda *args, method: ALTo(ALTO_CONFIG).apply({"params": alto_params()}, *args, method=method)
    return call(encoded.z, method="quantize").codes, call(encoded, method="predict_length").length


@functools.cache
def masks():
    """Those of the fixtures, and unions of ellipses."""
    rng, (y, x) = np.random.default_rng(0), np.mgrid[:64, :64]

    def union():
        shapes = zip(rng.integers(8, 56, (4, 2)), rng.uniform(3, 20, (4, 2)))
        return np.any([((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1 for (cy, cx), (ry, rx) in shapes], axis=0)

    drawn = np.array([union() for _ in range(121)], np.float32)
    return np.concatenate([golden("alto_train")["mask"], golden("altollm")["target_masks"], drawn])


def changed(found, expected):
    return tuple(int(np.sum(np.asarray(a) != b)) for a, b in zip(found, expected))


@pytest.mark.parametrize("bits", [rounding.TF32, rounding.BF16])
def test_rounded_operands_change_no_code_and_no_length(bits):
    """The golden tokenizer at the published scale of its logits, on a device that rounds unless it is asked not to.

    As configured nothing changes; with every product rounded, as before, codes and lengths did.
    """
    expected = jax.device_get(jax.jit(golden_tokenize)(masks()))
    assert len(masks()) == 128 and len(np.unique(expected[1])) > 5
    assert changed(rounding.rounded(golden_tokenize, bits)(masks()), expected) == (0, 0)
    codes, lengths = changed(rounding.rounded(golden_tokenize, bits, every=True)(masks()), expected)
    assert codes > 0 and lengths > 0


@pytest.mark.parametrize("bits", [rounding.TF32, rounding.BF16])
def test_what_decides_keeps_float32_whatever_is_told(bits):
    """From the same latents: told to round, quantizer and length predictor do not; if they did, lengths would move."""
    encoded = jax.jit(lambda m: ALTo(ALTO_CONFIG).apply({"params": alto_params()}, m, method="encode"))(masks())
    expected = jax.device_get(jax.jit(golden_decide)(encoded))
    with jax.default_matmul_precision("bfloat16"):
        rounding_device = rounding.rounded(lambda z, latents, cls: decide(encoded, z, latents, cls), bits)
        assert changed(rounding_device(encoded.z, encoded.latents, encoded.cls), expected) == (0, 0)
    every = rounding.rounded(lambda z, latents, cls: decide(encoded, z, latents, cls), bits, every=True)
    assert changed(every(encoded.z, encoded.latents, encoded.cls), expected)[1] > 0


def decide(encoded, z, latents, cls):
    return golden_decide(encoded.replace(z=z, latents=latents, cls=cls))
