"""Where a run's time went, over restarts; which process is slow; saves by the clock. With clocks of the tests' own."""

import json
import types

import jax
import pytest

from alto_jax.checkpoint import runs
from alto_jax.cli import Stopped
from alto_jax.config import ConfigError
from alto_jax.experiment import TrainConfig
from alto_jax.parallel import distributed
from alto_jax.train import goodput, loop, saving
from alto_jax.train.logs import Logs
from alto_jax.train.progress import read_metrics
from alto_jax.train.stragglers import Stragglers
from tests import fake_stage


class Killed(BaseException):
    """Ends a run as signal 9 does: nothing of the run handles it."""


class Clock:
    """A clock that moves when it is told to, and a little with each look, as `time` of a module."""

    def __init__(self, tick=0.0):
        self.now, self.tick = 1000.0, tick

    def monotonic(self):
        self.now += self.tick
        return self.now

    time = monotonic


def account(path, clock, newest=0, config=None, age=0.0, machine=""):
    config = config or fake_stage.config()
    options = {"clock": clock.monotonic, "wall": clock.time, "uptime": lambda: (machine, clock.monotonic())}
    return goodput.Account(path, config, newest, age=age, **options)


def spend(account, clock, **parts):
    for part, seconds in parts.items():
        with account.during(part):
            clock.now += seconds


def test_parts_add_up_over_a_kill(tmp_path):
    clock = Clock()
    first = account(tmp_path, clock, age=2)
    clock.now += 3
    first.go_on_from(0)
    spend(first, clock, compile=10, step=4, device=16, data=1)
    first.note(2)
    spend(first, clock, save=5)
    first.note(2)  # what is saved
    spend(first, clock, step=7, evaluate=2)
    first.beat(4)
    assert len(goodput.read_starts(tmp_path)[0].marks) == 3  # too soon for a line
    clock.now += goodput.NOTE_SECONDS - 9
    first.beat(4)
    clock.now += 6  # killed before the next line; 30 seconds in a queue
    with (tmp_path / goodput.FILE).open("a") as file:
        file.write('{"step": 5, "seco')
    clock.now += 30
    second = account(tmp_path, clock, newest=2)
    clock.now += 1
    second.go_on_from(2)
    spend(second, clock, compile=2, step=20)
    second.enter("save")
    clock.now += 1.5
    found = second.summary()
    # Of the first start: 2 + 3 + 11 of "start", 20 of "step" before the save; 9 after it are lost.
    assert found["seconds"] == {
        "start": 17, "compile": 12, "step": 40, "data": 1, "evaluate": 0, "save": 6.5, "lost": 9, "down": 36,
    }  # fmt: skip
    assert found["wall_seconds"] == clock.now - 998 and found["starts"] == 2
    assert found["share"] == pytest.approx(40 / found["wall_seconds"], abs=1e-4)
    shares = second.metrics()
    assert sum(shares.values()) == pytest.approx(1) and shares["perf/badput/lost"] == 9 / found["wall_seconds"]
    assert goodput.line(found).endswith("in 2 starts: step 40.0 s, down 36.0 s, start 17.0 s, compile 12.0 s,"
                                        " lost 9.0 s, save 6.5 s, data 1.0 s")  # fmt: skip
    # The third goes on from the beginning: all updates are lost. Of an ended run the time until it is made longer does
    # not count.
    third = account(tmp_path, clock)
    third.go_on_from(0)
    assert third.summary()["seconds"]["step"] == 0 and third.summary()["wall_seconds"] == clock.now - 998
    with third.closing():
        clock.now += 1
    clock.now += 500
    fourth = account(tmp_path, clock)
    fourth.go_on_from(0)
    assert fourth.summary()["wall_seconds"] == clock.now - 998 - 500


@pytest.mark.parametrize(("machines", "down"), [(("a", "a"), 5), (("a", "b"), 86405), (("", ""), 86405)])
def test_a_wall_clock_that_is_set(tmp_path, machines, down):
    """Between starts on one machine its own clock goes; only from one machine to another the wall's, which may jump."""
    clock = Clock()
    first = account(tmp_path, clock, machine=machines[0])
    first.go_on_from(0)
    uptime = clock.now + 5
    clock.now += 5 + 86400
    second = goodput.Account(tmp_path, fake_stage.config(), clock=clock.monotonic, wall=clock.time,
                             uptime=lambda: (machines[1], uptime))  # fmt: skip
    second.go_on_from(0)
    assert second.summary()["seconds"]["down"] == pytest.approx(down)


def test_account_of_a_run_that_was_killed(tmp_path, monkeypatch, capfd):
    """One clock for all: whatever the loop does is in one part, and nothing is counted twice or left out."""
    clock, steps = Clock(tick=0.001), []
    monkeypatch.setattr(goodput, "NOTE_SECONDS", 2.0)
    monkeypatch.setattr(
        goodput.Account.__init__,
        "__kwdefaults__",
        {"age": 0.0, "clock": clock.monotonic, "wall": clock.time, "uptime": lambda: ("a", clock.monotonic())},
    )
    save = runs.Checkpointer.save

    def slow_save(*arguments, **options):
        clock.now += 3
        save(*arguments, **options)

    def check(means):
        clock.now += 2
        steps.append(means)
        if len(steps) == 8:
            raise Killed

    def evaluate(params):
        clock.now += 5
        return {"giou": 0.5}

    monkeypatch.setattr(runs.Checkpointer, "save", slow_save)
    stage = fake_stage.replace(fake_stage.stage(), check=check, evaluate=evaluate)
    monkeypatch.setattr(loop, "make_stage", lambda config, mesh, directory=None: stage)
    config = fake_stage.config(train={"checkpoint_every": 5}, eval={"every": 6, "num_samples": 4})
    began = clock.now
    with pytest.raises(Killed):
        loop.train(config, tmp_path)
    clock.now += 40
    result = loop.train(config, tmp_path)
    found = json.loads((tmp_path / "result.json").read_text())["goodput"]
    assert found == result["goodput"] and found["starts"] == 2 and steps[8:]
    # Restored at 5: 6 and 7 were lost, with the evaluation of 6; what came after the last line is "down".
    seconds = found["seconds"]
    assert sum(seconds.values()) == pytest.approx(clock.now - began, rel=0.02)
    assert seconds["lost"] == pytest.approx(2 + 5 + 2, abs=0.2)
    assert seconds["down"] == pytest.approx(40 + 2, abs=0.2)
    assert seconds["save"] == pytest.approx(3 * 3, abs=0.2)  # steps 5, 10 and 12
    assert seconds["evaluate"] == pytest.approx(2 * 5, abs=0.2)  # of step 6 and of the end
    assert seconds["step"] == pytest.approx(2 * 12, abs=0.3)
    assert seconds["compile"] < 0.2 and seconds["start"] < 0.2
    last = read_metrics(tmp_path)[-2]
    assert last["perf/goodput"] + sum(v for k, v in last.items() if "/badput/" in k) == pytest.approx(1)
    assert "[stage1] goodput " in capfd.readouterr().out
    assert [start.end for start in goodput.read_starts(tmp_path)] == ["", "done"]


def test_restarts_without_progress_have_an_end(tmp_path, monkeypatch):
    config = fake_stage.config(train={"max_restarts": 3})
    (tmp_path / "config.json").write_text("{}")
    loop._claim(tmp_path, config)
    starts = lambda *newest: [account(tmp_path, Clock(), step, config) for step in newest]
    starts(0, 0, 4, 4)
    goodput.require_progress(tmp_path, config, 4)
    starts(4)
    with pytest.raises(ConfigError, match=r"config.train.max_restarts: 3 starts in a row of .* a checkpoint after "
                       r"the one of step 4; .* another number than 3 \(0: no limit\)"):  # fmt: skip
        goodput.require_progress(tmp_path, config, 4)
    goodput.require_progress(tmp_path, config, 6)  # a new checkpoint
    goodput.require_progress(tmp_path, fake_stage.config(train={"max_restarts": 0}), 4)
    goodput.require_progress(tmp_path, fake_stage.config(train={"max_restarts": 3, "accumulate": 2}), 4)
    # What has told its end is not started again by itself, and what dies of something else is.
    for error in (Stopped("saved"), OSError("no such mount"), KeyboardInterrupt()):
        with pytest.raises(type(error)), starts(4)[0].closing():
            raise error
        goodput.require_progress(tmp_path, config, 4)
    for _ in range(3):
        with pytest.raises(RuntimeError), starts(0)[0].closing():
            raise RuntimeError("UNAVAILABLE: a process is gone")
    with pytest.raises(ConfigError, match="after the beginning"):
        loop.train(config, tmp_path)
    # A directory that another configuration takes over has a new account.
    loop._claim(tmp_path, fake_stage.config(train={"max_restarts": 2}))
    assert not goodput.read_starts(tmp_path)


def test_age_of_a_process():
    assert 0 < goodput.process_age() < 1e7


def test_the_slowest_process_is_named(monkeypatch):
    compare = Stragglers()
    assert compare.compare(1.0, 0.9) == {} and not compare.news
    speeds = [[1.0, 0.1, "a"], [1.01, 0.9, "b"], [1.0, 0.2, "c"]]
    monkeypatch.setattr(distributed, "gather", lambda value: speeds)
    assert compare.compare(1.0, 0.1) == {
        "step_seconds_max": 1.01, "own_seconds_max": 0.9, "own_seconds_median": 0.2, "slowest_process": 1.0,
    }  # fmt: skip
    assert compare.news.startswith("process 1 (b) holds the others up: 0.9 of 1.01 s a step are its own")
    compare.compare(1.0, 0.1)
    assert not compare.news  # said once
    speeds[2][1] = 0.95
    compare.compare(1.0, 0.1)
    assert not compare.news  # two of three
    speeds[1][1] = 0.1
    compare.compare(1.0, 0.1)
    assert compare.news.startswith("process 2 (c)")


def saver(**train):
    found = object.__new__(saving.Saver)
    config = types.SimpleNamespace(train=TrainConfig(**train))
    found._config, found._repeats, found._last = config, 1, 0.0
    return found


def test_saves_by_the_clock(monkeypatch):
    clock, asked = Clock(), []
    monkeypatch.setattr(saving, "time", clock)
    clock.now = 100.0
    assert saver(checkpoint_every=4).is_due(8) and not saver(checkpoint_every=4).is_due(9)
    assert not saver(checkpoint_every=0).is_due(8)
    by_time = saver(checkpoint_every=0, checkpoint_minutes=2.0, log_every=5)
    assert not by_time.is_due(8)
    clock.now = 120.0
    assert by_time.is_due(8)
    # Several processes take the word of the first, and only where they meet.
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "from_first", lambda ask: asked.append(ask()) or False)
    assert not any(by_time.is_due(step) for step in range(1, 13)) and asked == [True, True]
    by_time._repeats = 4  # steps 4, 8 and 12 may be saved; each log step (5, 10) has the one after it
    assert not any(by_time.is_due(step) for step in (4, 8, 12, 16)) and len(asked) == 5
    assert saver(checkpoint_every=0)._next(7) == "at the end"
    assert saver(checkpoint_every=4, checkpoint_minutes=1.5)._next(7) == "at step 8 or after 1.5 minutes"
    with pytest.raises(ConfigError, match="checkpoint_minutes: expected at least 0, got -1"):
        TrainConfig(checkpoint_minutes=-1)


def test_a_run_that_saves_by_the_clock(tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(saving, "time", clock)

    def check(means):
        clock.now += 50

    stage = fake_stage.replace(fake_stage.stage(), check=check)
    monkeypatch.setattr(loop, "make_stage", lambda config, mesh, directory=None: stage)
    train = {"checkpoint_every": 0, "checkpoint_minutes": 3.0, "keep_checkpoints": 9}
    loop.train(fake_stage.config(train=train), tmp_path)
    assert runs.complete_steps(tmp_path) == [4, 8, 12]


def test_a_checkpoint_is_kept_by_an_evaluation_of_its_own(tmp_path):
    logs = Logs(fake_stage.config(), tmp_path, 0)
    logs.write(4, {"eval/giou": 0.5, "loss": 1.0})
    assert (logs.metric_of(4, "eval/giou"), logs.metric_of(6, "eval/giou")) == (0.5, None)
    assert (logs.metric_of(6, "loss"), logs.metric_of(6, "rows")) == (1.0, None)
    logs.close()
