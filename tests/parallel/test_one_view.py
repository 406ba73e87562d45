"""What processes must have alike is compared before they work together; what differs is one line that names who."""

import json

import jax
import pytest

from alto_jax.config import ConfigError, to_dict
from alto_jax.parallel import distributed
from alto_jax.storage import shared
from tests import fake_stage


def speak_as(monkeypatch, *processes):
    """Makes this process one of several; each of `processes` makes what it says of what this one says."""
    monkeypatch.setattr(distributed, "count", lambda: len(processes))
    monkeypatch.setattr(distributed, "_exchange", lambda value: [process(value) for process in processes])


def test_what_differs_is_named(monkeypatch):
    """The process, the fields and the values."""
    config = to_dict(fake_stage.config())
    same = lambda given: given
    speak_as(monkeypatch, same, same, same)
    distributed.require_same("command", {"--mode": "train", "config": config})
    other = json.loads(json.dumps(config)) | {"seed": 7}
    other["optim"]["lr"] = 0.5
    speak_as(monkeypatch, same, same, lambda given: {"value": {"--mode": "evaluate", "config": other}})
    with pytest.raises(ConfigError) as caught:
        distributed.require_same("command", {"--mode": "train", "config": config})
    line = (
        "process 2 has another command than process 0: --mode: 'evaluate', 'train' in process 0; config.optim.lr: 0.5,"
    )
    assert str(caught.value) == f"{line} 0.02 in process 0; config.seed: 7, 0 in process 0"
    with pytest.raises(ConfigError, match="process 2 has another data set than process 0: data set: .*"):
        distributed.require_same("data set", 3)


def test_who_cannot_open_is_named(monkeypatch):
    same = lambda given: given
    failed = lambda given: {"failed": "data: there is no such folder"}
    speak_as(monkeypatch, same, failed)
    with pytest.raises(ConfigError, match="^process 1: data: there is no such folder$"), distributed.opening():
        pass  # Process 0, which is fine.
    with pytest.raises(ConfigError, match="^process 1: data: there is no such folder$"), distributed.opening():
        distributed.gather(1)  # It hears of it in the middle, too, and says nothing of its own.
    said = []
    speak_as(monkeypatch, same, lambda given: said.append(given) or given)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises(ConfigError, match="^process 1: no folder$"), distributed.opening():
        raise FileNotFoundError("no folder")
    assert said == [{"failed": "no folder"}]
    with distributed.opening():
        assert distributed.gather(3) == [3, 3]


def test_a_directory_that_is_not_shared_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(shared, "PATIENCE", 0.0)
    same = lambda given: given
    speak_as(monkeypatch, same, same)
    shared.require(tmp_path, "--workdir")
    blind = lambda given: {"value": ["host-b", False]} if isinstance(given["value"], list) else given
    speak_as(monkeypatch, same, same, blind)
    with pytest.raises(ConfigError, match=rf"^--workdir: process 2 \(on host-b\) does not see what process 0 \(on .*\) "
                                          rf"writes in {tmp_path}; all processes of a run need one"):  # fmt: skip
        shared.require(tmp_path, "--workdir")
    assert not list(tmp_path.iterdir())
