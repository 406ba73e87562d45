"""Losses and gradients of the stages, and answers of the whole model, against the reference."""

import dataclasses
import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from alto_jax.batch import ChatBatch, MaskBatch, PromptBatch, Rollout
from alto_jax.experiment import ExperimentConfig, GrpoStageConfig, SftStageConfig, TokenizerStageConfig
from alto_jax.losses import grpo as grpo_losses
from alto_jax.losses import tokens as token_losses
from alto_jax.mllm import mask_tokens
from alto_jax.mllm.alto_llm import ALToLLM
from alto_jax.mllm.language_model import for_inference
from alto_jax.parallel import sharding
from alto_jax.stages import grpo, sft, tokenizer
from alto_jax.tokenizer.alto import ALTo
from tests.golden_io import golden
from tests.golden_models import ALTO_CONFIG, ALTOLLM_CONFIG, SPECIAL, alto_params, altollm_params, assert_golden
from tools.convert_torch_weights.mapping import export_params


def apply(*args, method):
    return ALToLLM(ALTOLLM_CONFIG).apply({"params": altollm_params()}, *args, method=method)


def assert_norms(gradients, fixture, tag, rtol):
    """Compares the norm of every gradient (under the reference's names) with the fixture's, NaN: no gradient there."""
    expected = dict(zip(fixture["grad_norms_keys"], fixture[f"grad_norms_{tag}"]))
    known = [key for key, norm in expected.items() if np.isfinite(norm)]
    norms = [np.linalg.norm(gradients[key].astype(np.float64)) for key in known]
    np.testing.assert_allclose(norms, [expected[key] for key in known], rtol=rtol)
    assert known


@pytest.mark.parametrize(
    ("stage", "trained_names"), [("stage1", ("encoder", "quantizer", "decoder")), ("stage1_5", ("length",))]
)
def test_tokenizer_stages(stage, trained_names):
    """Stage 1 with the fixture's random lengths; stage 1.5 through the straight-through chunking."""
    fixture = golden("alto_train")
    images = [np.asarray(Image.open(io.BytesIO(fixture[f"image{i}_webp"].tobytes()))) for i in range(4)]
    batch = MaskBatch(image=np.stack(images), mask=fixture["mask"])
    drawn = {"kept": jnp.asarray(fixture["stage1_sampled_index"] + 1)}
    config = ExperimentConfig(
        stage=stage,
        model=dataclasses.replace(ALTOLLM_CONFIG, vision=None, language_model=None),
        tokenizer=TokenizerStageConfig(keep_tokens="random" if stage == "stage1" else "adaptive", commitment_cost=0.01),
    )
    loss_fn = tokenizer.make(config, sharding.make_mesh(sharding.MeshConfig())).loss_fn
    params = alto_params()
    trained = {name: params[name] for name in trained_names}

    # Note: what is given as arguments is not computed with while compiling.
    def loss(trained, params, batch, drawn):
        return loss_fn({"tokenizer": {**params, **trained}}, batch, drawn, 0)

    (total, (terms, _)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(trained, params, batch, drawn)
    assert_golden("alto_train", f"{stage}_total", total, fixture[f"{stage}_total"])
    names = {"edge_weighted_mse": "reconstruction"}
    for ours in ("mse", "edge", "edge_weighted_mse", "quantizer", "commitment", "codebook", "length"):
        key = f"{stage}_loss_{names.get(ours, ours)}_loss"
        assert_golden("alto_train", key, terms[ours], fixture[key])
    grads = {**jax.tree.map(np.zeros_like, params), **jax.tree.map(np.asarray, grads)}
    grads = export_params("alto", grads, ALTO_CONFIG)
    for key in fixture:
        if key.startswith(f"{stage}_grad_"):
            assert_golden("alto_train", key, grads[key.removeprefix(f"{stage}_grad_")], fixture[key])
    assert_norms(grads, fixture, stage, rtol=1e-4)


def test_fine_tuning():
    """The stage-2 loss in the reference's form, with and without the mask loss, and all its gradients."""
    fixture = golden("altollm")
    masks = np.roll(fixture["target_masks"], 1, axis=0)
    batch = ChatBatch(
        image=fixture["image"], pixel_image=np.zeros((3, 256, 256, 3), np.uint8), ids=fixture["sft_input_ids"],
        labels=fixture["sft_labels"], text_mask=fixture["sft_attention_mask"], masks=masks[:, None],
        mask_valid=np.ones((3, 1), bool),
    )  # fmt: skip
    mask_loss = token_losses.MaskLossConfig(dice_reduction="batch", probability_clamp=1e-6)
    config = ExperimentConfig(stage="stage2", model=ALTOLLM_CONFIG, sft=SftStageConfig(mask_loss=mask_loss))
    loss_fn = sft.make_loss(config, SPECIAL)
    # The tokenizer is frozen: its gradients are not in the fixture, and cost most.
    params = altollm_params()
    trained = {name: params[name] for name in ("vision", "projector", "language_model")}
    frozen = {"tokenizer": params["tokenizer"]}
    run = jax.jit(jax.value_and_grad(lambda p, f, batch: loss_fn({**p, **f}, batch, None, 0), has_aux=True))
    (loss, (logged, _)), grads = run(trained, frozen, batch)
    assert_golden("altollm", "sft_loss_maskw0", logged["token_loss"], fixture["sft_loss_maskw0"])
    assert_golden("altollm", "sft_loss_maskw1", loss, fixture["sft_loss_maskw1"])
    grads = export_params("internvl-internlm2", jax.tree.map(np.asarray, grads), ALTOLLM_CONFIG)
    assert_norms(grads, fixture, "maskw1", rtol=2e-5)
    used = golden("altollm_llm_weights")["embedded_ids"][::8]
    for key, name, rows in (
        ("sft_grad_tok_embeddings", "language_model.model.tok_embeddings.weight", used),
        ("sft_grad_output", "language_model.output.weight", np.s_[::32]),
        ("sft_grad_mlp1_1", "mlp1.1.weight", np.s_[::4]),
        ("sft_grad_vit_cls", "vision_model.embeddings.class_embedding", ...),
    ):
        assert_golden("altollm", key, grads[name][rows], fixture[key])


def test_replaced_ids_logits_and_weighted_cross_entropy():
    fixture = golden("altollm")
    masks = np.roll(fixture["target_masks"], 1, axis=0)

    @jax.jit
    def replace(masks):
        codes, length = ALTo(ALTO_CONFIG).apply({"params": alto_params()}, masks, method="tokenize")
        return mask_tokens.replace_mask_tokens(
            fixture["sft_input_ids"], fixture["sft_labels"], codes[:, None], length[:, None], jnp.ones((3, 1), bool),
            SPECIAL, text_mask=fixture["sft_attention_mask"],
        )  # fmt: skip

    new_ids, new_labels, _ = replace(masks)
    np.testing.assert_array_equal(new_ids, fixture["sft_replaced_ids"])
    np.testing.assert_array_equal(new_labels, fixture["sft_replaced_labels"])

    @jax.jit
    def logits_and_weighted_loss(ids):
        image_tokens = apply(fixture["image"], method="image_tokens")
        inputs = apply(ids, image_tokens, SPECIAL.img_context, method="embed")
        hidden, _ = apply(inputs, jnp.broadcast_to(jnp.arange(240), (3, 240)), None, method="hidden")
        logits_fn = lambda h: apply(h, method="logits")
        loss, _ = token_losses.token_cross_entropy(
            hidden, fixture["sft_labels"], logits_fn, loss_weight=fixture["sft_loss_weight"]
        )
        return logits_fn(hidden[:, 180:224:8])[..., ::16], loss, image_tokens

    assert_golden("altollm", "sft_logits", logits_and_weighted_loss(new_ids)[0], fixture["sft_logits"])
    _, loss, image_tokens = logits_and_weighted_loss(fixture["sft_input_ids"])
    assert_golden("altollm", "vit_features", image_tokens, fixture["vit_features"])
    assert_golden("altollm", "sft_loss_weighted", loss, fixture["sft_loss_weighted"])


def test_kernels_of_8_bits_change_few_codes():
    """The likeliest codes at each place of the recorded conversations, and the masks that they draw, as of the weights
    themselves: all the same with int8, nine of ten with fp8."""
    fixture, params = golden("altollm"), altollm_params()["language_model"]
    ids = fixture["sft_replaced_ids"]

    @jax.jit
    def likeliest(language_model):
        policy = {**altollm_params(), "language_model": language_model}
        run = lambda *args, method: ALToLLM(ALTOLLM_CONFIG).apply({"params": policy}, *args, method=method)
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        hidden, _ = run(run(ids, method="embed_text"), positions, None, method="hidden")
        return jnp.argmax(run(hidden[:, 180:212], SPECIAL, method="code_logits"), axis=-1)

    @jax.jit
    def drawn_by(codes):
        given = codes, jnp.full(len(ids), 32), None
        return ALTo(ALTO_CONFIG).apply({"params": alto_params()}, *given, method="decode_codes") > 0

    def answer(language_model):
        codes = likeliest(language_model)
        return codes, drawn_by(codes)

    rounded_params = jax.jit(functools.partial(for_inference, ALTOLLM_CONFIG.language_model), static_argnums=1)
    codes, masks = map(np.asarray, answer(params))
    for kind, most_changed, least_iou in (("int8", 0.02, 0.95), ("fp8", 0.3, 0.3)):
        rounded, drawn = map(np.asarray, answer(rounded_params(params, kind)))
        iou = (masks & drawn).sum((1, 2)) / (masks | drawn).sum((1, 2))
        print(kind, np.mean(codes != rounded), iou)
        assert np.mean(codes != rounded) <= most_changed and iou.mean() >= least_iou and len(np.unique(codes)) > 10


def test_mask_loss_through_the_decoder():
    fixture, images = golden("mask_loss_probs"), golden("altollm")
    features = jax.jit(lambda image: apply(image, None, method="image_features"))(images["image"])
    config = token_losses.MaskLossConfig(dice_reduction="batch", probability_clamp=1e-6)

    def loss(code_logits, valid):
        probs = token_losses.mask_token_probabilities(code_logits, fixture["lengths"])
        logits = ALTo(ALTO_CONFIG).apply({"params": alto_params()}, probs, features, method="decode_probs")
        return token_losses.mask_loss(logits, images["target_masks"], valid, config)[0]

    run = jax.jit(jax.value_and_grad(loss))
    value, grad = run(fixture["code_logits"], fixture["valid"])
    assert_golden("mask_loss", "loss", value, fixture["loss"])
    assert_golden("mask_loss", "grad_codebook_part", grad[:2, :, ::16], fixture["grad_codebook_part"])
    assert not np.any(grad[2])
    none_valid, _ = run(fixture["code_logits"], np.zeros(3, bool))
    assert_golden("mask_loss", "loss_no_valid", none_valid, fixture["loss_no_valid"])


def test_grpo_log_probabilities_and_gradient():
    """The packed group gives the reference's log-probabilities; its objective their loss and gradient."""
    fixture = golden("grpo")
    batch = PromptBatch(
        image=golden("altollm")["image"][:1], pixel_image=np.zeros((1, 256, 256, 3), np.uint8),
        prompt_ids=fixture["prompt_ids"], prompt_mask=np.ones(fixture["prompt_ids"].shape, bool),
        mask=fixture["target_mask"],
    )  # fmt: skip
    params, ids = altollm_params(), fixture["completion_ids"][None]
    image_tokens = jax.jit(lambda image: apply(image, method="image_tokens"))(batch.image)
    config = GrpoStageConfig(loss=grpo_losses.GrpoLossConfig(objective="reference", beta=1e-3))
    rollout = Rollout(
        prompt=batch, completion_ids=ids, completion_mask=np.ones(ids.shape, bool), old_per_token_logps=None,
        ref_per_token_logps=fixture["ref_logps"][None], advantages=fixture["advantages"][None],
        rewards=fixture["rewards"][None], components={}, image_tokens=image_tokens,
    )  # fmt: skip
    loss_fn = grpo.make_loss(ExperimentConfig(stage="stage3", model=ALTOLLM_CONFIG, grpo=config), SPECIAL)

    @jax.jit
    def run(language_model):
        loss_of = lambda p: loss_fn({**params, "language_model": p}, rollout, None, 0)[0]
        policy = {**params, "language_model": language_model}
        logps, _ = grpo.completion_logps(ALTOLLM_CONFIG, policy, SPECIAL, batch, image_tokens, ids)
        return logps, *jax.value_and_grad(loss_of)(language_model)

    logps, loss, grads = run(params["language_model"])
    assert_golden("grpo", "logps", logps[0], fixture["logps"])
    assert_golden("grpo", "loss", loss, fixture["loss"])
    head = np.asarray(grads["head"]["kernel"]).T[::32]
    assert_golden("grpo", "grad_output_weight", head, fixture["grad_output_weight"])
