"""A PEFT adapter beside one of our checkpoints → a run of adapters, as training with `lora.rank` leaves it.

The product B A of every kernel is the adapter's, exactly: adapters that meet in one kernel of ours (k and v; q, k and v
of the vision tower) stand beside each other in a larger rank, adapters of a smaller rank are filled up with zeros.
"""

from collections.abc import Mapping
import dataclasses
import json
from pathlib import Path
import re
import shutil
from typing import Any

import numpy as np

from alto_jax.checkpoint import rows, runs
from alto_jax.config import build, to_dict
from alto_jax.experiment import DataConfig, ExperimentConfig
from alto_jax.lora.adapters import LoraConfig
from alto_jax.mllm.alto_llm import ModelConfig
from alto_jax.mllm.language_model import LanguageModelConfig
from alto_jax.params import kernel_dims

from . import exporter, mapping, mllm_rules, peft
from .files import SourceError
from .plans import mapping_config
from .rules import Rule, Shape, Table
from .staging import staged


@dataclasses.dataclass(frozen=True)
class _Low:
    """A matrix of low rank, b @ a: a float32[rank, in], b float32[out, rank]."""

    a: np.ndarray
    b: np.ndarray


def _below(parts: list[_Low]) -> _Low:
    """Matrices of the same input, one below the other; their ranks stand beside each other."""
    b = np.zeros((sum(len(part.b) for part in parts), sum(len(part.a) for part in parts)), np.float32)
    row, rank = 0, 0
    for part in parts:
        b[row : row + len(part.b), rank : rank + len(part.a)] = part.b
        row, rank = row + len(part.b), rank + len(part.a)
    return _Low(np.concatenate([part.a for part in parts]), b)


def write(base: Path, folder: Path, out: Path) -> str:
    """Writes a run of adapters.

    Args:
      base: the checkpoint that the adapter was trained on, imported.
      folder: the PEFT adapter.
      out: the directory to make; must not exist.

    Returns:
      What was written, in words.

    Raises:
      SourceError: the adapter changes what adapters here cannot, or a module that the base lacks.
    """
    root, _ = runs.find_run(base)
    meta, adapter = runs.load_meta(root), peft.open_adapter(folder)
    exporter.require_whole(base, meta)
    kind = meta.get("kind") or exporter.kind_of(meta["model"], rows.open_params(root))
    if not kind.startswith("altollm-"):
        raise SourceError(f"{base}: expected a whole ALToLLM as the base of adapters, got the kind {kind!r}")
    if adapter.replaced:
        raise _cannot(folder, f"replaces {next(iter(adapter.replaced))} whole")
    lora, arrays = adapter_arrays(adapter, kind, mapping_config(kind, meta["model"]))
    model = build(ModelConfig, meta["model"], f"{root}: model")
    data = DataConfig(system=meta["data"]["system"])
    experiment = ExperimentConfig(stage="stage2", model=model, init_from=str(root), data=data, lora=lora)
    said = {"stage": "stage2", "model": meta["model"], "data": meta["data"], "step": 0, "lora": to_dict(lora)}
    said |= {"base": str(root), "base_identity": runs.identity(root)}

    def fill(sinks: Mapping[str, Any]) -> None:
        for path, sink in sinks.items():
            sink[...] = arrays[path]

    with staged(out, nbytes=sum(array.nbytes for array in arrays.values())) as temporary:
        (temporary / "config.json").write_text(json.dumps(to_dict(experiment), indent=2) + "\n")
        if (root / "tokenizer.json").is_file():
            shutil.copy(root / "tokenizer.json", temporary / "tokenizer.json")
        rows.save_params(temporary, {path: (array.shape, array.dtype) for path, array in arrays.items()}, fill, said)
    return f"adapters of {len(arrays) // 2} kernels, rank {lora.rank}, on {root}"


def _cannot(folder: Path, what: str) -> SourceError:
    return SourceError(
        f"{folder}: {what}, which adapters here cannot; merge it instead: import SOURCE OUT --adapter {folder}"
    )


def adapter_arrays(adapter: peft.Adapter, kind: str, config: Any) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """The adapters in our layout (`alto_jax.lora.adapters`), float32.

    Args:
      adapter: of PEFT. kind: of the base. config: what `mapping.KINDS[kind]` wants.

    Returns:
      (their configuration, path → lora_a or lora_b).
    """
    table = mapping.get_table(kind, config)
    changes = _changes(adapter, table)
    shapes, found = table.target_shapes(), []
    for rule in table.rules:
        for row in rule.rows():
            sources = [(key, shape) for key, (_, shape) in zip(rule.keys(row), rule.sources)]
            if any(key in changes for key, _ in sources):
                low = _below([_low(changes.get(key, {}), shape) for key, shape in sources])
                found.append((rule, row, low))
    rank = max(len(low.a) for *_, low in found)
    arrays: dict[str, np.ndarray] = {}
    for rule, row, low in found:
        a = np.zeros((rank, low.a.shape[1]), np.float32)
        b = np.zeros((len(low.b), rank), np.float32)
        a[: len(low.a)], b[:, : len(low.a)] = low.a, low.b
        for (path, _), value in zip(rule.targets, _outputs(rule, b, config.language_model)):
            lead, inner, outer = kernel_dims(path, shapes[path])
            name, index = path.removesuffix("kernel"), ... if row is None else row
            for part, shape in (("lora_a", (*lead, *inner, rank)), ("lora_b", (*lead, rank, *outer))):
                arrays.setdefault(name + part, np.zeros(shape, np.float32))
            arrays[name + "lora_a"][index] = a.T.reshape(*inner, rank)
            arrays[name + "lora_b"][index] = value.reshape(rank, *outer)
    paths = sorted({path.rpartition("/")[0] + "/kernel" for path in arrays})
    return LoraConfig(rank=rank, alpha=float(rank), targets="^(" + "|".join(map(re.escape, paths)) + ")$"), arrays


def _changes(adapter: peft.Adapter, table: Table) -> dict[str, dict[str, peft.Pair]]:
    """Source key → the adapters of it: {"": one of the whole}, or those of q, k and v."""
    shapes = {key: shape for rule in table.rules for row in rule.rows()
              for key, (_, shape) in zip(rule.keys(row), rule.sources)}  # fmt: skip
    changes: dict[str, dict[str, peft.Pair]] = {}
    for module, pair in adapter.pairs.items():
        key, third = peft.placed(shapes, module, adapter.path)
        if pair.is_embedding or len(shapes[key]) != 2 or "embed" in key:
            raise _cannot(adapter.path, f"adapts {module}, no matrix product")
        rows, columns = shapes[key]
        found = (pair.b.shape[0], pair.a.shape[1])
        if found != (rows if third is None else rows // 3, columns):
            raise SourceError(f"{adapter.path}: {module} adapts a weight of shape {found}, the base's is {shapes[key]}")
        changes.setdefault(key, {})["" if third is None else "qkv"[third]] = pair
    if not changes:
        raise SourceError(f"{adapter.path}: holds no adapters")
    return changes


def _low(pairs: Mapping[str, peft.Pair], shape: Shape) -> _Low:
    """What is added to a source tensor of this shape; of rank 0 if nothing is."""
    none = lambda count: _Low(np.zeros((0, shape[1]), np.float32), np.zeros((count, 0), np.float32))
    if "" in pairs:
        pair = pairs[""]
        return _Low(pair.a.load().astype(np.float32), pair.scale * pair.b.load().astype(np.float32))
    if not pairs:
        return none(shape[0])
    return _below([_low({"": pairs[name]}, shape) if name in pairs else none(shape[0] // 3) for name in "qkv"])


def _outputs(rule: Rule, b: np.ndarray, language: LanguageModelConfig | None) -> tuple[np.ndarray, ...]:
    """b float32[out, rank] of a rule's sources → [rank, out...] of each of its targets."""
    if len(rule.sources) == len(rule.targets) == 1:
        return (b.T,)
    # Note: the language model's rules treat the columns of a weight alike, so that the rank may stand in for the width.
    narrow = dataclasses.replace(language, embed_dim=b.shape[1], head_dim=language.head_width)
    if len(rule.targets) == 2:
        return mllm_rules.packed_wqkv(narrow).forward(b)
    return mllm_rules.key_value(narrow)[0].forward(*np.split(b, 2))
