"""Faults of every kind in runs of 1, 2 and 4 processes, each of which must end as if nothing had happened.

    python benchmarks/soak.py [--faults 100] [--seed 0] [--folder DIR] [--out benchmarks/results/soak.md]

The runs are those of benchmarks/reliability.py, of stages 1 and 3. For each stage, number of processes and mesh one is
done undisturbed; then others meet `--each` faults, each at a random moment of a random phase (start, compile, step,
save, evaluate):

  kill         signal 9 to one process
  terminate    SIGTERM to one process
  damage       signal 9 to all, then files of the newest checkpoint are cut, or bits of them changed
  full disk    no process can write to any file, for up to 4 seconds
  lost mount   the run's directory is gone, for up to 4 seconds
  clock        Python's clock jumps by up to a day, forth or back, until the processes end
  lost machine signal 9 to all, then what one process keeps in ALTO_LOCAL is gone, or damaged

Every second run writes to its directory every 4 updates, and to its local tier after each; one process reads for all
that hold the same. Whenever the processes have ended, the same command is given again. Compared at the end: every array
of the last checkpoint, bit for bit, the position in the data, metrics.jsonl, and the wall clock of the run's own
account (goodput); of stage 3 prompts.jsonl too, which must hold every prompt of each epoch exactly once.
A run whose only checkpoint was damaged refuses, and says how it can begin anew; that is then done, and counted.
What ends by itself must say why in one line; what does not end within `--timeout` seconds counts as hung. With --folder
DIR the command goes on where it was stopped.
"""

import argparse
import dataclasses
import datetime
import itertools
import json
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import reliability  # noqa: E402
from benchmarks.damage import damage  # noqa: E402

FAULTS = ("kill", "terminate", "damage", "full disk", "lost mount", "clock", "lost machine")
STEPS = 24
TIER = [f"--config.train.checkpoint_{field}" for field in ("every=4", "local_every=1", "one_reader=True")]
# Stage, processes and mesh (data, fsdp, tensor), and how often they come.
PLACES = {
    ("stage1", 1, (1, 1, 1)): 4, ("stage1", 2, (1, 2, 1)): 3, ("stage1", 2, (1, 1, 2)): 3, ("stage1", 4, (1, 4, 1)): 1,
    ("stage1", 4, (1, 2, 2)): 1, ("stage1", 2, (2, 1, 1)): 2, ("stage3", 1, (1, 1, 1)): 3, ("stage3", 2, (1, 2, 1)): 1,
}  # fmt: skip
SPREAD = {"start": 3.0, "compile": 1.5, "step": 0.4, "save": 0.05, "evaluate": 0.1}
SAYS_WHY = ("error:", "another process of this run", "distributed service")
# Put before Python's own modules, so that the processes see another clock; the file holds what is added, in seconds.
CLOCK = """
import os, time
def jump():
    try:
        with open(os.environ["SOAK_CLOCK"]) as file:
            return int(file.read() or 0)
    except OSError:
        return 0
time.time = lambda real=time.time: real() + jump()
time.time_ns = lambda real=time.time_ns: real() + jump() * 10**9
"""


@dataclasses.dataclass
class Fault:
    """One fault: kind and phase, and what followed.

    after: "went on" (nothing ended), or exit code and last line of every process that ended. seconds: from the fault
    until all had ended, or until the next checkpoint. clear: each that ended by itself said why (but by a signal that
    came before Python could take it). hung: they did not. anew: the run had to be begun anew, as it said.
    """

    kind: str
    phase: str
    after: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    clear: bool = True
    hung: bool = False
    anew: bool = False


class Run:
    """One run in a folder of its own, `mount/run`, where `mount` is a link that can be broken."""

    def __init__(
        self, folder: pathlib.Path, place: tuple[str, int, tuple[int, int, int]], timeout: float, has_local: bool
    ):
        (self.stage, self.number, mesh), self.timeout = place, timeout
        self.mount, self.workdir = folder / "mount", folder / "mount" / "run"
        (folder / "disk").mkdir(parents=True)
        self.mount.symlink_to("disk")
        self.clock = folder / "clock"
        (folder / "python").mkdir()
        (folder / "python" / "sitecustomize.py").write_text(CLOCK)
        path = os.pathsep.join(filter(None, (str(folder / "python"), os.environ.get("PYTHONPATH"))))
        self.env = {"SOAK_CLOCK": str(self.clock), "PYTHONPATH": path}
        self.flags = [f"--config.train.steps={STEPS}"]
        self.flags += [f"--config.mesh.{name}={size}" for name, size in zip(("data", "fsdp", "tensor"), mesh)]
        self.flags += TIER if has_local else []
        if self.stage == "stage3":
            self.flags += [f"--config.init_from={folder.parent / 'start'}"]
        self.logs, self.starts = folder / "logs", 0
        self.found: list[int] = []  # The newest checkpoint in the run's directory before each start.
        self.began: float | None = None

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, in order."""
        found = (self.mount.parent / "disk" / "run" / "checkpoints").glob("[0-9]*")
        return sorted(int(p.name) for p in found if p.name.isdigit())

    def is_done(self) -> bool:
        return (self.mount.parent / "disk" / "run" / "result.json").exists()

    def start(self) -> reliability.Processes:
        """Gives the command."""
        self.clock.unlink(missing_ok=True)
        self.began = self.began or time.time()
        self.starts += 1
        self.found.append((self.steps() or [0])[-1])
        logs = self.logs / str(self.starts)
        return reliability.Processes(self.workdir, self.number, logs, self.flags, self.env, self.stage)

    def starts_from_local(self) -> int:
        """How many starts went on from a step that only the local tier had."""
        count = 0
        for number, newest in enumerate(self.found, 1):
            said = re.search(
                r"resumed from step (\d+) of", (self.logs / str(number) / "0.txt").read_text(errors="replace")
            )
            count += said is not None and int(said[1]) > newest
        return count

    def end_of(self, processes: reliability.Processes, fault: Fault, killed: set[int]) -> None:
        """Waits for the end of all processes, and notes how they ended; a hung one is ended."""
        limit = time.monotonic() + self.timeout
        while processes.are_running() and time.monotonic() < limit:
            time.sleep(0.02)
        fault.hung |= processes.are_running()
        processes.end()
        for index, process in enumerate(processes.all):
            lines = [line for line in processes.said(index).splitlines() if line.strip()]
            last, code = (lines or [""])[-1], process.returncode
            if index not in killed:
                said = any(mark in line for line in lines[-40:] for mark in SAYS_WHY)
                has_begun = lines and fault.phase != "start"
                is_signal = fault.kind == "terminate" and code == -signal.SIGTERM and not has_begun
                fault.clear &= code in (0, 75) or is_signal or (said and code != 1)  # 1: a traceback of the main thread
                fault.after.append(f"{code}: {last[:600]}")

    def meet(self, processes: reliability.Processes, fault: Fault, rng: random.Random) -> bool:
        """Waits for the phase and does the fault; returns whether it came to that before the end of the processes."""
        newest = self.steps()[-1:]
        wanted = (newest or [0])[0] + rng.choice((0, 2, 4)) * (fault.phase in ("step", "save", "evaluate"))
        limit = time.monotonic() + self.timeout
        while processes.are_running():
            now = (self.steps() or [0])[-1]
            resumed = str((newest or [""])[0])
            if now >= wanted and reliability.is_in(fault.phase, processes.output(), self.workdir, resumed):
                break
            if time.monotonic() > limit:
                fault.hung = True
                break
            time.sleep(0.005)
        time.sleep(rng.random() * SPREAD[fault.phase])
        if not processes.are_running():
            return False
        began, killed, before = time.monotonic(), set(), self.steps()
        victim = rng.randrange(self.number)
        if fault.kind == "kill":
            processes.all[victim].send_signal(signal.SIGKILL)
            killed = {victim}
        elif fault.kind == "terminate":
            processes.all[victim].send_signal(signal.SIGTERM)
        elif fault.kind in ("damage", "lost machine"):
            for process in processes.all:
                process.send_signal(signal.SIGKILL)
            killed = set(range(self.number))
        elif fault.kind == "full disk":
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            limit_files(processes, (0, hard))
            time.sleep(rng.uniform(0.2, 4.0))
            limit_files(processes, (hard, hard))
        elif fault.kind == "lost mount":
            retarget(self.mount, "nowhere")
            time.sleep(rng.uniform(0.2, 4.0))
            retarget(self.mount, "disk")
        else:
            self.clock.write_text(str(rng.choice((-1, 1)) * rng.randrange(60, 86400)))
        if fault.kind in ("kill", "terminate", "damage", "lost machine"):
            self.end_of(processes, fault, killed)
        else:
            self.settle(processes, fault, before)
        fault.seconds = time.monotonic() - began
        if fault.kind == "damage" and self.steps():
            fault.after.append(damage(self.workdir / "checkpoints" / str(self.steps()[-1]), rng, ("cut", "bits")))
        machine = self.mount.parent / f"local_{victim}"
        if fault.kind == "lost machine" and machine.exists():
            if rng.random() < 0.5:
                fault.after.append(damage(machine, rng, ("cut", "bits")))
            else:
                shutil.rmtree(machine)
        return True

    def settle(self, processes: reliability.Processes, fault: Fault, before: list[int]) -> None:
        """Waits until the processes have ended or have gone on to another checkpoint."""
        limit = time.monotonic() + self.timeout
        while processes.are_running():
            gone = [p for p in processes.all if p.poll() is not None]
            if gone and not all(p.returncode == 0 for p in gone):
                break
            if set(self.steps()) - set(before):
                fault.after.append("went on")
                return
            if time.monotonic() > limit:
                fault.hung = True
                break
            time.sleep(0.02)
        self.end_of(processes, fault, set())


def limit_files(processes: reliability.Processes, limits: tuple[int, int]) -> None:
    """Sets how large a file the processes may write."""
    for process in processes.all:
        if process.poll() is None:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, limits)


def retarget(link: pathlib.Path, target: str) -> None:
    """Points a symbolic link elsewhere, in one step."""
    new = link.with_name("new")
    new.symlink_to(target)
    new.rename(link)


def disturb(
    folder: pathlib.Path, place: tuple, faults: int, seed: str, timeout: float, *, has_local: bool = False
) -> dict:
    """A run with so many faults; a JSON object that says what happened."""
    rng, run = random.Random(seed), Run(folder, place, timeout, has_local)
    kinds = FAULTS if has_local else FAULTS[:-1]
    stage, number, mesh = place
    met: list[Fault] = []
    processes, refused, failures = None, "", 0
    while not run.is_done():
        if processes is None or not processes.are_running():
            processes = run.start()
        if len(met) < faults:
            fault = Fault(rng.choice(kinds), rng.choice(reliability.PHASES))
            if run.meet(processes, fault, rng):
                met.append(fault)
                print(f"  {stage} {number} {mesh} {fault}", flush=True)
                continue
        last = Fault("none", "")
        run.end_of(processes, last, set())
        if last.hung or any(p.returncode not in (0, 75) for p in processes.all):
            if met and not last.hung and all("the run begins anew" in line for line in last.after):
                met[-1].anew = True
                (run.workdir / "checkpoints").rename(run.workdir / f"unreadable_{run.starts}")
                continue
            failures += 1
            refused = "; ".join(last.after)
            print(f"  {stage} {number} {mesh} ended by itself, hung: {last.hung}: {refused}", flush=True)
            if last.hung or failures > 2:
                break
    result = {"stage": stage, "processes": number, "mesh": mesh}
    result |= {"faults": [dataclasses.asdict(fault) for fault in met]}
    result |= {
        "starts": run.starts,
        "has_local": has_local,
        "from_local": run.starts_from_local(),
        "refused": refused if not run.is_done() else "",
        "seconds": time.time() - run.began,
    }
    if run.is_done():
        # Note: the account ends with the result, which a process writes before it ends.
        result["seconds"] = (run.workdir / "result.json").stat().st_mtime - run.began
        result["goodput"] = json.loads((run.workdir / "result.json").read_text())["goodput"]
    return result


def account(results: list[dict]) -> list[str]:
    """The tables, as lines of Markdown."""
    faults = [(result, fault) for result in results for fault in result["faults"]]
    head = (
        "fault",
        "number",
        "went on",
        "ended by themselves",
        "ended with a line",
        "longest",
        "hung",
        "begun anew",
        "runs that differ",
    )
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for kind in FAULTS:
        some = [(r, f) for r, f in faults if f["kind"] == kind]
        went = sum(f["after"] == ["went on"] for _, f in some)
        numbers = [len(some), went, len(some) - went, sum(f["clear"] for _, f in some)]
        longest = max((f["seconds"] for _, f in some), default=0.0)
        differ = sum(bool(r["different"] or r["refused"]) for r, _ in some)
        numbers += [f"{longest:.0f} s", sum(f["hung"] for _, f in some), sum(f["anew"] for _, f in some), differ]
        lines.append(f"| {kind} | {' | '.join(map(str, numbers))} |")
    head = (
        "stage",
        "processes",
        "mesh",
        "runs",
        "faults",
        "starts",
        "the same bits",
        "goodput",
        "its account of the wall clock",
    )
    lines += ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for stage, number, mesh in PLACES:
        some = [r for r in results if (r["stage"], r["processes"], tuple(r["mesh"])) == (stage, number, mesh)]
        good = [r for r in some if "goodput" in r]
        same = sum(not r["different"] and not r["refused"] for r in some)
        step = sum(r["goodput"]["seconds"]["step"] for r in good)
        whole = sum(r["goodput"]["wall_seconds"] for r in good)
        wall = sum(r["seconds"] for r in good)
        starts, count = sum(r["starts"] for r in some), sum(len(r["faults"]) for r in some)
        shares = f"{step / whole:.1%} | {whole / wall:.1%}" if good else " | "
        place = f"{stage} | {number} | {','.join(map(str, mesh))}"
        lines.append(f"| {place} | {len(some)} | {count} | {starts} | {same} | {shares} |")
    taken = [r["prompts"] for r in results if "prompts" in r]
    once = sum(not wrong for _, wrong in taken)
    number = sum(number for number, _ in taken)
    told = (
        f"Stage 3: {len(taken)} runs took {number} prompts; in {once} of them each of an epoch's prompts stands once in"
    )
    tier = [r for r in results if r["has_local"]]
    local = f"{len(tier)} runs had a local tier; {sum(r['from_local'] for r in tier)} of their "
    local += f"{sum(r['starts'] for r in tier)} starts went on from a step that was there alone."
    return [*lines, "", f"{told} prompts.jsonl.", "", local]


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python benchmarks/soak.py", description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--each", type=int, default=4, help="faults of a run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=240.0, help="seconds after which processes count as hung")
    parser.add_argument("--folder", type=pathlib.Path, metavar="DIR")
    parser.add_argument("--out", type=pathlib.Path, metavar="FILE", help="where the tables are written")
    options = parser.parse_args()
    os.environ |= {"JAX_PLATFORMS": "cpu"}
    os.environ.setdefault("ALTO_HEARTBEAT", "20")
    os.environ.setdefault("ALTO_SAVE_TIMEOUT", "60")
    os.environ.setdefault("ALTO_TIMEOUT", "60")  # what a process waits for one that was killed before it joined
    if options.folder is None:
        with tempfile.TemporaryDirectory() as folder:
            return soak(pathlib.Path(folder), options)
    options.folder.mkdir(parents=True, exist_ok=True)
    return soak(options.folder.resolve(), options)


def soak(folder: pathlib.Path, options: argparse.Namespace) -> int:
    """Does what is missing in the folder, and prints the tables."""
    log, rng = folder / "soak.jsonl", random.Random(options.seed)
    results = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    places, weights = zip(*PLACES.items())
    for index in itertools.count():
        place = rng.choices(places, weights)[0]
        stage, number, mesh = place
        if index < len(results):
            continue
        met = sum(len(result["faults"]) for result in results)
        if met >= options.faults:
            break
        if stage == "stage3" and not (folder / "start").exists():
            reliability.write_start(folder / "start")
        alone = folder / f"alone_{stage}_{number}_{'_'.join(map(str, mesh))}"
        if not (alone / "fingerprint.json").exists():
            shutil.rmtree(alone, ignore_errors=True)
            plain = disturb(alone, place, 0, "", options.timeout)
            if plain["refused"]:
                raise RuntimeError(
                    f"the undisturbed run of {stage}, {number} processes on {mesh}, failed: {plain['refused']}"
                )
            (alone / "fingerprint.json").write_text(json.dumps(reliability.fingerprint(alone / "mount" / "run", STEPS)))
        shutil.rmtree(folder / "run", ignore_errors=True)
        count = min(options.each, options.faults - met)
        seed = f"{options.seed} {index}"
        result = disturb(folder / "run", place, count, seed, options.timeout, has_local=index % 2 == 1)
        expected = json.loads((alone / "fingerprint.json").read_text())
        found = {} if result["refused"] else reliability.fingerprint(folder / "run" / "mount" / "run", STEPS)
        result["different"] = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
        if stage == "stage3" and not result["refused"]:
            result["prompts"] = reliability.prompts_of(folder / "run" / "mount" / "run")
        if result["different"]:
            shutil.copytree(folder / "run", folder / f"bad_{index}", symlinks=True)
        results.append(result)
        with log.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(
            f"run {index}: {stage} {number} {mesh}, {result['seconds']:.0f} s, differs in {len(result['different'])}",
            flush=True,
        )
    lines = account(results)
    print("\n".join(lines))
    if options.out:
        command = f"python benchmarks/soak.py --faults {options.faults} --seed {options.seed}"
        title = f"# Faults\n\n`{command}`, {datetime.date.today()}.\n\n"
        options.out.write_text(title + "\n".join(lines) + "\n")
    return int(
        any(
            r["different"]
            or r["refused"]
            or r.get("prompts", [0, ""])[1]
            or any(f["hung"] or not f["clear"] for f in r["faults"])
            for r in results
        )
    )


if __name__ == "__main__":
    sys.exit(main())
