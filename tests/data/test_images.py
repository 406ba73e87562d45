"""Image files of every format, mode, depth and orientation become uint8 RGB, or one error that names the file."""

import io
import pickle
import struct
import threading
import warnings

import numpy as np
import PIL
from PIL import Image, features
import pytest

from alto_jax.data import bad_data, images

ORIENTATION = 0x0112
LOSSLESS = {"png": {}, "tiff": {}, "webp": {"lossless": True}}


def picture(height: int = 20, width: int = 30) -> np.ndarray:
    """No two corners alike, so that all eight orientations differ."""
    image = np.zeros((height, width, 3), np.uint8)
    image[:, : width // 2] = (255, 0, 0)
    image[:, width // 2 :] = (0, 0, 255)
    image[: height // 2, : width // 4] = (0, 255, 0)
    return image


def with_orientation(value) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = value
    return exif


def as_viewed(image: np.ndarray, orientation: int) -> np.ndarray:
    """EXIF's own definition: where row 0 and column 0 of the stored pixels are when the picture is looked at."""
    turned = {1: image, 2: image[:, ::-1], 3: np.rot90(image, 2), 4: image[::-1], 5: image.swapaxes(0, 1),
              6: np.rot90(image, -1), 7: np.rot90(image.swapaxes(0, 1), 2), 8: np.rot90(image, 1)}  # fmt: skip
    return turned[orientation]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "PA", "CMYK", "YCbCr", "L", "LA", "1", "HSV"])
def test_every_mode_becomes_rgb(mode, tmp_path):
    kinds = {"CMYK": "a.tiff", "YCbCr": "a.tiff", "PA": "a.tiff", "HSV": None}
    stored = Image.fromarray(picture()).convert(mode)
    expected = np.asarray(stored.convert("RGB"))
    if kinds.get(mode, "") is None:
        np.testing.assert_array_equal(images.to_rgb(stored, "x"), expected)
        return
    path = tmp_path / kinds.get(mode, "a.png")
    stored.convert("LA" if mode == "PA" else mode).save(path)
    if mode == "YCbCr" and int(PIL.__version__.split(".")[0]) < 13:
        pytest.skip("Pillow before 13 does not read the YCbCr TIFF that it writes")
    image = images.open_image(path)
    assert image.shape == (20, 30, 3) and image.dtype == np.uint8
    np.testing.assert_array_equal(image, np.asarray(stored.convert("LA").convert("RGB")) if mode == "PA" else expected)


def test_transparent_palettes_keep_their_colours(tmp_path):
    stored = Image.fromarray(picture()).quantize(8)
    for number, transparency in enumerate((0, bytes(range(0, 64, 8)))):
        stored.save(tmp_path / f"{number}.png", transparency=transparency)
        np.testing.assert_array_equal(images.open_image(tmp_path / f"{number}.png"), np.asarray(stored.convert("RGB")))


@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize(("bits", "order"), [(8, "<"), (10, "<"), (12, "<"), (14, "<"), (16, "<"), (12, ">")])
def test_deep_values_are_scaled_by_their_range(bits, order, suffix, tmp_path):
    if order == ">" and suffix == "png":
        pytest.skip("PNG has one byte order")
    values = np.linspace(0, 2**bits - 1, 400).reshape(20, 20).astype(np.uint16)
    file = tmp_path / f"a.{suffix}"
    image = Image.fromarray(values)
    if order == ">":
        image = Image.frombytes("I;16B", (20, 20), values.astype(">u2").tobytes())
    image.save(file)
    image = images.open_image(file)
    assert np.abs(image[..., 0] - values * (255.0 / (2**bits - 1))).max() <= 0.5 + 1e-6
    assert abs(float(image.mean()) - 127.5) < 1 and (image == image[..., :1]).all()


def test_float_values_in_0_to_1_are_scaled_and_others_refused(tmp_path):
    values = np.linspace(0, 1, 400, dtype=np.float32).reshape(20, 20)
    Image.fromarray(values).save(tmp_path / "a.tiff")
    assert np.abs(images.open_image(tmp_path / "a.tiff")[..., 0] - values * 255).max() <= 0.5 + 1e-4
    for number, wrong in enumerate((values * 255, values - 0.5, np.where(values > 0.5, np.nan, values), values * 1e30)):
        Image.fromarray(wrong.astype(np.float32)).save(tmp_path / f"{number}.tiff")
        with pytest.raises(bad_data.RecordError, match=rf"{number}.tiff: float values .*expected 0..1") as caught:
            images.open_image(tmp_path / f"{number}.tiff")
        assert caught.value.kind == "colour mode"
    Image.fromarray(np.full((20, 20), 70000, np.int32)).save(tmp_path / "deep.tiff")
    Image.fromarray(np.full((20, 20), -3, np.int32)).save(tmp_path / "below.tiff")
    for name, value in (("deep", 70000), ("below", -3)):
        with pytest.raises(bad_data.RecordError, match=rf"{name}.tiff: values .*{value}.*expected 0..65535"):
            images.open_image(tmp_path / f"{name}.tiff")


@pytest.mark.parametrize("suffix", LOSSLESS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_orientations_stored_and_upright(suffix, orientation, tmp_path):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(picture()).save(path, exif=with_orientation(orientation), **LOSSLESS[suffix])
    np.testing.assert_array_equal(images.open_image(path), picture())
    upright = as_viewed(picture(), orientation)
    np.testing.assert_array_equal(images.open_image(path, upright=True), upright)
    np.testing.assert_array_equal(images.as_array(path), upright)
    np.testing.assert_array_equal(images.as_array(Image.open(path)), upright)
    np.testing.assert_array_equal(images.as_array(picture()), picture())
    np.testing.assert_array_equal(images.turn(picture(), orientation), upright)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["JPEG", "AVIF"])
def test_all_orientations_of_lossy_files(image_format, orientation, tmp_path):
    if image_format == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    path, big = tmp_path / "a.img", np.kron(picture(), np.ones((8, 8, 1), np.uint8))
    Image.fromarray(big).save(path, image_format, exif=with_orientation(orientation), quality=95)
    for image, wanted in ((images.open_image(path), big),
                          (images.open_image(path, upright=True), as_viewed(big, orientation))):  # fmt: skip
        assert image.shape == wanted.shape and np.abs(image.astype(int) - wanted).mean() < 10


def with_exif(data: bytes, entries: list[bytes]) -> bytes:
    """A JPEG with an EXIF block of these directory entries (12 bytes each), valid or not."""
    block = b"Exif\0\0II*\0\x08\0\0\0" + len(entries).to_bytes(2, "little") + b"".join(entries) + bytes(4)
    return data[:2] + b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block + data[2:]


def test_exif_that_makes_no_sense_is_no_error(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(picture()).save(buffer, "JPEG")
    plain = images.open_image(save(tmp_path / "plain.jpg", buffer.getvalue()))
    right = b"\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"  # orientation 6
    blocks = {
        "type.jpg": [right, b"\x1b\x01\x02\0\x03\0\0\x0072\0\0"],  # a resolution that is a text
        "nine.jpg": [right[:8] + b"\x09\0\0\0"],
        "nought.jpg": [right[:8] + bytes(4)],
        "text.jpg": [right[:2] + b"\x02\0\x02\0\0\x006\0\0\0"],
        "float.jpg": [right[:2] + b"\x0b\0\x01\0\0\0\0\0\xc0\x7f"],  # not a number
        "long.jpg": [right[:4] + b"\xff\xff\xff\x7f" + b"\xff" * 4],
        "short.jpg": [right[:7]],
    }
    for name, entries in blocks.items():
        save(tmp_path / name, with_exif(buffer.getvalue(), entries))
    for name in (name.removesuffix(".jpg") for name in blocks if name != "type.jpg"):
        for upright in (False, True):
            np.testing.assert_array_equal(images.open_image(tmp_path / f"{name}.jpg", upright=upright), plain)
    np.testing.assert_array_equal(images.open_image(tmp_path / "type.jpg"), plain)
    np.testing.assert_array_equal(images.open_image(tmp_path / "type.jpg", upright=True), np.rot90(plain, -1))


def save(path, content: bytes):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "error",
    [TypeError("x"), RuntimeError("x\ny"), MemoryError(), OverflowError("x"), SyntaxError("x"), KeyError("x"),
     IndexError("x"), ZeroDivisionError(), RecursionError(), AssertionError(), Image.DecompressionBombError("x"),
     struct.error("x"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x"), NotImplementedError()],
)  # fmt: skip
def test_whatever_a_decoder_raises_names_the_file(error, tmp_path, monkeypatch):
    Image.fromarray(picture()).save(tmp_path / "a.png")

    def fail(self):
        raise error

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    with pytest.raises(bad_data.RecordError, match="a.png") as caught:
        images.open_image(tmp_path / "a.png")
    assert "\n" not in str(caught.value) and caught.value.kind in ("unreadable file", "image too large")


def test_bad_files_are_named_with_their_kind(tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "void.jpg").write_bytes(b"")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 300, 3), np.uint8)).save(tmp_path / "whole.jpg")
    cut = (tmp_path / "whole.jpg").read_bytes()[:9000]
    (tmp_path / "cut.jpg").write_bytes(cut)
    # What a path says decides nothing.
    for name in ("truncated mask field.jpg", "counts does not decode.jpg", "broken.jpg"):
        (tmp_path / name).write_text("no image")
    (tmp_path / "folder.jpg").mkdir()
    Image.fromarray(picture(1, 1)).save(tmp_path / "dot.png")
    Image.fromarray(picture(1, 40)).save(tmp_path / "line.png")
    expected = {
        "absent.jpg": ("does not exist", "missing image"),
        "text.jpg": ("cannot be read: no image of a known format", "unreadable file"),
        "truncated mask field.jpg": ("cannot be read", "unreadable file"),
        "counts does not decode.jpg": ("cannot be read", "unreadable file"),
        "broken.jpg": ("cannot be read", "unreadable file"),
        "void.jpg": ("a file of 0 bytes", "file of 0 bytes"),
        "cut.jpg": ("cannot be read: .*truncated", "truncated file"),
        "folder.jpg": ("no regular file", "unreadable file"),
        "dot.png": ("is 1x1; sides must be at least 8", "image too small"),
        "line.png": ("is 40x1", "image too small"),
        "a\0b.jpg": ("cannot be read", "unreadable file"),
    }
    for name, (message, kind) in expected.items():
        with pytest.raises(bad_data.RecordError, match=f"{name}.*{message}") as caught:
            images.open_image(f"{tmp_path}/{name}")
        assert caught.value.kind == kind == bad_data.kind_of(bad_data.at("line 3", caught.value))


def test_images_of_too_many_pixels_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 20 * 30)
    images.open_image(tmp_path / "a.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 20 * 30 - 1)
    with pytest.raises(bad_data.RecordError, match="a.png is 30x20: 600 pixels, at most 599 can be read"):
        images.open_image(tmp_path / "a.png")
    monkeypatch.undo()
    png = (tmp_path / "a.png").read_bytes()
    save(tmp_path / "bomb.png", png[:16] + (2**31 - 1).to_bytes(4, "big") * 2 + png[24:])
    with pytest.raises(bad_data.RecordError, match="bomb.png"):
        images.open_image(tmp_path / "bomb.png")


def test_a_file_of_another_format_does_not_start_a_program(tmp_path):
    (tmp_path / "a.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 30 20\n%%EndComments\n")
    with pytest.raises(bad_data.RecordError, match="no image of a known format"):
        images.open_image(tmp_path / "a.jpg")


def test_warnings_of_others_survive_reading_in_threads(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    threads = [threading.Thread(target=images.open_image, args=(tmp_path / "a.png",)) for _ in range(16)]
    before = list(warnings.filters)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before
    with pytest.warns(UserWarning, match="still here"):
        warnings.warn("still here", stacklevel=1)
    with pytest.warns(RuntimeWarning, match="still here"):
        warnings.warn("still here", RuntimeWarning, stacklevel=1)


def test_notes_are_logged_once_and_counted(tmp_path, caplog):
    images._noted.clear()
    Image.fromarray(picture()).save(tmp_path / "a.jpg", exif=with_orientation(6))
    with images.noting() as notes:
        for _ in range(11):
            images.open_image(tmp_path / "a.jpg")
    assert len(notes) == 11 and set(notes) == {(str(tmp_path / "a.jpg"), "EXIF orientation, read as stored")}
    assert len(caplog.messages) == 2 and "10 times so far" in caplog.messages[1]


def test_an_error_keeps_its_kind_on_its_way(tmp_path):
    inner = bad_data.RecordError("mask m.png is empty", "empty mask")
    assert bad_data.kind_of(bad_data.at("file line 3", inner)) == "empty mask"
    try:
        raise ValueError("outer") from inner
    except ValueError as outer:
        assert bad_data.kind_of(outer) == "empty mask"
    again = pickle.loads(pickle.dumps(inner))  # reading may happen in other processes
    assert again.kind == "empty mask" and str(again) == str(inner)
    assert bad_data.kind_of(ValueError("cannot be read: truncated")) == "malformed entry"
    assert bad_data.kind_of(OSError("x")) == "unreadable file"
    assert bad_data.one_line("a\ud800\nb\x1b[0m\0") == "a\\ud800 b\\x1b[0m\\x00"
    for text in ("[" * 100_000, "{", b"\xff\xfe\x00", "1" * 5000):
        with pytest.raises(bad_data.RecordError, match="^here is no JSON: ") as caught:
            bad_data.parse_json(text, "here")
        assert caught.value.kind == "malformed JSON"


def test_other_images_than_files_are_checked():
    for wrong in (np.zeros((20, 20), np.uint8), np.zeros((20, 20, 3), np.float32), np.zeros((20, 20, 4), np.uint8)):
        with pytest.raises(ValueError, match="image: expected uint8"):
            images.as_array(wrong)
    assert images.as_array(Image.new("L", (9, 8))).shape == (8, 9, 3)
