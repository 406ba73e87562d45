"""The built-in dataset: masks and conversations about composed scenes.

In: a `ScenesConfig` (composition.py). Out: random-access sources of MaskRecords for the mask tokenizer
(`SceneMasks`) and of ChatRecords for the language model (`SceneChats`). Record i is a function of the
configuration and i alone, the same in every epoch: `num_scenes` says how many there are. Questions and answers are
worded as in the published data (mllm/text.py).
"""

import dataclasses
from typing import Any

import numpy as np

from alto_jax.data import identity, phrases
from alto_jax.data.composition import Scene, SceneObject, Scenes, ScenesConfig, mask_complexity
from alto_jax.mllm import boxes, text

__all__ = [
    "ChatConfig",
    "MaskConfig",
    "Scene",
    "SceneChats",
    "SceneMasks",
    "SceneObject",
    "Scenes",
    "ScenesConfig",
    "mask_complexity",
]


@dataclasses.dataclass(frozen=True)
class MaskConfig:
    """Which objects make a mask.

    Attributes:
      max_union: most objects in one mask.
      union_probability: how often a mask holds more than one object, where the scene does; None: the number of
        objects is uniform in 1..max_union (as many as the scene has).
    """

    max_union: int = 3
    union_probability: float | None = 0.2

    def __post_init__(self) -> None:
        if self.max_union < 1:
            raise ValueError(f"max_union: expected at least 1, got {self.max_union}")
        if self.union_probability is not None:
            _require_probability("union_probability", self.union_probability)


@dataclasses.dataclass(frozen=True)
class ChatConfig:
    """Which conversations are made.

    Attributes:
      adaptive_fraction: of the mask requests, how many ask for adaptive length.
      multi_fraction: how many ask for several objects ("all apples", "the apple and the frog").
      question_fraction: how many are yes/no questions, without a mask.
      yes_fraction: of the questions, how many are about a thing that is there.
      adaptive_only: stage 3: only requests for adaptive length, no questions.
      box_fraction: of the mask requests, how many name their targets by boxes, min_boxes to max_boxes of them, a number
        that is uniform where the scene has as many objects.
      box_step: thousandths between the coordinates of boxes.
      unnamed_fraction: of the phrases for one object, how many say "thing" for its name.
    """

    adaptive_fraction: float = 0.5
    multi_fraction: float = 0.2
    question_fraction: float = 0.1
    yes_fraction: float = 0.3
    adaptive_only: bool = False
    box_fraction: float = 0.0
    min_boxes: int = 1
    max_boxes: int = 8
    box_step: int = 10
    unnamed_fraction: float = 0.0

    def __post_init__(self) -> None:
        for name in ("adaptive_fraction", "multi_fraction", "question_fraction", "yes_fraction", "box_fraction",
                     "unnamed_fraction"):  # fmt: skip
            _require_probability(name, getattr(self, name))
        if not 1 <= self.min_boxes <= self.max_boxes:
            raise ValueError(f"min_boxes: expected 1..max_boxes, got {self.min_boxes!r} of {self.max_boxes!r}")
        if self.box_step < 1:
            raise ValueError(f"box_step: expected at least 1, got {self.box_step!r}")
        if self.multi_fraction + self.question_fraction > 1:
            raise ValueError(f"multi_fraction + question_fraction: expected at most 1, got {self!r}")


def _require_probability(field: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{field}: expected 0..1, got {value!r}")


class SceneMasks:
    """Random access to MaskRecords {"key", "image", "mask"}: mostly one object, sometimes a union."""

    def __init__(self, config: ScenesConfig, masks: MaskConfig = MaskConfig()):
        self.scenes = Scenes(config)
        self.config = masks

    def __len__(self) -> int:
        return len(self.scenes)

    def identity(self) -> identity.Identity:
        """What the data are, see identity.py."""
        return self.scenes.identity()

    def __getitem__(self, index: int) -> dict[str, Any]:
        config = self.config
        scene, rng = self.scenes.scene(index)
        count, most = 1, min(config.max_union, len(scene.objects))
        if config.union_probability is None:
            count = int(rng.integers(1, most + 1))
        elif most > 1 and rng.random() < config.union_probability:
            count = int(rng.integers(2, most + 1))
        chosen = rng.permutation(len(scene.objects))[:count]
        mask = scene.union(chosen.tolist())
        return {"key": scene.key, "image": scene.image, "image_name": scene.key, "mask": mask}


class SceneChats:
    """Random access to ChatRecords {"key", "image", "masks", "conversations"}.

    A request for a mask has one mask (the union of its targets), a question has none. Every phrase is true
    and unambiguous in its scene.
    """

    def __init__(self, config: ScenesConfig, chats: ChatConfig = ChatConfig()):
        self.scenes = Scenes(config)
        self.config = chats

    def __len__(self) -> int:
        return len(self.scenes)

    def identity(self) -> identity.Identity:
        """What the data are, see identity.py."""
        return self.scenes.identity()

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.with_scene(index)[1]

    def with_scene(self, index: int) -> tuple[Scene, dict[str, Any]]:
        """The scene of an index, drawn once, and its record."""
        scene, rng = self.scenes.scene(index)
        return scene, self._asked(scene, rng)

    def _asked(self, scene: Scene, rng: np.random.Generator) -> dict[str, Any]:
        """The record of a scene."""
        config = self.config
        kind, adaptive_draw, yes_draw = rng.random(3).tolist()
        if not config.adaptive_only and kind < config.question_fraction:
            phrase, yes = None, yes_draw < config.yes_fraction
            if not yes:
                shown = self.scenes.shown(scene.photo)
                phrase = phrases.refer_absent(scene.objects, self.scenes.names, shown, rng)
            if phrase is None:  # asked for, or everything in the vocabulary may be in sight
                phrase, yes = self._single(scene, rng)[0], True
            return self._record(scene, text.no_target_question(phrase), text.YES if yes else text.NO, [])
        many = None
        if config.box_fraction and rng.random() < config.box_fraction:
            many = self._boxes(scene, rng)
        elif kind >= 1 - config.multi_fraction:
            many = phrases.refer_many(scene.objects, rng)
        phrase, targets = many or self._single(scene, rng)
        adaptive = config.adaptive_only or adaptive_draw < config.adaptive_fraction
        question, answer = text.question(phrase, adaptive=adaptive), text.answer(adaptive=adaptive)
        return self._record(scene, question, answer, [scene.union(targets)])

    def _boxes(self, scene: Scene, rng: np.random.Generator) -> tuple[str, tuple[int, ...]]:
        """The boxes of some objects, and which."""
        most = min(self.config.max_boxes, len(scene.objects))
        count = int(rng.integers(min(self.config.min_boxes, most), most + 1))
        targets = tuple(rng.permutation(len(scene.objects))[:count].tolist())
        found = [scene.objects[i].bbox for i in targets]
        return boxes.format_boxes(found, scene.image.shape[:2], self.config.box_step), targets

    def _single(self, scene: Scene, rng: np.random.Generator) -> tuple[str, tuple[int, ...]]:
        """A phrase for one object; where none can be told apart, for all objects of one name."""
        unnamed = self.config.unnamed_fraction > 0 and rng.random() < self.config.unnamed_fraction
        for i in rng.permutation(len(scene.objects)).tolist():
            phrase = phrases.refer_single(scene.objects, i, rng, unnamed=unnamed)
            if phrase is not None:
                return phrase, (i,)
        name = scene.objects[0].name
        members = tuple(i for i, o in enumerate(scene.objects) if o.name == name)
        return f"all {phrases.plural(name)}", members

    @staticmethod
    def _record(scene: Scene, question: str, answer: str, masks: list) -> dict[str, Any]:
        conversations = [
            {"from": "human", "value": f"{text.IMAGE}\n{question}"},
            {"from": "gpt", "value": answer},
        ]
        record = {"key": scene.key, "image": scene.image, "image_name": scene.key, "masks": masks}
        return record | {"conversations": conversations}
