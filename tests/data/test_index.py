"""Kept indexes of records and files: the same as found anew, in little memory, and never of data that changed."""

import json
import os
import pickle
import time
import tracemalloc

import numpy as np
import pytest

from alto_jax.data import chat_lines, index
from alto_jax.data.conversations import Conversations
from alto_jax.data.index import FileNames
from alto_jax.data.split import file_hash


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("ALTO_CACHE", str(folder))
    return folder


LINE = b'{"image": "a.jpg", "mask": "m.png", "conversations": [{"from": "human", "value": "<ref>it</ref>"}]}\n'
OTHER = LINE.replace(b"a.jpg", b"b.jpg")


def found(file):
    lines = chat_lines.find_lines(file)
    columns = (lines.starts, lines.ends, lines.numbers, lines.kinds, lines.num_masks, lines.num_prompts)
    rows = list(zip(*(column.tolist() for column in (*columns, lines.image_hashes)), strict=True))
    return rows, [lines.read(row)[1]["images"][0] for row in range(len(rows))]


def test_a_kept_index_counts_for_the_same_file_alone(tmp_path, cache, monkeypatch):
    file, calls = tmp_path / "d.jsonl", []
    find = chat_lines._find_lines
    monkeypatch.setattr(chat_lines, "_find_lines", lambda file: calls.append(file) or find(file))
    file.write_bytes(LINE * 2 + b"\n" + LINE * 3)
    first = found(file)
    assert [row[2] for row in first[0]] == [1, 2, 4, 5, 6] and first[1] == ["a.jpg"] * 5
    assert len(calls) == 1 and len(list(cache.iterdir())) == 1
    again = chat_lines.find_lines(file)
    assert found(file) == first and len(calls) == 1 and isinstance(again.starts, np.memmap)
    changed = os.stat(file).st_mtime_ns
    file.write_bytes(OTHER * 2 + b"\n" + OTHER * 3)
    os.utime(file, ns=(changed, changed))  # the same size and time
    other = chat_lines.find_lines(file)
    assert found(file)[1] == ["b.jpg"] * 5 and len(calls) == 2 and other.digest != again.digest
    file.write_bytes(LINE * 4)
    assert len(found(file)[0]) == 4 and len(calls) == 3
    os.utime(file, ns=(1, 1))
    copied = found(file)
    assert len(copied[0]) == 4 and len(calls) == 4
    (kept,) = cache.iterdir()
    kept.write_bytes(kept.read_bytes()[:-8])  # cut by a full disk
    assert found(file) == copied and len(calls) == 5
    kept.write_bytes(b"not an index\n")
    assert found(file) == copied and len(calls) == 6
    monkeypatch.setattr(chat_lines, "_FORM", chat_lines._FORM + 1)  # the code that finds records is another one
    assert found(file) == copied and len(calls) == 7


def test_what_is_told_of_a_file_is_told_of_a_kept_index_too(tmp_path, caplog):
    file = tmp_path / "d.jsonl"
    two = LINE.replace(b'"a.jpg"', b'["a.jpg", "b.jpg"]')
    file.write_bytes(LINE + b"{broken\n" + two)
    for _ in range(2):
        lines = chat_lines.find_lines(file)
        assert lines.kinds.tolist() == [0, 1, 2] and "line 2 is no JSON" in lines.problem
        assert caplog.text.count("1 of 3 records are passed over") == 1 and lines.usable().tolist() == [0, 1]


def test_a_file_that_is_being_written(tmp_path, monkeypatch):
    file = tmp_path / "d.jsonl"
    file.write_bytes(LINE)
    find = chat_lines._find_lines

    def written_meanwhile(file):
        result = find(file)
        file.write_bytes(LINE * 2)
        return result

    monkeypatch.setattr(chat_lines, "_find_lines", written_meanwhile)
    with pytest.raises(ValueError, match=f"{file} changed while it was read"):
        chat_lines.find_lines(file)


def test_folders_that_cannot_be_written(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    folder.mkdir()
    file = folder / "d.jsonl"
    file.write_bytes(LINE + b"\n" + LINE)
    folder.chmod(0o555)
    first = found(file)
    assert [p.name for p in folder.iterdir()] == ["d.jsonl"]
    monkeypatch.setenv("ALTO_CACHE", str(file / "nowhere"))
    assert found(file) == found(file) == first
    folder.chmod(0o755)
    file.write_bytes(LINE)
    assert len(found(file)[0]) == 1


def test_records_take_no_memory(tmp_path):
    file, count = tmp_path / "d.jsonl", 20_000
    file.write_bytes(LINE * count)
    (tmp_path / "meta.json").write_text(json.dumps({"x": {"root": ".", "annotation": "d.jsonl", "repeat_time": 2}}))
    Conversations(tmp_path / "meta.json")
    tracemalloc.start()
    source = Conversations(tmp_path / "meta.json")
    now, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(source) == 2 * count and now < count  # less than a byte each
    assert sum(array.nbytes for array in chat_lines.find_lines(file).index.arrays.values()) == 39 * count
    assert len(pickle.dumps(source)) < 5000  # another process maps it too
    again = pickle.loads(pickle.dumps(source))
    assert again.conversation(count - 1) == source.conversation(2 * count - 1)


def write_names(root, names, settled=True):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    for folder in (root, *(p for p in root.rglob("*") if p.is_dir())) if settled else ():
        os.utime(folder, (time.time() - 60,) * 2)


NAMES = ["sa_3.json", "sa_20.json", "sa_1.jpg", "x.json", "sa_000000/sa_5.json", "sa_000000/deep/sa_6.json"]
NAMES += ["sa_000001/sa_1.json", "sa_000001/sa_2.jpg", "a/sa_9.json", "z/none.json", "sa_1/sa_7.json", "sa_1.json"]
NAMES += ["z/sa_é.json", "sa_.json", "sa_000001/sa_" + "9" * 90 + ".json"]


def test_files_are_those_of_rglob_in_order(tmp_path):
    root = tmp_path / "data"
    write_names(root, NAMES)
    for _ in range(2):  # listed, and of the kept list
        files = FileNames(root, "sa_", ".json")
        wanted = sorted(root.rglob("sa_*.json"))
        assert list(files) == wanted and files[-1] == wanted[-1] and files[1:3] == wanted[1:3]
        assert [files.name(i) for i in range(len(files))] == [path.name for path in wanted]
    with pytest.raises(IndexError):
        files[len(files)]
    part = files.take(np.array([4, 0]))
    assert list(part) == [wanted[4], wanted[0]] and part.digest != files.digest
    assert list(part.take(np.array([1]))) == [wanted[0]]
    assert list(pickle.loads(pickle.dumps(part))) == list(part)


def test_a_kept_list_counts_for_the_same_folders_alone(tmp_path, cache):
    root = tmp_path / "data"
    write_names(root, NAMES, settled=False)
    FileNames(root, "sa_", ".json")
    assert not cache.exists()  # what was changed this moment may be changed again
    write_names(root, NAMES)
    first = FileNames(root, "sa_", ".json")
    assert len(list(cache.iterdir())) == 1
    (root / "sa_000000/deep/sa_8.json").touch()
    second = FileNames(root, "sa_", ".json")
    assert len(second) == len(first) + 1 and second.digest != first.digest
    (root / "sa_000000/deep/sa_8.json").unlink()
    third = FileNames(root, "sa_", ".json")
    assert list(third) == list(first) and third.digest == first.digest
    moved = root.rename(tmp_path / "moved")
    assert FileNames(moved, "sa_", ".json").digest == first.digest  # wherever the data lie
    assert len(FileNames(moved, "x", ".json")) == 1


def test_hashes_of_names_are_kept_for_the_same_list_alone(tmp_path, cache, monkeypatch):
    root = tmp_path / "data"
    write_names(root, NAMES)
    files = FileNames(root, "sa_", ".json")
    wanted = [file_hash(path) for path in files]
    assert files.hashes().tolist() == wanted and len(list(cache.iterdir())) == 2
    assert files.take(np.array([4, 0])).hashes().tolist() == [wanted[4], wanted[0]]
    with monkeypatch.context() as patched:
        patched.setattr(index, "file_hash", None)  # kept, and mapped
        assert FileNames(root, "sa_", ".json").hashes().tolist() == wanted
    (root / "sa_000000/deep/sa_8.json").touch()
    again = FileNames(root, "sa_", ".json")
    assert again.hashes().tolist() == [file_hash(path) for path in again] and len(again) == len(wanted) + 1


def test_names_are_packed(tmp_path):
    """A tenth of what paths take; here with 4,000 names, see benchmarks/index.py for more."""
    root = tmp_path / "data"
    for folder in range(4):
        (root / f"sa_{folder:06d}").mkdir(parents=True)
        for number in range(1000):
            os.close(os.open(root / f"sa_{folder:06d}" / f"sa_{11_000_000 + number}.json", os.O_CREAT))

    def traced(make):
        tracemalloc.start()
        made = make()
        now, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return made, now / 4_000

    files, bytes_each = traced(lambda: FileNames(root, "sa_", ".json"))
    paths, before = traced(lambda: sorted(root.rglob("sa_*.json")))
    assert len(files) == len(paths) == 4_000 and files[2_345] == paths[2_345]
    assert before > 250 and bytes_each < 28  # 16 of the name and 8 of its place
    write_names(root, [])
    FileNames(root, "sa_", ".json")
    assert traced(lambda: FileNames(root, "sa_", ".json"))[1] < 4  # mapped
