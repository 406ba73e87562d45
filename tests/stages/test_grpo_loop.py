"""Stage 3 through the loop: every option at once, nothing compiled twice, nothing moved inside a step, logs."""

import json
import logging

import jax
import numpy as np
import pytest

from alto_jax.config import ConfigError
from alto_jax.data import sources, vocabulary
from alto_jax.experiment import make_experiment
from alto_jax.train import logs, loop, progress, prompt_log
from tests.conftest import ROOT

STEPS, GROUP = 6, 4


def config_of(start, **grpo):
    """The quickstart's stage 3 at its smallest size, from a stage-2 run."""
    from alto_jax.main import load_config

    config = load_config(str(ROOT / "configs/stage3.py") + ":debug")
    config.init_from = str(start)
    config.train.update({"steps": STEPS, "checkpoint_every": 0})
    config.grpo.update({"num_generations": GROUP, **grpo})
    return config


@pytest.fixture(scope="module")
def run(quickstart, tmp_path_factory):
    """A run's directory, and how many programs had been compiled when each step was logged."""
    path = tmp_path_factory.mktemp("grpo") / "stage3"
    config = config_of(
        quickstart.path / "stage2", updates_per_rollout=2, minibatches=2, max_rollouts=2, log_samples_every=2
    )
    config.grpo.reward.update({"boundary_weight": 0.5, "token_weight": 0.5})
    compiled, at_step = [], {}

    class Counter(logging.Handler):
        def emit(self, record):
            if "Finished XLA compilation" in record.getMessage():
                compiled.append(record.getMessage())

    class Progress(logs.Progress):
        def line(self, step, metrics):
            at_step[step] = len(compiled)
            super().line(step, metrics)

    def guarded(make):
        """Functions that may not move anything between host and devices."""

        def make_guarded(*args):
            function = make(*args)

            def call(*args):
                with jax.transfer_guard("disallow"):
                    return function(*args)

            return call

        return make_guarded

    counter, logger = Counter(), logging.getLogger("jax")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logs, "Progress", Progress)
        patch.setattr(loop, "make_step", guarded(loop.make_step))
        patch.setattr(loop, "make_rollout", guarded(loop.make_rollout))
        logger.addHandler(counter)
        try:
            with jax.log_compiles():
                loop.train(make_experiment(config), path)
        finally:
            logger.removeHandler(counter)
    return path, at_step


def test_the_guard_would_notice():
    double = jax.jit(lambda x: 2 * x)
    on_device = jax.device_put(np.ones(3))
    with jax.transfer_guard("disallow"):
        double(on_device)
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            double(np.ones(3))


def test_nothing_is_compiled_after_the_first_rollouts(run):
    """Steps 1 and 2 share a rollout, and step 2 writes samples; from then on all programs are there."""
    _, at_step = run
    assert sorted(at_step) == list(range(1, STEPS + 1))
    assert at_step[1] > 0
    assert at_step[3] == at_step[4] == at_step[5] == at_step[6]


def test_metrics_and_histograms(run):
    path, _ = run
    records = [r for r in progress.read_metrics(path) if "loss" in r]
    assert len(records) == STEPS
    parts = {"reward", "format", "iou", "length_reward", "length", "valid", "boundary", "tokens", "num_masks"}
    assert parts | {"entropy", "kl", "clip_fraction", "informative_groups"} <= set(records[0])
    board = b"".join(file.read_bytes() for file in (path / "tensorboard").iterdir())
    for name in parts:
        assert f"rollout/{name}".encode() in board


def test_samples(run):
    path, _ = run
    names = sorted(p.name for p in (path / "samples").iterdir())
    assert names == [f"{step:06d}.{kind}" for step in (2, 4, 6) for kind in ("html", "jsonl")]
    records = [json.loads(line) for line in (path / "samples/000004.jsonl").read_text().splitlines()]
    assert [(r["prompt_index"], r["sample"]) for r in records] == [(b, g) for b in range(2) for g in range(GROUP)]
    for record in records:
        assert any(f"Segment {tag}" in record["prompt"] for tag in ("<ref>", "<box>")) and record["step"] == 4
        total = sum(record[name] for name in ("format", "iou", "length_reward", "boundary", "tokens"))
        assert abs(record["reward"] - total) < 1e-5 and len(record["codes"]) == record["length"]
    page = (path / "samples/000004.html").read_text()
    assert page.count("<article>") == 2 * GROUP and page.count("data:image/png") == 3 * 2 * GROUP


def test_prompts_are_logged_in_the_order_of_the_data(run, quickstart):
    """Of both rollouts of each pair of updates; what stands there is what the data give."""
    path, _ = run
    lines = progress.read_metrics(path, prompt_log.FILE)
    assert [line["step"] for line in lines] == [1, 3, 5]
    config = make_experiment(config_of(quickstart.path / "stage2"))
    data = sources.prompt_iterator(config, vocabulary.text_tokenizer(config, path))
    for line in lines:
        drawn = [next(data) for _ in range(len(line["records"]) // config.train.batch_size)]
        assert line["records"] == [int(record) for batch in drawn for record in batch.record]
        assert line["keys"] == [f"scenes/train/0/{record}" for record in line["records"]]
        assert {*line.get("kept", ())} <= {*line["records"]} and ("kept" in line) == (len(drawn) > 1)
    data.close()


def test_bad_values_are_named(quickstart):
    with pytest.raises(ConfigError, match=r"config\.grpo\.minibatches: .*divisor of the 1 updates, got 2"):
        make_experiment(config_of("start", minibatches=2))
    with pytest.raises(ConfigError, match=r"config\.grpo\.minibatches: .*train\.batch_size 2, got 3"):
        make_experiment(config_of("start", minibatches=3, updates_per_rollout=3))
    with pytest.raises(ConfigError, match=r"config\.grpo\.max_rollouts: .*at least 1, got 0"):
        make_experiment(config_of("start", max_rollouts=0))
