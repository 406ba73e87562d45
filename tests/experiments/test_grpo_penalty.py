"""The experiment on the length penalty of GRPO, a step of it."""

import json

from experiments import grpo_penalty
from tests.experiments.commands import run_command


def test_command(debug_model, monkeypatch, tmp_path):
    monkeypatch.setattr(grpo_penalty.fixed_adaptive, "KINDS", ("box",))
    monkeypatch.setattr(grpo_penalty, "BIASES", (4.0,))
    options = ["--penalties", "0.1", "--steps", 1, "--batch_size", 1, "--generations", 2, "--scenes", 2]
    found = json.loads(run_command(grpo_penalty, monkeypatch, tmp_path / "a", debug_model.path, *options))
    names = [row["lengths by"] for row in found["rows"] if row["requests"] == "box"]
    assert names == ["checkpoint", "GRPO, λ = 0.1", "end bias +4"]
    for row in found["rows"]:
        assert 0 <= row["giou"] <= 1 and row["change_from"] <= row["change"] <= row["change_to"]
        assert row["lengths by"] != "checkpoint" or row["change"] == row["change_of_tokens"] == 0
    assert found["curves"]["GRPO, λ = 0.1"][0]["entropy"] > 0
    assert (tmp_path / "a/a_steps.png").is_file()
