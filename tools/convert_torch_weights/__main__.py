"""Weights between the PyTorch reference and alto_jax.

    python -m tools.convert_torch_weights import SOURCE OUT              # one checkpoint
    python -m tools.convert_torch_weights import --titok F --sam F OUT   # a start for stage 1
    python -m tools.convert_torch_weights import --internvl DIR --alto F OUT   # a start for stage 2
    python -m tools.convert_torch_weights import SOURCE OUT --adapter DIR      # with a PEFT adapter merged
    python -m tools.convert_torch_weights import CHECKPOINT OUT --adapter DIR  # a run of adapters on CHECKPOINT
    python -m tools.convert_torch_weights export CHECKPOINT OUT
    python -m tools.convert_torch_weights inspect CHECKPOINT [OTHER]

SOURCE is a Hugging Face directory, a .safetensors file or a pickle (.pth, .bin; needs torch). OUT is a
directory as a training run leaves it: `alto_jax.load(OUT)` and `--config.init_from=OUT` work.
An installed package has this command as `alto-convert`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from alto_jax import cli
from alto_jax.config import ConfigError, local_path

from .files import read_json


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("import", help="PyTorch → alto_jax")
    command.add_argument("paths", nargs="*", type=Path, metavar="SOURCE OUT", help="OUT alone for a composite start")
    command.add_argument("--titok", type=Path, metavar="F", help="TiTok checkpoint (with --sam: a start for stage 1)")
    command.add_argument("--sam", type=Path, metavar="F", help="official SAM checkpoint")
    command.add_argument("--internvl", type=Path, metavar="DIR", help="InternVL (with --alto: a start for stage 2)")
    command.add_argument("--alto", type=Path, metavar="F", help="ALTo tokenizer checkpoint")
    command.add_argument("--adapter", type=Path, metavar="DIR", help="PEFT adapter for SOURCE (or --internvl)")
    command.add_argument("--entry", metavar="NAME", help="of the weights in a pickle; default: found by itself")
    command.add_argument("--kind", help="what SOURCE is; default: recognised from its keys")
    command.add_argument(
        "--config", metavar="JSON", help="ModelConfig fields that the source does not tell: a file, or text"
    )
    command.add_argument("--tokenizer", metavar="DIR", help="tokenizer files (default: SOURCE's); 'none' for none")
    command.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: each tensor's own")
    command.add_argument("--seed", type=int, default=0, help="of the parameters that no source holds")
    command.add_argument("--allow-nonfinite", action="store_true", help="accept NaN and infinity")
    command.add_argument(
        "--dry-run", action="store_true", help="print the mapping and what does not fit; write nothing"
    )
    command.add_argument("--verify", action="store_true", help="compare with PyTorch on random inputs (needs torch)")
    command = commands.add_parser("export", help="alto_jax → PyTorch")
    command.add_argument("checkpoint", type=Path)
    command.add_argument("out", type=Path)
    command.add_argument("--files", type=Path, metavar="DIR", help="config.json and tokenizer files to take over")
    command.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="such as 5GB or 500MB")
    command.add_argument("--force", action="store_true", help="also forms that the PyTorch code does not have")
    command.add_argument("--step", type=int, metavar="N", help="of a run's checkpoints (default: the newest)")
    command = commands.add_parser("inspect", help="parameters of a checkpoint, or differences of two")
    command.add_argument("checkpoint", type=Path)
    command.add_argument("other", type=Path, nargs="?")
    command.add_argument("--depth", type=int, help="group what lies deeper")
    command.add_argument("--step", type=int, metavar="N", help="of a run's checkpoints (default: the newest)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Runs one sub-command."""
    options = parse(arguments)
    for name, value in vars(options).items():
        for path in value if isinstance(value, list) else [value]:
            if isinstance(path, Path):
                local_path(path, name)
    return {"import": run_import, "export": run_export, "inspect": run_inspect}[options.command](options)


def run_import(options: argparse.Namespace) -> int:
    from . import importer, report

    composite = [name for name in ("titok", "sam", "internvl", "alto") if getattr(options, name)]
    if composite not in ([], ["titok", "sam"], ["internvl", "alto"]):
        raise ConfigError(f"--{composite[0]}: expected --titok with --sam, or --internvl with --alto, got {composite}")
    wanted = (0 if composite else 1) + (0 if options.dry_run and len(options.paths) < (1 if composite else 2) else 1)
    if len(options.paths) != wanted:
        names = "OUT" if composite else "SOURCE OUT"
        raise ConfigError(f"import: expected {names}, got {[str(p) for p in options.paths]}")
    out = None if wanted == (0 if composite else 1) else options.paths[-1]
    if out is not None:
        from .staging import check_free

        check_free(out)
    if options.adapter is not None and not composite and is_checkpoint(options.paths[0]):
        if out is None:
            raise ConfigError("--dry-run: not known for adapters of a checkpoint of alto_jax")
        from . import lora_run

        print(f"wrote {out}: {lora_run.write(options.paths[0], options.adapter, out)}")
        return 0
    plan = _plan(options, composite)
    report.print_plan(plan, full=options.dry_run)
    tokenizer = _tokenizer_writer(options, plan)
    if options.dry_run:
        return 0
    with report.progress("import", sum(part.source.nbytes for part in plan.parts)) as advance:
        importer.write(
            plan, out, allow_nonfinite=options.allow_nonfinite, advance=advance, tokenizer=tokenizer, seed=options.seed
        )
    print(f"wrote {out}")
    if options.verify:
        from . import verify

        return verify.run(plan, out)
    return 0


def is_checkpoint(path: Path) -> bool:
    """Whether a path is a run's directory (or a converted checkpoint) and not one of PyTorch."""
    return (path / "checkpoints").is_dir()


def _plan(options: argparse.Namespace, composite: list[str]) -> Any:
    """Opens the sources and plans the import."""
    from . import plans
    from .sources import open_source

    changes: dict[str, Any] = {"config": _config(options.config), "dtype": options.dtype}
    paths = [getattr(options, name) for name in composite] or [options.paths[0]]
    sources = [open_source(paths[0], entry=options.entry, adapter=options.adapter), *map(open_source, paths[1:])]
    try:
        if composite == ["titok", "sam"]:
            return plans.plan_stage1_start(*sources, **changes)
        if composite == ["internvl", "alto"]:
            return plans.plan_stage2_start(*sources, tokenizer=_tokenizer_folder(options, sources[0]), **changes)
        return plans.make_plan(sources[0], kind=options.kind, **changes)
    except plans.PlanError as error:
        if options.dry_run:
            print("\n".join(error.problems))
        raise


def _config(text: str | None) -> dict[str, Any]:
    """--config: JSON text, or a file with it."""
    if text is None:
        return {}
    try:
        value = json.loads(text) if text.lstrip().startswith("{") else read_json(Path(text))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--config: not readable as JSON: {error}") from error
    if not text.lstrip().startswith("{") and not Path(text).exists():
        raise FileNotFoundError(f"--config: no such file {text}")
    if not isinstance(value, dict):
        raise ConfigError(f"--config: expected a JSON object, got {text!r}")
    return value


def _tokenizer_folder(options: argparse.Namespace, source: Any, is_whole: bool = False) -> Path | None:
    """Where the tokenizer's files lie; None where there are none (said) or none are wanted.

    Raises:
      FileNotFoundError: none in the directory that --tokenizer names.
    """
    from . import text

    if options.tokenizer == "none":
        return None
    directory = Path(options.tokenizer) if options.tokenizer else source.directory
    if text.has_tokenizer(directory):
        return directory
    if options.tokenizer or is_whole:
        raise FileNotFoundError(
            f"{directory}: no tokenizer files (tokenizer.json, tokenizer.model, or vocab.json and merges.txt);"
            " name their directory with --tokenizer DIR, or leave them out with --tokenizer none"
        )
    print(f"note: {directory} holds no tokenizer files, so there will be no tokenizer.json")
    return None


def _tokenizer_writer(options: argparse.Namespace, plan: Any) -> Any:
    """What writes tokenizer.json into a directory, or None where there is no text."""
    from . import text

    if plan.vocabulary is not None:
        return plan.vocabulary.save
    if "language_model" not in plan.values or options.internvl:
        return None
    is_whole = plan.kind.startswith("altollm-")
    directory = _tokenizer_folder(options, plan.parts[0].source, is_whole)
    if directory is None:
        return None
    num_codes = plan.values["tokenizer"]["codebook_size"] if is_whole else None
    vocab_size = plan.values["language_model"]["vocab_size"]
    return lambda out: text.convert(directory, out, num_codes=num_codes, vocab_size=vocab_size)


def run_export(options: argparse.Namespace) -> int:
    from alto_jax.checkpoint import runs  # late: keeps the start fast
    from alto_jax.lora.origin import find_torch_files

    from . import exporter, report

    with report.late_progress("export") as (begin, advance):
        kind = exporter.export(
            options.checkpoint, options.out, max_shard_bytes=_size(options.max_shard_size), files=options.files,
            force=options.force, step=options.step, advance=advance, begin=begin,
        )  # fmt: skip
    has_files = options.files or find_torch_files(runs.find_run(options.checkpoint)[0])
    if kind.startswith("altollm-") and not has_files:
        print(f"note: no files of PyTorch beside {options.checkpoint} or where it started from, so that the export"
              " lacks their code and tokenizer; --files DIR takes those of a directory")  # fmt: skip
    print(f"wrote {options.out} ({kind})")
    return 0


def _size(text: str) -> int:
    units = {"GB": 10**9, "MB": 10**6, "KB": 10**3}
    number, unit = text[:-2], text[-2:].upper()
    if unit not in units or not number.replace(".", "", 1).isdigit() or float(number) <= 0:
        raise ConfigError(f"--max-shard-size: expected a size such as 5GB or 500MB, got {text!r}")
    return int(float(number) * units[unit])


def run_inspect(options: argparse.Namespace) -> int:
    from . import inspector

    first = inspector.tensors_of(options.checkpoint, options.step)
    if options.other is None:
        separator = "/" if any("/" in name for name in first) else "."
        print("\n".join(inspector.tree_lines(first, separator, options.depth)))
    else:
        print("\n".join(inspector.difference_lines(first, inspector.tensors_of(options.other))))
    return 0


def command() -> None:
    """The installed command: `main`, with one line for bad input."""
    cli.run(main)


if __name__ == "__main__":
    command()
