"""What annotation tools write becomes records with the same masks; what is wrong is named and leaves nothing behind."""

import dataclasses
import json
import re

import numpy as np
from PIL import Image
import pytest

from alto_jax.config import ConfigError
from alto_jax.data import rle
from alto_jax.data.bad_data import RecordError
from alto_jax.data.conversations import Conversations
from alto_jax.data.convert import __main__ as command
from alto_jax.data.convert.annotated import Annotated
from alto_jax.data.convert.coco import read_coco
from alto_jax.data.convert.cvat import read_cvat
from alto_jax.data.convert.pairs import match, read_pairs
from alto_jax.data.convert.writing import write
from alto_jax.data.convert.yolo import read_names
from alto_jax.mllm import literals, text
from tests.conftest import run_python

HEIGHT, WIDTH = 40, 60
CAT, DOG = (slice(5, 20), slice(10, 30)), (slice(25, 35), slice(40, 55))  # rows, columns


def mask(*boxes):
    drawn = np.zeros((HEIGHT, WIDTH), bool)
    for rows, columns in boxes:
        drawn[rows, columns] = True
    return drawn


def corners(box):
    (rows, columns) = box
    return [columns.start, rows.start, columns.stop, rows.start, columns.stop, rows.stop, columns.start, rows.stop]


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a", "b"):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)).save(
            folder / f"{name}.png"
        )
    return folder


def write_coco(folder):
    """Image a: a cat and a dog; image b: a cat and a crowd of cats, as run lengths."""
    entries = [
        {"image_id": 1, "category_id": 7, "segmentation": [corners(CAT)], "iscrowd": 0},
        {"image_id": 1, "category_id": 9, "segmentation": [corners(DOG)], "iscrowd": 0},
        {"image_id": 2, "category_id": 7, "segmentation": [corners(CAT)], "iscrowd": 0},
        {"image_id": 2, "category_id": 7, "segmentation": rle.encode(mask(DOG)), "iscrowd": 1},
    ]
    content = {
        "images": [
            {"id": i, "file_name": f"{n}.png", "height": HEIGHT, "width": WIDTH} for i, n in ((1, "a"), (2, "b"))
        ],
        "categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}],
        "annotations": entries,
    }
    (folder / "instances.json").write_text(json.dumps(content))
    return ["coco", "--annotations", folder / "instances.json", "--images", folder / "images"]


def write_labelme(folder):
    shapes = {
        "a": [{"label": "cat", "points": [[10, 5], [30, 20]], "shape_type": "rectangle"},
              {"label": "dog", "points": np.reshape(corners(DOG), (-1, 2)).tolist(), "shape_type": "polygon"}],
        "b": [{"label": "cat", "points": np.reshape(corners(box), (-1, 2)).tolist()} for box in (CAT, DOG)],
    }  # fmt: skip
    for name, found in shapes.items():
        about = {"shapes": found, "imagePath": f"{name}.png", "imageHeight": HEIGHT, "imageWidth": WIDTH}
        (folder / "images" / f"{name}.json").write_text(json.dumps(about))
    return ["labelme", "--annotations", folder / "images"]


def write_yolo(folder):
    line = lambda kind, box: " ".join(
        [str(kind), *map(str, (np.reshape(corners(box), (-1, 2)) / (WIDTH, HEIGHT)).reshape(-1))]
    )
    (folder / "labels").mkdir()
    (folder / "labels" / "a.txt").write_text(f"{line(0, CAT)}\n{line(1, DOG)}\n")
    (folder / "labels" / "b.txt").write_text(f"{line(0, CAT)}\n{line(0, DOG)}\n")
    (folder / "data.yaml").write_text("names:\n  0: cat\n  1: dog\n")
    return ["yolo", "--annotations", folder / "labels", "--images", folder / "images", "--names", folder / "data.yaml"]


def write_cvat(folder):
    points = lambda box: ";".join(f"{x},{y}" for x, y in np.reshape(corners(box), (-1, 2)))
    part = np.zeros((10, 20), bool)
    part[:, 5:] = True
    edges = np.flatnonzero(np.diff(np.concatenate([[False], part.reshape(-1), [not part.reshape(-1)[-1]]])))
    runs = ",".join(map(str, np.diff(np.concatenate([[0], edges]))))
    xml = f"""<annotations><image name="a.png" width="{WIDTH}" height="{HEIGHT}">
      <box label="cat" xtl="10" ytl="5" xbr="30" ybr="20"/><polygon label="dog" points="{points(DOG)}"/></image>
      <image name="b.png" width="{WIDTH}" height="{HEIGHT}"><polygon label="cat" points="{points(CAT)}"/>
      <mask label="cat" rle="{runs}" left="35" top="25" width="20" height="10"/></image></annotations>"""
    (folder / "annotations.xml").write_text(xml)
    return ["cvat", "--annotations", folder / "annotations.xml", "--images", folder / "images"]


@pytest.mark.parametrize("write_files", [write_coco, write_labelme, write_yolo, write_cvat])
def test_masks_are_those_of_the_tool(write_files, images, tmp_path):
    out = tmp_path / "out"
    done = run_python("-m", "alto_jax.data.convert", *write_files(tmp_path), "--out", out)
    assert done.returncode == 0 and "3 records" in done.stdout, done.stderr
    source = Conversations(out / "meta.json")
    assert len(source) == 3
    found = {}
    for index in range(3):
        record = source[index]
        phrase = record["conversations"][0]["value"].split("<ref>")[1].split("</ref>")[0]
        found[record["image_name"].split(".")[0][-1], phrase] = record["masks"][0] > 127
        assert record["image"].shape == (HEIGHT, WIDTH, 3)
    assert found.keys() == {("a", "the cat"), ("a", "the dog"), ("b", "all cats")}
    wanted = {("a", "the cat"): mask(CAT), ("a", "the dog"): mask(DOG), ("b", "all cats"): mask(CAT, DOG)}
    for key, drawn in found.items():
        # Polygons are filled by COCO's rule, LabelMe's corners are pixel centres: an edge of one pixel may differ.
        assert (drawn & wanted[key]).sum() / (drawn | wanted[key]).sum() > 0.9, key


def test_files_of_one_name_in_several_folders(tmp_path):
    """The first has the name that it had alone; moved as a whole, all keep theirs; what is there twice is named."""
    names, root = [], tmp_path / "here"
    for clip, box in (("clip1", CAT), ("clip2", DOG)):
        (root / clip).mkdir(parents=True)
        Image.fromarray(np.full((HEIGHT, WIDTH, 3), len(names), np.uint8)).save(root / clip / "0001.png")
        draw = lambda height, width, box=box: mask(box)
        names.append(Annotated(root / clip / "0001.png", "cat", 1, draw, None, clip))
    found = {}
    for number, entries in enumerate([names[:1], names, [*names, names[1]]]):
        count, bad = write(iter(entries), tmp_path / f"{number}", adaptive=0.5, max_bad_fraction=0.5, root=root)
        assert (count, len(bad)) == [(1, 0), (2, 0), (2, 1)][number]
        found[number] = sorted(path.name for path in (tmp_path / f"{number}/masks").iterdir())
    assert bad == ["clip2: a second entry of this image and name"]
    assert found[0] == ["0001_abab100437.png"] and found[0][0] in found[1] and found[1] == found[2]
    records = [Conversations(tmp_path / "1" / "meta.json")[index] for index in range(2)]
    for record, value, box in zip(records, (0, 1), (CAT, DOG)):
        assert record["image"].max() == value
        np.testing.assert_array_equal(record["masks"][0] > 127, mask(box))
    root = root.rename(tmp_path / "there")
    moved = [dataclasses.replace(e, image=root / e.where / "0001.png") for e in names]
    write(iter(moved), tmp_path / "moved", adaptive=0.5, max_bad_fraction=0, root=root)
    assert sorted(path.name for path in (tmp_path / "moved/masks").iterdir()) == found[1]


def cvat_masks(folder, images, shapes):
    """What one image with these shapes gives: masks by label, and errors."""
    xml = f'<annotations><image name="a.png" width="{WIDTH}" height="{HEIGHT}">{shapes}</image></annotations>'
    (folder / "annotations.xml").write_text(xml)
    found = list(read_cvat(folder / "annotations.xml", images))
    return {e.label: e.draw(HEIGHT, WIDTH) for e in found if not isinstance(e, RecordError)}, [
        str(e) for e in found if isinstance(e, RecordError)
    ]


def test_shapes_of_cvat_are_turned_as_it_shows_them(images, tmp_path):
    shapes = """<box label="quarter" xtl="10" ytl="15" xbr="30" ybr="25" rotation="90"/>
      <box label="eighth" xtl="20" ytl="18" xbr="40" ybr="22" rotation="45"/><tag label="outdoors"/>
      <ellipse label="ellipse" cx="30" cy="20" rx="20" ry="10"/>
      <ellipse label="turned" cx="30" cy="20" rx="15" ry="5" rotation="90.0"/>"""
    found, bad = cvat_masks(tmp_path, images, shapes)
    assert not bad and found.keys() == {"quarter", "eighth", "ellipse", "turned"}
    wanted = mask((slice(10, 30), slice(15, 25)))
    assert (found["quarter"] & wanted).sum() / (found["quarter"] | wanted).sum() > 0.9
    down = found["eighth"]  # Clockwise: its right end lies lower in the picture.
    assert down[25, 35] and down[15, 25] and not down[15, 35] and not down[25, 25]
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    for name, rx, ry in (("ellipse", 20, 10), ("turned", 5, 15)):
        wanted = ((x - 30) / rx) ** 2 + ((y - 20) / ry) ** 2 <= 1
        assert (found[name] & wanted).sum() / (found[name] | wanted).sum() > 0.9, name


@pytest.mark.parametrize("kind", ["polyline", "points", "cuboid", "skeleton"])
def test_a_kind_of_cvat_that_has_no_mask_is_named(kind, images, tmp_path):
    shapes = f'<box label="cat" xtl="1" ytl="1" xbr="9" ybr="9"/><{kind} label="dog" points="1,1;5,5;9,1"/>'
    found, (bad,) = cvat_masks(tmp_path, images, shapes)
    assert not found and re.search(f"annotations.xml image 'a.png': shape 1 .{kind}. of 'dog'", bad)


def test_pairs_and_the_share_of_adaptive_requests(tmp_path):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for i in range(60):
        Image.fromarray(np.full((HEIGHT, WIDTH, 3), i, np.uint8)).save(tmp_path / "images" / f"{i}.png")
        Image.fromarray(mask(CAT).astype(np.uint8) * 255).save(tmp_path / "masks" / f"{i}.png")
    found = read_pairs(tmp_path / "images", tmp_path / "masks", "the crack", "auto")
    records, bad = write(found, tmp_path / "out", adaptive=0.5, max_bad_fraction=0)
    lines = [json.loads(line) for line in (tmp_path / "out" / "data.jsonl").read_text().splitlines()]
    adaptive = ["adaptive length" in line["conversations"][0]["value"] or "<TOK_1>" in line["conversations"][1]["value"]
                for line in lines]  # fmt: skip
    assert records == 60 and bad == [] and 15 < sum(adaptive) < 45
    assert "<ref>the crack</ref>" in lines[0]["conversations"][0]["value"]
    np.testing.assert_array_equal(Conversations(tmp_path / "out" / "meta.json")[0]["masks"][0] > 127, mask(CAT))


@pytest.mark.parametrize(
    "of_images, of_masks, wanted",
    [
        ("a/1.png b/1.png", "a/1.png b/1.bmp", {"a/1.png": "a/1.png", "b/1.png": "b/1.bmp"}),
        ("a/1.png b/2.png", "1.png c/2.png", {"a/1.png": "1.png", "b/2.png": "c/2.png"}),
        ("a/1.png b/1.png", "1.png", {"a/1.png": "1.png, which .*i/b/1.png may", "b/1.png": ".*i/a/1.png may"}),
        ("1.png", "1.bmp 1.png", {"1.png": "i/1.png: which mask is its own.* .*m/1.bmp or .*m/1.png"}),
        ("1.bmp 1.png", "1.png", {"1.bmp": "m/1.png, which .*i/1.png may", "1.png": "which .*i/1.bmp may"}),
        ("1.png", "a/1.png b/1.png", {"1.png": "m/a/1.png or .*m/b/1.png"}),
        ("1.png", "2.png", {"1.png": "i/1.png: no mask"}),
        ("1.png", "../i/masks/1.png", {"1.png": "../i/masks/1.png"}),
    ],
)
def test_images_and_masks_of_equal_names(of_images, of_masks, wanted, tmp_path):
    roots = tmp_path / "i", tmp_path / "m"
    for root, names in zip(roots, (of_images, of_masks)):
        for name in names.split():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).resolve().touch()
    masks = tmp_path / "i/masks" if ".." in of_masks else roots[1]
    found = {str(path.relative_to(roots[0])): mask for path, mask in match(roots[0], masks)}
    assert found.keys() == wanted.keys()
    for name, mask in found.items():
        if isinstance(mask, RecordError):
            assert re.search(wanted[name], str(mask)), mask
        else:
            assert mask.resolve() == (roots[1] / wanted[name]).resolve()


def test_a_crowd_is_several(images, tmp_path):
    spoiled(tmp_path, lambda content: content["annotations"][2].update(image_id=1))
    found = {(entry.image.stem, entry.label): entry for entry in read_coco(tmp_path / "instances.json", images)}
    assert {key: entry.count > 1 for key, entry in found.items()} == {
        ("a", "cat"): True, ("a", "dog"): False, ("b", "cat"): True}  # fmt: skip
    np.testing.assert_array_equal(found["b", "cat"].draw(HEIGHT, WIDTH), mask(DOG))


def converted(label, images, out, is_phrase=False):
    """(question, None) or (None, what is wrong) with a name."""
    entry = Annotated(images / "a.png", label, 1, lambda *_: mask(CAT), None, "entry", is_phrase=is_phrase)
    try:
        write(iter([entry]), out, adaptive=0, max_bad_fraction=0)
    except ConfigError as error:
        return None, str(error)
    return json.loads((out / "data.jsonl").read_text())["conversations"][0]["value"], None


def test_names_with_special_tokens_are_refused(images, tmp_path):
    tok = text.TextTokenizer.train_builtin(["the red apple on the left", "all frogs"] * 20, 400, 64)
    tokens = [tok.decode([i]) for i in sorted(tok.reserved_ids)]
    assert {"<IMG_CONTEXT>", "<|im_end|>", "<TOK_63>"} <= {*tokens}
    for token in [*tokens, "<|endoftext|>", "<s>", "<image>"]:
        for is_phrase in (False, True):
            assert f"holds {token!r}" in converted(f"a {token} b", images, tmp_path / "out", is_phrase)[1]
    for label in ("cat</ref>dog", "<ref>cat</ref>", "the <box>", "cat <quad>"):
        assert "entry: the name" in converted(label, images, tmp_path / "out")[1]
    for phrase in ("the cat</ref>", "<ref>cat", "the <box> cat"):
        assert "expected whole <ref>" in converted(phrase, images, tmp_path / "out", True)[1]
    for number, phrase in enumerate(("the cat <3", "a < b | c > d", "<ref>the cat</ref><box>[[1,2,3,4]]</box>")):
        question, wrong = converted(phrase, images, tmp_path / f"{number}", True)
        assert wrong is None and phrase in question
        literals.check_turn(tok, "human", question)


def spoiled(folder, change):
    arguments = write_coco(folder)
    content = json.loads((folder / "instances.json").read_text())
    change(content)
    (folder / "instances.json").write_text(json.dumps(content))
    return arguments


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c["images"][0].update(width=61), "a.png.*annotations are for 61x40 pixels"),
        (lambda c: c["annotations"][0].update(category_id=8), "category 8: not among the categories"),
        (lambda c: c["annotations"][0].update(segmentation=[[1, 2, 3]]), "category 7: .*polygon"),
        (lambda c: c["annotations"][3].pop("segmentation"), "category 7: .*annotation 3: no field segmentation"),
        (lambda c: c["annotations"][0].pop("segmentation"), "category 7: .*annotation 0: no field segmentation"),
        (
            lambda c: c["annotations"][0].update(segmentation=None),
            "annotation 0: expected a list or .* as segmentation",
        ),
        (
            lambda c: c["annotations"][0].update(image_id=[1]),
            "annotation 0: expected a number or text as image_id, got .1.",
        ),
        (lambda c: c["annotations"][0].update(category_id={}), "annotation 0: expected .* as category_id, got {}"),
        (lambda c: c["images"][0].update(id=[1]), "image 0: expected .* as id, got .1."),
        (lambda c: c["categories"][1].update(id=[9]), "category 1: expected .* as id, got .9."),
        (lambda c: c["images"].append({**c["images"][0], "file_name": "b.png"}), "image 2: id 1 is that of .*image 0"),
        (lambda c: c["annotations"].append(3), "annotation 4: expected an entry with image_id, got 3"),
        (lambda c: c["annotations"][2].update(image_id=5), "annotation 2: image_id 5 is that of no image"),
        (lambda c: c["images"].pop(0), "annotation 0: image_id 1 is that of no image"),
        (lambda c: c["images"].pop(), "annotation 2 and 1 more of category 7: image_id 2 is that of no image"),
        (lambda c: c["images"][0].pop("file_name"), "image 0: no field file_name"),
        (lambda c: c.update(categories=7), "expected COCO's list 'categories'"),
        (lambda c: c["images"][0].update(file_name="gone.png"), "gone.png"),
        (lambda c: c.pop("annotations"), "expected COCO's lists"),
    ],
)
def test_a_bad_entry_is_named(change, message, images, tmp_path):
    arguments = [str(a) for a in spoiled(tmp_path, change)]
    found = lambda: read_coco(tmp_path / "instances.json", images)
    with pytest.raises(ValueError, match=message):
        write(found(), tmp_path / "out", adaptive=0.5, max_bad_fraction=0.0)
    assert not list((tmp_path / "out").rglob("*.*")), arguments
    if "expected COCO's list" not in message:
        count, bad = write(found(), tmp_path / "out", adaptive=0.5, max_bad_fraction=0.9)
        assert count in (1, 2, 3) and len(bad) <= 3 and re.search(message, " ".join(bad))
        assert {line.split("<ref>")[1].split("</ref>")[0] for line in (tmp_path / "out/data.jsonl").open()} <= {
            "the cat", "the dog", "all cats"}  # fmt: skip


@pytest.mark.parametrize(
    "write_files, file, old, new, message",
    [
        (write_labelme, "images/a.json", r"^.*$", "[1]", "a.json: expected an entry with shapes, got .1."),
        (write_labelme, "images/a.json", r'"shapes"', '"x"', "a.json: no field shapes, expected a list"),
        (write_labelme, "images/a.json", r'"a.png"', "3", "a.json: expected text as imagePath, got 3"),
        (write_labelme, "images/a.json", r": 40", ': "x"', "a.json: imageHeight is missing or .*got 'x'"),
        (write_labelme, "images/a.json", r'"points"', '"x"', "a.json shape 0: no field points"),
        (write_labelme, "images/a.json", r"\[10, 5\]", '["x", 5]', "a.json shape 0: expected points .*'x'"),
        (write_labelme, "images/a.json", r'"polygon"', '"line"', "a.json shape 1: shape 'line' of 4 points"),
        (write_cvat, "annotations.xml", 'label="dog"', "", "image 'a.png': shape 1 .polygon.: no attribute 'label'"),
        (write_cvat, "annotations.xml", 'xtl="10"', "", "shape 0 .box.: no attribute 'xtl'"),
        (write_cvat, "annotations.xml", 'xtl="10"', 'xtl="x"', "shape 0 .box.: expected numbers as 'xtl', got 'x'"),
        (write_cvat, "annotations.xml", 'rle="', 'rle="nan,', "shape 1 .mask.: expected numbers as 'rle'"),
        (write_cvat, "annotations.xml", 'left="35"', 'left="inf"', "shape 1 .mask.: expected numbers as 'left'"),
        (write_cvat, "annotations.xml", f'height="{HEIGHT}"', 'height="x"', "'a.png': expected numbers as 'height'"),
        (write_yolo, "labels/b.txt", r"\n1?0", "\nx", "b.txt: line 2: expected numbers, got 'x"),
    ],
)
def test_a_malformed_field_is_named(write_files, file, old, new, message, images, tmp_path, refused):
    arguments = write_files(tmp_path)
    content = (tmp_path / file).read_text()
    changed = re.sub(old, new, content, count=1)
    assert changed != content
    (tmp_path / file).write_text(changed)
    line = refused(command.main, *arguments, "--out", tmp_path / "out")
    assert re.search(message, line), line


def test_wrong_requests_are_one_line(images, tmp_path, refused):
    both = ["--images", images, "--annotations", images]
    requests = [
        (["coco", "--images", images], "--annotations is required for coco"),
        (["coco", *both], "no such file"),
        (
            ["yolo", "--images", images, "--annotations", images, "--names", tmp_path / "x.txt"],
            "--names=.*expected class",
        ),
        (
            ["pairs", "--images", images, "--masks", images, "--label", "x", "--adaptive", "2"],
            "--adaptive=2.0: expected 0..1",
        ),
        (["labelme", "--annotations", images], "no entries were found"),
    ]
    for arguments, message in requests:
        line = refused(command.main, *arguments, "--out", tmp_path / "out")
        assert re.search(message, line), line
    with pytest.raises(ConfigError, match="holds no names"):
        (tmp_path / "empty.txt").write_text("\n")
        read_names(str(tmp_path / "empty.txt"))
