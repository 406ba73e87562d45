"""Frozen parameters: one copy for all checkpoints of a run, whose damage is told and mended."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alto_jax.checkpoint import arrays, rows, runs
from alto_jax.config import ConfigError
from alto_jax.storage import bucket, fetched, mirror, steps
from alto_jax.train import loop
from tests import fake_stage
from tests.train.test_reliability import assert_same_end, damage

FROZEN = {"tokenizer": {"length": {"kernel": jax.ShapeDtypeStruct((2,), np.float32)}}}


def use(monkeypatch, stage=None):
    monkeypatch.setattr(loop, "make_stage", lambda config, mesh, directory=None: stage or fake_stage.stage())


def stamps(folder):
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the fake stage with the steps 10 and 12; and when its frozen parameters were written."""
    path, seen = tmp_path_factory.mktemp("frozen"), []

    def save(self, *arguments, original=runs.Checkpointer.save, **options):
        original(self, *arguments, **options)
        seen.append(stamps(path / "frozen"))

    with pytest.MonkeyPatch.context() as patch:
        use(patch)
        patch.setattr(runs.Checkpointer, "save", save)
        loop.train(fake_stage.config(), path)
    return path, seen


def copy_of(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    return tmp_path / "run", next((tmp_path / "run" / "frozen").iterdir())


def spoil(folder, how):
    """`damage` of a folder of arrays."""
    if how == "not finished":
        damage(folder, how)
        return
    (folder.parent / "state").symlink_to(folder.name)
    damage(folder.parent, how)
    (folder.parent / "state").unlink()


def test_written_once_for_all_steps(run):
    """By the first save; the last steps, whose first ones are gone, have none of them."""
    path, seen = run
    assert len(seen) == 6 and seen[0] and all(later == seen[0] for later in seen) and seen[0] == stamps(path / "frozen")
    [folder] = (path / "frozen").iterdir()
    for step in (10, 12):
        meta = runs.read_meta(path / "checkpoints" / str(step))
        assert meta["frozen"] == folder.name
        assert "frozen" not in arrays.array_structure(path / "checkpoints" / str(step) / "state")
    assert "frozen" not in runs.load_meta(path)
    kernel = runs.load_params(path, FROZEN)["tokenizer"]["length"]["kernel"]
    np.testing.assert_array_equal(kernel, rows.open_params(path, 10)["tokenizer/length/kernel"])
    assert np.abs(kernel).min() > 0


@pytest.mark.parametrize("how", ["array data cut", "bits of an array flipped", "gone", "not finished"])
def test_damage_is_mended(how, run, tmp_path, monkeypatch, capfd):
    """Readers say in one line what is damaged; training makes them again as it began, and ends as it should."""
    path, folder = copy_of(run, tmp_path)
    shutil.rmtree(folder) if how == "gone" else spoil(folder, how)
    if how != "not finished":  # which only says that they are to be written
        with pytest.raises(
            ValueError, match=rf"^{folder}: the frozen parameters, which all .*, cannot be read: \w.*$"
        ) as told:
            runs.load_params(path, FROZEN)
        assert "\n" not in str(told.value)
    shutil.rmtree(path / "checkpoints" / "12")
    use(monkeypatch)
    loop.train(fake_stage.config(), path)
    said = capfd.readouterr()
    assert "resumed from step 10" in said.out and "Traceback" not in said.err
    assert said.err.count("warning: ") == said.err.count("making them again") == (how != "not finished")
    assert_same_end(path, run[0])
    kept = [p.name for p in (path / "broken_checkpoints").glob("*")]
    assert kept == ([] if how in ("gone", "not finished") else [folder.name])
    assert [p.name for p in (path / "frozen").iterdir()] == [folder.name]
    runs.load_params(path, FROZEN)


def test_others_are_refused(run, tmp_path, monkeypatch):
    """The run's start gives other parameters now; nothing that was saved is touched."""
    path, folder = copy_of(run, tmp_path)
    spoil(folder, "bits of an array flipped")
    before, stage = stamps(path / "frozen"), fake_stage.stage()
    use(monkeypatch, fake_stage.replace(stage, init=lambda key: jax.tree.map(lambda a: a + 1, stage.init(key))))
    with pytest.raises(ConfigError, match=r"cannot be read: .*, nor made again from .*: those .* are others now"):
        loop.train(fake_stage.config(), path)
    assert runs.complete_steps(path) == [10, 12] and stamps(path / "frozen") == before


def test_checkpoints_of_earlier_versions(run, tmp_path, monkeypatch):
    """Which have them in each step: they are read, and gone on from with the frozen ones apart."""
    use(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(runs.Checkpointer, "_put_frozen_apart", lambda self, parts, sums: {})
        loop.train(fake_stage.config(train={"steps": 6}), tmp_path)
    assert not (tmp_path / "frozen").exists()
    expected = runs.load_params(run[0], FROZEN)["tokenizer"]["length"]["kernel"]
    np.testing.assert_array_equal(runs.load_params(tmp_path, FROZEN)["tokenizer"]["length"]["kernel"], expected)
    np.testing.assert_array_equal(rows.open_params(tmp_path)["tokenizer/length/kernel"], expected)
    loop.train(fake_stage.config(train={"steps": 8}), tmp_path)
    assert runs.complete_steps(tmp_path) == [6, 8] and len([*(tmp_path / "frozen").iterdir()]) == 1
    np.testing.assert_array_equal(runs.load_params(tmp_path, FROZEN, step=8)["tokenizer"]["length"]["kernel"], expected)


def test_what_no_step_belongs_to_goes(tmp_path):
    """Left by a start that was killed in its first save, or whose configuration was changed then."""
    frozen = {"a": jnp.arange(3.0)}
    arrays.keep_frozen(tmp_path, "first", frozen, set)
    (tmp_path / "frozen" / "second.orbax-checkpoint-tmp").mkdir()
    arrays.keep_frozen(tmp_path, "second", frozen, lambda: {"first"})
    assert sorted(p.name for p in (tmp_path / "frozen").iterdir()) == ["first", "second"]
    arrays.keep_frozen(tmp_path, "third", frozen, lambda: {"second"})
    assert sorted(p.name for p in (tmp_path / "frozen").iterdir()) == ["second", "third"]


def test_in_a_bucket(run, tmp_path, monkeypatch):
    """Pushed once, before the first step; brought with the step that is read, and to a machine that goes on."""
    monkeypatch.setenv("ALTO_RUNS", str(tmp_path / "runs"))
    path, folder = copy_of(run, tmp_path)
    url, order = f"memory://{tmp_path.name}", []
    for name in ("write", "upload"):
        original = getattr(bucket.Bucket, name)
        at = 1 if name == "upload" else 0

        def noted(self, *given, original=original, at=at):
            order.append(given[at])
            return original(self, *given)

        monkeypatch.setattr(bucket.Bucket, name, noted)
    first = mirror.Mirror(bucket.bucket(url, "x"), path)
    first._remember()  # so that it counts as a copy of the empty bucket
    first.pull()
    (folder.parent / "other.orbax-checkpoint-tmp").mkdir()
    (folder.parent / "other.orbax-checkpoint-tmp" / "half").touch()
    first.push()
    shared = [name for name in order if name.startswith("frozen/")]
    assert len(shared) == len({*shared}) == sum(p.is_file() for p in folder.rglob("*"))
    assert shared[-1] == f"frozen/{folder.name}/{steps.DONE}"
    assert order.index(shared[-1]) < min(i for i, name in enumerate(order) if name.startswith("checkpoints/"))
    order.clear()
    first.push()
    assert not order
    wanted = runs.load_params(run[0], FROZEN)["tokenizer"]["length"]["kernel"]
    np.testing.assert_array_equal(runs.load_params(url, FROZEN)["tokenizer"]["length"]["kernel"], wanted)
    assert (fetched.run(url, "x") / "frozen" / folder.name).is_dir()
    second = mirror.Mirror(bucket.bucket(url, "x"), tmp_path / "second")
    second.pull()
    assert {p.name: p.stat().st_size for p in folder.rglob("*") if p.is_file()} == {
        p.name: p.stat().st_size for p in (tmp_path / "second" / "frozen" / folder.name).rglob("*") if p.is_file()
    }
