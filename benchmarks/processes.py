"""Do several processes, or micro-batches, learn what one process learns? `python benchmarks/processes.py [--steps 3]`.

Every stage's debug configuration (float32, batch of 8) is trained by one process, by one process with gradients
accumulated over 4 micro-batches, and by P = 2 and 4 real processes (launch/local.sh, Gloo on the CPU) on the meshes
(P,1,1), (1,P,1), (1,1,P) and (1,2,2), from the same start on the same data. Compared are loss and gradient norm of
every step, relative to their largest value in the run; the loss of stage 3, a mean of advantages of unit variance that
cancel to 1e-8, relative to these. Prints a Markdown table; exits with 1 if a figure exceeds the tolerance.
"""

import argparse
import math
import os
from pathlib import Path
import subprocess
import sys
import tempfile

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from alto_jax.stages.table import STAGES  # noqa: E402
from alto_jax.train.progress import read_metrics  # noqa: E402

NAMES, TOLERANCE = ("loss", "grad_norm"), 1e-5
LOSS_SCALE = {"stage3": 1.0}  # Size of the terms that a loss sums, where they cancel.
# The paper's reward gives an untrained model's answers nothing to learn from; this one differs with each.
OVERRIDES = {"stage3": {"grpo.reward.kind": "reference"}}
MESHES = {p: ((p, 1, 1), (1, p, 1), (1, 1, p), (1, 2, 2)) for p in (2, 4)}
SECONDS = 1800  # for one run


def train(
    stage: str, workdir: Path, start: Path | None, steps: int, processes: int, mesh: tuple[int, ...], accumulate: int
) -> list[dict]:
    """Runs the command; returns the lines of metrics.jsonl."""
    command = [sys.executable, "-m", "alto_jax.main"] if processes == 1 else ["launch/local.sh", str(processes)]
    changes = {"train.steps": steps, "train.batch_size": 8, "train.log_every": 1, "train.accumulate": accumulate,
               "train.checkpoint_every": 0, "eval.num_samples": 0, **dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"),
               mesh)), **OVERRIDES.get(stage, {})}  # fmt: skip
    if stage in ("stage2", "stage3"):
        changes["model.language_model.num_heads"] = 4  # as many as tensor devices
    flags = [f"--config={ROOT}/configs/{stage}.py:debug", f"--workdir={workdir}"]
    flags += [f"--config.{name}={value}" for name, value in changes.items()]
    flags += [f"--config.init_from={start}"] if start else []
    devices = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={math.prod(mesh) // processes}"
    env = os.environ | {"PYTHON": sys.executable, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": devices}
    done = subprocess.run([*command, *flags], cwd=ROOT, env=env, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode:
        raise SystemExit(f"{stage}, {processes} processes, {mesh}:\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}")
    return [record for record in read_metrics(workdir) if "loss" in record]


def worst(expected: list[dict], found: list[dict], name: str, scale: float) -> float:
    """Largest difference of a metric, relative to its largest value or `scale`, whichever is larger."""
    largest = max(scale, *(abs(record[name]) for record in expected))
    return max(abs(a[name] - b[name]) for a, b in zip(expected, found, strict=True)) / largest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--processes", default=",".join(map(str, MESHES)))
    options = parser.parse_args()
    cases = [(int(p), mesh, 1) for p in options.processes.split(",") for mesh in MESHES[int(p)]]
    print("| stage | processes | mesh | micro-batches | loss | gradient norm |\n|---|---|---|---|---|---|", flush=True)
    failed, start = False, None
    with tempfile.TemporaryDirectory() as folder:
        for stage in STAGES:
            alone = Path(folder) / stage
            expected = train(stage, alone, start, options.steps, 1, (1, 1, 1), 1)
            for index, case in enumerate([(1, (1, 1, 1), 4), *cases] if stage in options.stages.split(",") else ()):
                found = train(stage, Path(folder) / f"{stage}_{index}", start, options.steps, *case)
                scales = {"loss": LOSS_SCALE.get(stage, 0.0)}
                errors = [worst(expected, found, name, scales.get(name, 0.0)) for name in NAMES]
                failed |= max(errors) > TOLERANCE
                processes, mesh, accumulate = case
                shown = f"{processes} | {','.join(map(str, mesh))} | {accumulate}"
                print(f"| {stage} | {shown} | {errors[0]:.1e} | {errors[1]:.1e} |", flush=True)
            start = alone
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
