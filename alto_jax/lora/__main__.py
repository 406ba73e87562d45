"""Command: a run of adapters becomes a checkpoint like any other.

python -m alto_jax.main --config=configs/stage2.py:8b --config.lora.rank=16 --config.init_from=BASE --workdir=RUN
python -m alto_jax.lora merge RUN OUT
"""

import argparse
import pathlib
import shutil
from typing import Any

from alto_jax import cli


def merge(run: str, out: str, step: int | None = None) -> pathlib.Path:
    """Writes base plus adapters of a run (of a step; None: the newest) as a checkpoint of parameters alone, with the
    files of PyTorch that an export of the base would give back.

    Raises:
      FileNotFoundError: no checkpoint in `run`.
      ValueError: `run` has no adapters, or `out` already holds a checkpoint.
    """
    # late: --help needs no JAX
    from flax import traverse_util
    import jax
    import numpy as np

    from alto_jax.checkpoint import loading, rows, runs
    from alto_jax.lora import origin
    from alto_jax.parallel import sharding

    meta, target = runs.load_meta(run, step), pathlib.Path(out)
    if not meta.get("lora"):
        raise ValueError(f"{run}: its checkpoint has no adapters (config.lora.rank was 0)")
    if runs.complete_steps(target):
        raise ValueError(f"{out}: holds a checkpoint already")
    model = loading.load_model(run, sharding.make_mesh(sharding.MeshConfig(), jax.devices()), step)
    flat = traverse_util.flatten_dict(model.params, sep="/")

    def fill(sinks: dict[str, Any]) -> None:
        for path, sink in sinks.items():
            sink[...] = np.asarray(flat[path])

    dropped = ("lora", "base", "base_identity")
    plain = {name: value for name, value in model.meta.items() if name not in dropped}
    target.mkdir(parents=True, exist_ok=True)
    # Note: the checkpoint comes last, since the directory counts as complete with it.
    if (model.directory / "tokenizer.json").exists():
        shutil.copy(model.directory / "tokenizer.json", target / "tokenizer.json")
    base = runs.find_run(loading.base_of(meta, run))[0]
    if (kept := origin.find_torch_files(base)) is not None:
        shutil.copytree(kept, target / origin.TORCH_FILES, dirs_exist_ok=True)
    rows.save_params(target, {p: (v.shape, v.dtype) for p, v in flat.items()}, fill, plain)
    return target


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m alto_jax.lora", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("merge", help="base + adapters of a run → a checkpoint like any other")
    command.add_argument("run", help="the run's directory")
    command.add_argument("out", help="a new directory")
    command.add_argument("--step", type=int, metavar="N", help="of the run's checkpoints (default: the newest)")
    arguments = parser.parse_args()
    cli.check_paths({"out": arguments.out})
    print(f"merged into {merge(arguments.run, arguments.out, arguments.step)}")
    return 0


if __name__ == "__main__":
    cli.run(main)
