"""Rules for the mask tokenizer: ALTo, official SAM and TiTok checkpoints (reference/NUMERICS.md §9)."""

import numpy as np

from alto_jax.tokenizer.alto import TokenizerConfig
from alto_jax.tokenizer.encoder import ViTConfig, latent_attn_mask
from alto_jax.tokenizer.pixel_decoder import PixelDecoderConfig
from alto_jax.tokenizer.sam_encoder import SamEncoderConfig

from .rules import MappingError, Rule, Table, constant, conv, dense, norm, reshaped


def _vit_rules(vit: ViTConfig, side: str) -> list[Rule]:
    """What mask encoder and decoder have in common; `side` is "encoder" or "decoder"."""
    width, heads = vit.embed_dim, (vit.num_heads, vit.embed_dim // vit.num_heads)
    block = [
        *norm("ln_1", "norm1", width),
        *norm("ln_2", "norm2", width),
        *dense("attn.in_proj", "attn/qkv", (width,), (3, *heads), names=("_weight", "_bias")),
        *dense("attn.out_proj", "attn/out", heads, (width,)),
        *dense("mlp.c_fc", "mlp/fc1", (width,), (vit.mlp_ratio * width,)),
        *dense("mlp.c_proj", "mlp/fc2", (vit.mlp_ratio * width,), (width,)),
    ]
    stacked = tuple(range(vit.num_layers))
    return [
        reshaped(f"{side}.class_embedding", f"{side}/class_embedding", (1, width), (width,)),
        *norm(f"{side}.ln_pre", f"{side}/ln_pre", width),
        *norm(f"{side}.ln_post", f"{side}/ln_post", width),
        *(rule.at(f"{side}.transformer.{{}}.", f"{side}/blocks/layers/", stacked) for rule in block),
    ]


def _positions(cfg: TokenizerConfig, vit: ViTConfig, side: str) -> list[Rule]:
    names = (("positional_embedding", "position_embedding", cfg.grid**2 + 1),
             ("latent_token_positional_embedding", "latent_position_embedding", cfg.num_latent_tokens))  # fmt: skip
    return [reshaped(f"{side}.{key}", f"{side}/{path}", (rows, vit.embed_dim)) for key, path, rows in names]


def encoder_rules(cfg: TokenizerConfig) -> list[Rule]:
    """Mask encoder with the latent tokens, without the length predictor and the attention-mask buffer."""
    width = cfg.encoder.embed_dim
    return [
        reshaped("latent_tokens", "latent_tokens", (cfg.num_latent_tokens, width)),
        *conv("encoder.patch_embed", "encoder/patch_embed", cfg.patch_size, 3, width),
        *_vit_rules(cfg.encoder, "encoder"),
        *_positions(cfg, cfg.encoder, "encoder"),
        *dense("encoder.conv_out", "encoder/conv_out", (width,), (cfg.token_size,), trailing=2),
    ]


def length_rules(cfg: TokenizerConfig) -> list[Rule]:
    """Token length predictor."""
    width = (cfg.encoder.embed_dim,)
    return [r for i in (1, 2, 3) for r in dense(f"encoder.length_encoder.fc{i}", f"length/fc{i}", width, width)]


def decoder_rules(cfg: TokenizerConfig) -> list[Rule]:
    """Mask de-tokenizer, without the projection of the image features."""
    width = cfg.decoder.embed_dim
    return [
        reshaped("decoder.mask_token", "decoder/mask_token", (1, 1, width), (width,)),
        *_vit_rules(cfg.decoder, "decoder"),
        *_positions(cfg, cfg.decoder, "decoder"),
        *dense("decoder.decoder_embed", "decoder/decoder_embed", (cfg.token_size,), (width,)),
        *dense("decoder.ffn.0", "decoder/ffn1", (width,), (2 * width,), trailing=2),
        *dense("decoder.ffn.2", "decoder/ffn2", (2 * width,), (cfg.pixel_decoder.z_channels,), trailing=2),
    ]


def image_feature_rules(cfg: TokenizerConfig) -> list[Rule]:
    """From the SAM encoder's output to the de-tokenizer, and the SAM encoder itself."""
    if cfg.sam is None:
        return []
    features, stride = cfg.sam.out_channels, cfg.sam.grid // cfg.grid
    return [
        *conv("decoder.spatial_mapper", "decoder/spatial_mapper", stride, features, features),
        *dense("decoder.vae_project.0", "decoder/vae_project", (features,), (cfg.decoder.embed_dim,)),
        *(rule.at("sam.image_encoder.", "sam_encoder/") for rule in sam_rules(cfg.sam)),
    ]


def pixel_decoder_rules(cfg: PixelDecoderConfig, with_conv_in_kernel: bool = True) -> list[Rule]:
    """Pixel decoder; `with_conv_in_kernel=False` leaves that kernel out (TiTok's has another shape)."""

    def res_block(key, path, inputs, outputs):
        rules = [
            *norm(f"{key}.norm1", f"{path}/norm1", inputs),
            *conv(f"{key}.conv1", f"{path}/conv1", 3, inputs, outputs, bias=False),
            *norm(f"{key}.norm2", f"{path}/norm2", outputs),
            *conv(f"{key}.conv2", f"{path}/conv2", 3, outputs, outputs, bias=False),
        ]
        if inputs != outputs:
            shortcut = outputs if cfg.legacy_shortcut else inputs
            rules += conv(f"{key}.nin_shortcut", f"{path}/nin_shortcut", 1, shortcut, outputs, bias=False)
        return rules

    channels = [cfg.hidden_channels * mult for mult in cfg.channel_mult]
    kernel, bias = conv("conv_in", "conv_in", 3, cfg.z_channels, channels[-1])
    rules = [kernel, bias] if with_conv_in_kernel else [bias]
    for i in range(cfg.num_res_blocks):
        rules += res_block(f"mid.{i}", f"mid_{i}", channels[-1], channels[-1])
    current = channels[-1]
    for level in reversed(range(len(channels))):
        for i in range(cfg.num_res_blocks):
            rules += res_block(f"up.{level}.block.{i}", f"up_{level}/block_{i}", current, channels[level])
            current = channels[level]
        if level > 0:
            rules += conv(f"up.{level}.upsample_conv", f"up_{level}/upsample_conv", 3, current, current)
    rules += norm("norm_out", "norm_out", current)
    rules += conv("conv_out", "conv_out", 3, current, cfg.out_channels * cfg.out_patch**2)
    return [rule.at("pixel_decoder.", "pixel_decoder/") for rule in rules]


def sam_rules(cfg: SamEncoderConfig) -> list[Rule]:
    """SAM image encoder; keys without prefix. Blocks go to one of two stacks."""
    width, head_dim = cfg.embed_dim, cfg.embed_dim // cfg.num_heads
    heads, mlp_dim = (cfg.num_heads, head_dim), cfg.mlp_ratio * cfg.embed_dim
    rules = [
        *conv("patch_embed.proj", "patch_embed", cfg.patch_size, 3, width),
        reshaped("pos_embed", "position_embedding", (1, cfg.grid, cfg.grid, width), (cfg.grid, cfg.grid, width)),
        *conv("neck.0", "neck_conv1", 1, width, cfg.out_channels, bias=False),
        *norm("neck.1", "neck_norm1", cfg.out_channels),
        *conv("neck.2", "neck_conv2", 3, cfg.out_channels, cfg.out_channels, bias=False),
        *norm("neck.3", "neck_norm2", cfg.out_channels),
    ]
    stacks = (
        ("window_blocks", cfg.window_attn_indexes, cfg.window_size),
        ("global_blocks", cfg.global_attn_indexes, cfg.grid),
    )
    for name, indexes, side in stacks:
        block = [
            *norm("norm1", "norm1", width),
            *dense("attn.qkv", "attn/qkv", (width,), (3, *heads)),
            *(reshaped(f"attn.rel_pos_{a}", f"attn/rel_pos_{a}", (2 * side - 1, head_dim)) for a in "hw"),
            *dense("attn.proj", "attn/out", heads, (width,)),
            *norm("norm2", "norm2", width),
            *dense("mlp.lin1", "mlp/fc1", (width,), (mlp_dim,)),
            *dense("mlp.lin2", "mlp/fc2", (mlp_dim,), (width,)),
        ]
        if indexes:
            rules += [rule.at("blocks.{}.", f"{name}/layers/", indexes) for rule in block]
    return rules


def cropped_codebook(cfg: TokenizerConfig) -> Rule:
    """The first codebook_size rows of a codebook that may have more."""
    size = (cfg.codebook_size, cfg.token_size)

    def crop(table):
        if len(table) < cfg.codebook_size:
            raise MappingError(
                f"quantize.embedding.weight: expected at least {cfg.codebook_size} rows, got {len(table)}"
            )
        return (table[: cfg.codebook_size],)

    source = ("quantize.embedding.weight", (None, cfg.token_size))
    return Rule((source,), (("quantizer/embedding", size),), crop, lambda table: (table,))


def alto_table(cfg: TokenizerConfig) -> Table:
    """An ALTo tokenizer checkpoint (`alto.pth`, or `mask_decoder.*` of ALToLLM)."""
    code = (cfg.token_size,)
    blocked = ~latent_attn_mask(1 + cfg.grid**2, cfg.num_latent_tokens)
    rules = [
        *encoder_rules(cfg),
        constant("encoder.attn_mask", np.asarray(blocked)),
        *length_rules(cfg),
        reshaped("quantize.embedding.weight", "quantizer/embedding", (cfg.codebook_size, *code)),
        *dense("quantize.embedding_proj", "quantizer/embedding_proj", code, code, bias=False),
        *decoder_rules(cfg),
        *image_feature_rules(cfg),
        *pixel_decoder_rules(cfg.pixel_decoder),
    ]
    ignored = [(r"sam\.pixel_(mean|std)", "constants of the preprocessing")]
    if cfg.sam is None:
        ignored.append((r"sam\..*|decoder\.(spatial_mapper|vae_project)\..*", "the configuration has no SAM encoder"))
    return Table(tuple(rules), tuple(ignored))


def sam_table(cfg: SamEncoderConfig) -> Table:
    """An official SAM checkpoint; only the image encoder is used."""
    ignored = (
        (r"(prompt_encoder|mask_decoder)\..*", "ALTo uses SAM's image encoder only"),
        (r"pixel_(mean|std)", "constants of the preprocessing"),
    )
    return Table(tuple(rule.at("image_encoder.") for rule in sam_rules(cfg)), ignored)


def titok_table(cfg: TokenizerConfig) -> Table:
    """A TiTok checkpoint, from which stage 1 starts; fills a part of the parameters."""
    rules = [
        *encoder_rules(cfg),
        cropped_codebook(cfg),
        *decoder_rules(cfg),
        *pixel_decoder_rules(cfg.pixel_decoder, with_conv_in_kernel=False),
    ]
    ignored = (
        (r"pixel_quantize\.embedding\.weight", "ALTo's pixel decoder has no codebook"),
        (r"pixel_decoder\.conv_in\.weight", "ALTo's takes z_channels inputs, TiTok's those of its pixel codebook"),
    )
    unfilled = (
        (r"length/.*", "TiTok has no length predictor"),
        (r"quantizer/embedding_proj/.*", "TiTok does not project its codebook"),
        (r"decoder/(spatial_mapper|vae_project)/.*|sam_encoder/.*", "TiTok has no image features"),
        (r"pixel_decoder/conv_in/kernel", "of another shape in TiTok"),
    )
    return Table(tuple(rules), ignored, unfilled)
