"""Mask files to masks, by an explicit rule.

In: a file, and the rule that says which of its stored values are foreground. Out: uint8[H, W] in {0, 255}.

Rules ("auto" is the default of every reader):
  auto           takes what can be read in one way only, see below; anything else is an error that names the rules
  nonzero        everything but 0 (palettes: index 0; colours: black)
  >N             lightness above N, such as ">127"; also of palettes and colour images if they are grey
  equals:A,B,…   these values (palettes: indices)
  ignore:A,B,…   everything but 0 and these, such as "ignore:255"
  colour:RRGGBB,…  these colours (hexadecimal)
  alpha          what is not transparent (alpha above half)

"auto" takes: 1-bit images; two values of which one is 0 ({0, 255}, {0, 1}, {0, 7}, 16 bits, floats), black and one
colour, two palette entries of which index 0 is the darker one; grey masks with soft edges, and JPEG files that are
nearly black and white (both: above half). Not: {0, 1, 255}, several labels, a palette whose index 0 is light or whose
index 255 is not white (VOC's void), several colours, transparency that says something else than the colours.
"""

from collections.abc import Sequence
import dataclasses
import functools
import os
import re

import numpy as np

from alto_jax.config import ConfigError
from alto_jax.data import images
from alto_jax.data.bad_data import RecordError, one_line

AUTO = "auto"
RULES = "auto, nonzero, >N, equals:A,B, ignore:A,B, colour:RRGGBB or alpha"
_FLAT = 0.6  # Soft edges: at most this share of the values between equals a neighbour (labels: nearly all do).
_BETWEEN = 0.1  # JPEG: at most this share of the pixels is neither dark nor light.
_PART = 2**22  # Pixels that are counted at a time.
_CHROMA = 32  # JPEG: largest difference of the channels of a grey pixel.


@dataclasses.dataclass(frozen=True)
class Rule:
    """A parsed rule: its name and what follows it."""

    name: str
    values: tuple[float, ...] = ()


def parse_rule(text: str, field: str = "mask_rule") -> Rule:
    """A rule from its text (see the module); ConfigError names `field` and the text."""
    number, code = r"\d+(\.\d+)?", r"[0-9a-fA-F]{6}"
    form = rf"auto|nonzero|alpha|>{number}|(equals|ignore):{number}(,{number})*|colou?r:{code}(,{code})*"
    if not isinstance(text, str) or not re.fullmatch(form, text):
        raise ConfigError(f"{field}: expected {RULES}, got {text!r}")
    name, _, rest = (
        text.partition(":") if ":" in text else (text[:1], "", text[1:]) if text[0] == ">" else (text, "", "")
    )
    if name in ("colour", "color"):
        return Rule("colour", tuple(float(int(value, 16)) for value in rest.split(",")))
    return Rule(name, tuple(float(value) for value in rest.split(",") if value))


@dataclasses.dataclass(frozen=True)
class _Pixels:
    """What a mask file stores.

    values: [H, W] grey values or palette indices; None in a colour image. grey: [H, W] lightness; None where something
    has a colour. rgb: uint8[H, W, 3]; None if values are grey. alpha: bool[H, W]; None: opaque. top: largest value of
    the type. lossy: stored as JPEG. palette: uint8[256, 3] or None.
    """

    values: np.ndarray | None
    grey: np.ndarray | None
    rgb: np.ndarray | None
    alpha: np.ndarray | None
    top: float
    lossy: bool
    palette: np.ndarray | None = None

    @functools.cached_property
    def colours(self) -> np.ndarray | None:
        """int32[H, W] as 0xRRGGBB; None for values of more than 8 bits."""
        if self.palette is not None:
            return _codes(self.palette)[self.stored]
        if self.rgb is not None:
            return _codes(self.rgb)
        return self.stored.astype(np.int32) * 0x010101 if self.top == 255 else None

    @property
    def stored(self) -> np.ndarray:
        """The values, or the colours where there are none."""
        found = self.colours if self.values is None else self.values
        assert found is not None  # A file without values has colours.
        return found


def open_mask(path: str | os.PathLike, rule: str = AUTO, *, min_side: int = images.MIN_SIDE) -> np.ndarray:
    """Reads a mask file as it is stored (its own EXIF orientation is not applied).

    Args:
      path: the file.
      rule: what is foreground, see the module.
      min_side: smallest width and height accepted, in pixels.

    Returns:
      uint8[H, W] in {0, 255}.

    Raises:
      RecordError: unreadable, too small, empty, or of a form that the rule does not fit; the message names the file.
    """
    return mask_of(images.load(path, "mask"), path, rule, min_side=min_side)


def mask_of(
    loaded: images.Loaded,
    path: str | os.PathLike,
    rule: str = AUTO,
    *,
    min_side: int = images.MIN_SIDE,
) -> np.ndarray:
    """`open_mask` of a decoded file."""
    name, parsed = os.fspath(path), parse_rule(rule)
    pixels = _pixels(loaded, name)
    mask = _auto(pixels, loaded.image.mode, name) if parsed.name == AUTO else _explicit(pixels, parsed, rule, name)
    images.check_size(mask, name, min_side, "mask")
    if not mask.any():
        by = "" if parsed.name == AUTO else f" by the rule {rule!r}: it holds {_summary(pixels)}"
        raise RecordError(f"mask {name} is empty: no pixel is set{by}", "empty mask")
    return mask.astype(np.uint8) * np.uint8(255)


def _pixels(loaded: images.Loaded, name: str) -> _Pixels:
    image, lossy = loaded.image, loaded.format in ("JPEG", "MPO")
    alpha = None
    try:
        if image.mode[-1] in "Aa" or "transparency" in image.info:
            with_alpha = image if image.mode[-1] in "Aa" else image.convert("RGBA")
            alpha = np.asarray(with_alpha.getchannel(len(with_alpha.getbands()) - 1)) > 127
            alpha = None if alpha.all() else alpha
        if image.mode == "1":
            values = np.asarray(image).astype(np.uint8) * np.uint8(255)
            return _Pixels(values, values, None, alpha, 255, False)
        if image.mode in ("L", "LA", "La", "F") or image.mode.startswith("I"):
            values = np.asarray(image if image.mode[0] in "IF" else image.getchannel(0))
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                raise RecordError(f"mask {name}: a value is NaN or infinite", "colour mode")
            high = values.max(initial=0)
            top = 1 if values.dtype.kind == "f" and high <= 1 else 255 if high <= 255 else 65535
            return _Pixels(values, values, None, alpha, top, lossy)
        if image.mode in ("P", "PA"):
            values = np.asarray(image if image.mode == "P" else image.getchannel(0))
            entries = np.array(image.getpalette("RGB") or [], np.uint8).reshape(-1, 3)[:256]
            palette = np.zeros((256, 3), np.uint8)
            palette[: len(entries)] = entries
            used = palette[np.array(_distinct(values, 256), int)]
            grey = palette[:, 1][values] if _spread(used) == 0 else None
            return _Pixels(values, grey, None, alpha, 255, lossy, palette)
        rgb = images.rgb_array(image)
    except RecordError:
        raise
    except Exception as error:  # Note: depends on what Pillow was built with.
        message = f"mask {name}: colour mode {image.mode} cannot be read: {one_line(error)}"
        raise RecordError(message, "colour mode") from error
    grey = rgb[..., 1] if _spread(rgb) <= (_CHROMA if lossy else 0) else None
    return _Pixels(grey, grey, rgb, alpha, 255, lossy)


def _codes(rgb: np.ndarray) -> np.ndarray:
    """uint8[..., 3] as int32[...] 0xRRGGBB."""
    found = rgb[..., 0].astype(np.int32)  # Note: in place, for the sake of large files.
    for channel in (1, 2):
        found <<= 8
        found |= rgb[..., channel]
    return found


def _among(values: np.ndarray, wanted: Sequence[float]) -> np.ndarray:
    """bool[H, W], where a value is one of those wanted (as the file's type has them)."""
    found = np.zeros(values.shape, bool)
    for value in wanted:
        if values.dtype.kind == "f":
            found |= values == values.dtype.type(value)
        elif value == int(value) and value <= np.iinfo(values.dtype).max:
            found |= values == int(value)
    return found


def _spread(rgb: np.ndarray) -> int:
    """The largest difference between the channels of a pixel."""
    red, green, blue = (rgb[..., channel] for channel in range(3))
    pairs = ((red, green), (blue, green))
    return max(int((np.maximum(a, b) - np.minimum(a, b)).max(initial=0)) for a, b in pairs)


def _explicit(pixels: _Pixels, rule: Rule, text: str, name: str) -> np.ndarray:
    """bool[H, W] by a rule; RecordError where the file has nothing that it speaks of."""

    def need(found: np.ndarray | None, what: str) -> np.ndarray:
        if found is None:
            message = f"mask {name}: the rule {text!r} needs {what}, but it holds {_summary(pixels)}"
            raise RecordError(message, "ambiguous mask")
        return found

    if rule.name == "alpha":
        return need(pixels.alpha, "transparency")
    if rule.name == "colour":
        return _among(need(pixels.colours, "colours of 8 bits"), rule.values)
    if rule.name == ">":
        return need(pixels.grey, "grey values") > rule.values[0]
    if rule.name == "nonzero" and pixels.values is None:
        return need(pixels.colours, "values") != 0
    values = need(pixels.values, "one value a pixel")
    named = _among(values, rule.values)
    return named if rule.name == "equals" else (values != 0) & ~named


def _auto(pixels: _Pixels, mode: str, name: str) -> np.ndarray:
    """bool[H, W] of a mask that can be read in one way only."""
    if pixels.alpha is not None:
        opaque = dataclasses.replace(pixels, alpha=None)
        try:
            if np.array_equal(mask := _auto(opaque, mode, name), pixels.alpha):
                return mask
        except RecordError:
            pass
        raise _ambiguous(opaque, name, f"mode {mode} with transparency", ("alpha", "nonzero"))
    if pixels.palette is not None:
        used = [int(value) for value in _distinct(pixels.stored)]
        if len(used) == 1 or (len(used) == 2 and used[0] == 0):
            light, dark = (int(pixels.palette[index].astype(int).sum()) for index in (used[-1], 0))
            void = used[-1] == 255 and pixels.palette[255].min() < 255
            if not void and (light > dark or (used == [0] and light < 128 * 3)):
                return pixels.stored != 0
            why = "index 255 is not white (void?)" if void else "the colour of index 0 is the lighter one"
            raise _ambiguous(pixels, name, why)
    if pixels.grey is not None:
        grey, value = pixels.grey, _first(pixels.grey)
        is_noise = pixels.lossy and value < pixels.top / 2
        if value >= 0 and not is_noise and ((grey == 0) | (grey == value)).all():
            return grey != 0
        if _soft(grey, pixels.top, pixels.lossy):
            return grey > pixels.top / 2
    elif pixels.palette is None:
        black = np.asarray(pixels.stored == 0)
        if black.any() and (black | (pixels.stored == _first(pixels.stored))).all():
            return ~black
    raise _ambiguous(pixels, name)


def _ambiguous(pixels: _Pixels, name: str, why: str = "", rules: Sequence[str] = ()) -> RecordError:
    choice = ", ".join(f"'{rule}'" for rule in rules or _advice(pixels))
    form = f"{_summary(pixels)}{', ' if why else ''}{why}"
    message = f"mask {name} can be read in several ways: {form}; choose a mask_rule: {choice} (see docs/data.md)"
    return RecordError(message, "ambiguous mask")


def _first(values: np.ndarray) -> float:
    """The first value that is not 0; 0 if there is none."""
    flat = values.ravel()
    return float(flat[np.argmax(flat != 0)])


def _soft(grey: np.ndarray, top: float, lossy: bool) -> bool:
    """Whether values between black and white can only be soft edges (or, in JPEG files, noise)."""
    if lossy:
        return float(np.mean((grey > top / 4) & (grey < top * 3 / 4))) <= _BETWEEN
    between = (grey > 0) & (grey < top)
    if grey.min() != 0 or grey.max() < top * 3 / 4 or not between.any():
        return False
    same = np.zeros_like(between)
    across, down = grey[:, 1:] == grey[:, :-1], grey[1:] == grey[:-1]
    same[:, 1:] |= across
    same[:, :-1] |= across
    same[1:] |= down
    same[:-1] |= down
    return float(np.mean(same[between])) <= _FLAT


def _distinct(values: np.ndarray, most: int = 7) -> list[int | float]:
    """The smallest distinct values, sorted, at most so many; of large files of more than 8 bits, those of a sample."""
    flat = values.ravel()
    if values.dtype == np.uint8:
        parts = (flat[at : at + _PART] for at in range(0, flat.size, _PART))  # Note: bincount takes 8 bytes a pixel.
        return np.flatnonzero(sum(np.bincount(part, minlength=256) for part in parts))[:most].tolist()
    return np.unique(flat[:: flat.size // _PART + 1])[:most].tolist()


def _summary(pixels: _Pixels) -> str:
    """Such as "values 0, 1, 255" or "colours 000000, 0000ff"."""
    found = _distinct(pixels.stored)
    kind = "colours" if pixels.values is None else "palette indices" if pixels.palette is not None else "values"
    shown = [f"{int(value):06x}" if pixels.values is None else f"{value:g}" for value in found[:6]]
    return f"{kind} {', '.join(shown)}{', …' if len(found) > 6 else ''}"


def _advice(pixels: _Pixels) -> Sequence[str]:
    """Rules that fit a form."""
    if pixels.values is None:  # the colour of most pixels that are not black
        some = pixels.stored.ravel()[:: pixels.stored.size // _PART + 1]
        colours, counts = np.unique(some[some != 0], return_counts=True)
        if not len(colours):
            return ("nonzero",)
        return (f"colour:{int(colours[np.argmax(counts)]):06x}", "nonzero")
    found = _distinct(pixels.stored)
    if pixels.stored.dtype.kind == "f":
        return (f">{pixels.top / 2:g}", "nonzero")
    label = next((value for value in found if value), 1)
    if pixels.palette is not None:
        is_dark = len(found) == 2 and found[0] == 0 and found[1] != 255
        return (f"equals:{0 if is_dark else label:g}", "ignore:255", "nonzero")
    return (f"equals:{label:g}", "ignore:255", f">{pixels.top // 2:g}", "nonzero")
