"""Mask tokenizer against the reference: encode, quantise, length, decode, with gradients (NUMERICS.md §1-3)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alto_jax.losses.reconstruction import length_loss, vq_loss
from alto_jax.tokenizer.alto import ALTo
from alto_jax.tokenizer.length import LengthPredictor
from alto_jax.tokenizer.quantizer import VectorQuantizer, l2_normalize
from tests.golden_io import golden
from tests.golden_models import ALTO_CONFIG, alto_params, assert_golden, encode_masks, golden_weights, nhwc


def call(method, *args):
    return ALTo(ALTO_CONFIG).apply({"params": alto_params()}, *args, method=method)


def tokens(array):
    """The reference's [N, D, 1, L] → [B, L, D]."""
    return array[:, :, 0].swapaxes(1, 2)


@pytest.fixture(scope="module")
def encoded():
    """What the encoder gives for the fixture's input, whose three channels differ (a mask is repeated to three)."""
    return jax.jit(lambda x: call("encode", x))(nhwc(golden("mt_encode")["x"]))


def test_encoder_matches_reference(encoded):
    fixture = golden("mt_encode")
    assert_golden("mt_encode", "latents_ln_post", encoded.latents, fixture["latents_ln_post"])
    assert_golden("mt_encode", "cls_ln_post", encoded.cls, fixture["cls_ln_post"])
    assert_golden("mt_encode", "z", encoded.z, tokens(fixture["z"]))


def test_codes_and_lengths_match_reference(encoded):
    fixture = golden("mt_encode")
    quantized = call("quantize", encoded.z)
    length = call("predict_length", encoded)
    np.testing.assert_array_equal(quantized.codes, fixture["indices"][:, 0])
    assert_golden("mt_encode", "tlp_probs", length.probs, fixture["tlp_probs"])
    assert_golden("mt_encode", "tlp_expectation", length.expectation, fixture["tlp_expectation"])
    assert_golden("mt_encode", "train_keep_probs", length.keep, fixture["train_keep_probs"])
    np.testing.assert_array_equal(length.num_kept, fixture["train_lengths_to_keep"])
    np.testing.assert_array_equal(length.length, fixture["infer_length_indices"])
    kept = quantized.embeddings * length.keep[..., None]
    assert_golden("mt_encode", "z_quantized_times_keep", kept, tokens(fixture["z_quantized_times_keep"]))


@pytest.mark.parametrize("legacy", [True, False])
def test_encoder_of_other_sizes_with_and_without_the_legacy_reshape(legacy):
    name, fixture = "mt_alt", golden("mt_alt")
    sizes = {"latents": 8, "token": 6, "patch": 8, "crop": 32, "width": 64, "layers": 2, "heads": 4}
    z, length = encode_masks(sizes, golden_weights(name), fixture["latent_tokens"], fixture["x"], legacy)
    key = f"z_legacy{int(legacy)}"
    assert_golden(name, key, z, fixture[key])
    if legacy:
        assert_golden(name, "keep", length.keep, fixture["keep"])
        np.testing.assert_array_equal(length.num_kept, fixture["lengths_to_keep"])


@pytest.mark.parametrize("use_l2_norm", [True, False])
def test_quantizer_losses_and_straight_through_gradients(use_l2_norm):
    fixture, tag = golden("quantizer"), f"l2{int(use_l2_norm)}_"
    module = VectorQuantizer(64, 6, use_l2_norm=use_l2_norm)
    params = {
        "embedding": fixture["embedding.weight"],
        "embedding_proj": {"kernel": fixture["embedding_proj.weight"].T},
    }
    z, weight = tokens(fixture["z"]), tokens(fixture["w"])

    @jax.jit
    def everything(params, z):
        def loss(params, z):
            out = module.apply({"params": params}, z)
            total, parts = vq_loss(out.z, out.entries, 0.01)
            return total, (out, parts)

        def weighted_sum(z):
            return jnp.sum(module.apply({"params": params}, z).embeddings * weight)

        (total, (out, parts)), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, z)
        return total, parts, out, grads, jax.grad(weighted_sum)(z)

    total, parts, out, (grads, grad_z), grad_sum = everything(params, z)
    np.testing.assert_array_equal(out.codes, fixture[tag + "indices"][:, 0])
    for key, actual, expected in (
        ("z_quantized", out.embeddings, tokens(fixture[tag + "z_quantized"])),
        ("loss", total, fixture[tag + "loss"]),
        ("commitment", parts["commitment"], fixture[tag + "commitment"]),
        ("codebook_loss", parts["codebook"], fixture[tag + "codebook_loss"]),
        ("grad_loss_z", grad_z, tokens(fixture[tag + "grad_loss_z"])),
        ("grad_loss_embedding", grads["embedding"], fixture[tag + "grad_loss_embedding"]),
        ("grad_loss_proj", grads["embedding_proj"]["kernel"].T, fixture[tag + "grad_loss_proj"]),
        ("grad_sum_zq_w_z", grad_sum, tokens(fixture[tag + "grad_sum_zq_w_z"])),
    ):
        assert_golden("quantizer", tag + key, actual, expected)

    def apply(*args, method):
        return module.apply({"params": params}, *args, method=method)

    assert_golden("quantizer", tag + "codebook_weight", apply(method="codebook"), fixture[tag + "codebook_weight"])
    hard = apply(fixture["entry_idx"], method="lookup")
    assert_golden("quantizer", tag + "entry_hard", hard, fixture[tag + "entry_hard"])
    mixture = apply(fixture["soft"], False, method="soft_lookup")
    mixture = l2_normalize(mixture) if use_l2_norm else mixture
    assert_golden("quantizer", tag + "entry_soft", mixture, fixture[tag + "entry_soft"])


@pytest.mark.parametrize("tag", ["soft", "mid", "sharp"])
def test_length_predictor_and_its_straight_through_gradient(tag):
    """The gradient that reaches the predictor from kept tokens alone, and with the length loss."""
    fixture = golden("tlp")
    weights = [fixture.get(f"{tag}.fc{i}.weight", fixture.get(f"fc{i}.weight")) for i in (1, 2, 3)]
    params = {f"fc{i}": {"kernel": weights[i - 1].T, "bias": fixture[f"fc{i}.bias"]} for i in (1, 2, 3)}

    @jax.jit
    def grad(params, x, q, length_weight):
        def loss(params, x, q):
            out = LengthPredictor(64).apply({"params": params}, x, q)
            return jnp.sum(out.keep * fixture["w"]) + length_weight * length_loss(
                out.expectation, out.keep.shape[-1]
            ), out

        return jax.grad(loss, (0, 1, 2), has_aux=True)(params, x, q)

    (grads, grad_x, grad_q), out = grad(params, fixture["x"], fixture["q"], 0.01)
    assert_golden("tlp", f"{tag}_total_grad_x", grad_x[:, ::4], fixture[f"{tag}_total_grad_x"])
    actuals = {"probs": out.probs, "expectation": out.expectation, "keep": out.keep}
    actuals["length_loss"] = length_loss(out.expectation, out.keep.shape[-1])
    # An expectation within rounding of an integer may fall on either side of it.
    clear = np.abs(out.expectation - np.round(out.expectation)) > 1e-4
    for key, actual in {**actuals, "total_grad_q": grad_q}.items():
        rows = clear if key == "keep" else ...
        key = f"{tag}_{key}"
        assert_golden("tlp", key, np.asarray(actual)[rows], fixture[key][rows])
    np.testing.assert_array_equal(out.num_kept[clear], fixture[f"{tag}_lengths_to_keep"][clear])
    np.testing.assert_array_equal(out.length[clear], fixture[f"{tag}_infer_hard"][clear])
    assert clear.sum() >= 3

    (kept_grads, _, kept_grad_q), _ = grad(params, fixture["x"], fixture["q"], 0.0)
    assert_golden("tlp", f"{tag}_keeponly_grad_q", kept_grad_q, fixture[f"{tag}_keeponly_grad_q"])
    for part, found in (("total", grads), ("keeponly", kept_grads)):
        for i in (1, 2, 3):
            key = f"{tag}_{part}_grad_fc{i}"
            assert_golden("tlp", f"{key}.bias", found[f"fc{i}"]["bias"], fixture[f"{key}.bias"])
            assert_golden("tlp", f"{key}.weight", found[f"fc{i}"]["kernel"].T[::8], fixture[f"{key}.weight"])


@pytest.fixture(scope="module")
def decode():
    return jax.jit(lambda embeddings, features: call("decode", embeddings, features))


def test_decoder_matches_reference(decode):
    fixture = golden("md_decode")
    embeddings, features = tokens(fixture["z_quantized"]), nhwc(fixture["image_embedding"])
    logits = decode(embeddings, features)
    assert_golden("md_decode", "masks_logits", logits, fixture["masks_logits"][:, 0])
    assert_golden(
        "md_decode", "masks_no_image", jax.nn.sigmoid(decode(embeddings, None)), fixture["masks_no_image"][:, 0]
    )


def test_missing_tokens_are_not_zero_codes(decode):
    fixture = golden("md_decode")
    embeddings, features = tokens(fixture["z_quantized"]), nhwc(fixture["image_embedding"])
    missing = decode(embeddings[:, :10], features)
    assert_golden("md_decode", "masks_first10_tokens", jax.nn.sigmoid(missing), fixture["masks_first10_tokens"][:, 0])
    zeroed = embeddings * (np.arange(embeddings.shape[1]) < 10)[:, None]
    assert np.abs(decode(zeroed, features) - missing).max() > 0.1


def test_decoding_codes_and_probabilities(decode):
    """One-hot, soft and not normalised rows; the look-up is checked through the masks it leads to."""
    fixture = golden("decode_prob")
    features, num = nhwc(fixture["image_embedding"]), int(fixture["lengths"][0])
    codes, masks = fixture["ids"], ALTo(ALTO_CONFIG)
    onehot = jax.nn.one_hot(codes, ALTO_CONFIG.codebook_size) * (np.arange(codes.shape[1]) < num)[:, None]
    soft = jax.nn.softmax(3 * jnp.asarray(fixture["soft_logits_x3"]), axis=-1)
    soft = jnp.pad(soft, ((0, 0), (0, codes.shape[1] - soft.shape[1]), (0, 0)))

    def lookup(probs, normalize):
        return masks.apply(
            {"params": alto_params()}, probs, normalize, method=lambda m, *a: m.quantizer.soft_lookup(*a)
        )

    for key, probs, normalize in (("onehot", onehot, True), ("soft", soft, True), ("soft_no_norm", soft, False)):
        mask = jax.nn.sigmoid(decode(lookup(probs, normalize), features))
        assert_golden("decode_prob", f"mask_{key}", mask, fixture[f"mask_{key}"][:, 0])
    for method, arguments in (("decode_codes", (codes, fixture["lengths"])), ("decode_probs", (onehot,))):
        mask = jax.nn.sigmoid(jax.jit(lambda *a, method=method: call(method, *a))(*arguments, features))
        assert_golden("decode_prob", "mask_onehot", mask, fixture["mask_onehot"][:, 0])
