"""The benchmarks' command over devices and hosts, and killed: the same bytes as one process that was never stopped."""

import os
import pathlib
import random
import signal
import socket
import time

import pytest

from alto_jax.evaluate import runner
from tests.data import replicas
from tests.evaluate.test_runner import options
from tests.forking import SERVER, Command

NAMES = "grefcoco_val,refcoco_val"
CHANGES = {"batch_size": 8, "protocol": "per_sentence", "max_bad_fraction": 0.2}


@pytest.fixture(scope="module")
def reference(debug_model, tmp_path_factory):
    """The data (one image is cut), and what one process on one device makes of it."""
    data, out = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("reference")
    for name in NAMES.split(","):
        replicas.write_refer(data, name.removesuffix("_val"), splits=("val",), count=24)
    image = sorted((data / replicas.IMAGES).iterdir())[3]
    image.write_bytes(image.read_bytes()[:200])
    found = runner.evaluate(options(debug_model, data, out, NAMES, **CHANGES))
    assert found["grefcoco_val.per_sentence.adaptive"]["bad_by_kind"] == {"truncated file": 4}
    return data, out, written(out)


def written(out: pathlib.Path) -> dict[str, bytes]:
    """Everything in the out directory but the times."""
    files = [p for p in sorted(out.rglob("*")) if p.is_file() and "timing" not in p.name]
    return {str(p.relative_to(out)): p.read_bytes() for p in files}


def start(model, data, out, *, devices: int = 1, **environment: str) -> Command:
    """The command of `options`, in a process of its own."""
    command = ["-m", "alto_jax.evaluate", "--checkpoint", model.path, "--data", data, "--out", out]
    command += ["--benchmark", NAMES, "--grammar", "--forced-prefix", "--title", "debug"]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in CHANGES.items()]
    if environment:
        command.append("--distributed=env")
    env = os.environ | environment
    if devices > 1:
        env["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={devices}"
    return SERVER.start([str(word) for word in command], env)


def lines(out: pathlib.Path) -> int:
    """Samples in the result files."""
    files = [file for file in out.glob("results/*.jsonl") if "timing" not in file.name]
    return sum(file.read_bytes().count(b"\n") - 1 for file in files)


def test_killed_evaluation_ends_with_the_same_bytes(reference, debug_model, tmp_path):
    data, _, wanted = reference
    rng, kills, reached = random.Random(0), 0, []
    for number in range(3):
        process = start(debug_model, data, tmp_path)
        goal = number * 44 + rng.randrange(40)  # of 144 samples, so that each start gets further
        while process.poll() is None and lines(tmp_path) < goal:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.03)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=300)
        reached.append(lines(tmp_path))
    printed, _ = start(debug_model, data, tmp_path).communicate(timeout=300)
    assert kills >= 2 and len(set(reached)) >= 2 and "resumed after" in printed, (kills, reached, printed[-1000:])
    found = written(tmp_path)
    assert found.keys() == wanted.keys() >= {"metrics.json", "tables.md", "lengths.png"}
    assert [name for name in wanted if found[name] != wanted[name]] == []


def test_two_processes_of_four_devices_give_the_same_bytes(reference, debug_model, tmp_path):
    data, out, wanted = reference
    name = "results/grefcoco_val.per_sentence.adaptive.jsonl"
    (tmp_path / "results").mkdir()
    # They go on where one process on one device was killed, in the middle of a line.
    (tmp_path / name).write_bytes(wanted[name][: len(wanted[name]) // 3])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    common = {"ALTO_COORDINATOR": address, "ALTO_NUM_PROCESSES": "2"}
    both = [start(debug_model, data, tmp_path, devices=4, **common, ALTO_PROCESS_ID=str(i)) for i in range(2)]
    printed = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    assert "resumed after" in printed[0] and "## Generalised referring" in printed[0] and "## " not in printed[1]
    found = written(tmp_path)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []
