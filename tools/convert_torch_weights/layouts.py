"""Names of tensors as users' files have them → the names of the reference.

Training code wraps a model and saves the wrappers' names with it (`module.`, `_orig_mod.`, `base_model.model.`, …);
Hugging Face's own InternVL (`InternVLForConditionalGeneration`, the repositories that end in -hf) has other names than
the reference's `InternVLChatModel`, and separate q, k and v in the vision tower. What is left after this module has
the reference's names alone.
"""

from collections.abc import Iterable, Mapping
import re

import numpy as np

from .files import Entry, SourceError

# Segments that a wrapper adds, wherever it stands: data-parallel and FSDP wrappers, torch.compile, PEFT.
_WRAPPERS = re.compile(
    r"(^|\.)(?:(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_model\.model|base_layer)\.)+"
)
# One key that every checkpoint of a kind has: what stands before it stands before all of them.
_HF_ANCHOR = "vision_tower.embeddings.cls_token"
_ANCHORS = ("vision_model.embeddings.class_embedding", _HF_ANCHOR, "latent_tokens", "image_encoder.pos_embed",
            "model.tok_embeddings.weight", "model.embed_tokens.weight", "embeddings.class_embedding")  # fmt: skip
_BARE_LANGUAGE = ("tok_embeddings.weight", "embed_tokens.weight")

_HF_PARTS = (
    (r"(?:model\.)*vision_tower\.", "vision_model."),
    (r"(?:model\.)*multi_modal_projector\.layer_norm\.", "mlp1.0."),
    (r"(?:model\.)*multi_modal_projector\.linear_1\.", "mlp1.1."),
    (r"(?:model\.)*multi_modal_projector\.linear_2\.", "mlp1.3."),
    (r"(?:model\.)*language_model\.lm_head\.", "language_model.lm_head."),
    (r"(?:model\.)*language_model\.(?:model\.)?", "language_model.model."),
    (r"(?:model\.)*lm_head\.", "language_model.lm_head."),
)
_HF_VISION = (
    (r"embeddings\.cls_token", "embeddings.class_embedding"),
    (r"embeddings\.position_embeddings", "embeddings.position_embedding"),
    (r"embeddings\.patch_embeddings\.projection\.", "embeddings.patch_embedding."),
    (r"encoder\.layer\.(\d+)\.", r"encoder.layers.\1."),
    (r"\.lambda_([12])", r".ls\1"),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.projection_layer\.", ".attn.proj."),
    (r"\.attention\.", ".attn."),
)
_SEPARATE = re.compile(r"(vision_model\..*\.attn\.)([qkv])_proj\.(weight|bias)")


def unwrapped(key: str) -> str:
    """A key without the segments of wrappers."""
    return _WRAPPERS.sub(r"\1", key)


def from_hf(key: str) -> str:
    """The reference's name of a tensor (or module) of Hugging Face's own InternVL."""
    for pattern, name in _HF_PARTS:
        if found := re.match(pattern, key):
            key = name + key[found.end() :]
            break
    if key.startswith("vision_model."):
        for pattern, name in _HF_VISION:
            key = re.sub(pattern, name, key)
    return key


def renamed(entries: Mapping[str, Entry]) -> tuple[dict[str, Entry], list[str]]:
    """(reference's name → Entry, what was done in words); q, k and v of the vision tower are still apart.

    Raises:
      SourceError: two tensors would have one name.
    """
    names, notes = {key: unwrapped(key) for key in entries}, []
    if changed := sum(old != new for old, new in names.items()):
        notes.append(f"names: {changed} of {len(names)} keys lose the segments of wrappers (module., _orig_mod., …)")
    prefix = _prefix(names.values())
    if prefix:
        names = {old: new.removeprefix(prefix) for old, new in names.items()}
        notes.append(f"names: the keys lose the prefix {prefix}")
    found = set(names.values())
    if any(_HF_ANCHOR in name for name in found):
        names = {old: from_hf(new) for old, new in names.items()}
        notes.append("names: of Hugging Face's own InternVL, taken as the reference's")
    elif not any("." + bare in name for name in found for bare in _BARE_LANGUAGE) and found & set(_BARE_LANGUAGE):
        own = re.compile(r"(tok_embeddings|embed_tokens|layers|norm)\.")
        names = {old: f"model.{new}" if own.match(new) else new for old, new in names.items()}
        notes.append("names: of a language model without its head; the keys get the prefix model.")
    out: dict[str, Entry] = {}
    for old, new in names.items():
        if new in out:
            twin = next(other for other in names if names[other] == new)
            raise SourceError(f"{entries[old].file}: {twin} and {old} would both be {new}; keep one of them")
        out[new] = entries[old]
    return out, notes


def _prefix(names: Iterable[str]) -> str:
    """What stands before every key of the checkpoint; "" if nothing does."""
    names = list(names)
    is_whole = any("language_model." in name for name in names)
    for anchor in _ANCHORS:
        if anchor == _ANCHORS[0] and not is_whole:
            continue  # Note: a vision tower alone.
        found = min((n for n in names if n == anchor or n.endswith("." + anchor)), key=len, default=None)
        if found is None:
            continue
        prefix = found[: -len(anchor)]
        if anchor == _HF_ANCHOR:
            # Note: the newer form has `model.` before all parts but the head; `from_hf` takes it off.
            prefix = prefix.removesuffix("model.")
        # Note: a part of a model that another kind is the whole of (`sam.` in ALTo) stands before fewer keys.
        if sum(name.startswith(prefix) for name in names) >= 0.9 * len(names):
            return prefix
    return ""


def joined(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """q, k and v of a vision tower become one `qkv`, where all three are there."""
    out, done = {}, set()
    for key, entry in entries.items():
        found = _SEPARATE.fullmatch(key)
        trio = [f"{found[1]}{letter}_proj.{found[3]}" for letter in "qkv"] if found else []
        if not trio or not all(name in entries and entries[name].shape[1:] == entry.shape[1:] for name in trio):
            out[key] = entry
        elif key not in done:
            out[f"{found[1]}qkv.{found[3]}"] = _stacked([entries[name] for name in trio])
            done |= set(trio)
    return out


def _stacked(parts: list[Entry]) -> Entry:
    """The entries one below the other."""
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    dtype = parts[0].dtype if len({part.dtype for part in parts}) == 1 else np.dtype(np.float32)
    load = lambda: np.concatenate([part.load().astype(dtype, copy=False) for part in parts])
    return Entry(shape, dtype, parts[0].file, load)
