"""What a run does when something goes wrong: signals, bad numbers, damaged files, a full disk, another mesh."""

import os
import pathlib
import shutil
import signal

import jax
import numpy as np
import pytest

from alto_jax.checkpoint import loading, position, runs
from alto_jax.checkpoint.runs import Retention
from alto_jax.cli import EXIT_RESUMABLE, Stopped
from alto_jax.config import ConfigError
from alto_jax.train import goodput, loop
from alto_jax.train.preemption import StopSignals
from alto_jax.train.progress import read_metrics
from alto_jax.train.state import make_schedule
from tests import fake_stage
from tests.conftest import run_python
from tests.train.test_loop import arrays, untimed


@pytest.fixture
def use(monkeypatch):
    """Makes `train` use a stage instead of the configured one."""
    return lambda stage: monkeypatch.setattr(loop, "make_stage", lambda config, mesh, directory=None: stage)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run of the fake stage that nothing happened to."""
    path = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_stage", lambda config, mesh, directory=None: fake_stage.stage())
        loop.train(fake_stage.config(), path)
    return path


def assert_same_end(run, expected, step=12):
    first, second = arrays(expected, step), arrays(run, step)
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(second[name], first[name], err_msg=name)
    assert [untimed(r) for r in read_metrics(run)] == [untimed(r) for r in read_metrics(expected)]


def damage(folder: pathlib.Path, how: str) -> None:
    """Spoils a complete checkpoint."""
    data = sorted((folder / "state").rglob("d/*"))
    if how == "array data cut":
        for file in data:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif how == "array data gone":
        for file in data:
            file.unlink()
    elif how == "bits of an array flipped":
        for file in data:
            content = bytearray(file.read_bytes())
            for place in range(len(content) // 8, len(content), max(len(content) // 8, 1)):
                content[place] ^= 1
            file.write_bytes(content)
    elif how == "index of arrays gone":
        for file in (folder / "state").rglob("manifest.ocdbt"):
            file.unlink()
    elif how == "tree metadata cut":
        file = folder / "state" / "_METADATA"
        file.write_bytes(file.read_bytes()[:40])
    elif how == "description empty":
        (folder / "meta" / "metadata").write_text("")
    elif how == "data position gone":
        shutil.rmtree(folder / "data")
    elif how == "not finished":
        (folder / "_CHECKPOINT_METADATA").unlink()


DAMAGES = (
    "array data cut",
    "array data gone",
    "bits of an array flipped",
    "index of arrays gone",
    "tree metadata cut",
    "description empty",
    "data position gone",
    "not finished",
)


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_newest_checkpoint(how, undisturbed, tmp_path, use, capfd):
    """The run goes on from the one before, says so, and ends with the same bits."""
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    (run / "result.json").unlink()
    damage(run / "checkpoints" / "12", how)
    use(fake_stage.stage())
    loop.train(fake_stage.config(), run)
    said = capfd.readouterr()
    assert "resumed from step 10" in said.out
    if how != "not finished":
        assert "checkpoint of step 12 cannot be read" in said.err and "going back to step 10" in said.err
    assert (run / "broken_checkpoints" / "12").is_dir()
    assert_same_end(run, undisturbed)


def test_damaged_newest_checkpoint_for_readers(undisturbed, tmp_path, capfd):
    """Prediction, evaluation and the next stage take the one before too; with none left the error says why."""
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    tree = {"vision": {"kernel": jax.ShapeDtypeStruct((3, 2), np.float32)}}
    whole = runs.load_params(run, tree)["vision"]["kernel"]
    np.testing.assert_array_equal(whole, arrays(run, 12)["['params']['vision']['kernel']"])
    damage(run / "checkpoints" / "12", "array data gone")
    found = runs.load_params(run, tree)["vision"]["kernel"]
    np.testing.assert_array_equal(found, arrays(undisturbed, 10)["['params']['vision']['kernel']"])
    assert "going back to step 10" in capfd.readouterr().err
    damage(run / "checkpoints" / "12", "description empty")
    assert runs.load_meta(run)["step"] == 10
    damage(run / "checkpoints" / "10", "array data cut")
    damage(run / "checkpoints" / "10", "description empty")
    with pytest.raises(ValueError, match=r"no checkpoint can be read \(step 12: .*\)"):
        runs.load_params(run, tree)
    assert not (run / "broken_checkpoints").exists()


def test_the_only_checkpoint_damaged(undisturbed, tmp_path, use, monkeypatch):
    """The run says so and does nothing; without the checkpoint, as it says, it begins anew, to the same bits."""
    run = tmp_path / "run"

    def stop(means):
        if len(runs.complete_steps(run)) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    use(fake_stage.replace(fake_stage.stage(), check=stop))
    with pytest.raises(Stopped):
        loop.train(fake_stage.config(), run)
    use(fake_stage.stage())
    for step in runs.complete_steps(run):
        damage(run / "checkpoints" / str(step), "array data cut")
    with pytest.raises(
        ValueError, match=r"no checkpoint can be read .*; with \S*/run/checkpoints moved away the run begins"
    ):
        loop.train(fake_stage.config(), run)
    (run / "checkpoints").rename(run / "unreadable")
    loop.train(fake_stage.config(), run)
    assert_same_end(run, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_resumes(number, undisturbed, tmp_path, use):
    run, logged, before = tmp_path / "run", [], signal.getsignal(number)

    def check(means):
        logged.append(means)
        if len(logged) == 7:
            os.kill(os.getpid(), number)

    use(fake_stage.replace(fake_stage.stage(), check=check))
    with pytest.raises(Stopped, match=rf"{number.name}: saved step 7 of .*; the same command goes on"):
        loop.train(fake_stage.config(), run)
    assert runs.find_run(run)[1] == 7 and not (run / "result.json").exists()
    assert signal.getsignal(number) is before  # SIG_IGN of SIGINT under nohup and in the background
    loop.train(fake_stage.config(), run)
    assert_same_end(run, undisturbed)


def test_a_save_between_two_log_steps_loses_no_metrics(tmp_path, use, monkeypatch):
    """The record after the resume is the mean over the updates before the save too, of which one was skipped."""
    config, asked, stop = fake_stage.config(train={"log_every": 5}), [], StopSignals.stop
    use(fake_stage.stage(lambda batch: np.nan if batch == 6 else 1.0))
    loop.train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(StopSignals, "stop", lambda self: "SIGTERM" if asked.append(1) or len(asked) == 8 else stop(self))
        with pytest.raises(Stopped, match="saved step 8"):
            loop.train(config, tmp_path / "stopped")
    loop.train(config, tmp_path / "stopped")
    assert_same_end(tmp_path / "stopped", tmp_path / "whole")
    assert [(r["step"], r["skipped"]) for r in read_metrics(tmp_path / "whole")] == [(1, 0), (5, 0), (10, 1), (12, 0)]


def test_exit_code_of_a_stopped_run():
    script = """
from alto_jax import cli
from alto_jax.cli import Stopped
def main():
    raise Stopped("saved")
cli.run(main)
"""
    done = run_python("-c", script)
    assert (done.returncode, done.stdout) == (EXIT_RESUMABLE, "saved\n")


def test_second_interrupt_is_at_once():
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.stop() == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_several_processes_ask_by_numbers_without_gaps(monkeypatch):
    """JAX agrees on the number after the greatest that was asked about, and answers at exactly that one: a run that may
    stop at every second update alone would else never hear of it."""
    from jax.experimental import multihost_utils

    asked = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda n: asked.append(n) or len(asked) == 5)
    for wanted in ([None] * 3, [None, "SIGTERM"]):  # two runs of a process
        with StopSignals() as signals:
            assert [signals.stop() for _ in wanted] == wanted
    assert asked == list(range(asked[0], asked[0] + 5))


def test_bad_updates_at_the_very_end(tmp_path, use):
    use(fake_stage.stage(lambda batch: np.nan if batch >= 10 else 1.0))
    with pytest.raises(FloatingPointError, match="2 updates in a row were skipped up to step 12"):
        loop.train(fake_stage.config(train={"max_bad_steps": 2}), tmp_path)
    assert not (tmp_path / "result.json").exists()


def test_bad_numbers(tmp_path, use, capfd):
    """Single bad updates are counted; too many in a row end the run with the last good checkpoint kept."""
    use(fake_stage.stage(lambda batch: np.nan if batch == 4 or batch >= 8 else 1.0))
    with pytest.raises(
        FloatingPointError, match=r"3 updates in a row were skipped up to step 11.*good checkpoint is step 8"
    ):
        loop.train(fake_stage.config(train={"max_bad_steps": 3}), tmp_path)
    records = read_metrics(tmp_path)
    assert [r["skipped"] for r in records] == [0, 0, 0, 0, 1, 0, 0, 0, 1, 1, 1][: len(records)] and len(records) >= 10
    assert "loss" not in records[4] and np.isfinite(records[5]["loss"])
    assert runs.complete_steps(tmp_path) == [6, 8]
    assert "step 10 is not saved: the last 2 updates were skipped" in capfd.readouterr().out
    assert all(np.isfinite(value).all() for value in arrays(tmp_path, 8).values())


FULL_DISK = """
import resource, signal, sys
from alto_jax.checkpoint import runs
from alto_jax.train import goodput, loop
from tests import fake_stage

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
loop.make_stage = lambda config, mesh, directory=None: fake_stage.stage()
save, infinity = runs.Checkpointer.save, resource.RLIM_INFINITY
def save_with_limit(self, step, *arguments, **options):
    self.wait()  # so that the limit meets this save alone
    limit = 200 if 4 <= step <= int(sys.argv[2]) else infinity
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, infinity))
    try:
        save(self, step, *arguments, **options)
        self.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (infinity, infinity))
runs.Checkpointer.save = save_with_limit
try:
    loop.train(fake_stage.config(train={"steps": 8, "log_every": 8}), sys.argv[1])
except OSError as error:
    print("ended with", error)
"""


def test_full_disk(tmp_path):
    """A save that fails is said, older checkpoints stay, and a later save succeeds."""
    done = run_python("-c", FULL_DISK, tmp_path / "run", 5)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "warning:" in done.stdout and "a checkpoint could not be written" in done.stdout
    assert "next try at step" in done.stdout and "ended with" not in done.stdout
    assert "Traceback" not in done.stdout + done.stderr, done.stderr[-3000:]
    assert runs.complete_steps(tmp_path / "run") == [6, 8]
    assert not list((tmp_path / "run" / "checkpoints").glob("*tmp*"))
    # Never enough room again: the run ends with the error, and what there was is still there.
    done = run_python("-c", FULL_DISK, tmp_path / "other", 99)
    assert "ended with" in done.stdout and "could not be written" in done.stdout, done.stdout + done.stderr[-2000:]
    assert runs.complete_steps(tmp_path / "other") == [2]


def test_what_has_ended_a_run_is_told(tmp_path, use, monkeypatch):
    """Not the error without a name that closing a checkpoint on a full disk then adds; alone it gets its folder."""
    close = runs.ocp.CheckpointManager.close

    def fails(self):
        close(self)
        raise OSError(27, "File too large")

    monkeypatch.setattr(runs.ocp.CheckpointManager, "close", fails)
    use(fake_stage.stage(lambda batch: np.nan))
    with pytest.raises(FloatingPointError, match="updates in a row were skipped"):
        loop.train(fake_stage.config(), tmp_path / "ended")
    use(fake_stage.stage())
    with pytest.raises(OSError, match="closed/checkpoints: a checkpoint could not be written: .*File too large"):
        loop.train(fake_stage.config(), tmp_path / "closed")


def test_retention():
    metrics = {2: 5.0, 4: 1.0, 6: float("nan"), 8: 3.0, 10: None, 12: 2.0}
    assert Retention(2).keep(metrics) == {10, 12}
    assert Retention(1, best=2).keep(metrics) == {4, 12}
    assert Retention(1, best=3).keep(metrics) == {4, 8, 12}
    assert Retention(1, best=2, mode="max").keep(metrics) == {2, 8, 12}
    assert Retention(3, best=2).keep({}) == set()
    named = {"metric": 100.0, "metric_name": "loss"}
    assert Retention(metric="loss").value(named) == Retention().value(named) == 100.0
    assert Retention(metric="eval/giou").value(named) is None  # kept by another metric until the run was started again
    assert Retention(metric="eval/giou").value({"metric": 0.5}) == 0.5


def test_retention_by_metric_in_a_run(tmp_path, use):
    """The best by a logged metric stay beside the newest, also over a restart."""
    noise = {1: 40.0, 3: 0.1, 5: 30.0, 7: 0.2, 9: 50.0, 11: 20.0}
    stage = fake_stage.stage(lambda batch: noise.get(batch, 1.0))
    use(stage)
    changes = {"keep_checkpoints": 1, "keep_best": 2, "best_metric": "rows"}
    optim = {"lr": 0.0}
    loop.train(fake_stage.config(train=changes, optim=optim), tmp_path)
    by_step = {r["step"]: r["rows"] for r in read_metrics(tmp_path)}
    best = sorted((2, 4, 6, 8, 10, 12), key=by_step.get)[:2]
    assert runs.complete_steps(tmp_path) == sorted({*best, 12})
    (tmp_path / "result.json").unlink()
    shutil.rmtree(tmp_path / "checkpoints" / "12")
    loop.train(fake_stage.config(train=changes, optim=optim), tmp_path)
    assert runs.complete_steps(tmp_path) == sorted({*best, 12})


MESHES = """
import sys
import jax, numpy as np
from alto_jax.checkpoint import runs
from alto_jax.parallel import sharding
from alto_jax.experiment import OptimConfig
from alto_jax.train.state import create_state, make_optimizer
from tests.checkpoint.test_runs import make_iterator

def state(data, fsdp, tensor, seed=0):
    devices = jax.devices()[: data * fsdp * tensor]
    mesh = sharding.make_mesh(sharding.MeshConfig(data, fsdp, tensor), devices)
    draw = lambda i, *shape: jax.random.normal(jax.random.fold_in(jax.random.key(seed), i), shape)
    params = {"head": {"kernel": draw(0, 8, 16)}, "layers": {"attn": {"q": {"kernel": draw(1, 3, 8, 4, 2)}}},
              "embed": {"embedding": draw(2, 16, 8).astype("bfloat16")}, "norm": {"scale": draw(3, 5)}}
    optim = OptimConfig(ema_decay=0.9)
    built = create_state(params, "^(head|layers|norm)", make_optimizer(optim, 10), {}, optim)
    return jax.device_put(built, sharding.tree_shardings(built, mesh))

first = before = state(4, 2, 1)
for step, mesh in enumerate([(1, 1, 1), (2, 2, 2)], 1):
    checkpointer = runs.Checkpointer(sys.argv[1])
    checkpointer.save(step, before, make_iterator(), {})
    checkpointer.wait()
    wanted = state(*mesh, seed=1)
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), wanted)
    before = checkpointer.restore(abstract, make_iterator())
    checkpointer.close()
    for a, b, c in zip(*map(jax.tree.leaves, (before, first, wanted)), strict=True):
        assert a.sharding == c.sharding and a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
kernel = before.params["head"]["kernel"]
assert len(kernel.sharding.device_set) == 8 and kernel.addressable_shards[0].data.shape == (4, 8)
assert not np.array_equal(kernel, wanted.params["head"]["kernel"])
"""


def test_restore_onto_other_meshes(tmp_path, eight_devices):
    """(4, 2, 1) → (1, 1, 1) → (2, 2, 2): the same bits, checksums included."""
    done = run_python("-c", MESHES, tmp_path / "run")
    assert done.returncode == 0, done.stderr[-3000:]


def test_position_in_the_data_of_another_number_of_processes(tmp_path):
    for index in range(4):
        (tmp_path / f"process_{index}-of-4.json").write_text('{"position": 7}')
    assert position.read(tmp_path) == {"position": 7}
    (tmp_path / "process_3-of-4.json").write_text('{"position": 8}')
    with pytest.raises(ValueError, match="positions in the data of 4 processes, which differ"):
        position.read(tmp_path)


def test_profile_and_speed(tmp_path, use):
    use(fake_stage.stage())
    loop.train(fake_stage.config(train={"steps": 6, "profile_steps": 2}), tmp_path)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    timed = [{k for k in r if k.startswith("perf/")} for r in read_metrics(tmp_path)]
    names = {"perf/step_seconds", "perf/data_seconds", "perf/images_per_second", "perf/tflops", "perf/goodput"}
    names |= {f"perf/badput/{part}" for part in goodput.PARTS if part != "step"}
    assert timed == [set(), *[names] * 5]  # The CPU has no known peak, and does not say what memory is in use.
    last = read_metrics(tmp_path)[-1]
    assert 0 < last["perf/step_seconds"] < 60 and 0 <= last["perf/data_seconds"] < last["perf/step_seconds"]
    np.testing.assert_allclose(last["perf/images_per_second"] * last["perf/step_seconds"], fake_stage.ROWS)


def test_average_is_what_others_read(tmp_path, use):
    use(fake_stage.stage())
    loop.train(fake_stage.config(optim={"ema_decay": 0.9}), tmp_path)
    saved = arrays(tmp_path, 12)
    tree = {"vision": {"kernel": jax.ShapeDtypeStruct((3, 2), np.float32)}}
    found = runs.load_params(tmp_path, tree)["vision"]["kernel"]
    np.testing.assert_array_equal(found, saved["['ema']['vision']['kernel']"])
    assert not np.array_equal(found, saved["['params']['vision']['kernel']"])
    assert loading.adapter_meta(fake_stage.config()) == {}


def test_a_finished_run_becomes_longer(tmp_path, use, capfd):
    """In place: with a constant rate the bits of a run that was long from the start; else the schedule of the new
    length from the step on where it goes on."""
    use(fake_stage.stage())
    train = lambda steps, path, **optim: loop.train(fake_stage.config(train={"steps": steps}, optim=optim), path)
    train(12, tmp_path / "long", schedule="constant")
    first = train(6, tmp_path / "run", schedule="constant")
    assert first["steps"] == 6
    result = train(12, tmp_path / "run", schedule="constant")
    assert result["steps"] == 12 and "resumed from step 6" in capfd.readouterr().out
    assert_same_end(tmp_path / "run", tmp_path / "long")
    assert train(12, tmp_path / "run", schedule="constant") == result  # complete again
    with pytest.raises(ConfigError, match="config.train.steps: expected at least the 12 updates that .*, got 11"):
        train(11, tmp_path / "run", schedule="constant")

    cosine = {"schedule": "cosine", "warmup_steps": 0}
    train(6, tmp_path / "cosine", **cosine)
    train(12, tmp_path / "cosine", **cosine)
    short, long = (make_schedule(fake_stage.config(optim=cosine).optim, steps) for steps in (6, 12))
    wanted = [float((short if step < 6 else long)(step)) for step in range(12)]
    found = [r["learning_rate"] for r in read_metrics(tmp_path / "cosine") if "learning_rate" in r]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert found[6] > found[5]
