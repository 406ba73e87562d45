"""A bucket and its working copy: whatever moment a process ends at, the bucket can be gone on from."""

import contextlib
import json
import shutil

import pytest

from alto_jax import cli
from alto_jax.config import ConfigError
from alto_jax.storage import bucket, fetched, mirror, steps


@pytest.fixture
def url(tmp_path, monkeypatch):
    monkeypatch.setenv("ALTO_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(bucket, "_PAUSES", ())
    return f"memory://{tmp_path.name}/run"


@pytest.fixture
def machine(url, monkeypatch):
    """`machine(name)`: a fresh start of the run on that machine, its copy equal to the bucket."""

    def start(name, at=url):
        made = mirror.Mirror(bucket.bucket(at, "--workdir"), mirror.copy_of(at) / name)
        made.pull()
        return made

    return start


def save(made, step, text=""):
    """A step as Orbax leaves it, and the log of a run that has come so far."""
    folder = made.folder / "checkpoints" / str(step)
    for name in ("state/d/array", "meta/metadata", steps.DONE):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name} of step {step} {text}")
    (made.folder / "config.json").write_text("{}")
    with (made.folder / "metrics.jsonl").open("a") as log:
        log.write(f"{step}\n")


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name[0] != "."}


def test_spellings():
    for given in ("s3://b/run", "S3://b//run/", "s3:/b/./run"):
        assert bucket.checked(given, "x") == "s3://b/run" == bucket.place(given)
    assert bucket.checked("file:///tmp//a/", "x") == "file:///tmp/a"
    for given in ("https://host/run", "s3://", "s3://b/../run"):
        with pytest.raises(ConfigError, match=r"^--workdir: expected .*got '"):
            bucket.checked(given, "--workdir")
    assert not bucket.is_url("runs/a:b") and not bucket.is_url("") and not bucket.is_url(None)


def test_another_machine_goes_on(machine):
    """With the newest steps, the logs, and without what is no longer kept or was taken back."""
    first = machine("a")
    for step in (1, 2):
        save(first, step)
    (first.folder / "result.json").write_text("{}")
    first.push()
    save(first, 3)
    shutil.rmtree(first.folder / "checkpoints/1")
    (first.folder / "result.json").unlink()
    (first.folder / "checkpoints/4.orbax-checkpoint-tmp").mkdir()
    first.push()
    second = machine("b")
    assert steps.local_steps(second.folder) == [2, 3]
    expected = files(first.folder)
    assert files(second.folder) == expected and "metrics.jsonl" in expected and "result.json" not in expected
    # The first one is still alive, and finds out before it writes anything.
    save(first, 5)
    with pytest.raises(ConfigError, match="another start of the run .* writes there now; this one ends"):
        first.push()
    assert max(steps.remote_steps(second.bucket, second.bucket.sizes())) == 3


def test_killed_at_any_moment_of_a_push(machine, url, monkeypatch):
    """After each object in turn: what another machine gets is whole, of before or of after."""
    outcomes, is_done = [], False
    while not is_done:
        at, left = f"{url}{len(outcomes)}", iter(range(len(outcomes)))
        killed = machine("a", at)
        save(killed, 1)
        killed.push()
        shutil.rmtree(killed.folder / "checkpoints/1")
        save(killed, 2)

        def stop_in_time(action, left=left):
            def act(*args):
                if action.__name__ == "delete":
                    args = (args[0], [*args[1]])
                    if len(args[1]) > 1:  # One object after the other.
                        return [act(args[0], [name]) for name in args[1]]
                if (action.__name__ != "delete" or args[1]) and next(left, None) is None:
                    raise KeyboardInterrupt
                return action(*args)

            return act

        with monkeypatch.context() as patch:
            for name in ("write", "upload", "delete"):
                patch.setattr(bucket.Bucket, name, stop_in_time(getattr(bucket.Bucket, name)))
            try:
                killed.push()
                is_done = True
            except KeyboardInterrupt:
                pass
        other = machine("b", at)
        outcomes.append(steps.local_steps(other.folder))
        for step in outcomes[-1]:
            array = other.folder / f"checkpoints/{step}/state/d/array"
            assert array.read_text() == f"state/d/array of step {step} "
            assert str(max(outcomes[-1])) in (other.folder / "metrics.jsonl").read_text().split()
    assert outcomes[0] == [1] and [1, 2] in outcomes and outcomes[-1] == [2] and len(outcomes) > 10, outcomes
    assert all(found in ([1], [1, 2], [2]) for found in outcomes), outcomes


def test_a_machine_that_is_further_keeps_what_it_has(machine):
    first = machine("a")
    save(first, 1)
    first.push()
    save(first, 2)  # Killed before this was pushed.
    again = machine("a")
    assert steps.local_steps(again.folder) == [1, 2]
    again.push()
    # Another machine has gone on: what this one has beyond is of no run any more.
    other = machine("b")
    save(other, 3)
    other.push()
    save(again, 4)
    back = machine("a")
    assert steps.local_steps(back.folder) == [1, 2, 3]
    # Emptied by hand: a new run.
    back.bucket.delete(back.bucket.sizes())
    assert not files(machine("a").folder)


def test_first_push_cut_short_keeps_the_step(machine, monkeypatch):
    first = machine("a")
    save(first, 1)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(bucket.Bucket, "upload", stop)
        first.push()
    assert steps.local_steps(machine("a").folder) == [1]


@pytest.mark.parametrize("damage", ["cut", "changed", "missing", "list"])
def test_damaged_step_is_passed_over(machine, url, damage, capsys):
    first = machine("a")
    for step in (1, 2):
        save(first, step)
    first.push()
    name = "checkpoints/2/state/d/array"
    if damage == "missing":
        first.bucket.delete([name])
    elif damage == "list":
        first.bucket.write(f"checkpoints/2/{steps.LIST}", b'{"files": ')
    else:
        content = first.bucket.read(name)
        first.bucket.write(name, content[:-1] if damage == "cut" else b"X" + content[1:])
    found = fetched.run(url, "checkpoint")
    assert steps.local_steps(found) == [1] == steps.local_steps(machine("b").folder)
    said = capsys.readouterr().err
    assert damage == "list" or said.count("step 2 is left out") == 2 and url in said and "state/d/array" in said
    # A run that goes on puts a sound one in its place.
    third = machine("c")
    save(third, 2, "anew")
    third.push()
    assert steps.local_steps(machine("d").folder) == [1, 2]


def test_all_damaged_is_an_error_and_no_fresh_run(machine, url):
    first = machine("a")
    save(first, 1)
    first.push()
    first.bucket.write("checkpoints/1/state/d/array", b"")
    for start in (lambda: machine("b"), lambda: fetched.run(url, "checkpoint")):
        with pytest.raises(OSError, match="checkpoints/1/state/d/array: it is not what was written"):
            start()


def test_reading_fetches_one_step_once(machine, url, monkeypatch):
    first = machine("a")
    for step in (1, 2):
        save(first, step)
    first.push()
    found = fetched.run(url, "checkpoint")
    assert steps.local_steps(found) == [2] and (found / "config.json").exists()
    assert steps.local_steps(fetched.run(f"{url}/checkpoints/", "checkpoint", 1)) == [1]
    with monkeypatch.context() as patch:
        patch.setattr(bucket.Bucket, "download", None)
        assert fetched.run(url, "checkpoint") == found
    with pytest.raises(ConfigError, match=r"--step=7: .* has the steps 1, 2"):
        fetched.run(url, "checkpoint", 7)
    with pytest.raises(FileNotFoundError, match="no complete checkpoint there"):
        fetched.run(url + "s", "checkpoint")
    # Of a run that was copied there by other means, Orbax's mark says what is complete.
    for name in first.bucket.sizes():
        if name.endswith(steps.LIST):
            first.bucket.delete([name])
    assert fetched.newest(url, "x") == (2, f"{steps.DONE} of step 2 ".encode())
    assert steps.local_steps(fetched.run(url, "checkpoint")) == [2]


def test_a_bucket_that_fails_ends_no_run_before_its_end(url, monkeypatch, capsys):
    real = bucket.Bucket.write
    with pytest.raises(OSError, match="no network; everything is in .*, and the same command here brings it there"):
        with mirror.working_copy(url, "--workdir") as (folder, made):

            def fail(self, name, content):
                raise OSError(f"{self.url}: no network")

            save(made, 1)
            monkeypatch.setattr(bucket.Bucket, "write", fail)
            made.settle()
            made.settle()
    said = capsys.readouterr().err
    assert said.count("warning: ") == 1 and f"no network; tried again, the run goes on in {folder}" in said
    with pytest.raises(ZeroDivisionError):  # The run's own error stays what it is.
        monkeypatch.setattr(bucket.Bucket, "write", real)
        with mirror.working_copy(url, "--workdir"):
            monkeypatch.setattr(bucket.Bucket, "write", fail)
            raise ZeroDivisionError
    monkeypatch.setattr(bucket.Bucket, "write", real)
    with mirror.working_copy(url, "--workdir") as (folder, made):
        pass
    assert list(steps.remote_steps(made.bucket, made.bucket.sizes())) == [1]


def test_what_a_service_raises_is_one_line(url, monkeypatch):
    class Refusing:
        calls = 0

        def cat_file(self, name):
            Refusing.calls += 1
            raise RuntimeError("AccessDenied:\n  no")

    monkeypatch.setattr(bucket, "_file_system", lambda scheme: Refusing())
    monkeypatch.setattr(bucket, "_PAUSES", (0.0, 0.0))
    with pytest.raises(OSError, match=f"^{url}: AccessDenied: no$"):
        bucket.Bucket(url).read("x")
    assert Refusing.calls == 3


def test_a_missing_package_is_named(monkeypatch):
    import fsspec

    def missing(*_, **__):
        raise ImportError("no module")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    bucket._file_system.cache_clear()
    with pytest.raises(ConfigError, match=r"^--workdir: gs://b/run: gs:// needs gcsfs: pip install 'alto_jax\[gcs\]'"):
        bucket.bucket("gs://b/run", "--workdir")


def test_prepared_data_are_fetched_whole(url):
    found = bucket.bucket(url, "root")
    with pytest.raises(FileNotFoundError, match=r"root: .*expected a prepared data set \(manifest.json\)"):
        fetched.data(url, "root", "manifest.json", "a prepared data set")
    found.write("shards/0", b"0123")
    found.write("manifest.json", json.dumps({}).encode())
    folder = fetched.data(url, "root", "manifest.json", "a prepared data set")
    assert files(folder) == {"shards/0": b"0123", "manifest.json": b"{}"}


@pytest.mark.parametrize("end, met", [(None, 1), (cli.Stopped("saved"), 1), (ValueError("bad"), 0)])
def test_processes_wait_for_what_the_first_still_brings(end, met, url, monkeypatch):
    """JAX gives up after 300 seconds on a process that does not end; after an error nobody waits."""
    order = []
    monkeypatch.setattr(mirror.distributed, "meet", lambda: order.append("met"))
    monkeypatch.setattr(mirror.Mirror, "close", lambda self, **how: order.append("closed"))
    with pytest.raises(type(end)) if end else contextlib.nullcontext(), mirror.working_copy(url, "--workdir"):
        if end:
            raise end
    assert order == ["closed"] + ["met"] * met
