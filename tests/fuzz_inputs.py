"""Good inputs for the fuzz run, and what damages them; all of it a function of a random generator."""

from collections.abc import Iterator
import copy
import io
import json
import pathlib
from typing import Any
import zlib

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

HEIGHT, WIDTH = 24, 40
MODES = ("RGB", "L", "1", "P", "LA", "RGBA", "CMYK", "I;16", "F")
# Format → the modes it stores.
FORMATS = {
    "JPEG": ("RGB", "L", "CMYK"), "PNG": ("RGB", "L", "1", "P", "LA", "RGBA", "I;16"),
    "TIFF": MODES, "WEBP": ("RGB", "RGBA"), "AVIF": ("RGB", "RGBA"), "JPEG2000": ("RGB", "L", "RGBA", "I;16"),
    "GIF": ("P", "L"), "BMP": ("RGB", "L", "1", "P"), "PPM": ("RGB", "L", "1"), "TGA": ("RGB", "RGBA", "L", "P"),
}  # fmt: skip
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 7, 0.5, -0.0, 1e300, -1e300, float("nan"), float("inf"), 10**30, 2**63, 2**31 - 1,
    "", "x", "0" * 5000, "\ud800", "a\0b", "/", "..", "a.jpg", "none.jpg", "a\nb", [], [[]], {}, {"a": 1}, [None],
    [[0, 0, 9, 9]], [[1, 2, 3, 4, 5, 3.2e8]], [[0, 0, 1, 1, 1, float("nan")]], {"size": [24, 40], "counts": "0"},
    {"size": [], "counts": []}, {"size": [HEIGHT, WIDTH], "counts": [2**62] * 4},
]  # fmt: skip


def box() -> np.ndarray:
    """bool[H, W], the object of all good inputs."""
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[3:19, 5:25] = True
    return mask


def encode(rng: np.random.Generator, name: str, mode: str, is_mask: bool) -> bytes:
    """A good image or mask file."""
    if is_mask:
        grey = box().astype(np.uint8) * np.uint8(rng.choice([1, 255]))
        image = Image.fromarray(np.stack([grey] * 3, -1))
    else:
        noise = rng.integers(0, 60, (HEIGHT, WIDTH, 3), np.uint8)
        image = Image.fromarray(np.where(box()[..., None], noise + np.uint8(150), noise))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * np.uint16(rng.choice([1, 16, 257])))
    elif mode == "F":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.float32) / np.float32(255))
    else:
        image = image.convert(mode)
    options: dict[str, Any] = {}
    if name in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF"):
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = int(rng.integers(1, 9))
        options["exif"][0x010F] = "maker"
    if name == "TIFF":
        options["compression"] = str(rng.choice(["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"]))
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def damage(rng: np.random.Generator, data: bytes) -> bytes:
    """Some bytes changed, left out, put in, repeated or cut off; or a PNG that claims another size."""
    if data[:8] == b"\x89PNG\r\n\x1a\n" and rng.random() < 0.1:
        sides = b"".join(int(rng.choice([0, 1, 24, 9000, 14000, 2**31 - 1])).to_bytes(4, "big") for _ in range(2))
        header = data[12:16] + sides + data[24:29]
        return data[:12] + header + zlib.crc32(header).to_bytes(4, "big") + data[33:]
    found = bytearray(data)
    for _ in range(min(int(rng.geometric(0.6)), 8)):
        if not found:
            break
        at, size = int(rng.integers(len(found))), int(rng.integers(1, 9))
        at = at if rng.random() < 0.7 else at % min(len(found), 200)  # Note: headers are where it hurts.
        match int(rng.integers(6)):
            case 0:
                found[at] ^= 1 << int(rng.integers(8))
            case 1:
                value = int(rng.choice([0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1]))
                found[at : at + 4] = value.to_bytes(4, str(rng.choice(["little", "big"])))
            case 2:
                del found[at : at + size]
            case 3:
                found[at:at] = rng.bytes(size)
            case 4:
                found[at:at] = found[at : at + 16 * size]
            case 5:
                del found[at if rng.random() < 0.2 else max(at, len(found) - 16 * size) :]
    return bytes(found)


def exif_block(rng: np.random.Generator) -> bytes:
    """A directory of tags of any type, count and value, some of them an orientation."""
    order = str(rng.choice(["little", "big"]))
    entries = b""
    count = int(rng.integers(0, 6))
    for _ in range(count):
        tag = int(
            rng.choice([0x0112, 0x0112, 0x8769, 0x8825, 0x010F, 0x011A, 0x927C, 0xA005, int(rng.integers(65536))])
        )
        number = int(rng.choice([0, 1, 1, 2, 5, 2**16, 2**31 - 1, 2**32 - 1]))
        value = int(rng.choice([0, 1, 3, 6, 8, 9, 26, 2**16 - 1, 2**32 - 1]))
        entries += tag.to_bytes(2, order) + int(rng.integers(0, 15)).to_bytes(2, order) + number.to_bytes(4, order)
        entries += value.to_bytes(4, order)
    said = count if rng.random() < 0.7 else int(rng.choice([0, 255, 65535]))
    head = (b"II*\0" if order == "little" else b"MM\0*") + (8).to_bytes(4, order) + said.to_bytes(2, order)
    block = head + entries + rng.bytes(int(rng.integers(0, 20)))
    return damage(rng, block) if rng.random() < 0.3 else block


def twist(rng: np.random.Generator, value: Any) -> Any:
    """A JSON value with none to three of its parts replaced, left out or doubled."""
    value = json.loads(json.dumps(value))
    for _ in range(int(rng.choice([0, 1, 1, 1, 2, 3]))):
        places = list(_places(value))
        if not places:
            return odd(rng)
        parent, key = places[int(rng.integers(len(places)))]
        match int(rng.integers(4)):
            case 0 | 1:
                parent[key] = odd(rng)
            case 2:
                del parent[key]
            case 3 if isinstance(parent, list):
                parent.insert(key, parent[key])
            case _:
                parent[str(odd(rng))[:20] if isinstance(parent, dict) else key] = parent[key]
    return value


def odd(rng: np.random.Generator) -> Any:
    """A value that no reader expects."""
    return copy.deepcopy(ODD[int(rng.integers(len(ODD)))])


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield value, key
        yield from _places(part)


def write_json(rng: np.random.Generator, path: pathlib.Path, value: Any, lines: bool = False) -> None:
    """Writes a twisted value, its text damaged now and then."""
    text = json.dumps(twist(rng, value)).encode()
    text = damage(rng, text) if rng.random() < 0.3 else text
    text = b"[" * 100_000 if rng.random() < 0.003 else text
    path.write_bytes(text + b"\n" if lines else text)


def counts_of(rng: np.random.Generator) -> Any:
    """Run lengths of the box, as text or list, damaged."""
    flat = np.concatenate([[0], box().ravel(order="F").astype(np.int8), [0]])
    edges = np.flatnonzero(np.diff(flat))
    runs: list[Any] = np.diff(np.concatenate([[0], edges, [HEIGHT * WIDTH]])).tolist()
    match int(rng.integers(4)):
        case 0:  # a run split by one of no pixels
            at = int(rng.integers(len(runs)))
            part = int(rng.integers(runs[at] + 1))
            runs[at : at + 1] = [part, 0, runs[at] - part]
            return runs
        case 1:
            for _ in range(int(rng.integers(1, 4))):
                runs[int(rng.integers(len(runs)))] = odd(rng)
            return runs
        case 2:  # any digits
            return "".join(chr(int(c)) for c in rng.integers(40, 120, int(rng.integers(0, 40)))) + str(odd(rng))[:3]
    text = coco_mask.frPyObjects({"size": [HEIGHT, WIDTH], "counts": runs}, HEIGHT, WIDTH)["counts"].decode()
    at = int(rng.integers(len(text) + 1))
    return text[:at] + str(rng.choice(["", "", "0", "P", "é"])) + text[at + int(rng.integers(2)) :]


def polygons_of(rng: np.random.Generator) -> Any:
    """Polygons with coordinates in and around the image, and a value or two that are neither."""
    found: list[Any] = []
    for _ in range(int(rng.integers(1, 4))):
        points = (rng.normal(0.5, 0.4, (int(rng.integers(3, 9)), 2)) * (WIDTH, HEIGHT)).ravel().tolist()
        if rng.random() < 0.2:
            points[int(rng.integers(len(points)))] = odd(rng) if rng.random() < 0.5 else float(10 ** rng.uniform(0, 12))
        found.append(points if rng.random() < 0.9 else points[: int(rng.integers(len(points)))])
    return found if rng.random() < 0.95 else odd(rng)
