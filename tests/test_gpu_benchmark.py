"""benchmarks/gpu.py at its debug sizes: what it measures, and that nothing is lost when a case fails."""

import dataclasses
import json
import math
import multiprocessing
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alto_jax.config import ConfigError
from alto_jax.mllm.language_model import for_inference
from benchmarks import gpu, gpu_common, gpu_inference, gpu_table
from benchmarks.gpu_common import Options
from tests.conftest import ROOT, run_python

DEBUG = Options(size="debug", rounds=1, seconds=0.0)
SETTINGS = ["--size=debug", "--rounds=1"]


def records(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_case_that_fails_leaves_its_error_and_the_next_ones_go_on(tmp_path, monkeypatch):
    def fail(options, rows):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(gpu_inference, "vit", fail)
    out = tmp_path / "gpu.jsonl"
    out.write_text('{"case": "earlier", "variant": "after", "ms": 1.0}\n')
    assert gpu.main([*SETTINGS, "--cases=vit1,masks12,copy", f"--out={out}"]) == 1
    found = {r["case"]: r for r in records(out)}
    assert list(found) == ["earlier", "vit1", "masks12", "copy", "matmul"]
    assert found["vit1"]["error"] == "RuntimeError: out of memory"
    assert found["masks12"]["ms"] > 0 and found["masks12"]["program_gb"] > 0
    bytes_moved = found["copy"]["gb_per_s"] * found["copy"]["ms"] * 1e6
    assert bytes_moved == pytest.approx(2 * 4 * 2**12)
    assert all(r["device"] == "cpu" and r["variant"] == "after" for r in found.values() if "versions" in r)


def test_each_case_in_its_own_process(tmp_path):
    out = tmp_path / "gpu.jsonl"
    done = run_python("benchmarks/gpu.py", *SETTINGS, "--parallel=1", "--cases=copy", f"--out={out}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert [r["case"] for r in records(out)] == ["copy", "matmul"] and records(out)[0]["ms"] > 0
    done = run_python("benchmarks/gpu.py", *SETTINGS, "--parallel=1", "--cases=copy", f"--out={out}", "--budget_s=0")
    assert done.returncode == 1
    assert records(out)[2]["error"] == "not begun within --budget_s"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # Of JAX about forks; the child uses none of it.
def test_a_process_that_dies_is_an_error_of_its_case_alone(monkeypatch):
    def child(pipe, name, settings, lower_only):
        pipe.send(("lowered", {}))
        if name == "vit1":
            os._exit(7)
        for said, value in (("compiled", {}), ("measured", [{"case": name, "ms": 1.0}])):
            pipe.recv()
            pipe.send((said, value))
        os._exit(0)

    fork = multiprocessing.get_context("fork")  # Note: spawn could not give the child this function.
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: fork)
    monkeypatch.setattr(gpu, "_child", child)
    written = []
    gpu.Runner({}, 2, math.inf, written.append).run(["copy", "vit1", "sam1"])
    assert {r["case"]: r.get("ms", r.get("error")) for r in written} == {
        "copy": 1.0,
        "vit1": "the process ended with 7",
        "sam1": 1.0,
    }


def test_the_loop_of_before_gives_the_same_tokens():
    """With stacked layers, and with each layer apart."""
    cfg = gpu_inference.model_config(DEBUG)
    jobs = {before: gpu_inference.decode(dataclasses.replace(DEBUG, before=before), 2) for before in (False, True)}
    shapes, inputs = jobs[True].fills
    stacked, embedded = gpu_common.filled((shapes, inputs))
    given = {True: stacked, False: for_inference(cfg.language_model, stacked)}
    ids, tokens = gpu_inference.prompt_ids(cfg, 2), {}
    for before, job in jobs.items():
        compiled = job.lowered["generate"].compile()
        tokens[before] = np.asarray(compiled(given[before], embedded, jnp.asarray(ids), jnp.int32(30)).ids)
    np.testing.assert_array_equal(tokens[True], tokens[False])
    assert (tokens[True][:, 30] == gpu_inference.special_ids(cfg).mask_end).all()
    assert isinstance(jobs[False].fills[0]["blocks"]["layers"], tuple)


def test_random_weights_are_what_their_names_say():
    float32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    eight = {"kernel": jax.ShapeDtypeStruct((300, 40), jnp.int8), "kernel_scale": float32(40)}
    found = gpu_common.filled({"q": eight, "norm": {"scale": float32(9)}, "fc": {"kernel": float32(300, 40)}})
    assert found["q"]["kernel"].dtype == jnp.int8 and len(np.unique(found["q"]["kernel"])) > 200
    assert 2e-4 < float(found["q"]["kernel_scale"].min()) <= float(found["q"]["kernel_scale"].max()) < 3e-4
    assert 0.9 <= float(found["norm"]["scale"].min()) and float(jnp.std(found["fc"]["kernel"])) == pytest.approx(
        0.02, rel=0.1
    )


def test_attention_is_set_where_there_is_such_a_field():
    @dataclasses.dataclass(frozen=True)
    class Inner:
        attention: str = "auto"
        width: int = 3

    @dataclasses.dataclass(frozen=True)
    class Outer:
        inner: Inner = Inner()
        other: str = "auto"

    assert gpu_common.with_attention(Outer(), "xla") == Outer(Inner("xla"))


def test_the_table_has_the_newest_success_of_each_case():
    before = ROOT / "benchmarks" / "results" / "gpu_before.jsonl"
    new = {"variant": "after", "device": "GPU", "date": "D", "versions": {"jax": "1"}, "command": "C"}
    found = [
        {"case": "decode1", "ms": 9.0, **new},
        {"case": "decode1", "ms": 6.06, "gb_per_s": 2430.0, **new},
        {"case": "decode1", "error": "out of memory", "variant": "after"},
        {"case": "sam12", "error": "a | b", "variant": "after"},
    ]
    lines = gpu_table.table(gpu_table.read([before]) + found).splitlines()
    assert lines[0] == "| | before | after | peer | goal |"
    [decode] = [line for line in lines if line.startswith("| decode, one token, batch 1 |")]
    assert "15.6 ms, 0.94 TB/s | 6.06 ms, 2.43 TB/s | 19.6 ms (eager); 8.7 ms" in decode
    assert any("| failed: a / b |" in line for line in lines)
    assert "- after: GPU, D, jax 1: `C`" in lines
    assert (ROOT / "benchmarks" / "results" / "gpu.md").read_text().startswith("# Speed and memory on one GPU")


@pytest.mark.parametrize(
    "arguments, error",
    [
        (["--cases=copy,decode2", "--out=x.jsonl"], "--cases=copy,decode2: unknown case 'decode2'"),
        (["--cases=sam1", "--quantize=int8", "--out=x.jsonl"], "sam1 is the same with --quantize=int8"),
        (["--before", "--quantize=int8", "--out=x.jsonl"], "--quantize=int8: not with --before"),
        (["--rounds=0", "--out=x.jsonl"], "--rounds=0: expected at least 1"),
        (["--cases=copy"], "--out is required"),
        (["--table", "README.md"], "README.md:1: not a record"),
    ],
)
def test_bad_options_are_named(arguments, error):
    with pytest.raises(ConfigError, match=error):
        gpu.main(arguments)
