"""Command: will this run fit on that machine, and how fast can it be? Compiled ahead of time, without the machine.

    python -m alto_jax.plan --config=configs/stage2.py:8b --topology=v5p:2x2x4
    python -m alto_jax.plan --config=configs/stage2.py:8b --topology=v5e:16x16 --mesh=auto --sweep --json
    python -m alto_jax.plan --config=configs/stage2.py:8b --topology=h100-80g:8 --estimate
    python -m alto_jax.plan --config=configs/stage2.py:8b --topology=v5p:2x2x4*2
    python -m alto_jax.plan --config=configs/stage2.py:8b --topology=h100-80g:8*2 --estimate
    python -m alto_jax.plan --config=configs/stage2.py:8b --mesh=1,8,2 --rules

--topology: a TPU slice (`v5e:16x16`, `v5p:2x2x4`, `v6e:8x8`) or several (`v5p:2x2x4*2`), compiled by libtpu on any
machine (pip install -e '.[plan]'); `gpu:N` (N GPUs of this machine), `cpu:N` (N virtual CPU devices: a rehearsal), or
with --estimate any device by name and number (`h100-80g:8`, or machines of them: `h100-80g:8*2`), from shapes alone.
--config.GROUP.FIELD=VALUE changes a field.

The compiler decides whether it fits. Time is a bound (see roofline.py): no run has been timed for it. Of a GPU's memory
JAX takes a share: as XLA_CLIENT_MEM_FRACTION says, else 90 %, as all commands of this package do.
"""

import argparse
import json
from typing import Any

from alto_jax import cli
from alto_jax.config import ConfigError
from alto_jax.plan.topology import prepare_environment
from alto_jax.plan.types import STEPS, Options, describe, table


def parse(arguments: list[str] | None = None) -> tuple[Options, Any]:
    """The options and the ExperimentConfig."""
    parser = argparse.ArgumentParser(
        prog="python -m alto_jax.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="FILE[:SIZE], as for alto_jax.main")
    parser.add_argument("--topology", default="", help="such as v5p:2x2x4*2, gpu:8; with --estimate also h100-80g:8")
    parser.add_argument("--mesh", default="", help="DATA,FSDP,TENSOR or auto, instead of the configuration's")
    parser.add_argument("--step", choices=STEPS, default="train", help="stage 3: train is rollout and update")
    parser.add_argument("--sweep", action="store_true", help="rank meshes and batch sizes, compile the best")
    parser.add_argument("--batch_sizes", help="batch sizes of the sweep, with commas (default: the configuration's)")
    parser.add_argument("--compile", type=int, default=3, help="how many of the sweep's best to compile (default: 3)")
    parser.add_argument("--network", type=float, default=0.0, metavar="GB/S",
                        help="of one device to other slices or machines (default: the makers' figures)")  # fmt: skip
    parser.add_argument("--estimate", action="store_true", help="do not compile, count from shapes")
    parser.add_argument("--rules", action="store_true", help="print the split of every parameter, and stop")
    parser.add_argument("--json", action="store_true", help="print JSON")
    found, changes = parser.parse_known_args(arguments)
    # late: --help needs no JAX
    from alto_jax.experiment import make_experiment
    from alto_jax.main import read_config

    values = read_config(found.config, changes)
    if "stages" in values:
        raise ConfigError(f"--config={found.config}: holds several stages; plan one of them")
    if not found.network >= 0:
        raise ConfigError(f"--network={found.network}: expected a number of GB per second")
    return Options(**vars(found)), make_experiment(values)


def main(arguments: list[str] | None = None) -> int:
    """Parses the command line and prints the plan; 0 if it fits (or --rules), 1 if not."""
    options, config = parse(arguments)
    if not options.topology and not options.rules:
        raise ConfigError("--topology is required (or --rules)")
    prepare_environment(options.topology)
    from alto_jax.plan import programs, rules  # late: they import JAX

    if options.rules:
        print(rules.describe_rules(config, options))
        return 0
    if options.sweep:
        plans = programs.sweep(config, options)
        best = next((p for p in plans if p.fits and (not p.estimated or options.estimate)), None)
        if options.json:
            print(json.dumps({"best": best and best.to_dict(), "all": [p.to_dict() for p in plans]}, indent=2))
        else:
            print(table(plans) + "\n")
            print(describe(best) if best else "none of those compiled fits")
        return 0 if best else 1
    plan = programs.make_plan(config, options)
    print(json.dumps(plan.to_dict(), indent=2) if options.json else describe(plan))
    return int(plan.fits is False)


def command() -> None:
    """The installed command: `main`, with one line for bad input."""
    cli.run(main)


if __name__ == "__main__":
    command()
