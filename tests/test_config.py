"""From plain values to frozen dataclasses: what is refused, and that the message names the field and the value."""

import dataclasses
import json
from typing import Any, Literal

import pytest

from alto_jax.config import ConfigError, build, require, to_dict
from alto_jax.experiment import make_experiment
from alto_jax.main import load_config
from alto_jax.train.workdir import claim_workdir
from tests.conftest import ROOT

TOKENIZERS = ("base", "tiny", "small", "debug")
TOKENIZERS += tuple(f"{size}_no_pixels" for size in TOKENIZERS)
SIZES = {
    "stage1": TOKENIZERS,
    "stage1_5": TOKENIZERS,
    "stage2": ("8b", "1b", "2b", "4b", "26b", "tiny", "small", "debug"),
    "stage3": ("8b", "1b", "2b", "4b", "26b", "tiny", "small", "debug"),
    "finetune": ("small", "2b", "8b", "debug"),
}


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int
    name: str = "x"
    rates: tuple[float, ...] = (0.5,)
    pair: tuple[int, str] = (1, "a")
    kind: Literal["a", "b"] = "a"

    def __post_init__(self):
        require(self.size > 0, "size", self.size, "more than 0")


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner
    limit: int | None = None
    area: int | tuple[int, int] = 3
    flag: bool = False
    anything: Any = None


def test_build_converts():
    built = build(Outer, {"inner": {"size": 2, "rates": [1, 0.25], "pair": [3, "z"]}, "area": [4, 5], "limit": 7})
    assert built == Outer(Inner(2, rates=(1.0, 0.25), pair=(3, "z")), limit=7, area=(4, 5))
    assert all(isinstance(rate, float) for rate in built.inner.rates)
    assert build(Outer, built) is built
    again = json.loads(json.dumps(to_dict(built)))
    assert build(Outer, again) == built
    with pytest.raises(dataclasses.FrozenInstanceError):
        built.flag = True


@pytest.mark.parametrize(
    "values, message",
    [
        ({"inner": {"size": 1}, "lmit": 3}, "config.lmit: unknown field; known: anything, area, flag, inner, limit"),
        ({"inner": {"size": 1, "nme": 3}}, "config.inner.nme: unknown field"),
        ({}, "config.inner: required field is missing"),
        ({"inner": {}}, "config.inner.size: required field is missing"),
        ({"inner": 3}, "config.inner: expected a group of fields for Inner, got 3"),
        ({"inner": {"size": "3"}}, "config.inner.size: expected int, got '3'"),
        ({"inner": {"size": True}}, "config.inner.size: expected int, got True"),
        ({"inner": {"size": 1.0}}, "config.inner.size: expected int, got 1.0"),
        ({"inner": {"size": 0}}, "config.inner.size: expected more than 0, got 0"),
        ({"inner": {"size": 1, "kind": "c"}}, "config.inner.kind: expected one of ('a', 'b'), got 'c'"),
        ({"inner": {"size": 1, "rates": [1, "b"]}}, "config.inner.rates[1]: expected float, got 'b'"),
        ({"inner": {"size": 1, "rates": "12"}}, "config.inner.rates: expected a list, got '12'"),
        ({"inner": {"size": 1, "pair": [1]}}, "config.inner.pair: expected 2 values, got [1]"),
        ({"inner": {"size": 1}, "limit": "many"}, "config.limit: expected int, got 'many'"),
        ({"inner": {"size": 1}, "flag": 1}, "config.flag: expected bool, got 1"),
        ({"inner": {"size": 1}, "flag": None}, "config.flag: expected bool, got None"),
    ],
)
def test_build_refuses(values, message):
    with pytest.raises(ConfigError) as error:
        build(Outer, values)
    assert str(error.value).startswith(message), error.value


@pytest.mark.parametrize("spec", [f"{stage}:{size}" for stage, sizes in SIZES.items() for size in sizes])
def test_every_config_builds_and_survives_json(spec):
    stage, size = spec.split(":")
    config = make_experiment(load_config(str(ROOT / "configs" / f"{stage}.py:{size}")).to_dict())
    assert config.stage == ("stage2" if stage == "finetune" else stage)
    assert make_experiment(json.loads(json.dumps(to_dict(config)))) == config
    # Published weights need the reference's forms; from scratch, the corrected ones.
    from_scratch = size.removesuffix("_no_pixels") in ("tiny", "small", "debug")
    tokenizer = config.model.tokenizer
    assert tokenizer.legacy_reshape == (not from_scratch)
    assert tokenizer.length_rule == ("unified" if from_scratch else "reference")
    assert tokenizer.length_logit_scale == ("divide" if from_scratch else "multiply")
    assert tokenizer.pixel_decoder.legacy_shortcut == (not from_scratch)
    assert (tokenizer.sam is None) == size.endswith("_no_pixels")


@pytest.fixture
def values():
    return load_config(str(ROOT / "configs/stage1.py:debug")).to_dict()


def test_workdir_belongs_to_one_configuration(tmp_path, values):
    def claim(**changes):
        return claim_workdir(tmp_path / "run", make_experiment({**values, **changes}))

    path = claim(seed=1)
    # Nothing is trained yet: a first attempt that failed does not occupy the directory.
    claim(seed=2)
    assert json.loads((path / "config.json").read_text())["seed"] == 2
    (path / "result.json").write_text("{}")  # of a run whose checkpoints were removed
    with pytest.raises(ConfigError, match="seed: 2 there, 3 here"):
        claim(seed=3)
    (path / "checkpoints" / "3").mkdir(parents=True)
    claim(seed=2)
    claim(seed=2, train={**values["train"], "log_every": 7})
    with pytest.raises(ConfigError, match="holds a run of another configuration.*seed: 2 there, 3 here"):
        claim(seed=3)
    with pytest.raises(ConfigError, match="optim.lr: 0.002 there, 0.5 here"):
        claim(seed=2, optim={**values["optim"], "lr": 0.5})
    (path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="config.json: not readable as JSON"):
        claim(seed=2)


def test_another_number_of_steps(tmp_path, values):
    """A run may become longer or shorter, not shorter than what is done; reading changes nothing."""

    def claim(steps, **options):
        config = make_experiment({**values, "train": {**values["train"], "steps": steps}})
        return claim_workdir(tmp_path / "run", config, **options)

    path = claim(4)
    (path / "checkpoints" / "4").mkdir(parents=True)
    (path / "result.json").write_text("{}")
    saved = lambda: json.loads((path / "config.json").read_text())["train"]["steps"]
    claim(9, is_training=False)
    assert saved() == 4 and (path / "result.json").exists()
    claim(4)
    assert (path / "result.json").exists()
    with pytest.raises(ConfigError, match="config.train.steps: expected at least the 4 updates that .*, got 3"):
        claim(3)
    assert saved() == 4 and (path / "result.json").exists()
    claim(9)
    assert saved() == 9 and not (path / "result.json").exists()
    claim(6)
    assert saved() == 6


@pytest.mark.parametrize(
    "group, change, message",
    [
        ("data", {"source": "sa1b"}, "config.data.root: expected the SA-1B folder"),
        ("data", {"source": "jsonl"}, "config.data.meta: expected the meta file"),
        ("optim", {"trainable": "("}, "config.optim.trainable: .* is not a regular expression"),
        ("train", {"steps": 0}, "config.train.steps: expected at least 1, got 0"),
        ("mesh", {"data": 0}, "config.mesh"),
    ],
)
def test_experiment_refuses(values, group, change, message):
    with pytest.raises(ConfigError, match=message):
        make_experiment({**values, group: {**values[group], **change}})


def test_stages_of_the_mllm_need_its_sizes(values):
    with pytest.raises(ConfigError, match="model.language_model.*stage2"):
        make_experiment({**values, "stage": "stage2"})
