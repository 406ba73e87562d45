"""Kills a run at random moments, again and again, and compares the end with a run that was left alone.

    python benchmarks/reliability.py [--kills 50] [--processes 1] [--seed 0] [--out benchmarks/results/reliability.md]

The run is this file's own configuration: the mask tokenizer at a size that starts in seconds, 60 steps, a checkpoint
every 2 and an evaluation every 4. A kill is signal 9 to one process, a random moment after it was seen to start, to
compile, to step, to save (a half-written folder is there) or to evaluate. With several processes one of them is
killed, and the others must end by themselves. Then the same command is given again, until the run is through. What
is compared: every array of the final checkpoint, bit for bit, the position in the data, and the lines of
metrics.jsonl.
"""

import argparse
import collections
from collections.abc import Sequence
import dataclasses
import datetime
import hashlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from typing import IO

ROOT = pathlib.Path(__file__).parents[1]
STEPS, CHECKPOINT_EVERY, EVAL_EVERY = 60, 2, 4
NUM_PROMPTS = 24
PHASES = ("start", "compile", "step", "save", "evaluate")


def get_config(size=None):
    """The run's configuration; "stage3": one of stage 3, which needs a start (`write_start`)."""
    sys.path.insert(0, str(ROOT))
    from configs import common

    if size == "stage3":
        return _stage3_config()
    vit = {"embed_dim": 16, "num_layers": 1, "num_heads": 2}
    tokenizer = {
        "mask_size": 16, "patch_size": 8, "num_latent_tokens": 4, "codebook_size": 16, "token_size": 4,
        "encoder": vit, "decoder": vit, "sam": None,
        "pixel_decoder": {"z_channels": 8, "hidden_channels": 8, "channel_mult": [1], "num_res_blocks": 1,
                          "num_groups": 4, "out_channels": 1, "out_patch": 8, "legacy_shortcut": False},
        "legacy_reshape": False, "length_logit_scale": "divide", "length_rule": "unified",
    }  # fmt: skip
    config = common.base_config("stage1", {"tokenizer": tokenizer})
    config.data.scenes = {"image_size": 32, "num_scenes": 64}
    config.optim = {"lr": 2e-3, "warmup_steps": 5, "trainable": "^tokenizer/(?!length/)", "ema_decay": 0.9}
    config.train = {"steps": STEPS, "batch_size": 4, "log_every": 1, "checkpoint_every": CHECKPOINT_EVERY}
    config.train["max_restarts"] = 0  # Kills in a start or a compilation may come many times in a row.
    config.eval = {"every": EVAL_EVERY, "num_samples": 4, "batch_size": 4, "token_counts": [1, 4]}
    loss = {"edge_weighted_mse": 0.0, "edge": 0.0, "bce": 1.0, "dice": 0.5, "length": 0.0}
    config.tokenizer = {"keep_tokens": "random", "commitment_cost": 0.25, "loss": loss}
    return config


def _stage3_config():
    """Rollouts serve two updates, so that 24 updates take the prompts four times."""
    import ml_collections

    from tests.parallel import stages_on_processes

    plain = stages_on_processes.plain_config("stage3", (1, 1, 1), "")
    plain["train"] |= {"batch_size": 8, "checkpoint_every": CHECKPOINT_EVERY, "max_restarts": 0}
    plain["data"]["scenes"]["num_scenes"] = NUM_PROMPTS
    plain["grpo"]["updates_per_rollout"] = 2
    return ml_collections.ConfigDict(plain)


def write_start(folder: pathlib.Path) -> None:
    """A checkpoint of random weights for the run of stage 3."""
    from tests.debug_model import write_model
    from tests.parallel import stages_on_processes

    write_model(folder, stages_on_processes.config_of("stage2", (1, 1, 1), ""))


@dataclasses.dataclass
class Attempt:
    """One start of the command: the phase that was aimed at, whether it was killed there, what the others did."""

    phase: str
    was_killed: bool
    seconds_until_others_ended: float = 0.0
    others: str = ""


def _copy(source: IO[bytes], file: pathlib.Path) -> None:
    with source, file.open("wb", buffering=0) as target:
        while chunk := source.read1():
            target.write(chunk)


class Processes:
    """The processes of one start; their output goes to files."""

    def __init__(
        self,
        workdir: pathlib.Path,
        number: int,
        logs: pathlib.Path,
        flags: list[str],
        env: dict[str, str] | None = None,
        stage: str = "stage1",
    ):
        shutil.rmtree(logs, ignore_errors=True)
        logs.mkdir(parents=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        command = [sys.executable, "-m", "alto_jax.main", f"--workdir={workdir}"]
        command += [f"--config={pathlib.Path(__file__)}{'' if stage == 'stage1' else f':{stage}'}"]
        command += [*flags, *(["--distributed=env"] if number > 1 else [])]
        self.logs = [logs / f"{i}.txt" for i in range(number)]
        self.all: list[subprocess.Popen] = []
        self._copying: list[threading.Thread] = []
        for i, log in enumerate(self.logs):
            # Note: as if on machines of their own.
            own = {"ALTO_LOCAL": str(logs.parent.parent / f"local_{i}")}
            log.touch()  # which the thread that writes it may not have come to when it is read
            joined = {"ALTO_COORDINATOR": address, "ALTO_NUM_PROCESSES": str(number), "ALTO_PROCESS_ID": str(i)}
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | joined | own | (env or {}),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            # Note: by a pipe, so that a limit of the size of files, as a full disk, does not take its voice.
            self._copying.append(threading.Thread(target=_copy, args=(process.stdout, log), daemon=True))
            self._copying[-1].start()
            self.all.append(process)

    def output(self) -> str:
        """What process 0 has said, and what it was told to leave out."""
        return self.logs[0].read_text(errors="replace")

    def said(self, index: int) -> str:
        """What a process that has ended had said."""
        self._copying[index].join(10)
        return self.logs[index].read_text(errors="replace")

    def are_running(self) -> bool:
        return any(p.poll() is None for p in self.all)

    def end(self) -> None:
        """Ends what is left."""
        for process in self.all:
            if process.poll() is None:
                process.kill()
            process.wait()


def is_in(phase: str, output: str, workdir: pathlib.Path, first: str) -> bool:
    """Whether a run that has given `output`, and had the newest checkpoint `first` at its start, is in the phase."""
    lines = [line for line in output.splitlines() if re.match(r"\[stage\w+\] ", line)]
    steps = [line for line in lines if "loss" in line]
    has_begun = (workdir / "parameters.txt").exists() and (not first or any("resumed" in line for line in lines))
    if phase == "start":
        return True
    if phase == "compile":
        return has_begun and not steps
    if phase == "step":
        return bool(steps)
    if phase == "save":
        return bool(steps) and any((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))
    last = int(steps[-1].split()[1].split("/")[0]) if steps else 0
    return bool(last) and last % EVAL_EVERY == 0 and lines[-1] == steps[-1]


def attempt(
    workdir: pathlib.Path, number: int, phase: str | None, rng: random.Random, flags: list[str], passed: int
) -> Attempt:
    """Starts the command; kills one process in the phase (None: lets it end) after `passed` more checkpoints.

    Raises:
      RuntimeError: a process that was not killed failed by itself, or did not end.
    """
    newest = lambda: max((int(p.name) for p in (workdir / "checkpoints").glob("[0-9]*") if p.name.isdigit()), default=0)
    before = newest()
    processes = Processes(workdir, number, workdir.with_suffix(".logs"), flags)
    wanted = before + passed * CHECKPOINT_EVERY
    spread = {"start": 3.0, "compile": 1.5, "step": 0.4, "save": 0.05, "evaluate": 0.1}
    try:
        while processes.are_running():
            ready = phase is not None and (passed == 0 or newest() >= wanted)
            if ready and is_in(phase, processes.output(), workdir, str(before or "")):
                time.sleep(rng.random() * spread[phase])
                victim = rng.choice(processes.all)
                if victim.poll() is not None:
                    break
                victim.send_signal(signal.SIGKILL)
                killed, codes = time.monotonic(), []
                for process in processes.all:
                    if process is not victim:
                        codes.append(process.wait(timeout=600))
                victim.wait()
                said = [processes.said(i) for i, p in enumerate(processes.all) if p is not victim]
                clear = ["another process of this run ended" in text or "distributed service" in text for text in said]
                others = ", ".join(f"exit {c}, {'said why' if m else 'NO MESSAGE'}" for c, m in zip(codes, clear))
                return Attempt(phase, True, time.monotonic() - killed, others)
            time.sleep(0.005)
    finally:
        processes.end()
    codes = [p.returncode for p in processes.all]
    if any(codes):
        raise RuntimeError(f"a run that was not killed ended with {codes}:\n{processes.output()[-2000:]}")
    return Attempt(phase or "none", False)


def fingerprint(workdir: pathlib.Path, steps: int) -> dict[str, str]:
    """A hash of every array of the final checkpoint, of the position in the data, of the metrics without times, and of
    the prompts that were taken."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    from alto_jax.checkpoint import arrays, runs
    from alto_jax.train.progress import read_metrics
    from alto_jax.train.prompt_log import FILE

    folder, tree = workdir / "checkpoints" / str(steps), {}
    with ocp.PyTreeCheckpointer() as checkpointer:
        for place in arrays.places(folder.resolve(), runs.read_meta(folder)).values():
            structure = checkpointer.metadata(place).item_metadata.tree
            args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), structure)
            tree |= checkpointer.restore(place, args=ocp.args.PyTreeRestore(restore_args=args))
    found = {
        jax.tree_util.keystr(path): hashlib.sha256(np.ascontiguousarray(leaf).tobytes()).hexdigest()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    for file in sorted((folder / "data").glob("process_*.json")):
        found[f"data/{file.name}"] = hashlib.sha256(file.read_bytes()).hexdigest()
    records = [{k: v for k, v in r.items() if not k.startswith("perf/")} for r in read_metrics(workdir)]
    if (workdir / FILE).exists():
        found[FILE] = hashlib.sha256(json.dumps(read_metrics(workdir, FILE)).encode()).hexdigest()
    return found | {"metrics.jsonl": hashlib.sha256(json.dumps(records).encode()).hexdigest()}


def prompts_of(workdir: pathlib.Path) -> tuple[int, str]:
    """How many prompts a run of stage 3 has taken, by its own log; and what is wrong with them: "" if no record stands
    twice among those of an epoch."""
    from alto_jax.train.progress import read_metrics
    from alto_jax.train.prompt_log import FILE

    taken = [record for line in read_metrics(workdir, FILE) for record in line["records"]]
    for start in range(0, len(taken), NUM_PROMPTS):
        epoch = taken[start : start + NUM_PROMPTS]
        if len({*epoch} & {*range(NUM_PROMPTS)}) < len(epoch):
            return len(taken), f"epoch {start // NUM_PROMPTS}: {sorted(epoch)}"
    return len(taken), ""


def prove(
    folder: pathlib.Path, kills: int, number: int, seed: int, steps: int, phases: Sequence[str] = PHASES
) -> tuple[list[Attempt], list[str]]:
    """Runs once undisturbed, once with `kills` kills in random `phases`.

    Returns:
      The attempts of the second run, and what differs at the end (nothing, if all is well).
    """
    rng, flags = random.Random(seed), [f"--config.train.steps={steps}"]
    attempt(folder / "alone", number, None, rng, flags, 0)
    attempts: list[Attempt] = []
    while not (folder / "killed" / "result.json").exists():
        done = sum(a.was_killed for a in attempts)
        phase = rng.choice(phases) if done < kills else None
        saved = [int(p.name) for p in (folder / "killed" / "checkpoints").glob("[0-9]*") if p.name.isdigit()]
        newest = max(saved, default=0)
        left = (steps - newest) // CHECKPOINT_EVERY - 2
        # Note: so that the kills are spread over the whole run.
        passed = int(phase in ("step", "save", "evaluate") and rng.random() < 1.6 * left / max(kills - done, 1))
        attempts.append(attempt(folder / "killed", number, phase, rng, flags, passed))
        print(f"{done + attempts[-1].was_killed}/{kills} kills, newest step {newest}, {attempts[-1]}", flush=True)
    alone, killed = fingerprint(folder / "alone", steps), fingerprint(folder / "killed", steps)
    return attempts, sorted(name for name in alone.keys() | killed.keys() if alone.get(name) != killed.get(name))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", help="file to which a Markdown table is appended")
    options = parser.parse_args()
    os.environ.setdefault("ALTO_HEARTBEAT", "20")
    sys.path.insert(0, str(ROOT))
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        attempts, different = prove(pathlib.Path(folder), options.kills, options.processes, options.seed, options.steps)
    killed = [a for a in attempts if a.was_killed]
    counts = collections.Counter(a.phase for a in killed)
    lines = [
        f"| {options.processes} | {len(killed)} | {', '.join(f'{p} {counts[p]}' for p in PHASES)} | {len(attempts)} |"
        f" {max((a.seconds_until_others_ended for a in killed if a.others), default=0):.0f} s |"
        f" {'none' if not different else f'{len(different)}: {different[0]}'} | {time.monotonic() - began:.0f} s |"
    ]
    for text, number in collections.Counter(a.others for a in killed if a.others).most_common():
        lines.append(f"<!-- the other process, {number} times: {text} -->")
    print("\n".join(lines))
    if options.out:
        out = pathlib.Path(options.out)
        if not out.exists():
            out.write_text(
                "# Kills\n\n`python benchmarks/reliability.py`, on 2 CPU cores, "
                f"{datetime.date.today()}; one run of {options.steps} steps in total.\n\n"
                "| processes | kills | in | starts | the others ended within | different at the end | took |\n"
                "|---|---|---|---|---|---|---|\n"
            )
        with out.open("a") as file:
            file.write("\n".join(lines) + "\n")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
