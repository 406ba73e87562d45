"""PEFT adapters (LoRA): a folder with adapter_config.json and adapter_model.safetensors, or a model saved unmerged.

An adapter says of some modules of its base W' = W + scale * B A (A [rank, in], B [out, rank]), and replaces others
whole (`modules_to_save`, biases). `merged` gives the base's tensors with that applied, in float32, when one is loaded.
"""

from collections.abc import Mapping
import dataclasses
import functools
import math
from pathlib import Path
import re
from typing import Any

import numpy as np

from . import layouts, pickles
from .files import Entry, SourceError, read_json, short
from .safetensors_files import safetensors_entries

CONFIG = "adapter_config.json"
_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_LORA = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.(?!(?:weight|bias)$)[^.]+)?(?:\.weight)?$")
_OTHER = re.compile(r"\.(lora_magnitude_vector|lora_[A-Za-z_]+|ia3_l|oft_\w+|hada_\w+|vera_\w+|prompt_embeddings)\b")
_SAVED = re.compile(r"\.(?:modules_to_save(?:\.[^.]+)?)\.")
_THIRD = re.compile(r"(vision_model\..*\.attn\.)([qkv])_proj$")
# Settings that change what an adapter computes → the value under which it is plain LoRA.
_PLAIN = {"use_dora": False, "lora_bias": False, "fan_in_fan_out": False, "layer_replication": None}


@dataclasses.dataclass(frozen=True)
class Pair:
    """A float[rank, in] and B float[out, rank] of one module; of an embedding [rank, rows] and [width, rank]."""

    a: Entry
    b: Entry
    scale: float
    is_embedding: bool = False

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def delta(self) -> np.ndarray:
        """What is added to the weight, float32."""
        product = self.b.load().astype(np.float32) @ self.a.load().astype(np.float32)
        return np.float32(self.scale) * (product.T if self.is_embedding else product)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """path: its folder, or the model it was found in. pairs: module → Pair. replaced: key → what takes its place."""

    path: Path
    pairs: Mapping[str, Pair]
    replaced: Mapping[str, Entry]

    def describe(self) -> str:
        """One clause for the log."""
        ranks = sorted({pair.rank for pair in self.pairs.values()})
        more = f", {len(self.replaced)} tensors replaced" if self.replaced else ""
        return f"{self.path}: adapters of {len(self.pairs)} modules, rank {', '.join(map(str, ranks)) or '-'}{more}"


def is_adapter(path: Path) -> bool:
    """Whether a path is a PEFT adapter's folder."""
    return path.is_dir() and (path / CONFIG).exists()


def base_of(folder: Path) -> Path:
    """The base that an adapter names, if it is on this machine.

    Raises:
      SourceError: it is not; says how to give it.
    """
    name = read_json(folder / CONFIG).get("base_model_name_or_path")
    for base in (Path(name), folder / name) if isinstance(name, str) and name else ():
        if base.is_dir():
            return base
    raise SourceError(
        f"{folder}: a PEFT adapter, and its base ({CONFIG}: base_model_name_or_path {short(name)}) is no folder here;"
        f" give both: import BASE OUT --adapter {folder}"
    )


def open_adapter(folder: Path) -> Adapter:
    """Opens a PEFT adapter's folder; names of Hugging Face's own InternVL become the reference's.

    Raises:
      FileNotFoundError: no such folder, or a file is missing. SourceError: not LoRA, or of a form that is not read.
    """
    if not is_adapter(folder):
        raise FileNotFoundError(f"{folder}: not a PEFT adapter (no {CONFIG} there)")
    config, where = read_json(folder / CONFIG), folder / CONFIG
    if config.get("peft_type", "LORA") != "LORA":
        raise SourceError(f"{where}: peft_type: expected 'LORA', got {short(config['peft_type'])}")
    for name, plain in _PLAIN.items():
        if config.get(name, plain) not in (plain, None):
            raise SourceError(f"{where}: {name}: expected {plain!r} (what is read), got {short(config[name])}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and re.match(r"(pissa|olora|corda|loftq)(_|$)", start.lower()):
        raise SourceError(
            f"{where}: init_lora_weights: {short(start)} changes the base's own weights too, which this folder does not"
            " hold; merge it with PEFT (merge_and_unload) and import what that saves"
        )
    alpha = _number(config.get("lora_alpha"), where, "lora_alpha")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, Mapping):
        raise SourceError(f"{where}: alpha_pattern: expected a group of fields, got {short(patterns)}")
    patterns = {key: _number(value, where, f"alpha_pattern.{key}") for key, value in patterns.items()}

    def scale(module: str, rank: int) -> float:
        own = next((value for key, value in patterns.items() if _fits(key, module, where)), alpha)
        return own / (math.sqrt(rank) if config.get("use_rslora") else rank)

    file = next((folder / name for name in _FILES if (folder / name).exists()), None)
    if file is None:
        raise FileNotFoundError(f"{folder}: a PEFT adapter without weights ({' or '.join(_FILES)})")
    entries = safetensors_entries(file) if file.suffix == ".safetensors" else pickles.pickle_entries(file)[0]
    entries = {layouts.unwrapped(key): entry for key, entry in entries.items()}
    pairs, rest = _pairs(entries, scale)
    replaced = {layouts.from_hf(_SAVED.sub(".", key)): entry for key, entry in rest.items()}
    named = {layouts.from_hf(module + ".").removesuffix("."): pair for module, pair in pairs.items()}
    return Adapter(folder, named, replaced)


def _number(value: Any, where: Path, field: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e9:
        raise SourceError(f"{where}: {field}: expected a number above 0, got {short(value)}")
    return float(value)


def _fits(pattern: str, module: str, where: Path) -> bool:
    """Whether a key of alpha_pattern means a module, as PEFT reads it."""
    try:
        return re.match(rf"(?:.*\.)?(?:{pattern})$", module) is not None
    except re.error as error:
        raise SourceError(f"{where}: alpha_pattern: {pattern!r} is not a regular expression: {error}") from error


def split_unmerged(
    entries: Mapping[str, Entry], path: Path, config: Mapping[str, Any]
) -> tuple[dict[str, Entry], list[Adapter]]:
    """(the base, [its adapter] or []) of a model that was saved with its adapters beside the weights.

    Note: no file tells their alpha. InternVL's own training code (fields `use_llm_lora`, `use_backbone_lora` of its
    config.json hold the rank) takes twice the rank.

    Raises:
      SourceError: adapters of which nothing tells the alpha.
    """
    if not any(_LORA.fullmatch(key) for key in entries):
        return dict(entries), []
    if not (config.get("use_llm_lora") or config.get("use_backbone_lora")):
        raise SourceError(
            f"{path}: a model with LoRA weights that are not merged, whose alpha no file tells; merge them first"
            " (PEFT: model.merge_and_unload()) and save again, or save the adapter alone and give --adapter"
        )
    pairs, rest = _pairs(entries, lambda module, rank: 2.0)
    replaced = {_SAVED.sub(".", key): entry for key, entry in rest.items() if _SAVED.search(key)}
    base = {key.replace(".original_module.", "."): entry for key, entry in rest.items() if not _SAVED.search(key)}
    return base, [Adapter(path, pairs, replaced)]


def _pairs(entries: Mapping[str, Entry], scale: Any) -> tuple[dict[str, Pair], dict[str, Entry]]:
    """(module → Pair, all other tensors); scale: (module, rank) → factor."""
    found: dict[tuple[str, bool], dict[str, Entry]] = {}
    rest: dict[str, Entry] = {}
    for key, entry in entries.items():
        if match := _LORA.fullmatch(key):
            half = found.setdefault((match[1], bool(match[2])), {})
            if match[3] in half:
                raise SourceError(f"{entry.file}: {match[1]} has several adapters; save one of them alone")
            half[match[3]] = entry
        elif _OTHER.search(key):
            raise SourceError(f"{entry.file}: {key} belongs to an adapter that is not plain LoRA, which is not read")
        else:
            rest[key] = entry
    pairs = {}
    for (module, is_embedding), half in found.items():
        if half.keys() != {"A", "B"}:
            (entry,) = half.values()
            raise SourceError(f"{entry.file}: {module} has only one of lora_A and lora_B")
        a, b = half["A"], half["B"]
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
            raise SourceError(
                f"{a.file}: {module}: expected lora_A [rank, in] and lora_B [out, rank], got {a.shape} and {b.shape}"
            )
        pairs[module] = Pair(a, b, scale(module, a.shape[0]), is_embedding)
    return pairs, rest


def merged(entries: Mapping[str, Entry], adapter: Adapter) -> dict[str, Entry]:
    """The base with an adapter in it, every tensor in the base's dtype.

    Raises:
      SourceError: a module of the adapter that the base lacks, or one of another shape.
    """
    out = dict(entries)
    for key, entry in adapter.replaced.items():
        out[place(out, key, adapter.path)] = entry
    for module, pair in adapter.pairs.items():
        key, part = placed(out, module, adapter.path)
        base, (inner, outer) = out[key], (pair.a.shape[1], pair.b.shape[0])
        wanted = (inner, outer) if pair.is_embedding else (outer if part is None else 3 * outer, inner)
        if base.shape != wanted:
            raise SourceError(f"{adapter.path}: {module} adapts a weight of shape {wanted}, the base's is {base.shape}")
        rows = slice(None) if part is None else slice(part * outer, (part + 1) * outer)
        out[key] = dataclasses.replace(base, load=functools.partial(_sum, base, pair, rows))
    return out


def _sum(base: Entry, pair: Pair, rows: slice) -> np.ndarray:
    weight = base.load().astype(np.float32)
    weight[rows] += pair.delta()
    return weight.astype(base.dtype)


def placed(entries: Mapping[str, Any], module: str, path: Path) -> tuple[str, int | None]:
    """(the base's name of a module's weight, which third of it); q, k and v of a vision tower are one there."""
    third = _THIRD.search(module)
    if third is None or any(name.endswith(f"{module}.weight") for name in entries):
        return place(entries, f"{module}.weight", path), None
    return place(entries, f"{third[1]}qkv.weight", path), "qkv".index(third[2])


def place(entries: Mapping[str, Any], key: str, path: Path) -> str:
    """The base's name of a tensor of an adapter, which may have been trained on a part of the base."""
    if key in entries:
        return key
    found = [name for name in entries if name.endswith("." + key) or key.endswith("." + name)]
    if len(found) != 1:
        what = "nothing" if not found else f"{len(found)} tensors, such as {found[0]}"
        raise SourceError(f"{path}: adapts {key}, of which the base has {what}; is it the base it was trained on?")
    return found[0]
