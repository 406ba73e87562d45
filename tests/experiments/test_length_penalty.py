"""The experiment on the length penalty, a few steps of it."""

from experiments import length_penalty
from tests.experiments.commands import found_twice


def test_command_gives_the_same_table(debug_model, monkeypatch, tmp_path, refused):
    options = ["--seeds", "0", "--steps", 2, "--masks", 8, "--penalties", "0.1"]
    untrained, trained = found_twice(length_penalty, monkeypatch, tmp_path, debug_model.path, *options)["means"]
    assert (untrained["lengths by"], trained["lengths by"]) == ("untrained", "0.1")
    for row in (untrained, trained):
        assert 1 <= row["mean_length"] <= 8 and 0 <= row["giou"] <= row["best_same_mean"] + 1e-6 <= 1 + 1e-6
        assert row["gain"] == row["giou"] - row["fixed_same_mean"]
    command = ["--checkpoint", debug_model.path, "--out", tmp_path / "a", *options]
    said = refused(length_penalty.main, *command, "--penalties", "x")
    assert "--penalties: expected numbers with commas between, got 'x'" in said
    said = refused(length_penalty.main, *command, "--masks", 4)
    assert "made with masks 8, not 4; choose another directory" in said
