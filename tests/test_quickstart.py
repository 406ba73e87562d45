"""The quickstart, at its debug size: what the directory holds, what it prints, and a page that needs no network."""

from html.parser import HTMLParser
import json
import math
import re

import pytest

from alto_jax.data import lessons
from tests.conftest import run_python

KEYS = {
    "tokenizer": {
        "giou_full", "giou_by_tokens", "giou_adaptive", "giou_fixed_same_mean", "mean_length", "std_length",
        "codes_used",
    },
    "stage0": {"token_accuracy", "exact"} | {f"exact/{kind}" for kind in lessons.KINDS},
    "stage2": {
        "giou", "giou_no_codes", "distinct", "format_rate", "mean_length", "std_length", "loss_first", "loss_last",
    },
    "stage3": {
        "giou", "giou_no_codes", "distinct", "format_rate", "mean_length", "std_length", "reward_first", "reward_last",
    },
    "seconds": {"stage0", "stage1", "stage1_5", "stage2", "stage3", "report", "this_command"},
}  # fmt: skip


@pytest.fixture(scope="module")
def summary(quickstart):
    return json.loads((quickstart.path / "summary.json").read_text())


def numbers(value):
    """All numbers in nested dicts."""
    return [n for v in value.values() for n in numbers(v)] if isinstance(value, dict) else [value]


def test_summary_holds_the_numbers_and_they_are_printed(quickstart, summary):
    assert {stage: set(values) for stage, values in summary.items()} == KEYS
    assert set(summary["tokenizer"]["giou_by_tokens"]) == {"1", "8"}
    assert all(isinstance(n, (int, float)) and math.isfinite(n) for n in numbers(summary))
    for stage, values in summary.items():
        block = quickstart.output.split(f"\n{stage}\n")[1]
        for name in values:
            assert re.search(rf"^  {name} +\S", block, re.MULTILINE), name
    assert f"{summary['stage2']['loss_first']:.3f}" in quickstart.output
    assert f"report: {quickstart.path / 'report.html'}" in quickstart.output


def test_a_run_of_a_stage_leaves_its_record(quickstart):
    for stage in ("stage0", "stage1", "stage1_5", "stage2", "stage3"):
        run = quickstart.path / stage
        names = {p.name for p in run.iterdir()} - {"tokenizer.json"}
        files = {"config.json", "goodput.jsonl", "metrics.jsonl", "parameters.txt", "result.json", "starts.json"}
        files |= {"prompts.jsonl"} if stage == "stage3" else set()
        files |= set() if stage == "stage0" else {"frozen"}  # which trains all that it has
        assert names == files | {"checkpoints", "tensorboard"}
        assert (run / "tokenizer.json").exists() == (stage in ("stage0", "stage2", "stage3"))
        assert re.search(r"trainable: [\d,]+ parameters", (run / "parameters.txt").read_text())
        assert any((run / "tensorboard").iterdir())
        assert f"[{stage}] 4/4  loss " in quickstart.output and " ETA " in quickstart.output


class _References(HTMLParser):
    """What a page would load."""

    def __init__(self, page):
        super().__init__()
        self.found, self.tags = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.found += [value for name, value in attributes if name in ("src", "href", "srcset", "poster", "data")]


def test_report_opens_without_a_network(quickstart):
    page = (quickstart.path / "report.html").read_text(encoding="utf-8")
    references = _References(page)
    assert references.found and all(value.startswith("data:image/png;base64,") for value in references.found)
    assert not {"script", "link", "iframe"} & set(references.tags)
    assert not re.search(r"url\(|@import|https?://", page)
    # Four held-out masks and four requests (the size of the evaluation), three pictures each, and two figures.
    assert references.tags.count("img") == 2 * 4 * 3 + 2
    for figure in ("iou_against_tokens.png", "length_histogram.png"):
        assert (quickstart.path / figure).stat().st_size > 1000


def test_running_it_again_only_reports(quickstart, summary):
    command = ["-m", "alto_jax.main", "--config=configs/quickstart.py:debug", f"--workdir={quickstart.path}"]
    flags = [f"--config.{stage}.{change}" for stage, changes in quickstart.overrides.items() for change in changes]
    done = run_python(*command, *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("is already complete") == 5
    again = json.loads((quickstart.path / "summary.json").read_text())
    for name in ("tokenizer", "stage2", "stage3"):
        assert again[name] == summary[name]
    # Another configuration of any stage is refused before anything runs.
    done = run_python(*command, *flags, "--config.stage3.optim.lr=0.5")
    assert done.returncode == 2 and "stage3 holds a run of another configuration" in done.stderr
    assert "already complete" not in done.stdout
