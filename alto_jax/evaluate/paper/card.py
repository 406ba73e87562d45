"""The card of a model: one Markdown file of its weights, settings, results, figures and data.

In: a checkpoint and the out directories of its evaluations. Everything is read from there; nothing is computed by the
model, and the same results give the same file.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any

import numpy as np

import alto_jax
from alto_jax.checkpoint import rows, runs
from alto_jax.config import ConfigError, build, write_whole
from alto_jax.evaluate import outputs, results, summaries, tables, timing
from alto_jax.mllm.alto_llm import ModelConfig

# What of a run's configuration made its weights what they are, beside the group of its stage.
_GROUPS = ("stage", "seed", "init_from", "tokenizer_from", "optim", "lora")
_TRAIN = ("steps", "batch_size", "accumulate")
_OWN = {"stage0": "sft", "stage1": "tokenizer", "stage1_5": "tokenizer", "stage2": "sft", "stage3": "grpo"}
_NOT_OPTIONS = ("checkpoint", "task", "family", "benchmark", "samples", "data", "left_out", "version")


@dataclasses.dataclass(frozen=True)
class Found:
    """A finished task: where its results lie, their header, what metrics.json says of them, and the times."""

    path: pathlib.Path
    header: Mapping[str, Any]
    summary: Mapping[str, Any]
    times: Mapping[str, Any]


def write(
    out: pathlib.Path,
    checkpoint: str,
    folders: Sequence[str],
    *,
    title: str | None = None,
    step: int | None = None,
) -> None:
    """Writes the card.

    Args:
      out: the Markdown file; its folder is created.
      checkpoint: a run's directory.
      folders: out directories of its evaluations.
      title: of the card; None: the name of the checkpoint's folder.
      step: which checkpoint of the run; None: the newest.

    Raises:
      ConfigError: no results, unfinished ones, those of another checkpoint, or the same task twice.
    """
    if out.suffix != ".md":
        raise ConfigError(f"--out: expected a name that ends in .md, got {out}")
    identity = runs.identity(checkpoint, step)
    found = read(folders, identity)
    title = title or pathlib.Path(checkpoint).absolute().name
    out.parent.mkdir(parents=True, exist_ok=True)
    tasks = {name: one.summary for name, one in found.items()}
    times = {name: one.times for name, one in found.items()}
    parts = [
        f"# {title}\n",
        f"Made from evaluations by `python -m alto_jax.evaluate --card` of alto_jax {alto_jax.__version__}.\n",
        _model(checkpoint, identity, step),
        _settings(pathlib.Path(runs.find_run(checkpoint)[0]) / "config.json", runs.load_meta(checkpoint, step)["step"]),
        _below(tables.markdown(tasks, title)),
        _below(tables.timing_markdown(tasks, times, title)),
        _figures(folders, out),
        _data(found),
    ]  # fmt: skip
    write_whole(out, "\n".join(part for part in parts if part))


def read(folders: Sequence[str], identity: str) -> dict[str, Found]:
    """The finished tasks of all folders by name; see `write` for what it refuses."""
    found: dict[str, Found] = {}
    for folder in folders:
        names = outputs.task_names(pathlib.Path(folder))
        if not names and not list(pathlib.Path(folder).glob("*.png")):
            raise ConfigError(f"--results: {folder} holds no results (results/*.jsonl) and no figures")
        for name in names:
            path = results.result_path(folder, name)
            header = outputs.finished_header(path)
            if identity not in header["checkpoint"]:
                raise ConfigError(f"--results: {path} is of checkpoint {header['checkpoint']!r}, not of {identity!r}")
            if name in found:
                raise ConfigError(f"--results: {found[name].path} and {path} are of the same task")
            summary = summaries.summarise(*results.read_results(path))
            found[name] = Found(path, header, summary, timing.summarise_timing(timing.timing_path(path)))
    if not found:
        raise ConfigError(f"--results: no results in {', '.join(folders)}")
    return found


def weights_hash(checkpoint: str, step: int | None = None) -> tuple[str, int]:
    """SHA-256 of all parameters (name, type, shape and bytes of each, in order of names), and how many they are."""
    found, count = hashlib.sha256(), 0
    for name, lazy in sorted(rows.open_params(checkpoint, step).items()):
        array = np.ascontiguousarray(np.asarray(lazy))
        found.update(f"{name} {array.dtype} {array.shape}\n".encode())
        found.update(array.reshape(-1).view(np.uint8).data)
        count += array.size
    return found.hexdigest(), count


def _model(checkpoint: str, identity: str, step: int | None) -> str:
    meta = runs.load_meta(checkpoint, step)
    cfg = build(ModelConfig, meta["model"], f"{checkpoint}: model")
    digest, count = weights_hash(checkpoint, step)
    size = cfg.tokenizer
    lines = {
        "checkpoint": f"{meta['stage']} {identity}",
        "parameters": f"{count:,}",
        "SHA-256 of the parameters": f"`{digest}`",
        "mask tokens": f"{size.num_latent_tokens} of {size.codebook_size} codes",
        "masks": f"{size.mask_size} pixels",
        "pixel encoder": f"{size.sam.image_size} pixels" if size.sam else "none",
    }
    if cfg.vision is not None and cfg.language_model is not None:
        lines["images of the language model"] = f"{cfg.vision.image_size} pixels"
        lines["language model"] = f"{cfg.language_model.num_layers} layers of {cfg.language_model.embed_dim}"
    if meta.get("lora"):
        lines["adapters on"] = str(meta["base_identity"])
    note = "The hash is of every parameter's name, type, shape and bytes, in order of names.\n"
    return f"## Model\n\n{_list(lines)}\n{note}"


def _settings(file: pathlib.Path, step: int) -> str:
    """The settings of the run's last stage. A converted, merged or packed checkpoint has none: of step 0, config.json
    says of a training only what the fields' defaults are."""
    if not file.is_file() or not step:
        return "## Training\n\nThe checkpoint has no settings of its training: it was converted, merged or packed.\n"
    plain = json.loads(file.read_text())
    chosen = {name: plain[name] for name in _GROUPS if plain.get(name) not in (None, "")}
    chosen["train"] = {name: plain["train"][name] for name in _TRAIN if name in plain["train"]}
    chosen["data"] = {name: value for name, value in plain["data"].items() if value not in ("", None, [], {}, 0)}
    own = _OWN[plain["stage"]]
    chosen[own] = plain[own]
    flat = {name: f"`{json.dumps(value, ensure_ascii=False)}`" for name, value in _flat(chosen).items()}
    return f"## Training\n\nOf its last stage; what is not set is left out.\n\n{_list(flat)}"


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, item in value.items():
        found |= _flat(item, f"{prefix}{name}.") if isinstance(item, Mapping) and item else {prefix + name: item}
    return found


def _list(lines: Mapping[str, str]) -> str:
    return tables.table(["", ""], [[name, value.replace("|", r"\|")] for name, value in lines.items()])


def _below(text: str) -> str:
    """A text with its headings one level lower."""
    return "".join(f"#{line}" if line.startswith("#") else line for line in text.splitlines(keepends=True))


def _figures(folders: Sequence[str], out: pathlib.Path) -> str:
    """Links to the figures that lie in the folders, seen from the card."""
    files = [path for folder in folders for path in sorted(pathlib.Path(folder).glob("*.png"))]
    place = lambda path: pathlib.Path(os.path.relpath(path, out.parent)).as_posix().replace(" ", "%20")
    lines = [f"![{path.stem.replace('_', ' ')}]({place(path)})\n" for path in files]
    return "\n".join(["## Figures\n", *lines]) if lines else ""


def _data(found: Mapping[str, Found]) -> str:
    """What each task was computed on and how: data, options, and a hash of its results."""
    lines = []
    for name, one in found.items():
        options = {key: value for key, value in one.header.items() if key not in _NOT_OPTIONS}
        options["quantize"] = summaries.quantized(one.header)
        left_out = one.summary["num_skipped"]
        digest = hashlib.sha256(one.path.read_bytes()).hexdigest()[:16]
        made = ", ".join(f"{key} {value}" for key, value in options.items() if value not in (0, False, "", None))
        lines.append([name, f"{one.header['samples']}", f"{left_out}", f"`{one.header['data']}`", f"`{digest}`", made])
    header = ["task", "samples", "left out", "data", "results", "options"]
    note = (
        "Data: the fingerprint of the benchmark's keys, sentences, annotations and files (docs/evaluation.md). Results:"
        " the first 16 digits of the SHA-256 of the result file.\n"
    )
    return f"## Data and settings of the evaluations\n\n{tables.table(header, lines)}\n{note}"
