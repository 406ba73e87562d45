"""A step to choose, a step that cannot be read, and a path that holds no checkpoint of ours."""

import asyncio
import gc
import logging
import re
import shutil
import sys

import jax
import numpy as np
import pytest

from alto_jax.checkpoint import damage, foreign, rows, runs
from alto_jax.config import ConfigError
from alto_jax.train import loop
from tests import fake_stage
from tests.conftest import run_python
from tests.train.test_loop import arrays
from tests.train.test_reliability import DAMAGES
from tests.train.test_reliability import damage as spoil

# What is said of each damage.
WORDS = {
    "array data cut": "the data of the arrays are damaged|the list of its arrays is missing or damaged",
    "array data gone": r"the data of the arrays \(state/d\) are missing|the data of the arrays",
    "bits of an array flipped": "arrays are not what was saved|the data of the arrays are damaged|the list of its",
    "index of arrays gone": r"the index of the arrays \(state/manifest.ocdbt\) is missing",
    "tree metadata cut": r"the list of the arrays \(state/_METADATA\) is damaged \(40 bytes, not JSON\)",
    "description empty": r"the description \(meta/metadata\) is damaged \(0 bytes, not JSON\)",
    "data position gone": r"the position in the data \(the folder data\) is missing",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the fake stage with the steps 10 and 12."""
    path = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_stage", lambda config, mesh, directory=None: fake_stage.stage())
        loop.train(fake_stage.config(), path)
    return path


READ = """
import sys
import jax, numpy as np
from alto_jax import cli
from alto_jax.checkpoint import runs

def main():
    tree = {"vision": {"kernel": jax.ShapeDtypeStruct((3, 2), np.float32)}}
    for run in sys.argv[1:]:
        runs.load_meta(run)
        runs.load_params(run, tree)
        runs.load_params(run, tree)

cli.run(main)
"""
RESUME = """
import sys
from alto_jax import cli
from alto_jax.train import loop
from tests import fake_stage

def main():
    loop.make_stage = lambda config, mesh, directory=None: fake_stage.stage()
    for run in sys.argv[1:]:
        loop.train(fake_stage.config(), run)

cli.run(main)
"""
HOWS = [how for how in DAMAGES if how != "not finished"]
READ_BY = {"read": (READ, [how for how in HOWS if how != "data position gone"]), "resume": (RESUME, HOWS)}


@pytest.fixture(scope="module", params=READ_BY)
def told(request, run, tmp_path_factory):
    """Of copies of the run, each damaged in its way: the copy, and what one process that reads them all says of it."""
    script, hows = READ_BY[request.param]
    copies = {how: tmp_path_factory.mktemp("damaged") / "run" for how in hows}
    for how, copy in copies.items():
        shutil.copytree(run, copy)
        (copy / "result.json").unlink()
        spoil(copy / "checkpoints" / "12", how)
    done = run_python("-c", script, *copies.values())
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == len(copies), done.stderr[:4000]
    return {how: (copy, [line for line in lines if f" {copy}: " in line]) for how, copy in copies.items()}


@pytest.mark.parametrize("how", HOWS)
def test_a_damaged_step_is_one_line(how, told):
    """On stderr there is one line, with what is missing in words, however many arrays could not be read."""
    if how not in told:
        pytest.skip("readers of parameters need no position in the data")
    copy, lines = told[how]
    assert len(lines) == 1, told
    assert lines[0].startswith(f"warning: {copy}: the checkpoint of step 12 cannot be read (")
    assert lines[0].endswith("; going back to step 10") and "NoneType" not in lines[0]
    assert re.search(WORDS[how], lines[0]), lines[0]


def test_a_step_to_choose(run, tmp_path):
    tree = {"vision": {"kernel": jax.ShapeDtypeStruct((3, 2), np.float32)}}
    for step in (10, 12):
        assert runs.load_meta(run, step)["step"] == step
        opened = rows.open_params(run, step)["vision/kernel"]
        np.testing.assert_array_equal(np.asarray(opened), arrays(run, step)["['params']['vision']['kernel']"])
    assert runs.load_meta(run)["step"] == 12
    for call in (runs.load_meta, rows.open_params):
        with pytest.raises(ConfigError, match=r"--step=7: .* has the steps 10, 12"):
            call(run, 7)
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    spoil(copy / "checkpoints" / "12", "description empty")
    with pytest.raises(ValueError, match=r"no checkpoint can be read \(step 12: the description .* is damaged"):
        runs.load_meta(copy, 12)  # what was asked for, or nothing
    np.testing.assert_array_equal(runs.load_params(run, tree)["vision"]["kernel"],
                                  arrays(run, 12)["['params']['vision']['kernel']"])  # fmt: skip


def test_other_errors_still_reach_the_hook(monkeypatch):
    """What asyncio says of a closed loop is dropped after a failure; all else goes to the hook that was there."""
    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: told.append(found.exc_value))
    with damage.quiet():
        pass
    with pytest.raises(ValueError), damage.quiet():
        raise ValueError("an array cannot be read")
    loop_ = asyncio.new_event_loop()
    loop_.close()

    class Raises:
        def __init__(self, call):
            self.call = call

        def __del__(self):
            self.call()

    def closed():
        loop_.call_soon_threadsafe(print)

    def other():
        raise RuntimeError("Event loop is closed, says somebody else")

    for call in (closed, other):
        Raises(call)
        gc.collect()
    assert [str(error) for error in told] == ["Event loop is closed, says somebody else"]


def test_results_that_come_late_stay_unsaid_after_a_read_that_works(monkeypatch, caplog):
    """A damaged step, the step before it, which can be read, and only then what is left of the first attempt."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(logging.getLogger("asyncio"), "filters", [])

    def come_late():
        loop_ = asyncio.new_event_loop()
        loop_.create_future().set_exception(ValueError("an array that nobody waits for"))
        gc.collect()
        loop_.close()
        return [record for record in caplog.records if "never retrieved" in record.getMessage()]

    with damage.quiet():
        pass
    assert len(come_late()) == 1  # nothing has failed: asyncio tells as ever
    caplog.clear()
    with pytest.raises(ValueError), damage.quiet():
        raise ValueError("an array cannot be read")
    with damage.quiet():
        pass
    assert come_late() == []


def test_what_is_no_run_is_named(tmp_path):
    def folder(name, *files):
        (tmp_path / name).mkdir(parents=True)
        for file in files:
            (tmp_path / name / file).write_text("{}")
        return tmp_path / name

    imported = (
        "PyTorch weights, no checkpoint of alto_jax; import it first: python -m tools.convert_torch_weights import"
    )
    for path in (
        folder("hf", "config.json", "model.safetensors"),
        folder("sharded", "model.safetensors.index.json"),
        folder("bin", "pytorch_model.bin"),
        folder("peft", "adapter_config.json"),
        folder("file", "alto.pth") / "alto.pth",
    ):
        assert imported in foreign.explain(path)
        with pytest.raises(FileNotFoundError, match=f"{imported} {path} OUT"):
            runs.find_run(path)
    step = folder("run/checkpoints/10")
    with pytest.raises(FileNotFoundError, match=rf"one step of a run; give .*: {tmp_path}/run --step 10"):
        runs.find_run(step)
    assert foreign.explain(folder("empty")) is None and foreign.explain(tmp_path / "nowhere") is None


def test_reads_that_were_not_begun_are_not_told_of():
    """In a process of its own: pytest has filters of its own."""
    script = "from alto_jax.checkpoint import damage\nclass Store:\n    async def read(self): pass\nStore().read()\n"
    script += "async def other(): pass\nother()\n"
    said = run_python("-c", script, fresh=True).stderr
    assert "other" in said and "Store" not in said, said
