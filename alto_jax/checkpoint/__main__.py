"""Command: a run becomes a packed checkpoint, see packed.py.

python -m alto_jax.checkpoint pack RUN OUT
"""

import argparse
import pathlib

from alto_jax import cli


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m alto_jax.checkpoint", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("pack", help="parameters of a run → model.safetensors in 16 bits")
    command.add_argument("run", help="the run's directory")
    command.add_argument("out", help="a new directory")
    command.add_argument("--step", type=int, metavar="N", help="of the run's checkpoints (default: the newest)")
    arguments = parser.parse_args()
    cli.check_paths({"out": arguments.out})
    from alto_jax.checkpoint import packed  # late: --help needs no JAX

    made = packed.pack(arguments.run, arguments.out, arguments.step)
    size = sum(file.stat().st_size for file in pathlib.Path(made).iterdir()) / 1e6
    print(f"packed into {made}: {size:.1f} MB")
    return 0


if __name__ == "__main__":
    cli.run(main)
