"""What several real processes (Gloo on the CPU) do equals what one does, whatever the mesh; or they say why not."""

import json
import os
import pathlib
import re
import signal
import socket
import types

import jax
import numpy as np
import pytest

from alto_jax.parallel import distributed, sharding
from alto_jax.parallel.shares import BatchShare
from alto_jax.train.progress import read_metrics
from benchmarks import damage
from tests.debug_model import write_model
from tests.forking import SERVER
from tests.parallel import stages_on_processes

SECONDS = 900  # until a process that hangs is ended
# Of 4 devices in 2 processes: a tensor axis of 4 spans both. One works in a copy of a bucket, one in micro-batches of
# packed rows. All stages and more meshes: benchmarks/processes.py.
STAGES = "stages_on_processes.py"
CASES = ("stage1:1,4,1:1:bucket", "stage2:1,2,2:2:packed", "stage3:1,1,4")


def run(script, *arguments, processes=1, devices=1):
    """Starts a script of this folder in so many processes of a run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        joined = {"ALTO_COORDINATOR": f"127.0.0.1:{free.getsockname()[1]}", "ALTO_NUM_PROCESSES": str(processes)}
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    env = os.environ | {"XLA_FLAGS": flags} | (joined if processes > 1 else {})
    command = [str(pathlib.Path(__file__).with_name(script)), *map(str, arguments)]
    return [
        SERVER.start(command, env | ({"ALTO_PROCESS_ID": str(index)} if processes > 1 else {}))
        for index in range(processes)
    ]


def finish(started):
    try:
        said = [process.communicate(SECONDS) for process in started]
    finally:
        for process in started:
            process.send_signal(signal.SIGKILL)
    assert not any(process.returncode for process in started), [(out + err)[-3000:] for out, err in said]
    return said


def test_every_stage_learns_what_one_process_learns(tmp_path):
    """Loss and gradient norm of three updates, relative to the largest (of stage 3 the loss to its advantages)."""
    write_model(tmp_path / "start", stages_on_processes.config_of("stage2", (1, 1, 1), ""))
    alone = run(STAGES, tmp_path, *(f"{case.partition(':')[0]}:1,1,1" for case in CASES))
    together = run(STAGES, tmp_path, *CASES, processes=2, devices=2)
    finish(together)
    finish(alone)
    for case in CASES:
        stage = case.partition(":")[0]
        expected, found = read_metrics(tmp_path / f"{stage}:1,1,1"), read_metrics(tmp_path / case)
        assert len(expected) == len(found) == 3
        for name in ("loss", "grad_norm"):
            a, b = (np.array([record[name] for record in records]) for records in (expected, found))
            largest = max(np.abs(a).max(), 1.0 if (stage, name) == ("stage3", "loss") else 0)
            assert largest > 1e-3 and np.abs(a - b).max() <= 1e-5 * largest, (case, name, a, b)


def test_no_process_runs_a_program_that_another_still_compiles():
    """Collectives do not wait as long as a compilation may take; each variant is compiled once."""
    (out, _), _ = finish(run("slow_compilation.py", 1.5, processes=2))
    told = json.loads(out.splitlines()[-1])
    assert [[what for what, _ in each] for each in told] == [["compiled", "ran", "ran", "compiled", "ran"]] * 2
    (quick, first, _, again, second), (slow, _, _, slow_again, _) = [[when for _, when in each] for each in told]
    assert quick < slow - 0.5 < slow <= first and again < slow_again - 0.5 < slow_again <= second
    assert distributed.meeting(run) is run  # alone there is nobody to wait for


def test_damaged_saves_are_restored_or_refused(tmp_path):
    """By both processes alike, on fsdp and on tensor; never is one left waiting, also where it sees other steps."""
    lines = damage.start(tmp_path, processes=2, devices=1, count=8, seed=0)
    assert {line["outcome"] for line in lines} <= {"step 2", "step 1", "refused"}, lines
    for axis in ("fsdp", "tensor"):
        first, second, *others = [line["outcome"] for line in lines if line["mesh"] == axis]
        assert first == second == "step 1" and {"step 1"} <= {*others}, lines
    frozen = [line for line in lines if line["frozen"]]
    assert len(frozen) == 4 and {line["outcome"] for line in frozen} <= {"step 2", "refused"}, frozen
    refused = [line["said"] for line in frozen if line["outcome"] == "refused"]
    assert len(refused) >= 2 and all(
        "the frozen parameters, which all checkpoints of the run share" in line for line in refused
    )
    said = (tmp_path / "0.txt").read_text()
    for process in (0, 1):
        line = rf"warning: .*step 2 cannot be read \(process {process}: its folder is missing\); going back to step 1"
        assert len(re.findall(line, said)) == 2, said
    assert all(line.startswith("warning: ") for line in said.splitlines() if "going back" in line)


def mesh_of(processes):
    """A mesh of made-up devices, by the process of each: int[data, fsdp, tensor]."""
    processes = np.array(processes)
    devices = np.empty(processes.shape, object)
    for index, process in np.ndenumerate(processes):
        devices[index] = types.SimpleNamespace(process_index=int(process))
    return types.SimpleNamespace(devices=devices, shape=dict(zip(sharding.AXES, processes.shape)))


def test_shares_follow_the_devices_of_the_mesh():
    data_parallel, tensor_parallel = mesh_of([[[0]], [[1]]]), mesh_of([[[0, 1]]])
    assert sharding.batch_share(data_parallel, 1) == BatchShare((1,), 2, 2)
    assert sharding.batch_share(tensor_parallel, 1) == BatchShare((0,), 1, 2)
    # A 4 x 4 slice of hosts of 2 x 2 chips, with the mesh's axes along its sides: what a host holds does not follow
    # from its number.
    x, y = np.meshgrid(range(4), range(4), indexing="ij")
    hosts = x // 2 * 2 + y // 2
    found = [sharding.batch_share(mesh_of(hosts.reshape(1, 4, 4)), host).parts for host in range(4)]
    assert found == [(0, 1), (0, 1), (2, 3), (2, 3)]
    found = [sharding.batch_share(mesh_of(hosts.reshape(4, 4, 1)), host).parts for host in range(4)]
    assert found == [(0, 1, 4, 5), (2, 3, 6, 7), (8, 9, 12, 13), (10, 11, 14, 15)]
    assert BatchShare((0, 1, 4, 5), 16, 4).rows(32).tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    with pytest.raises(ValueError, match="process 4 has no device"):
        sharding.batch_share(mesh_of(hosts.reshape(1, 4, 4)), 4)


def test_another_number_of_rows_is_an_error():
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    with pytest.raises(ValueError, match=r"config.train.batch_size: process 0 has 4 rows, where 8 of the 8 are"):
        sharding.put_batch({"x": np.zeros((4, 2))}, mesh, 8)
    with pytest.raises(ValueError, match=r"batch_size: expected a multiple of the 4 parts.*got 6"):
        BatchShare((1,), 4, 4).rows(6)
    with pytest.raises(ValueError, match="parts: expected rising numbers in 0..1"):
        BatchShare((1, 0), 2, 2)


def test_an_error_of_the_first_process_is_everyones(monkeypatch):
    def fail():
        raise FileNotFoundError("no such run")

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "gather", lambda value: [value, {}])
    with pytest.raises(ValueError, match="no such run"):
        distributed.from_first(fail)
    assert distributed.from_first(lambda: [1]) == [1]


def test_what_is_for_one_process_says_so(monkeypatch):
    distributed.require_alone("these")
    monkeypatch.setattr(distributed, "_joined", True)
    with pytest.raises(ValueError, match="--distributed: these are for one process"):
        distributed.require_alone("these")
