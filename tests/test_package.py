"""The package as others install it: built from its own source distribution, and used far from the checkout."""

import importlib.metadata
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile

import numpy as np
from PIL import Image
import pytest

from alto_jax import main
from tests.conftest import ROOT

_BUILD = "import sys, setuptools.build_meta as build; getattr(build, sys.argv[1])(sys.argv[2])"
_LEFT_OUT = shutil.ignore_patterns(
    ".git",
    ".gitignore",
    "runs",
    "build",
    "dist",
    "_build",
    "generated",
    ".venv",
    "*.egg-info",
    "__pycache__",
    "*_cache",
)
COMMANDS = {"alto-main", "alto-predict", "alto-tokenize", "alto-evaluate", "alto-convert", "alto-convert-data",
            "alto-plan", "alto-demo", "alto-export", "alto-prepare", "alto-serve"}  # fmt: skip


def run(*command: object, cwd: pathlib.Path, **env: str) -> str:
    """The output of a command that ends well; the environment has the given variables, and no PYTHONPATH else."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=inherited | env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """(the names in the source distribution, the folder into which the wheel made of it is installed)."""
    pytest.importorskip("setuptools", minversion="77", reason="building needs setuptools, which is not installed")
    base = tmp_path_factory.mktemp("package")
    # Note: building writes beside its sources.
    shutil.copytree(ROOT, base / "source", ignore=_LEFT_OUT)
    run(sys.executable, "-c", _BUILD, "build_sdist", base, cwd=base / "source")
    [archive] = base.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
        file.extractall(base / "unpacked", filter="data")
    [unpacked] = (base / "unpacked").iterdir()
    run(sys.executable, "-c", _BUILD, "build_wheel", base, cwd=unpacked)
    [wheel] = base.glob("*.whl")
    target = base / "installed"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile")
    run(*pip, "--target", target, wheel, cwd=base)
    return names, target


def test_the_source_distribution_is_the_checkout(distributions, tmp_path):
    names, _ = distributions
    shutil.copytree(ROOT, tmp_path / "copy", ignore=_LEFT_OUT)
    files = {str(p.relative_to(tmp_path / "copy")) for p in (tmp_path / "copy").rglob("*") if p.is_file()}
    assert "tests/test_package.py" in files and sorted(files - names) == []


def test_the_wheel_has_one_name(distributions):
    _, target = distributions
    assert {p.name for p in target.iterdir() if p.suffix != ".dist-info"} == {"alto_jax", "bin"}
    [package] = importlib.metadata.distributions(path=[str(target)])
    assert package.entry_points.names == COMMANDS == {p.name for p in (target / "bin").iterdir()}
    for folder, inside in (("configs", "_configs"), ("tools", "_tools")):
        ours = {p.relative_to(ROOT / folder): p.read_bytes() for p in (ROOT / folder).rglob("*.py")}
        there = target / "alto_jax" / inside
        assert ours == {p.relative_to(there): p.read_bytes() for p in there.rglob("*.py")}


def test_the_wheel_works_far_from_the_checkout(distributions, tmp_path):
    """Each command as its users start it, in an empty folder."""
    _, target = distributions

    def start(command: str, *arguments: object) -> str:
        words = (sys.executable, "-m", command) if "." in command else (sys.executable, target / "bin" / command)
        return run(*words, *arguments, cwd=tmp_path, PYTHONPATH=str(target))

    where = "import alto_jax, alto_jax._tools as tools; print(alto_jax.__file__, tools.__file__)"
    found = run(sys.executable, "-c", where, cwd=tmp_path, PYTHONPATH=str(target)).split()
    assert all(pathlib.Path(file).is_relative_to(target) for file in found) and len(found) == 2

    image = np.zeros((60, 80, 3), np.uint8)
    image[20:40, 30:60] = (220, 40, 30)
    Image.fromarray(image).save(tmp_path / "image.png")
    Image.fromarray(image[..., 0]).save(tmp_path / "mask.png")
    request = ("--checkpoint", "alto-tiny", "--image", "image.png", "--text", "the red thing")
    start("alto_jax.predict", *request, "--out", "out.png", "--json", "result.json")
    assert Image.open(tmp_path / "out.png").size == (80, 60)
    assert 1 <= json.loads((tmp_path / "result.json").read_text())["length"] <= 32
    start("alto-tokenize", "encode", "--checkpoint", "alto-tiny", "--mask", "mask.png", "--out", "codes.json")
    assert json.loads((tmp_path / "codes.json").read_text())
    assert "refcoco_val" in start("alto_jax.evaluate", "--list")
    assert "python -m alto_jax._tools.convert_torch_weights" in start("alto-convert", "--help")
    # Note: as many steps as in other tests, so that the program is compiled already.
    few = ("--config.train.checkpoint_every=4", "--config.eval.num_samples=0")
    start("alto-main", "--config=stage1.py:debug", "--workdir=run", *few)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 4


def test_configurations_are_found_by_name_and_by_path(tmp_path, monkeypatch):
    by_path = main.load_config(f"{ROOT}/configs/stage3.py:tiny").to_dict()
    monkeypatch.chdir(tmp_path)
    assert (
        main.load_config("stage3.py:tiny").to_dict() == by_path == main.load_config("configs/stage3.py:tiny").to_dict()
    )
    before = [name for name in sys.modules if name.split(".")[0] == "configs"], list(sys.path)
    # A file of one's own, with a neighbour; what it lacks comes with the package.
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "extra.py").write_text("STEPS = 7\n")
    (tmp_path / "configs" / "stage1.py").write_text(
        "from configs import extra, stage2\n"
        "def get_config(size='debug'):\n"
        "    from configs import common\n"
        "    config = stage2.get_config(size)\n"
        "    config.train.steps = extra.STEPS\n"
        "    return config\n"
    )
    for name in ("configs/stage1.py", f"{tmp_path}/configs/stage1.py:debug"):
        config = main.load_config(name)
        assert (config.stage, config.train.steps) == ("stage2", 7)
    assert before == ([name for name in sys.modules if name.split(".")[0] == "configs"], list(sys.path))
    # One that comes with the package has neighbours of the package.
    (tmp_path / "configs" / "common.py").write_text("raise RuntimeError('not this one')\n")
    assert main.load_config("stage3.py:tiny").to_dict() == by_path
