"""The experiment on the length penalty, a few steps of it."""

import json

from experiments import length_penalty
from tests.conftest import run_python


def test_command(debug_model, tmp_path, refused):
    command = ["--checkpoint", debug_model.path, "--out", tmp_path]
    done = run_python(
        "-m", "experiments.length_penalty", *command, "--penalties", "0.1", "--seeds", "0", "--steps", 2, "--masks", 8
    )
    assert done.returncode == 0, done.stderr[-2000:]
    untrained, trained = json.loads((tmp_path / "length_penalty.json").read_text())["means"]
    assert (untrained["penalty"], trained["penalty"]) == ("untrained", "0.1")
    for row in (untrained, trained):
        assert 1 <= row["mean_length"] <= 8 and 0 <= row["giou"] <= row["best_same_mean"] + 1e-6 <= 1 + 1e-6
        assert row["gain"] == row["giou"] - row["fixed_same_mean"]
    assert "| untrained |" in (tmp_path / "length_penalty.md").read_text()
    assert "--penalties, --seeds: expected numbers" in refused(length_penalty.main, *command, "--penalties", "x")
