"""What the README says is so: its file tree, its commands, and the fields that it names."""

import argparse
import dataclasses
import functools
import importlib.util
import json
import pathlib
import re
import shlex
import sys
import textwrap

import numpy as np
from PIL import Image
import pytest

from alto_jax import predict, tokenize
from alto_jax.config import build
from alto_jax.experiment import ExperimentConfig
from alto_jax.inference import segmenter
from alto_jax.main import load_config, read_config
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = {str(p.relative_to(ROOT / "docs")): p.read_text(encoding="utf-8") for p in (ROOT / "docs").rglob("*.md")}


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
    for folder, text in [(ROOT, README), *(((ROOT / "docs" / name).parent, text) for name, text in DOCS.items())]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (folder / target).exists(), target


def commands() -> list[list[str]]:
    """The words of every `python` and `launch/` command in the blocks of README and docs, without what is optional."""
    text = "\n".join([README, *DOCS.values()])
    fenced = re.findall(r"^ *```bash\n(.*?)```", text, re.DOTALL | re.MULTILINE)
    plain = re.sub(r"^ *```.*?```", "", text, flags=re.DOTALL | re.MULTILINE)
    indented = re.findall(r"^\n((?:    \S.*\n(?: {8}.*\n)*)+)", plain, re.MULTILINE)
    lines = "\n".join([*fenced, *indented]).replace("\\\n", " ").splitlines()
    parts = [re.sub(r" \[[^]]*\]", "", part.strip()) for line in lines for part in line.split("&&")]
    ours = dict.fromkeys(part for part in parts if re.match(r"python (-m|benchmarks/)|launch/", part))
    return [shlex.split(part, comments=True) for part in ours]


def test_there_are_commands():
    modules = {words[2] for words in commands() if words[1] == "-m"}
    assert {"alto_jax.main", "alto_jax.predict", "alto_jax.tokenize", "tools.convert_torch_weights"} <= modules
    assert {"alto_jax.data.convert", "alto_jax.data.open_vocab", "alto_jax.lora"} <= modules


class Parsed(BaseException):
    """The command line is a right one; the command goes no further."""


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(words[:6]))
def test_commands_are_right(words, monkeypatch):
    """The command takes the options; training and planning, a configuration with these fields."""
    if words[0].startswith("launch/"):
        assert (ROOT / words[0]).exists()
        arguments = words[1:]
    elif words[1] == "-m":
        module, arguments = words[2], words[3:]
    else:
        module, arguments = words[1].removesuffix(".py").replace("/", "."), words[2:]
    if words[0].startswith("launch/") or module == "alto_jax.main":
        check_configuration(arguments, is_run=not words[0].startswith("launch/"))
        return
    if importlib.util.find_spec(module).submodule_search_locations is not None:
        module += ".__main__"

    name = "parse_known_args" if module == "alto_jax.plan.__main__" else "parse_args"
    real = getattr(argparse.ArgumentParser, name)

    def parse(*given):
        raise Parsed(real(*given))

    monkeypatch.setattr(argparse.ArgumentParser, name, parse)
    monkeypatch.setattr(sys, "argv", [module, *("conversations" if word == "NAME" else word for word in arguments)])
    with pytest.raises(Parsed) as parsed:
        importlib.import_module(module).main()
    if name == "parse_known_args":
        options, changes = parsed.value.args[0]
        read_config(str(ROOT / options.config), changes)


def check_configuration(arguments: list[str], is_run: bool) -> None:
    """Builds what `--config=FILE:SIZE` and the changes of its fields say."""
    flags = dict(word.removeprefix("--").split("=", 1) for word in arguments if "=" in word)
    if "config" not in flags:
        return
    if is_run:
        assert flags["workdir"].startswith(("runs/", "s3://BUCKET/"))
    changes = [word for word in arguments if word.startswith("--config.")]
    values = read_config(str(ROOT / flags["config"]), changes)
    if "stage" in values:
        build(ExperimentConfig, values)


def blocks(language: str) -> list[str]:
    """The blocks of README and docs in a language."""
    text = "\n".join([README, *DOCS.values()])
    return [
        textwrap.dedent(found) for found in re.findall(rf"^ *```{language}\n(.*?)```", text, re.DOTALL | re.MULTILINE)
    ]


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """The files that the text speaks of, in the working directory; a checkpoint is opened once for all of it."""
    image = np.zeros((96, 128, 3), np.uint8)
    image[20:60, 30:90] = (220, 40, 30)
    Image.fromarray(image).save(tmp_path / "photo.jpg")
    Image.fromarray(image[..., 0]).save(tmp_path / "mask.png")
    (tmp_path / "requests.jsonl").write_text('{"image": "photo.jpg", "boxes": [[30, 20, 90, 60]]}\n')
    for folder, pixels in (("images", image), ("masks", image[..., 0])):
        (tmp_path / "runs/umbrellas" / folder).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "runs/umbrellas" / folder / "umbrella_0000.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(segmenter, "load", functools.cache(segmenter.load))
    return image


def test_requests_run(pictures, monkeypatch, capsys):
    """Every `predict` and `tokenize` of the text, as it stands there, and every block of Python."""
    modules = {"alto_jax.predict": predict, "alto_jax.tokenize": tokenize}
    requests = [words for words in commands() if words[1] == "-m" and words[2] in modules]
    assert len(requests) >= 6
    for words in requests:
        # Note: runs that the text trains before are tests/test_finetune.py's and tests/storage's.
        words = [
            word.replace("runs/finetuned", "alto-tiny").replace("s3://BUCKET/stage2", "alto-tiny") for word in words
        ]
        monkeypatch.setattr(sys, "argv", [words[2], *words[3:]])
        assert not modules[words[2]].main(), words
    names = {"image": pictures}
    found = [block for block in blocks("python") if "http://" not in block]  # Note: tests/serve/ has a service to ask.
    assert len(found) >= 4
    for block in found:
        exec(compile(f"import jax\nimport jax.numpy as jnp\n{block}", "README or docs", "exec"), names)
    assert names["result"].mask.shape == (96, 128) and names["result"].length == len(names["result"].codes)
    target = np.zeros((1, 4, 4))
    target[0, :2] = 1
    reward = names["area_reward"](np.stack([target, target + 1], 1), target, np.array([[True, True]]))
    np.testing.assert_allclose(reward, [[1, 0.5]])


def test_json_is_json():
    assert len(blocks("json")) >= 2
    for block in blocks("json"):
        json.loads(block)


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
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "configs").glob("*.py")]:
        text = pathlib.Path(path).read_text(encoding="utf-8")
        assert not re.search(r"(?<![\w.])/(home|root|work|tmp|Users|mnt)/", text), path
