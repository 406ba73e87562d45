"""A position belongs to a data set: another one is refused with what differs, unless it is allowed."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest

from alto_jax.config import ConfigError
from alto_jax.data import identity, pipeline, prepare, refcoco, sources, stream
from alto_jax.data.conversations import Conversations
from alto_jax.data.mixture import Mixture
from alto_jax.data.prepared import Prepared
from alto_jax.data.sa1b import Sa1bMasks
from alto_jax.data.scenes import SceneMasks, ScenesConfig
from alto_jax.mllm.text import TextTokenizer
from alto_jax.train import loop
from tests import fake_stage
from tests.data import replicas
from tests.data.test_mixture import config_of
from tests.data.test_prepare import SIZES, job


def change_lines(root):
    """The first 3 lines alone."""
    file = root / "chat.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:3]))


def change_content(root):
    """As many lines of as many bytes, with other words."""
    file = root / "chat.jsonl"
    file.write_text(file.read_text().replace("thing 0", "thinx 0"))


def change_repeat(root):
    file = root / "meta.json"
    file.write_text(file.read_text().replace('"repeat_time": 1', '"repeat_time": 0.5'))


def change_names(root):
    for ending in ("json", "jpg"):
        (root / f"sa_1.{ending}").rename(root / f"sa_77.{ending}")


def change_pickle(root):
    shutil.rmtree(root)
    replicas.write_refer(root, "refcoco", splits=("train",), count=4)


def jsonl(root):
    replicas.write_conversations(root, 6)
    return lambda: Conversations(root / "meta.json")


def sa1b(root):
    replicas.write_sa1b(root, 4)
    return lambda: Sa1bMasks(root)


def referring(root):
    replicas.write_refer(root, "refcoco", splits=("train",))
    return lambda: refcoco.ReferringChats(refcoco.open_refer(root, "refcoco", "train"))


def prepared(root):
    replicas.write_sa1b(root / "raw", 4)
    make = lambda seed: prepare.Job("sa1b", "masks", Sa1bMasks(root / "raw", seed=seed), dict.fromkeys(SIZES, 0), "png",
                                    2, 0)  # fmt: skip
    prepare.prepare(make(0), root, max_bad_fraction=0)
    (root / "again").mkdir()
    prepare.prepare(make(1), root / "again", max_bad_fraction=0)
    return lambda: Prepared(root / "sa1b" / "1.0.0")


def change_prepared(root):
    shutil.rmtree(root / "sa1b")
    (root / "again" / "sa1b").rename(root / "sa1b")


def mixture(root):
    return lambda: Mixture({"x": (jsonl(root / "x")(), 1.0), "y": (range(9), 2.0)})


CASES = {
    "lines": (jsonl, change_lines, "sample: 6 records .* then, 3 records .* now"),
    "content": (jsonl, change_content, "sample: 6 records .* then, 6 records .* now"),
    "repeat": (jsonl, change_repeat, "sample: 6 records .* then, 3 records .* now"),
    "names": (sa1b, change_names, "4 records .* then, 4 records .* now"),
    "pickle": (referring, change_pickle, "6 records .* then, 4 records .* now"),
    "prepared": (prepared, change_prepared, "4 records .* then, 4 records .* now"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_changed_data_set_is_told(tmp_path, case):
    write, change, expected = CASES[case]
    root = tmp_path / "data"
    root.mkdir()
    make = write(root)
    first = identity.of(make())
    assert identity.of(make()) == first == json.loads(json.dumps(first))
    moved = shutil.move(root, tmp_path / "moved")
    assert identity.of(write(tmp_path / "elsewhere")()) == first  # wherever it lies
    shutil.move(moved, root)
    change(root)
    told = identity.difference(first, identity.of(make()))
    assert re.fullmatch(expected, told), told


def test_scenes_and_mixtures():
    scenes = lambda count: SceneMasks(ScenesConfig(image_size=32, num_scenes=count))
    assert identity.of(scenes(5)) == identity.of(scenes(5)) != identity.of(scenes(6))
    mixed = lambda count, weight, seed=0: Mixture(
        {"a": (scenes(count), weight), "b": ([{"key": "1"}] * 4, 1.0)}, seed=seed
    )
    base = identity.of(mixed(5, 1.0))
    assert base.keys() == {"a", "b"} and identity.of(mixed(5, 1.0)) == base
    assert identity.difference(base, identity.of(mixed(6, 1.0))).startswith("a: 5 records (")
    assert identity.of(mixed(5, 3.0)) != base and identity.of(mixed(5, 1.0, 1)) != base
    assert identity.difference({"a": base["a"]}, base).startswith("b: none then, 4 records (")
    many = {f"p{i}": {"records": i, "hash": ""} for i in range(6)}
    assert identity.difference(many, {}).endswith("; and 2 more") and identity.difference({}, {}) == ""


def batches(count, **options):
    rows = [{"key": str(i), "image": np.full((16, 16, 3), i, np.uint8), "mask": np.full((16, 16), 255, np.uint8)}
            for i in range(count)]  # fmt: skip
    return iter(pipeline.mask_batches(rows, image_size=16, mask_size=8, batch_size=2, seed=0, num_threads=0, **options))


def test_states_are_compared(capsys):
    iterator = batches(10)
    next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    following = next(iterator).image
    expected = "config.data: .*10 records .* then, 7 records .* now.*--config.data.allow_changed=True"
    with pytest.raises(ConfigError, match=expected):
        batches(7).set_state(state)
    same = batches(10)
    same.set_state(state)
    np.testing.assert_array_equal(next(same).image, following)
    assert not capsys.readouterr().err
    allowed = batches(7, allow_changed=True)
    allowed.set_state(state)
    next(allowed)
    warned = capsys.readouterr().err
    assert warned.count("\n") == 1 and "warning: config.data.allow_changed" in warned and "7 records" in warned
    assert allowed.get_state()["data_set"] == {"": {"records": 7, "hash": ""}}
    old = batches(10)
    old.set_state({name: value for name, value in state.items() if name != "data_set"})  # of an earlier version
    np.testing.assert_array_equal(next(old).image, following)
    warned = capsys.readouterr().err
    assert warned.count("\n") == 1 and "does not say which data set" in warned


@pytest.mark.parametrize("source", ["scenes", "sa1b", "prepared", "jsonl", "referring", "mixture"])
def test_the_iterators_of_all_sources_know_their_data(tmp_path, debug_model, source):
    """As the configuration opens them; a state of each is refused by another data set of its kind."""
    places = {}
    for number, name in enumerate(("one", "two")):
        root = tmp_path / name
        replicas.write_sa1b(root / "sa1b", 3 + number)
        replicas.write_conversations(root / "chat", 5 + number)
        replicas.write_refer(root / "coco", "refcoco", splits=("train",), count=4 + number)
        sizes = {"vision_size": 0, "image_size": 64, "mask_size": 32}
        found = prepare.prepare(job("sa1b", root / "sa1b", sizes, draws=1), root / "out", max_bad_fraction=0)
        mix = {
            "chat": {"weight": 1, "source": "jsonl", "meta": "chat/meta.json"},
            "scenes": {"weight": 1, "source": "scenes"},
        }
        (root / "mix.json").write_text(json.dumps(mix))
        places[name] = {
            "scenes": {},
            "sa1b": {"root": str(root / "sa1b")},
            "prepared": {"root": str(found)},
            "jsonl": {"meta": str(root / "chat" / "meta.json")},
            "referring": {"root": str(root / "coco"), "meta": "refcoco"},
            "mixture": {"meta": str(root / "mix.json")},
        }[source]
    is_masks = source in ("sa1b", "prepared")

    def make(name, **more):
        config = config_of(debug_model, source=source, **places[name], **more)
        if source == "scenes" and name == "two":
            data = dataclasses.replace(config.data, scenes=dataclasses.replace(config.data.scenes, num_scenes=60))
            config = dataclasses.replace(config, data=data)
        if is_masks:
            return sources.mask_iterator(dataclasses.replace(config, stage="stage1"))
        return sources.chat_iterator(config, TextTokenizer.load(debug_model.path))

    iterator = make("one")
    next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    following = next(iterator).image
    again = make("one")
    again.set_state(state)
    np.testing.assert_array_equal(next(again).image, following)
    helped = make("one", num_workers=1)
    helped.set_state(state)
    np.testing.assert_array_equal(next(helped).image, following)
    helped.close()
    with pytest.raises(ConfigError, match="records .* then, .* records .* now.*allow_changed"):
        make("two").set_state(state)
    make("two", allow_changed=True).set_state(state)


class Rows:
    """Rows of numbers for the stage of fake_stage.py."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"x": np.full(4, index / 100, np.float32), "weight": np.float32(1)}


def test_a_run_goes_on_with_its_own_data_alone(tmp_path, capsys, monkeypatch):
    """Stopped, and started again with other data; then with these allowed; then from a checkpoint that knows none."""
    stack = lambda rows: {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def run(count, **data):
        config = fake_stage.config(train={"steps": 6}, data=data)
        options = dict(batch_size=fake_stage.ROWS, seed=0, allow_changed=config.data.allow_changed)
        stage = fake_stage.replace(
            fake_stage.stage(), data=lambda *_: iter(pipeline.batches(Rows(count), stack, **options))
        )
        monkeypatch.setattr(loop, "make_stage", lambda *_: stage)
        return loop.train(config, folder)

    def unfinish():
        (folder / "result.json").unlink()
        shutil.rmtree(folder / "checkpoints" / "6")
        return capsys.readouterr().err

    folder = tmp_path / "run"
    run(40)
    unfinish()
    run(40)
    assert "warning" not in unfinish()
    with pytest.raises(ConfigError, match="40 records .* then, 30 records .* now.*allow_changed"):
        run(30)
    assert "4" in [p.name for p in (folder / "checkpoints").iterdir()]  # nothing is lost
    run(30, allow_changed=True)
    assert unfinish().count("warning: config.data.allow_changed: going on with another data set") == 1
    with monkeypatch.context() as patch:  # as earlier versions saved
        patch.setattr(stream._StreamIterator, "get_state", lambda iterator: iterator._parent.get_state())
        shutil.rmtree(folder)
        run(30)
        unfinish()
    run(30)
    assert unfinish().count("does not say which data set") == 1
