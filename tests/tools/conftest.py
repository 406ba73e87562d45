"""Fixtures of the converter's tests."""

import gzip
import json

import pytest

from tests.conftest import ROOT
from tests.golden_models import ALTO_HEADS, write_altollm
from tools.convert_torch_weights.__main__ import main


@pytest.fixture(scope="session")
def published():
    """Names and shapes of the published checkpoints' tensors."""
    return json.loads(gzip.decompress((ROOT / "tests" / "golden" / "keys.json.gz").read_bytes()))


@pytest.fixture(scope="session")
def altollm(tmp_path_factory):
    """The small ALToLLM in the reference's layout, and its conversion."""
    folder = tmp_path_factory.mktemp("altollm")
    (folder / "torch").mkdir()
    source, out = write_altollm(folder / "torch"), folder / "converted"
    assert main(["import", str(source), str(out), "--config", json.dumps(ALTO_HEADS)]) == 0
    return source, out
