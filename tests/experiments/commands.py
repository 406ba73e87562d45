"""A command of experiments/, run in this process."""

import json
import sys


def run_command(module, monkeypatch, out, checkpoint, *options):
    """What `python -m experiments.NAME` writes as NAME.json, as bytes; its other files are there, too."""
    given = ["--checkpoint", checkpoint, "--out", out, *options]
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, given)])
    assert module.main() == 0
    assert out.joinpath(f"{out.name}.png").stat().st_size < 100_000
    assert out.joinpath(f"{out.name}.md").read_text().count("|") > 10
    return out.joinpath(f"{out.name}.json").read_bytes()


def found_twice(module, monkeypatch, tmp_path, checkpoint, *options):
    """What the command finds; the same when it runs in another directory."""
    first = run_command(module, monkeypatch, tmp_path / "a", checkpoint, *options)
    assert run_command(module, monkeypatch, tmp_path / "b", checkpoint, *options) == first
    return json.loads(first)
