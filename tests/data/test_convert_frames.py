"""Photos with an EXIF orientation: masks lie on their objects, or an error asks on which frame they were drawn."""

import json

import numpy as np
from PIL import Image
import pyarrow
from pyarrow import parquet
import pytest

from alto_jax.config import ConfigError
from alto_jax.data import images
from alto_jax.data.conversations import Conversations
from alto_jax.data.convert import __main__ as command
from alto_jax.data.convert.labelme import read_labelme
from alto_jax.data.convert.pairs import read_pairs
from alto_jax.data.convert.parquet import read_parquet
from alto_jax.data.convert.writing import write
from alto_jax.data.convert.yolo import read_yolo
from alto_jax.inference.shapes import OfFolders
from tests.data.test_images import with_orientation

OBJECT = np.zeros((40, 60), bool)  # as stored
OBJECT[5:20, 10:30] = True


def frame(exif, orientation):
    """The object on the picture that the tool showed."""
    return images.turn(OBJECT, orientation) if exif == "masks_upright" else OBJECT


def write_files(folder, form, drawn_on, orientation):
    """A photo that is white where its object is, and what the tool writes of it."""
    for name in ("images", "other"):
        (folder / name).mkdir(parents=True)
    picture = Image.fromarray(np.repeat(OBJECT[..., None], 3, -1).astype(np.uint8) * 255)
    picture.save(folder / "images" / "a.png", exif=with_orientation(orientation))
    drawn = frame(drawn_on, orientation)
    (y1, x1), (y2, x2) = np.argwhere(drawn).min(0), np.argwhere(drawn).max(0) + 1
    height, width = drawn.shape
    if form == "pairs":
        Image.fromarray(drawn).save(folder / "other" / "a.png")
    elif form == "yolo":
        points = np.array([(x1, y1), (x2, y1), (x2, y2), (x1, y2)]) / (width, height)
        (folder / "other" / "a.txt").write_text("0 " + " ".join(map(str, points.reshape(-1))))
    else:
        shape = {"label": "cat", "points": [[int(x1), int(y1)], [int(x2), int(y2)]], "shape_type": "rectangle"}
        about = {"imagePath": "a.png", "imageHeight": height, "imageWidth": width, "shapes": [shape]}
        (folder / "images" / "a.json").write_text(json.dumps(about))


def convert(folder, form, exif):
    """Writes out/meta.json."""
    if form == "pairs":
        found = read_pairs(folder / "images", folder / "other", "cat", "auto", exif)
    else:
        found = read_yolo(folder / "other", folder / "images", ["cat"]) if form == "yolo" else read_labelme(folder)
    write(found, folder / "out", adaptive=0.5, max_bad_fraction=0, exif=exif)
    return folder / "out" / "meta.json"


@pytest.mark.parametrize("orientation", [3, 6])
@pytest.mark.parametrize("drawn_on", ["stored", "masks_upright"])
@pytest.mark.parametrize("form", ["labelme", "yolo", "pairs"])
def test_masks_lie_on_their_objects(form, drawn_on, orientation, tmp_path):
    write_files(tmp_path / "a", form, drawn_on, orientation)
    meta = convert(tmp_path / "a", form, drawn_on)
    assert json.loads(meta.read_text())["out"]["exif"] == drawn_on
    (record,) = Conversations(meta)
    found, shown = record["masks"][0] > 127, record["image"][..., 0] > 127
    np.testing.assert_array_equal(shown, frame(drawn_on, orientation))
    assert (found & shown).sum() / (found | shown).sum() > 0.9

    if orientation == 6 and form != "yolo":  # The size says which frame it is.
        other = tmp_path / "other"
        write_files(other, form, drawn_on, orientation)
        if drawn_on == "stored":
            np.testing.assert_array_equal(Conversations(convert(other, form, None))[0]["masks"][0] > 127, found)
        else:
            with pytest.raises(ConfigError, match="a.png has the EXIF orientation 6, see --exif=masks_upright"):
                convert(other, form, None)
    else:
        write_files(tmp_path / "unknown", form, drawn_on, orientation)
        with pytest.raises(ConfigError, match=f"a.png has the EXIF orientation {orientation}: .*--exif=stored"):
            convert(tmp_path / "unknown", form, None)


def test_mask_files_that_have_an_orientation_themselves(tmp_path):
    write_files(tmp_path / "a", "pairs", "stored", 3)
    Image.fromarray(OBJECT).save(tmp_path / "a" / "other" / "a.png", exif=with_orientation(3))
    record = Conversations(convert(tmp_path / "a", "pairs", "masks_upright"))[0]
    np.testing.assert_array_equal(record["masks"][0] > 127, record["image"][..., 0] > 127)
    write_files(tmp_path / "b", "pairs", "stored", 1)
    Image.fromarray(OBJECT).save(tmp_path / "b" / "other" / "a.png", exif=with_orientation(3))
    with pytest.raises(ConfigError, match="mask .*a.png has the EXIF orientation 3: .*--exif=masks_upright"):
        convert(tmp_path / "b", "pairs", None)


def test_the_command_takes_the_frame(tmp_path, monkeypatch, refused):
    write_files(tmp_path / "a", "pairs", "masks_upright", 3)
    given = ["pairs", "--label", "cat", "--images", tmp_path / "a/images", "--masks", tmp_path / "a/other"]
    given += ["--out", tmp_path / "out"]
    assert "--exif=masks_upright" in refused(command.main, *given)
    monkeypatch.setattr("sys.argv", ["convert", *map(str, given), "--exif", "masks_upright"])
    assert command.main() == 0
    (record,) = Conversations(tmp_path / "out/meta.json")
    np.testing.assert_array_equal(record["masks"][0] > 127, record["image"][..., 0] > 127)


def test_tables_that_hold_photos(tmp_path):
    write_files(tmp_path / "a", "pairs", "masks_upright", 3)
    read = lambda path: {"bytes": path.read_bytes(), "path": path.name}
    row = {"image": read(tmp_path / "a/images/a.png"), "mask": read(tmp_path / "a/other/a.png")}
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    found = lambda exif: read_parquet(tmp_path / "a.parquet", label="cat", exif=exif)
    with pytest.raises(ConfigError, match="a.png has the EXIF orientation 3: .*--exif=stored"):
        write(found(None), tmp_path / "out", adaptive=0.5, max_bad_fraction=0)
    write(found("masks_upright"), tmp_path / "out", adaptive=0.5, max_bad_fraction=0, exif="masks_upright")
    (record,) = Conversations(tmp_path / "out/meta.json")
    np.testing.assert_array_equal(record["masks"][0] > 127, record["image"][..., 0] > 127)


def test_what_the_tokenizer_is_checked_on(tmp_path):
    write_files(tmp_path / "a", "pairs", "masks_upright", 3)
    source = lambda exif: OfFolders(str(tmp_path / "a" / "images"), str(tmp_path / "a" / "other"), "auto", 5, exif)
    record = source("masks_upright")[0]
    np.testing.assert_array_equal(record["mask"] > 0, record["image"][..., 0] > 127)
    with pytest.raises(ValueError, match="EXIF orientation 3"):
        source(None)[0]
