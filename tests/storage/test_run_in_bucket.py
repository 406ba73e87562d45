"""A run in a bucket: train, killed, on another machine resumed, evaluated, predicted from; against a local service."""

import importlib.util
import json
import os
import pathlib
import shutil
import socket
import sys

import fsspec
import numpy as np
from PIL import Image
import pytest

from alto_jax import predict
from alto_jax.checkpoint import loading, packed, runs
from alto_jax.config import ConfigError, to_dict
from alto_jax.evaluate import __main__ as evaluate
from alto_jax.experiment import make_experiment
from alto_jax.storage import bucket, mirror, steps
from alto_jax.train import loop
from alto_jax.train.workdir import claim_workdir
from tests import fake_stage
from tests.train.test_reliability import assert_same_end

HAS_S3 = importlib.util.find_spec("s3fs") and importlib.util.find_spec("moto")


def forget(scheme: str):
    """File systems that were made for another service: fsspec keeps one for all whose arguments are equal."""
    fsspec.get_filesystem_class(scheme).clear_instance_cache()
    bucket._file_system.cache_clear()


@pytest.fixture(scope="module")
def s3():
    """A service that speaks as S3 does, on this machine; one bucket."""
    if not HAS_S3:
        pytest.skip("s3fs and moto are not installed")
    from moto.server import ThreadedMotoServer

    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        forget("s3")
        bucket._file_system("s3").makedirs("alto", exist_ok=True)  # kept as long as this process
        yield "s3://alto"
        server.stop()


@pytest.fixture(scope="module")
def gs():
    """The same, as Google's service does."""
    with socket.socket() as free, pytest.MonkeyPatch.context() as patch:
        # Note: before gcsfs is imported, which else asks for the kind of bucket over gRPC for a minute.
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        pytest.importorskip("gcsfs")
        server = pytest.importorskip("gcp_storage_emulator.server")
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        patch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
        started = server.create_server("127.0.0.1", port, in_memory=True, default_bucket="alto")
        started.start()
        forget("gs")
        yield "gs://alto"
        started.stop()


@pytest.fixture(params=["file", "s3", "gs"])
def root(request, tmp_path, monkeypatch):
    """URL of a place for the test's runs."""
    monkeypatch.setenv("ALTO_RUNS", str(tmp_path / "runs"))
    place = f"file://{tmp_path}/bucket" if request.param == "file" else request.getfixturevalue(request.param)
    return f"{place}/{tmp_path.name}"


class Killed(BaseException):
    """The process is gone: nothing more is written."""


def test_killed_and_resumed_on_another_machine(root, tmp_path, monkeypatch, capsys):
    """The same bits as a run on this machine that nothing happened to."""
    monkeypatch.setattr(loop, "make_stage", lambda config, mesh, directory=None: fake_stage.stage())
    loop.train(fake_stage.config(), tmp_path / "undisturbed")
    url = f"{root}/run"
    beat = loop.goodput.Account.beat

    def kill(self, step):
        beat(self, step)
        if step == 9:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(loop.goodput.Account, "beat", kill)
        patch.setattr(mirror.Mirror, "close", lambda self, is_error: self._stop.set())
        with pytest.raises(Killed):
            loop.train(fake_stage.config(), url)
    found = bucket.bucket(url, "x")
    assert max(steps.remote_steps(found, found.sizes())) in (6, 8)
    shutil.rmtree(tmp_path / "runs")  # Another machine.
    capsys.readouterr()
    result = loop.train(fake_stage.config(), url)
    printed = capsys.readouterr()
    assert "resumed from step" in printed.out and f"{url}: working copy in " in printed.err
    copy = mirror.copy_of(url)
    assert_same_end(copy, tmp_path / "undisturbed")
    # All that a run leaves is in the bucket, and no more checkpoints than are kept.
    names = found.sizes()
    expected = {"config.json", "starts.json", "metrics.jsonl", "goodput.jsonl", "parameters.txt", "result.json"}
    assert expected <= set(names) and json.loads(found.read("result.json")) == result
    assert found.read("metrics.jsonl") == (copy / "metrics.jsonl").read_bytes()
    assert sorted(steps.grouped(names)) == [10, 12] == runs.complete_steps(copy)
    shutil.rmtree(tmp_path / "runs")
    loop.train(fake_stage.config(), url)
    assert "is already complete" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=f"--workdir={copy} holds a run of another configuration .*optim.lr"):
        loop.train(fake_stage.config(optim={"lr": 0.5}), url)


@pytest.mark.parametrize("root", ["s3" if HAS_S3 else "file"], indirect=True)
def test_predicted_from_and_evaluated(root, debug_model, tmp_path, monkeypatch, capsys):
    """A run that was copied to the bucket; the results go there too."""
    model = bucket.bucket(f"{root}/model", "x")
    for file in debug_model.path.rglob("*"):
        if file.is_file():
            model.upload(file, str(file.relative_to(debug_model.path)))
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)).save(tmp_path / "image.png")
    out = tmp_path / "answer.json"
    arguments = ["--checkpoint", model.url, "--image", tmp_path / "image.png", "--text", "it", "--json", out]
    monkeypatch.setattr(sys, "argv", ["predict", *map(str, arguments)])
    assert not predict.main()
    assert json.loads(out.read_text())["masks"] and runs.identity(model.url) == runs.identity(debug_model.path)
    asked = ["--checkpoint", model.url, "--benchmark", "tokenizer_scenes", "--scenes", "2", "--out", f"{root}/results",
             "--batch-size", "2", "--worst", "0", "--timed-samples", "0"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["evaluate", *asked])
    assert not evaluate.main()
    results = bucket.bucket(f"{root}/results", "x")
    assert "metrics.json" in results.sizes() and results.read("tables.md").decode() in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["evaluate", *asked[4:], "--rescore"])
    shutil.rmtree(tmp_path / "runs")
    assert not evaluate.main()


def test_packed_checkpoint_in_a_bucket(tmp_path):
    """alto-tiny, as it comes with the package."""
    place = bucket.bucket(f"file://{tmp_path}/tiny", "x")
    for file in (packed.ASSETS / "alto-tiny").iterdir():
        place.upload(file, file.name)
    assert runs.load_meta(place.url) == runs.load_meta("alto-tiny")
    assert runs.find_run(place.url)[0].parent == runs.find_run("alto-tiny")[0].parent


def start(path, **fields):
    """Claims a run's directory for a configuration with these fields, as one that has done a step."""
    plain = to_dict(fake_stage.config())
    claim_workdir(path, make_experiment(plain | fields))
    folder = path / "checkpoints/1"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "_CHECKPOINT_METADATA").touch()


def test_what_a_run_began_with_may_move(debug_model, tmp_path, monkeypatch):
    """By another spelling, in another place, in a bucket; but not be another checkpoint."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(debug_model.path, "here")
    start(tmp_path / "run", init_from="here")
    moved = f"file://{tmp_path}/there"
    for same in (f"{tmp_path}//here/", "./here", moved):
        if same == moved:
            shutil.copytree("here", "there")
            shutil.rmtree("here")
        start(tmp_path / "run", init_from=same)
    marker = tmp_path / "there/checkpoints/0/_CHECKPOINT_METADATA"
    marker.write_bytes(marker.read_bytes() + b" ")
    for other in (moved, str(tmp_path / "there"), "", "nowhere"):
        with pytest.raises(ConfigError, match="holds a run of another configuration .init_from: 'here' there"):
            start(tmp_path / "run", init_from=other)


def test_moved_data_are_the_same_run(tmp_path, monkeypatch, capsys):
    """Where they lie is free; which they are, the position in them says (test_identity.py)."""
    from tests.data import replicas

    stage = fake_stage.stage()
    monkeypatch.setattr(loop, "make_stage", lambda config, mesh, directory=None: stage)
    replicas.write_sa1b(tmp_path / "here", 3)
    data = lambda name: {"source": "sa1b", "root": str(tmp_path / name)}
    quiet = {"num_samples": 0}
    loop.train(fake_stage.config(data=data("here"), train={"steps": 2}, eval=quiet), tmp_path / "run")
    (tmp_path / "here").rename(tmp_path / "there")
    result = loop.train(fake_stage.config(data=data("there"), train={"steps": 4}, eval=quiet), tmp_path / "run")
    assert result["steps"] == 4 and "resumed from step 2" in capsys.readouterr().out


def test_base_of_adapters_in_a_bucket_is_known_by_its_url(debug_model, tmp_path, monkeypatch):
    shutil.copytree(debug_model.path, tmp_path / "base")
    url = f"file://{tmp_path}//base/"
    values = to_dict(debug_model.config)
    config = make_experiment(values | {"init_from": url, "lora": values["lora"] | {"rank": 2}})
    meta = loading.adapter_meta(config)
    assert meta["base"] == f"file://{tmp_path}/base" and meta["base_identity"] == runs.identity(debug_model.path)
    assert loading.base_of(meta, "run") == meta["base"]
    assert pathlib.Path(os.environ["ALTO_CACHE"]) in runs.find_run(meta["base"])[0].parents
