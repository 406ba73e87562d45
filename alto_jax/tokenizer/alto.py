"""The ALTo mask tokenizer as four calls: encode, quantize, predict_length, decode (with image_features).

mask ─ encode ─► z, latents, cls ─ quantize ─► codes, embeddings ┐
                       └─ predict_length ─► how many to keep ────┤
image ─ image_features ──────────────────────────────────────────┴─ decode ─► mask logits
"""

import dataclasses
from typing import Any, Literal, cast

from flax import linen as nn
import jax
import jax.numpy as jnp

from alto_jax import layers
from alto_jax.config import require
from alto_jax.tokenizer.decoder import MaskDecoder
from alto_jax.tokenizer.encoder import Encoded, MaskEncoder, ViTConfig
from alto_jax.tokenizer.length import LengthPrediction, LengthPredictor, leading_tokens
from alto_jax.tokenizer.pixel_decoder import PixelDecoder, PixelDecoderConfig
from alto_jax.tokenizer.quantizer import Quantized, VectorQuantizer
from alto_jax.tokenizer.sam_encoder import SamEncoder, SamEncoderConfig, sam_preprocess

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Sizes and switches of the mask tokenizer; the defaults are the paper's (TiTok-L-32 with SAM-ViT-L).

    `sam=None` builds a tokenizer without image features. The `Compat:` switches of the sub-modules
    (`legacy_reshape`, `length_logit_scale`, `length_gate`, `length_rule`) default to what the published
    weights need; configs that train from scratch set the corrected values.
    """

    mask_size: int = 256
    patch_size: int = 16
    num_latent_tokens: int = 32
    codebook_size: int = 1024
    token_size: int = 12
    encoder: ViTConfig = ViTConfig()
    decoder: ViTConfig = ViTConfig()
    sam: SamEncoderConfig | None = SamEncoderConfig()
    pixel_decoder: PixelDecoderConfig = PixelDecoderConfig()
    legacy_reshape: bool = True
    length_logit_scale: Literal["multiply", "divide"] = "multiply"
    length_gate: Literal["sigmoid", "silu"] = "sigmoid"
    length_rule: Literal["reference", "unified"] = "reference"
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: Literal["none", "full", "dots"] = "none"
    attention: Literal["auto", "xla", "flash"] = "auto"

    def __post_init__(self) -> None:
        require(self.patch_size >= 1, "patch_size", self.patch_size, "at least 1")
        require(
            self.mask_size >= self.patch_size and self.mask_size % self.patch_size == 0,
            "mask_size",
            self.mask_size,
            f"a multiple of patch_size {self.patch_size}",
        )
        for name in ("num_latent_tokens", "codebook_size", "token_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        if self.sam is not None:
            side = self.sam.image_size // self.sam.patch_size
            require(
                side % self.grid == 0,
                "sam.image_size",
                self.sam.image_size,
                f"a SAM grid that is a multiple of {self.grid}",
            )
        pixels = self.grid * self.pixel_decoder.upscale
        require(pixels == self.mask_size, "pixel_decoder.channel_mult", self.pixel_decoder.channel_mult,
                f"an output of {self.mask_size} pixels (it gives {pixels})")  # fmt: skip

    @property
    def grid(self) -> int:
        """g: patches along a side of the mask."""
        return self.mask_size // self.patch_size

    @property
    def image_size(self) -> int:
        """S: pixels along a side of the image for the SAM encoder (the mask's size if there is none)."""
        return self.sam.image_size if self.sam else self.mask_size


class ALTo(layers.Module):
    """The tokenizer; call its methods with `module.apply({"params": p}, ..., method="encode")`."""

    cfg: TokenizerConfig

    def setup(self) -> None:
        cfg = self.cfg
        types: dict[str, Any] = {"dtype": jnp.dtype(cfg.dtype), "param_dtype": jnp.dtype(cfg.param_dtype)}
        width = cfg.encoder.embed_dim
        self.latent_tokens = self.param(
            "latent_tokens", nn.initializers.normal(width**-0.5), (cfg.num_latent_tokens, width), types["param_dtype"]
        )
        self.encoder = MaskEncoder(
            cfg.encoder, cfg.mask_size, cfg.patch_size, cfg.num_latent_tokens, cfg.token_size, cfg.legacy_reshape,
            cfg.remat, cfg.attention, **types,
        )  # fmt: skip
        self.quantizer = VectorQuantizer(cfg.codebook_size, cfg.token_size, param_dtype=types["param_dtype"])
        self.length = LengthPredictor(
            width, cfg.length_logit_scale, cfg.length_gate, cfg.length_rule, param_dtype=types["param_dtype"]
        )
        stride = cfg.sam.image_size // cfg.sam.patch_size // cfg.grid if cfg.sam else 1
        self.decoder = MaskDecoder(
            cfg.decoder, cfg.grid, cfg.num_latent_tokens, stride, cfg.pixel_decoder.z_channels, cfg.remat,
            cfg.attention, **types,
        )  # fmt: skip
        self.pixel_decoder = PixelDecoder(cfg.pixel_decoder)
        if cfg.sam is not None:
            self.sam_encoder = SamEncoder(cfg.sam)

    def encode(self, mask: Array) -> Encoded:
        """mask float[B, H, W] in 0..1 → z [B, L, D] with latents and cls for the length predictor."""
        return self.encoder(mask, self.latent_tokens)

    def quantize(self, z: Array) -> Quantized:
        """z [B, L, D] → codes int32[B, L], straight-through embeddings."""
        return self.quantizer(z)

    def predict_length(self, encoded: Encoded) -> LengthPrediction:
        """How many leading tokens each mask needs."""
        return self.length(encoded.latents, encoded.cls)

    def tokenize(self, mask: Array) -> tuple[Array, Array]:
        """mask float[B, H, W] → (codes int32[B, L], length int32[B]), without gradients in mind."""
        encoded = self.encode(mask)
        return self.quantize(encoded.z).codes, self.predict_length(encoded).length

    def image_features(self, image: Array) -> Array | None:
        """image uint8 or float[B, S, S, 3], RGB in 0..255 → float[B, s*g, s*g, F]; None without a SAM encoder."""
        if self.cfg.sam is None:
            return None
        return cast(Array, self.sam_encoder(sam_preprocess(image.astype(jnp.float32), self.cfg.sam.image_size)))

    def decode(self, embeddings: Array, features: Array | None) -> Array:
        """Token embeddings [B, w, D] (zero rows: not kept) and image features → mask logits float32[B, H, W]."""
        pixels = cast(Array, self.pixel_decoder(self.decoder(embeddings, features)))
        return (jnp.mean(pixels.astype(jnp.float32), axis=-1) * 2.0 - 1.0) * 6.0

    def decode_codes(self, codes: Array, length: Array, features: Array | None) -> Array:
        """codes int32[B, L], length int32[B] (tokens after it are ignored) → mask logits float32[B, H, W]."""
        keep = leading_tokens(length, codes.shape[-1])
        embeddings = self.quantizer.lookup(jnp.clip(codes, 0, self.cfg.codebook_size - 1))
        return self.decode(embeddings * keep[..., None], features)

    def decode_probs(self, probs: Array, features: Array | None, normalize: bool = True) -> Array:
        """Code probabilities [B, w, C] (or one-hot, zero rows: not kept) → mask logits float32[B, H, W]."""
        return self.decode(self.quantizer.soft_lookup(probs, normalize), features)

    def __call__(self, mask: Array, image: Array) -> Array:
        """Touches every parameter (for initialisation): mask [B, H, W], image [B, S, S, 3] → logits."""
        encoded = self.encode(mask)
        keep = self.predict_length(encoded).keep
        return self.decode(self.quantize(encoded.z).embeddings * keep[..., None], self.image_features(image))
