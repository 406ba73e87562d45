"""The experiment on a budget of two tokens, a step of it; and the short stage 1 that it shares with another."""

import itertools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np

from alto_jax.checkpoint import loading
from experiments import adapt, two_tokens
from tests.experiments.commands import run_command


def test_command(debug_model, monkeypatch, tmp_path):
    monkeypatch.setattr(two_tokens, "ARMS", {"two tokens": 2})
    options = ["--seeds", "0", "--steps", 1, "--batch_size", 2, "--masks", 8]
    found = json.loads(run_command(two_tokens, monkeypatch, tmp_path / "a", debug_model.path, *options))
    assert [row["trained for"] for row in found["means"]] == ["nothing", *two_tokens.ARMS]
    assert all([*curve] == ["1", "2", "4", "8"] for curve in found["curves"].values())
    assert found["curves"]["two tokens"] != found["curves"]["nothing"]


def test_the_length_predictor_stays(debug_model):
    model = loading.load_model(debug_model.path)
    found = adapt.adapt(model, seed=0, steps=1, batch_size=8, kept="adaptive")["tokenizer"]
    for name, part in model.params["tokenizer"].items():
        moved = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), part, found[name])
        assert (max(jax.tree.leaves(moved)) > 0) == (name != "length")


def test_every_second_mask_keeps_so_many_tokens(monkeypatch):
    draw = lambda key, count: {"kept": 10 + jnp.arange(count)}
    made = types.SimpleNamespace(data=lambda share: itertools.repeat(None), draw=draw)
    kept, model = [], types.SimpleNamespace(params={"tokenizer": {}}, cfg=types.SimpleNamespace(tokenizer=None))

    def step(params, state, batch, drawn, number):
        kept.append(drawn["kept"].tolist())
        return params, state

    monkeypatch.setattr(adapt, "_programs", lambda *given: (made, types.SimpleNamespace(init=lambda p: p), step))
    for every in (1, 2):
        adapt.adapt(model, seed=0, steps=1, batch_size=4, kept=3, every=every)
    assert kept == [[3, 3, 3, 3], [3, 11, 3, 13]]
