"""The experiment on the reference's forms, a step of each."""

from experiments import reference_forms
from tests.experiments.commands import found_twice


def test_command_gives_the_same_table(debug_model, monkeypatch, tmp_path):
    monkeypatch.setattr(reference_forms, "MIXED_SIZE", "debug")
    form = "labels a token shorter (reference)"
    monkeypatch.setattr(reference_forms, "FORMS", {form: reference_forms.FORMS[form]})
    options = ["--seeds", "0", "--steps", 1, "--masks", 8, "--train_masks", 160, "--epochs", 1, "--mixing_steps", 1]
    found = found_twice(reference_forms, monkeypatch, tmp_path, debug_model.path, *options)
    names = [*reference_forms.FORMS, "expected reward", *reference_forms.MIXED]
    assert [row["lengths by"] for row in found["rows"]] == names
    assert all(1 <= row["mean_length"] <= 8 for row in found["rows"])
    two = [row["giou_8"] for row in found["rows"][-2:]]
    assert two[0] != two[1]  # mixing is another tokenizer
