"""Kernels of 8 bits: products equal those of the numbers they stand for, wherever the kernels come from."""

import contextlib
import dataclasses
import functools

from flax import linen as nn
import jax
from jax import export
import jax.numpy as jnp
import numpy as np
import pytest

from alto_jax import experiment, layers, main
from alto_jax.config import ConfigError
from alto_jax.mllm import dense
from alto_jax.mllm.generate import GenerateConfig, generate
from alto_jax.mllm.language_model import KERNELS, LanguageModel, for_inference
from alto_jax.params import kernel_dims, quantized, to_8_bits
from benchmarks import int8_dot
from tests.conftest import ROOT
from tests.mllm.test_cache import BATCH, MODEL, SPECIAL, setting

WRONG = r"config\.grpo\.generate\.quantize: expected one of .*, got 'x'"


def back(kernel, scale):
    """The numbers that a kernel of 8 bits stands for."""
    return kernel.astype(jnp.float32) * jnp.expand_dims(scale, tuple(range(kernel.ndim - scale.ndim)))


def turned(kernel, scale):
    """A kernel with its inputs first as one with its outputs first, or the other way round."""
    inner = kernel.ndim - scale.ndim
    return jnp.transpose(kernel, (*range(inner, kernel.ndim), *range(inner)))


@pytest.mark.parametrize("kind, step", [("int8", 1 / 254), ("fp8", 1 / 16)])
def test_rounding(kind, step):
    """int8: half a step of the output's scale; fp8: half a step of the number itself (3 bits), or of the smallest."""
    x = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32) * np.array([1, 9, 0.01, 3, 1, 0])
    values, scale = to_8_bits(x, 0, kind)
    assert values.dtype.itemsize == 1 and scale.shape == (6,) and scale[5] == 0
    largest = np.abs(x).max(0)
    allowed = step * (largest if kind == "int8" else np.maximum(np.abs(x), largest * 2.0**-6 / 448))
    assert np.all(np.abs(back(values, scale) - x) <= 1.001 * allowed)
    np.testing.assert_allclose(np.abs(back(values, scale)).max(0), largest, rtol=1e-6)


@pytest.mark.parametrize("form", [functools.partial(dense.convert_dot, inner=1), dense.multiply_reduce])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize(
    "rows, inner, outer",
    [((1, 1), (48,), (64,)), ((3, 2), (48,), (2, 2, 8)), ((2,), (4, 8), (40,)), ((6,), (4, 8), (2, 20))],
)
def test_a_layer_is_the_product_of_what_its_kernel_stands_for(form, kind, rows, inner, outer, monkeypatch):
    rng = np.random.default_rng(1)
    x, kernel = (rng.normal(size=shape).astype(np.float32) for shape in ((*rows, *inner), (*inner, *outer)))
    values, scale = to_8_bits(kernel, tuple(range(len(inner))), kind)
    want = np.tensordot(x, back(values, scale), len(inner))
    flat = x.reshape(*rows, -1), values.reshape(np.prod(inner), -1).T
    for long in (dense.LONG, 16):  # as a whole, and in 2 or 3 parts
        monkeypatch.setattr(dense, "LONG", long)
        np.testing.assert_allclose(form(*flat) * scale.reshape(-1), want.reshape(*rows, -1), rtol=1e-5, atol=1e-5)
    params = {"kernel_t": turned(values, scale), "kernel_scale": scale, "bias": np.ones(outer, np.float32)}
    layer = dense.Dense(outer, num_inputs=len(inner), use_bias=True)
    got = layer.apply({"params": params}, x)
    np.testing.assert_allclose(got, want + 1, rtol=1e-5, atol=1e-5)
    part = layer.apply({"params": params}, x, slice(3, 7))
    np.testing.assert_allclose(part, got[..., 3:7], rtol=1e-5, atol=1e-5)
    half = layer.clone(dtype=jnp.bfloat16).apply({"params": params}, x)
    assert half.dtype == jnp.bfloat16 and np.abs(half - got).max() < 0.02 * np.abs(got).max()


def test_a_layer_without_8_bits_is_linens():
    x, shape = jax.random.normal(jax.random.key(0), (2, 3, 4, 8)), (2, 6)
    ours = dense.Dense(shape, num_inputs=2, use_bias=True)
    linens = nn.DenseGeneral(shape, axis=(-2, -1), kernel_init=nn.initializers.normal(0.02))
    params = linens.init(jax.random.key(1), x)
    jax.tree.map(np.testing.assert_array_equal, ours.init(jax.random.key(1), x), params)
    np.testing.assert_array_equal(ours.apply(params, x), linens.apply(params, x))


def test_adapters_lie_beside_kernels_of_8_bits():
    rng = np.random.default_rng(2)
    x, kernel, a, b = (rng.normal(size=s).astype(np.float32) for s in ((3, 8), (8, 6), (8, 2), (2, 6)))
    values, scale = to_8_bits(kernel, 0)
    params = {"kernel_t": values.T, "kernel_scale": scale, "lora_a": a, "lora_b": b}
    with layers.adapted(0.5):
        got = dense.Dense(6).apply({"params": params}, x)
    np.testing.assert_allclose(got, x @ back(values, scale) + 0.5 * x @ a @ b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_one_result_whatever_form_the_layers_have(kind):
    params = setting()[0]
    whole = quantized(params, KERNELS, kind)
    layer = whole["blocks"]["layers"]
    assert layer["attn"]["kv"]["kernel_scale"].shape == (3, 2, 2, 32) and layer["attn"]["out"][
        "kernel_scale"
    ].shape == (3, 128)
    assert whole["embed"] == params["embed"] and "kernel_scale" not in layer["attn_norm"]
    first = for_inference(MODEL.cfg, params, kind)
    forms = [whole, first, for_inference(MODEL.cfg, params)]
    for again in (for_inference(MODEL.cfg, form, kind) for form in forms):
        jax.tree.map(np.testing.assert_array_equal, again, first)
    # Biases, norms and the table are in the type that is computed in; what has 8 bits, and its scales, stay.
    half = MODEL.cfg.__class__(**{**vars(MODEL.cfg), "dtype": "bfloat16"})
    types = jax.tree.map(lambda a: str(a.dtype), for_inference(half, params, kind)["blocks"]["layers"][0]["attn"]["q"])
    assert types == {"kernel_t": {"int8": "int8", "fp8": "float8_e4m3fn"}[kind], "kernel_scale": "float32"}


def test_a_layer_s_share_of_the_dimensions():
    assert kernel_dims("blocks/layers/attn/out/kernel", (3, 4, 8, 16)) == ((3,), (4, 8), (16,))
    assert kernel_dims("head/kernel", (16, 99)) == ((), (16,), (99,))


def test_answers_of_the_whole_model():
    """Weights rounded in the call answer as the numbers do that they stand for."""
    params, ids, mask = setting()
    embedded = params["embed"]["embedding"][ids]

    def run(params, quantize=""):
        cfg = GenerateConfig(max_new_tokens=8, quantize=quantize)
        return jax.device_get(generate(MODEL, params, embedded, mask, cfg, SPECIAL, jax.random.key(0)))

    rounded = for_inference(MODEL.cfg, params, "int8")

    def restored(tree):
        if isinstance(tree, tuple):
            return tuple(map(restored, tree))
        if not isinstance(tree, dict):
            return tree
        if "kernel_scale" in tree:
            kernel, scale = tree["kernel_t"], tree["kernel_scale"]
            # Note: inputs come last there, the dimensions that the scales do not have.
            order = *range(scale.ndim, kernel.ndim), *range(scale.ndim)
            return {"kernel": back(jnp.transpose(kernel, order), scale)}
        return {name: restored(value) for name, value in tree.items()}

    stood_for = restored(rounded)
    in_call, numbers = run(params, "int8"), run(stood_for)
    np.testing.assert_array_equal(in_call.ids, numbers.ids)
    np.testing.assert_allclose(in_call.per_token_logps, numbers.per_token_logps, rtol=1e-4, atol=1e-4)
    assert in_call.ids.shape == (BATCH, 8) and len(np.unique(in_call.ids)) > 4


def test_some_logits_are_those_of_all():
    params = setting()[0]
    hidden = jax.random.normal(jax.random.key(3), (2, 128))
    for given in (params, for_inference(MODEL.cfg, params, "int8")):
        apply = functools.partial(MODEL.apply, {"params": given}, hidden)
        np.testing.assert_allclose(apply(10, 7, method="some_logits"), apply(method="logits")[:, 10:17], rtol=1e-5)


def test_a_head_of_an_odd_vocabulary():
    cfg = dataclasses.replace(MODEL.cfg, vocab_size=MODEL.cfg.vocab_size - 3)
    params = {**setting()[0]}
    params["head"] = {"kernel": params["head"]["kernel"][:, :-3]}
    prepared = for_inference(cfg, params, "int8")
    assert prepared["head"]["kernel_t"].shape == (cfg.vocab_size, 128)
    hidden = jax.random.normal(jax.random.key(3), (2, 128))
    got = LanguageModel(cfg).apply({"params": prepared}, hidden, method="logits")
    np.testing.assert_allclose(got, hidden @ back(*to_8_bits(params["head"]["kernel"], 0)), rtol=1e-4, atol=1e-4)


def test_gradients_of_a_wide_product_are_those_of_a_narrow_one_that_is_cast():
    x, kernel = (jax.random.normal(jax.random.key(i), s, jnp.bfloat16) for i, s in enumerate(((3, 8), (8, 6))))
    layer = dense.Dense(6, dtype=jnp.bfloat16, out_dtype=jnp.float32)
    wide = lambda x, kernel: layer.apply({"params": {"kernel": kernel}}, x)
    out, pull = jax.vjp(wide, x, kernel)
    assert out.dtype == jnp.float32 and np.abs(out - (x @ kernel).astype(jnp.float32)).max() > 0
    cotangent = jax.random.normal(jax.random.key(2), out.shape)
    narrow = jax.vjp(lambda x, kernel: (x @ kernel).astype(jnp.float32), x, kernel)[1]
    for got, want in zip(pull(cotangent), narrow(cotangent)):
        np.testing.assert_array_equal(got, want)


def test_an_odd_number_of_outputs_in_16_bits():
    """Many rows are multiplied with a kernel that has even rows; results and gradients are those of few."""
    x, kernel = (jax.random.normal(jax.random.key(i), s, jnp.bfloat16) for i, s in enumerate(((256, 8), (8, 13))))
    layer = dense.Dense(13, dtype=jnp.bfloat16, out_dtype=jnp.float32)
    form = lambda x, kernel: layer.apply({"params": {"kernel": kernel}}, x)
    assert "pad" in str(jax.make_jaxpr(form)(x, kernel)) and "pad" not in str(jax.make_jaxpr(form)(x[:255], kernel))
    (out, pull), cotangent = jax.vjp(form, x, kernel), jax.random.normal(jax.random.key(2), (256, 13))
    np.testing.assert_allclose(out[:255], form(x[:255], kernel), rtol=1e-6)
    want = jax.vjp(lambda x, kernel: (x @ kernel).astype(jnp.float32), x, kernel)[1](cotangent)
    for got, other in zip(pull(cotangent), want):
        np.testing.assert_allclose(*(a.astype(jnp.float32) for a in (got, other)), rtol=1e-2, atol=1e-2)


def test_a_tied_head_is_no_kernel():
    cfg = MODEL.cfg.__class__(**{**vars(MODEL.cfg), "tie_embeddings": True})
    params = {name: value for name, value in setting()[0].items() if name != "head"}
    prepared = for_inference(cfg, params, "int8")
    assert set(prepared) == set(params)
    forward = jax.jit(lambda p: LanguageModel(cfg).apply({"params": p}, np.ones((1, 2), np.int32), method="forward"))
    logits = forward(prepared)
    assert np.isfinite(logits).all()


def test_an_unknown_type_is_refused():
    with pytest.raises(ConfigError, match="quantize: expected one of .*int8.*fp8.*, got 'int4'"):
        GenerateConfig(quantize="int4")
    values = main.load_config(str(ROOT / "configs/stage3.py:debug")).to_dict()
    for kind in ("fp8", "x"):
        values["grpo"]["generate"]["quantize"] = kind
        expected = contextlib.nullcontext() if kind == "fp8" else pytest.raises(ConfigError, match=WRONG)
        with expected:
            assert experiment.make_experiment(values).grpo.generate.quantize == kind


def test_forms_that_the_benchmark_times():
    """Each is the product; the one with rows of 8 bits to 2 %."""
    shape, x = int8_dot.SIZES["debug"], jax.random.normal(jax.random.key(4), (2, 128), jnp.bfloat16)
    for form, (kind, turned, _) in int8_dot.FORMS.items():
        [kernel] = int8_dot.make_kernels(kind, turned, shape, 1)
        assert int8_dot.difference(form, x, kernel) < (0.02 if form == "w8a8" else 0.005), form


def test_an_open_number_of_rows():
    """As an exported program has it, in which nothing can be compared with the number of rows."""
    kernel, scale = jnp.arange(12, dtype=jnp.int8).reshape(4, 3), jnp.full(4, 0.5)
    [rows] = export.symbolic_shape("b")
    call = jax.jit(lambda x: dense.quantized_dot(x, kernel, scale))
    exported = export.export(call, platforms=["cpu", "cuda"])(jax.ShapeDtypeStruct((rows, 3), jnp.float32))
    x = np.arange(15, dtype=np.float32).reshape(5, 3)
    np.testing.assert_allclose(jax.jit(exported.call)(x), x @ np.asarray(kernel).T * 0.5)
