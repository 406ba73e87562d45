"""Floating-point operations of a training step, counted from the configuration.

What the model itself needs: a product of x [n, a] and w [a, b] counts 2nab, once forward, once for the
gradient of w where w is trained, once for the gradient of x where something before it is trained. Attention
counts the whole square of positions, as it is computed. Recomputation (remat) does not count, so that a share of
the peak is a model FLOP utilisation (MFU). Left out, being below one per cent at the paper's sizes:
elementwise operations, the codebook, resizing, the optimizer.
"""

from collections.abc import Mapping
import dataclasses
import functools
import re
import types

from flax import traverse_util
import jax

from alto_jax.experiment import ExperimentConfig, LoraConfig
from alto_jax.lora import adapters
from alto_jax.mllm.alto_llm import ModelConfig, init_params
from alto_jax.tokenizer.alto import TokenizerConfig


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """Operations of one global step: rollout (stage 3; 0 elsewhere), forward and backward pass of the loss.

    A rollout counts as if every answer had `max_new_tokens` tokens.
    """

    rollout: float
    forward: float
    backward: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.rollout + self.forward + self.backward


@dataclasses.dataclass(frozen=True)
class _Part:
    """Kernels (a regex on paths) that are applied at `positions` places of one row, and the attention between them.

    is_stack: kernels in sequence, so that each but the first has trained ones before it if any is trained.
    """

    pattern: str
    positions: float
    attention: float = 0.0
    is_stack: bool = False


class _Counter:
    """Counts chains of parts with the kernels' sizes of one model; with `only` those parts whose pattern it matches."""

    def __init__(self, sizes: Mapping[str, int], trainable: str, only: str = ""):
        self._sizes, self._trainable, self._only = sizes, trainable, only

    def forward(self, chain: list[_Part]) -> float:
        """Operations of the forward pass."""
        chain = [part for part in chain if re.search(self._only, part.pattern)]
        return sum(2 * size * part.positions for part in chain for _, size in self._kernels(part)) + sum(
            part.attention for part in chain
        )

    def backward(self, chain: list[_Part], entering: bool = False) -> float:
        """Operations of the backward pass; `entering`: something before the chain is trained."""
        total = 0.0
        for part in chain:
            kernels = self._kernels(part)
            trained = [bool(re.search(self._trainable, path)) for path, _ in kernels]
            flows = entering or (part.is_stack and any(trained))
            if re.search(self._only, part.pattern):
                total += sum(
                    2 * size * part.positions * (is_trained + flows) for (_, size), is_trained in zip(kernels, trained)
                )
                total += 2 * part.attention * flows
            entering = flows or any(trained)
        return total

    def trains(self, *chains: list[_Part]) -> bool:
        """Whether any kernel of the chains is trained."""
        kernels = [path for chain in chains for part in chain for path, _ in self._kernels(part)]
        return any(re.search(self._trainable, path) for path in kernels)

    def _kernels(self, part: _Part) -> list[tuple[str, int]]:
        return [(path, size) for path, size in self._sizes.items() if re.search(part.pattern, path)]


def step_flops(
    config: ExperimentConfig, *, batch_size: int | None = None, length: int | None = None, only: str = ""
) -> StepFlops:
    """Counts one global step (all devices) of a run.

    Args:
      config: the run's configuration; only shapes are computed.
      batch_size: rows (prompts in stage 3) instead of `config.train.batch_size`.
      length: tokens of a row (of a prompt in stage 3) instead of `config.data.max_length`.
      only: a regex; parts of the model whose path's pattern it does not match count nothing.
    """
    sizes = _kernels(config.model, config.lora)
    count = _Counter(sizes, config.trainable, only)
    length = config.data.max_length if length is None else length
    rows = config.train.batch_size if batch_size is None else batch_size
    per_row = {"stage0": _sft, "stage2": _sft, "stage3": _grpo}.get(config.stage, _tokenizer)(config, count, length)
    return StepFlops(*(rows * value for value in dataclasses.astuple(per_row)))


@functools.lru_cache(maxsize=8)
def _kernels(model: ModelConfig, lora: LoraConfig | None) -> Mapping[str, int]:
    """The sizes of a model's kernels by path; with `lora` also those of its adapters and of a head that is tied."""
    shapes = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    flat = traverse_util.flatten_dict(shapes, sep="/")
    if lora is not None and lora.rank:
        added = jax.eval_shape(lambda p: adapters.make_adapters(p, lora, jax.random.key(0)), shapes)
        flat |= traverse_util.flatten_dict(added, sep="/")
    sizes = {p: v.size for p, v in flat.items() if re.search(r"/(kernel|lora_[ab])$", p)}
    if lora is not None and model.language_model is not None and model.language_model.tie_embeddings:
        sizes["language_model/head/kernel"] = flat["language_model/embed/embedding"].size
    return types.MappingProxyType(sizes)


def answer_flops(
    config: ModelConfig, prompt_length: int, new_tokens: int, num_samples: int = 1, only: str = ""
) -> float:
    """Operations of answering one prompt about one image with masks (what `alto_llm.segment` computes); `only` as in
    `step_flops`."""
    return _Counter(_kernels(config, None), "$^", only).forward(
        _segment(config, prompt_length, new_tokens, num_samples)
    )


def _tokenizer(config: ExperimentConfig, count: _Counter, length: int) -> StepFlops:
    """Stages 1 and 1.5, one mask."""
    cfg = config.model.tokenizer
    encode, features, decode = _encoder(cfg), _sam(cfg), _decoder(cfg)
    # Note: the predicted length touches the loss through the length term or through the adaptive choice of tokens.
    predict = _length(cfg)
    uses_length = config.tokenizer.keep_tokens == "adaptive" or config.tokenizer.loss.length > 0
    backward = count.backward(features) + count.backward(_mapper(cfg), count.trains(features))
    backward += count.backward(encode)
    if uses_length:
        backward += count.backward(predict, count.trains(encode))
    entering = count.trains(encode, features, _mapper(cfg)) or (uses_length and count.trains(predict))
    entering |= bool(re.search(config.trainable, "tokenizer/quantizer/embedding"))
    backward += count.backward(decode, entering)
    forward = count.forward(encode + predict + features + _mapper(cfg) + decode)
    return StepFlops(0.0, forward, backward)


def _sft(config: ExperimentConfig, count: _Counter, length: int) -> StepFlops:
    """Stages 0 and 2, one row."""
    model, masks, cfg = config.model, config.data.max_masks, config.model.tokenizer
    heads = min(config.sft.at_once, length - 1)
    labels = _times(_encoder(cfg) + _length(cfg), masks if config.stage == "stage2" else 0)
    # Note: as many tiles as a row may have.
    vision = _times(_vision(model), max(config.data.tile_slots, 1))
    chain = vision + [_language(model, length, length * length)]
    mask_loss = config.sft.mask_loss_weight > 0
    # Note: the mask loss asks for the logits of codes alone.
    share = cfg.codebook_size / model.need_language_model().vocab_size
    chain.append(_head(heads + masks * cfg.num_latent_tokens * share * mask_loss))
    forward, backward = count.forward(labels + chain), count.backward(chain)
    if mask_loss:
        features, mapper, decode = _sam(cfg), _times(_mapper(cfg), masks), _times(_decoder(cfg), masks)
        forward += count.forward(features + mapper + decode)
        backward += count.backward(features) + count.backward(mapper, count.trains(features))
        backward += count.backward(decode, count.trains(chain, features, mapper))
    return StepFlops(0.0, forward, backward)


def _grpo(config: ExperimentConfig, count: _Counter, length: int) -> StepFlops:
    """Stage 3, one prompt with its group."""
    group, new = config.grpo.num_generations, config.grpo.generate.max_new_tokens
    own = group * (new - 1)
    pairs = length * length + own * (length + new - 1)
    chain = [_language(config.model, length + own, pairs), _head(group * new)]
    rollout = count.forward(_segment(config.model, length, new, group))
    if config.grpo.loss.beta > 0:
        rollout += count.forward(chain)
    return StepFlops(rollout / config.grpo.updates_per_rollout, count.forward(chain), count.backward(chain))


def _segment(model: ModelConfig, prompt: int, new: int, group: int) -> list[_Part]:
    """Vision, prompt, `new` tokens of each of `group` answers, and their masks."""
    own = group * (new - 1)
    pairs = prompt * prompt + own * (prompt + new)
    decode = _times(_mapper(model.tokenizer) + _decoder(model.tokenizer), group)
    return _vision(model) + [_language(model, prompt + own, pairs), _head(1 + own)] + _sam(model.tokenizer) + decode


def _times(chain: list[_Part], n: int) -> list[_Part]:
    return [dataclasses.replace(p, positions=n * p.positions, attention=n * p.attention) for p in chain]


def _square(width: int, layers: int, pairs: float) -> float:
    """Both products of attention (scores, weighted values) for pairs of positions."""
    return 4.0 * width * layers * pairs


def _language(model: ModelConfig, tokens: float, pairs: float) -> _Part:
    cfg = model.need_language_model()
    attention = _square(cfg.num_heads * cfg.head_width, cfg.num_layers, pairs)
    return _Part("^language_model/blocks/", tokens, attention, is_stack=True)


def _head(positions: float) -> _Part:
    return _Part("^language_model/head/", positions)


def _vision(model: ModelConfig) -> list[_Part]:
    """Vision tower and projector, one image."""
    cfg = model.need_vision()
    patches, used = cfg.grid**2, cfg.select_layer % (cfg.num_layers + 1)
    blocks = _Part(
        "^vision/blocks/",
        (1 + patches) * used / cfg.num_layers,
        _square(cfg.embed_dim, used, (1 + patches) ** 2),
        is_stack=True,
    )
    return [_Part("^vision/patch_embed/", patches), blocks, _Part("^projector/", model.num_image_tokens, is_stack=True)]


def _encoder(cfg: TokenizerConfig) -> list[_Part]:
    """Mask encoder, one mask."""
    total = 1 + cfg.grid**2 + cfg.num_latent_tokens
    attention = _square(cfg.encoder.embed_dim, cfg.encoder.num_layers, total**2)
    blocks = _Part("^tokenizer/encoder/blocks/", total, attention, is_stack=True)
    patches, project = (
        _Part("^tokenizer/encoder/patch_embed/", cfg.grid**2),
        _Part("^tokenizer/encoder/conv_out/", cfg.num_latent_tokens),
    )
    return [patches, blocks, project]


def _length(cfg: TokenizerConfig) -> list[_Part]:
    """Length predictor, one mask."""
    width, num = cfg.encoder.embed_dim, cfg.num_latent_tokens
    return [_Part("^tokenizer/length/fc[12]/", num), _Part("^tokenizer/length/fc3/", 1, attention=2.0 * width * num)]


def _mapper(cfg: TokenizerConfig) -> list[_Part]:
    """What brings image features to the mask's patches, one mask."""
    if cfg.sam is None:
        return []
    return [_Part(f"^tokenizer/decoder/{name}/", cfg.grid**2) for name in ("spatial_mapper", "vae_project")]


def _decoder(cfg: TokenizerConfig) -> list[_Part]:
    """Mask decoder and pixel decoder without the image features, one mask."""
    patches = cfg.grid**2
    total = 1 + patches + cfg.num_latent_tokens
    attention = _square(cfg.decoder.embed_dim, cfg.decoder.num_layers, total**2)
    chain = [
        _Part("^tokenizer/decoder/decoder_embed/", cfg.num_latent_tokens),
        _Part("^tokenizer/decoder/blocks/", total, attention, is_stack=True),
        _Part("^tokenizer/decoder/ffn[12]/", patches, is_stack=True),
        _Part("^tokenizer/pixel_decoder/(conv_in|mid_)", patches, is_stack=True),
    ]
    for level in reversed(range(len(cfg.pixel_decoder.channel_mult))):
        chain.append(_Part(f"^tokenizer/pixel_decoder/up_{level}/block_", patches, is_stack=True))
        if level > 0:
            patches *= 4
            chain.append(_Part(f"^tokenizer/pixel_decoder/up_{level}/upsample_conv/", patches))
    return [*chain, _Part("^tokenizer/pixel_decoder/conv_out/", patches)]


def _sam(cfg: TokenizerConfig) -> list[_Part]:
    """SAM's image encoder, one image; what fills up windows is only attended to."""
    if cfg.sam is None:
        return []
    sam, grid, prefix = cfg.sam, cfg.sam.grid, "^tokenizer/sam_encoder"
    windows = -(-grid // sam.window_size)
    padded = (windows * sam.window_size) ** 2

    def blocks(name: str, positions: int, side: int, number: int) -> list[_Part]:
        # Both products of attention, and the two of the query with the relative positions along an axis.
        attention = _square(sam.embed_dim, number, positions * side * side)
        attention += 4.0 * sam.embed_dim * number * grid**2 * side
        attn = _Part(f"{prefix}/{name}/.*attn/", grid**2, attention, is_stack=True)
        return [attn, _Part(f"{prefix}/{name}/.*mlp/", grid**2, is_stack=True)]

    window, whole = len(sam.window_attn_indexes), len(sam.global_attn_indexes)
    return [
        _Part(f"{prefix}/patch_embed/", grid**2),
        *blocks("window_blocks", padded, sam.window_size, window),
        *blocks("global_blocks", grid**2, grid, whole),
        _Part(f"{prefix}/neck_", grid**2, is_stack=True),
    ]
