"""What experiments keep and average."""

import pytest

from alto_jax.config import ConfigError
from experiments import trials


def test_results_are_kept_for_their_settings(tmp_path):
    calls = []
    measure = lambda: calls.append(1) or {"x": 1.5}
    for _ in range(2):
        assert trials.once(tmp_path / "runs/a.json", {"steps": 2}, measure) == {"x": 1.5}
    assert len(calls) == 1
    with pytest.raises(ConfigError, match=r"a.json: made with steps 2, not 3; choose another directory"):
        trials.once(tmp_path / "runs/a.json", {"steps": 3}, measure)


def test_means_over_seeds():
    rows = [{"seed": s, "name": n, "gain": g} for s, n, g in ((0, "a", 1.0), (0, "b", 5.0), (1, "a", 3.0))]
    assert trials.means(rows, "name") == [
        {"name": "a", "gain": 2.0, "std_of_gain": 1.0, "seeds": 2},
        {"name": "b", "gain": 5.0, "std_of_gain": 0.0, "seeds": 1},
    ]
    with pytest.raises(ConfigError, match="--seeds: expected numbers with commas between, got '0,x'"):
        trials.numbers("--seeds", "0,x", int)
