"""The analytic FLOP count against the products that JAX and XLA really compute."""

import dataclasses
import math
import types

from flax import traverse_util
import jax
import numpy as np
import pytest

from alto_jax.batch import ChatBatch, MaskBatch, PromptBatch, Rollout
from alto_jax.experiment import make_experiment
from alto_jax.main import load_config
from alto_jax.mllm.alto_llm import init_params
from alto_jax.mllm.language_model import LanguageModel, LanguageModelConfig
from alto_jax.mllm.text import SpecialIds
from alto_jax.parallel.devices import find_device
from alto_jax.params import merge_params, split_params
from alto_jax.stages import grpo, sft
from alto_jax.train import flops
from tests.conftest import ROOT


def experiment(stage, size="debug", **changes):
    """The configuration of a stage with changed groups."""
    plain = load_config(str(ROOT / "configs" / f"{stage}.py:{size}")).to_dict()
    for group, values in changes.items():
        plain[group].update(values)
    return make_experiment(plain)


def products(jaxpr) -> float:
    """Operations of all matrix products and convolutions of a traced function, loops multiplied out."""
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            out, left = equation.outvars[0].aval, equation.invars[0].aval
            total += 2.0 * out.size * math.prod(left.shape[i] for i in contracted)
        elif name == "conv_general_dilated":
            kernel, numbers = equation.invars[1].aval, params["dimension_numbers"]
            places = equation.outvars[0].aval.size // kernel.shape[numbers.rhs_spec[0]]
            total += 2.0 * places * kernel.size
        for value in params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += products(inner) * (params["length"] if name == "scan" else 1)
    return total


def specs(batch_class, **shapes):
    return batch_class(**{k: jax.ShapeDtypeStruct(shape, dtype) for k, (shape, dtype) in shapes.items()})


def mask_batch(config, rows):
    size = config.model.tokenizer
    return specs(
        MaskBatch,
        image=((rows, size.image_size, size.image_size, 3), np.uint8),
        mask=((rows, size.mask_size, size.mask_size), np.float32),
    )


def special_ids(config):
    """Ids of the special tokens at the end of the vocabulary."""
    names = ("pad", "bos", "im_start", "im_end", "img", "img_end", "img_context", "ref", "ref_end", "box", "box_end")
    codes = config.model.tokenizer.codebook_size
    first = config.model.language_model.vocab_size - codes
    ids = {name: i for i, name in enumerate(names)}
    return SpecialIds(**ids, mask_start=first - 2, mask_end=first - 1, code_0=first, num_codes=codes)


def chat_batch(config, rows):
    size, length, masks = config.model.tokenizer, config.data.max_length, config.data.max_masks
    side = config.model.vision.image_size
    return specs(
        ChatBatch,
        image=((rows, side, side, 3), np.uint8),
        pixel_image=((rows, size.image_size, size.image_size, 3), np.uint8),
        ids=((rows, length), np.int32),
        labels=((rows, length), np.int32),
        text_mask=((rows, length), bool),
        masks=((rows, masks, size.mask_size, size.mask_size), np.float32),
        mask_valid=((rows, masks), bool),
    )


def traced(config, loss_fn, batch, params, draw=None):
    """(products of the forward pass, of forward and backward pass) of a loss; `draw` as in Stage."""
    trained, frozen = jax.eval_shape(lambda p: split_params(p, config.optim.trainable), params)
    drawn = None
    if draw is not None:
        drawn = jax.eval_shape(lambda: draw(jax.random.key(0), config.train.batch_size))

    def loss(trained, frozen, batch, drawn):
        return loss_fn(merge_params(trained, frozen), batch, drawn, 0)[0]

    forward = jax.make_jaxpr(loss)(trained, frozen, batch, drawn)
    both = jax.make_jaxpr(jax.value_and_grad(loss))(trained, frozen, batch, drawn)
    # Dead code: the products whose result is not used, such as those of a loss that is only logged.
    live = lambda closed: jax.interpreters.partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))[0]
    return products(live(forward)), products(live(both))


def without_remat(value):
    """The configuration with every `remat` set to "none": recomputed products do not count."""
    if not dataclasses.is_dataclass(value):
        return value
    changes = {f.name: without_remat(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return dataclasses.replace(value, **changes | ({"remat": "none"} if "remat" in changes else {}))


@pytest.mark.parametrize("stage, size", [("stage1", "base"), ("stage1_5", "tiny"), ("stage1", "base_no_pixels")])
def test_tokenizer_stages(stage, size):
    from alto_jax.stages.tokenizer import make

    config = without_remat(experiment(stage, size))
    made = make(config, jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor")))
    params = jax.eval_shape(made.init, jax.random.key(0))
    forward, both = traced(config, made.loss_fn, mask_batch(config, config.train.batch_size), params, made.draw)
    counted = flops.step_flops(config)
    np.testing.assert_allclose(counted.forward, forward, rtol=0.005)
    np.testing.assert_allclose(counted.total, both, rtol=0.005)
    assert counted.rollout == 0


@pytest.mark.parametrize(
    "size, trainable", [("8b", "^(vision|projector|language_model)/"), ("tiny", "^language_model/.*/q/"), ("tiny", ".")]
)
def test_stage2(size, trainable):
    # Note: with a bound, so that no turns of longer answers are in the program.
    changes = {"sft": {"mask_loss_weight": 1.0, "max_supervised": 64}}
    changes |= {"data": {"max_masks": 2}, "optim": {"trainable": trainable}}
    config = without_remat(experiment("stage2", size, **changes))
    params = jax.eval_shape(lambda key: init_params(config.model, key), jax.random.key(0))
    loss_fn = sft.make_loss(config, special_ids(config))
    forward, both = traced(config, loss_fn, chat_batch(config, config.train.batch_size), params)
    counted = flops.step_flops(config)
    np.testing.assert_allclose(counted.forward, forward, rtol=0.01)
    np.testing.assert_allclose(counted.total, both, rtol=0.02)


def test_stage3():
    config = without_remat(experiment("stage3", "8b"))
    cfg, rows, length = config.model, config.train.batch_size, config.data.max_length
    params = jax.eval_shape(lambda key: init_params(cfg, key), jax.random.key(0))
    group, new, width = config.grpo.num_generations, config.grpo.generate.max_new_tokens, cfg.language_model.embed_dim
    side, pixels, mask = cfg.vision.image_size, cfg.tokenizer.image_size, cfg.tokenizer.mask_size
    prompt = specs(
        PromptBatch,
        image=((rows, side, side, 3), np.uint8),
        pixel_image=((rows, pixels, pixels, 3), np.uint8),
        prompt_ids=((rows, length), np.int32),
        prompt_mask=((rows, length), bool),
        mask=((rows, mask, mask), np.float32),
    )
    per_token = {name: ((rows, group, new), np.float32) for name in ("old_per_token_logps", "ref_per_token_logps")}
    batch = specs(
        Rollout,
        **per_token,
        completion_ids=((rows, group, new), np.int32),
        completion_mask=((rows, group, new), bool),
        advantages=((rows, group), np.float32),
        rewards=((rows, group), np.float32),
        image_tokens=((rows, cfg.num_image_tokens, width), np.float32),
        prompt=((), np.float32),
        components=((), np.float32),
    )
    batch = batch.replace(prompt=prompt, components={})
    special = special_ids(config)
    forward, both = traced(config, grpo.make_loss(config, special), batch, params)
    counted = flops.step_flops(config)
    np.testing.assert_allclose(counted.forward, forward, rtol=0.01)
    np.testing.assert_allclose(counted.total - counted.rollout, both, rtol=0.02)

    # The rollout of two tokens: the loop's body runs once, which is how often the tracer counts it.
    generate = dataclasses.replace(config.grpo.generate, max_new_tokens=2)
    config = dataclasses.replace(config, grpo=dataclasses.replace(config.grpo, generate=generate))
    given = {**params, "reference": params["language_model"]}
    roll = lambda params, batch, rng: grpo.rollout(config, special, params, batch, rng)
    traced_rollout = jax.make_jaxpr(roll)(given, prompt, jax.eval_shape(lambda: jax.random.key(0)))
    np.testing.assert_allclose(flops.step_flops(config).rollout, products(traced_rollout.jaxpr), rtol=0.02)


def test_language_model_against_xla():
    """XLA's own count of an unrolled model: more by the elementwise operations only."""
    cfg = LanguageModelConfig(vocab_size=1024, embed_dim=256, num_layers=3, num_heads=4, mlp_dim=1024, unroll=3)
    model, ids = LanguageModel(cfg), jax.ShapeDtypeStruct((4, 128), np.int32)
    params = jax.eval_shape(lambda ids: model.init(jax.random.key(0), ids, method="forward"), ids)
    lowered = jax.jit(lambda p, ids: model.apply(p, ids, method="forward")).lower(params, ids)
    sizes = {
        f"language_model/{p}": v.size
        for p, v in traverse_util.flatten_dict(params["params"], sep="/").items()
        if p.endswith("/kernel")
    }
    chain = [flops._language(types.SimpleNamespace(need_language_model=lambda: cfg), 128, 128 * 128), flops._head(128)]
    counted = 4 * flops._Counter(sizes, "$^").forward(chain)
    xla = lowered.cost_analysis()["flops"]
    assert counted < xla < 1.05 * counted


def test_peaks():
    assert find_device("cpu") is None
    kinds = {
        "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H200": 989e12,
        "NVIDIA A100-SXM4-80GB": 312e12, "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5": 459e12,
        "TPU v5p": 459e12, "TPU v6 lite": 918e12,
    }  # fmt: skip
    assert {kind: find_device(kind).flops for kind in kinds} == kinds
