"""Command: will this run fit on that machine, and how fast can it be? Compiled ahead of time, without the machine.

    python -m alto_jax.plan --config=configs/stage2.py:8b --topology=v5p:2x2x4
    python -m alto_jax.plan --config=configs/stage2.py:8b --topology=v5e:16x16 --mesh=auto --sweep --json
    python -m alto_jax.plan --config=configs/stage2.py:8b --topology=h100-80g:8 --estimate
    python -m alto_jax.plan --config=configs/stage2.py:8b --mesh=1,8,2 --rules

--topology: a TPU slice (`v5e:16x16`, `v5p:2x2x4`, `v6e:8x8`; compiled by libtpu on any machine: pip install -e
'.[plan]'), `gpu:N` (N GPUs of this machine), `cpu:N` (N virtual CPU devices: a rehearsal), or with --estimate any
device by name and number (`h100-80g:8`), from shapes alone. --config.GROUP.FIELD=VALUE changes a field.

The compiler decides whether it fits. Time is a bound (see roofline.py): no run has been timed for it.
"""

import argparse
import dataclasses
import json
import os
import sys
from typing import Any

from alto_jax import cli
from alto_jax.config import ConfigError

STEPS = ("train", "rollout", "update", "predict")
GIB = 2**30


def parse(arguments: list[str] | None = None) -> tuple[argparse.Namespace, Any]:
    """The options and the ExperimentConfig."""
    parser = argparse.ArgumentParser(
        prog="python -m alto_jax.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="FILE[:SIZE], as for alto_jax.main")
    parser.add_argument("--topology", help="such as v5p:2x2x4, gpu:8, cpu:8; with --estimate also h100-80g:8")
    parser.add_argument("--mesh", help="DATA,FSDP,TENSOR or auto, instead of the configuration's")
    parser.add_argument("--step", choices=STEPS, default="train", help="stage 3: train is rollout and update")
    parser.add_argument("--sweep", action="store_true", help="rank meshes and batch sizes, compile the best")
    parser.add_argument("--batch_sizes", help="batch sizes of the sweep, with commas (default: the configuration's)")
    parser.add_argument("--compile", type=int, default=3, help="how many of the sweep's best to compile (default: 3)")
    parser.add_argument("--estimate", action="store_true", help="do not compile, count from shapes")
    parser.add_argument("--rules", action="store_true", help="print the split of every parameter, and stop")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options, rest = parser.parse_known_args(arguments)
    return options, _experiment(options.config, rest)


def _experiment(spec: str, changes: list[str]) -> Any:
    from absl import flags
    from ml_collections import config_flags

    from alto_jax import main

    values = main.load_config(spec)
    main._check_fields(values.to_dict(), changes)
    own = flags.FlagValues()
    holder = config_flags.DEFINE_config_dict("config", values, flag_values=own, sys_argv=["plan", *changes])
    try:
        rest = own(["plan", *changes])
    except flags.Error as error:
        raise ConfigError(str(error)) from error
    if len(rest) > 1:
        raise ConfigError(f"unexpected argument {rest[1]!r}")
    if "stages" in values:
        raise ConfigError(f"--config={spec}: holds several stages; plan one of them")
    from alto_jax.experiment import make_experiment

    return make_experiment(holder.value.to_dict())


def prepare_environment(topology: str | None) -> None:
    """Settings that must be there before JAX is: no real device is touched unless the topology is `gpu`."""
    kind, _, size = (topology or "").partition(":")
    if kind == "gpu":
        return
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Note: libtpu looks for the TPU's metadata server and takes a machine-wide lock otherwise.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    if kind == "cpu" and size.isdigit():
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={size}"


def find_devices(topology: str) -> list:
    """The devices of a topology; those of a TPU can only be compiled for.

    Raises:
      ConfigError: unknown, or its compiler or GPUs are not here.
    """
    import jax

    kind, _, size = topology.partition(":")
    if kind in ("gpu", "cpu"):
        try:
            devices = jax.devices(kind)
        except RuntimeError as error:
            raise ConfigError(
                f"--topology={topology}: this machine has no {kind.upper()} that JAX can use; GPU programs are compiled"
                f" with the GPU present (or add --estimate, as with h100-80g:8): {error}"
            ) from error
        number = int(size) if size.isdigit() else len(devices)
        if not 1 <= number <= len(devices):
            raise ConfigError(f"--topology={topology}: this machine has {len(devices)} of them")
        return devices[:number]
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:
        hint = "" if "libtpu" in sys.modules or _has_libtpu() else "; it needs libtpu: pip install -e '.[plan]'"
        raise ConfigError(
            f"--topology={topology}: expected a TPU slice such as v5e:16x16, v5p:2x2x4 or v6e:8x8, gpu:N or cpu:N{hint}"
            f" ({' '.join(str(error).split())[:200]})"
        ) from error


def _has_libtpu() -> bool:
    import importlib.util

    return importlib.util.find_spec("libtpu") is not None


@dataclasses.dataclass
class Program:
    """One compiled (or estimated) program of a step. Bytes are of one device.

    fits: None if unknown (no compiler, no limit). hbm: bytes by kind, with "total" and "limit". shortfall: bytes beyond
    the limit, where the program does not fit and the compiler said by how much. flops: of all devices.
    """

    name: str
    fits: bool | None
    hbm: dict[str, int | None]
    shortfall: int | None
    flops: float
    seconds: dict[str, float]
    mfu: float | None
    collectives: list[dict]
    collectives_from: str
    compile_seconds: float | None


@dataclasses.dataclass
class Plan:
    """The answer for one mesh and batch size."""

    config: str
    stage: str
    step: str
    topology: str
    device_kind: str
    num_devices: int
    mesh: dict[str, int]
    batch_size: int
    estimated: bool
    programs: list[Program]

    @property
    def fits(self) -> bool | None:
        """Whether all programs fit."""
        answers = [program.fits for program in self.programs]
        return False if False in answers else None if None in answers else True

    @property
    def seconds(self) -> float | None:
        """Estimated time of a step, of all programs."""
        times = [program.seconds.get("estimate") for program in self.programs]
        return None if None in times else sum(times)

    @property
    def rows_per_second(self) -> float | None:
        """Rows of the batch per second."""
        return self.batch_size / self.seconds if self.seconds else None

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        more = {"fits": self.fits, "step_seconds": self.seconds, "rows_per_second": self.rows_per_second}
        return {**dataclasses.asdict(self), **more}


def describe(plan: Plan) -> str:
    """The plan as text."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    verdict = {True: "FITS", False: "DOES NOT FIT", None: "UNKNOWN (no memory limit)"}[plan.fits]
    how = "estimated from shapes, not compiled" if plan.estimated else "compiled ahead of time"
    lines = [
        f"{plan.config} {plan.step} on {plan.topology} ({plan.num_devices} x {plan.device_kind}), mesh {mesh}, batch"
        f" {plan.batch_size}: {verdict} ({how})"
    ]
    for program in plan.programs:
        lines.append(f"\n{program.name}:")
        if program.fits is False and program.shortfall is not None:
            lines.append(f"  short of memory by {program.shortfall / GIB:.2f} GiB a device")
        for kind, size in program.hbm.items():
            if size is not None:
                lines.append(f"  {kind:<28}{size / GIB:>9.3f} GiB a device")
        lines.append(f"  {'operations':<28}{program.flops / 1e12:>9.2f} TFLOP a step on all devices")
        if program.seconds:
            parts = ", ".join(
                f"{k} {v * 1e3:.1f} ms" for k, v in program.seconds.items() if k not in ("estimate", "serial")
            )
            mfu = "" if program.mfu is None else f", MFU {program.mfu:.0%}"
            lines.append(
                f"  time: {program.seconds['estimate'] * 1e3:.1f} ms if all overlaps,"
                f" {program.seconds['serial'] * 1e3:.1f} ms if nothing does ({parts}){mfu}"
            )
        lines.append(f"  collectives ({program.collectives_from}):")
        for item in program.collectives or [{"kind": "none"}]:
            text = f"    {item['kind']}"
            if "count" in item:
                text += f" among {item['group_size']}: {item['count']} times, {item['bytes'] / GIB:.3f} GiB received"
            lines.append(text + (" (a loop of unknown length counted once)" if item.get("in_unknown_loop") else ""))
        if program.compile_seconds is not None:
            lines.append(f"  compiled in {program.compile_seconds:.0f} s")
    return "\n".join(lines)


def table(plans: list[Plan]) -> str:
    """Plans as a Markdown table, one row each."""
    names = ("mesh (data, fsdp, tensor)", "batch", "fits", "GiB a device", "ms a step", "MFU", "rows/s", "from")
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for plan in plans:
        totals = [p.hbm.get("total") for p in plan.programs]
        total = "?" if None in totals else f"{max(totals) / GIB:.1f}"
        flops = sum(p.flops for p in plan.programs)
        peaks = [p.mfu * p.seconds["estimate"] / p.flops for p in plan.programs if p.mfu]
        mfu = f"{flops / plan.seconds * peaks[0]:.0%}" if peaks and plan.seconds else ""
        cells = (
            ", ".join(map(str, plan.mesh.values())), plan.batch_size, {True: "yes", False: "no", None: "?"}[plan.fits],
            total, f"{plan.seconds * 1e3:.0f}" if plan.seconds else "",
            mfu, f"{plan.rows_per_second:.1f}" if plan.rows_per_second else "",
            "estimate" if plan.estimated else "compiler",
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Parses the command line and prints the plan; 0 if it fits (or --rules), 1 if not."""
    options, config = parse(arguments)
    if not options.topology and not options.rules:
        raise ConfigError("--topology is required (or --rules)")
    prepare_environment(options.topology)
    from alto_jax.plan import programs

    if options.rules:
        print(programs.describe_rules(config, options))
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


if __name__ == "__main__":
    cli.run(main)
