"""One program for the steps of all runs of one configuration in a test: a resumed run need not trace it again."""

import json

import pytest

from alto_jax.config import to_dict


@pytest.fixture
def one_step_program(monkeypatch):
    """`train` takes the step that it made for the same configuration before; all else is each run's own."""
    from alto_jax.train import loop

    made, make_step = {}, loop.make_step

    def make_once(config, *arguments):
        key = json.dumps(to_dict(config))
        if key not in made:
            made[key] = make_step(config, *arguments)
        return made[key]

    monkeypatch.setattr(loop, "make_step", make_once)
