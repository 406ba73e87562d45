"""PyTorch checkpoint → alto_jax checkpoint, one tensor at a time.

`write` carries out a `Plan`: it makes a directory with the layout of a run's: `checkpoints/0`,
`config.json`, `tokenizer.json`, and the small files of the source (`torch_files/`), which an export gives
back.
"""

from collections.abc import Callable, Iterator, Mapping
import json
from pathlib import Path
import shutil
from typing import Any

import jax
import numpy as np

from alto_jax.checkpoint import rows
from alto_jax.config import to_dict
from alto_jax.experiment import DataConfig, ExperimentConfig
from alto_jax.lora.origin import TORCH_FILES
from alto_jax.mllm.alto_llm import init_params
from alto_jax.mllm.text import SYSTEM_MESSAGE

from . import rules
from .plans import Part, Plan
from .rules import MappingError
from .sources import Source, has_nonfinite, is_float
from .staging import staged

_KEPT = (".json", ".model", ".txt", ".py", ".jinja", ".md")


class _Prepared(Mapping):
    """A part's tensors with grown tables, cast, and checked for NaN and infinity; reports bytes to `advance`."""

    def __init__(self, part: Part, dtype: np.dtype | None, allow_nonfinite: bool, advance: Callable[[int], None]):
        self._part, self._dtype, self._allow, self._advance = part, dtype, allow_nonfinite, advance

    def __iter__(self) -> Iterator[str]:
        return iter(self._part.source)

    def __len__(self) -> int:
        return len(self._part.source)

    def __getitem__(self, key: str) -> np.ndarray:
        array = self._part.source[key]
        self._advance(array.nbytes)
        if not is_float(array.dtype):
            return array
        if self._dtype is not None and array.dtype != self._dtype:
            with np.errstate(over="ignore"):
                array = array.astype(self._dtype)
        if not self._allow and has_nonfinite(array):
            cast = f" as {self._dtype}" if self._dtype is not None else ""
            raise MappingError(f"{key}: holds NaN or infinity{cast}; take it all the same with --allow-nonfinite")
        return _regrown(array, self._part.kept[key]) if key in self._part.kept else array


def _regrown(table: np.ndarray, is_kept: np.ndarray) -> np.ndarray:
    """A table of `len(is_kept)` rows: those of `table` where True, elsewhere the mean of all its rows."""
    total = np.zeros(table.shape[1:], np.float64)
    for start in range(0, len(table), 4096):
        total += table[start : start + 4096].astype(np.float64).sum(axis=0)
    grown = np.empty((len(is_kept), *table.shape[1:]), table.dtype)
    grown[...] = (total / len(table)).astype(np.float32).astype(table.dtype)
    kept = np.flatnonzero(is_kept)
    grown[kept] = table[kept]
    return grown


def write(
    plan: Plan,
    out: Path,
    *,
    allow_nonfinite: bool = False,
    advance: Callable[[int], None] = lambda nbytes: None,
    tokenizer: Callable[[Path], None] | None = None,
    seed: int = 0,
) -> None:
    """Writes the checkpoint, all or nothing.

    Args:
      plan: from `make_plan` or a composite one.
      out: the directory to make; must not exist.
      allow_nonfinite: accept NaN and infinity.
      advance: called with the number of source bytes read since the last call.
      tokenizer: writes `tokenizer.json` into a directory, or None.
      seed: of the parameters that no source holds.
    """

    def fill(sinks: Mapping[str, Any]) -> None:
        for part in plan.parts:
            tensors = _Prepared(part, plan.dtype, allow_nonfinite, advance)
            rules.import_tensors(part.table, tensors, lambda path, shape, dtype: _Contiguous(sinks[path]))
        for path, value in _initialised(plan, seed).items():
            sinks[path][...] = np.asarray(value).astype(plan.shapes[path][1])

    with staged(out, nbytes=int(1.01 * plan.nbytes)) as folder:
        if tokenizer is not None:
            tokenizer(folder)
        is_mllm = "language_model" in plan.values
        system = SYSTEM_MESSAGE if is_mllm else None
        stage = "stage2" if is_mllm else "stage1"
        model = plan.values if plan.model is None else to_dict(plan.model)
        experiment = {"stage": stage, "kind": plan.kind, "model": model}
        if plan.model is not None:
            experiment = to_dict(ExperimentConfig(stage=stage, model=plan.model, data=DataConfig(system=system)))
        (folder / "config.json").write_text(json.dumps(experiment, indent=2) + "\n")
        keep_files(plan.parts[0].source, folder / TORCH_FILES)
        meta = {"stage": stage, "model": model, "data": {"system": system}, "kind": plan.kind, "step": 0}
        rows.save_params(folder, plan.shapes, fill, meta)


class _Contiguous:
    """Hands arrays to a sink in C order."""

    def __init__(self, sink: Any):
        self._sink, self.dtype = sink, sink.dtype

    def __setitem__(self, index: Any, value: np.ndarray) -> None:
        self._sink[index] = rules.contiguous(value)


def _initialised(plan: Plan, seed: int) -> dict[str, Any]:
    """Fresh values of the parameters that no source holds (nothing else is computed)."""
    if not plan.fresh:
        return {}
    cfg = plan.model
    return jax.jit(lambda key: {p: v for p, v in rules.flatten(init_params(cfg, key)).items() if p in plan.fresh})(
        jax.random.key(seed)
    )


def keep_files(source: Source, folder: Path) -> None:
    """Keeps the small files beside the weights (configuration, tokenizer, remote code) for an export."""
    if not source.path.is_dir():
        return
    for file in sorted(source.directory.iterdir()):
        is_small = file.suffix in _KEPT and not file.name.startswith(".") and not file.name.endswith(".index.json")
        if file.is_file() and is_small:
            folder.mkdir(exist_ok=True)
            shutil.copyfile(file, folder / file.name)
