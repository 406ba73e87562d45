"""TensorBoard's files: what is in them, and a disk that is full."""

import struct

import numpy as np
import pytest
from tensorboardX import event_file_writer
from tensorboardX.proto import event_pb2

from alto_jax.config import naming
from alto_jax.train import board


def events(folder):
    """All records of the one file."""
    [file] = folder.iterdir()
    content, found = file.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        found.append(event_pb2.Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    return found


def test_scalars_and_histograms(tmp_path):
    written = board.Board(tmp_path / "tensorboard", 3)
    written.write(4, {"loss": 1.5, "iou": 0.25})
    written.write_histograms(4, {"length": np.array([[1, 2], [2, 8]])})
    _, begun, *values = events(tmp_path / "tensorboard")  # before it is closed
    assert begun.step == 4 and begun.session_log.status == event_pb2.SessionLog.START
    assert {v.step for v in values} == {4}
    loss, iou, length = (value.summary.value[0] for value in values)
    assert (loss.tag, loss.simple_value, iou.tag, iou.simple_value) == ("loss", 1.5, "iou", 0.25)
    histogram = length.histo
    assert (histogram.num, histogram.min, histogram.max, histogram.sum) == (4, 1, 8, 13)
    middle = [count for limit, count in zip(histogram.bucket_limit, histogram.bucket) if 1.5 < limit < 2.4]
    assert sum(middle) == 2
    written.close()


def test_a_full_disk_is_said_once(tmp_path, monkeypatch, capsys):
    """Nothing waits for a writer that is gone, and nothing else is lost."""

    class Full(event_file_writer.EventsWriter):
        def flush(self):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(event_file_writer, "EventsWriter", Full)
    written = board.Board(tmp_path / "tensorboard", 0)
    for step in range(1000):
        written.write(step, {"loss": 1.0})
    written.write_histograms(1, {"length": np.ones(3)})
    written.close()
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ") and "tensorboard" in line and "No space left" in line


def test_what_cannot_be_written_is_named(tmp_path):
    with pytest.raises(OSError, match=r"No space left on device: '.*metrics\.jsonl'"):
        with naming(tmp_path / "metrics.jsonl"), open("/dev/full", "w") as file:
            file.write("x")
            file.flush()
    with pytest.raises(FileNotFoundError, match="No such file.*other"), naming("this"):
        open(tmp_path / "other")
