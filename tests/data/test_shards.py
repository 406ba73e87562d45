"""Prepared sets of many shards: few open files, from threads, forked and other processes; clear errors."""

from concurrent.futures import ThreadPoolExecutor
import os
import pathlib
import pickle
import signal

import numpy as np
import pytest

from alto_jax.data import prepare
from alto_jax.data.prepared import Prepared
from alto_jax.data.shards import Shards
from tests.conftest import run_python
from tests.data.test_prepare import job

COUNTS = (3, 1, 5, 2) * 20  # 80 shards, 220 records


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    from array_record.python import array_record_module

    root, number, found = tmp_path_factory.mktemp("shards"), 0, []
    for shard, count in enumerate(COUNTS):
        found.append(root / f"{shard:05d}")
        writer = array_record_module.ArrayRecordWriter(str(found[-1]), "group_size:1,uncompressed")
        for _ in range(count):
            writer.write(f"record {number}".encode())
            number += 1
        writer.close()
    return found


def wanted(index):
    return f"record {index}".encode()


def test_few_files_are_open_whatever_is_read(files):
    shards, before = Shards(files, COUNTS, limit=5), open_files()
    for index in [*range(len(shards)), *np.random.default_rng(0).permutation(len(shards)).tolist()]:
        assert shards[index] == wanted(index)
        assert open_files() <= before + 5
    with ThreadPoolExecutor(8) as pool:
        order = np.random.default_rng(1).integers(len(shards), size=2000).tolist()
        most = 0
        for index, record in zip(order, pool.map(shards.__getitem__, order), strict=True):
            assert record == wanted(index)
            most = max(most, open_files() - before)
    assert most <= 5 + 8
    for index in (-1, len(shards)):
        with pytest.raises(IndexError):
            shards[index]


def test_the_readers_used_last_stay_open(files):
    shards = Shards(files, COUNTS, limit=2)
    for index in (0, 3, 0, 4, 0):  # shards 0, 1, 0, 2, 0
        shards[index]
    assert list(shards._open.readers) == [2, 0]


def test_forked_and_other_processes_read_for_themselves(files):
    shards = Shards(files, COUNTS, limit=4)
    assert shards[0] == wanted(0) and shards[100] == wanted(100)
    with shards._open.lock:  # held by another thread while this one forks
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            right = all(shards[index] == wanted(index) for index in (0, 100, 219))
            os._exit(0 if right else 1)
        assert os.waitpid(child, 0)[1] == 0
    assert shards[100] == wanted(100)
    copy = pickle.loads(pickle.dumps(shards))
    assert (
        len(copy) == len(shards) and copy[150] == wanted(150) and not copy._open.readers.keys() & shards._open.readers
    )


def test_a_broken_shard_is_named(files, tmp_path):
    content = files[2].read_bytes()
    (tmp_path / "cut").write_bytes(content[:100])
    (tmp_path / "empty").touch()
    for name in ("cut", "empty", "missing"):
        with pytest.raises(ValueError, match=f"{tmp_path / name}: record 1 of the shard cannot be read: .+"):
            Shards([tmp_path / name], [5])[1]


SCRIPT = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from alto_jax.data import pipeline
from alto_jax.data.prepared import Prepared
found = Prepared(sys.argv[1])
assert len(found) == 150 and len(found.manifest["shards"]) == 75
batches = pipeline.mask_batches(found, image_size=64, mask_size=32, batch_size=10, seed=0, num_threads=4)
iterator = iter(batches)
for _ in range(30):
    next(iterator)
print("read", found._source.limit)
"""


def test_a_prepared_set_of_more_shards_than_files_may_be_open(tmp_path):
    sizes = {"vision_size": 0, "image_size": 64, "mask_size": 32}
    found = prepare.prepare(job("scene_masks", "", sizes, num=150, records_per_shard=2), tmp_path, max_bad_fraction=0)
    done = run_python("-c", SCRIPT, found)
    assert done.returncode == 0 and done.stdout == "read 16\n", done.stderr[-2000:]
    again = pickle.loads(pickle.dumps(Prepared(found)))
    assert again[149]["key"] == Prepared(found)[149]["key"]


def test_shards_are_hashed_in_pieces(tmp_path, monkeypatch):
    """What is read at once of a shard, to hash it, is far below its size."""
    sizes = {"vision_size": 0, "image_size": 256, "mask_size": 32}
    monkeypatch.setattr(pathlib.Path, "read_bytes", lambda path: pytest.fail(f"{path} was read whole"))
    made = job("scene_masks", "", sizes, image_format="raw", num=20, records_per_shard=20)
    assert prepare.prepare(made, tmp_path, max_bad_fraction=0)
