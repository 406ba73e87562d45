"""The loop names the numbers of its evaluations by what they were measured on."""

import json

import pytest

from alto_jax.config import ConfigError
from alto_jax.train import loop
from alto_jax.train.progress import read_metrics
from tests import fake_stage
from tests.data import replicas


@pytest.fixture
def run(monkeypatch, tmp_path):
    """`run(data=…, eval=…, train=…)` trains a small stage whose evaluation gives giou 0.5; its directory."""
    stage = fake_stage.replace(fake_stage.stage(), evaluate=lambda params: {"giou": 0.5})
    monkeypatch.setattr(loop, "make_stage", lambda *arguments: stage)
    replicas.write_sa1b(tmp_path / "sa1b", 6)
    replicas.write_sa1b(tmp_path / "other", 3)

    def run(**groups):
        loop.train(fake_stage.config(**groups), tmp_path / "run")
        return tmp_path / "run"

    return run


def evaluations(path) -> tuple[set[str], set[str]]:
    """Names with a slash in metrics.jsonl (but those of speed), and the groups of result.json."""
    found = {name for record in read_metrics(path) for name in record if "/" in name}
    groups = {name for name in json.loads((path / "result.json").read_text()) if name.startswith("eval")}
    return {name for name in found if name.startswith("eval")}, groups


def test_training_data_is_named(run, tmp_path, capsys):
    real = {"source": "sa1b", "root": str(tmp_path / "sa1b")}
    path = run(data=real, eval={"every": 5, "num_samples": 4})
    assert evaluations(path) == ({"eval_train/giou"}, {"eval_train"})
    printed = capsys.readouterr().out
    assert printed.count("evaluation is on training data, so its metrics are named eval_train/") == 1
    assert "evaluation on training data (" in printed


@pytest.mark.parametrize("kind", ["fraction", "source", "scenes"])
def test_held_out_data_is_named(run, tmp_path, capsys, kind):
    data = {} if kind == "scenes" else {"source": "sa1b", "root": str(tmp_path / "sa1b")}
    data |= {"validation_fraction": 0.5} if kind == "fraction" else {}
    own = {"source": "sa1b", "root": str(tmp_path / "other")} if kind == "source" else {}
    path = run(
        data=data, eval={"every": 5, "num_samples": 4, **own}, train={"keep_best": 1, "best_metric": "eval/giou"}
    )
    assert evaluations(path) == ({"eval/giou"}, {"eval"})
    printed = capsys.readouterr().out
    assert "training data, so" not in printed
    assert (
        "3 of the 3 images that evaluation takes from config.eval.source are in the training data too" in printed
    ) == (kind == "source")


@pytest.mark.parametrize(
    "metric, own, every, why",
    [
        ("eval/giou", {}, 5, "evaluation is on training data.*so its metrics are named eval_train/"),
        ("eval_train/giou", {"source": "scenes"}, 5, "evaluation is on held-out data.*so its metrics are named eval/"),
        ("eval_train/giou", {}, 0, "eval.every 0"),
    ],
)
def test_the_best_by_a_metric_that_is_never_measured(run, tmp_path, metric, own, every, why):
    real = {"source": "sa1b", "root": str(tmp_path / "sa1b")}
    with pytest.raises(ConfigError, match=f"config.train.best_metric: '{metric}' is never measured: {why}"):
        run(data=real, eval={"every": every, **own}, train={"keep_best": 1, "best_metric": metric})
