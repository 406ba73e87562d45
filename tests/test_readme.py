"""What the README says is so: its file tree, its commands, and the fields that it names."""

import dataclasses
import importlib.util
import pathlib
import re
import shlex

import pytest

from alto_jax.config import build
from alto_jax.experiment import ExperimentConfig
from alto_jax.main import load_config, read_config
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}


def files_of_the_tree() -> set[str]:
    """The paths that the README's file tree names."""
    block = README.split("## Files")[1].split("```")[1]
    found, folders = set(), []
    for line in block.strip("\n").splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        if not name.endswith("/"):
            assert len(line.split()) > 1, f"{name} has no description"
        folders = [*folders[:depth], name.rstrip("/")]
        found.add("/".join(folders))
    return found


def test_the_file_tree_is_the_real_one():
    named = files_of_the_tree()
    assert len(README.split("## Files")[1].split("```")[1].strip().splitlines()) <= 60
    assert sorted(name for name in named if not (ROOT / name).exists()) == [], "in the README, not in the folders"
    folders = {
        p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith((".", "__")) and any(p.glob("*.*"))
    }
    rooms = {p.name for p in (ROOT / "alto_jax").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    top = {"tools" if name.startswith("tools") else name for name in named}
    assert {f for f in folders if not f.endswith(".egg-info") and f != "runs"} <= top, "a folder without a line"
    assert {f"alto_jax/{room}" for room in rooms} <= named, "a room without a line"


def test_links_lead_somewhere():
    for folder, text in [(ROOT, README), *((ROOT / "docs", text) for text in DOCS.values())]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (folder / target).exists(), target


def commands() -> list[list[str]]:
    """The words of every `python -m` command in the shell blocks of README and docs."""
    blocks = re.findall(r"```bash\n(.*?)```", "\n".join([README, *DOCS.values()]), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in line.split("&&")]
    return [shlex.split(part, comments=True) for part in parts if "python -m" in part]


def test_there_are_commands():
    modules = {words[2] for words in commands()}
    assert {"alto_jax.main", "alto_jax.predict", "alto_jax.tokenize", "tools.convert_torch_weights"} <= modules


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(words[2:5]))
def test_commands_name_what_exists(words):
    assert words[:2] == ["python", "-m"] and importlib.util.find_spec(words[2])
    if words[2] != "alto_jax.main":
        return
    given = [word for word in words[3:] if not word.startswith(("--config=", "--workdir=", "--distributed"))]
    flags = dict(word.removeprefix("--").split("=", 1) for word in words[3:])
    assert flags["workdir"].startswith("runs/")
    values = read_config(str(ROOT / flags["config"]), given)
    if "stage" in values:
        build(ExperimentConfig, values)


def test_fields_of_the_tables_exist():
    config = build(ExperimentConfig, load_config(str(ROOT / "configs/stage3.py:8b")).to_dict())
    tables = DOCS["differences.md"].split("Fixed, without a switch")[0]
    fields = re.findall(r"^\| `([\w.]+)`", tables, re.MULTILINE)
    assert len(fields) == 16
    for name in fields:
        value = config
        for part in name.split("."):
            assert part in {field.name for field in dataclasses.fields(value)}, name
            value = getattr(value, part)
    # The first table's defaults are what the large configurations have.
    for name, text in re.findall(r"^\| `(model[\w.]+)` \| `(\w+)`", tables, re.MULTILINE):
        value = config
        for part in name.split("."):
            value = getattr(value, part)
        assert str(value) == text, name


def test_nothing_of_a_machine_in_the_text():
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "configs").glob("*.py")]:
        text = pathlib.Path(path).read_text(encoding="utf-8")
        assert not re.search(r"(?<![\w.])/(home|root|work|tmp|Users|mnt)/", text), path
