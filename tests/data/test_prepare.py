"""Preparation: equal to raw, the same bytes after kill -9, readable by TFDS, wired into training."""

import hashlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from alto_jax.config import ConfigError
from alto_jax.data import pipeline, prepare, prepared
from alto_jax.data.prepared import Prepared
from tests.data import replicas

ROOT = pathlib.Path(__file__).parents[2]
SIZES = {"vision_size": 28, "image_size": 64, "mask_size": 32}
NONE = dict.fromkeys(SIZES, 0)


def job(name, source, sizes=NONE, image_format="png", records_per_shard=4, **options):
    options = {"seed": 0, "protocol": "joined", "images": None, "draws": 3, "num": 8} | options
    found = prepare.open_source(name, str(source), **options)
    needed = {"masks": ("image_size", "mask_size"), "chat": SIZES, "referring": ("vision_size", "image_size")}[found[1]]
    sizes = {k: v if k in needed else 0 for k, v in sizes.items()}
    return prepare.Job(*found, sizes, image_format, records_per_shard, 0)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("raw")
    replicas.write_sa1b(root / "sa1b", 5)
    replicas.write_conversations(root / "chat", 6, repeat=3)
    replicas.write_all(root)
    return root


# Every data set of the issue: name, folder.
CASES = [("sa1b", "sa1b"), ("conversations", "chat")]
CASES += [(f"{dataset}_train", "") for dataset in ("refcoco", "refcoco+", "refcocog", "grefcoco")]
CASES += [(name, "") for name in ("refcoco_val", "refcoco+_val", "refcocog_val", "grefcoco_val")]
CASES += [("refcoco_train", "psalm"), ("refcoco_val", "psalm"), ("grefcoco_val", "psalm")]
CASES += [(name, "") for name in ("refcocom_val_part_only", "refcocom_val_object_part", "a150", "pc59", "pas20")]


def test_progress_is_no_line_a_shard(source, tmp_path, capsys):
    prepare.prepare(job("conversations", source / "chat", records_per_shard=1), tmp_path, max_bad_fraction=0)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[conversations]")]
    assert len(lines) <= 2 and "6/6" in lines[-1]


@pytest.mark.parametrize("image_format", ["png", "raw"])
@pytest.mark.parametrize(("name", "folder"), CASES)
def test_prepared_equals_raw(source, tmp_path, name, folder, image_format):
    raw = job(name, source / folder, image_format=image_format)
    found = Prepared(prepare.prepare(raw, tmp_path, max_bad_fraction=0))
    assert len(found) == len(raw.source) >= 3 and found.no_target == getattr(raw.source, "no_target", False)
    for index, wanted in enumerate(raw.source):
        record = found[index]
        assert record.keys() == wanted.keys()
        for key, value in wanted.items():
            if key == "masks":
                assert len(value) == len(record["masks"])
                assert all(np.array_equal(a, b) for a, b in zip(record["masks"], value))
            else:
                assert np.array_equal(record[key], value), key


def test_large_fields_are_taken_out_as_protobuf_reads_them():
    from tensorflow_datasets.proto import tf_example_pb2

    rng = np.random.default_rng(0)
    example = tf_example_pb2.Example()
    fields = example.features.feature
    sizes = {"image/value": 3_000_000, "empty": 0, "png": 127, "other": 128, "kept": 16_384}
    for name, size in sizes.items():
        fields[name].bytes_list.value.append(rng.bytes(size))
    fields["image/shape"].int64_list.value.extend([1000, 1000, 3])
    fields["several"].bytes_list.value.extend([b"a", b"", b"bc"])
    stored = example.SerializeToString()
    taken, rest = prepared.take_fields(stored, {"image/value", "empty", "png", "absent"})
    assert {name: bytes(value) for name, value in taken.items()} == {
        name: fields[name].bytes_list.value[0] for name in ("image/value", "empty", "png")
    }
    for name in taken:
        del fields[name]
    assert tf_example_pb2.Example.FromString(rest) == example and len(rest) < 20_000
    for damaged in (stored[:-1], stored[:100], b"\x08" + stored):
        with pytest.raises(ValueError, match="tf.Example"):
            prepared.take_fields(damaged, {"image/value"})
    with pytest.raises(ValueError, match="'several'"):
        prepared.take_fields(rest, {"several"})


def test_freed_memory_is_kept_unless_the_user_says_otherwise():
    """Of arrays as large as a record's image, made and freed: pages that had to be mapped afresh."""
    script = """
import resource, numpy as np
from alto_jax.data.examples import keep_freed_memory
kept = keep_freed_memory()
def use():
    a, b = np.ones(3_000_000, np.uint8), np.ones(3_500_000, np.uint8)
use(); before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50): use()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    env = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    run = lambda env: subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, check=True)
    kept, faults = run(env).stdout.split()
    if kept == b"False":
        pytest.skip("not glibc")
    assert int(faults) < 500
    kept, faults = run({**env, "MALLOC_MMAP_THRESHOLD_": "131072"}).stdout.split()
    assert kept == b"False" and int(faults) > 10_000


def test_prepared_batches_equal_raw_batches(source, tmp_path, debug_model):
    from alto_jax.mllm.text import TextTokenizer

    tok = TextTokenizer.load(debug_model.path)
    sizes = dict(vision_size=28, image_size=64, mask_size=32, num_image_tokens=4, max_length=200, num_latent_tokens=8)
    options = dict(max_masks=2, batch_size=2, seed=0, system=None, num_epochs=1)
    raw = job("conversations", source / "chat", SIZES)
    small = Prepared(prepare.prepare(raw, tmp_path, max_bad_fraction=0))
    pairs = [(pipeline.chat_batches(s, tok, **sizes, **options)) for s in (raw.source, small)]
    masks = job("sa1b", source / "sa1b", SIZES, "raw")
    small = Prepared(prepare.prepare(masks, tmp_path, max_bad_fraction=0))
    pairs += [
        pipeline.mask_batches(s, image_size=64, mask_size=32, batch_size=2, seed=0, num_epochs=1)
        for s in (masks.source, small)
    ]
    for one, two in (pairs[:2], pairs[2:]):
        one, two = list(one), list(two)
        assert len(one) == len(two) >= 3
        for a, b in zip(one, two):
            for name in vars(a):
                np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    with pytest.raises(ValueError, match="prepared with image_size 64x64, the model wants 32x32"):
        next(iter(pipeline.mask_batches(small, image_size=32, mask_size=32, batch_size=2, seed=0)))


def test_tfds_reads_it(source, tmp_path):
    import tensorflow_datasets as tfds

    raw = job("grefcoco_val", source)
    folder = prepare.prepare(raw, tmp_path, max_bad_fraction=0)
    found = tfds.data_source("grefcoco_val_joined", data_dir=str(tmp_path), split="train")
    assert len(found) == len(raw.source)
    np.testing.assert_array_equal(found[1]["image"], raw.source[1]["image"])
    assert found[0]["phrase"].decode() == raw.source[0]["phrase"]
    assert len(tfds.data_source("grefcoco_val_joined", data_dir=str(tmp_path), split="train[:50%]")) == len(found) // 2
    assert folder.parts[-2:] == ("grefcoco_val_joined", "1.0.0")


def test_other_options_or_kinds_are_refused(source, tmp_path):
    folder = prepare.prepare(job("grefcoco_val", source), tmp_path, max_bad_fraction=0)
    with pytest.raises(ConfigError, match="format 'png' .now 'raw'"):
        prepare.prepare(job("grefcoco_val", source, image_format="raw"), tmp_path, max_bad_fraction=0)
    with pytest.raises(ValueError, match="prepared name is 'grefcoco_val.joined', expected 'refcoco_val.joined'"):
        Prepared(folder, expect="refcoco_val.joined")
    with pytest.raises(ValueError, match="prepared kind is 'referring', expected 'chat'"):
        Prepared(folder, kind="chat")
    with pytest.raises(ValueError, match="no complete prepared data set"):
        Prepared(tmp_path)


def digest(folder: pathlib.Path) -> dict[str, str]:
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_killed_preparation_ends_with_the_same_bytes(tmp_path):
    command = [sys.executable, "-m", "alto_jax.data.prepare", "scene_masks", "--num-scenes", "150", "--workers", "2",
               "--records-per-shard", "6", "--image-size", "64", "--mask-size", "32"]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    whole = tmp_path / "whole"
    subprocess.run([*command, "--out", str(whole)], check=True, env=environment, capture_output=True)
    killed, kills, rng = tmp_path / "killed", 0, random.Random(0)
    work = killed / "scene_masks" / "1.0.0" / ".work"
    for number in range(5):
        process = subprocess.Popen([*command, "--out", str(killed)], env=environment, stdout=subprocess.DEVNULL)
        goal = (number + 1) * 4  # shards, so that each start gets further
        while process.poll() is None and len(list(work.glob("*.json"))) - 1 < goal:
            time.sleep(0.005)
        time.sleep(rng.random() * 0.05)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run([*command, "--out", str(killed)], check=True, env=environment, capture_output=True, text=True)
    assert kills >= 4 and "resumed" in done.stdout
    assert digest(killed) == digest(whole)
    manifest = json.loads((whole / "scene_masks" / "1.0.0" / "manifest.json").read_text())
    assert manifest["written"] == 150 and len(manifest["shards"]) == 25
    shard = next((whole / "scene_masks" / "1.0.0").glob("*-00003-of-00025"))
    assert hashlib.sha256(shard.read_bytes()).hexdigest() == manifest["shards"][3]["sha256"]


def test_images_and_mask_formats_round_trip():
    image = np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    np.testing.assert_array_equal(prepared.decode(prepared.encode_image(image, "png")), image)
    np.testing.assert_array_equal(prepared.decode({"shape": (9, 11, 3), "value": image.tobytes()}), image)
    assert np.abs(prepared.decode(prepared.encode_image(image, "jpeg")).astype(int) - image).mean() < 20
