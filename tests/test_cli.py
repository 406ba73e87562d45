"""The commands: bad input ends in one clear line and a non-zero exit; importing and --help are quick."""

import json
import os
import pathlib
import re
import time

import numpy as np
from PIL import Image
import pytest

from alto_jax import cli, main, predict, tokenize
from alto_jax.checkpoint import runs
from alto_jax.config import ConfigError, keep_programs, local_path
from alto_jax.data import open_vocab, prepare, sources
from alto_jax.evaluate import __main__ as evaluate
from alto_jax.experiment import make_experiment
from alto_jax.lora import __main__ as lora
from tests.conftest import ROOT, error_line, run_python
from tools.convert_torch_weights import __main__ as convert

DEBUG = "--config=configs/stage1.py:debug"


def run_main(*arguments: str) -> str:
    """The line with which `alto_jax.main` refuses."""
    done = run_python("-m", "alto_jax.main", *arguments)
    assert "Traceback" not in done.stderr + done.stdout
    return error_line(done.returncode, done.stderr)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([DEBUG, "--config.optim.lrr=1"], r"--config.optim.lrr: unknown field; known: b1, b2, .*, lr, "),
        ([DEBUG, "--config.seed.x=1"], r"--config.seed.x: unknown field"),
        ([DEBUG, "--config.train.steps=1.5"], r"--config.train.steps=1.5: .*int.*'1.5'"),
        ([DEBUG, "--config.data.source=coco"], r"config.data.source: expected one of \('scenes', .*got 'coco'"),
        ([DEBUG, "--config.train.steps=0"], r"config.train.steps: expected at least 1, got 0"),
        ([DEBUG, "--config.data.source=sa1b", "--config.data.root=nowhere"], r"nowhere"),
        ([DEBUG, "--stpes=3"], r"'stpes'"),
        ([DEBUG, "steps=3"], r"unexpected argument 'steps=3'"),
        (["--config=configs/stage9.py"], r"--config=configs/stage9.py: no such file"),
        (["--config=configs/stage1.py:huge"], r"py:huge: unknown size; expected one of base, tiny, small, debug"),
        ([], r"--config is required"),
    ],
)
def test_main_refuses(arguments, message, tmp_path, refused):
    assert re.search(message, refused(main.main, f"--workdir={tmp_path / 'run'}", *arguments))


def test_main_needs_a_workdir():
    """In a process of its own, as the others would be."""
    assert "--workdir is required" in run_main(DEBUG)


def test_how_processes_join_may_follow_a_space(tmp_path):
    for flag in (["--distributed", "env"], ["--distributed=env"]):
        assert "ALTO_COORDINATOR must be set" in run_main(DEBUG, f"--workdir={tmp_path / 'run'}", *flag)


URL = "https://host/runs"  # Of a scheme that nothing reads.


def test_main_refuses_urls(tmp_path, monkeypatch, refused):
    line = refused(main.main, DEBUG, f"--workdir={URL}")
    assert line.startswith("error: --workdir: expected a path on this machine, or a URL of s3://, gs://, file://, ")
    assert line.endswith(f" got {URL!r}")
    line = refused(main.main, "--config=configs/quickstart.py:debug", "--workdir=s3://bucket/run")
    assert line == "error: --workdir: expected a path on this machine (mount the bucket), got 's3://bucket/run'"
    monkeypatch.chdir(tmp_path)
    plain = main.load_config(str(ROOT / "configs/stage2.py:debug")).to_dict()
    for group, field in (("", "init_from"), ("data", "root"), ("data", "meta")):
        changed = plain | ({group: plain[group] | {field: URL}} if group else {field: URL})
        name = f"config.{group}.{field}" if group else f"config.{field}"
        with pytest.raises(ConfigError, match=f"{name}.*: expected a path on this machine.*'{URL}'"):
            make_experiment(changed)
    mixture = tmp_path / "mixture.json"
    mixture.write_text(json.dumps({"one": {"weight": 1, "source": "sa1b", "root": "s3://b/sa1b"}}))
    config = make_experiment(plain | {"data": plain["data"] | {"source": "mixture", "meta": str(mixture)}})
    with pytest.raises(ConfigError, match=r"mixture.json: one.root \(source 'sa1b'; .*: expected a path on"):
        sources.chat_source(config)
    for path in (URL, "ftp://host/run", pathlib.Path(URL)):
        for opened in (runs.find_run, runs.Checkpointer):
            with pytest.raises(ConfigError, match="expected a path on this machine"):
                opened(path)
    # Raw data in a bucket: what works is said.
    changed = plain | {"data": plain["data"] | {"source": "sa1b_chats", "root": "gs://b/sa1b"}}
    with pytest.raises(ConfigError, match=r"config.data.root .*prepared data alone\): expected .*'gs://b/sa1b'"):
        make_experiment(changed)
    make_experiment(plain | {"data": plain["data"] | {"source": "prepared", "root": "gs://b/prepared"}})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mixture.json"]
    assert local_path("runs/a:b", "out") == pathlib.Path("runs/a:b")


def test_commands_refuse_urls(refused, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    run = ["--checkpoint", "run", "--out", "out"]
    commands = [
        (predict, ["--image", files["good"], *run[:3], "out.png"], "image target out overlay json checkpoint"),
        (evaluate, ["--benchmark", "scenes", *run], "checkpoint data out images paper-rows"),
        (prepare, ["scene_masks", "--out", "out"], "source out images cache-features cache-tokens"),
        (open_vocab, ["a150", "--images", "i", "--labels", "l", "--out", "o"], "images labels out names split"),
        (tokenize, ["encode", "--mask", files["mask"], *run[:3], "out.json"], "mask out checkpoint"),
    ]
    for module, arguments, names in commands:
        for name in names.split():
            line = refused(module.main, *arguments, f"--{name}", URL)
            assert f"{name}: expected a path on this machine" in line and URL in line
    assert "out: expected a path on this machine" in refused(lora.main, "merge", "run", URL)
    assert "paths: expected a path on this machine" in refused(convert.main, "import", files["good"], URL)
    assert sorted(tmp_path.iterdir()) == before


def test_workdir_of_another_config(quickstart, refused):
    line = refused(main.main, DEBUG, f"--workdir={quickstart.path / 'stage1'}", "--config.optim.lr=0.5")
    assert f"--workdir={quickstart.path / 'stage1'} holds a run of another configuration" in line
    assert "optim.lr: 0.002 there, 0.5 here" in line


def test_missing_start_checkpoint_names_the_command_that_makes_it(tmp_path, quickstart, refused):
    workdir = f"--workdir={tmp_path / 'run'}"
    line = refused(main.main, "--config=configs/stage1_5.py:debug", workdir)
    assert "config.init_from: stage1_5 starts from an earlier stage's run; give --config.init_from=DIR" in line
    assert "made by: python -m alto_jax.main --config=configs/stage1.py --workdir=DIR" in line
    line = refused(main.main, "--config=configs/stage1_5.py:debug", workdir, "--config.init_from=nowhere")
    assert "nowhere: no checkpoint there" in line
    assert "make it with: python -m alto_jax.main --config=configs/stage1.py --workdir=DIR" in line
    # Stage 3 wants the whole model, which stage 1 does not have.
    line = refused(
        main.main, "--config=configs/stage3.py:debug", workdir, f"--config.init_from={quickstart.path / 'stage1'}"
    )
    assert re.search(
        r"config.init_from: .*stage1 lacks \d+ parameters that stage3 needs, such as language_model/", line
    )
    assert "--config=configs/stage2.py --config.init_from=DIR" in line


@pytest.fixture
def files(tmp_path):
    """Input files, good and bad, by name."""
    noise = np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8)
    paths = {name: tmp_path / f"{name}.png" for name in ("good", "pixel", "empty", "cut", "mask")}
    Image.fromarray(noise).save(paths["good"])
    Image.fromarray(noise[:1, :1]).save(paths["pixel"])
    Image.fromarray(np.zeros((24, 32), np.uint8)).save(paths["empty"])
    Image.fromarray(np.eye(24, 32, dtype=np.uint8) * 255).save(paths["mask"])
    paths["cut"].write_bytes(paths["good"].read_bytes()[:200])
    paths["text"] = tmp_path / "text.png"
    paths["text"].write_text("not an image")
    paths["codes"] = tmp_path / "codes.json"
    return paths


def test_predict_refuses(refused, files, quickstart):
    checkpoint = ("--checkpoint", quickstart.path / "stage3")

    def line(image, *arguments):
        return refused(predict.main, "--image", files.get(image, image), *checkpoint, *arguments)

    assert "image nowhere.png does not exist" in line("nowhere.png", "--text", "apple")
    for broken in ("text", "cut"):
        assert f"image {files[broken]} cannot be read" in line(broken, "--text", "apple")
    assert f"image {files['pixel']} is 1x1; sides must be at least 8" in line("pixel", "--text", "apple")
    assert "--text='': expected the name or description of an object" in line("good")
    assert "--text=' ?!': expected the name or description of an object" in line("good", "--text", " ?!")
    assert "--prompt=' ': expected a question" in line("good", "--prompt", " ")
    assert f"mask {files['empty']} is empty" in line("good", "--text", "apple", "--target", files["empty"])
    for length in ("0", "-1", "some"):
        expected = f"--length={length}: expected adaptive, full or a whole number of at least 1"
        assert expected in line("good", "--text", "apple", f"--length={length}")
    assert "has 8 mask tokens at most" in line("good", "--text", "apple", "--length=9")
    checkpoint = ("--checkpoint", "nowhere")
    message = line("good", "--text", "apple")
    assert "nowhere: no checkpoint there" in message and "configs/quickstart.py" in message
    checkpoint = ("--checkpoint", quickstart.path / "stage1")
    assert "a mask tokenizer alone; predict needs stage 2 or 3" in line("good", "--text", "apple")


def test_tokenize_refuses(refused, files, quickstart):
    common = ("--checkpoint", quickstart.path / "stage1_5", "--out", files["codes"])

    def encode(mask):
        return refused(tokenize.main, "encode", "--mask", files.get(mask, mask), *common)

    assert f"mask {files['empty']} is empty" in encode("empty")
    assert f"mask {files['pixel']} can be read in several ways: colours" in encode("pixel")
    assert "mask nowhere.png does not exist" in encode("nowhere.png")
    for content, message in (
        ("{", "expected the JSON that encode writes"),
        ('{"codes": [1]}', "'size'"),
        ('{"codes": [], "size": [24, 32]}', "codes: expected 1..8 codes, got 0"),
        (json.dumps({"codes": [1] * 9, "size": [24, 32]}), "codes: expected 1..8 codes, got 9"),
        ('{"codes": [64], "size": [24, 32]}', "codes: expected values in 0..63, got 64"),
        ('{"codes": [-1], "size": [24, 32]}', "codes: expected values in 0..63, got -1"),
    ):
        files["codes"].write_text(content)
        out = files["codes"].with_name("mask.png")
        assert message in refused(tokenize.main, "decode", "--codes", files["codes"], *common[:2], "--out", out)


def test_importing_the_package_is_quick_and_brings_no_jax():
    code = (
        "import sys, time; start = time.perf_counter(); import alto_jax;"
        " print(time.perf_counter() - start, sorted({'jax', 'flax', 'numpy'} & set(sys.modules)))"
    )
    printed = [run_python("-c", code, fresh=True).stdout.split(maxsplit=1) for _ in range(2)]
    assert min(float(seconds) for seconds, _ in printed) < 0.2
    assert all(modules.strip() == "[]" for _, modules in printed)


@pytest.mark.parametrize("command", ["main", "predict", "tokenize"])
def test_help_is_quick(command):
    def seconds():
        start = time.perf_counter()
        done = run_python("-m", f"alto_jax.{command}", "--help", fresh=True)
        assert done.returncode == 0 and "usage" in done.stdout
        return time.perf_counter() - start

    assert min(seconds() for _ in range(2)) < 2


def test_outputs_are_checked_before_the_work(tmp_path):
    picture, mask = cli.PICTURE_SUFFIXES, cli.MASK_SUFFIXES
    photo = tmp_path / "photo.png"
    photo.write_bytes(b"x")
    (tmp_path / "link.png").symlink_to(photo)
    (tmp_path / "hard.png").hardlink_to(photo)
    (tmp_path / "folder.png").mkdir()

    def check(path, suffixes=mask, **more):
        path = None if path is None else str(path)
        cli.check_outputs({"--out": (path, suffixes), **more}, {"--image": str(photo), "--target": None})

    for fine in (None, tmp_path / "mask.png", tmp_path / "MASK.TIFF", "mask.bmp", "/dev/null"):
        check(fine)
    check(tmp_path / "a.jpg", picture)
    json_file = (str(tmp_path / "a.json"), (".json",))
    check(tmp_path / "a.png", **{"--json": json_file})
    for path, match in (
        (tmp_path / "none" / "mask.png", "there is no folder .*none"),
        (photo / "mask.png", "there is no folder"),
        (tmp_path / "mask.jpg", "expected a name that ends in .png, .bmp, .tif, .tiff"),
        (tmp_path / "mask", "expected a name that ends in .png"),
        (tmp_path / "folder.png", "expected a file's name, got a folder"),
        ("", "expected a file's name, got nothing"),
        (str(tmp_path) + "/", "expected a file's name, got a folder"),
        (photo, "the same file as --image, which is read"),
        (tmp_path / "link.png", "the same file as --image, which is read"),
        (tmp_path / "hard.png", "the same file as --image, which is read"),
        (tmp_path / "folder.png" / ".." / "photo.png", "the same file as --image"),
        ("/proc/mask.png", "no permission to write there|there is no folder"),
    ):
        if path == "/proc/mask.png" and os.access("/proc", os.W_OK):
            continue
        with pytest.raises(ConfigError, match=f"--out={path}: .*{match}|--out={path}: {match}"):
            check(path)
    with pytest.raises(ConfigError, match="--overlay=.*a.png: the same file as --out"):
        check(tmp_path / "a.png", **{"--overlay": (str(tmp_path / "." / "a.png"), picture)})


@pytest.mark.parametrize("given, kept", [("", "programs-"), ("there", "there"), ("off", None)])
def test_compiled_programs_are_kept(given, kept, monkeypatch, tmp_path):
    monkeypatch.setenv("ALTO_CACHE", str(tmp_path))
    monkeypatch.setenv("ALTO_COMPILE_CACHE", str(tmp_path / given) if given == "there" else given)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    keep_programs()
    chosen = os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    assert chosen is None if kept is None else chosen.startswith(str(tmp_path / kept))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "mine")
    keep_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "mine"
