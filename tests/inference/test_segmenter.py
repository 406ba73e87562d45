"""Requests answered together are those answered alone; what results hold; what is refused."""

import jax
import numpy as np
from PIL import Image
import pytest

import alto_jax
from alto_jax.data import rle
from alto_jax.data.composition import ScenesConfig
from alto_jax.data.scenes import SceneMasks

PHRASES = ["the red apple", "the cup on the left", "a very long description of one small thing at the top", "the dog"]


@pytest.fixture(scope="module")
def model(debug_model):
    return alto_jax.load(debug_model.path)


@pytest.fixture(scope="module")
def images():
    source = SceneMasks(ScenesConfig(image_size=48, num_scenes=8))
    return [np.pad(source[i]["image"], ((0, 0), (0, 8 * i), (0, 0)), mode="edge") for i in range(5)]


def same(one, two):
    assert (one.codes, one.token_ids, one.text, one.num_masks) == (two.codes, two.token_ids, two.text, two.num_masks)
    np.testing.assert_allclose(one.probability, two.probability, rtol=0, atol=1e-4)
    assert one.score == pytest.approx(two.score, rel=1e-4) and 0 < one.token_probability < 1


def test_many_requests_about_an_image_are_those_one_by_one(model, images):
    encoded = model.encode_image(images[2])
    many = model.segment(encoded, PHRASES)
    assert len(many) == len(PHRASES) and len({tuple(p.codes) for p in many}) > 1
    for phrase, answer in zip(PHRASES, many, strict=True):
        same(answer, model.segment(images[2], phrase))
    assert many[0].mask.shape == images[2].shape[:2]
    # More than fit into one call, in order.
    again = model.segment(encoded, [PHRASES[i % 4] for i in range(33)])
    assert [p.codes for p in again] == [many[i % 4].codes for i in range(33)]


def test_many_images_are_those_one_by_one(model, images):
    texts = [PHRASES[i % 4] for i in range(5)]
    found = list(model.segment_batch(images, texts, batch_size=2, max_length=3))
    for image, text, answer in zip(images, texts, found, strict=True):
        assert answer.mask.shape == image.shape[:2] and 1 <= answer.length <= 3
        same(answer, model.segment(image, text, max_length=3))


def test_a_cpu_encodes_four_images_at_a_time(model, images, monkeypatch):
    """And each is what it is alone; those that are there are filled up to four, not to the batch."""
    shapes, compiled = [], type(model).compiled

    def noted(self, name, make, **options):
        call = compiled(self, name, make, **options)
        return lambda params, *arrays: shapes.append([len(a) for a in arrays]) or call(params, *arrays)

    inputs = [model.inputs(image) for image in (*images, images[2])]
    alone = [model.encode_inputs([one])[0] for one in inputs]
    monkeypatch.setattr(type(model), "compiled", noted)
    together = model.encode_inputs(inputs, rows=8)
    assert shapes == [[4, 4], [4, 4]] and len(together) == len(inputs)
    for one, same in zip(alone, together, strict=True):
        assert one.size == same.size
        np.testing.assert_allclose(same.image_tokens, one.image_tokens, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(same.features, one.features, rtol=1e-5, atol=1e-6)
    shapes.clear()
    assert len(model.encode_inputs(inputs[:3], rows=3)) == 3 and shapes == [[3, 3]]
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert len(model.encode_inputs(inputs, rows=8)) == len(inputs) and shapes[1:] == [[8, 8]]


def test_a_box_is_a_request(model, images):
    """The text that training writes, in thousandths, rounded as this model was taught (here: not at all)."""
    height, width = images[1].shape[:2]
    box = model.segment(images[1], boxes=[(0, 12, 28, 48), (28, 0, 56, 24)])
    same(box, model.segment(images[1], "<box>[[0,250,500,1000],[500,0,1000,500]]</box>"))
    assert (height, width) == (48, 56)
    for wrong in ([(5, 0, 5, 9)], [(0, 0, 57, 9)], [(0, 1, 2)]):
        with pytest.raises(ValueError, match="boxes: expected x1 < x2 <= 56 and y1 < y2 <= 48 in pixels, got"):
            model.segment(images[1], boxes=wrong)
    with pytest.raises(ValueError, match="boxes: expected at least one"):
        model.segment(images[1], boxes=[])


def test_an_image_seen_already_is_that_image(model, images):
    """In every call that takes images but `answer`, also beside others."""
    seen = model.encode_image(images[0])
    assert model.encode_image(seen) is seen
    mixed = model.segment_batch([seen, images[1], seen], PHRASES[:3], batch_size=3, max_length=2)
    for one, two in zip(mixed, model.segment_batch([images[i] for i in (0, 1, 0)], PHRASES[:3], batch_size=3,
                                                   max_length=2), strict=True):  # fmt: skip
        same(one, two)
    size = images[0].shape[:2]
    np.testing.assert_array_equal(model.decode([3, 1], size, seen), model.decode([3, 1], size, images[0]))
    with pytest.raises(ValueError, match=r"codes: expected values in 0\.\."):
        model.decode([-1], size, seen)
    with pytest.raises(ValueError, match="pictures: expected images, got an EncodedImage, which holds no tiles"):
        model.answer([images[0], seen], "What?")


def test_what_a_result_holds(model, images, tmp_path):
    answer = model.segment(images[0], PHRASES[0], length=5)
    assert answer.length == 5 and answer.mask.any()
    np.testing.assert_array_equal(rle.decode(answer.rle, *answer.mask.shape, "test"), answer.mask)
    drawn = answer.overlay(images[0])
    assert drawn.shape == images[0].shape and (drawn != images[0]).any(-1)[answer.mask].mean() > 0.9
    Image.fromarray(images[0]).save(tmp_path / "a.png")
    for image in (tmp_path / "a.png", Image.open(tmp_path / "a.png")):
        np.testing.assert_array_equal(answer.overlay(image), drawn)
    growth = model.growth(images[0], answer)
    assert growth.shape == (5, *answer.mask.shape)
    np.testing.assert_array_equal(growth[-1], answer.mask)
    np.testing.assert_array_equal(growth[1], model.decode(answer.codes[:2], answer.mask.shape, images[0]))
    assert answer.confidence == pytest.approx(answer.probability[answer.mask].mean(), rel=1e-5)
    assert answer.to_json()["score"] == pytest.approx(answer.confidence * answer.token_probability)


def test_refused(model, images):
    with pytest.raises(ValueError, match="text, boxes, prompt: expected one of them"):
        model.segment(images[0], "apple", prompt="Where?")
    with pytest.raises(ValueError, match="text: expected at least one request"):
        model.segment(images[0], [])
    size = images[0].shape[:2]
    with pytest.raises(ValueError, match="no target beside several"):
        model.segment(images[0], PHRASES, target=np.ones(size, bool))
    for asked, message in [
        ({"boxes": (12, 30, 40, 45)}, r"boxes: expected a list of boxes \(x1, y1, x2, y2\), got \(12, 30, 40, 45\)"),
        ({"boxes": 3}, "boxes: expected a list of boxes"), ({"boxes": [("a", 1, 2, 3)]}, "boxes: expected a list"),
        ({"text": None}, "text: expected an object or a list of them, got None"),
        ({"text": ["a", 3]}, "text: expected the name or description of an object, got 3"),
        ({"text": "a", "end_bias": "1"}, "end_bias: expected a finite number, got '1'"),
        ({"prompt": 3}, "prompt: expected a question, got 3"),
        ({"text": "a", "target": np.full(size, 0.2)}, "target: expected bool or integers, got float64"),
        ({"text": "a", "target": np.full(size, -1)}, "target: expected values of at least 0, got -1"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            model.segment(images[0], **asked)
    for mask, message in [
        (np.full(size, np.nan), "mask: expected bool or integers, got float64"),
        (-np.ones(size, np.int8), "mask: expected values of at least 0, got -1"),
        (np.zeros((*size, 3), bool), r"mask: expected an array \[H, W\]"), (np.zeros(size, bool), "mask: it is empty"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            model.encode(mask)
    with pytest.raises(ValueError, match="texts: expected 5, one of each image, got 'apple'"):
        next(model.segment_batch(images, "apple"))
    with pytest.raises(ValueError, match="texts: expected 5, one of each image, got 1"):
        next(model.segment_batch(images, ["apple"]))
    with pytest.raises(TypeError, match="unexpected keyword argument 'lenght'"):
        model.segment(images[0], "apple", lenght=3)
