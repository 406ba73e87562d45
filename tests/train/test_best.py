"""Patience: a run ends when its evaluations stop getting better, with the parameters of the best, also if killed."""

import json
import math

import jax
import numpy as np
import pytest

from alto_jax.checkpoint import runs
from alto_jax.config import ConfigError
from alto_jax.experiment import TrainConfig
from alto_jax.train import best, loop, saving
from alto_jax.train.progress import read_metrics
from tests import fake_stage

PATIENT = {"patience": 2, "keep_best": 1, "keep_checkpoints": 1, "best_metric": "eval/giou", "best_mode": "max"}


def watch(values, **changes):
    cfg = TrainConfig(**{**PATIENT, **changes})
    return best.Watch(cfg, [{"step": step, "loss": 1.0, "eval/giou": value} for step, value in values.items()])


@pytest.mark.parametrize(
    "values, changes, step, waited",
    [
        ({0: 0.5, 2: 0.6, 4: 0.55}, {}, 2, 1),
        ({0: 0.5, 2: 0.5, 4: 0.5}, {}, 4, 2),
        ({0: 0.5, 2: math.nan, 4: 0.6}, {}, 4, 0),
        ({0: 0.5, 2: 0.4, 4: 0.45}, {"best_mode": "min"}, 2, 1),
        ({}, {}, None, 0),
    ],
)
def test_the_best_and_how_long_ago(values, changes, step, waited):
    found = watch(values, **changes)
    assert (found.best_step, found.waited, found.is_over()) == (step, waited, waited >= 2)
    assert not watch(values, **changes, patience=0).is_over()


def test_lines_without_the_metric_are_no_evaluations():
    found = watch({0: 0.5})
    found.see(1, {})
    found.see(0, {"eval/giou": 0.9})
    assert (found.best, found.waited) == (0.5, 0) and found.has(0) and not found.has(1)


def test_before_beside_after():
    found = watch({0: 0.25, 2: 0.5})
    assert found.result("eval") == {"best_step": 2, "eval_before": {"giou": 0.25}}
    head, row = found.comparison("eval", {"giou": 0.5, "lengths": [3]}).splitlines()
    assert head.split() == ["eval", "before", "after", "change"] and row.split() == ["giou", "0.250", "0.500", "+0.250"]
    assert watch({2: 0.5}).comparison("eval", {"giou": 0.5}) == ""


def patient(monkeypatch, tmp_path, values, spoil=lambda batch: 1.0, **train):
    """Trains the small stage with evaluations of these values, one every second update from step 0 on; its result."""
    given, seen = iter(values), []

    def evaluate(params):
        seen.append(jax.device_get(params))
        return {"giou": next(given, 0.0)}

    stage = fake_stage.replace(fake_stage.stage(spoil), evaluate=evaluate)
    monkeypatch.setattr(loop, "make_stage", lambda *arguments: stage)
    config = fake_stage.config(train={**PATIENT, **train}, eval={"every": 2, "at_start": True, "num_samples": 4})
    return loop.train(config, tmp_path / "run"), seen


def test_patience_needs_checkpoints_that_all_processes_see(monkeypatch, tmp_path):
    monkeypatch.setattr(loop.mirror, "of_each", lambda place, folder, mirror: (folder, True))
    with pytest.raises(ConfigError, match="train.patience: expected 0 where not all processes see the copy of .*got 2"):
        patient(monkeypatch, tmp_path, [])


def test_the_run_ends_with_the_parameters_of_the_best(monkeypatch, tmp_path, capsys):
    result, seen = patient(monkeypatch, tmp_path, [0.1, 0.2, 0.5, 0.4, 0.3])
    assert result["steps"] == 8 and result["best_step"] == 4
    assert result["eval"] == {"giou": 0.5} and result["eval_before"] == {"giou": 0.1}
    printed = capsys.readouterr().out
    assert "ends at step 8: eval/giou no better in the last 2 evaluations, best 0.5 at step 4" in printed
    assert "giou                             0.100     0.500    +0.400" in printed
    assert len(seen) == 5 and not np.array_equal(seen[2]["vision"]["kernel"], seen[4]["vision"]["kernel"])
    saved = runs.load_params(tmp_path / "run", jax.tree.map(abstract, seen[2]))
    jax.tree.map(np.testing.assert_array_equal, saved, seen[2])
    assert [r["step"] for r in read_metrics(tmp_path / "run") if "eval/giou" in r] == [0, 2, 4, 6, 8]
    assert json.loads((tmp_path / "run/result.json").read_text()) == result
    again, seen = patient(monkeypatch, tmp_path, [])
    assert again == result and not seen and "already complete" in capsys.readouterr().out


def test_a_run_that_only_gets_worse_ends_as_it_began(monkeypatch, tmp_path):
    result, seen = patient(monkeypatch, tmp_path, [0.5, 0.4, 0.3])
    assert result["steps"] == 4 and result["best_step"] == 0 and result["eval"] == {"giou": 0.5}
    saved = runs.load_params(tmp_path / "run", jax.tree.map(abstract, seen[0]))
    jax.tree.map(np.testing.assert_array_equal, saved, seen[0])


def test_of_equal_evaluations_the_newest_is_kept(monkeypatch, tmp_path):
    result, _ = patient(monkeypatch, tmp_path, [0.0, 0.0, 0.0])
    assert result["steps"] == 4 and result["best_step"] == 4


def test_a_killed_run_waits_as_long_as_one_that_never_stopped(monkeypatch, tmp_path):
    """Killed after the save at step 6, with an evaluation of step 8 that no checkpoint knows."""
    save, values = saving.Saver.save, [0.1, 0.5, 0.4, 0.45, 0.45]
    assert patient(monkeypatch, tmp_path / "whole", values, patience=3)[0]["best_step"] == 2

    def save_or_die(self, step, *arguments, **options):
        if step == 8:
            raise KeyboardInterrupt
        save(self, step, *arguments, **options)

    monkeypatch.setattr(saving.Saver, "save", save_or_die)
    with pytest.raises(KeyboardInterrupt):
        patient(monkeypatch, tmp_path / "killed", values, patience=3)
    monkeypatch.setattr(saving.Saver, "save", save)
    result, _ = patient(monkeypatch, tmp_path / "killed", values[4:], patience=3)
    assert result["steps"] == 8 and result["best_step"] == 2
    files = [tmp_path / name / "run" for name in ("whole", "killed")]
    shapes = jax.tree.map(abstract, fake_stage.stage().init(jax.random.key(0)))
    jax.tree.map(np.testing.assert_array_equal, *(runs.load_params(path, shapes) for path in files))


def test_a_first_start_that_was_killed_leaves_no_evaluation(monkeypatch, tmp_path):
    """Neither of the same run, whose save of step 0 it would then miss, nor of another one in the same directory."""

    def die(self, *arguments, **options):
        raise KeyboardInterrupt

    for changes in ({}, {"spike_sigmas": 7.0}):
        with monkeypatch.context() as dying:
            dying.setattr(saving.Saver, "save", die)
            with pytest.raises(KeyboardInterrupt):
                patient(monkeypatch, tmp_path / f"{changes}", [0.9])
        assert [r["eval/giou"] for r in read_metrics(tmp_path / f"{changes}/run")] == [0.9]
        result, _ = patient(monkeypatch, tmp_path / f"{changes}", [0.5, 0.4, 0.3], **changes)
        assert result["eval_before"] == {"giou": 0.5} and result["best_step"] == 0 and result["eval"] == {"giou": 0.5}


def test_the_best_after_a_bad_update_is_saved(monkeypatch, tmp_path):
    spoil = lambda batch: math.nan if batch == 3 else 1.0
    result, seen = patient(monkeypatch, tmp_path, [0.1, 0.2, 0.5, 0.4, 0.3], spoil)
    assert result["best_step"] == 4 and result["eval"] == {"giou": 0.5}
    saved = runs.load_params(tmp_path / "run", jax.tree.map(abstract, seen[2]))
    jax.tree.map(np.testing.assert_array_equal, saved, seen[2])


def test_where_the_best_is_not_among_the_checkpoints_the_next_best_is_taken(monkeypatch, tmp_path, capsys):
    """Its save failed. Each start ends so, and says it."""
    save = runs.Checkpointer.save

    def fail(self, step, *arguments, **options):
        if step == 4:
            raise OSError("a checkpoint could not be written")
        save(self, step, *arguments, **options)

    monkeypatch.setattr(runs.Checkpointer, "save", fail)
    result, seen = patient(monkeypatch, tmp_path, [0.1, 0.2, 0.5, 0.4, 0.3, 0.25])
    assert result["best_step"] == 6 and result["eval"] == {"giou": 0.25}  # evaluated once more
    said = "step 4, the best evaluation (0.5), are not among the checkpoints; those of step 6 (0.4) are taken"
    assert said in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, seen[3], seen[5])


def test_a_run_that_is_over_takes_no_further_step(monkeypatch, tmp_path):
    """Killed between its last save and result.json; it evaluates what it has once more."""
    with monkeypatch.context() as dying:
        dying.setattr(loop, "_result", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            patient(monkeypatch, tmp_path, [0.5, 0.4, 0.3])
    result, seen = patient(monkeypatch, tmp_path, [0.5])
    assert result["steps"] == 4 and result["eval"] == {"giou": 0.5} and len(seen) == 1


def abstract(array):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=device)


@pytest.mark.parametrize(
    "train, evaluation, message",
    [
        ({"best_metric": "loss"}, {}, "train.best_metric: expected an evaluation's, with train.patience, got 'loss'"),
        ({}, {"every": 0}, "eval.every: expected above 0 with train.patience, got 0"),
        ({"keep_best": 0}, {}, "train.keep_best: expected at least 1 with train.patience, got 0"),
        ({"checkpoint_every": 4}, {}, "train.checkpoint_every: expected a divisor of eval.every 2, got 4"),
        ({"patience": -1}, {}, "train.patience: expected at least 0, got -1"),
    ],
)
def test_patience_needs_evaluations_and_their_checkpoints(train, evaluation, message):
    with pytest.raises(ConfigError, match=message):
        fake_stage.config(train={**PATIENT, **train}, eval={"every": 2, **evaluation})
