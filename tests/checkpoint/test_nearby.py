"""The local tier: what the machines still have is gone on with, to the same bits; what is lost or damaged is not."""

import json
import shutil

import numpy as np
import pytest

from alto_jax.checkpoint import agreement, nearby, runs
from alto_jax.config import ConfigError
from alto_jax.train import loop
from tests import fake_stage
from tests.checkpoint.test_runs import META, abstract, assert_same, make_iterator, make_state
from tests.parallel.test_several_processes import finish, run
from tests.train.test_reliability import assert_same_end, undisturbed, use  # noqa: F401 - fixtures

FLIPPED = "one bit is another"


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """This machine's tier."""
    monkeypatch.setenv("ALTO_LOCAL", str(tmp_path / "local"))
    return tmp_path / "local"


def state_of(step):
    """Of a run whose frozen parameters stay as they are."""
    return make_state(float(step)).replace(frozen=make_state(1.0).frozen)


def save(path, steps, *, shared=(1,)):
    """Saves these steps, those of `shared` in the run's directory; returns the batches that follow."""
    checkpointer, iterator = runs.Checkpointer(path, has_local=True), make_iterator()
    for step in range(1, max(steps) + 1):
        next(iterator)
        meta = {**META, "step": step, "unlogged": [{"loss": float(step)}]}
        if step in steps:
            (checkpointer.save if step in shared else checkpointer.save_local)(step, state_of(step), iterator, meta)
            checkpointer.wait()
    checkpointer.close()
    return [next(iterator) for _ in range(3)]


def restore(path):
    """(state, what follows, what was in no record, warnings are on stderr) of a new start."""
    checkpointer, iterator = runs.Checkpointer(path, has_local=True), make_iterator()
    state = checkpointer.restore(abstract(state_of(0)), iterator)
    checkpointer.close()
    return state, [next(iterator) for _ in range(3)], checkpointer.unlogged


def spoil(machine, step, how):
    [folder] = machine.glob(f"*/0-of-1/{step}")
    if how == "gone":
        shutil.rmtree(folder)
    elif how == FLIPPED:
        content = bytearray((folder / "arrays.npz").read_bytes())
        content[len(content) // 2] ^= 1
        (folder / "arrays.npz").write_bytes(content)
    elif how == "another checksum":
        known = json.loads((folder / "about.json").read_text())
        known["about"]["checksums"]["step"] += 1
        del known["digest"]
        (folder / "about.json").write_text(json.dumps({**known, "digest": agreement.json_digest(known)}))
    elif how == "arrays cut":
        (folder / "arrays.npz").write_bytes((folder / "arrays.npz").read_bytes()[:100])
    else:
        (folder / "about.json").write_text((folder / "about.json").read_text().replace('"loss": ', '"loss": 1'))


def test_a_new_start_goes_on_from_the_machine(tmp_path, machine):
    following = save(tmp_path / "run", {1, 2, 3, 4})
    assert sorted(p.name for p in machine.glob("*/0-of-1/*")) == ["3", "4"]
    state, after, unlogged = restore(tmp_path / "run")
    assert_same(state, state_of(4))
    np.testing.assert_array_equal(after, following)
    assert unlogged == [{"loss": 4.0}]
    assert runs.find_run(tmp_path / "run")[1] == 1  # readers of the run's directory know nothing of it
    assert nearby.steps_here(tmp_path / "run") == [3, 4] and nearby.steps_here(tmp_path) == []


@pytest.mark.parametrize("how", ["gone", FLIPPED, "arrays cut", "another checksum", "description changed"])
def test_what_is_damaged_is_passed_over(tmp_path, machine, how, capfd):
    save(tmp_path / "run", {1, 3, 4})
    for step, left in ((4, 3), (3, 1)):
        spoil(machine, step, how)
        assert_same(restore(tmp_path / "run")[0], state_of(left))
        why = {
            FLIPPED: "Bad CRC-32",
            "arrays cut": "File is not a zip",
            "another checksum": "1 arrays are not what was",
        }
        warned = f"warning: ALTO_LOCAL: step {step} cannot be read ({why.get(how, '')}" in capfd.readouterr().err
        assert warned == (how in why)  # what does not say whole what it is counts as nothing


def test_a_newer_checkpoint_is_taken_first(tmp_path, machine):
    save(tmp_path / "run", {1, 2, 3}, shared=(1, 3))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "1")
    assert_same(restore(tmp_path / "run")[0], state_of(3))
    assert [p.name for p in machine.glob("*/*/*")] == ["2"]


def test_what_another_run_has_left_is_not_taken(tmp_path):
    save(tmp_path / "run", {1, 2, 3})
    shutil.rmtree(tmp_path / "run")
    save(tmp_path / "run", {1}, shared=(1,))
    assert_same(restore(tmp_path / "run")[0], state_of(1))
    save(tmp_path / "first", {1, 2, 3})
    shutil.copytree(tmp_path / "first", tmp_path / "copy")
    assert_same(restore(tmp_path / "copy")[0], state_of(1))
    assert_same(restore(tmp_path / "first")[0], state_of(3))


def test_a_full_machine_is_a_warning(tmp_path, machine, capfd):
    machine.write_text("not a folder")
    save(tmp_path / "run", {1, 2})
    said = capfd.readouterr().err
    assert "warning: ALTO_LOCAL: a step could not be kept on this machine: " in said and str(machine) in said
    assert_same(restore(tmp_path / "run")[0], state_of(1))


def test_a_failed_write_keeps_the_step_before(tmp_path, machine, monkeypatch, capfd):
    save(tmp_path / "run", {1, 2})
    inner = np.savez

    def full(file, **arrays):
        inner(file, **arrays)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    checkpointer, iterator = runs.Checkpointer(tmp_path / "run", has_local=True), make_iterator()
    checkpointer.save_local(3, state_of(3), iterator, {**META, "unlogged": []})
    checkpointer.close()
    assert "No space left on device" in capfd.readouterr().err
    assert [p.name for p in machine.glob("*/*/*")] == ["2"]
    monkeypatch.undo()


def killed_after(updates, use, monkeypatch, run, **train):  # noqa: F811 - a fixture
    """A run whose process ended after so many updates, as by signal 9: nothing more is written."""
    seen = []

    def check(means):
        seen.append(means)
        if len(seen) > updates:
            raise KeyboardInterrupt

    use(fake_stage.replace(fake_stage.stage(), check=check))
    with pytest.raises(KeyboardInterrupt):
        loop.train(fake_stage.config(train=train), run)


def test_training_goes_on_from_the_machine(undisturbed, tmp_path, machine, use, monkeypatch, capsys):  # noqa: F811
    tier = {"checkpoint_every": 5, "checkpoint_local_every": 2}
    killed_after(9, use, monkeypatch, tmp_path / "run", **tier)
    assert runs.find_run(tmp_path / "run")[1] == 5 and nearby.steps_here(tmp_path / "run")[-1] == 8
    use(fake_stage.stage())
    result = loop.train(fake_stage.config(train=tier), tmp_path / "run")
    assert "resumed from step 8 of" in capsys.readouterr().out
    assert_same_end(tmp_path / "run", undisturbed)
    assert result["goodput"]["starts"] == 2
    assert list(machine.rglob("*")) == []  # the run has its end in its directory


def test_the_first_checkpoint_is_one_of_the_directory(tmp_path, use, monkeypatch):  # noqa: F811
    killed_after(3, use, monkeypatch, tmp_path / "run", checkpoint_every=0, checkpoint_local_every=1)
    # Note: while it is written, the next one is one, too.
    assert runs.find_run(tmp_path / "run")[1] <= 2 and nearby.steps_here(tmp_path / "run")[-1] == 3


def test_what_a_machine_has_lost_comes_from_its_twin(tmp_path):
    """Two processes: on (2, 2, 1) each has all, on (1, 4, 1) each its part."""
    said = finish(run("nearby_processes.py", tmp_path, processes=2, devices=2))
    told: dict = {}
    for line in said[0][0].splitlines():
        told |= json.loads(line) if line.startswith("{") else {}
    steps = {name: [found[0] for found in both] for name, both in told.items()}
    assert steps == {
        "both have it": [3, 3],
        "another mesh": [1, 1],
        "one is damaged": [3, 3],
        "one is lost": [3, 3],
        "the newest of the other is damaged": [2, 2],
        "both are lost": [1, 1],
        "one reads": [1, 1],
        "each has its own": [3, 3],
        "each reads its own": [1, 1],
        "a part is lost": [1, 1],
    }
    # Bits, position in the data, and what was in no record yet.
    assert all(found[1:4] == [True] * 3 for both in told.values() for found in both), told
    reads = {name: [len(found[4]) for found in both] for name, both in told.items()}
    assert (
        reads["both are lost"] == reads["another mesh"] == reads["each reads its own"] == [2, 2]
    )  # its state and the frozen parameters
    assert reads["one reads"] == [2, 0] and reads["one is lost"] == [1, 1]


def test_a_bucket_needs_none(tmp_path, use):  # noqa: F811
    use(fake_stage.stage())
    with pytest.raises(ConfigError, match="config.train.checkpoint_local_every: expected 0 with a bucket.*got 2"):
        loop.train(fake_stage.config(train={"checkpoint_local_every": 2}), f"file://{tmp_path}/run")
