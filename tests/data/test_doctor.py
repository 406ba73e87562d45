"""The doctor names what is missing, cut or too few in the data of the recipe, and nothing else."""

import json
import pathlib
import pickle
import shutil
import sys

import pytest

from alto_jax.config import ConfigError
from alto_jax.data import doctor, sources
from alto_jax.data.recipe import RECIPE
from alto_jax.experiment import make_experiment
from alto_jax.main import load_config
from alto_jax.mllm.text import TextTokenizer
from tests.conftest import ROOT
from tests.data import replicas


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A replica of all data of the recipe, and the numbers of it."""
    root = tmp_path_factory.mktemp("recipe") / "data"
    replicas.write_benchmarks(root)
    replicas.write_conversations(root)
    rows = doctor.examine(root)
    return root, {row.data.name: row.found.counts for row in rows}


@pytest.fixture
def tree(whole, tmp_path):
    root, counts = whole
    shutil.copytree(root, tmp_path / "data")
    (tmp_path / "counts.json").write_text(json.dumps(counts))
    return tmp_path / "data", [f"--counts={tmp_path / 'counts.json'}"]


def run(monkeypatch, capsys, root, *flags) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["doctor", "--paper", f"--data={root}", *flags])
    code = doctor.main()
    return code, capsys.readouterr().out


def cut_file(path: pathlib.Path) -> pathlib.Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def test_a_whole_tree_is_found_whole(tree, monkeypatch, capsys):
    root, flags = tree
    code, text = run(monkeypatch, capsys, root, *flags)
    assert code == 0 and text.endswith("\neverything that the recipe needs is there\n")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(RECIPE) and {row[1] for row in rows} == {"found"}
    assert all(row[4] and row[5] for row in rows)
    assert "| refcoco | found | 4 of 4 val expressions, 2 of 2 val referents" in text


REMOVED = (
    ("refcoco/refs(unc).p", "images/mscoco/images/train2014/COCO_train2014_000000000003.jpg", "sa1b/sa_534.json"),
    (
        "vqav2/v2_mscoco_val2014_annotations.json",
        "refcocom/masks/20_part.png",
        "coco/val2014/COCO_val2014_000000000001.jpg",
    ),
    ("mme/existence/1.txt", "open_vocab/pas20/img_1_0.png", "masks/1_0.png"),
)
CUT = ("grefcoco/instances.json", "images/mscoco/images/train2014/COCO_train2014_000000000005.jpg", "sa1b/sa_757.json")


@pytest.mark.parametrize("removed, cut", zip(REMOVED, CUT), ids=("annotations", "pictures", "pairs"))
def test_three_files_removed_and_one_cut_are_named_and_nothing_else(tree, monkeypatch, capsys, removed, cut):
    root, flags = tree
    for name in removed:
        (root / name).unlink()
    cut_file(root / cut)
    out = root.parent / "found.json"
    code, text = run(monkeypatch, capsys, root, *flags, f"--json={out}")
    found = json.loads(out.read_text())
    named = {pathlib.Path(entry["path"]).relative_to(root).as_posix(): entry["what"] for entry in found["problems"]}
    assert code == 1 and named.keys() == {*removed, cut}
    assert all(named[name] == "missing" for name in removed) and named[cut].startswith(("cut: ", "damaged: "))
    told = text.partition("\n\n")[2].splitlines()
    assert len(told) == 4 and not any("wrong count" in line for line in told)
    bad = {entry["data"] for entry in found["data"] if entry["state"] != "found"}
    assert bad and not any("wrong count" in entry["state"] for entry in found["data"])


def test_known_numbers_are_compared(tree, monkeypatch, capsys):
    root, flags = tree
    file = root / "refcoco" / "refs(unc).p"
    refs = pickle.loads(file.read_bytes())
    next(ref for ref in refs if ref["split"] == "val")["sentences"].pop()
    file.write_bytes(pickle.dumps(refs, protocol=2))
    code, text = run(monkeypatch, capsys, root, *flags)
    assert code == 1 and text.endswith("\nwrong count: refcoco: 3 val expressions, expected 4\n")
    assert "| refcoco | wrong count | 3 of 4 val expressions" in text
    code, text = run(monkeypatch, capsys, root)
    assert code == 1 and "wrong count: refcoco: 3 val expressions, expected 10,834" in text
    assert "wrong count: SA-1B: 4 images, expected 11,185,362" in text


def test_psalm_files_stand_for_the_published_ones(tree, monkeypatch, capsys):
    root, _ = tree
    for name in ("refs(unc).p", "instances.json"):
        (root / "refcoco" / name).unlink()
    for split in ("train", "val", "testA"):
        replicas.write_psalm(root, "refcoco", split)
    rows = {row.data.name: row for row in doctor.examine(root)}
    assert rows["refcoco instances"].state == "not needed: PSALM's files are there"
    assert rows["refcoco"].found.counts == {f"{split} expressions": 18 for split in ("train", "val", "testA")}
    assert rows["refcoco"].state == "1 missing"
    assert [p.path for p in rows["refcoco"].found.problems] == [root / "refcoco/refcoco_testB.json"]


def test_the_mixture_of_stage_2_is_what_is_there(tree, monkeypatch, capsys, debug_model):
    """Every stage of configs/paper.py reads it, at debug size."""
    root, flags = tree
    monkeypatch.chdir(root.parent)
    shutil.rmtree(root / "refcoco+")
    code, _ = run(monkeypatch, capsys, "data", *flags, "--mixture=data/stage2.json")
    found = json.loads((root / "stage2.json").read_text())
    assert code == 1 and [*found] == ["boxes", "refcoco", "refcocog", "grefcoco", "conversations"]
    assert found["boxes"] == {"weight": 1, "source": "sa1b_chats", "root": "sa1b"}
    assert found["conversations"] == {"weight": 1, "source": "jsonl", "meta": "meta.json"}
    tok = TextTokenizer.load(debug_model.path)
    for stage in ("stage1", "stage1_5", "stage2", "stage3"):
        config = make_experiment(load_config(str(ROOT / f"configs/paper.py:{stage}_debug")).to_dict())
        iterator = {"stage2": sources.chat_iterator, "stage3": sources.prompt_iterator}.get(stage)
        batch = next(iterator(config, tok) if iterator else sources.mask_iterator(config))
        assert batch.image.shape[0] == 2 and sources.evaluated_on(config) == "eval"
    shutil.rmtree(root)
    root.mkdir()
    with pytest.raises(ConfigError, match="--mixture: .*data holds none of SA-1B, RefCOCO"):
        run(monkeypatch, capsys, "data", "--mixture=data/stage2.json")


def test_bad_requests_are_one_clear_line(tree, monkeypatch, capsys, tmp_path):
    root, _ = tree
    file = tmp_path / "bad.json"
    cases = {
        '{"refcoco": 4}': "expected JSON {data set:",
        '{"refcocoo": {}}': "unknown data set 'refcocoo'; expected some of SA-1B, COCO train2014",
        '{"refcoco": {"val expressions": "4"}}': "refcoco: val expressions: expected a number or null, got '4'",
    }
    for content, message in cases.items():
        file.write_text(content)
        with pytest.raises(ConfigError, match=message):
            run(monkeypatch, capsys, root, f"--counts={file}")
    with pytest.raises(ConfigError, match="--data: there is no folder .*nowhere"):
        run(monkeypatch, capsys, tmp_path / "nowhere")
