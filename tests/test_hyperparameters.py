"""docs/hyperparameters.md says what the configurations say, and leaves nothing out."""

import ast
import dataclasses
import importlib
import re

import pytest

from alto_jax.data.sa1b_folder import VALIDATION
from alto_jax.experiment import OptimConfig, make_experiment
from alto_jax.main import load_config
from tests.conftest import ROOT

TEXT = (ROOT / "docs/hyperparameters.md").read_text(encoding="utf-8")
STAGES = {"Stage 1:": "stage1", "Stage 1.5:": "stage1_5", "Stage 2:": "stage2", "Stage 3:": "stage3"}
# Types of arrays, which change nothing that is stated anywhere.
NOT_LISTED = {"param_dtype", "frozen_dtype", "frozen_float32"}


def table(title):
    """(sizes of the two columns of ours, {field: cells after it}) of a stage's table."""
    section = next(part for part in TEXT.split("\n## ") if part.startswith(title))
    rows = [
        [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in section.splitlines()
        if line.startswith("|") and not line.startswith("|---")
    ]
    assert all(len(row) == 6 for row in rows) and rows[0][3:] == ["Paper", "Reference", "Note"]
    return [cell.strip("`") for cell in rows[0][1:3]], {row[0].strip("`"): row[1:] for row in rows[1:]}


def value_of(config, name):
    for part in name.split("."):
        config = getattr(config, part)
    return config


@pytest.mark.parametrize("title, stage", STAGES.items(), ids=STAGES.values())
def test_our_columns_are_the_configurations(title, stage):
    sizes, rows = table(title)
    for column, size in enumerate(sizes):
        config = make_experiment(load_config(str(ROOT / f"configs/{stage}.py:{size}")).to_dict())
        for name, cells in rows.items():
            assert ast.literal_eval(cells[column].strip("`")) == value_of(config, name), (stage, size, name)
    for name, cells in rows.items():
        assert cells[2] and cells[3], f"{name}: say what paper and reference use, or 'not stated'"


@pytest.mark.parametrize("title, stage", STAGES.items(), ids=STAGES.values())
def test_no_setting_of_the_optimizer_or_of_a_stage_is_missing(title, stage):
    _, rows = table(title)
    wanted = {f"optim.{f.name}" for f in dataclasses.fields(OptimConfig)} - {f"optim.{n}" for n in NOT_LISTED}
    wanted |= {"train.steps", "train.batch_size"}
    # What a stage's file sets in its own group is listed too.
    group = {"stage1": "tokenizer", "stage1_5": "tokenizer", "stage2": "sft", "stage3": "grpo"}[stage]
    wanted |= set(leaves(group, group_of(stage, group)))
    assert wanted - set(rows) == set()


def group_of(stage, group):
    """The plain values that a file of configs/ sets, without defaults."""
    size = {"tokenizer": "base", "sft": "8b", "grpo": "8b"}[group]
    return importlib.import_module(f"configs.{stage}").get_config(size).to_dict()[group]


def leaves(name, value):
    return [p for k, v in value.items() for p in leaves(f"{name}.{k}", v)] if isinstance(value, dict) else [name]


def test_paper_sizes_follow_what_is_stated():
    """The values that once differed without being listed."""
    config = lambda name: make_experiment(load_config(str(ROOT / "configs" / name)).to_dict())
    for name in ("stage1.py:base", "stage1_5.py:base"):
        assert (config(name).optim.b1, config(name).optim.b2) == (0.99, 0.999)
    assert config("stage1.py:base").train.steps == 300_000
    assert config("stage1_5.py:base").train.steps == round(300_000 * 3 / 48)
    for size in ("8b", "1b", "2b", "4b", "26b"):
        assert 200 <= config(f"stage3.py:{size}").train.steps <= 900, "a few hundred"


@pytest.mark.parametrize("stage", STAGES.values())
def test_the_paper_recipe_is_the_stages_on_its_data(stage):
    """docs/hyperparameters.md's short table says what configs/paper.py does; all else is that of the stage's file."""
    size = "base" if stage.startswith("stage1") else "8b"
    ours, plain = (make_experiment(load_config(str(ROOT / "configs" / name)).to_dict())
                   for name in (f"paper.py:{stage}", f"{stage}.py:{size}"))  # fmt: skip
    starts = {"init_from": plain.init_from, "tokenizer_from": plain.tokenizer_from, "data": plain.data}
    assert dataclasses.replace(ours, **starts) == plain and ours.init_from
    assert ours.data.validation_fraction == VALIDATION and ours.data.source in ("sa1b", "mixture")
    section = next(part for part in TEXT.split("\n## ") if part.startswith("The recipe at 8B"))
    (row,) = (line for line in section.splitlines() if line.startswith(f"| `{stage}` |"))
    numbers = [float(re.match(r"[\d.e+-]+", cell.strip())[0]) for cell in row.split("|")[4:7]]
    assert numbers == [ours.train.batch_size, ours.optim.lr, ours.train.steps]
