"""The experiment on the reference's forms, a step of each."""

import json

from experiments import reference_forms
from tests.experiments.commands import run_command

OPTIONS = ["--seeds", "0", "--steps", 1, "--masks", 32, "--train_masks", 160, "--epochs", 1]


def test_command(debug_model, monkeypatch, tmp_path):
    form = "labels a token shorter (reference)"
    monkeypatch.setattr(reference_forms, "FORMS", {form: reference_forms.FORMS[form]})
    options = [*OPTIONS, "--mixing_steps", 0]
    found = json.loads(run_command(reference_forms, monkeypatch, tmp_path / "a", debug_model.path, *options))
    assert [row["lengths by"] for row in found["rows"]] == [form, "expected reward"]
    assert all(1 <= row["mean_length"] <= 8 for row in found["rows"])


def test_latents_are_mixed(debug_model, monkeypatch, tmp_path):
    monkeypatch.setattr(reference_forms, "FORMS", {})
    monkeypatch.setattr(reference_forms, "expected_reward", lambda *_: [1] * 32)
    monkeypatch.setattr(reference_forms, "MIXED_SIZE", "debug_no_pixels")
    monkeypatch.setattr(reference_forms, "MIXED", {"mixed": True})
    run_command(reference_forms, monkeypatch, tmp_path / "a", debug_model.path, *OPTIONS, "--mixing_steps", 1)
    assert '"legacy_reshape": true' in (tmp_path / "a/runs/mixed_0_lengths/config.json").read_text()
    assert "| mixed |" in (tmp_path / "a/a.md").read_text() and "giou 8" in (tmp_path / "a/a.md").read_text()
