"""The table of benchmarks/results/plan.md: which slice holds which stage, and how fast it could be.

    python benchmarks/plan.py [--compile stage2.py:8b@v5e:16x16,...] [--timeout 3600]

Every row is estimated from shapes (seconds); those named by --compile (or all, with --compile all) are compiled ahead
of time by `alto_jax.plan`, which takes minutes each and libtpu. What was compiled is kept in
benchmarks/results/plan.jsonl and used again; `--mesh=auto` chooses each mesh.
"""

import argparse
import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from alto_jax.plan import __main__ as plan  # noqa: E402

plan.prepare_environment(None)  # before JAX is imported
from alto_jax.plan import programs  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
CONFIGS = ("stage1.py:base", "stage2.py:2b", "stage2.py:8b", "stage3.py:2b", "stage3.py:8b")
# (topology, devices)
TOPOLOGIES = (
    ("v5e:4x4", 16), ("v5e:16x16", 256), ("v5p:2x2x4", 16), ("v5p:2x2x4*2", 32), ("v6e:4x4", 16), ("v6e:8x8", 64),
    ("h100-80g:8", 8), ("h100-80g:8*2", 16),
)  # fmt: skip
GIB = 2**30
HEAD = """# What fits where, and how fast it could be

2026-11-27, planned on 2 CPU cores without any of these machines: `python benchmarks/plan.py` (`--compile` asks the TPU
compiler). `GiB, compiler` is the most that a program of the step needs on a device as the TPU compiler lays it out.
Rows without it, and all of H100-80G, are **estimates from shapes** (state exact, activations counted roughly).
`v5p:2x2x4*2` is two slices with the data centre's network between them (6.25 GB/s a chip), `h100-80g:8*2` two machines
of 8 with a network card of 400 Gb/s for each GPU; of a GPU's memory JAX takes 90 %.
Time is a bound, not a measurement: from everything overlapping to nothing overlapping, with compute at 60 %, HBM at
80 %, links and network at 80 % of the data sheets' rates. The mesh (data, fsdp, tensor) is what `--mesh=auto` chooses.
A batch is of images, in stage 3 of prompts with 12 answers each; a stage-3 step is rollout and update.

"""
SHORT = """
Compiled rows take 1.2 to 3.2 times the memory of their estimates, all but that of two slices being from before
attention had the TPU's kernel, with which the estimates count: better compile than rely on an estimated one.

In short (docs/cluster.md): GiB a device and milliseconds a step; ~ is an estimate, without it the compiler has spoken.

"""


def arguments(config: str, topology: str, devices: int) -> list[str]:
    """The command line of one plan."""
    return [
        f"--config=configs/{config}", f"--topology={topology}", "--mesh=auto", "--json",
        f"--config.train.batch_size={max(64, devices)}",
    ]  # fmt: skip


def estimate(config: str, topology: str, devices: int) -> dict:
    """The plan from shapes, as JSON has it; {"error": ...} if there is none."""
    options, experiment = plan.parse([*arguments(config, topology, devices), "--estimate"])
    try:
        return programs.make_plan(experiment, options).to_dict()
    except ValueError as error:
        return {"error": str(error)}


def compile_plan(config: str, topology: str, devices: int, timeout: int) -> dict:
    """The plan from the compiler, in a process of its own; {"error": ...} if there is none."""
    command = [sys.executable, "-m", "alto_jax.plan", *arguments(config, topology, devices)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"error": f"not compiled within {timeout} s"}
    if done.returncode not in (0, 1) or "{" not in done.stdout:
        return {"error": " ".join(done.stderr.split())[-300:]}
    return json.loads(done.stdout[done.stdout.index("{") :])


def row(config: str, topology: str, guess: dict, compiled: dict | None) -> str:
    """One line of the table; figures of the compiler where it was asked."""
    best = compiled or guess
    if "error" in best:
        return f"| {config} | {topology} | {best['error']} |" + " |" * 8
    mesh = ", ".join(map(str, best["mesh"].values()))
    total = lambda p: max(program["hbm"]["total"] or 0 for program in p["programs"]) / GIB
    short = max((program["shortfall"] or 0 for program in best["programs"]), default=0) / GIB
    fits = "yes" if best["fits"] else f"no, {short:.1f} GiB short"
    limit = best["programs"][0]["hbm"]["limit"] / GIB
    peak = [p["mfu"] * p["seconds"]["estimate"] / p["flops"] for p in best["programs"]][0]
    flops = sum(p["flops"] for p in best["programs"])
    serial = sum(p["seconds"]["serial"] for p in best["programs"])
    cells = [
        config, topology, mesh, best["batch_size"], fits, f"{total(compiled):.1f}" if compiled else "",
        f"{total(guess):.1f}" if "programs" in guess else "", f"{limit:.0f}", f"{flops / 1e12:,.0f}",
        f"{best['step_seconds'] * 1e3:,.0f}–{serial * 1e3:,.0f}",
        f"{flops / serial * peak:.0%}–{flops / best['step_seconds'] * peak:.0%}",
    ]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def cell(guess: dict, compiled: dict | None) -> str:
    """A plan in a few characters."""
    best = compiled or guess
    if "error" in best:
        return "–"
    total = max(program["hbm"]["total"] or 0 for program in best["programs"]) / GIB
    limit = best["programs"][0]["hbm"]["limit"] / GIB
    sign = "" if compiled else "~"
    if not best["fits"]:
        return f"no: {sign}{total:.0f} of {limit:.0f} GiB"
    serial = sum(p["seconds"]["serial"] for p in best["programs"])
    return f"{sign}{total:.0f} of {limit:.0f} GiB, {best['step_seconds'] * 1e3:,.0f}–{serial * 1e3:,.0f} ms"


def main() -> int:
    """Estimates, compiles what is asked for, writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", default="", help="CONFIG@TOPOLOGY with commas, or all")
    parser.add_argument("--timeout", type=int, default=3600, help="seconds for one of them")
    options = parser.parse_args()
    store = RESULTS / "plan.jsonl"
    known = {}
    if store.exists():
        known = {(p["key"]): p for p in map(json.loads, store.read_text().splitlines())}
    wanted = options.compile.split(",")
    lines, short = [], ["| | " + " | ".join(t for t, _ in TOPOLOGIES) + " |", "|---" * (len(TOPOLOGIES) + 1) + "|"]
    for config in CONFIGS:
        cells = [config]
        for topology, devices in TOPOLOGIES:
            key = f"{config}@{topology}"
            tpu = not topology.startswith("h100")
            if tpu and key not in known and (options.compile == "all" or key in wanted):
                found = compile_plan(config, topology, devices, options.timeout)
                print(key, found.get("error", f"compiled, fits: {found.get('fits')}"), flush=True)
                if "error" not in found:
                    known[key] = {"key": key, **found}
                    with store.open("a") as file:
                        file.write(json.dumps(known[key]) + "\n")
            guess = estimate(config, topology, devices)
            lines.append(row(config, topology, guess, known.get(key)))
            cells.append(cell(guess, known.get(key)))
            print(lines[-1], flush=True)
        short.append("| " + " | ".join(cells) + " |")
    names = (
        "configuration", "topology", "mesh", "batch", "fits", "GiB, compiler", "GiB, estimate", "GiB there are",
        "TFLOP a step", "ms a step", "MFU",
    )  # fmt: skip
    table = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|", *lines]
    (RESULTS / "plan.md").write_text(HEAD + "\n".join(table) + "\n" + SHORT + "\n".join(short) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
