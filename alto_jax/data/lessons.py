"""Stage 0: questions about composed scenes whose answers are text, so that a language model from nothing learns to see.

In: a `ScenesConfig` and a `LessonConfig`. Out: ChatRecords without masks, several questions about one picture each. The
paper begins with InternVL, which can see and name already; a small model that begins with nothing is taught here:

    map      the name at each cell of a grid: a word for every image token
    list     every object with its box, from left to right
    where    a phrase → its box
    name     a box → the name
    place    "What is on the left?" → the name
    colour   a phrase → the colour
    count    how many things, or how many of a name
    exists   yes or no
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import numpy as np

from alto_jax.data import identity, phrases
from alto_jax.data.composition import Scene, Scenes, ScenesConfig
from alto_jax.mllm import boxes, text

KINDS = ("map", "list", "where", "name", "place", "colour", "count", "exists")
NOTHING = "."
_LEAST_OF_A_CELL = 0.2  # an object that covers less of a cell is not what the cell shows
MAP_QUESTION, LIST_QUESTION = "What is where?", "What is in the image?"
_TRIES = 4  # for each turn: not every kind of question can be asked of every scene

Turn = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class LessonConfig:
    """Which questions are asked.

    Attributes:
      kinds: some of KINDS; one that stands there twice is asked twice as often.
      turns: questions about a picture, fewer where no more can be asked.
      map_fraction: share of the pictures whose first question is the map, if it is one of the kinds.
      map_grid: cells along a side of the map.
      unnamed_fraction: of the phrases, how many say "thing" for the name.
      box_step: thousandths between the coordinates of boxes.
    """

    kinds: tuple[str, ...] = KINDS
    turns: int = 5
    map_fraction: float = 0.5
    map_grid: int = 4
    unnamed_fraction: float = 0.25
    box_step: int = 10

    def __post_init__(self) -> None:
        if not self.kinds or set(self.kinds) - set(KINDS):
            raise ValueError(f"kinds: expected some of {', '.join(KINDS)}, got {self.kinds!r}")
        for name in ("turns", "map_grid", "box_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)!r}")
        for name in ("map_fraction", "unnamed_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected 0..1, got {getattr(self, name)!r}")


class SceneLessons:
    """Random access to ChatRecords {"key", "image", "masks": [], "conversations"} about scenes."""

    def __init__(self, config: ScenesConfig, lessons: LessonConfig = LessonConfig()):
        self.scenes = Scenes(config)
        self.config = lessons

    def __len__(self) -> int:
        return len(self.scenes)

    def identity(self) -> identity.Identity:
        """What the data are, see identity.py."""
        return self.scenes.identity()

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene, rng = self.scenes.scene(index)
        conversations: list[dict[str, str]] = []
        for question, answer in self._turns(scene, rng):
            image = "" if conversations else f"{text.IMAGE}\n"
            conversations += [{"from": "human", "value": image + question}, {"from": "gpt", "value": answer}]
        record = {"key": scene.key, "image": scene.image, "image_name": scene.key, "masks": []}
        return record | {"conversations": conversations}

    def _turns(self, scene: Scene, rng: np.random.Generator) -> list[Turn]:
        """The questions about a scene, each once, with their answers."""
        config = self.config
        turns: dict[str, str] = {}
        others = [kind for kind in config.kinds if kind != "map"]
        # Note: the first turn, so that a cell's word has the same distance to its image token in every picture.
        if "map" in config.kinds and (not others or rng.random() < config.map_fraction):
            turns.update([self._map(scene)])
        for _ in range(config.turns * _TRIES if others else 0):
            if len(turns) >= config.turns:
                break
            asked = self._ask(others[int(rng.integers(len(others)))], scene, rng)
            if asked is not None:
                turns.setdefault(*asked)
        if not turns:  # Note: of a single kind that this scene has no question for.
            turns.update([self._list(scene)])
        return list(turns.items())

    def _ask(self, kind: str, scene: Scene, rng: np.random.Generator) -> Turn | None:
        """A question of a kind, None if the scene has none."""
        ask: Callable[..., Turn | None] = getattr(self, f"_{kind}")
        return ask(scene) if kind == "list" else ask(scene, rng)

    def _phrase(self, scene: Scene, rng: np.random.Generator) -> tuple[str, int] | None:
        """A phrase for one object, and which."""
        target = int(rng.integers(len(scene.objects)))
        unnamed = rng.random() < self.config.unnamed_fraction
        phrase = phrases.refer_single(scene.objects, target, rng, unnamed=unnamed)
        return None if phrase is None else (phrase, target)

    def _boxes(self, scene: Scene, targets: list[int]) -> str:
        return boxes.format_boxes([scene.objects[i].bbox for i in targets], scene.image.shape[:2], self.config.box_step)

    def _map(self, scene: Scene) -> Turn:
        grid = self.config.map_grid
        shares = np.stack([_cell_shares(o.mask, grid) for o in scene.objects])
        owner, most = shares.argmax(0).ravel(), shares.max(0).ravel()
        words = [scene.objects[o].name if m >= _LEAST_OF_A_CELL else NOTHING for o, m in zip(owner, most, strict=True)]
        return MAP_QUESTION, "Map: " + " ".join(words)

    def _list(self, scene: Scene) -> Turn:
        order = sorted(range(len(scene.objects)), key=lambda i: scene.objects[i].bbox[:2])
        return LIST_QUESTION, ", ".join(f"{scene.objects[i].name} {self._boxes(scene, [i])}" for i in order)

    def _where(self, scene: Scene, rng: np.random.Generator) -> Turn | None:
        found = self._phrase(scene, rng)
        if found is None:
            return None
        return f"Where is {text.reference(found[0])}?", self._boxes(scene, [found[1]])

    def _name(self, scene: Scene, rng: np.random.Generator) -> Turn:
        target = int(rng.integers(len(scene.objects)))
        return f"What is at {self._boxes(scene, [target])}?", scene.objects[target].name

    def _place(self, scene: Scene, rng: np.random.Generator) -> Turn | None:
        target = int(rng.integers(len(scene.objects)))
        places = phrases.single_places(scene.objects, target)
        if not places:
            return None
        return f"What is {places[int(rng.integers(len(places)))]}?", scene.objects[target].name

    def _colour(self, scene: Scene, rng: np.random.Generator) -> Turn | None:
        target = int(rng.integers(len(scene.objects)))
        colour, phrase = scene.objects[target].colour, phrases.refer_single(scene.objects, target, rng, coloured=False)
        return None if colour is None or phrase is None else (f"What colour is {text.reference(phrase)}?", colour)

    def _count(self, scene: Scene, rng: np.random.Generator) -> Turn:
        names = [o.name for o in scene.objects]
        if rng.random() < 0.5:
            return f"How many {phrases.plural(phrases.THING)} are there?", str(len(names))
        name = names[int(rng.integers(len(names)))]
        return f"How many {phrases.plural(name)} are there?", str(names.count(name))

    def _exists(self, scene: Scene, rng: np.random.Generator) -> Turn | None:
        if rng.random() < 0.5:
            found = self._phrase(scene, rng)
            return None if found is None else (text.no_target_question(found[0]), text.YES)
        phrase = phrases.refer_absent(scene.objects, self.scenes.names, self.scenes.shown(scene.photo), rng)
        return None if phrase is None else (text.no_target_question(phrase), text.NO)


def _cell_shares(mask: np.ndarray, grid: int) -> np.ndarray:
    """Share of each cell that mask bool[H, W] covers, float[grid, grid]."""
    height, width = mask.shape
    rows = np.add.reduceat(mask, np.arange(grid) * height // grid, axis=0, dtype=np.int64)
    cells = np.add.reduceat(rows, np.arange(grid) * width // grid, axis=1)
    return cells / (height * width / grid**2)
