"""What `plan` is asked and what it answers, and the answer as text."""

import dataclasses
from typing import Literal

GIB = 2**30
STEPS = ("train", "rollout", "update", "predict", "init")


@dataclasses.dataclass(frozen=True)
class Options:
    """What to plan, as the command line has it.

    Attributes:
      config: FILE[:SIZE], for the heading.
      topology: such as "v5p:2x2x4"; "" with `rules` and a `mesh`.
      mesh: "DATA,FSDP,TENSOR", "auto", or "" for the configuration's.
      step: which program; in stage 3 "train" is rollout and update. "init": how the state at step 0 is made.
      estimate: count from shapes instead of compiling.
      sweep: rank meshes and `batch_sizes` (with commas; "": the configuration's), compile the best `compile` of them.
      network: GB per second and direction of one device to other slices or machines; 0: as the table of devices says.
      rules: print the split of every parameter, and stop.
      json: print JSON.
    """

    config: str
    topology: str = ""
    mesh: str = ""
    step: Literal["train", "rollout", "update", "predict", "init"] = "train"
    estimate: bool = False
    sweep: bool = False
    batch_sizes: str = ""
    compile: int = 3
    network: float = 0.0
    rules: bool = False
    json: bool = False


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
    """The answer for one mesh and batch size.

    slices: TPU slices or machines that the devices are of. memory_share: of a device's memory, what a program can have.
    """

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
    slices: int = 1
    memory_share: float = 1.0

    @property
    def fits(self) -> bool | None:
        """Whether all programs fit."""
        answers = [program.fits for program in self.programs]
        return False if False in answers else None if None in answers else True

    @property
    def seconds(self) -> float | None:
        """Estimated time of a step, of all programs."""
        times = [program.seconds.get("estimate") for program in self.programs]
        return None if None in times else sum(time for time in times if time is not None)

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
    devices = f"{plan.num_devices} x {plan.device_kind}" + (f" in {plan.slices} slices" if plan.slices > 1 else "")
    lines = [
        f"{plan.config} {plan.step} on {plan.topology} ({devices}), mesh {mesh}, batch"
        f" {plan.batch_size}: {verdict} ({how})"
    ]
    for program in plan.programs:
        lines.append(f"\n{program.name}:")
        if program.fits is False and program.shortfall is not None:
            lines.append(f"  short of memory by {program.shortfall / GIB:.2f} GiB a device")
        for kind, size in program.hbm.items():
            if size is not None:
                share = f" ({plan.memory_share:.0%} of its memory, which JAX takes)" if plan.memory_share < 1 else ""
                lines.append(f"  {kind:<28}{size / GIB:>9.3f} GiB a device{share if kind == 'limit' else ''}")
        if plan.step == "init":
            continue
        lines.append(f"  {'operations':<28}{program.flops / 1e12:>9.2f} TFLOP a step on all devices")
        if program.seconds:
            wanted = ("compute", "memory", "collectives", *(["network"] if plan.slices > 1 else []))
            parts = ", ".join(f"{k} {v * 1e3:.1f} ms" for k, v in program.seconds.items() if k in wanted)
            mfu = "" if program.mfu is None else f", MFU {program.mfu:.0%}"
            lines.append(
                f"  bound: {program.seconds['estimate'] * 1e3:.1f} ms if all overlaps,"
                f" {program.seconds['serial'] * 1e3:.1f} ms if nothing does ({parts}){mfu}"
            )
            lines.append(
                f"  expected: {program.seconds['expected'] * 1e3:.0f} ms, at the rates that kernels had on an H100"
            )
        lines.append(f"  collectives ({program.collectives_from}):")
        for item in program.collectives or [{"kind": "none"}]:
            text = f"    {item['kind']}"
            if "count" in item:
                who = f"{item['group_size']}{' slices' if item.get('between_slices') else ''}"
                text += f" among {who}: {item['count']} times, {item['bytes'] / GIB:.3f} GiB received"
            lines.append(text + (" (a loop of unknown length counted once)" if item.get("in_unknown_loop") else ""))
        if program.compile_seconds is not None:
            lines.append(f"  compiled in {program.compile_seconds:.0f} s")
    return "\n".join(lines)


def table(plans: list[Plan]) -> str:
    """Plans as a Markdown table, one row each."""
    names = ("mesh (data, fsdp, tensor)", "batch", "fits", "GiB a device", "ms a step", "MFU", "rows/s", "from")
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for plan in plans:
        totals = [total for p in plan.programs if (total := p.hbm.get("total")) is not None]
        most = f"{max(totals) / GIB:.1f}" if len(totals) == len(plan.programs) else "?"
        flops = sum(p.flops for p in plan.programs)
        peaks = [p.mfu * p.seconds["estimate"] / p.flops for p in plan.programs if p.mfu]
        mfu = f"{flops / plan.seconds * peaks[0]:.0%}" if peaks and plan.seconds else ""
        cells = (
            ", ".join(map(str, plan.mesh.values())), plan.batch_size, {True: "yes", False: "no", None: "?"}[plan.fits],
            most, f"{plan.seconds * 1e3:.0f}" if plan.seconds else "",
            mfu, f"{plan.rows_per_second:.1f}" if plan.rows_per_second else "",
            "estimate" if plan.estimated else "compiler",
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)
