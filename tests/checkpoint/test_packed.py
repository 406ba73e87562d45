"""Packed checkpoints: small folders that open wherever a run's directory does."""

import json
import shutil

import numpy as np
import pytest

import alto_jax
from alto_jax.checkpoint import __main__ as command
from alto_jax.checkpoint import foreign, packed, rows, runs
from tests.conftest import run_python


@pytest.fixture(scope="module")
def folder(debug_model, tmp_path_factory):
    made = tmp_path_factory.mktemp("packed") / "small"
    done = run_python("-m", "alto_jax.checkpoint", "pack", debug_model.path, made)
    assert done.returncode == 0 and done.stdout.startswith(f"packed into {made}: "), done.stderr
    return made


def test_parameters_are_those_of_the_run_in_16_bits(folder, debug_model):
    assert sorted(file.name for file in folder.iterdir()) == [packed.ABOUT, packed.WEIGHTS, packed.TEXT]
    before, after = rows.open_params(debug_model.path), rows.open_params(folder)
    assert set(before) == set(after)
    for name, value in before.items():
        np.testing.assert_array_equal(np.asarray(after[name]), np.asarray(value).astype(np.float16).astype(np.float32))
    assert runs.load_meta(folder)["stage"] == "stage2"
    assert runs.find_run(folder)[0] == runs.find_run(folder)[0] != folder
    assert foreign.run_of(debug_model.path) == debug_model.path


def test_a_shipped_name_stands_for_its_folder(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "ASSETS", tmp_path)
    shutil.copytree(folder, tmp_path / "some-model")
    assert packed.shipped() == ["some-model"]
    model = alto_jax.load("some-model")
    result = model.segment(np.zeros((40, 60, 3), np.uint8), "the apple")
    assert result.mask.shape == (40, 60)
    with pytest.raises(FileNotFoundError, match="other-model: no checkpoint there"):
        alto_jax.load("other-model")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some-model").rename(tmp_path / "there")
    (tmp_path / "some-model").mkdir()  # a directory of that name comes first
    with pytest.raises(FileNotFoundError, match="some-model: no checkpoint there"):
        runs.find_run("some-model")


def test_cache_that_cannot_be_written(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ALTO_CACHE", str(tmp_path / "file" / "below"))
    with pytest.warns(UserWarning, match="unpacked for this run alone"):
        first = runs.find_run(folder)
    assert runs.find_run(folder) == first


def test_damaged(folder, tmp_path):
    cut = tmp_path / "cut"
    shutil.copytree(folder, cut)
    (cut / packed.WEIGHTS).write_bytes((folder / packed.WEIGHTS).read_bytes()[:-100])
    with pytest.raises(ValueError, match="cut: a damaged packed checkpoint"):
        runs.find_run(cut)
    (cut / packed.WEIGHTS).write_bytes((folder / packed.WEIGHTS).read_bytes())
    (cut / packed.ABOUT).write_text("{")
    with pytest.raises(ValueError, match="cut: a damaged packed checkpoint"):
        runs.find_run(cut)
    about = json.loads((folder / packed.ABOUT).read_text())
    assert set(about) <= {"stage", "model", "data", "step"} and about["data"] == {"system": None}


def test_packing_refuses(folder, debug_model, tmp_path, refused):
    with pytest.raises(ValueError, match="holds model.safetensors already"):
        packed.pack(debug_model.path, folder)
    assert "nothing: no checkpoint there" in refused(command.main, "pack", tmp_path / "nothing", tmp_path / "out")
    assert not (tmp_path / "out").exists()
