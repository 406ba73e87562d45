"""Hugging Face's tables become records with the same masks, in every form that their columns have."""

import io
import json
import re
import sys

import numpy as np
from PIL import Image
import pyarrow as pa
from pyarrow import parquet
import pytest

from alto_jax.config import ConfigError
from alto_jax.data import rle
from alto_jax.data.conversations import Conversations
from alto_jax.data.convert import __main__ as command
from alto_jax.data.convert.parquet import read_parquet
from alto_jax.data.convert.writing import write

HEIGHT, WIDTH = 40, 60
CAT, DOG = (slice(5, 20), slice(10, 30)), (slice(25, 35), slice(40, 55))  # rows, columns


def mask(*boxes):
    drawn = np.zeros((HEIGHT, WIDTH), bool)
    for rows, columns in boxes:
        drawn[rows, columns] = True
    return drawn


def polygon(box):
    (rows, columns) = box
    return [columns.start, rows.start, columns.stop, rows.start, columns.stop, rows.stop, columns.start, rows.stop]


def png(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def picture(seed, path=None):
    """A cell of the feature `Image`."""
    pixels = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    return {"bytes": png(pixels), "path": path}


def mask_file(*boxes):
    return {"bytes": png(mask(*boxes).astype(np.uint8) * 255), "path": None}


def save(folder, columns, features=None):
    table = pa.table(columns)
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    (folder / "table").mkdir(exist_ok=True)
    parquet.write_table(table, folder / "table" / "train-00000-of-00001.parquet")
    return folder / "table"


def convert(table, out, bad=0.0, **options):
    """{(image's name, phrase): mask} of a table's records, and what was left out."""
    found = read_parquet(table, **options)
    count, left_out = write(found, out, adaptive=0.5, max_bad_fraction=bad)
    source, records = Conversations(out / "meta.json"), {}
    for index in range(len(source)):
        record = source[index]
        phrase = re.search("<ref>(.*)</ref>", record["conversations"][0]["value"])[1]
        records[record["image_name"], phrase] = record["masks"][0] > 127
        assert record["image"].shape == (HEIGHT, WIDTH, 3)
    assert len(records) == count
    return records, left_out


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for key, drawn in found.items():
        # Polygons are filled by COCO's rule: an edge of one pixel may differ.
        assert (drawn & wanted[key]).sum() / (drawn | wanted[key]).sum() > 0.9, key


CELLS = {
    "files": mask_file,
    "run lengths": lambda box: rle.encode(mask(box)),
    "run lengths as JSON": lambda box: json.dumps(rle.encode(mask(box))),
    "a polygon": polygon,
    "corners": lambda box: np.reshape(polygon(box), (-1, 2)).tolist(),
    "polygons": lambda box: [polygon(box)],
}


@pytest.mark.parametrize("form", CELLS)
def test_one_mask_and_one_caption(form, tmp_path):
    cell = CELLS[form]
    columns = {"image": [picture(0, "a.png"), picture(1)], "mask": [cell(CAT), cell(DOG)]}
    folder = save(tmp_path, columns | {"caption": ["left cat", "a dog that sleeps"]})
    found, left_out = convert(folder, tmp_path / "out")
    assert left_out == [] and {phrase for _, phrase in found} == {"left cat", "a dog that sleeps"}
    same({phrase: drawn for (_, phrase), drawn in found.items()},
         {"left cat": mask(CAT), "a dog that sleeps": mask(DOG)})  # fmt: skip
    assert {name for name, _ in found} > {"a"} and len(list((tmp_path / "out/images").iterdir())) == 2


def test_objects_of_a_row_by_their_classes(tmp_path):
    """As detection data have it: a list of structs, numbered classes with names in the table's features."""
    objects = [
        [{"segmentation": [polygon(CAT)], "category": 0}, {"segmentation": [polygon(DOG)], "category": 1}],
        [{"segmentation": [polygon(CAT)], "category": 0}, {"segmentation": [polygon(DOG)], "category": 0}],
        [],
    ]
    label = {"names": ["cat", "dog"], "_type": "ClassLabel"}
    features = {"objects": {"feature": {"category": label}, "_type": "List"}}
    images = [picture(seed, f"folder/{name}.png") for seed, name in enumerate("abc")]
    folder = save(tmp_path, {"img": images, "objects": objects}, features)
    columns = "mask=objects.segmentation, label=objects.category"
    found, left_out = convert(folder, tmp_path / "out", columns=columns)
    assert left_out == []
    wanted = {("a", "the cat"): mask(CAT), ("a", "the dog"): mask(DOG), ("b", "all cats"): mask(CAT, DOG)}
    same(found, wanted)
    assert sorted(path.name for path in (tmp_path / "out/images").iterdir()) == ["a.png", "b.png"]


def test_lists_of_polygons_and_of_captions(tmp_path):
    two = [polygon(CAT), polygon(DOG)]
    folder = save(tmp_path, {"image": [picture(0, "a.png")], "mask": [two], "label": [["cat", "dog"]]})
    same(convert(folder, tmp_path / "apart")[0], {("a", "the cat"): mask(CAT), ("a", "the dog"): mask(DOG)})
    folder = save(tmp_path, {"image": [picture(0, "a.png")], "mask": [two], "caption": [["both", "the pair"]]})
    same(convert(folder, tmp_path / "one")[0], {("a", name): mask(CAT, DOG) for name in ("both", "the pair")})
    masks = [[mask_file(CAT), mask_file(DOG)]]
    folder = save(tmp_path, {"image": [picture(0, "a.png")], "masks": masks})
    same(convert(folder, tmp_path / "named", label="crack")[0], {("a", "all cracks"): mask(CAT, DOG)})


def test_files_that_a_table_names(tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files/a.png").write_bytes(picture(0)["bytes"])
    (tmp_path / "files/a_mask.png").write_bytes(mask_file(CAT)["bytes"])
    image = [{"bytes": None, "path": "a.png"}]
    folder = save(tmp_path, {"image": image, "mask": ["a_mask.png"], "label": ["cat"]})
    found, _ = convert(folder, tmp_path / "out", folder=tmp_path / "files")
    np.testing.assert_array_equal(found["a", "the cat"], mask(CAT))
    assert not (tmp_path / "out/images").exists()


def test_two_images_of_one_name_are_two_files(tmp_path):
    images = [picture(0, "x/1.png"), picture(1, "y/1.png"), picture(0, "x/1.png")]
    captions = ["first", "second", "third"]
    folder = save(tmp_path, {"image": images, "mask": [mask_file(CAT)] * 3, "caption": captions})
    found, _ = convert(folder, tmp_path / "out")
    names = {phrase: name for name, phrase in found}
    assert names["first"] == names["third"] == "1" != names["second"]


def test_bad_rows_are_named_and_leave_nothing(tmp_path):
    images = [picture(0, "a.png"), {"bytes": b"no image", "path": "b.png"}, picture(2, "c.png"), picture(3, "d.png"),
              picture(4, "e.png")]  # fmt: skip
    small = {"bytes": png(np.full((20, 20), 255, np.uint8)), "path": None}
    masks = [[mask_file(CAT)], [mask_file(CAT)], [small], None, [mask_file(CAT), mask_file(DOG)]]
    labels = [["cat"], ["cat"], ["cat"], ["cat"], ["cat"] * 3]
    folder = save(tmp_path, {"image": images, "masks": masks, "labels": labels})
    with pytest.raises(ConfigError, match="4 of 5 entries are bad"):
        convert(folder, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*"))
    found, left_out = convert(folder, tmp_path / "out", bad=0.9)
    assert list(found) == [("a", "the cat")]
    assert [path.name for path in (tmp_path / "out/images").iterdir()] == ["a.png"]
    for message in ("row 1.*cannot be read", "row 2.*a mask of 20x20", "row 3: column masks: .*nothing",
                    "row 4: column labels: expected 2 names, one of each mask, got 3"):  # fmt: skip
        assert any(re.search(message, line) for line in left_out), (message, left_out)
    folder = save(tmp_path, {"image": images[:1], "masks": masks[:1], "label": [3]})
    with pytest.raises(ConfigError, match="row 0: column label: label 3 of 0 names; --names gives them"):
        convert(folder, tmp_path / "numbers")


@pytest.mark.parametrize(
    "columns, said, message",
    [
        (("image", "mask"), "", "no names? Expected label=NAME, caption=NAME or --label"),
        (("image", "mask", "caption", "label"), "", "caption=caption or label=label? Expected"),
        (("image", "mask", "masks", "label"), "", "which is the mask, mask or masks?"),
        (("photo", "mask", "label"), "", "no column of the image? Expected image=NAME; "),
        (("photo", "mask", "label"), "image=foto", "no column 'foto' of the image; "),
        (("image", "mask", "label"), "picture=image", "got 'picture=image'"),
        (("image", "mask", "label"), "label=label,caption=label", "expected label or caption, got both"),
    ],
)
def test_columns_that_cannot_be_told(columns, said, message, tmp_path):
    folder = save(tmp_path, dict.fromkeys(columns, ["x"]))
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_parquet(folder, said)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
    return command.main()


def test_the_command(tmp_path, monkeypatch, capsys):
    folder = save(tmp_path, {"photo": [picture(0, "a.png")], "mask": [mask_file(CAT)], "kind": [1]})
    (tmp_path / "names.txt").write_text("dog\ncat\n")
    there = ("parquet", "--annotations", folder, "--out", tmp_path / "out")
    columns = ("--columns", "image=photo,label=kind", "--names", tmp_path / "names.txt")
    assert run(monkeypatch, *there, *columns, "--mask-rule", ">127") == 0
    assert "1 records" in capsys.readouterr().out
    assert "the cat" in (tmp_path / "out/data.jsonl").read_text()
    with pytest.raises(ConfigError, match="holds data.jsonl already"):
        run(monkeypatch, *there, *columns)
    with pytest.raises(ConfigError, match="--columns=.*only for parquet, not for labelme"):
        run(monkeypatch, "labelme", "--annotations", folder, "--out", tmp_path / "b", "--columns", "image=a")
    for spoil, message in [(b"no table", "cannot be read as parquet"), (None, r"no \*.parquet in it")]:
        [file] = folder.glob("*")
        file.write_bytes(spoil) if spoil else file.unlink()
        with pytest.raises(ConfigError, match=message):
            run(monkeypatch, "parquet", "--annotations", folder, "--out", tmp_path / "c")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=re.escape("pip install 'alto_jax[parquet]'")):
        read_parquet(tmp_path / "names.txt")
