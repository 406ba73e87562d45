"""Damages saves at random places and restores them with several processes.

    python benchmarks/damage.py [--count 100] [--processes 2] [--devices 1] [--seed 0]

Per mesh (fsdp and tensor axes over all devices) two steps are saved. Then, `count` times, random files of a copy of the
newer one (each fourth time: of the frozen parameters that both share) are deleted, emptied, cut, changed in some bits
or bytes, or swapped with each other, for all processes or for one that sees its own copy. All processes must restore
the newer step's numbers, or the older one's, or refuse, and all the same. A restore that takes longer than a minute
counts as hung. Prints a Markdown table; exits with 1 if a restore was wrong, differed or hung.
"""

import argparse
import collections
from collections.abc import Sequence
import faulthandler
import json
import os
import pathlib
import random
import shutil
import socket
import subprocess
import sys
import tempfile
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SECONDS = 60
KINDS = ("delete", "empty", "cut", "bits", "bytes", "swap", "folder")


def damage(folder: pathlib.Path, rng: random.Random, kinds: Sequence[str] = KINDS) -> str:
    """Spoils one to three things in the folder of a step, in one of these ways; says what."""
    done = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        if not files:
            break
        file, kind = rng.choice(files), rng.choice(kinds)
        content = bytearray(file.read_bytes())
        if kind == "delete":
            file.unlink()
        elif kind == "empty":
            file.write_bytes(b"")
        elif kind == "cut":
            file.write_bytes(content[: rng.randrange(len(content) + 1)])
        elif kind == "folder":
            shutil.rmtree(file.parent if file.parent != folder else file.parent / "state", ignore_errors=True)
        elif kind == "swap":
            other = rng.choice(files)
            file.write_bytes(other.read_bytes())
            other.write_bytes(content)
        else:
            for _ in range(rng.choice((1, 3, 30)) if content else 0):
                place = rng.randrange(len(content))
                content[place] = content[place] ^ (1 << rng.randrange(8)) if kind == "bits" else rng.randrange(256)
            file.write_bytes(content)
        done.append(f"{kind} {file.relative_to(folder)}")
    return ", ".join(done)


def worker(folder: pathlib.Path, count: int, seed: int) -> None:
    """What each process does: saves, damages (process 0) and restores; process 0 prints a JSON line for each."""
    from alto_jax.parallel import distributed

    distributed.initialize("env")
    import grain
    import jax
    import numpy as np

    from alto_jax.checkpoint import runs
    from alto_jax.experiment import OptimConfig
    from alto_jax.parallel import sharding
    from alto_jax.train.state import create_state, make_optimizer

    def make_state(mesh: Any, step: int) -> Any:
        draw = lambda i, *shape, of=step: jax.random.normal(jax.random.fold_in(jax.random.key(of), i), shape)
        params = {"head": {"kernel": draw(0, 8, 16)}, "layers": {"attn": {"q": {"kernel": draw(1, 3, 8, 4, 2)}}},
                  "embed": {"embedding": draw(2, 16, 8, of=0).astype("bfloat16")},
                  "norm": {"scale": draw(3, 5)}}  # fmt: skip
        build = lambda: create_state(params, "^(head|layers|norm)", make_optimizer(OptimConfig(), 10), {})
        return jax.jit(build, out_shardings=sharding.tree_shardings(jax.eval_shape(build), mesh))()

    def is_same(a: Any, b: Any) -> bool:
        pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        shards = ((x.data, y.data) for p, q in pairs for x, y in zip(p.addressable_shards, q.addressable_shards))
        return all(np.array_equal(x, y) for x, y in shards)

    data = lambda: iter(grain.MapDataset.range(100).batch(2).to_iter_dataset())
    process, num_devices = jax.process_index(), len(jax.devices())
    for name, sizes in {"fsdp": (1, num_devices, 1), "tensor": (1, 1, num_devices)}.items():
        mesh, root = sharding.make_mesh(sharding.MeshConfig(*sizes)), folder / name
        states = {step: make_state(mesh, step) for step in (1, 2)}
        abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), states[1])
        checkpointer, iterator = runs.Checkpointer(root / "sound"), data()
        for step, state in states.items():
            next(iterator)
            checkpointer.save(step, state, iterator, {"stage": "stage1", "step": step})
        checkpointer.close()

        def spoil(number: int, root: pathlib.Path = root) -> tuple[list[str], str]:
            """The run that each process sees, of which at least one is damaged."""
            rng = random.Random(f"{seed} {number}")
            copies = [root / f"{number}_{kind}" for kind in ("damaged", "sound")]
            for copy in copies:
                shutil.copytree(root / "sound", copy)
            if number < 2:
                shutil.rmtree(copies[0] / "checkpoints" / "2")
                what, victim = f"process {number} does not see it", number
            else:
                [frozen] = (copies[0] / "frozen").iterdir()
                spoilt = frozen if number % 4 == 3 else copies[0] / "checkpoints" / "2"
                victim = rng.randrange(2 * jax.process_count())
                what = "gone" if number == 3 else damage(spoilt, rng)
                if number == 3:
                    shutil.rmtree(spoilt)
            seen = [copies[victim < jax.process_count() and index != victim] for index in range(jax.process_count())]
            return [str(path) for path in seen], what

        for number in range(count):
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            seen, what = distributed.from_first(lambda number=number: spoil(number))
            checkpointer, iterator = runs.Checkpointer(seen[process]), data()
            try:
                state = checkpointer.restore(abstract, iterator)
                step = next((s for s in (2, 1) if is_same(state, states[s])), 0)
                position = next(iterator)[0] // 2
                found = f"step {step}" if step and position == step else f"WRONG: like step {step}, data at {position}"
            except ValueError as error:
                found = f"refused: {' '.join(str(error).split())}"
            checkpointer.close()
            everyone = distributed.gather(found)
            kinds = {text.partition(":")[0] for text in everyone}
            outcome = kinds.pop() if len(kinds) == 1 else f"DIFFERENT: {everyone}"
            if process == 0:
                for kind in ("damaged", "sound"):
                    shutil.rmtree(root / f"{number}_{kind}")
                print(json.dumps({"mesh": name, "number": number, "damage": what, "outcome": outcome, "said": found,
                                  "frozen": number % 4 == 3, "own_copy": len({*seen}) > 1}), flush=True)  # fmt: skip
    faulthandler.cancel_dump_traceback_later()


def start(folder: pathlib.Path, processes: int, devices: int, count: int, seed: int) -> list[dict]:
    """Runs the processes; returns the lines of process 0.

    Raises:
      RuntimeError: a process failed or hung; says what it printed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "ALTO_COORDINATOR": address, "ALTO_NUM_PROCESSES": str(processes)}
    env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    command = [sys.executable, __file__, "--worker", str(folder), f"--count={count}", f"--seed={seed}"]
    logs = [folder / f"{index}.txt" for index in range(processes)]
    started = [
        subprocess.Popen(command, cwd=ROOT, env=env | {"ALTO_PROCESS_ID": str(index)}, text=True,
                         stdout=subprocess.PIPE if index == 0 else log.open("w"), stderr=log.open("w"))
        for index, log in enumerate(logs)
    ]  # fmt: skip
    try:
        printed, _ = started[0].communicate(timeout=2 * SECONDS + SECONDS * count)
        codes = [process.wait(timeout=SECONDS) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    if any(codes) or len(lines) != 2 * count:
        last = lines[-1] if lines else None
        raise RuntimeError(f"exit codes {codes} after {last}:\n" + "\n".join(log.read_text()[-3000:] for log in logs))
    return lines


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=1, help="of each process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.count, options.seed)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        lines = start(pathlib.Path(folder), options.processes, options.devices, options.count, options.seed)
    names = ("axis", "processes", "damages", "newest restored", "the one before", "refused", "wrong")
    print(f"| {' | '.join(names)} |\n{'|---' * len(names)}|")
    for axis in ("fsdp", "tensor"):
        counts = collections.Counter(line["outcome"] for line in lines if line["mesh"] == axis)
        good = [counts[name] for name in ("step 2", "step 1", "refused")]
        numbers = " | ".join(map(str, [*good, counts.total() - sum(good)]))
        print(f"| {axis} | {options.processes} | {counts.total()} | {numbers} |")
    bad = [line for line in lines if line["outcome"] not in ("step 2", "step 1", "refused")]
    for line in bad:
        print(line, file=sys.stderr)
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
