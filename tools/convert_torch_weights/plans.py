"""What an import will do: sources, rules and configuration, settled from headers alone.

A `Plan` is made before any weight is read; making it finds every key, shape, dtype and configuration field
that does not fit. Besides single checkpoints there are two composite ones: the start of stage 1 (TiTok and
SAM) and of stage 2 (InternVL and ALTo).
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
from pathlib import Path
import re
from typing import Any

import ml_dtypes
import numpy as np

from alto_jax.config import build
from alto_jax.mllm.alto_llm import ModelConfig

from . import configs_from_torch, mapping, rules, text
from .rules import MappingError, Table
from .sources import Source, is_float

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
PREFIXES = {"alto": "tokenizer/", "titok": "tokenizer/", "sam": "tokenizer/sam_encoder/", "internvit": "vision/",
            "internlm2": "language_model/", "qwen2": "language_model/"}  # fmt: skip


class PlanError(MappingError):
    """Sources that do not fit the model; `problems` are all of them, the message names the first ones."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        super().__init__("; ".join(problems[:8]) + more)


@dataclasses.dataclass(frozen=True)
class Part:
    """One source and the rules that place its tensors.

    kept: key of a table whose rows change → bool[new rows], True: the source's row; False: the mean of all its rows.
    """

    source: Source
    table: Table
    kept: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def shape(self, key: str) -> tuple[int, ...]:
        shape = self.source.entries[key].shape
        return (len(self.kept[key]), *shape[1:]) if key in self.kept else shape


@dataclasses.dataclass(frozen=True)
class Plan:
    """What an import will do.

    kind: of the result. parts: the sources. values: plain nested ModelConfig values (of the parts that
    there are). shapes: path → (shape, dtype) of every parameter written. fresh: path → why it is
    initialised and not read. dtype: what tensors become, None: as they are. vocabulary: the tokenizer, if it was
    needed for the plan.
    """

    kind: str
    parts: Sequence[Part]
    values: dict[str, Any]
    shapes: dict[str, tuple[tuple[int, ...], np.dtype]]
    fresh: dict[str, str]
    dtype: np.dtype | None
    vocabulary: text.Vocabulary | None = None

    @property
    def model(self) -> ModelConfig | None:
        """The model's configuration; None if the source is only a part of a model."""
        complete = self.kind == "alto" or self.kind.startswith("altollm-")
        return build(ModelConfig, self.values, "model") if complete else None

    @property
    def nbytes(self) -> int:
        return sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in self.shapes.values())


def prefixed(table: Table, prefix: str) -> Table:
    """The table with parameters below `prefix`."""
    return Table(
        tuple(rule.at(target=prefix) for rule in table.rules),
        table.ignored,
        tuple((re.escape(prefix) + f"(?:{pattern})", reason) for pattern, reason in table.unfilled),
    )


def mapping_config(kind: str, values: Mapping[str, Any]) -> Any:
    """The config that `mapping.KINDS[kind]` wants, from plain nested values; sizes and forms alone, no dtypes."""
    values, parts = without_dtypes(values), mapping_classes()
    if kind in ("alto", "titok"):
        return build(parts["tokenizer"], values["tokenizer"], "model.tokenizer")
    if kind == "sam":
        return build(parts["sam"], values["tokenizer"]["sam"], "model.tokenizer.sam")
    if kind in PREFIXES:
        name = PREFIXES[kind].rstrip("/")
        return build(parts[name], values[name], f"model.{name}")
    return build(ModelConfig, values, "model")


def without_dtypes(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values without `dtype` and `param_dtype`."""
    kept = {name: value for name, value in values.items() if name not in ("dtype", "param_dtype")}
    return {name: without_dtypes(value) if isinstance(value, Mapping) else value for name, value in kept.items()}


def mapping_classes() -> dict[str, type]:
    """Part of a model → its configuration's class."""
    return {"tokenizer": mapping.TokenizerConfig, "sam": mapping.SamEncoderConfig, "vision": mapping.InternViTConfig,
            "language_model": mapping.LanguageModelConfig}  # fmt: skip


def make_plan(
    source: Source, *, kind: str | None = None, config: Mapping | None = None, dtype: str | None = None
) -> Plan:
    """Plans the import of one checkpoint.

    Args:
      source: the opened checkpoint.
      kind: one of `mapping.KINDS`; None: recognised from the keys.
      config: nested ModelConfig values that the source does not tell; they win.
      dtype: "float32", "bfloat16" or "float16"; None keeps each tensor's.

    Raises:
      MappingError, ConfigError: naming what does not fit.
    """
    kind = kind or mapping.detect_kind(source)
    if kind not in mapping.KINDS:
        raise MappingError(f"--kind: expected one of {', '.join(mapping.KINDS)}, got {kind!r}")
    values = _completed(_values(kind, source), source, config)
    prefix = PREFIXES.get(kind, "")
    part = Part(source, prefixed(mapping.get_table(kind, mapping_config(kind, values)), prefix))
    return finish_plan(kind, [part], values, dtype)


def _values(kind: str, source: Source) -> dict[str, Any]:
    """What config.json and the shapes of a source say."""
    return configs_from_torch.model_values(kind, source.shapes(), source.config, source.config_file)


def _completed(values: dict, source: Source, config: Mapping | None) -> dict:
    """Values with those that an earlier export of ours, and then the user, stated."""
    own = without_dtypes(configs_from_torch.own_values(source.config, values, source.config_file))
    for name, part in own.items():
        # Note: of an official SAM alone there is no tokenizer around it.
        if name in mapping_classes() and part is not None and values[name].keys() != {"sam"}:
            build(mapping_classes()[name], part, f"{source.config_file}: {configs_from_torch.OWN_SECTION}.{name}")
    values = configs_from_torch.merge(values, own)
    values = configs_from_torch.merge(values, config or {}, "--config: ")
    configs_from_torch.check_heads(values)
    return values


def plan_stage1_start(titok: Source, sam: Source, *, config: Mapping | None = None, dtype: str | None = None) -> Plan:
    """Plans the start of stage 1: TiTok's encoder, codebook and decoder, SAM's encoder, the rest initialised.

    Note: the SAM encoder is used in the form of the reference (scaled relative positions), with which stage 1
    trains; `config` may choose the official one.
    """
    values = _values("titok", titok)
    values["tokenizer"]["sam"] = configs_from_torch.sam_values(sam.shapes(), official=False)
    values = _completed(values, titok, config)
    cfg = mapping_config("titok", values)
    parts = [
        Part(titok, prefixed(mapping.get_table("titok", cfg), "tokenizer/")),
        Part(sam, prefixed(mapping.get_table("sam", cfg.sam), "tokenizer/sam_encoder/")),
    ]
    return finish_plan("alto", parts, values, dtype)


def plan_stage2_start(
    internvl: Source, alto: Source, *, tokenizer: Path | None = None, config: Mapping | None = None,
    dtype: str | None = None,
) -> Plan:  # fmt: skip
    """Plans the start of stage 2: InternVL with mask tokens appended to its vocabulary, and an ALTo tokenizer.

    Rows of the input and output embeddings that no token of InternVL owns (the mask tokens', vision tokens that its
    vocabulary lacks, and the padding of a table larger than the vocabulary) are the mean of the table's rows, as
    the reference makes new rows. The table gets as many rows as the tokenizer has tokens.

    Args:
      internvl, alto: the opened checkpoints.
      tokenizer: directory of InternVL's tokenizer; None: all rows are taken as tokens, and mask tokens come after them.
      config, dtype: as in `make_plan`.
    """
    kind = mapping.detect_kind(internvl)
    if not kind.startswith("internvl-"):
        raise MappingError(f"{internvl.path}: expected an InternVL checkpoint, its keys are of the kind {kind!r}")
    found = mapping.detect_kind(alto)
    if found != "alto":
        raise MappingError(f"{alto.path}: expected an ALTo tokenizer, its keys are of the kind {found!r}")
    values = _values(kind, internvl) | _values("alto", alto)
    old, num_codes = values["language_model"]["vocab_size"], values["tokenizer"]["codebook_size"]
    vocabulary = None if tokenizer is None else text.read(tokenizer, num_codes=num_codes)
    values["language_model"]["vocab_size"] = old + 2 + num_codes if vocabulary is None else vocabulary.size
    values = _completed(values, alto, config)
    cfg = build(ModelConfig, values, "model")
    kept = np.zeros(cfg.language_model.vocab_size, bool)
    if vocabulary is None:
        kept[:old] = True
    else:
        vocabulary.check_rows(len(kept))
        kept[[index for index in vocabulary.source_ids if index < old]] = True
    tables = ("tok_embeddings.weight", "embed_tokens.weight", "output.weight", "lm_head.weight")
    parts = [
        Part(internvl, mapping.get_table(kind, cfg), {key: kept for key in internvl if key.endswith(tables)}),
        Part(alto, prefixed(mapping.get_table("alto", cfg.tokenizer), "tokenizer/")),
    ]
    plan = finish_plan("altollm-" + kind.rpartition("-")[2], parts, values, dtype)
    return dataclasses.replace(plan, vocabulary=vocabulary)


def finish_plan(kind: str, parts: Sequence[Part], values: dict[str, Any], dtype: str | None) -> Plan:
    """Checks the headers of all parts against their tables and settles every parameter's dtype."""
    target = None if dtype is None else DTYPES[dtype]
    shapes: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    problems: list[str] = []
    for part in parts:
        used, full = part.table.source_keys(), part.table.target_shapes()
        problems += [f"missing in the source: {key}" for key in sorted(used - part.source.keys())]
        unknown = sorted(key for key in part.source.keys() - used if part.table.ignored_reason(key) is None)
        problems += [f"not known in the source: {key}" for key in unknown]
        for rule in part.table.rules:
            keys = [(key, shape) for row in rule.rows() for key, (_, shape) in zip(rule.keys(row), rule.sources)]
            keys = [(key, shape) for key, shape in keys if key in part.source]
            problems += _problems(part, rule, keys, target)
            if not problems:
                for path, _ in rule.targets:
                    shapes[path] = (full[path], target or part.source.entries[keys[0][0]].dtype)
    if problems:
        raise PlanError(problems)
    values = _with_dtypes(values, shapes)
    fresh: dict[str, str] = {}
    if kind == "alto" or kind.startswith("altollm-"):
        wanted = mapping.parameter_shapes(kind, mapping_config(kind, values))
        wanted = {PREFIXES.get(kind, "") + path: shape for path, shape in wanted.items()}
        reasons = [pair for part in parts for pair in part.table.unfilled]
        for path in wanted.keys() - shapes.keys():
            reason = next((reason for pattern, reason in reasons if re.fullmatch(pattern, path)), None)
            if reason is None:
                raise MappingError(f"parameters that no source fills: {path}")
            fresh[path] = reason
            shapes[path] = (wanted[path], target or DTYPES["float32"])
    return Plan(kind, parts, values, shapes, fresh, target)


def _problems(part: Part, rule: rules.Rule, keys: list, target: np.dtype | None) -> Iterator[str]:
    """What does not fit between the headers and a rule."""
    dtypes = {}
    for key, shape in keys:
        entry, found = part.source.entries[key], part.shape(key)
        if len(found) != len(shape) or any(want not in (None, got) for want, got in zip(shape, found)):
            yield f"{key}: expected shape {shape}, got {found}"
        dtypes.setdefault(entry.dtype, key)
    if not rule.targets:
        return
    for dtype, key in dtypes.items():
        if not is_float(dtype):
            yield f"{key}: expected floating-point numbers, got {dtype}"
        elif target is None and dtype not in DTYPES.values():
            yield f"{key}: has dtype {dtype}; choose what it becomes: --dtype {'|'.join(DTYPES)}"
    if target is None and len(dtypes) > 1:
        found = ", ".join(f"{key} {dtype}" for dtype, key in dtypes.items())
        path = rule.targets[0][0]
        yield f"dtypes differ within the parameter {path}: {found}; make them one: --dtype {'|'.join(DTYPES)}"


def _with_dtypes(values: dict[str, Any], shapes: Mapping) -> dict[str, Any]:
    """Sets `dtype` and `param_dtype` of each part of the model to the (widest) dtype of its tensors."""

    def widest(prefix: str) -> str:
        found = {dtype for path, (_, dtype) in shapes.items() if path.startswith(prefix)}
        return "bfloat16" if found == {DTYPES["bfloat16"]} else "float32"

    changes: dict[str, Any] = {}
    for prefix in ("vision", "language_model", "tokenizer", "tokenizer/sam", "tokenizer/pixel_decoder"):
        node, target, names = values, changes, prefix.split("/")
        for name in names:
            node = (node or {}).get(name)
            target = target.setdefault(name, {}) if node is not None else target
        if node is not None:
            path = {"tokenizer/sam": "tokenizer/sam_encoder/"}.get(prefix, prefix + "/")
            target |= {key: widest(path) for key in ("dtype", "param_dtype") if key not in node}
    return configs_from_torch.merge(values, changes)
