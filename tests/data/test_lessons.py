"""Questions about scenes with answers in text: true of the scene, and read back as they were meant."""

import dataclasses
import re

import numpy as np
import pytest

from alto_jax.data import lessons, phrases
from alto_jax.data.composition import ScenesConfig
from alto_jax.mllm import boxes

SCENES = ScenesConfig(image_size=64, num_scenes=60, max_objects=4, vocabulary=40, shapes="train")


def turns_of(source, index):
    turns = [turn["value"].removeprefix("<image>\n") for turn in source[index]["conversations"]]
    return list(zip(turns[::2], turns[1::2]))


def of_kind(kind, **changes):
    config = lessons.LessonConfig(kinds=(kind,), turns=3, **changes)
    source = lessons.SceneLessons(SCENES, config)
    for index in range(len(source)):
        for question, answer in turns_of(source, index):
            if question != lessons.LIST_QUESTION or kind == "list":
                yield source.scenes[index], question, answer


def in_thousandths(scene, target):
    height, width = scene.image.shape[:2]
    x, y, w, h = scene.objects[target].bbox
    return np.array([x / width, y / height, (x + w) / width, (y + h) / height])


def close(scene, found):
    """Indices of the objects whose box is the found one, to a hundredth."""
    return [i for i in range(len(scene.objects)) if np.abs(in_thousandths(scene, i) - found).max() <= 0.0051]


def test_list_names_every_object_with_its_box_from_left_to_right():
    for scene, _, answer in of_kind("list"):
        found, names = boxes.parse_boxes(answer), re.findall(r"(?:^|, )([^<]+) <box>", answer)
        assert len(found) == len(names) == len(scene.objects)
        assert [box[0] for box in found] == sorted(box[0] for box in found)
        assert all(name in {scene.objects[i].name for i in close(scene, box)} for name, box in zip(names, found))


def test_map_shows_what_covers_a_cell():
    for scene, question, answer in of_kind("map"):
        assert question == lessons.MAP_QUESTION
        cells = answer.removeprefix("Map: ").split(" ")
        assert len(cells) == 16
        for number, cell in enumerate(cells):
            y, x = divmod(number, 4)
            shares = {}
            for o in scene.objects:
                share = o.mask[16 * y : 16 * y + 16, 16 * x : 16 * x + 16].mean()
                shares[o.name] = max(share, shares.get(o.name, 0))
            assert shares[cell] == max(shares.values()) if cell != "." else max(shares.values()) < 0.2


@pytest.mark.parametrize("kind, least", [("where", 60), ("name", 60), ("place", 30), ("colour", 20)])
def test_answers_about_one_object_are_true(kind, least):
    asked = 0
    for scene, question, answer in of_kind(kind):
        asked += 1
        if kind == "where":
            phrase = re.search("<ref>(.*)</ref>", question).group(1)
            targets = close(scene, np.array(boxes.parse_boxes(answer)[0]))
            named = [phrases.single_phrases(scene.objects, i) for i in targets]
            told = [dataclasses.replace(o, name=phrases.THING) for o in scene.objects]
            named += [phrases.single_phrases(told, i) for i in targets]
            assert any(phrase in possible for possible in named)
        elif kind == "name":
            targets = close(scene, np.array(boxes.parse_boxes(question)[0]))
            assert answer in {scene.objects[i].name for i in targets}
        elif kind == "place":
            place = question.removeprefix("What is ").removesuffix("?")
            there = [i for i in range(len(scene.objects)) if place in phrases.single_places(scene.objects, i)]
            assert len(there) == 1 and scene.objects[there[0]].name == answer
        else:
            phrase = re.search("<ref>(.*)</ref>", question).group(1)
            assert answer in {o.colour for o in scene.objects if o.name in phrase} and answer not in phrase.split()
    assert asked >= least


def test_counts_and_presence_are_true():
    for scene, question, answer in of_kind("count"):
        name = question.removeprefix("How many ").removesuffix(" are there?")
        counted = [o for o in scene.objects if name in (phrases.plural(phrases.THING), phrases.plural(o.name))]
        assert int(answer) == len(counted) > 0
    answers = {"Yes": 0, "No": 0}
    for scene, question, answer in of_kind("exists", unnamed_fraction=0.0):
        phrase = re.search("<ref>(.*)</ref>", question).group(1)
        answers[answer] += 1
        there = any(phrase in phrases.single_phrases(scene.objects, i) for i in range(len(scene.objects)))
        assert there == (answer == "Yes")
    assert min(answers.values()) >= 20


def test_records_are_functions_of_the_index_and_ask_nothing_twice():
    source = lessons.SceneLessons(SCENES)
    again = lessons.SceneLessons(SCENES)
    asked = set()
    for index in (3, 1, 41):
        assert source[index]["conversations"] == again[index]["conversations"]
        questions = [question for question, _ in turns_of(source, index)]
        assert len(set(questions)) == len(questions) <= 5
        asked |= set(questions)
    assert source[0]["masks"] == [] and len(asked) > 6
    assert source.identity() == again.identity()


@pytest.mark.parametrize(
    "changes, message",
    [({"kinds": ("map", "x")}, "kinds: expected some of map, list"), ({"kinds": ()}, "kinds"),
     ({"turns": 0}, "turns: expected at least 1, got 0"), ({"map_fraction": 1.5}, "map_fraction: expected 0..1")],
)  # fmt: skip
def test_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        lessons.LessonConfig(**changes)
