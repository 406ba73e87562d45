"""Bad files of every kind among good ones: all reported, counts exact, training and evaluation finish."""

import io
import json

import numpy as np
from PIL import Image
import pytest

from alto_jax.data import bad_data, benchmarks, images, pipeline, prepare
from alto_jax.data.chat_examples import chat_example
from alto_jax.data.conversations import Conversations
from alto_jax.data.sa1b import Sa1bMasks
from alto_jax.mllm.text import TextTokenizer
from tests.data import replicas
from tests.data.test_prepare import NONE, job

GOOD = 16
ODD = {"CMYK": "CMYK", "P": "mode P", "I;16": "I;16", "exif": "EXIF orientation"}  # colour mode → how it is reported


def image_files(good: bytes) -> dict:
    """kind → (number → content of such an image file), of a good JPEG: bad files, and colour modes to convert."""
    photo = Image.open(io.BytesIO(good)).convert("RGB")
    rotated = photo.getexif()
    rotated[0x0112] = 6
    deep = Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257)

    def content(image, image_format, **options):
        buffer = io.BytesIO()
        image.save(buffer, format=image_format, **options)
        return buffer.getvalue()

    return {
        "file of 0 bytes": lambda i: b"",
        "truncated file": lambda i: good[: len(good) // 2 + i],
        "unreadable file": lambda i: np.random.default_rng(i).bytes(300),
        "image too small": lambda i: content(Image.new("RGB", (50 + i, 1)), "PNG"),
        "CMYK": lambda i: content(photo.convert("CMYK"), "JPEG"),
        "P": lambda i: content(photo.quantize(64), "PNG"),
        "I;16": lambda i: content(deep, "PNG"),
        "exif": lambda i: content(photo, "JPEG", exif=rotated),
    }


def corrupt(root):
    """A JSONL with 16 good lines, four of them with images in odd colour modes, and 36 bad ones; kind → number."""
    replicas.write_conversations(root, GOOD - len(ODD))
    lines = (root / "chat.jsonl").read_text().splitlines()
    turns = json.loads(lines[0])["conversations"]
    files = image_files((root / "images" / "0.jpg").read_bytes())
    ones = np.full((replicas.SIZE, replicas.SIZE), 255, np.uint8)
    Image.fromarray(ones).save(root / "masks" / "good.png")

    def add(kind, image="images/0.jpg", mask="masks/good.png", raw=None, **changes):
        entry = {"image": image, "mask": mask, "conversations": turns} | changes
        lines.append(raw if raw is not None else json.dumps(entry))
        if kind:
            expected[kind] = expected.get(kind, 0) + 1

    def image(kind, number):
        name = f"images/{kind.replace(' ', '_')}_{number}.jpg"
        (root / name).write_bytes(files[kind](number))
        return name

    expected = {}
    for i in range(3):
        add("missing image", image=f"images/gone_{i}.jpg")
        add("missing mask", mask=f"masks/gone_{i}.png")
        for kind in ("file of 0 bytes", "truncated file", "unreadable file", "image too small"):
            add(kind, image=image(kind, i))
        add("malformed JSON", raw='{"image": "images/0.jpg", "mask"' + "[" * i)
        add("malformed entry", image=3 + i)
        Image.fromarray(ones[: 40 + i]).save(root / "masks" / f"size_{i}.png")
        add("size of mask and image", mask=f"masks/size_{i}.png")
        Image.fromarray(ones * 0).save(root / "masks" / f"empty_{i}.png")
        add("empty mask", mask=f"masks/empty_{i}.png")
        add("conversation", mask=["masks/good.png"] * (2 + i))
        add("conversation", conversations=[{"from": "human", "value": "hi"}, {"from": "human", "value": "hi"}], mask=[])
    for mode in ODD:
        add(None, image=image(mode, 0))
    (root / "chat.jsonl").write_text("\n".join(lines) + "\n")
    return expected


def test_every_bad_record_is_reported_and_the_rest_is_read(tmp_path, debug_model, caplog):
    expected = corrupt(tmp_path)
    total = sum(expected.values())
    assert total == 36 and len(expected) == 11
    source = Conversations(tmp_path / "meta.json")
    assert len(list(source.texts())) == GOOD + total - expected["malformed JSON"] - expected["malformed entry"]
    tok = TextTokenizer.load(debug_model.path)
    sizes = dict(vision_size=28, image_size=64, mask_size=32, num_image_tokens=4, max_length=200, num_latent_tokens=8)
    bad = bad_data.BadRecords(len(source), 0.9)
    for index in range(len(source)):
        try:
            chat_example(source[index], tok, **sizes, max_masks=2, system=None)
        except (ValueError, OSError) as error:
            assert f"line {index + 1}" in str(error) or f"chat.jsonl:{index + 1}" in str(error)
            bad.add(index, error)
    assert dict(bad.kinds) == expected and len(bad) == total
    options = dict(max_masks=2, batch_size=4, seed=0, system=None, num_epochs=1, num_threads=2)
    batches = pipeline.chat_batches(source, tok, **sizes, **options, max_bad_fraction=0.9)
    assert len(list(batches)) == (total + GOOD) // 4
    assert caplog.text.count(" left out (") >= total
    with pytest.raises(ValueError, match=r"bad of 52 records \(.*at most 5 are left out, data.max_bad_fraction is 0.1"):
        list(pipeline.chat_batches(source, tok, **sizes, **options, max_bad_fraction=0.1))


def test_preparation_leaves_out_and_lists_them(tmp_path, capsys):
    expected = corrupt(tmp_path / "raw")
    # Preparation does not render the text: what is wrong with a conversation shows when it is read for training.
    expected.pop("conversation")
    raw = job("conversations", tmp_path / "raw")
    found = prepare.check(raw)
    assert len(found["bad"]) == sum(expected.values()) == 30
    assert sorted(entry["what"].split(",")[0].removeprefix("colour ") for entry in found["converted"]) == sorted(
        f"mode {what}" if what in ("CMYK", "I;16") else what for what in ODD.values()
    )
    folder = prepare.prepare(raw, tmp_path / "out", max_bad_fraction=0.9)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["bad_by_kind"] == dict(sorted(expected.items()))
    assert manifest["written"] == manifest["records"] - 30
    with pytest.raises(ValueError, match="bad of 52 records"):
        prepare.prepare(raw, tmp_path / "other", max_bad_fraction=0.001)
    assert not list((tmp_path / "other").rglob("manifest.json"))


def test_odd_images_are_converted_and_named(tmp_path, caplog):
    photo = Image.fromarray(replicas.scenes(1)[0].image).resize((60, 40))
    photo.save(tmp_path / "plain.jpg", quality=95)
    files = image_files((tmp_path / "plain.jpg").read_bytes())
    photo.convert("RGBA").save(tmp_path / "alpha.png")
    wanted = {"alpha.png": "RGBA", "plain.jpg": None} | {f"{n}.jpg".replace(";", "_"): what for n, what in ODD.items()}
    for mode in ODD:
        (tmp_path / f"{mode}.jpg".replace(";", "_")).write_bytes(files[mode](0))
    images._noted.clear()
    plain = np.asarray(photo).astype(int)
    for name, note in wanted.items():
        for _ in range(2):
            with images.noting() as notes:
                image = images.open_image(tmp_path / name)
            assert [what for _, what in notes] == ([] if note is None else [notes[0][1]]) and (note or "") in str(notes)
        assert image.dtype == np.uint8
        grey = plain.mean(-1, keepdims=True) if name == "I_16.jpg" else plain
        assert image.shape == (40, 60, 3) and np.abs(image - grey).mean() < 15, name
    assert len(caplog.records) == 5 and all(str(tmp_path) in message for message in caplog.messages)


def test_sa1b_check_looks_at_every_annotation(tmp_path):
    replicas.write_sa1b(tmp_path, 4)
    for number, (field, value) in enumerate([("counts", "abc"), ("counts", [5, 5]), ("size", [1, 2])]):
        file = tmp_path / f"sa_{number}.json"
        content = json.loads(file.read_text())
        content["annotations"][-1]["segmentation"][field] = value
        file.write_text(json.dumps(content))
    (tmp_path / "sa_3.jpg").write_bytes(b"")
    raw = prepare.Job("sa1b", "masks", Sa1bMasks(tmp_path), NONE, "png", 4, 0)
    found = prepare.check(raw)
    assert [entry["kind"] for entry in found["bad"]] == [
        "segmentation",
        "segmentation",
        "size of mask and image",
        "file of 0 bytes",
    ]
    assert all(f"sa_{i}.json" in entry["message"] for i, entry in enumerate(found["bad"]))


def test_evaluation_counts_bad_samples(tmp_path):
    replicas.write_refcocom(tmp_path)
    for i, file in enumerate(sorted((tmp_path / "refcocom" / "masks").iterdir())[:2]):
        file.write_bytes(b"" if i else b"nothing")
    source = benchmarks.open_benchmark("refcocom_val_part_only", tmp_path)
    found = prepare.check(prepare.Job("x", "referring", source, NONE, "png", 4, 0))
    assert sorted(entry["kind"] for entry in found["bad"]) == ["file of 0 bytes", "unreadable file"]


def test_limit_is_a_fraction():
    bad = bad_data.BadRecords(5000, 0.001)
    for index in (1, 1, 2, 3, 4, 5, 5):
        bad.add(index, bad_data.RecordError("x", "empty mask"))
    with pytest.raises(ValueError, match=r"y \(6 bad of 5000 records \(5 empty mask, 1 other\)"):
        bad.add(6, "y")
    with pytest.raises(ValueError, match="max_bad_fraction"):
        bad_data.BadRecords(10, 2.0)
