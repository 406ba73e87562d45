"""Times are of the device alone, warmed up, of the results that are there, and say on what they were measured."""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alto_jax.evaluate import results, runner, timing
from alto_jax.evaluate.device import Programs, device_name
from alto_jax.parallel import sharding
from tests.data import replicas
from tests.evaluate.test_runner import compiled_once, options  # noqa: F401 - a fixture

NAME = "refcoco_val.joined.adaptive"


def one_device():
    return sharding.make_mesh(sharding.MeshConfig(1, 1, 1), jax.devices()[:1])


def test_compiling_is_not_in_the_clock():
    """Each shape runs once before it is timed; tracing takes half a second here, and again for another shape."""
    ran = []

    def slow_to_trace(params, batch):
        time.sleep(0.5)
        jax.debug.callback(lambda: ran.append(1))
        return {"sum": jnp.sum(batch, axis=1) * params["scale"]}

    programs = Programs(one_device())
    for rows, executions in ((2, 2), (2, 1), (3, 2), (2, 1)):
        ran.clear()
        answers = programs("f", slow_to_trace, {"scale": jnp.float32(2)}, np.ones((rows, 4), np.float32))
        jax.effects_barrier()
        np.testing.assert_array_equal(answers.found["sum"], np.full(rows, 8))
        assert 0 < answers.seconds < 0.25 and len(ran) == executions


@pytest.fixture
def run(compiled_once, debug_model, tmp_path):  # noqa: F811
    replicas.write_refer(tmp_path / "data", "refcoco", splits=("val",), count=5)

    def run(**changes):
        ask = options(debug_model, tmp_path / "data", tmp_path / "out", "refcoco_val", timed_samples=2, worst=0)
        runner.evaluate(ask.replace(**changes))
        path = results.result_path(tmp_path / "out", NAME)
        return path, timing.timing_path(path)

    return run


def starts(file) -> list[tuple[int, bool]]:
    return [(line["start"], line["single"]) for line in timing.read_timing(file)[1]]


WHOLE = [(0, False), (2, False), (4, False), (0, True), (1, True)]


def test_times_belong_to_the_results_that_are_there(run):
    file, times = run()
    assert starts(times) == WHOLE
    before = times.read_bytes()
    run()  # nothing is left to do
    assert times.read_bytes() == before
    spoilt = before.decode().replace('"seconds": 0', '"seconds": 900')
    times.write_text(spoilt)
    file.unlink()
    run()
    assert starts(times) == WHOLE and "900" not in times.read_text()
    # Cut back to its first batch: the later calls are made again, and their old times forgotten.
    times.write_text(spoilt)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:4]))
    run()
    kept = [line for line in timing.read_timing(times)[1] if line["seconds"] >= 900]
    assert sorted(starts(times)) == sorted(WHOLE) and {line["start"] for line in kept} == {0, 1}


def test_times_of_another_device_are_not_mixed_in(run, monkeypatch):
    file, times = run()
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:4]))
    monkeypatch.setattr(runner, "device_name", lambda mesh: "another one")
    run()
    assert timing.read_timing(times)[0]["device"] == "another one"
    assert starts(times) == [(2, False), (4, False), (0, True), (1, True)]


def test_tables_name_device_and_batch(run):
    file, times = run()
    found = json.loads((file.parent.parent / "timing.json").read_text())[NAME]
    assert found["device"] == device_name(one_device()) != "" and found["batch_size"] == 2
    assert found["batch"]["samples"] == 6 and found["single"]["samples"] == 2  # the last batch is filled up
    lines = timing.read_timing(times)[1]
    batch = [line["seconds"] for line in lines if not line["single"]]
    assert found["batch"]["seconds_per_sample"] == pytest.approx(sum(batch) / 6)
    text = (file.parent.parent / "timing.md").read_text()
    row = next(line for line in text.splitlines() if NAME in line)
    assert f"| {found['device']} |" in row and f"| {found['single']['seconds_per_sample']:.4f} s |" in row
    assert f"| {found['batch']['seconds_per_sample']:.4f} s | 2 |" in row
    assert "gRefCOCO val, paper | A100 80GB | 17.5 | 0.71 s (batch not stated) |" in text
