"""Which PyTorch tensor is which parameter: one table of rules per kind of checkpoint.

`KINDS` names the kinds, `detect_kind` recognises one from its keys, and `import_state_dict` and
`export_params` apply its table in the two directions. Key names: reference/NUMERICS.md §9.
"""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alto_jax.mllm.intern_vit import InternViT, InternViTConfig, Projector
from alto_jax.mllm.language_model import LanguageModel, LanguageModelConfig
from alto_jax.tokenizer.alto import ALTo, TokenizerConfig
from alto_jax.tokenizer.sam_encoder import SamEncoder, SamEncoderConfig

from . import mllm_rules, rules, tokenizer_rules
from .rules import MappingError, Table

LANGUAGE_RULES = {"internlm2": mllm_rules.internlm2_rules, "qwen2": mllm_rules.qwen2_rules}
_BUFFERS = (
    (r"(.*\.)?rotary_emb\.inv_freq", "computed from the configuration"),
    (r"(.*\.)?position_ids", "computed from the configuration"),
)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of checkpoint.

    Attributes:
      table: config → the rules.
      abstract: config → nested shapes of the parameters that the model has.
      config: what the config must be, for messages and readers.
    """

    table: Callable[[Any], Table]
    abstract: Callable[[Any], dict]
    config: str


def _abstract(module: Any, *args: Any, method: str = "__call__") -> dict:
    """The parameter tree of a module as shapes, without computing anything."""
    return jax.tree.map(lambda leaf: leaf, _traced(module, args, method))  # the caller's own


@functools.lru_cache(maxsize=32)
def _traced(module: Any, args: tuple, method: str) -> dict:
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in args]
    return jax.eval_shape(functools.partial(module.init, method=method), jax.random.key(0), *shapes)["params"]


def abstract_tokenizer(cfg: TokenizerConfig) -> dict:
    """Shapes of the mask tokenizer's parameters."""
    image, mask = (1, cfg.image_size, cfg.image_size, 3), (1, cfg.mask_size, cfg.mask_size)
    return _abstract(ALTo(cfg), (mask, jnp.float32), (image, jnp.uint8))


def abstract_sam(cfg: SamEncoderConfig) -> dict:
    """Shapes of the SAM encoder's parameters."""
    return _abstract(SamEncoder(cfg), ((1, cfg.image_size, cfg.image_size, 3), jnp.float32))


def abstract_vision(cfg: InternViTConfig) -> dict:
    """Shapes of InternViT's parameters; all layers, whatever select_layer says."""
    cfg = dataclasses.replace(cfg, select_layer=-1)
    return _abstract(InternViT(cfg), ((1, cfg.image_size, cfg.image_size, 3), jnp.float32))


def abstract_language(cfg: LanguageModelConfig) -> dict:
    """Shapes of the language model's parameters."""
    return _abstract(LanguageModel(cfg), ((1, 2), jnp.int32), method="forward")


def abstract_mllm(cfg: Any, with_tokenizer: bool) -> dict:
    """Shapes of the multimodal model's parameters; `cfg` has vision, language_model and tokenizer."""
    types = {"dtype": jnp.dtype(cfg.language_model.dtype), "param_dtype": jnp.dtype(cfg.language_model.param_dtype)}
    merged = (1, 1, 4 * cfg.vision.embed_dim)
    tree = {
        "vision": abstract_vision(cfg.vision),
        "projector": _abstract(Projector(cfg.language_model.embed_dim, **types), (merged, jnp.float32)),
        "language_model": abstract_language(cfg.language_model),
    }
    return {**tree, "tokenizer": abstract_tokenizer(cfg.tokenizer)} if with_tokenizer else tree


def _language_table(family: str, cfg: LanguageModelConfig) -> Table:
    ignored = _BUFFERS
    if cfg.tie_embeddings:
        ignored += ((r"output\.weight|lm_head\.weight", "the configuration ties it to the embedding"),)
    return Table(tuple(LANGUAGE_RULES[family](cfg)), ignored)


def _vision_table(cfg: InternViTConfig) -> Table:
    mask_token = (r"embeddings\.mask_token", "used in pretraining on masked patches only")
    return Table(tuple(mllm_rules.vision_rules(cfg)), (*_BUFFERS, mask_token))


def _mllm_table(family: str, with_tokenizer: bool, cfg: Any) -> Table:
    projector = mllm_rules.projector_rules(cfg.vision.embed_dim, cfg.language_model.embed_dim)
    parts = [
        ("vision_model.", "vision/", _vision_table(cfg.vision)),
        ("mlp1.", "projector/", Table(tuple(projector))),
        ("language_model.", "language_model/", _language_table(family, cfg.language_model)),
    ]
    if with_tokenizer:
        parts.append(("mask_decoder.", "tokenizer/", tokenizer_rules.alto_table(cfg.tokenizer)))
    return Table(
        tuple(rule.at(source, target) for source, target, table in parts for rule in table.rules),
        tuple((rf"{source[:-1]}\.(?:{p})", reason) for source, _, table in parts for p, reason in table.ignored),
    )


KINDS: dict[str, Kind] = {
    "alto": Kind(tokenizer_rules.alto_table, abstract_tokenizer, "TokenizerConfig"),
    "titok": Kind(tokenizer_rules.titok_table, abstract_tokenizer, "TokenizerConfig"),
    "sam": Kind(tokenizer_rules.sam_table, abstract_sam, "SamEncoderConfig"),
    "internvit": Kind(_vision_table, abstract_vision, "InternViTConfig"),
}
for _family in LANGUAGE_RULES:
    KINDS[_family] = Kind(functools.partial(_language_table, _family), abstract_language, "LanguageModelConfig")
    for _name, _with_tokenizer in (("internvl", False), ("altollm", True)):
        KINDS[f"{_name}-{_family}"] = Kind(
            functools.partial(_mllm_table, _family, _with_tokenizer),
            functools.partial(abstract_mllm, with_tokenizer=_with_tokenizer),
            "a config with vision, language_model" + (", tokenizer" if _with_tokenizer else ""),
        )


def detect_kind(keys: Iterable[str]) -> str:
    """Recognises the kind of a checkpoint from its keys; raises MappingError if it is none of `KINDS`."""
    keys = set(keys)

    def has(*parts):
        return any(all(part in key for part in parts) for key in keys)

    family = "internlm2" if has(".attention.wqkv.") else "qwen2" if has(".mlp.gate_proj.") else None
    if has("language_model.") and family:
        return ("altollm-" if has("mask_decoder.encoder.") else "internvl-") + family
    if family:
        return family
    if any(key.startswith("image_encoder.") for key in keys):
        return "sam"
    if has("encoder.length_encoder."):
        return "alto"
    if "latent_tokens" in keys:
        return "titok"
    if has("embeddings.patch_embedding."):
        return "internvit"
    raise MappingError(
        f"the keys belong to no known kind of checkpoint ({', '.join(KINDS)}); first: {sorted(keys)[:3]}"
    )


@functools.lru_cache(maxsize=64)
def parameter_shapes(kind: str, config: Any) -> dict[str, tuple[int, ...]]:
    """Path → shape of every parameter that the model has."""
    if kind not in KINDS:
        raise MappingError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    return {path: leaf.shape for path, leaf in rules.flatten(KINDS[kind].abstract(config)).items()}


def get_table(kind: str, config: Any) -> Table:
    """The rules of a kind for a config, checked to fill the model's parameters completely."""
    shapes = parameter_shapes(kind, config)
    table = KINDS[kind].table(config)
    rules.check_filled(table, shapes)
    return table


def import_state_dict(
    kind: str,
    tensors: Mapping[str, np.ndarray],
    config: Any,
    allocate: Callable[[str, tuple, Any], np.ndarray] | None = None,
) -> dict[str, Any]:
    """Turns a PyTorch state dict into our parameters.

    Args:
      kind: one of `KINDS`.
      tensors: key → array; may load lazily, each is read once.
      config: as `KINDS[kind].config` says.
      allocate: (path, shape, dtype) → array to write a parameter into (default: in memory).

    Returns:
      Nested parameters as numpy arrays in the source's dtype. Kind "titok" fills a part of the tree
      (`get_table(kind, config).unfilled`).

    Raises:
      MappingError: a key, shape or dtype that does not fit, named.
    """
    return rules.unflatten(rules.import_tensors(get_table(kind, config), tensors, allocate))


def export_params(kind: str, params: Mapping[str, Any], config: Any) -> dict[str, np.ndarray]:
    """The inverse of `import_state_dict`: nested parameters → PyTorch key → array.

    Ignored source keys, and the rows cropped from TiTok's codebook, do not come back.
    """
    return dict(rules.export_tensors(get_table(kind, config), rules.flatten(params)))
