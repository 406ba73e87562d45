"""Source against converted weights: the same random inputs through PyTorch and through our modules.

Layer by layer, each side on its own results, in float32; one layer is in memory at a time. The PyTorch side
is independent of the reference's code (`torch_reference`). Prints the maximum error of every layer, and for
the language model the KL divergence of the next-token distributions.
"""

from collections.abc import Iterator
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from alto_jax import layers
from alto_jax.checkpoint import rows
from alto_jax.mllm.intern_vit import InternViT
from alto_jax.mllm.language_model import DecoderBlock, LanguageModel, ntk_inv_freq
from alto_jax.tokenizer.encoder import latent_attn_mask
from alto_jax.tokenizer.sam_encoder import SamBlock, SamEncoder

from . import plans, rules

TOLERANCE = 2e-4  # of the largest value; float32 noise of deep models is about a tenth of it
_LENGTH = 16


class _Params:
    """Our parameters as float32, nested, all of a prefix or one row of its stack."""

    def __init__(self, out: Path):
        self._arrays = rows.open_params(out)

    def tree(self, prefix: str, row: int | None = None) -> dict[str, Any]:
        found = {p.removeprefix(prefix): a for p, a in self._arrays.items() if p.startswith(prefix)}
        return rules.unflatten(
            {p: np.asarray(a if row is None else a[row]).astype(np.float32) for p, a in found.items()}
        )

    def array(self, path: str) -> np.ndarray:
        return np.asarray(self._arrays[path]).astype(np.float32)


@dataclasses.dataclass
class _Comparison:
    """Prints errors and remembers the largest."""

    worst: float = 0.0

    def add(self, name: str, theirs: np.ndarray, ours: Any) -> None:
        ours = np.asarray(ours)
        error = float(np.max(np.abs(theirs - ours))) if theirs.shape == ours.shape else float("inf")
        relative = error / max(float(np.max(np.abs(theirs))), 1e-30)
        self.worst = max(self.worst, relative) if relative == relative else float("inf")
        print(f"verify: {name:32} max error {error:.2e}, relative {relative:.2e}")


def run(plan: plans.Plan, out: Path) -> int:
    """Compares everything that the plan converted; returns 0 if all agree, else 1.

    Without torch or transformers it says so and returns 0.
    """
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        print(f"verify: skipped, {error.name} is not installed: pip install 'alto_jax[convert]'")
        return 0
    comparison, params = _Comparison(), _Params(out)
    cfg = plan.values
    with jax.default_matmul_precision("highest"):
        for check, part in (
            (_language, "language_model"),
            (_vision, "vision"),
            (_sam, "sam"),
            (_tokenizer, "tokenizer"),
        ):
            has = (cfg.get("tokenizer") or {}).get("sam") if part == "sam" else cfg.get(part)
            if has:
                check(plan, params, comparison)
    agrees = comparison.worst <= TOLERANCE
    verdict = "agrees" if agrees else "DIFFERS"
    print(f"verify: largest relative error {comparison.worst:.2e}: {verdict} (limit {TOLERANCE})")
    return 0 if agrees else 1


def _weights(plan: plans.Plan, suffixes: tuple[str, ...]) -> Any:
    """The source tensors of a part of the model, found by a key that only this part has; None without it."""
    from .torch_reference import Weights

    for part in plan.parts:
        for key in part.source:
            for suffix in suffixes:
                if key == suffix or key.endswith("." + suffix):
                    return Weights(part.source, key.removesuffix(suffix))
    return None


def _config(plan: plans.Plan, *path: str) -> Any:
    """The (float32) configuration of a part of the model."""
    values: Any = plan.values
    for name in path:
        values = values[name]
    return plans.build(plans.mapping_classes()[path[-1]], plans.without_dtypes(values), ".".join(path))


def _language(plan: plans.Plan, params: _Params, comparison: _Comparison) -> None:
    from . import torch_reference as theirs

    cfg = _config(plan, "language_model")
    family = "qwen2" if plan.kind.endswith("qwen2") else "internlm2"
    embed = {"qwen2": "model.embed_tokens.weight", "internlm2": "model.tok_embeddings.weight"}[family]
    weights = _weights(plan, (embed,))
    rows = np.arange(weights.source.entries[weights.prefix + embed].shape[0])
    for is_kept in (mask for part in plan.parts for key, mask in part.kept.items() if key.endswith(embed)):
        rows = np.flatnonzero(is_kept)  # Note: the others are not the source's any more.
    ids = np.random.default_rng(0).choice(rows, (1, _LENGTH))
    positions = np.arange(_LENGTH)[None]
    x, y = weights[embed].numpy()[ids], params.array("language_model/embed/embedding")[ids]
    comparison.add("language_model embedding", x, y)
    causal = np.tril(np.ones((1, 1, _LENGTH, _LENGTH), bool))
    inv_freq = ntk_inv_freq(cfg, _LENGTH)
    block = jax.jit(
        lambda p, h: DecoderBlock(cfg).apply(
            {"params": p}, (h, None), positions, inv_freq, causal, None, None, 0, None
        )[0][0]
    )
    for index in range(cfg.num_layers):
        x = theirs.language_layer(family, weights, index, cfg, positions)(x)
        y = block(params.tree("language_model/blocks/layers/", index), y)
        comparison.add(f"language_model layer {index}", x, y)
    logits = theirs.language_head(family, weights, cfg)(x)[..., rows]
    tail = {"norm": params.tree("language_model/norm/")}
    tail |= (
        {"embed": params.tree("language_model/embed/")}
        if cfg.tie_embeddings
        else {"head": params.tree("language_model/head/")}
    )
    head = jax.jit(lambda p, h: LanguageModel(cfg).apply({"params": p}, h, method=lambda m, h: m.logits(m.norm(h))))
    ours = np.asarray(head(tail, y))[..., rows]
    comparison.add("language_model logits", logits, ours)
    logp, logq = (_log_softmax(values.astype(np.float64)) for values in (logits, ours))
    kl = np.sum(np.exp(logp) * (logp - logq), axis=-1)
    same = np.mean(np.argmax(logits, -1) == np.argmax(ours, -1))
    print(f"verify: next-token KL mean {kl.mean():.2e}, max {kl.max():.2e} nats; same likeliest token {same:.0%}")


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))


def _vision(plan: plans.Plan, params: _Params, comparison: _Comparison) -> None:
    from . import torch_reference as theirs

    cfg = _config(plan, "vision")
    weights = _weights(plan, ("embeddings.patch_embedding.weight",))
    weights = theirs.Weights(weights.source, weights.prefix)
    image = np.random.default_rng(1).normal(size=(1, cfg.image_size, cfg.image_size, 3)).astype(np.float32)
    x = theirs.vision_embedding(weights)(image)
    front = {name: params.tree(f"vision/{name}/") for name in ("patch_embed",)}
    front |= {name: params.array(f"vision/{name}") for name in ("class_embedding", "position_embedding")}
    front["blocks"] = {"layers": jax.tree.map(lambda a: a[None], params.tree("vision/blocks/layers/", 0))}
    shallow = dataclasses.replace(cfg, num_layers=1, select_layer=0)
    y = InternViT(shallow).apply({"params": front}, image, return_hidden=True)[1][0]
    comparison.add("vision embedding", x, y)
    module = layers.ViTBlock(
        num_heads=cfg.num_heads, mlp_dim=cfg.mlp_dim, norm_eps=cfg.norm_eps, rms_norm=cfg.norm_type == "rms_norm",
        qkv_bias=cfg.qkv_bias, qk_norm=cfg.qk_norm, layer_scale=cfg.layer_scale_init,
    )  # fmt: skip
    block = jax.jit(lambda p, h: module.apply({"params": p}, h)[0])
    for index in range(cfg.num_layers):
        x = theirs.vision_layer(weights, index, cfg)(x)
        y = block(params.tree("vision/blocks/layers/", index), y)
        comparison.add(f"vision layer {index}", x, y)


def _sam(plan: plans.Plan, params: _Params, comparison: _Comparison) -> None:
    from . import torch_reference as theirs

    cfg = _config(plan, "tokenizer", "sam")
    weights = _weights(plan, ("patch_embed.proj.weight",))
    image = np.random.default_rng(2).normal(size=(1, cfg.image_size, cfg.image_size, 3)).astype(np.float32)
    x = theirs.sam_embedding(weights)(image)
    stacks = {i: ("global_blocks", n) for n, i in enumerate(cfg.global_attn_indexes)}
    stacks |= {i: ("window_blocks", n) for n, i in enumerate(cfg.window_attn_indexes)}
    where = "tokenizer/sam_encoder/"

    def row(index):
        name, number = stacks[index]
        return params.tree(f"{where}{name}/layers/", number)

    # An encoder of the first block alone gives the embedding and, from its block's result, the neck.
    shallow = dataclasses.replace(cfg, depth=1, global_attn_indexes=(0,) if stacks[0][0] == "global_blocks" else ())
    names = ("patch_embed", "neck_conv1", "neck_norm1", "neck_conv2", "neck_norm2")
    small: dict[str, Any] = {name: params.tree(f"{where}{name}/") for name in names}
    small |= {"position_embedding": params.array(f"{where}position_embedding"),
              stacks[0][0]: {"layers": jax.tree.map(lambda a: a[None], row(0))}}  # fmt: skip
    features, hidden = jax.jit(lambda p, i: SamEncoder(shallow).apply({"params": p}, i, return_hidden=True))(
        small, image
    )
    comparison.add("sam embedding", x, hidden[0])
    comparison.add("sam neck, after layer 0", theirs.sam_neck(weights, cfg)(np.asarray(hidden[1])), features)
    y = hidden[0]
    blocks = {
        window: jax.jit(
            functools.partial(lambda module, p, h: module.apply({"params": p}, h)[0], SamBlock(cfg, window))
        )
        for window in (0, cfg.window_size)
    }
    for index in range(cfg.depth):
        x = theirs.sam_layer(weights, index, cfg)(x)
        y = blocks[0 if stacks[index][0] == "global_blocks" else cfg.window_size](row(index), y)
        comparison.add(f"sam layer {index} ({stacks[index][0].split('_')[0]})", x, y)


def _tokenizer(plan: plans.Plan, params: _Params, comparison: _Comparison) -> None:
    """The transformers of mask encoder and decoder; transformers has no class for the rest."""
    from . import torch_reference as theirs

    weights = _weights(plan, ("encoder.conv_out.weight",))
    if weights is None:
        return
    cfg = _config(plan, "tokenizer")
    for side, vit, has_mask in _sides(cfg):
        num_image = 1 + cfg.grid**2
        allowed = latent_attn_mask(num_image, cfg.num_latent_tokens) if has_mask else None
        shape = (1, num_image + cfg.num_latent_tokens, vit.embed_dim)
        x = y = np.random.default_rng(3).normal(size=shape).astype(np.float32)
        module = layers.ViTBlock(num_heads=vit.num_heads, mlp_dim=vit.mlp_ratio * vit.embed_dim, norm_eps=1e-5)
        mask = None if allowed is None else allowed[None, None]
        block = jax.jit(lambda p, h, module=module, mask=mask: module.apply({"params": p}, h, mask)[0])
        for index in range(vit.num_layers):
            x = theirs.tokenizer_layer(weights, side, index, vit, None if allowed is None else ~allowed)(x)
            y = block(params.tree(f"tokenizer/{side}/blocks/layers/", index), y)
            comparison.add(f"tokenizer {side} layer {index}", x, y)
    print("verify: not compared, for want of an independent class: quantizer, length predictor, pixel decoder")


def _sides(cfg: Any) -> Iterator[tuple[str, Any, bool]]:
    yield "encoder", cfg.encoder, True
    yield "decoder", cfg.decoder, False
