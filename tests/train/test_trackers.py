"""Metrics go to Weights & Biases and MLflow too; a missing package is one line at the start, a failure one warning.

The services are small fakes here, with the calls that are made of them.
"""

import json
import sys
import threading
import types

import pytest

from alto_jax.config import ConfigError
from alto_jax.experiment import TrainConfig
from alto_jax.train import loop, trackers, workdir
from alto_jax.train.progress import read_metrics
from tests import fake_stage


class FakeWandb(types.ModuleType):
    """The calls of wandb; `fail_at`: the number of the log call that fails."""

    def __init__(self, fail_at=None):
        super().__init__("wandb")
        self.opened, self.logged, self.finished, self.fail_at, self.refuse = [], [], 0, fail_at, None

    def init(self, **given):
        if self.refuse:
            raise RuntimeError(self.refuse)
        self.opened.append(given)
        return types.SimpleNamespace(id=given["id"] or "w1", define_metric=lambda *a, **k: None, log=self.log,
                                     finish=self.finish)  # fmt: skip

    def log(self, metrics):
        if self.fail_at is not None and len(self.logged) >= self.fail_at:
            raise OSError("the network\nis gone")
        self.logged.append(metrics)

    def finish(self):
        self.finished += 1


class FakeMlflow(types.ModuleType):
    """The calls of mlflow's client."""

    def __init__(self):
        super().__init__("mlflow")
        self.runs, self.experiments = {}, {}
        self.MlflowClient = lambda: self
        entities = types.ModuleType("mlflow.entities")
        entities.Metric = lambda key, value, timestamp, step: (step, key, value)
        entities.Param = lambda key, value: (key, value)
        self.entities = entities

    def get_experiment_by_name(self, name):
        found = self.experiments.get(name)
        return found and types.SimpleNamespace(experiment_id=found)

    def create_experiment(self, name):
        self.experiments[name] = f"e{len(self.experiments)}"
        return self.experiments[name]

    def create_run(self, experiment, run_name):
        run_id = f"r{len(self.runs)}"
        self.runs[run_id] = {
            "experiment": experiment,
            "name": run_name,
            "metrics": [],
            "params": {},
            "status": "RUNNING",
        }
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id))

    def log_batch(self, run_id, metrics=(), params=()):
        assert len(params) <= 100
        self.runs[run_id]["metrics"] += metrics
        self.runs[run_id]["params"] |= dict(params)

    def update_run(self, run_id, status):
        self.runs[run_id]["status"] = status

    def set_terminated(self, run_id):
        self.runs[run_id]["status"] = "FINISHED"


@pytest.fixture
def services(monkeypatch):
    """Both fakes in place of the packages, and the small stage in place of a real one."""
    wandb, mlflow = FakeWandb(), FakeMlflow()
    for name, module in {"wandb": wandb, "mlflow": mlflow, "mlflow.entities": mlflow.entities}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(loop, "make_stage", lambda *arguments: fake_stage.stage())
    return types.SimpleNamespace(wandb=wandb, mlflow=mlflow)


def train(path, writers, **changes):
    return loop.train(fake_stage.config(train={"writers": writers, "steps": 4, **changes}), path)


def test_what_is_logged_goes_there_too_and_a_run_goes_on_in_its_entry(services, tmp_path):
    train(tmp_path / "run", "wandb, mlflow")
    records = read_metrics(tmp_path / "run")
    wandb, [run] = services.wandb, services.mlflow.runs.values()
    assert wandb.logged == records and wandb.finished == 1 and wandb.opened[0]["config"]["train"]["steps"] == 4
    found = {step: {name: value for s, name, value in run["metrics"] if s == step} for step, *_ in run["metrics"]}
    assert [{"step": step, **metrics} for step, metrics in found.items()] == records
    assert run["name"] == "run" and run["status"] == "FINISHED" and run["params"]["train.steps"] == "4"
    assert json.loads((tmp_path / "run/trackers.json").read_text()) == {"wandb": "w1", "mlflow": "r0"}
    train(tmp_path / "run", "mlflow,wandb", steps=6)
    assert [given["id"] for given in wandb.opened] == [None, "w1"] and list(services.mlflow.runs) == ["r0"]
    assert {step for step, *_ in run["metrics"]} == {1, 2, 3, 4, 5, 6} and wandb.logged == read_metrics(
        tmp_path / "run"
    )
    train(tmp_path / "other", "mlflow")
    assert services.mlflow.experiments == {"alto_jax": "e0"} and list(services.mlflow.runs) == ["r0", "r1"]


def test_a_failure_is_one_warning_and_the_run_is_the_same(services, tmp_path, capsys):
    services.wandb.fail_at = 1
    without, result = train(tmp_path / "without", ""), train(tmp_path / "run", "wandb")
    assert without["metrics_last"]["loss"] == result["metrics_last"]["loss"]
    printed = capsys.readouterr().out
    assert printed.count("warning: config.train.writers: wandb failed") == 1 and "the network is gone" in printed
    assert len(services.wandb.logged) == 1 and [r["step"] for r in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]
    # A service that is not there keeps a run from beginning, not from going on.
    services.wandb.refuse = "no API key"
    with pytest.raises(ConfigError, match="^config.train.writers: wandb cannot be opened: no API key$"):
        train(tmp_path / "new", "wandb")
    assert train(tmp_path / "run", "wandb", steps=6)["steps"] == 6
    assert capsys.readouterr().out.count("warning: config.train.writers: wandb failed") == 1


def test_nothing_waits_for_a_service_that_hangs(monkeypatch, capsys):
    waiting = threading.Event()
    hangs = types.SimpleNamespace(id="1", write=lambda step, metrics: waiting.wait(60), close=lambda: None)
    behind = trackers.Behind("mlflow", hangs)
    for step in range(1000):
        behind.write(step, {"loss": 1.0})
    monkeypatch.setattr(trackers, "_PATIENCE", 0.01)
    behind.close()
    assert "mlflow failed" in capsys.readouterr().out
    waiting.set()


def test_a_missing_package_or_an_unknown_name_is_told_before_anything(tmp_path, monkeypatch):
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(
            ConfigError, match=rf"^config.train.writers: {name} is not installed; pip install 'alto_jax\["
        ):
            workdir.claim_workdir(tmp_path / "run", fake_stage.config(train={"writers": name}))
    with pytest.raises(ConfigError, match="config.train.writers: expected some of wandb, mlflow, .* got 'wandb,comet'"):
        workdir.claim_workdir(tmp_path / "run", fake_stage.config(train={"writers": "wandb,comet"}))
    assert not (tmp_path / "run").exists() and TrainConfig().writers == ""
