"""Folders and files of requests: lines that are those of single calls, kills, bad files, COCO results."""

import argparse
import contextlib
import hashlib
import json
import os
import shlex
import subprocess
import sys
import time

import numpy as np
from PIL import Image
from pycocotools.coco import COCO
import pytest

import alto_jax
from alto_jax import predict, tokenize
from alto_jax.config import ConfigError
from alto_jax.data import rle
from alto_jax.data.bad_data import RecordError
from alto_jax.data.composition import ScenesConfig
from alto_jax.data.scenes import SceneMasks
from alto_jax.inference import bulk, requests, segmenter
from alto_jax.inference.requests import Request
from alto_jax.mllm import text as words
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def model(debug_model):
    return alto_jax.load(debug_model.path)


@pytest.fixture
def command(debug_model, model, monkeypatch):
    """Runs predict or tokenize in this process, on a model that is open already; returns the exit code."""
    monkeypatch.setattr(segmenter, "load", lambda *arguments: model)

    def run(module, *arguments):
        given = [*map(str, arguments), "--checkpoint", str(debug_model.path)]
        monkeypatch.setattr(sys, "argv", [module.__name__, *given])
        return module.main()

    return run


@pytest.fixture(scope="module")
def scenes():
    source = SceneMasks(ScenesConfig(image_size=40, num_scenes=6))
    return [source[index] for index in range(6)]


@pytest.fixture
def photos(tmp_path, scenes):
    """Six good images, numbered as COCO's are, one of them in a folder of its own, and two bad ones."""
    folder = tmp_path / "photos"
    (folder / "inner").mkdir(parents=True)
    names = [f"{'inner/' if index == 2 else ''}{index + 7:012d}.png" for index in range(6)]
    for name, scene in zip(names, scenes):
        Image.fromarray(scene["image"]).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden.png").write_bytes(b"x")
    return folder, names


def lines_of(folder, name=bulk.RESULTS):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_a_folder_is_its_images_one_by_one(command, model, photos, scenes, tmp_path, capsys):
    folder, names = photos
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 and no more")
    (folder / "empty.png").write_bytes(b"")
    out = tmp_path / "out"
    asked = ("--images", folder, "--text", "the red apple", "--length", 5, "--out", out, "--batch_size", 4)
    assert command(predict, *asked, "--save_masks", "--save_overlays") == bulk.EXIT_LEFT_OUT
    printed = capsys.readouterr()
    assert "left out: broken.jpg: image" in printed.err and "broken.jpg cannot be read" in printed.err
    assert f"2 of 8 left out (1 file of 0 bytes, 1 unreadable file); {out / 'bad.jsonl'} names them" in printed.err
    assert [line["id"] for line in lines_of(out, "bad.jsonl")] == ["broken.jpg", "empty.png"]
    assert "requests/s" in printed.out or "s/request" in printed.out
    lines = lines_of(out)
    assert [line["id"] for line in lines] == sorted(names)
    by_image = dict(zip(names, scenes))
    for line in lines:
        image = by_image[line["id"]]["image"]
        wanted = model.segment(image, "the red apple", length=5)
        assert line["request"] == {"image": line["id"], "text": "the red apple"} and line["size"] == [40, 40]
        assert line["codes"] == wanted.codes and line["answer"] == wanted.text and line["length"] == 5
        assert line["score"] == pytest.approx(wanted.score, rel=1e-4)
        mask = rle.decode(line["masks"][0]["rle"], 40, 40, "test")
        assert (mask == wanted.mask).mean() > 0.999  # batches and single images may differ in the last bits
        np.testing.assert_array_equal(np.asarray(Image.open(out / f"masks/{line['id']}.png")) > 0, mask)
        assert line["files"] == [f"masks/{line['id']}.png"]
        drawn = np.asarray(Image.open(out / f"overlays/{line['id']}.png"))
        assert (drawn != image).any(-1)[mask].mean() > 0.9

    # COCO's own reader takes the results.
    truth = {"images": [{"id": index + 7, "height": 40, "width": 40} for index in range(6)], "annotations": [],
             "categories": [{"id": 1, "name": "object"}]}  # fmt: skip
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    with contextlib.redirect_stdout(None):
        coco = COCO(tmp_path / "truth.json").loadRes(str(out / "coco.json"))
    entries = coco.loadAnns(coco.getAnnIds())
    assert sorted(entry["image_id"] for entry in entries) == list(range(7, 13))
    for entry, line in zip(entries, lines):
        assert entry["file_name"] == line["id"] == entry["key"] and entry["phrase"] == "the red apple"
        assert entry["score"] == line["score"] > 0 and entry["segmentation"] == line["masks"][0]["rle"]

    # The bad ones are tried again by the same command, and nothing else is computed.
    before = (out / bulk.RESULTS).read_bytes()
    Image.fromarray(scenes[0]["image"]).save(folder / "empty.png")
    assert command(predict, *asked, "--save_masks", "--save_overlays") == bulk.EXIT_LEFT_OUT
    after = (out / bulk.RESULTS).read_bytes()
    assert after.startswith(before) and [line["id"] for line in lines_of(out)[6:]] == ["empty.png"]
    assert [line["id"] for line in lines_of(out, "bad.jsonl")] == ["broken.jpg"]
    assert "goes on after 6 of 8" in capsys.readouterr().out
    # Names that are no numbers: images are counted, and the file is named.
    entries = json.loads((out / "coco.json").read_text())
    assert [entry["image_id"] for entry in entries] == list(range(1, 8)) and entries[6]["file_name"] == "empty.png"
    # Another question into the same folder is refused before anything is touched.
    for changed, message in (
        (("--text", "the cup"), r"request '0+7.png' was answered for text 'the red apple' \(now 'the cup'\)"),
        (("--length", 4), r"holds results of length 5 \(now 4\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            command(predict, *asked, "--save_masks", "--save_overlays", *changed)
    assert (out / bulk.RESULTS).read_bytes() == after


def test_lines_of_requests(command, model, photos, scenes, tmp_path, monkeypatch):
    folder, names = photos
    written = [
        {"image": f"photos/{names[0]}", "text": "the red apple", "id": "a/apple"},
        {"image": f"photos/{names[0]}", "boxes": [[1, 2, 20, 30], [5, 5, 39, 39]], "id": 17},
        {"image": f"photos/{names[1]}", "box": [1, 2, 20, 30]},
        {"image": f"photos/{names[1]}"},
    ]
    bad = ['{"image": "photos/x.png", "text": "a"}', "{", '{"image": 3}', '["image"]', '{"image": "a", "texts": "b"}',
           '{"image": "a", "text": "b", "box": [1, 2, 3, 4]}', '{"image": "a", "box": [1, 2, 3]}',
           '{"image": "a", "text": "!"}', '{"image": "a", "id": "../a"}',
           '{"image": "a", "id": "a/apple"}',
           '{"image": "a", "id": true}',
           '{"image": "a", "boxes": []}', '{"image": "a", "box": [1, 2, NaN, 4]}',
           json.dumps({"image": f"photos/{names[0]}", "box": [0, 0, 41, 9]})]  # fmt: skip
    file = tmp_path / "requests.jsonl"
    file.write_text("\n".join([*map(json.dumps, written), "", *bad]))
    out, encoded, encode = tmp_path / "out", [], type(model).encode_inputs
    noted = lambda self, given, rows=1: encoded.append(given) or encode(self, given, rows)
    monkeypatch.setattr(type(model), "encode_inputs", noted)
    assert command(predict, "--requests", file, "--text", "the cup", "--out", out) == bulk.EXIT_LEFT_OUT
    # Four requests, two images: each was encoded once.
    assert [len(given) for given in encoded] == [2]
    lines = {line["id"]: line for line in lines_of(out)}
    assert list(lines) == ["a/apple", "17", "3", "4"] and lines["4"]["request"]["text"] == "the cup"
    for key, image, asked in [
        ("a/apple", 0, {"text": "the red apple"}), ("17", 0, {"boxes": [(1, 2, 20, 30), (5, 5, 39, 39)]}),
        ("3", 1, {"boxes": [(1, 2, 20, 30)]}), ("4", 1, {"text": "the cup"}),
    ]:  # fmt: skip
        assert lines[key]["codes"] == model.segment(scenes[image]["image"], **asked).codes
    told = lines_of(out, "bad.jsonl")
    assert [line["id"] for line in told] == ["6", *(f"line {number}" for number in range(7, 19)), "19"]
    for line, message in zip(told, [
        "x.png does not exist", "line 7 is no JSON", "image: expected a file's name, got 3", "expected an object",
        "'texts': unknown field; known: id, image, text, box, boxes", "text and box: expected one of them",
        "box: expected [x1, y1, x2, y2] in pixels, got [1, 2, 3]", "text: expected the name", "id: expected a number",
        "id 'a/apple' stands in an earlier line, too", "id: expected a number", "boxes: expected a list of",
        "box: expected [x1, y1, x2, y2]", "boxes: expected x1 < x2 <= 40",
    ], strict=True):  # fmt: skip
        assert message in line["error"], line
    # Without --text each line must say what is meant.
    assert command(predict, "--requests", file, "--out", tmp_path / "other") == bulk.EXIT_LEFT_OUT
    assert "expected text, box or boxes" in lines_of(tmp_path / "other", "bad.jsonl")[0]["error"]


def test_a_prompt_for_all_lines_leaves_those_with_their_own_text(command, model, photos, scenes, tmp_path):
    """They begin with a mask as without it, whichever batch they are in."""
    _, names = photos
    own, other = ({"image": f"photos/{names[0]}", "text": "the cup"}, {"image": f"photos/{names[0]}"})
    file, out = tmp_path / "requests.jsonl", tmp_path / "out"
    file.write_text("\n".join(map(json.dumps, (other, own))))
    assert command(predict, "--requests", file, "--prompt", "Where?", "--length", 2, "--out", out) == 0
    image = scenes[0]["image"]
    wanted = [model.segment(image, **asked, length=2) for asked in ({"prompt": "Where?"}, {"text": "the cup"})]
    assert [line["answer"] for line in lines_of(out)] == [one.text for one in wanted]
    assert wanted[1].text.startswith(words.FORCED_ANSWER_PREFIX)


class Counting:
    """Work without a model: a line says what was read; a file is written first."""

    name, batch_size = "count", 3

    def __init__(self, die_at=None, **options):
        self.options, self.batches, self._die_at = {"command": "count", **options}, [], die_at

    def source(self, request):
        return None

    def read(self, request):
        if request.given["n"] % 10 == 7:
            raise RecordError(f"request {request.id} is bad", "truncated file")
        return request.given["n"] ** 2

    def answer(self, asked, items, folder):
        self.batches.append([request.id for request in asked])
        for request in asked:
            (folder / f"{request.id}.txt").write_text("x")
        if self._die_at is not None and asked[0].given["n"] >= self._die_at:
            while not (folder / bulk.RESULTS).stat().st_size:  # Note: of an earlier batch, computed at the same time.
                time.sleep(0.01)
            os._exit(9)
        return [{"square": item} for item in items]


def test_what_was_left_out_is_named(tmp_path, capsys):
    unfit = Request("line 9", {}, RecordError("requests.jsonl line 9: no id"))
    assert bulk.run([*counted(8), unfit], Counting(), tmp_path).left_out == {"truncated file": 1, "malformed entry": 1}
    told = capsys.readouterr().err
    assert "left out: 7: request 7 is bad\n" in told and "left out: requests.jsonl line 9: no id\n" in told


def counted(count):
    return [Request(str(n), {"n": n}) for n in range(count)]


def test_killed_and_run_again(tmp_path):
    """By a signal that nothing can catch, in a batch; then with a torn line; the result is that of one run."""
    whole = bulk.run(counted(20), Counting(), tmp_path / "whole")
    assert (whole.answered, whole.before, whole.left_out) == (18, 0, {"truncated file": 2}) and whole.exit_code == 1
    code = "import sys; from tests.inference.test_bulk import *; bulk.run(counted(20), Counting(die_at=9), sys.argv[1])"
    out = tmp_path / "killed"
    options = {"cwd": ROOT, "env": {**os.environ, "PYTHONPATH": str(ROOT)}, "capture_output": True, "timeout": 300}
    done = subprocess.run([sys.executable, "-c", code, out], **options)
    assert done.returncode == 9, done.stderr
    kept = (out / bulk.RESULTS).read_bytes()
    assert 0 < len(kept) < len((tmp_path / "whole" / bulk.RESULTS).read_bytes())
    (out / bulk.RESULTS).write_bytes(kept + b'{"id": "9", "request": {"n"')
    work = Counting()
    again = bulk.run(counted(20), work, out)
    assert again.before == kept.count(b"\n") > 0 and again.before + again.answered == 18
    assert {"0", "1", "2"}.isdisjoint(sum(work.batches, []))
    for name in (bulk.RESULTS, bulk.BAD):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    # All is there: nothing is computed; requests that came to it are.
    idle = Counting()
    assert bulk.run(counted(20), idle, out).answered == 0 and idle.batches == []
    more = Counting()
    assert bulk.run(counted(22), more, out).answered == 2 and more.batches == [["20", "21"]]


def test_other_files_of_the_same_names(command, photos, scenes, tmp_path, capsys):
    """A folder of results knows the files that were read by their content, wherever they are now."""
    folder, names = photos
    (tmp_path / "masks").mkdir()
    for name in names[:2]:
        Image.fromarray(scenes[0]["mask"]).save(tmp_path / "masks" / name)
    (folder / "requests.jsonl").write_text(json.dumps({"image": names[0], "text": "a"}))
    codes = tmp_path / "codes" / bulk.RESULTS
    commands = {
        "answers": (predict, ("--text", "a", "--length", 2, "--images"), folder),
        "lines": (predict, ("--length", 2, "--requests"), folder / "requests.jsonl"),
        "codes": (tokenize, ("encode", "--masks"), tmp_path / "masks"),
        "again": (tokenize, ("decode", "--codes", codes, "--images"), folder),
    }
    for out, (module, arguments, source) in commands.items():
        assert command(module, *arguments, source, "--out", tmp_path / out) == 0
    # The size and digest are those that other tools give.
    read = (folder / names[0]).read_bytes()
    [line] = lines_of(tmp_path / "lines")
    assert line["input"] == {"bytes": len(read), "sha256": hashlib.sha256(read).hexdigest()}
    # A folder that has moved goes on.
    for name in ("photos", "masks"):
        (tmp_path / name).rename(tmp_path / f"moved {name}")
    for out, (module, arguments, source) in commands.items():
        moved = tmp_path / f"moved {source.relative_to(tmp_path)}"
        assert command(module, *arguments, moved, "--out", tmp_path / out) == 0
        commands[out] = module, arguments, moved
    assert capsys.readouterr().out.count("goes on after") == len(commands)
    # Others of these names do not, of the same size neither; and nothing is touched.
    for file in (tmp_path / "moved photos" / names[0], tmp_path / "moved masks" / names[0]):
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    for out, (module, arguments, source) in commands.items():
        before = (tmp_path / out / bulk.RESULTS).read_bytes()
        told = rf"--out=.*{out}: request '.*' was answered for another content of .*{names[0]} \(\d+ bytes\); choose"
        with pytest.raises(ConfigError, match=told):
            command(module, *arguments, source, "--out", tmp_path / out)
        assert (tmp_path / out / bulk.RESULTS).read_bytes() == before
        # Lines of earlier versions, which do not say it, go on.
        lines = [
            {name: value for name, value in line.items() if name != "input"}
            for line in map(json.loads, before.splitlines())
        ]
        (tmp_path / out / bulk.RESULTS).write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert command(module, *arguments, source, "--out", tmp_path / out) == 0


def test_a_folder_of_somebody_else(tmp_path):
    bulk.run(counted(3), Counting(), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"holds results of length None \(now 5\); choose another folder"):
        bulk.run(counted(3), Counting(length=5), tmp_path / "out")
    (tmp_path / "out" / bulk.OPTIONS).unlink()
    with pytest.raises(ConfigError, match="holds a results.jsonl, but no options.json"):
        bulk.run(counted(3), Counting(), tmp_path / "out")
    (tmp_path / "other").mkdir()
    lines = bulk.ResultLines(tmp_path / "other", {"command": "count"})
    with pytest.raises(ConfigError, match="another process writes there"):
        bulk.run(counted(3), Counting(), tmp_path / "other")
    lines.close()
    (tmp_path / "other" / bulk.RESULTS).write_text('{"id": "1", "request": {}}\nwhat?\n')
    with pytest.raises(ConfigError, match="results.jsonl line 2 is none of a result"):
        bulk.run(counted(3), Counting(), tmp_path / "other")
    assert (tmp_path / "other" / bulk.RESULTS).read_text().endswith("what?\n")


def test_masks_there_and_back(command, model, scenes, tmp_path):
    """`tokenize` on folders, with images and without, is `encode` and `decode` one by one."""
    kept = {}
    for index, scene in enumerate(scenes[:4]):
        for name, pixels in (("masks", scene["mask"]), ("images", scene["image"])):
            (tmp_path / name / "in").mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(
                tmp_path / name / f"{'in/' if index else ''}{index}.{'png' if name == 'masks' else 'bmp'}"
            )
        kept[f"{'in/' if index else ''}{index}.png"] = scene
    Image.fromarray(np.zeros((40, 40), np.uint8)).save(tmp_path / "masks" / "nothing.png")
    encode = ("encode", "--masks", tmp_path / "masks", "--out", tmp_path / "codes", "--batch_size", 3)
    assert command(tokenize, *encode) == bulk.EXIT_LEFT_OUT
    [bad] = lines_of(tmp_path / "codes", "bad.jsonl")
    assert bad["id"] == "nothing.png" and bad["kind"] == "empty mask"
    lines = lines_of(tmp_path / "codes")
    assert {line["id"]: line["codes"] for line in lines} == {k: model.encode(s["mask"]) for k, s in kept.items()}
    file = tmp_path / "codes" / "results.jsonl"
    file.write_text(file.read_text() + json.dumps({"id": "in/9.png", "codes": [1], "size": [8, 8]}) + "\n"
                    + json.dumps({"id": "8.png", "codes": [99], "size": [8, 8]}) + "\n{}\n")  # fmt: skip
    decode = ("decode", "--codes", file, "--batch_size", 3)
    assert command(tokenize, *decode, "--images", tmp_path / "images", "--out", tmp_path / "again") == 1
    assert command(tokenize, *decode, "--out", tmp_path / "alone") == 1
    for line in lines:
        for folder, image in (("again", kept[line["id"]]["image"]), ("alone", None)):
            mask = np.asarray(Image.open(tmp_path / folder / "masks" / f"{line['id']}.png")) > 0
            assert (mask == model.decode(line["codes"], (40, 40), image)).mean() > 0.999
    told = [line["error"] for line in lines_of(tmp_path / "again", "bad.jsonl")]
    assert "no image in/9.* in" in told[0] and "no image 8.* in" in told[1] and "expected id, codes" in told[2]
    told = [line["error"] for line in lines_of(tmp_path / "alone", "bad.jsonl")]
    assert len(told) == 2 and "codes: expected values in 0..63, got 99" in told[0]
    with pytest.raises(ConfigError, match="--out=.*: expected another folder|--out: expected another folder"):
        command(tokenize, *decode, "--out", tmp_path / "codes")


def test_what_does_not_go_together(command, photos, tmp_path):
    folder, names = photos
    many = ("--images", folder, "--text", "a")
    (tmp_path / "file").write_text("x")
    for arguments, message in [
        (many, "--out: expected a folder, got None"), ((*many, "--out", tmp_path / "file"), "--out: expected a folder"),
        ((*many, "--out", tmp_path / "a/b"), "--out: expected a folder in one that is there"),
        ((*many, "--out", tmp_path, "--batch_size", 0), "--batch_size: expected 1..4096, got 0"),
        ((*many, "--out", tmp_path, "--json", "x.json"), "--json: expected it with --image alone"),
        ((*many, "--out", tmp_path, "--box", "1,2,3,4"), "--text, --box: expected one of them"),
        (("--images", folder, "--out", tmp_path), "--text='': expected the name"),
        (("--images", folder, "--out", tmp_path, "--box", " "), "--box='': expected x1,y1,x2,y2 in pixels"),
        (("--images", folder, "--text", "a", "--out", folder), "--out=.*photos: expected another folder than that of"),
        (("--images", folder, "--out", tmp_path, "--box", "1,2,3"), "--box: expected x1,y1,x2,y2 in pixels"),
        (("--images", folder, "--out", tmp_path, "--box", "1,2,.,4"), "--box: expected x1,y1,x2,y2 in pixels"),
        (("--images", tmp_path / "no", "--text", "a", "--out", tmp_path), "--images=.*no: expected a folder"),
        (("--requests", tmp_path / "no", "--text", "a", "--out", tmp_path), "--requests=.*no: cannot be read"),
        (("--image", folder / names[0], "--text", "a", "--save_masks"), "--save_masks: expected it with --images"),
    ]:  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            command(predict, *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "photos"]
    assert requests.parse_boxes("1,2,3,4; (5, 6, 7, 8)") == [(1, 2, 3, 4), (5, 6, 7, 8)]


def test_a_box_on_the_command_line(command, model, photos, scenes, tmp_path):
    folder, names = photos
    file = tmp_path / "answer.json"
    given = ("--image", folder / names[0], "--box", "1,2,20,30", "--box", "5,5,39,39", "--json", file)
    assert command(predict, *given) == 0
    wanted = model.segment(scenes[0]["image"], boxes=[(1, 2, 20, 30), (5, 5, 39, 39)])
    assert json.loads(file.read_text())["codes"] == wanted.codes


@pytest.mark.parametrize("words", [("predict",), ("tokenize",), ("tokenize", "encode"), ("tokenize", "decode")])
def test_help_ends_with_examples_that_parse(words, monkeypatch, capsys):
    module = {"predict": predict, "tokenize": tokenize}[words[0]]

    def asked_for(*arguments):
        monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
        return module.main()

    with pytest.raises(SystemExit):
        asked_for(*words[1:], "--help")
    shown = capsys.readouterr().out
    examples = [shlex.split(line) for line in shown.splitlines() if line.startswith("  python -m ")]
    assert len(examples) >= 2 and shown.index("--help") < shown.index("  python -m ")
    assert "Exit codes: 0" in shown and "bad.jsonl" in shown
    parse = argparse.ArgumentParser.parse_args

    class Parsed(BaseException):
        pass

    def stop(self, *given):
        parse(self, *given)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    for example in examples:
        assert example[2] == f"alto_jax.{words[0]}"
        with pytest.raises(Parsed):
            asked_for(*example[3:])
