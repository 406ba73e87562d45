"""The checkpoint that comes with the package: its size, that it opens by name, and that its tokenizer can draw."""

import dataclasses

import numpy as np
import pytest

import alto_jax
from alto_jax.checkpoint import packed
from alto_jax.data.scenes import SceneMasks
from experiments import tokens

FOLDER = packed.ASSETS / "alto-tiny"


@pytest.fixture(scope="module")
def model():
    return alto_jax.load("alto-tiny")


def test_it_is_small_and_has_a_card():
    assert packed.shipped() == ["alto-tiny"]
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 24e6
    assert "CC BY-SA 4.0" in (FOLDER / "README.md").read_text()


def test_masks_there_and_back(model):
    source = SceneMasks(dataclasses.replace(tokens.SCENES, num_scenes=8), tokens.MASKS)
    found = []
    for index in range(len(source)):
        record = source[index]
        target = record["mask"] > 0
        short, long = (model.encode(record["mask"], length) for length in (1, "full"))
        for codes in (short, long):
            mask = model.decode(codes, target.shape, record["image"])
            found.append((mask & target).sum() / (mask | target).sum())
    one, all_of_them = np.reshape(found, (-1, 2)).mean(0)
    assert all_of_them > 0.65 and all_of_them > one + 0.1


def test_an_answer_is_a_mask(model):
    source = SceneMasks(dataclasses.replace(tokens.SCENES, num_scenes=1))
    result = model.segment(source[0]["image"], "the red thing")
    assert result.mask.shape == (128, 128) and 1 <= result.length == len(result.codes) <= 32
