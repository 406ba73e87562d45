"""A killed run goes on exactly, for every stage; each stage starts from the one before."""

import json
import pathlib
import shutil
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from alto_jax.checkpoint import arrays as checkpoint_arrays
from alto_jax.checkpoint import runs
from alto_jax.quickstart.training import STARTS
from alto_jax.train import goodput, prompt_log
from alto_jax.train.progress import read_metrics
from benchmarks import reliability
from tests.conftest import run_python


def arrays(run: pathlib.Path, step: int) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint's state by their path."""
    folder, tree = run / "checkpoints" / str(step), {}
    with ocp.PyTreeCheckpointer() as checkpointer:
        for place in checkpoint_arrays.places(folder, runs.read_meta(folder)).values():
            # Note: as NumPy's, since what another number of processes saved has no devices here.
            whole = jax.tree.map(lambda _: ocp.RestoreArgs(np.ndarray), checkpoint_arrays.array_structure(place))
            tree |= checkpointer.restore(place, restore_args=whole)
    return {jax.tree_util.keystr(path): np.asarray(v) for path, v in jax.tree_util.tree_leaves_with_path(tree)}


def untimed(record: dict) -> dict:
    """A line of metrics.jsonl without what no run repeats: how long things took."""
    return {name: value for name, value in record.items() if not name.startswith("perf/")}


def position(run: pathlib.Path, step: int) -> dict:
    """Where the data iterator of a checkpoint stands."""
    return json.loads((run / "checkpoints" / str(step) / "data" / "process_0-of-1.json").read_text())


def whole_account(run: pathlib.Path) -> dict:
    """The account of a run's time, which must hold all of it, from its first start to its result."""
    account = json.loads((run / "result.json").read_text())["goodput"]
    wall = (run / "result.json").stat().st_mtime - goodput.read_starts(run)[0].began
    assert sum(account["seconds"].values()) == pytest.approx(wall, rel=0.02)
    return account


@pytest.mark.parametrize("stage", STARTS)
def test_killed_run_resumes_to_the_same_bits(stage, quickstart, tmp_path):
    """From what was on the disk at step 2, in a process of its own; `test_kills_at_random_moments` sends signal 9."""
    uninterrupted = quickstart.path / stage
    run = tmp_path / stage
    shutil.copytree(quickstart.stopped / stage, run)
    assert runs.find_run(run)[1] == 2 and not (run / "result.json").exists()
    assert position(run, 2) != position(uninterrupted, 4)

    command = [f"--config=configs/{stage}.py:debug", f"--workdir={run}", "--config.eval.num_samples=0"]
    command += [f"--config.{change}" for change in quickstart.overrides.get(stage, ())]
    command += [f"--config.{field}={quickstart.path / before}" for field, before in STARTS[stage].items()]
    resumed = run_python("-m", "alto_jax.main", *command)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert f"[{stage}] resumed from step 2 of" in resumed.stdout
    assert " 2/4 " not in resumed.stdout and " 3/4 " in resumed.stdout

    account = whole_account(run)
    assert account["starts"] == 2
    assert "[{}] goodput {:.1%} of".format(stage, account["share"]) in resumed.stdout

    expected, actual = arrays(uninterrupted, 4), arrays(run, 4)
    assert expected.keys() == actual.keys()
    different = [name for name in expected if not np.array_equal(expected[name], actual[name])]
    assert not different, f"{len(different)} of {len(expected)} arrays differ, such as {different[0]}"
    assert position(run, 4) == position(uninterrupted, 4)
    # The record of the run is the same too: every loss, reward and length of the four steps.
    losses = [untimed(record) for record in read_metrics(uninterrupted) if "loss" in record]
    assert [untimed(record) for record in read_metrics(run)] == losses
    assert [record["step"] for record in losses] == [1, 2, 3, 4]
    if stage == "stage3":
        taken = read_metrics(run, prompt_log.FILE)
        assert taken == read_metrics(uninterrupted, prompt_log.FILE) and len(taken) == 4


def test_what_the_same_command_does_after_the_end(quickstart):
    """Nothing; and the resumed runs above had something to get wrong."""
    before = (quickstart.path / "stage1" / "metrics.jsonl").read_bytes()
    done = run_python(
        "-m", "alto_jax.main", "--config=configs/stage1.py:debug", f"--workdir={quickstart.path / 'stage1'}"
    )
    assert done.returncode == 0 and "is already complete" in done.stdout
    assert (quickstart.path / "stage1" / "metrics.jsonl").read_bytes() == before
    third, fourth = (arrays(quickstart.path / "stage3", step) for step in (3, 4))
    trained = [name for name in third if "['params']" in name and not np.array_equal(third[name], fourth[name])]
    assert trained
    rewards = [record["reward"] for record in read_metrics(quickstart.path / "stage3") if "reward" in record]
    assert len(set(rewards)) > 1


def test_stages_inherit_and_freeze(quickstart):
    """What a stage does not train stays as the stage before left it; what it trains moves."""

    def weights(stage):
        found = arrays(quickstart.path / stage, 4)
        return {n.split("]", 1)[1]: v for n, v in found.items() if n.startswith(("['params']", "['frozen']"))}

    order = ("stage1", "stage1_5", "stage2", "stage3")
    runs = {stage: weights(stage) for stage in order}
    for stage, previous in zip(order[1:], order):
        moved = {
            name.replace("['", "/").replace("']", "")
            for name, value in runs[previous].items()
            if not np.array_equal(value, runs[stage][name])
        }
        trained = {"stage1_5": "/tokenizer/length/", "stage3": "/language_model/"}.get(stage)
        if stage == "stage2":
            assert not moved, "stage 2 leaves the mask tokenizer alone"
        else:
            assert moved and all(name.startswith(trained) for name in moved)
    # GRPO's reference is the language model that stage 2 left.
    reference = {n: v for n, v in runs["stage3"].items() if n.startswith("['reference']")}
    assert reference
    for name, value in reference.items():
        np.testing.assert_array_equal(value, runs["stage2"][name.replace("reference", "language_model")])


def test_kills_at_random_moments(tmp_path):
    """The short version of benchmarks/reliability.py."""
    phases = ("compile", "step")  # the others may be over before they are seen, in so short a run
    before = time.time()
    attempts, different = reliability.prove(tmp_path, kills=1, number=1, seed=5, steps=24, phases=phases)
    assert sum(a.was_killed for a in attempts) == 1 and different == []
    for run, starts in (("alone", 1), ("killed", 2)):
        assert whole_account(tmp_path / run)["starts"] == starts
        # It begins with the process, which has read the configuration when it begins to train.
        began, written = goodput.read_starts(tmp_path / run)[0].began, (tmp_path / run / "config.json").stat().st_mtime
        assert before - 0.1 < began < written
