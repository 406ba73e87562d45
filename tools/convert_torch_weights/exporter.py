"""alto_jax checkpoint → the layout of the PyTorch reference.

A whole model becomes a Hugging Face directory: sharded safetensors with an index, config.json, the
tokenizer's files. A mask tokenizer alone becomes `alto.safetensors` (and `alto.pth` where torch is
installed). One tensor is in memory at a time.
"""

from collections.abc import Callable, Iterable, Mapping
import json
import math
from pathlib import Path
import re
import shutil
from typing import Any

import numpy as np

from alto_jax.checkpoint import rows, runs
from alto_jax.config import ConfigError, build
from alto_jax.lora.origin import find_torch_files
from alto_jax.mllm.alto_llm import ModelConfig
from alto_jax.mllm.text import MASK_TOKENS, VISION_TOKENS

from . import configs_for_torch, mapping, rules, text
from .files import read_json
from .plans import PREFIXES, mapping_config, prefixed
from .safetensors_files import DTYPE_NAMES
from .staging import staged

# Parameters of our runs that are no part of a model.
_REFERENCE_POLICY = "reference/"
_TOKENS = re.compile("|".join([*map(re.escape, (*VISION_TOKENS, *MASK_TOKENS)), r"<TOK_\d+>"]))
_SINGLE_FILES = {"alto": "alto", "titok": "titok", "sam": "sam"}


def export(
    directory: Path,
    out: Path,
    *,
    max_shard_bytes: int = 5 * 10**9,
    files: Path | None = None,
    force: bool = False,
    step: int | None = None,
    advance: Callable[[int], None] = lambda nbytes: None,
    begin: Callable[[int], None] = lambda nbytes: None,
) -> str:
    """Exports a checkpoint, all or nothing.

    Args:
      directory: a converted checkpoint or a run's directory.
      out: the directory to make; must not exist.
      max_shard_bytes: size of a shard at most (a larger tensor has its own).
      files: a directory with config.json and tokenizer files to take over; None: those of the checkpoint that
        the run started from.
      force: export a model whose forms the PyTorch code does not have, too.
      step: of a run's checkpoints; None: the newest.
      advance, begin: progress: called with bytes written, and before that with their total.

    Returns:
      The kind that was exported.

    Raises:
      ConfigError: adapters alone, or a model that the PyTorch code does not have.
    """
    root, _ = runs.find_run(directory)
    meta = runs.load_meta(root, step)
    require_whole(directory, meta)
    params = {p: v for p, v in rows.open_params(root, step).items() if not p.startswith(_REFERENCE_POLICY)}
    kind = meta.get("kind") or kind_of(meta["model"], params)
    if not force:
        configs_for_torch.check_forms(kind, meta["model"])
    prefix = PREFIXES.get(kind, "")
    table = prefixed(mapping.get_table(kind, mapping_config(kind, meta["model"])), prefix)
    headers = tensor_headers(table, params)
    total = sum(nbytes for _, _, nbytes in headers.values())
    begin(total)
    kept = files or find_torch_files(root)
    single = _SINGLE_FILES.get(kind)
    with staged(out, nbytes=int(1.01 * total)) as folder:
        tensors = rules.export_tensors(table, params)
        if single:
            write_safetensors(folder / f"{single}.safetensors", headers, tensors, advance)
        else:
            write_shards(folder, headers, tensors, max_shard_bytes, advance)
        _copy_files(kept, root, folder)
        config = configs_for_torch.torch_config(kind, meta["model"], _kept_config(kept), headers)
        (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        if kind == "alto":
            _write_pickle(folder / "alto.pth", folder / "alto.safetensors")
    return kind


def kind_of(model: Mapping[str, Any], params: Iterable[str]) -> str:
    """The kind of a run's checkpoint, from its model and its parameters."""
    parts = {path.split("/")[0] for path in params}
    if parts == {"tokenizer"}:
        return "alto"
    family = "qwen2" if build(ModelConfig, model, "model").language_model.qkv_bias else "internlm2"
    if parts == {"tokenizer", "vision", "projector", "language_model"}:
        return f"altollm-{family}"
    raise ConfigError(f"checkpoint: expected the parts of a model, got {sorted(parts)}")


def require_whole(directory: Path, meta: Mapping[str, Any]) -> None:
    """Raises ConfigError if a checkpoint holds adapters alone."""
    if meta.get("lora"):
        raise ConfigError(
            f"{directory}: a run of adapters, without the model that they belong to; make one checkpoint of both first:"
            f" python -m alto_jax.lora merge {directory} OUT"
        )


def _kept_config(kept: Path | None) -> dict[str, Any]:
    return read_json(kept / "config.json") if kept else {}


def _copy_files(kept: Path | None, root: Path, folder: Path) -> None:
    """Copies the kept files; without any, the checkpoint's own tokenizer.json."""
    for file in sorted(kept.iterdir()) if kept else ():
        if (
            file.is_file()
            and file.suffix not in (".safetensors", ".bin", ".pth")
            and not file.name.endswith(".index.json")
        ):
            shutil.copyfile(file, folder / file.name)
    own = root / "tokenizer.json"
    if own.is_file():
        # Note: the run's own vocabulary is the one that its embedding table has rows for.
        shutil.copyfile(own, folder / "tokenizer.json")
        _name_tokens(folder)


def _name_tokens(folder: Path) -> None:
    """Mask and vision tokens that tokenizer.json alone has get their names where the PyTorch code reads them, too."""
    files = {name: folder / name for name in ("tokenizer_config.json", "added_tokens.json")}
    if not any(file.is_file() for file in files.values()):
        return
    known, added = text.added_tokens(folder), read_json(folder / "tokenizer.json").get("added_tokens") or ()
    new = [t for t in added if _TOKENS.fullmatch(t["content"]) and t["id"] not in known]
    config, ids = (read_json(file) for file in files.values())
    if new and "added_tokens_decoder" in config:
        config["added_tokens_decoder"] |= {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in new}
        files["tokenizer_config.json"].write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    if new and (ids or "added_tokens_decoder" not in config):
        ids |= {t["content"]: t["id"] for t in new}
        files["added_tokens.json"].write_text(json.dumps(ids, indent=2, ensure_ascii=False) + "\n")


def tensor_headers(table: rules.Table, params: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], np.dtype, int]]:
    """Key → (shape, dtype, bytes) of every tensor that an export gives, in its order, without reading any."""
    headers = {}
    for rule in table.rules:
        dtype = next((params[path].dtype for path, _ in rule.targets if path in params), np.dtype(bool))
        for row in rule.rows():
            for key, (_, shape) in zip(rule.keys(row), rule.sources):
                if None in shape:
                    shape = tuple(params[rule.targets[0][0]].shape)
                headers[key] = (shape, dtype, math.prod(shape) * dtype.itemsize)
    return headers


def write_safetensors(
    file: Path, headers: Mapping[str, tuple], tensors: Iterable[tuple[str, np.ndarray]], advance: Callable[[int], None]
) -> None:
    """Writes one safetensors file; `tensors` gives (at least) those of `headers` next, in their order."""
    description, end = {"__metadata__": {"format": "pt"}}, 0
    for key, (shape, dtype, nbytes) in headers.items():
        description[key] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    head = json.dumps(description, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    source = iter(tensors)
    with file.open("wb", buffering=0) as stream:
        stream.write(len(head).to_bytes(8, "little") + head)
        for expected, (shape, dtype, nbytes) in headers.items():
            key, array = next(source)
            if key != expected or array.shape != shape or array.dtype != dtype:
                raise rules.MappingError(f"{key}: expected {expected} {shape} {dtype}, got {array.shape} {array.dtype}")
            view, done = memoryview(array.reshape(-1).view(np.uint8)), 0
            while done < nbytes:
                done += stream.write(view[done:])
            advance(nbytes)


def write_shards(folder: Path, headers: dict, tensors: Iterable, max_shard_bytes: int, advance: Callable) -> None:
    """Hugging Face's naming: model-00001-of-0000N.safetensors and model.safetensors.index.json."""
    shards: list[dict[str, tuple]] = [{}]
    for key, header in headers.items():
        if shards[-1] and sum(h[2] for h in shards[-1].values()) + header[2] > max_shard_bytes:
            shards.append({})
        shards[-1][key] = header
    source, weight_map = iter(tensors), {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard, source, advance)
        weight_map |= dict.fromkeys(shard, name)
    total = sum(header[2] for header in headers.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_pickle(file: Path, safetensors: Path) -> None:
    """The same tensors as a PyTorch pickle, the form of the published tokenizer; nothing without torch."""
    try:
        import torch
    except ImportError:
        return
    from safetensors.torch import load_file

    torch.save(load_file(safetensors), file)
