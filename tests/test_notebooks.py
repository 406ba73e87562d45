"""The notebooks of the documentation run from first cell to last, at small size, and are stored without outputs."""

import json

import numpy as np
import pytest

from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / "docs/tutorials").glob("*.ipynb"))


def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def run(path, parameters):
    """The names that a notebook leaves, with other values for those of its cell "parameters"; as `exec` runs it."""
    names, replaced = {"__name__": "__main__"}, 0
    for number, cell in enumerate(cells(path)):
        if cell["cell_type"] != "code":
            continue
        exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert parameters.keys() <= names.keys()
            names |= parameters
            replaced += 1
    assert replaced == 1
    return names


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_they_are_stored_without_outputs(path):
    for cell in cells(path):
        assert cell["cell_type"] == "markdown" or (cell["outputs"] == [] and cell["execution_count"] is None)
    ids = [cell["id"] for cell in cells(path)]
    assert len(set(ids)) == len(ids) and len(NOTEBOOKS) == 2


def test_segment(debug_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = run(ROOT / "docs/tutorials/segment.ipynb", {"CHECKPOINT": debug_model.path})
    assert len(names["answers"]) == 3 and names["answers"][0].mask.shape == (128, 128)
    assert names["frames"].shape == (names["both"].length, 128, 128)
    np.testing.assert_array_equal(names["frames"][-1], names["both"].mask)
    assert "codes:" in capsys.readouterr().out


def test_finetune(debug_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = {"CHECKPOINT": debug_model.path, "SIZE": "debug", "PICTURES": 8, "STEPS": 2}
    names = run(ROOT / "docs/tutorials/finetune_your_masks.ipynb", small)
    assert names["written"] == 8 and names["result"]["steps"] == 2
    assert {"giou", "format_rate"} <= names["result"]["eval"].keys() & names["result"]["eval_before"].keys()
    assert names["both"][1].mask.shape == (128, 128)
