"""Do several processes, micro-batches and packed rows learn what one process learns? `python benchmarks/processes.py`.

Every stage, at a size below debug (float32, 8 samples a batch; tests/parallel/stages_on_processes.py), takes three
updates in one process, in one process with gradients accumulated over 4 micro-batches, and in P = 2 and 4 real
processes (Gloo on the CPU) on the meshes (P,1,1), (1,P,1), (1,1,P) and (1,2,2), on the last with 2 micro-batches too,
and in stage 2 with these and two conversations in a row, from the same start on the same data. Compared are loss
and gradient norm of every update, relative to their largest value in the run; the loss of stage 3, a mean of advantages
of unit variance that cancel to 1e-8, relative to these. Prints a Markdown table; exits with 1 if a figure exceeds the
tolerance. With --folder DIR the runs stay there, and the command goes on with those that are missing.
"""

import argparse
import math
import os
from pathlib import Path
import socket
import subprocess
import sys
import tempfile

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np  # noqa: E402

from alto_jax.train.progress import read_metrics  # noqa: E402
from tests.debug_model import write_model  # noqa: E402
from tests.parallel import stages_on_processes  # noqa: E402

STAGES, TOLERANCE = stages_on_processes.STAGES, 1e-5
MESHES = {p: ((p, 1, 1), (1, p, 1), (1, 1, p), (1, 2, 2)) for p in (2, 4)}
SECONDS = 7200  # for all of a number of processes


def run(folder: Path, cases: list[str], processes: int, devices: int) -> None:
    """Trains the cases one after the other, in `processes` processes of `devices` devices."""
    cases = [case for case in cases if not (folder / case / "result.json").exists()]
    if not cases:
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        joined = {"ALTO_COORDINATOR": f"127.0.0.1:{free.getsockname()[1]}", "ALTO_NUM_PROCESSES": str(processes)}
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    started = []
    for index in range(processes):
        own = (joined | {"ALTO_PROCESS_ID": str(index)}) if processes > 1 else {}
        log = (folder / f"log_{processes}_{devices}_{index}.txt").open("w")
        command = [sys.executable, stages_on_processes.__file__, str(folder), *cases]
        env = os.environ | {"XLA_FLAGS": flags} | own
        started.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=SECONDS) for process in started]
    finally:
        for process in started:
            process.kill()
    if any(codes):
        logs = [log.read_text()[-2000:] for log in sorted(folder.glob(f"log_{processes}_{devices}_*.txt"))]
        raise SystemExit("\n".join(logs))


def errors(folder: Path, stage: str, case: str) -> list[float]:
    """Largest differences of loss and gradient norm from those of one process."""
    expected, found = read_metrics(folder / f"{stage}:1,1,1"), read_metrics(folder / case)
    if len(expected) != len(found):
        raise SystemExit(f"{case}: {len(found)} updates, expected {len(expected)}")
    result = []
    for name in ("loss", "grad_norm"):
        a, b = (np.array([record[name] for record in records]) for records in (expected, found))
        largest = max(np.abs(a).max(), 1.0 if (stage, name) == ("stage3", "loss") else 0.0)
        result.append(float(np.abs(a - b).max() / largest))
    return result


def main() -> int:
    """Runs all cases and prints the table."""
    parser = argparse.ArgumentParser(prog="python benchmarks/processes.py", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, metavar="DIR")
    kept = parser.parse_args().folder
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        return measure(kept.resolve())
    with tempfile.TemporaryDirectory() as name:
        return measure(Path(name))


def cases_of(stage: str, processes: int) -> list[tuple[tuple[int, int, int], str]]:
    """(mesh, what else is asked, in the words of stages_on_processes.py) of each case that has a row."""
    packed = [":2:packed"] if stage == "stage2" else []
    if processes == 1:
        return [((1, 1, 1), words) for words in (":4", *packed)]
    return [*((mesh, "") for mesh in MESHES[processes]), *(((1, 2, 2), words) for words in (":2", *packed))]


def name_of(stage: str, mesh: tuple[int, int, int], words: str) -> str:
    """What stages_on_processes.py calls a case."""
    return f"{stage}:{','.join(map(str, mesh))}{words}"


def measure(folder: Path) -> int:
    """Runs the cases that the folder lacks and prints the table."""
    failed = False
    head = "| stage | processes | mesh | micro-batches | conversations in a row | loss | gradient norm |"
    print(f"{head}\n{'|---' * 7}|", flush=True)
    if not (folder / "start").exists():
        write_model(folder / "start", stages_on_processes.config_of("stage2", (1, 1, 1), ""))
    rows = [(stage, processes, *case) for stage in STAGES for processes in (1, *MESHES)
            for case in cases_of(stage, processes)]  # fmt: skip
    run(folder, [f"{stage}:1,1,1" for stage in STAGES], 1, 1)
    for processes in (1, *MESHES):
        # Note: one mesh may stand for several numbers of processes, so their results are apart.
        part = folder / f"{processes}"
        part.mkdir(exist_ok=True)
        if not (part / "start").exists():
            (part / "start").symlink_to(folder / "start")
        mine = [row for row in rows if row[1] == processes]
        for devices in sorted({math.prod(mesh) // processes for _, _, mesh, _ in mine}):
            some = [row for row in mine if math.prod(row[2]) == processes * devices]
            run(part, [name_of(stage, mesh, words) for stage, _, mesh, words in some], processes, devices)
    for stage, processes, mesh, words in rows:
        found = errors(folder, stage, f"{processes}/{name_of(stage, mesh, words)}")
        failed |= max(found) > TOLERANCE
        parts, in_a_row = words[1:2] or "1", 2 if "packed" in words else 1
        cells = stage, processes, ",".join(map(str, mesh)), parts, in_a_row, *(f"{each:.1e}" for each in found)
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
