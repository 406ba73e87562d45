"""Starts that die before their processes have joined are in the account of the run's time."""

import json
import os
import signal
import socket
import time

import pytest

from alto_jax.config import ConfigError
from alto_jax.train import early, goodput
from tests import fake_stage
from tests.forking import SERVER
from tests.parallel.test_distributed import CONFIG

COMMAND = ["configs/stage1.py:debug", []]


def test_a_start_that_died_is_in_the_account_of_the_next(tmp_path):
    run, config = tmp_path / "a" / "run", fake_stage.config(train={"max_restarts": 1})
    early.Note(str(run), COMMAND)
    early.Note(str(run), ["another", []])
    with (run / early.FILE).open("a") as file:
        file.write('{"id": "half a li')
    time.sleep(1.5)
    note = early.Note(str(run), COMMAND)
    [died] = note.take()
    account = goodput.Account(run, config, age=goodput.process_age(), early=[died])
    note.drop()
    account.go_on_from(0)
    found = account.summary()
    # Note: both are of this one process, which began once.
    assert found["starts"] == 2 and found["seconds"]["down"] == pytest.approx(0, abs=0.1)
    assert [start.config == "" for start in goodput.read_starts(run)] == [True, False]
    assert not early.Note(str(run), COMMAND).take()
    # Taken over once, also if the start died in between; and it is none of those that train.max_restarts counts.
    goodput.Account(run, config, early=[died])
    assert sum(start.config == "" for start in goodput.read_starts(run)) == 1
    early_start = goodput.Start(0.0, 0, "")
    goodput.Account(tmp_path, config, early=[early_start, early_start])
    with pytest.raises(ConfigError, match="max_restarts"):
        goodput.require_progress(tmp_path, config, 0)


def test_time_before_the_account_is_down(tmp_path):
    config, now = fake_stage.config(), 1000.0
    died = goodput.Start(now - 70, 0, "", boot="a", uptime=30.0)
    account = goodput.Account(tmp_path, config, age=10.0, early=[died], clock=lambda: now, wall=lambda: now,
                              uptime=lambda: ("a", 100.0))  # fmt: skip
    account.go_on_from(0)
    found = account.summary()
    assert found["wall_seconds"] == 70 and found["seconds"]["down"] == 60 and found["seconds"]["start"] == 10


def test_a_start_that_ends_by_itself_leaves_nothing(tmp_path):
    early.Note(str(tmp_path / "a" / "run"), COMMAND).take_back()
    assert not list(tmp_path.iterdir())
    early.Note(str(tmp_path / "run"), COMMAND)
    early.Note(str(tmp_path / "run"), COMMAND).take_back()
    assert len(early.Note(str(tmp_path / "run"), COMMAND).take()) == 1
    (tmp_path / "file").touch()
    early.Note(str(tmp_path / "file" / "run"), COMMAND).take_back()  # cannot be written


def test_who_is_first(monkeypatch, tmp_path):
    assert early.is_first("none", {"ALTO_PROCESS_ID": "3"})
    assert early.is_first("env", {"ALTO_PROCESS_ID": "0"}) and not early.is_first("env", {"ALTO_PROCESS_ID": "1"})
    assert early.is_first("auto", {"SLURM_PROCID": "0"}) and not early.is_first("auto", {})
    assert not early.is_first("auto", {"TPU_WORKER_ID": "0", "MEGASCALE_SLICE_ID": "1"})
    monkeypatch.setenv("ALTO_RUNS", str(tmp_path))
    early.Note("gs://bucket/run", COMMAND)
    [file] = tmp_path.iterdir()  # beside the working copy
    assert file.name.endswith(early.FILE)


def test_killed_before_joining(tmp_path):
    """The run is that of test_distributed.py, whose programs are there by then."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"ALTO_COORDINATOR": f"127.0.0.1:{port}", "ALTO_NUM_PROCESSES": "2"}
    run = tmp_path / "run"
    command = ["-m", "alto_jax.main", *CONFIG, f"--workdir={run}", "--distributed=env"]
    start = lambda index: SERVER.start(command, env | {"ALTO_PROCESS_ID": str(index)})
    SERVER.start(["-c", "pass"], env).communicate(60)  # whose own start, for a first command, is in no account
    began, first = time.time(), start(0)
    while not (run / early.FILE).exists():
        assert first.poll() is None
        time.sleep(0.02)
    time.sleep(3)  # it waits for the other one
    first.send_signal(signal.SIGKILL)
    first.communicate(60)
    both = [start(index) for index in range(2)]
    said = [process.communicate(300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    account = json.loads((run / "result.json").read_text())["goodput"]
    wall = (run / "result.json").stat().st_mtime - began
    print(f"account {account['wall_seconds']} s of {wall} s")
    assert account["wall_seconds"] == pytest.approx(wall, rel=0.02) and account["starts"] == 2
    assert not (run / early.FILE).exists()
