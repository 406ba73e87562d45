"""ALToLLM: InternViT, projector and language model around the mask tokenizer.

    image ─► vision ─► pixel shuffle ─► projector ─► image tokens ┐
    ids (with <IMG_CONTEXT> where the image goes) ─► embed ───────┴─► language_model ─► hidden ─► logits

Source: ALTo (NeurIPS 2025), section 3.3; InternVL 2.5.
"""

import dataclasses
import functools
from typing import Any, Literal, cast

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp

from alto_jax.batch import PromptBatch
from alto_jax.config import ConfigError, require
from alto_jax.layers import apply_module, told_precision
from alto_jax.mllm import generate as generation
from alto_jax.mllm.choice import mask_state
from alto_jax.mllm.generate import Controls, GenerateConfig, Generated, Given, Questions, State, generate
from alto_jax.mllm.intern_vit import InternViT, InternViTConfig, Projector, imagenet_normalise, pixel_shuffle
from alto_jax.mllm.language_model import LanguageModel, LanguageModelConfig
from alto_jax.mllm.mask_tokens import AnswerMasks, ParsedMask, parse_completion, parse_masks
from alto_jax.mllm.text import SpecialIds
from alto_jax.parallel.sharding import constrain
from alto_jax.tokenizer.alto import ALTo, TokenizerConfig
from alto_jax.tokenizer.sam_encoder import mllm_to_unit

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A mask tokenizer, and with `vision` and `language_model` a whole ALToLLM.

    Attributes:
      tokenizer, vision, language_model: sizes of the parts.
      pixel_input: "mllm" gives the SAM encoder the MLLM's image, resized up (Compat: what the reference does in stages
        2 and 3); "native" gives it the image at its own resolution, as in stage 1.
      pixel_shuffle_version: order in which four patches become one image token; InternVL2.5's is "v2".
      matmul_precision: of float32 matrix products on GPUs and TPUs. "": parts of the model whose dtype is float32
        compute in float32, the others as the device likes; "default", "high", "highest": JAX's names, for all parts
        alike. The quantizer and the length predictor compute in float32 in any case.
    """

    tokenizer: TokenizerConfig = TokenizerConfig()
    vision: InternViTConfig | None = None
    language_model: LanguageModelConfig | None = None
    pixel_input: Literal["mllm", "native"] = "mllm"
    pixel_shuffle_version: Literal["v1", "v2"] = "v2"
    matmul_precision: Literal["", "default", "high", "highest"] = ""

    def __post_init__(self) -> None:
        require((self.vision is None) == (self.language_model is None), "vision, language_model",
                (self.vision is not None, self.language_model is not None), "both or neither")  # fmt: skip
        if self.vision is not None:
            require(self.vision.grid % 2 == 0, "vision.image_size", self.vision.image_size, "an even number of patches")

    @property
    def num_image_tokens(self) -> int:
        """Tokens of one image in the language model: a quarter of the patches."""
        return (self.need_vision().grid // 2) ** 2

    def need_vision(self) -> InternViTConfig:
        """The vision tower of a whole model.

        Raises:
          ConfigError: this is a mask tokenizer alone.
        """
        if self.vision is None:
            raise ConfigError("config.model.vision: expected the vision tower of a whole model, got None")
        return self.vision

    def need_language_model(self) -> LanguageModelConfig:
        """The language model of a whole model.

        Raises:
          ConfigError: this is a mask tokenizer alone.
        """
        if self.language_model is None:
            raise ConfigError("config.model.language_model: expected that of a whole model, got None")
        return self.language_model


def sam_input(cfg: ModelConfig, image: Array, pixel_image: Array | None) -> Array:
    """The SAM encoder's image, in 0..255, of the MLLM's [B, V, V, 3] and the one of its own size [B, S, S, 3]."""
    if cfg.pixel_input == "mllm":
        return mllm_to_unit(imagenet_normalise(image), cfg.tokenizer.image_size) * 255.0
    if pixel_image is None:
        raise ValueError("pixel_image: expected images for the SAM encoder (pixel_input is 'native'), got None")
    return pixel_image


class ALToLLM(nn.Module):
    """The whole model; call its methods with `module.apply({"params": p}, ..., method="embed")`."""

    cfg: ModelConfig

    def setup(self) -> None:
        cfg = self.cfg
        language = cfg.need_language_model()
        self.tokenizer = ALTo(cfg.tokenizer)
        self.vision = InternViT(cfg.need_vision())
        self.projector = Projector(language.embed_dim, jnp.dtype(language.dtype), jnp.dtype(language.param_dtype))
        self.language_model = LanguageModel(language)

    def image_tokens(self, image: Array, drop_path_key: Array | None = None) -> Array:
        """image uint8[B, V, V, 3] → float[B, I, D] with I = num_image_tokens.

        N images (tiles) of a row, uint8[B, N, V, V, 3], → float[B, N*I, D], in order. `drop_path_key`: see InternViT,
        one or one per row.
        """
        if image.ndim == 5:
            rows, number = image.shape[:2]
            if drop_path_key is not None and drop_path_key.ndim:
                drop_path_key = jax.vmap(lambda key: jax.random.split(key, number))(drop_path_key).reshape(-1)
            tokens = self.image_tokens(image.reshape(-1, *image.shape[2:]), drop_path_key)
            return tokens.reshape(rows, -1, tokens.shape[-1])
        x = cast(Array, self.vision(imagenet_normalise(image), drop_path_key))
        grid = self.cfg.need_vision().grid
        x = pixel_shuffle(x.reshape(x.shape[0], grid, grid, x.shape[-1]), version=self.cfg.pixel_shuffle_version)
        # Note: else the projector's split of its inputs would reach the shuffle's reshapes, which cannot keep it.
        return self.projector(constrain(x.reshape(x.shape[0], -1, x.shape[-1]), "batch", ...))

    def image_features(self, image: Array, pixel_image: Array | None, cached: Array | None = None) -> Array | None:
        """What the de-tokenizer sees of the images [B, V, V, 3] and [B, S, S, 3] (uint8): SAM features.

        `cached`: float[B, s*g, s*g, F] computed before (data/caches.py), given back.
        """
        if cached is not None:
            return cached
        if self.cfg.tokenizer.sam is None:
            return None
        return self.tokenizer.image_features(sam_input(self.cfg, image, pixel_image))

    def embed(self, ids: Array, image_tokens: Array, img_context: int) -> Array:
        """Token embeddings with the image tokens at the `<IMG_CONTEXT>` positions, in order.

        Args:
          ids: int32[B, T]; image_tokens: float[B, I, D]; img_context: id of `<IMG_CONTEXT>`.

        Returns:
          float[B, T, D].
        """
        is_image = ids == img_context
        index = jnp.clip(jnp.cumsum(is_image, axis=1) - 1, 0, image_tokens.shape[1] - 1)
        placed = jnp.take_along_axis(image_tokens, index[..., None], axis=1)
        embedded = self.language_model.embed(ids)
        return jnp.where(is_image[..., None], placed.astype(embedded.dtype), embedded)

    def embed_text(self, ids: Array) -> Array:
        """ids int32[B, T] without image tokens → float[B, T, D]."""
        return self.language_model.embed(ids)

    def hidden(self, inputs: Array, positions: Array, *args: Any, **kwargs: Any) -> Any:
        """The language model's forward pass, see `LanguageModel.__call__`."""
        return self.language_model(inputs, positions, *args, **kwargs)

    def logits(self, hidden: Array) -> Array:
        """hidden float[..., D] → float32[..., V]."""
        return self.language_model.logits(hidden)

    def code_logits(self, hidden: Array, special: SpecialIds) -> Array:
        """hidden float[..., D] → float32[..., num_codes], the logits of the mask codes alone."""
        return self.language_model.some_logits(hidden, special.code_0, special.num_codes)

    def __call__(self, mask: Array, pixel_image: Array, image: Array, ids: Array) -> tuple[Array, Array]:
        """Touches every parameter (for initialisation)."""
        masks = self.tokenizer(mask, pixel_image)
        inputs = self.embed(ids, self.image_tokens(image), 0)
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        hidden, _ = self.hidden(inputs, positions)
        return self.logits(hidden), masks


# Note: jitted so that it is traced once, whoever asks for shapes or values of a model.
@functools.partial(jax.jit, static_argnums=0, inline=True)
def init_params(cfg: ModelConfig, key: Array) -> dict:
    """Parameters of a whole model from scratch; traceable."""
    tokenizer, vision = cfg.tokenizer, cfg.vision
    mask = jnp.zeros((1, tokenizer.mask_size, tokenizer.mask_size))
    pixel_image = jnp.zeros((1, tokenizer.image_size, tokenizer.image_size, 3), jnp.uint8)
    if vision is None:
        return {"tokenizer": ALTo(tokenizer).init(key, mask, pixel_image)["params"]}
    image = jnp.zeros((1, vision.image_size, vision.image_size, 3), jnp.uint8)
    return ALToLLM(cfg).init(key, mask, pixel_image, image, jnp.zeros((1, 2), jnp.int32))["params"]


@struct.dataclass
class Segmentation:
    """Answers with their masks; leading axes [B], or [B, G] if `num_samples` was given.

    generated: the new tokens. masks: those of the answer, with `max_masks` slots. codes int32[..., L], length
    int32[...] and valid bool[...]: the first of them, and whether there is one. parsed: the answer as rewards read it,
    which ask for exactly one mask. mask_logits float32[..., H, W]: the first mask decoded; where there is none, what no
    codes at all decode to. image_tokens float[B, I, D].
    """

    generated: Generated
    masks: AnswerMasks
    parsed: ParsedMask
    mask_logits: Array
    image_tokens: Array

    @property
    def codes(self) -> Array:
        """Codes of the first mask."""
        return self.masks.codes[..., 0, :]

    @property
    def length(self) -> Array:
        """Number of its codes, 0 if there is none."""
        return self.masks.length[..., 0]

    @property
    def valid(self) -> Array:
        """Whether the answer holds a well-formed mask."""
        return self.masks.valid[..., 0]


def segment(
    cfg: ModelConfig,
    params: dict,
    batch: PromptBatch,
    generate_cfg: GenerateConfig,
    special: SpecialIds,
    rng: Array,
    num_samples: int | None = None,
    controls: Controls | None = None,
    *,
    image_tokens: Array | None = None,
    questions: tuple[Array, Array] | None = None,
    max_masks: int = 1,
) -> Segmentation:
    """Answers prompts about images and decodes the first mask of each answer; jittable.

    Prediction, evaluation and the GRPO rollout are this one function. Vision and prompt run once per
    image, whatever the number of samples.

    Args:
      cfg: the model; params: its parameters.
      batch: images and prompts (its target mask is not used).
      generate_cfg, special, rng, num_samples, controls: see `generate.generate`.
      image_tokens: float[B, I, D] of the images, computed before; None: computed here.
      questions: (ids int32[B, G, Q], mask bool[B, G, Q]), left padded: G ends of each prompt, which then is only their
        common beginning, with the image; the answers are [B, G].
      max_masks: M, how many masks of an answer are read.
    """
    with told_precision(cfg.matmul_precision):
        given = num_samples, controls, image_tokens, questions, max_masks
        return _segment(cfg, params, batch, generate_cfg, special, rng, *given)


def _segment(
    cfg: ModelConfig,
    params: dict,
    batch: PromptBatch,
    generate_cfg: GenerateConfig,
    special: SpecialIds,
    rng: Array,
    num_samples: int | None,
    controls: Controls | None,
    image_tokens: Array | None,
    questions: tuple[Array, Array] | None,
    max_masks: int,
) -> Segmentation:
    """`segment`, with the precision told."""
    apply = functools.partial(apply_module, ALToLLM(cfg), params)
    if image_tokens is None:
        image_tokens = apply(batch.image, method="image_tokens")
    inputs, asked = _inputs(cfg, params, batch.prompt_ids, special, image_tokens, questions)
    num_samples = num_samples if questions is None else questions[0].shape[1]
    generated = generate(
        LanguageModel(cfg.need_language_model()), params["language_model"], inputs, batch.prompt_mask, generate_cfg,
        special, rng, num_samples, prompt_ids=batch.prompt_ids, controls=controls, questions=asked,
    )  # fmt: skip
    features = apply(batch.image, batch.pixel_image, batch.features, method="image_features")
    if num_samples is not None and features is not None:
        features = jnp.repeat(features, num_samples, axis=0)
    last_ids = batch.prompt_ids if questions is None else questions[0]
    return _read(cfg, params, generated, last_ids, features, special, max_masks, image_tokens)


def _inputs(
    cfg: ModelConfig,
    params: dict,
    prompt_ids: Array,
    special: SpecialIds,
    image_tokens: Array,
    questions: tuple[Array, Array] | None,
) -> tuple[Array, Questions | None]:
    """The embeddings of prompts [B, P, D], and their different ends."""
    apply = functools.partial(apply_module, ALToLLM(cfg), params)
    inputs = apply(prompt_ids, image_tokens, special.img_context, method="embed")
    if questions is None:
        return inputs, None
    ids, mask = questions
    flat = apply(ids.reshape(-1, ids.shape[-1]), method="embed_text")
    return inputs, Questions(flat.reshape(*ids.shape, -1), mask, ids)


def _read(
    cfg: ModelConfig,
    params: dict,
    generated: Generated,
    last_ids: Array,
    features: Array | None,
    special: SpecialIds,
    max_masks: int,
    image_tokens: Array,
) -> Segmentation:
    """The answers that were generated after `last_ids`, with `features` of each."""
    # A prompt may end with <ALTo_Start> (a forced answer prefix); the mask's format counts from there.
    inside, _ = mask_state(last_ids, special)
    inside = inside.reshape(*inside.shape, *(1,) * (generated.ids.ndim - inside.ndim))
    inside = jnp.broadcast_to(inside, (*generated.ids.shape[:-1], 1))
    ids = jnp.concatenate([jnp.where(inside, special.mask_start, special.pad), generated.ids], axis=-1)
    mask = jnp.concatenate([inside, generated.mask], axis=-1)
    masks = parse_masks(ids, mask, special, cfg.tokenizer.num_latent_tokens, max_masks)
    parsed = parse_completion(ids, mask, special, cfg.tokenizer.num_latent_tokens)
    codes, length = masks.codes[..., 0, :].reshape(-1, masks.codes.shape[-1]), masks.length[..., 0].reshape(-1)
    tokenizer = ALTo(cfg.tokenizer), params["tokenizer"]
    logits = apply_module(*tokenizer, codes, length, features, method="decode_codes")
    logits = logits.reshape(*parsed.length.shape, *logits.shape[1:])
    return Segmentation(generated, masks, parsed, logits, image_tokens)


def begin(
    cfg: ModelConfig,
    params: dict,
    prompts: tuple[Array, Array],
    questions: tuple[Array, Array],
    image_tokens: Array,
    generate_cfg: GenerateConfig,
    special: SpecialIds,
    rng: Array,
    controls: Controls,
) -> tuple[Given, State]:
    """`segment` in steps: the first token of each answer; `advance` gives the others, `finish` the masks. Traceable.

    Args:
      prompts: (ids int32[B, P], mask bool[B, P]), the common beginning of the questions about each image.
      cfg, params, questions, image_tokens, generate_cfg, special, rng, controls: as of `segment`.
    """
    with told_precision(cfg.matmul_precision):
        inputs, asked = _inputs(cfg, params, prompts[0], special, image_tokens, questions)
        count = questions[0].shape[1]
        given = generation.arguments(inputs, prompts[1], generate_cfg, special, rng, count, None, controls, asked)
        model = LanguageModel(cfg.need_language_model()), generate_cfg.static(), special, count
        return generation.begin(*model, params["language_model"], *given)


def advance(
    cfg: ModelConfig,
    params: dict,
    given: Given,
    state: State,
    generate_cfg: GenerateConfig,
    special: SpecialIds,
    until: Array,
) -> State:
    """Goes on until each answer is done or has `until` tokens, see `generate.advance`; the rest is as of `begin`."""
    with told_precision(cfg.matmul_precision):
        model = LanguageModel(cfg.need_language_model()), params["language_model"]
        return generation.advance(*model, given, state, generate_cfg.static(), special, until)


def finish(
    cfg: ModelConfig,
    params: dict,
    generated: Generated,
    last_ids: Array,
    features: Array | None,
    image_tokens: Array,
    special: SpecialIds,
    max_masks: int = 1,
) -> Segmentation:
    """The answers [B, G] of `State.generated`.

    Args:
      last_ids: int32[B, G, Q], of the questions. features: float[B, g, g, F] of the images, None: masks without them.
      cfg, params, image_tokens, special, max_masks: as of `segment`.
    """
    batch, count = last_ids.shape[:2]
    generated = jax.tree.map(lambda a: a.reshape(batch, count, *a.shape[1:]) if a.ndim else a, generated)
    if features is not None:
        features = jnp.repeat(features, count, axis=0)
    with told_precision(cfg.matmul_precision):
        return _read(cfg, params, generated, last_ids, features, special, max_masks, image_tokens)
