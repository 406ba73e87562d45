"""Several processes that share a bucket and nothing else."""

import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from alto_jax.checkpoint import runs
from alto_jax.storage import bucket, steps
from alto_jax.train import loop
from alto_jax.train.progress import read_metrics
from tests.conftest import ROOT
from tests.parallel import apart
from tests.storage.test_run_in_bucket import s3  # noqa: F401 - a fixture
from tests.train.test_loop import arrays


def test_processes_that_share_a_bucket_alone(s3, tmp_path, monkeypatch):  # noqa: F811
    """Killed, and gone on with on machines whose disks are empty: as one process that nothing happened to, to 1e-5."""
    url = f"{s3}/apart"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        env = os.environ | {"ALTO_COORDINATOR": f"127.0.0.1:{free.getsockname()[1]}", "ALTO_NUM_PROCESSES": "2"}
    command, logs = [sys.executable, apart.__file__, url, tmp_path], [tmp_path / f"{index}.txt" for index in (0, 1)]
    started = [
        subprocess.Popen(command, cwd=ROOT, env=env | {"ALTO_PROCESS_ID": str(index)}, stdout=log.open("w"),
                         stderr=subprocess.STDOUT)
        for index, log in enumerate(logs)
    ]  # fmt: skip
    try:
        monkeypatch.setattr(loop, "make_stage", lambda config, mesh, directory=None: apart.stage())
        loop.train(apart.config(1), tmp_path / "alone")
        codes = [process.wait(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    first, second = (log.read_text() for log in logs)
    assert codes == [0, 0], first[-3000:] + second[-3000:]
    assert "process 1 (on " in first and ": each works in a copy of its own, and process 0 alone writes" in first
    resumed = {line.split()[4] for line in (first + second).splitlines() if "resumed from step" in line}
    assert len(resumed) == 1 and resumed <= {"2", "4"}
    assert first.count("is already complete") == second.count("is already complete") == 1
    # What is in the bucket is whole, and is what one process has.
    found = bucket.bucket(url, "x")
    assert sorted(steps.remote_steps(found, found.sizes())) == [4, 6]
    monkeypatch.setenv("ALTO_RUNS", str(tmp_path / "reader"))
    root, step = runs.find_run(url)
    expected, actual = arrays(tmp_path / "alone", 6), arrays(root, step)
    assert expected.keys() == actual.keys()
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
    found.download("metrics.jsonl", tmp_path / "metrics.jsonl")
    losses = [[record["loss"] for record in read_metrics(place)] for place in (tmp_path / "alone", tmp_path)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == apart.STEPS
