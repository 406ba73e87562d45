"""A checkpoint opened for use: read part by part, in 8 bits if asked for, and never saved as such."""

import functools
import pathlib

import jax
import numpy as np
import pytest

import alto_jax
from alto_jax.checkpoint import agreement, loading, rows, runs
from alto_jax.checkpoint.agreement import Found, newest_in_parts
from alto_jax.config import ConfigError
from alto_jax.mllm.language_model import for_inference
from alto_jax.params import merge_params
from tests.conftest import run_python


def test_parts_are_the_whole(debug_model, monkeypatch):
    whole = loading.load_model(debug_model.path)
    monkeypatch.setattr(loading, "AT_ONCE", 150_000)
    read, largest = runs.read_params, []

    def watched(name, abstract, only, folder):
        largest.append(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract)))
        return read(name, abstract, only, folder)

    monkeypatch.setattr(runs, "read_params", watched)
    model = loading.load_model(debug_model.path, for_inference=True, quantize="int8")
    assert len(largest) > 3 and max(largest) <= 150_000 < sum(largest)
    convert = jax.jit(functools.partial(for_inference, whole.cfg.language_model, quantize="int8"))
    want = convert(whole.params["language_model"])
    got = model.params["language_model"]
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    others = [name for name in whole.params if name != "language_model"]
    jax.tree.map(np.testing.assert_array_equal, *[{n: m.params[n] for n in others} for m in (model, whole)])
    assert model.identity == f"{whole.identity} int8"
    # An array of 8 bits goes with inference alone.
    shapes = {path: (leaf.shape, leaf.dtype) for path, leaf in agreement.flat(model.params).items()}
    with pytest.raises(ConfigError, match="OUT: language_model/.*/kernel has 8 bits, .* inference alone"):
        rows.save_params("OUT", shapes, lambda sinks: None, {})
    assert not pathlib.Path("OUT").exists()


def test_a_part_that_cannot_be_read_sends_all_parts_back(tmp_path, capsys):
    for step in (1, 2):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
        (tmp_path / "checkpoints" / str(step) / "_CHECKPOINT_METADATA").touch()

    def part(number):
        def read(folder):
            if (folder.name, number) == ("2", 1):
                raise ValueError("damaged")
            return Found(plain=[folder.name, number])

        return read

    kept, step = newest_in_parts(tmp_path, [part(0), part(1), part(2)], lambda found: found.plain)
    assert step == 1 and kept == [["1", 0], ["1", 1], ["1", 2]]
    assert "step 2 cannot be read" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no checkpoint can be read .step 2: "):
        newest_in_parts(tmp_path, [part(0), part(1)], lambda found: found.plain, step=2)


def test_layers_apart_are_joined():
    one, other = ({"layers": ({"a": i}, {"a": i + 1})} for i in (0, 5))
    other = {"layers": tuple({"b": row["a"]} for row in other["layers"]), "norm": 7}
    assert merge_params(one, other) == {"layers": ({"a": 0, "b": 5}, {"a": 1, "b": 6}), "norm": 7}


def test_quantize_is_checked(debug_model, quickstart):
    with pytest.raises(ConfigError, match="quantize: expected one of .*, got 'int4'"):
        alto_jax.load(debug_model.path, quantize="int4")
    with pytest.raises(ConfigError, match="quantize: expected '' without for_inference, got 'int8'"):
        loading.load_model(debug_model.path, quantize="int8")
    with pytest.raises(ConfigError, match="quantize: expected '', .* a mask tokenizer alone, got 'fp8'"):
        alto_jax.load(quickstart.path / "stage1", quantize="fp8")


def test_the_command(debug_model, tmp_path):
    image = pathlib.Path(loading.__file__).parents[2] / "tests/golden"  # no picture: refused before the model is read
    done = run_python(
        "-m",
        "alto_jax.predict",
        "--checkpoint",
        debug_model.path,
        "--image",
        image,
        "--text",
        "x",
        "--quantize",
        "int4",
    )
    assert done.returncode == 2 and "--quantize" in done.stderr and "Traceback" not in done.stderr
