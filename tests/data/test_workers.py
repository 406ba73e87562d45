"""Reading processes: the same batches, states and errors as without, and nothing left behind."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import cloudpickle
import numpy as np
import pytest

from alto_jax.data import pipeline, sources
from alto_jax.data.conversations import Conversations
from alto_jax.data.prepared import Prepared
from alto_jax.data.workers import Workers
from alto_jax.mllm.text import TextTokenizer
from alto_jax.parallel.shares import BatchShare
from tests.conftest import ROOT
from tests.data import replicas, test_pipeline
from tests.data.test_pipeline import Numbers, numbers, read
from tests.data.test_prepare import SIZES, job, prepare

# Workers that import these modules would take seconds to start.
for module in (test_pipeline, sys.modules[__name__]):
    cloudpickle.register_pickle_by_value(module)
CHAT = dict(vision_size=28, image_size=64, mask_size=32, num_image_tokens=4, max_length=200, num_latent_tokens=8)
CHAT |= dict(max_masks=2, batch_size=2, seed=0, system=None)


def fields(batch):
    return {name: value for name, value in vars(batch).items() if value is not None}


def assert_equal(batches, others):
    for one, other in zip(batches, others, strict=True):
        assert fields(one).keys() == fields(other).keys()
        for name, value in fields(one).items():
            np.testing.assert_array_equal(value, fields(other)[name])
            assert value.dtype == fields(other)[name].dtype


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """A tokenizer, and the same conversations raw and prepared."""
    root = tmp_path_factory.mktemp("workers")
    meta = replicas.write_conversations(root / "chat", 6)
    found = prepare.prepare(job("conversations", root / "chat", SIZES), root / "out", max_bad_fraction=0)
    tok = TextTokenizer.train_builtin([t for turns in Conversations(meta).texts() for t in turns], 400, 64)
    return tok, {"raw": Conversations(meta), "prepared": Prepared(found)}


@pytest.mark.parametrize("kind", ["raw", "prepared", "packed"])
def test_batches_and_states_are_those_without_workers(chats, kind):
    tok, found = chats
    options = CHAT | ({"pack_samples": 2, "max_length": 256} if kind == "packed" else {})
    make = lambda workers: iter(
        pipeline.chat_batches(found["raw" if kind == "packed" else kind], tok, **options, num_workers=workers)
    )
    alone, helped = make(0), make(2)
    wanted = [next(alone) for _ in range(8)]
    assert_equal(wanted[:3], [next(helped) for _ in range(3)])
    state = helped.get_state()
    helped.close()
    for workers in (0, 2):  # a state means the same with any number of them
        resumed = make(workers)
        resumed.set_state(state)
        assert_equal(wanted[3:], [next(resumed) for _ in range(5)])
        resumed.close()


def test_processes_of_a_run_have_workers_of_their_own():
    whole = read(numbers(num_workers=0), 4)
    parts = [numbers(num_workers=2, share=BatchShare((p,), 2, 2)) for p in range(2)]
    assert [sum((read(part, 1)[0] for part in parts), []) for _ in range(4)] == whole
    for part in parts:
        part.close()


class Flawed(Numbers):
    def __getitem__(self, index):
        if index in (2, 5):
            raise ValueError(f"record {index} is broken")
        return super().__getitem__(index)


class Deadly(Numbers):
    def __getitem__(self, index):
        if index == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


MASKS = dict(image_size=16, mask_size=8, batch_size=5, seed=0, num_epochs=1, shuffle=False, num_workers=2)


def test_bad_records_are_counted_once_for_all_workers(caplog):
    batches = read(iter(pipeline.mask_batches(Flawed(10), max_bad_records=2, **MASKS)))
    assert batches == [[0, 1, 3, 3, 4], [6, 6, 7, 8, 9]]
    assert caplog.text.count("record 2 is broken") == caplog.text.count("record 5 is broken") == 1
    with pytest.raises(ValueError, match="record [25] is broken .2 bad of 10 records"):
        list(pipeline.mask_batches(Flawed(10), max_bad_records=1, **MASKS))


def test_a_killed_worker_is_one_clear_error():
    expected = "num_workers: a reading process was ended by SIGKILL while it read record 3"
    with pytest.raises(ChildProcessError, match=expected):
        list(pipeline.mask_batches(Deadly(10), **MASKS))


def test_arrays_of_all_kinds_come_back():
    import ml_dtypes

    rng = np.random.default_rng(0)
    values = {
        "large": rng.integers(0, 255, (700, 900, 3), np.uint8),
        "bfloat16": rng.normal(size=(3, 4)).astype(ml_dtypes.bfloat16),
        "strided": np.arange(20)[::2],
        "empty": np.zeros((0, 3), np.int32),
        "bool": np.array(True),
    }
    workers = Workers(lambda number: {**values, "number": number}, 1)
    found = workers(7)
    assert found.pop("number") == 7
    for name, value in values.items():
        np.testing.assert_array_equal(found[name], value)
        assert found[name].dtype == value.dtype
    found["large"][0] = 1  # writable
    workers.close()
    with pytest.raises(ChildProcessError, match="closed"):
        workers(1)


def alive(process: int) -> bool:
    try:
        return "Z" not in pathlib.Path(f"/proc/{process}/stat").read_text().split(")")[1].split()[0]
    except FileNotFoundError:
        return False


SCRIPT = """
import os, signal, sys, time
from alto_jax.data.workers import Workers
class Here:  # of __main__, and without a guard
    def __call__(self, number):
        return os.getpid()
workers = Workers(Here(), 2)
print(workers(0), workers(1), flush=True)
if sys.argv[1] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "group":
    os.killpg(0, signal.SIGTERM)
    print(workers(2), workers(3), flush=True)
"""


@pytest.mark.parametrize("how", ["exit", "kill", "group"])
def test_workers_end_with_their_process_and_leave_signals_to_it(how):
    script = SCRIPT if how != "group" else "import signal; signal.signal(signal.SIGTERM, lambda *_: None)\n" + SCRIPT
    command = [sys.executable, "-c", script, how]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, start_new_session=True)
    assert done.returncode == (-signal.SIGKILL if how == "kill" else 0) and not done.stderr
    processes = [int(word) for word in done.stdout.split()]
    assert len(processes) == (4 if how == "group" else 2) and len(set(processes)) == 2
    deadline = time.monotonic() + 20
    while any(map(alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, processes))


def test_the_defaults_follow_the_machine(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert sources.readers(0, -1) == {"num_threads": 16, "num_workers": 62}
    assert sources.readers(3, 0) == {"num_threads": 3, "num_workers": 0}
    monkeypatch.setattr(sources.distributed, "processes_here", lambda: 8)
    assert sources.readers(0, -1) == {"num_threads": 8, "num_workers": 6}
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert sources.readers(0, -1) == {"num_threads": 1, "num_workers": 1}
