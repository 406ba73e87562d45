"""Image and annotations stay in one frame, whatever the EXIF orientation: files, polygons, run lengths; all readers."""

import json
import pickle

import numpy as np
from PIL import Image
import pytest

from alto_jax import experiment
from alto_jax.config import ConfigError
from alto_jax.data import bad_data, benchmarks, prepare, sources
from alto_jax.data.conversations import Conversations
from alto_jax.data.open_vocab import OpenVocab
from alto_jax.data.reading import Reading
from alto_jax.data.sa1b import Sa1bMasks
from alto_jax.evaluate import questions
from tests.data import replicas
from tests.data.test_images import as_viewed, with_orientation

HEIGHT, WIDTH = 24, 40
MASK = np.zeros((HEIGHT, WIDTH), bool)
MASK[3:9, 5:25] = True
IMAGE = np.where(MASK[..., None], [200, 30, 40], [10, 20, 30]).astype(np.uint8)  # the mask shows in the image
TURNS = [{"from": "human", "value": "<image>\nSegment <ref>it</ref>."}, {"from": "gpt", "value": "No"}]


def object_of(image: np.ndarray) -> np.ndarray:
    return image[..., 0] > 100


def write_image(path, orientation: int, pixels: np.ndarray = IMAGE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, "PNG", exif=with_orientation(orientation))


def write_chat(root, orientation: int, mask: np.ndarray = MASK, **options):
    write_image(root / "a.png", orientation)
    Image.fromarray(mask).save(root / "m.png", **options)
    line = {"image": "a.png", "mask": "m.png", "conversations": TURNS}
    (root / "chat.jsonl").write_text(json.dumps(line) + "\n")
    (root / "meta.json").write_text(json.dumps({"x": {"root": ".", "annotation": "chat.jsonl"}}))
    return root / "meta.json"


def write_refer(root, orientation: int, form: str) -> None:
    write_image(root / replicas.IMAGES / "a.jpg", orientation)
    images = [{"id": 1, "file_name": "a.jpg", "height": HEIGHT, "width": WIDTH}]
    annotations = [{"id": 7, "image_id": 1, "iscrowd": 0, "segmentation": replicas.runs(MASK, form)}]
    refs = [{"ref_id": 1, "image_id": 1, "ann_id": 7, "split": "val", "sentences": replicas.sentences("it")}]
    (root / "refcoco").mkdir()
    (root / "refcoco" / "instances.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    (root / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(refs))


def write_refcocom(root, orientation: int) -> None:
    write_image(root / replicas.IMAGES / "a.jpg", orientation)
    for folder in ("annotations", "masks"):
        (root / "refcocom" / folder).mkdir(parents=True)
    Image.fromarray(MASK).save(root / "refcocom" / "masks" / "7.png")
    entries = [{"img_name": "a.jpg", "segment_id": "7", "sentences": ["it"]}]
    (root / "refcocom" / "annotations" / "val_part_only.json").write_text(json.dumps(entries))


def write_sa1b(root, orientation: int) -> None:
    write_image(root / "sa_1.jpg", orientation)
    info = {"image_id": 1, "height": HEIGHT, "width": WIDTH, "file_name": "sa_1.jpg"}
    annotation = {"area": int(MASK.sum()), "segmentation": replicas.runs(MASK, "compressed")}
    (root / "sa_1.json").write_text(json.dumps({"image": info, "annotations": [annotation]}))


def write_open_vocab(root, orientation: int):
    write_image(root / "a.png", orientation)
    Image.fromarray(MASK).save(root / "m.png")
    line = {"image": "a.png", "mask": "m.png", "ignore": "m.png", "description": ["it"]}
    (root / "pas20.jsonl").write_text(json.dumps(line) + "\n")
    return root / "pas20.jsonl"


def check(image: np.ndarray, mask: np.ndarray, orientation: int, exif: str) -> None:
    wanted = IMAGE if exif == "stored" else as_viewed(IMAGE, orientation)
    np.testing.assert_array_equal(image, wanted)
    np.testing.assert_array_equal(mask > 0, object_of(wanted))


@pytest.mark.parametrize("exif", ["stored", "upright"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_masks_of_the_stored_pixels_stay_on_their_object(orientation, exif, tmp_path):
    reading = Reading(exif)
    record = Conversations(write_chat(tmp_path / "chat", orientation), reading=reading)[0]
    check(record["image"], record["masks"][0], orientation, exif)
    for form in ("polygon", "compressed", "counts"):
        write_refer(tmp_path / form, orientation, form)
        record = benchmarks.open_benchmark("refcoco_val", tmp_path / form, reading=reading)[0]
        check(record["image"], record["mask"], orientation, exif)
    write_refcocom(tmp_path / "part", orientation)
    record = benchmarks.open_benchmark("refcocom_val_part_only", tmp_path / "part", reading=reading)[0]
    check(record["image"], record["mask"], orientation, exif)
    record = OpenVocab(write_open_vocab(tmp_path / "open", orientation), reading=reading)[0]
    check(record["image"], record["mask"], orientation, exif)
    np.testing.assert_array_equal(record["mask"], record["ignore"])
    write_sa1b(tmp_path / "sa1b", orientation)
    source = Sa1bMasks(tmp_path / "sa1b", train=False, reading=reading)
    record = source[0]
    height, width = as_viewed(MASK, orientation).shape if exif == "upright" else MASK.shape
    assert not record["mask"][height:].any() and not record["mask"][:, width:].any()
    check(record["image"][:height, :width], record["mask"][:height, :width], orientation, exif)
    assert not source.problems(0)
    question = questions.Questions([("x", "x", tmp_path / "chat" / "a.png", "?", "yes", "")], reading)[0]
    check(question["image"], object_of(question["image"]), orientation, exif)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_masks_of_the_upright_image_stay_on_their_object(orientation, tmp_path):
    meta = write_chat(tmp_path, orientation, as_viewed(MASK, orientation))
    record = Conversations(meta, reading=Reading("masks_upright"))[0]
    check(record["image"], record["masks"][0], orientation, "masks_upright")
    if orientation >= 5:  # with the other settings the sizes tell
        for exif in ("stored", "upright"):
            with pytest.raises(
                bad_data.RecordError, match="line 1: mask .*EXIF orientation.*'masks_upright'"
            ) as caught:
                Conversations(meta, reading=Reading(exif))[0]
            assert caught.value.kind == "size of mask and image"


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_mask_file_with_an_orientation_of_its_own(orientation, tmp_path):
    meta = write_chat(tmp_path, orientation, exif=with_orientation(orientation))
    for exif in ("stored", "upright", "masks_upright"):
        record = Conversations(meta, reading=Reading(exif))[0]
        check(record["image"], record["masks"][0], orientation, exif)
    other = 2 if orientation != 2 else 3
    meta = write_chat(tmp_path, orientation, exif=with_orientation(other))
    with pytest.raises(bad_data.RecordError, match=f"orientation {other}, its image .* {orientation}: .*can't be told"):
        Conversations(meta, reading=Reading("upright"))[0]


def test_the_choice_is_named_in_the_log_once(tmp_path, caplog):
    meta = write_chat(tmp_path, 3)
    for _ in range(2):
        data = experiment.DataConfig(source="jsonl", meta=str(meta), exif="upright", mask_rule="nonzero")
        sources._reading(data)
    assert caplog.messages == ["exif 'upright': images and their masks turned upright; mask_rule 'nonzero'"]
    caplog.clear()
    sources._reading(experiment.DataConfig())
    assert not caplog.messages


def test_data_sets_of_a_meta_file_have_rules_of_their_own(tmp_path):
    meta = write_chat(tmp_path, 6, (MASK * np.uint8(1) + ~MASK * np.uint8(255)))
    content = json.loads(meta.read_text())
    with pytest.raises(bad_data.RecordError, match="several ways"):
        Conversations(meta)[0]
    for entry in ({"mask_rule": "equals:1"}, {"mask_rule": "equals:1", "exif": "upright"}):
        meta.write_text(json.dumps({"x": content["x"] | entry}))
        record = Conversations(meta, reading=Reading(mask_rule=">127"))[0]
        check(record["image"], record["masks"][0], 6, entry.get("exif", "stored"))
    for wrong, message in (({"exif": "raw"}, "x.exif: expected one of"), ({"mask_rule": "2"}, "x.mask_rule: expected"),
                           ({"mask_rule": 2}, "x.mask_rule is missing or of a wrong type")):  # fmt: skip
        meta.write_text(json.dumps({"x": content["x"] | wrong}))
        with pytest.raises(ValueError, match=f"meta.json: {message}"):
            Conversations(meta)


def test_configurations_are_checked():
    with pytest.raises(ConfigError, match="mask_rule: expected auto, nonzero"):
        experiment.DataConfig(mask_rule="grey")
    with pytest.raises(ConfigError, match="exif: expected one of stored"):
        Reading("raw")


def test_check_counts_the_orientations(tmp_path, capsys, monkeypatch):
    meta = write_chat(tmp_path, 3)
    monkeypatch.setattr("sys.argv", ["prepare", "conversations", "--source", str(meta), "--check"])
    assert prepare.main() == 0
    shown = capsys.readouterr().out
    assert "a.png: EXIF orientation, read as stored" in shown
    assert "1 images have an EXIF orientation; --exif is 'stored'" in shown
    monkeypatch.setattr("sys.argv", ["prepare", "conversations", "--source", str(meta), "--check", "--mask-rule", "x"])
    with pytest.raises(ConfigError, match="--mask-rule: expected"):
        prepare.main()


def test_a_prepared_data_set_belongs_to_its_rules(tmp_path):
    meta = write_chat(tmp_path / "raw", 6)
    names = dict(seed=0, protocol="joined", images=None, draws=1, num=1)
    sizes = {"vision_size": 0, "image_size": 0, "mask_size": 0}

    def job(exif: str) -> prepare.Job:
        found = prepare.open_source("conversations", str(meta), **names, reading=Reading(exif))
        return prepare.Job(*found, sizes, "png", 4, 0, reading=Reading(exif))

    folder = prepare.prepare(job("upright"), tmp_path / "out", max_bad_fraction=0.0)
    assert json.loads((folder / "manifest.json").read_text())["reading"]["exif"] == "upright"
    with pytest.raises(ConfigError, match="holds a data set with reading .*upright"):
        prepare.prepare(job("stored"), tmp_path / "out", max_bad_fraction=0.0)
