"""Image files to arrays: every format, colour mode and depth, checked before and after they are decoded.

In: files. Out: uint8[H, W, 3] RGB as stored, and the EXIF orientation by which a viewer would turn them; or one
RecordError that names the file, whatever the decoder raises. Masks: masks.py. Frames of annotations: reading.py.

Depth: 16-bit (and 32-bit) values are scaled by the smallest of 8, 10, 12, 14 or 16 bits that holds the file's largest
value, floats in 0..1 by 255; other ranges, NaN and infinity are refused.
"""

from collections import Counter
from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import io
import logging
import os
import stat
import threading
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

from alto_jax.data.bad_data import Kind, RecordError, one_line

MIN_SIDE = 8  # pixels; anything smaller shows nothing and is refused
MAX_PIXELS = 2**27  # width times height; reading one of this size takes up to 1.8 GB
# Note: Pillow knows more, some of which start other programs (EPS).
_FORMATS = "AVIF BMP DIB GIF ICO JPEG JPEG2000 MPO PCX PNG PPM QOI SGI TGA TIFF WEBP".split()
_ORIENTATION = 0x0112  # EXIF tag
_BITS = (8, 10, 12, 14, 16)
_BAND = 2**24  # pixels that are converted at a time
_log = logging.getLogger(__name__)
_notes = threading.local()
_noted: Counter[str] = Counter()  # How often each note was made; its first, tenth, hundredth … time is logged.
_lock = threading.Lock()

# Note: set once, for Pillow's own remarks alone (odd metadata). `warnings.catch_warnings` is not safe in threads: two
# that overlap leave every warning of the program off.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL(\.|$)")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@contextlib.contextmanager
def noting() -> Iterator[list[tuple[str, str]]]:
    """Collects (file, what) of the images that this thread reads and that had to be converted."""
    before, _notes.found = getattr(_notes, "found", None), []
    try:
        yield _notes.found
    finally:
        _notes.found = before


def note(path: str | os.PathLike, what: str) -> None:
    """Logs `what` is odd about a file that is used all the same: the first time, and the count at 10, 100, 1000 …"""
    with _lock:
        _noted[what] += 1
        count = _noted[what]
    if count == 1:
        _log.warning("%s: %s (further ones are counted; prepare --check lists all)", os.fspath(path), what)
    elif count == 10 ** (len(str(count)) - 1):
        _log.warning("%s: %s: %d times so far", os.fspath(path), what, count)
    if getattr(_notes, "found", None) is not None:
        _notes.found.append((os.fspath(path), what))


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A decoded file: the pixels as they are stored, the format, and the EXIF orientation (1..8; 1: as stored)."""

    image: Image.Image
    format: str
    orientation: int


def load(path: str | os.PathLike, what: str = "image") -> Loaded:
    """Decodes a file.

    Args:
      path: the file.
      what: it is, for messages: "image", "mask" or "label map".

    Raises:
      RecordError: no such file, no complete image, or one of more than MAX_PIXELS; the message names it.
    """
    name = f"{what} {os.fspath(path)}"
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # Note: to open a pipe would wait for ever.
            raise RecordError(f"{name} cannot be read: no regular file", "unreadable file")
        return _decode(path, path, name, MAX_PIXELS)
    except RecordError:
        raise
    except FileNotFoundError as error:
        missing: Kind = "missing image" if what == "image" else "missing mask"
        raise RecordError(f"{name} does not exist", missing) from error
    except Exception as error:  # such as a path with a null character
        raise _unreadable(path, name, error) from error


def _decode(source: "str | os.PathLike | io.BytesIO", path: str | os.PathLike, name: str, most: int) -> Loaded:
    """A file or its content, of `most` pixels; path and name are for messages. FileNotFoundError or RecordError."""
    try:
        with Image.open(source, formats=_formats()) as image:
            check_pixels(*image.size, name, most)
            before = _orientation(image, path) if image.format == "TIFF" else None
            image.load()
            image_format, orientation = image.format or "", _orientation(image, path)
            if before is not None and before != orientation:  # Pillow turns TIFF files, and them alone.
                return Loaded(_turn_back(image, before), image_format, before)
            return Loaded(image, image_format, orientation)
    except (RecordError, FileNotFoundError):
        raise
    except Image.DecompressionBombError as error:
        raise RecordError(f"{name} is too large: {one_line(error)}", "image too large") from error
    except Exception as error:  # Note: a broken file makes decoders raise nearly anything.
        raise _unreadable(path, name, error) from error


def load_bytes(content: bytes, name: str, what: str = "image", *, max_pixels: int = MAX_PIXELS) -> Loaded:
    """`load` of a file's content; name, what: for messages ("image NAME …")."""
    if not content:
        raise RecordError(f"{what} {name} cannot be read: 0 bytes", "file of 0 bytes")
    return _decode(io.BytesIO(content), name, f"{what} {name}", max_pixels)


def read_bytes(content: bytes, name: str = "given", max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The content of an image file as uint8[H, W, 3], turned upright.

    Args:
      content: of the file.
      name: for messages ("image NAME …").
      max_pixels: width times height accepted; told before anything is decoded.

    Raises:
      RecordError: as `open_image`.
    """
    loaded = load_bytes(content, name, max_pixels=max_pixels)
    return check_size(turn(to_rgb(loaded.image, name), loaded.orientation), name)


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of _FORMATS that this Pillow was built with."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _unreadable(path: str | os.PathLike, name: str, error: Exception) -> RecordError:
    """What a decoder's exception tells of a file that is there."""
    try:
        if os.path.getsize(path) == 0:
            return RecordError(f"{name} cannot be read: a file of 0 bytes", "file of 0 bytes")
    except (OSError, ValueError):  # such as a path with a null character
        pass
    if isinstance(error, UnidentifiedImageError):
        return RecordError(f"{name} cannot be read: no image of a known format", "unreadable file")
    reason = one_line(error.strerror if isinstance(error, OSError) and error.strerror else error)
    # Note: Pillow's own words, in which no path stands.
    cut = isinstance(error, OSError | SyntaxError) and any(w in reason.lower() for w in ("truncated", "broken"))
    reason = reason if isinstance(error, OSError | ValueError | SyntaxError) and reason else f"{error!r:.200}"
    return RecordError(f"{name} cannot be read: {reason}", "truncated file" if cut else "unreadable file")


def _orientation(image: Image.Image, path: str | os.PathLike) -> int:
    """The EXIF orientation; 1 where there is none, or none that makes sense."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # Note: Pillow raises nearly anything on a damaged block, which the pixels do not need.
        note(path, "damaged EXIF, taken as without an orientation")
        return 1
    if isinstance(value, int) and 0 <= value <= 8:
        return max(value, 1)
    note(path, "EXIF orientation of an unknown value, taken as none")
    return 1


def turn(array: np.ndarray, orientation: int) -> np.ndarray:
    """Turns [H, W, ...] upright, as a viewer does with a file of that EXIF orientation (1..8)."""
    if orientation >= 5:
        array = array.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return np.ascontiguousarray(array)


def _turn_back(image: Image.Image, orientation: int) -> Image.Image:
    """Undoes `turn` on an image of any mode, palette and transparency kept."""
    steps = Image.Transpose
    back = {2: steps.FLIP_LEFT_RIGHT, 3: steps.ROTATE_180, 4: steps.FLIP_TOP_BOTTOM, 5: steps.TRANSPOSE,
            6: steps.ROTATE_90, 7: steps.TRANSVERSE, 8: steps.ROTATE_270}  # fmt: skip
    return image.transpose(back[orientation])


def open_image(path: str | os.PathLike, *, upright: bool = False, min_side: int = MIN_SIDE) -> np.ndarray:
    """Reads an image file of any mode.

    Args:
      path: the file.
      upright: turn it as its EXIF orientation says; otherwise the pixels are as stored.
      min_side: smallest width and height accepted, in pixels.

    Returns:
      uint8[H, W, 3] RGB; alpha is dropped, depth is made 8 bits (see the module).

    Raises:
      RecordError: the file is missing, is no complete image, too small or too large, or has values of an unknown
        range; the message names it.
    """
    loaded = load(path)
    image = to_rgb(loaded.image, path)
    if loaded.orientation != 1:
        note(path, f"EXIF orientation, {'turned upright' if upright else 'read as stored'}")
    return check_size(turn(image, loaded.orientation) if upright else image, path, min_side)


def as_array(image: "np.ndarray | Image.Image | str | os.PathLike") -> np.ndarray:
    """A user's own photo as uint8[H, W, 3]: a file or a Pillow image is turned upright; an array is taken as it is.

    Raises:
      ValueError: a file as in `open_image`, or an array of another type or shape.
    """
    if isinstance(image, str | os.PathLike):
        return open_image(image, upright=True)
    if isinstance(image, Image.Image):
        name = str(getattr(image, "filename", "") or "given")
        check_pixels(*image.size, name)
        try:
            image.load()
        except Exception as error:  # Note: as in `load`.
            raise RecordError(f"image {name} cannot be read: {one_line(error)}", "unreadable file") from error
        image = turn(to_rgb(image, name), _orientation(image, name))
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image: expected uint8[H, W, 3], got {image.dtype}{list(image.shape)}")
    return check_size(image, "given")


def open_labels(path: str | os.PathLike) -> np.ndarray:
    """Reads a label map: int32[H, W], the values as stored (palette indices, 8 or 16 bits).

    Raises:
      RecordError: unreadable, or an image with colours instead of labels; the message names the file.
    """
    image = load(path, "label map").image
    if image.mode not in ("1", "L", "P", "I") and not image.mode.startswith("I;16"):
        message = f"label map {os.fspath(path)}: expected one channel or a palette, got mode {image.mode}"
        raise RecordError(message, "colour mode")
    return np.asarray(image).astype(np.int32)


def check_size(array: np.ndarray, name: str | os.PathLike, min_side: int = MIN_SIDE, what: str = "image") -> np.ndarray:
    """Returns `array` [H, W, ...]; raises RecordError naming `name` and the size if a side is too short."""
    height, width = array.shape[:2]
    if min(height, width) < min_side:
        message = f"{what} {os.fspath(name)} is {width}x{height}; sides must be at least {min_side}"
        raise RecordError(message, "image too small")
    return array


def check_pixels(width: int, height: int, name: str, most: int = MAX_PIXELS) -> None:
    """Raises RecordError naming `name` and the size if there are more than `most`."""
    if width * height > most:
        message = f"{name} is {width}x{height}: {width * height} pixels, at most {most} can be read"
        raise RecordError(message, "image too large")


def to_rgb(image: Image.Image, path: str | os.PathLike) -> np.ndarray:
    """Pixels of any mode as uint8[H, W, 3]; RecordError if their range can't be told."""
    mode = image.mode
    if mode == "RGB":
        return rgb_array(image)
    if mode == "F" or mode.startswith("I"):
        values, scale, how = _scaled(np.asarray(image), path)
        note(path, f"colour mode {mode}, {how}, converted to RGB")
        grey = np.empty(values.shape, np.uint8)
        for row, line in zip(grey, values):  # Note: a line at a time, since float64 would take eight times the memory.
            row[:] = line.astype(np.float64) * scale + 0.5
        return np.repeat(grey[..., None], 3, axis=-1)
    if mode != "L":
        note(path, f"colour mode {mode}, converted to RGB")
    try:
        if mode == "PA" or (mode == "P" and "transparency" in image.info):
            image = image.convert("RGBA")
        return rgb_array(image)
    except Exception as error:  # Note: depends on what Pillow was built with.
        message = f"image {os.fspath(path)}: colour mode {mode} cannot be converted to RGB: {one_line(error)}"
        raise RecordError(message, "colour mode") from error


def rgb_array(image: Image.Image) -> np.ndarray:
    """`np.asarray(image.convert("RGB"))`; of large images in bands, which takes a third of the memory."""
    width, height = image.size
    rows = max(_BAND // max(width, 1), 1)
    if rows >= height:
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    found = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, rows):
        found[top : top + rows] = np.asarray(image.crop((0, top, width, min(top + rows, height))).convert("RGB"))
    return found


def _scaled(values: np.ndarray, path: str | os.PathLike) -> tuple[np.ndarray, float, str]:
    """Values of a deep or float image, the factor that brings them to 0..255, and how that was told."""
    low, high = values.min(initial=0), values.max(initial=0)  # Note: both NaN if there is one.
    if values.dtype.kind == "f":
        if not (low >= 0 and high <= 1):
            found = f"image {os.fspath(path)}: float values {low:.4g}..{high:.4g}"
            raise RecordError(f"{found}; expected 0..1, or an image of 8 or 16 bits", "colour mode")
        return values, 255.0, "float values in 0..1"
    bits = next((bits for bits in _BITS if high < 2**bits), None)
    if low < 0 or bits is None:
        found = f"image {os.fspath(path)}: values {low}..{high}"
        raise RecordError(f"{found}; expected 0..65535, or an image of 8 bits", "colour mode")
    return values, 255.0 / (2**bits - 1), f"values of {bits} bits"
