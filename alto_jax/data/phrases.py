"""Referring phrases that are true and unambiguous in a scene.

In: the objects of a scene (name, colour, relative box centre). Out: phrases such as "the apple", "the red
apple", "the apple on the left", "all apples", "the apple and the frog", and names of absent things.
A phrase is given only if no other object could be meant; None says that there is no such phrase.
"""

from collections.abc import Sequence
import dataclasses
import re
from typing import Protocol

import numpy as np

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "grey")
POSITIONS = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "centre": "in the centre",
}
THING = "thing"  # for a name that is not said
_SLACK = 0.1  # a rival must be at least this far (of the image side) outside the region named
_IRREGULAR = {
    "man": "men",
    "woman": "women",
    "foot": "feet",
    "tooth": "teeth",
    "mouse": "mice",
    "ox": "oxen",
    "leaf": "leaves",
    "child": "children",
    "person": "people",
    "scarf": "scarves",
    "wolf": "wolves",
    "elf": "elves",
    "fish": "fish",
    "sheep": "sheep",
    "deer": "deer",
    "squid": "squid",
    "shrimp": "shrimp",
    "bison": "bison",
    "potato": "potatoes",
    "tomato": "tomatoes",
    "mango": "mangoes",
    "volcano": "volcanoes",
    "mosquito": "mosquitoes",
    "hippopotamus": "hippopotamuses",
    "bus": "buses",
    "octopus": "octopuses",
    "cactus": "cactuses",
    "walrus": "walruses",
    "compass": "compasses",
    "dress": "dresses",
    "glass": "glasses",
    "lotus": "lotuses",
    "hibiscus": "hibiscuses",
    "cross": "crosses",
    "rhinoceros": "rhinoceroses",
    "bread": "bread",
    "bacon": "bacon",
    "broccoli": "broccoli",
    "popcorn": "popcorn",
    "spaghetti": "spaghetti",
}
_TAIL = re.compile(r" (with|of|in|on|over|and|behind|without|under|at|covering|facing|having) ")
_STOP = frozenset("a an the and of with in on face sign symbol".split())


class Referable(Protocol):
    """What a phrase needs to know of an object; `centre` is (x, y) in 0..1."""

    @property
    def name(self) -> str: ...

    @property
    def colour(self) -> str | None: ...

    @property
    def centre(self) -> tuple[float, float]: ...


def position_words(centre: tuple[float, float], slack: float = 0.0) -> tuple[str, ...]:
    """The regions of the image that hold a box centre.

    Args:
      centre: (x, y) in 0..1, from the top left corner.
      slack: widens every region by this much; with it a tuple says where an object *might* be seen.

    Returns:
      A subset of the keys of POSITIONS; "centre" excludes the others where slack is 0.
    """
    x, y = centre
    words = []
    if x < 0.4 + slack:
        words.append("left")
    if x > 0.6 - slack:
        words.append("right")
    if y < 0.4 + slack:
        words.append("top")
    if y > 0.6 - slack:
        words.append("bottom")
    if max(abs(x - 0.5), abs(y - 0.5)) <= 0.1 + slack:
        words.append("centre")
    return tuple(words)


def plural(name: str) -> str:
    """The plural of a glyph's name: the head noun before " with ", " of " … is inflected."""
    match = _TAIL.search(name)
    head, tail = (name[: match.start()], name[match.start() :]) if match else (name, "")
    *front, noun = head.split(" ")
    if noun in _IRREGULAR:
        noun = _IRREGULAR[noun]
    elif re.search(r"(woman|man)$", noun):
        noun = noun[:-2] + "en"
    elif re.search(r"[^s]s$", noun):
        pass  # jeans, scissors, grapes: already plural
    elif re.search(r"(s|x|z|ch|sh)$", noun):
        noun += "es"
    elif re.search(r"[^aeiou]y$", noun):
        noun = noun[:-1] + "ies"
    elif noun.endswith("knife"):
        noun = noun[:-2] + "ves"
    else:
        noun += "s"
    return " ".join([*front, noun]) + tail


def confusable(a: str, b: str) -> bool:
    """Whether two different names could stand for one thing ("cat" and "cat face")."""
    words_a, words_b = set(a.split()), set(b.split())
    return a != b and (words_a <= words_b or words_b <= words_a)


def related(a: str, b: str) -> bool:
    """Whether two names share a content word; such a name is never called absent."""
    return bool((set(a.split()) & set(b.split())) - _STOP) or a == b or confusable(a, b)


def single_phrases(objects: Sequence[Referable], target: int) -> list[str]:
    """All phrases that mean exactly `objects[target]`, shortest description first."""
    this = objects[target]
    rivals = [o for i, o in enumerate(objects) if i != target and o.name == this.name]
    descriptions: list[tuple[str, list[Referable]]] = [(f"the {this.name}", rivals)]
    if this.colour:
        same = [o for o in rivals if o.colour in (this.colour, None)]
        descriptions.append((f"the {this.colour} {this.name}", same))
    phrases = [text for text, left in descriptions if not left]
    for text, left in descriptions:
        for word in position_words(this.centre):
            if not any(word in position_words(o.centre, _SLACK) for o in left):
                phrases.append(f"{text} {POSITIONS[word]}")
    if not phrases:  # the two words of a corner together
        words = position_words(this.centre)
        corner = [w for w in words if w in ("top", "bottom")] + [w for w in words if w in ("left", "right")]
        for text, left in descriptions:
            near = [o for o in left if set(corner) <= set(position_words(o.centre, _SLACK))]
            if len(corner) == 2 and not near:
                phrases.append(f"{text} at the {corner[0]} {corner[1]}")
    return phrases


@dataclasses.dataclass(frozen=True)
class _Partly:
    """An object of which not everything is told."""

    name: str
    colour: str | None
    centre: tuple[float, float]


def single_places(objects: Sequence[Referable], target: int) -> list[str]:
    """The words of POSITIONS that hold for `objects[target]` and for no other object, whatever it is."""
    others = [o for i, o in enumerate(objects) if i != target]
    words = position_words(objects[target].centre)
    return [POSITIONS[w] for w in words if not any(w in position_words(o.centre, _SLACK) for o in others)]


def refer_single(
    objects: Sequence[Referable],
    target: int,
    rng: np.random.Generator,
    *,
    unnamed: bool = False,
    coloured: bool = True,
) -> str | None:
    """A random one of `single_phrases`, the shortest half of the time; None if there is none.

    Args:
      objects: of the scene; target: the index of the one that is meant.
      rng: source of randomness.
      unnamed: say "thing" instead of a name, so that colour and place alone must tell which.
      coloured: False: without the colour.
    """
    if unnamed or not coloured:
        told = [_Partly(THING if unnamed else o.name, o.colour if coloured else None, o.centre) for o in objects]
        phrases = single_phrases(told, target)
    else:
        phrases = single_phrases(objects, target)
    if not phrases:
        return None
    return phrases[0] if rng.random() < 0.5 else phrases[int(rng.integers(len(phrases)))]


def refer_many(objects: Sequence[Referable], rng: np.random.Generator) -> tuple[str, tuple[int, ...]] | None:
    """A phrase for two or more objects, with their indices.

    "all apples" (or "all red apples") where a name occurs several times, "the apple and the frog"
    otherwise. None in a scene with one object, or where the parts cannot be named.
    """
    groups: dict[str, list[int]] = {}
    for i, o in enumerate(objects):
        groups.setdefault(o.name, []).append(i)
    choices: list[tuple[str, tuple[int, ...]]] = []
    for name, members in groups.items():
        if len(members) < 2:
            continue
        choices.append((f"all {plural(name)}", tuple(members)))
        colours = [objects[i].colour for i in members]
        for colour in dict.fromkeys(c for c in colours if c):
            matching = tuple(i for i in members if objects[i].colour == colour)
            if None not in colours and 2 <= len(matching) < len(members):
                choices.append((f"all {colour} {plural(name)}", matching))
    if choices and rng.random() < 0.75:
        return choices[int(rng.integers(len(choices)))]
    singles = [(i, refer_single(objects, i, rng)) for i in range(len(objects))]
    named = [(i, text) for i, text in singles if text is not None]
    if len(named) < 2:
        return choices[0] if choices else None
    count = 3 if len(named) >= 3 and rng.random() < 0.3 else 2
    picked = [named[int(j)] for j in rng.permutation(len(named))[:count]]
    texts = [text for _, text in picked]
    phrase = ", ".join(texts[:-1]) + " and " + texts[-1]
    return phrase, tuple(sorted(i for i, _ in picked))


def refer_absent(
    objects: Sequence[Referable], names: Sequence[str], shown: Sequence[str], rng: np.random.Generator
) -> str | None:
    """A phrase for something that is not in the scene.

    Args:
      objects: the objects of the scene.
      names: the vocabulary to draw an absent name from.
      shown: further words that the background shows; names related to them are avoided.
      rng: source of randomness.

    Returns:
      The name of an absent thing, or (three times in ten) a present name with a colour that no object
      of this name has; None if every name of the vocabulary might be present.
    """
    if rng.random() < 0.3 and objects:
        name = objects[int(rng.integers(len(objects)))].name
        colours = [o.colour for o in objects if o.name == name]
        if None not in colours:
            others = [c for c in COLOURS if c not in colours]
            return f"the {others[int(rng.integers(len(others)))]} {name}"
    for _ in range(16):
        name = names[int(rng.integers(len(names)))]
        if not any(related(name, o.name) for o in objects) and not any(related(name, w) for w in shown):
            return f"the {name}"
    return None
