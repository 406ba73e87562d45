"""How much memory and time a step needs, from shapes alone: what `plan` says before, beside and without a compiler.

Time is the largest of its parts, as if they overlapped perfectly (and their sum, as if they did not at all):
operations at `COMPUTE` of the peak, bytes through HBM at `BANDWIDTH` of its rate, bytes between devices at `LINKS` of
the interconnect's, and bytes between slices or machines at `LINKS` of the network's. Those shares are assumptions, not
measurements. Memory of activations is a rough count; state is exact.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from alto_jax.config import require
from alto_jax.experiment import ExperimentConfig
from alto_jax.parallel import sharding, slices
from alto_jax.parallel.devices import Device
from alto_jax.parallel.sharding import MeshConfig

COMPUTE, BANDWIDTH, LINKS = 0.6, 0.8, 0.8


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Time of a step by what it waits for; `estimate` overlaps all, `serial` nothing."""

    compute: float
    memory: float
    collectives: float
    network: float = 0.0

    @property
    def estimate(self) -> float:
        """The largest part."""
        return max(self.compute, self.memory, self.collectives, self.network)

    @property
    def serial(self) -> float:
        """The sum."""
        return self.compute + self.memory + self.collectives + self.network


def seconds(device: Device, flops: float, work: "Work", network: float | None = None) -> Seconds:
    """Time from the operations of one device and what it moves; network: its rate, None with one slice."""
    return Seconds(
        flops / (COMPUTE * device.flops),
        work.hbm / (BANDWIDTH * device.bandwidth),
        work.links / (LINKS * device.links),
        work.network / (LINKS * network) if network else 0.0,
    )


@dataclasses.dataclass(frozen=True)
class Work:
    """What one device holds and moves: bytes.

    temporary: gradients, activations and gathered parameters at the worst moment. hbm, links, network: bytes through
    HBM, between devices of a slice, and between slices in one step.
    """

    temporary: float
    hbm: float
    links: float
    network: float = 0.0


class _Moved:
    """What one device receives in collectives over the axes of a mesh.

    Over an axis that crosses slices they go in two stages: within a slice every device takes its part, so that of the
    whole only that part crosses the network.
    """

    def __init__(self, sizes: MeshConfig, num_slices: int):
        self._sizes = sharding.axis_sizes(sizes)
        self._outer = dict(zip(sharding.AXES, slices.between([self._sizes[a] for a in sharding.AXES], num_slices)))
        self.links = self.network = 0.0

    def gather(self, axis: str, whole: float) -> None:
        """An all-gather to `whole` bytes, or a reduce-scatter of them; an all-reduce is both."""
        outer = self._outer[axis]
        inner = self._sizes[axis] // outer
        self.links += whole * (inner - 1) / inner
        self.network += whole / inner * (outer - 1) / outer


def has_flash(cfg: Any) -> bool:
    """Whether a part of the model attends without holding its scores on an accelerator."""
    return cfg.attention != "xla" and cfg.dtype != "float32"


def _remat_passes(config: ExperimentConfig) -> int:
    """How often a step reads the parameters: forward, again if rematerialised, backward."""
    main = config.model.language_model or config.model.tokenizer
    return 3 if main.remat == "full" else 2


def _stack(
    layers: int, rows: float, tokens: int, width: int, inner: float, heads: float, cfg: Any, trained: bool
) -> float:
    """Bytes of a transformer's activations: the carries that remat keeps, and one layer at work."""
    size = jnp.dtype(cfg.dtype).itemsize
    one = rows * tokens * (4 * width + inner) * size
    # Note: scores in float32; what the softmax makes of them takes their place.
    scores = 0.0 if has_flash(cfg) else rows * heads * tokens * tokens * 4
    if not trained:
        return 2 * one + 2 * scores
    kept = rows * tokens * width * size
    return layers * (kept if cfg.remat == "full" else one + scores) + 2 * one + 2 * scores


@dataclasses.dataclass(frozen=True)
class Activations:
    """Bytes of a training step's activations on one device.

    Attributes:
      features: of the image encoder, which is done before the rest begins.
      kept: of the transformers, for the backward pass and in one layer at work.
      passing: of what begins the backward pass and is gone before its end: pixels and logits.
    """

    features: float = 0.0
    kept: float = 0.0
    passing: float = 0.0

    @property
    def total(self) -> float:
        """All that is made."""
        return self.features + self.kept + self.passing

    def worst(self, gradients: float) -> float:
        """The most that is there at once with the gradients, of which none is there while all of `passing` is."""
        return max(self.features, self.kept + max(self.passing, gradients))


def activation_bytes(config: ExperimentConfig, rows: float, tensor: int) -> Activations:
    """Activations of a training step on one device that holds `rows` rows of the batch; a rough count."""
    model, tokens = config.model, config.data.max_length
    size = model.tokenizer
    patches = size.grid**2
    has_tokenizer = config.stage not in ("stage0", "stage3")
    masks = rows * (config.data.max_masks if config.stage == "stage2" else 1)
    groups = config.grpo.num_generations if config.stage == "stage3" else 1
    features = kept = passing = 0.0
    if size.sam is not None and has_tokenizer:
        sam = size.sam
        # Note: for a flash kernel queries, keys and values are as wide as the relative positions make them.
        wide = 3 * sam.num_heads * 2 * sam.grid if has_flash(sam) else 0
        inner = (3 * sam.embed_dim + sam.mlp_ratio * sam.embed_dim + wide) / tensor
        features = _stack(sam.depth, rows, sam.grid**2, sam.embed_dim, inner, sam.num_heads / tensor, sam, False)
    if has_tokenizer:
        for vit in (size.encoder, size.decoder):
            length = 1 + patches + size.num_latent_tokens
            inner = (3 + vit.mlp_ratio) * vit.embed_dim / tensor
            kept += _stack(
                vit.num_layers,
                masks,
                length,
                vit.embed_dim,
                inner,
                vit.num_heads / tensor,
                size,
                config.stage != "stage2",
            )
        pixel, side = size.pixel_decoder, size.grid
        for mult in reversed(pixel.channel_mult):
            # Note: of a level's convolutions; norms and what follows them are fused, and computed again.
            maps = 2 * pixel.num_res_blocks + 2
            passing += masks * side**2 * mult * pixel.hidden_channels * maps * jnp.dtype(pixel.dtype).itemsize
            side *= 2
    if model.language_model is None or config.stage in ("stage1", "stage1_5"):
        return Activations(features, kept, passing)
    vision, language = model.need_vision(), model.language_model
    if config.stage in ("stage0", "stage2"):
        inner = (3 * vision.embed_dim + vision.mlp_dim) / tensor
        heads = vision.num_heads / tensor
        seen = rows * max(config.data.tile_slots, 1)  # images, or as many tiles as rows may have
        kept += _stack(vision.num_layers, seen, 1 + vision.grid**2, vision.embed_dim, inner, heads, vision, True)
        scored = min(config.sft.at_once, tokens - 1) * language.vocab_size
        if config.sft.mask_loss_weight > 0:
            scored += config.data.max_masks * size.num_latent_tokens * size.codebook_size
    else:
        new = config.grpo.generate.max_new_tokens
        scored = groups * min(config.grpo.logits_at_once or new, new) * language.vocab_size
        tokens += groups * new
    inner = (2 * language.num_heads * language.head_width + 3 * language.mlp_dim) / tensor
    width, heads = language.embed_dim, language.num_heads / tensor
    # Note: a group's answers attend to their prompt and themselves, not to each other.
    span = config.data.max_length + config.grpo.generate.max_new_tokens if config.stage == "stage3" else tokens
    kept += _stack(language.num_layers, rows, span, width, inner * tokens / span, heads, language, True)
    return Activations(features, kept, passing + 3 * rows * scored / tensor * 4)


def training_work(
    config: ExperimentConfig, params: Any, frozen: Any, opt_state: Any, sizes: MeshConfig, num_slices: int = 1
) -> Work:
    """What one device holds and moves in an update.

    Args:
      config: the run; its batch is the global one.
      params, frozen, opt_state: ShapeDtypeStructs of the state.
      sizes: the mesh.
      num_slices: that it is laid over (`alto_jax.parallel.slices`).
    """
    parts = sizes.data * sizes.fsdp
    require(
        config.train.batch_size % parts == 0,
        "config.train.batch_size",
        config.train.batch_size,
        f"a multiple of {parts}",
    )
    rows = config.train.batch_size / parts
    held = lambda tree: sharding.bytes_per_device(tree, sizes)
    # Note: what a layer computes with, gathered over fsdp and in the type of the computation.
    whole = MeshConfig(1, 1, sizes.tensor)
    main = config.model.language_model or config.model.tokenizer
    shrink = min(1.0, jnp.dtype(main.dtype).itemsize / 4)
    gathered = shrink * (sharding.bytes_per_device(params, whole) + sharding.bytes_per_device(frozen, whole))
    trained = shrink * sharding.bytes_per_device(params, whole)
    layers = (config.model.language_model or config.model.tokenizer.encoder).num_layers
    working = 2 * gathered / layers if sizes.fsdp > 1 else 0.0
    activations = activation_bytes(config, rows, sizes.tensor)
    temporary = working + activations.worst(held(params))
    passes = _remat_passes(config)
    hbm = passes * gathered * (2 if sizes.fsdp > 1 else 1) + 2 * (held(opt_state) + 2 * held(params))
    hbm += 2 * (held(params) + working + activations.total)

    moved = _Moved(sizes, num_slices)
    if sizes.fsdp > 1:
        moved.gather("fsdp", passes * gathered + trained)
    if sizes.data > 1:
        moved.gather("data", 2 * held(params))
    if sizes.tensor > 1 and config.model.language_model is not None:
        language = config.model.language_model
        once = rows * config.data.max_length * language.embed_dim * jnp.dtype(language.dtype).itemsize
        moved.gather("tensor", 2 * passes * language.num_layers * once * 2)
    return Work(temporary, hbm, moved.links, moved.network)


def answering_work(
    config: ExperimentConfig, params: Any, sizes: MeshConfig, samples: int, new_tokens: int, num_slices: int = 1
) -> Work:
    """What one device holds and moves while it answers its prompts: a pass over the prompt, then token by token."""
    language = config.model.need_language_model()
    rows = config.train.batch_size / (sizes.data * sizes.fsdp)
    whole = MeshConfig(1, 1, sizes.tensor)
    # Note: as they are computed with, whatever they are kept in.
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, language.dtype), params)
    weights = sharding.bytes_per_device(params["language_model"], whole)
    everything = sharding.bytes_per_device(params, whole)
    position = 2 * language.num_layers * language.num_kv_heads * language.head_width / sizes.tensor
    position *= jnp.dtype(language.dtype).itemsize
    cache = rows * position * (config.data.max_length + samples * new_tokens)
    logits = rows * samples * language.vocab_size / sizes.tensor * 4 * 3
    # Note: before the loop of tokens the language model is gathered, and its layers are copied to arrays of their own
    # (`language_model.for_inference`).
    working = weights + (2 * everything / language.num_layers if sizes.fsdp > 1 else 0.0)
    hbm = everything + new_tokens * (weights + cache + logits)
    moved = _Moved(sizes, num_slices)
    moved.gather("fsdp", everything)
    temporary = cache + logits + working + activation_bytes(config, rows, sizes.tensor).total / 8
    return Work(temporary, hbm, moved.links, moved.network)
