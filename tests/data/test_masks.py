"""Mask files are read by an explicit rule: what can be read in one way is, what can't is an error that names rules."""

import numpy as np
from PIL import Image
import pytest

from alto_jax.config import ConfigError
from alto_jax.data import bad_data, masks

RNG = np.random.default_rng(0)
DISC = (np.mgrid[:48, :64][0] - 24) ** 2 + (np.mgrid[:48, :64][1] - 32) ** 2 < 225
BAND = np.zeros_like(DISC)
BAND[40:, :40] = True  # another region than the disc
U8 = DISC.astype(np.uint8)


def palette(values: np.ndarray, colours: list[int], **options) -> tuple[Image.Image, dict]:
    image = Image.fromarray(values.astype(np.uint8))
    image.putpalette(colours)
    return image, options


def rgb(*values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.stack(values, -1).astype(np.uint8))


VOC = [0, 0, 0, 128, 0, 0, 0, 128, 0] + [0] * 3 * 252 + [224, 224, 192]
SOFT = np.asarray(Image.fromarray(U8[::2, ::2] * 255).resize((64, 48), Image.Resampling.BICUBIC))

# What can be read in one way only: name → image.
PLAIN = {
    "bit.png": Image.fromarray(DISC),
    "ones.png": Image.fromarray(U8),
    "full.png": Image.fromarray(U8 * 255),
    "id.png": Image.fromarray(U8 * 7),
    "deep.png": Image.fromarray(DISC.astype(np.uint16) * 65535),
    "deep_id.png": Image.fromarray(DISC.astype(np.uint16) * 300),
    "int.tiff": Image.fromarray(DISC.astype(np.int32)),
    "float.tiff": Image.fromarray(DISC.astype(np.float32)),
    "rgb.png": rgb(U8 * 255, U8 * 255, U8 * 255),
    "rgb_ones.png": rgb(U8, U8, U8),
    "blue.png": rgb(U8 * 0, U8 * 0, U8 * 255),
    "opaque.png": rgb(U8 * 255, U8 * 255, U8 * 255, U8 * 0 + 255),
    "agreeing_alpha.png": rgb(U8 * 255, U8 * 255, U8 * 255, U8 * 255),
    "grey_alpha.png": Image.fromarray(np.stack([U8 * 255, U8 * 0 + 255], -1)),
    "palette.png": palette(U8, [0, 0, 0, 255, 255, 255]),
    "palette_red.png": palette(U8, VOC),
    "palette_grey.png": palette(U8 * 255, sum(([i] * 3 for i in range(256)), [])),
    "full.gif": Image.fromarray(U8 * 255),
    "full.bmp": Image.fromarray(U8 * 255),
}
# What can be read in several ways: name → (image, rules that give the disc).
AMBIGUOUS = {
    "ignore.png": (Image.fromarray(U8 + BAND * np.uint8(255)), ("ignore:255", "equals:1")),
    "labels.png": (Image.fromarray(U8 * 3 + BAND * np.uint8(5)), ("equals:3", "ignore:5")),
    "no_zero.png": (Image.fromarray(U8 * 200 + 50), (">127", "equals:250", "colour:fafafa")),
    "trimap.png": (Image.fromarray(U8 * 255 + BAND * np.uint8(128)), ("equals:255", ">128")),
    "ids.png": (
        Image.fromarray(DISC.astype(np.uint16) * 1000 + BAND * np.uint16(2000)),
        ("equals:1000", "ignore:2000"),
    ),
    "levels.tiff": (Image.fromarray(DISC * np.float32(0.75) + BAND * np.float32(0.25)), (">0.5", "equals:0.75")),
    "white_first.png": (palette(~DISC, [255, 255, 255, 0, 0, 0]), ("equals:0", "colour:ffffff", ">127")),
    "void.png": (palette(U8 + BAND * np.uint8(255), VOC), ("ignore:255", "equals:1", "colour:800000")),
    "only_void.png": (palette(U8 * 255, VOC), ("equals:255", "nonzero")),
    "classes.png": (palette(U8 + BAND * np.uint8(2), VOC), ("equals:1", "ignore:2")),
    "alpha.png": (rgb(U8 * 0 + 255, U8 * 0 + 255, U8 * 0 + 255, U8 * 255), ("alpha",)),
    "other_alpha.png": (rgb(U8 * 255, U8 * 255, U8 * 255, BAND * 255), ("nonzero", ">127", "equals:255")),
    "grey_alpha.png": (Image.fromarray(np.stack([U8 * 0 + 255, U8 * 255], -1)), ("alpha",)),
    "clear_palette.png": (palette(~DISC, [9, 9, 9, 9, 9, 9], transparency=bytes([255, 0])), ("alpha", "equals:0")),
    "colours.png": (rgb(BAND * 255, BAND * 255, (DISC | BAND) * 255), ("colour:0000ff",)),
    "inverse.png": (rgb(*[np.where(DISC, 10 * i, 255 - 9 * i) for i in range(3)]), ("colour:000a14",)),
}


def save(folder, name: str, image) -> str:
    image, options = image if isinstance(image, tuple) else (image, {})
    image.save(folder / name, **options)
    return folder / name


@pytest.mark.parametrize("name", PLAIN)
def test_plain_forms_just_work(name, tmp_path):
    mask = masks.open_mask(save(tmp_path, name, PLAIN[name]))
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, DISC * np.uint8(255))


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_ambiguous_forms_name_a_rule_that_reads_them(name, tmp_path):
    image, rules = AMBIGUOUS[name]
    path = save(tmp_path, name, image)
    with pytest.raises(
        bad_data.RecordError, match=f"mask .*{name} can be read in several ways: .*mask_rule: "
    ) as caught:
        masks.open_mask(path)
    assert caught.value.kind == "ambiguous mask"
    assert any(f"'{rule}'" in str(caught.value) for rule in (*rules, "nonzero"))
    for rule in rules:
        np.testing.assert_array_equal(masks.open_mask(path, rule) > 0, DISC, err_msg=rule)


def test_soft_edges_and_jpeg_noise_are_cut_in_the_middle(tmp_path):
    assert len(np.unique(SOFT)) > 20
    wanted = SOFT > 127
    for name, image in {"soft.png": Image.fromarray(SOFT), "rgb.png": rgb(SOFT, SOFT, SOFT),
                        "deep.png": Image.fromarray(SOFT.astype(np.uint16) * 257),
                        "float.tiff": Image.fromarray(SOFT.astype(np.float32) / 255)}.items():  # fmt: skip
        np.testing.assert_array_equal(masks.open_mask(save(tmp_path, name, image)) > 0, wanted, err_msg=name)
    for quality in (30, 75, 95):
        for name, values in (("grey.jpg", U8 * 255), ("rgb.jpg", np.stack([U8 * 255] * 3, -1)), ("soft.jpg", SOFT)):
            Image.fromarray(values).save(tmp_path / name, quality=quality)
            difference = (masks.open_mask(tmp_path / name) > 0) != (SOFT > 127 if name == "soft.jpg" else DISC)
            assert difference.sum() <= 12, (name, quality)
    flat = Image.fromarray((RNG.integers(0, 4, (6, 8)) * 85).astype(np.uint8)).resize(
        (64, 48), Image.Resampling.NEAREST
    )
    photo = Image.fromarray(RNG.integers(0, 255, (48, 64, 3), np.uint8))
    for name, image in (("flat.jpg", flat), ("photo.jpg", photo), ("photo.png", photo), ("flat.png", flat)):
        with pytest.raises(bad_data.RecordError, match="several ways"):
            masks.open_mask(save(tmp_path, name, image))


def test_rules_that_do_not_fit_the_file_are_refused(tmp_path):
    full = save(tmp_path, "full.png", Image.fromarray(U8 * 255))
    coloured = save(tmp_path, "coloured.png", AMBIGUOUS["colours.png"][0])
    deep = save(tmp_path, "deep.png", AMBIGUOUS["ids.png"][0])
    for path, rule, message in (
        (full, "alpha", "transparency"),
        (coloured, ">127", "grey values"),
        (coloured, "equals:1", "one value a pixel"),
        (deep, "colour:000001", "8 bits"),
    ):
        with pytest.raises(bad_data.RecordError, match=f"{path.name}: the rule '{rule}' needs .*{message}"):
            masks.open_mask(path, rule)
    with pytest.raises(
        bad_data.RecordError, match="full.png is empty.* by the rule 'equals:7': it holds values 0, 255"
    ):
        masks.open_mask(full, "equals:7")
    nan = save(tmp_path, "nan.tiff", Image.fromarray(np.full((20, 20), np.nan, np.float32)))
    with pytest.raises(bad_data.RecordError, match="nan.tiff: a value is NaN or infinite"):
        masks.open_mask(nan)


@pytest.mark.parametrize(
    "rule",
    ["", "auto ", "none", ">", ">-1", "> 5", "equals:", "equals:a", "ignore:1,", "colour:12345", "alpha:1", "2", None],
)
def test_a_rule_is_one_of_those_listed(rule):
    with pytest.raises(ConfigError, match="mask_rule: expected auto, nonzero"):
        masks.parse_rule(rule)


def test_empty_missing_and_small_masks_are_named(tmp_path):
    for name, values, message, kind in (
        ("empty.png", np.zeros((20, 20), np.uint8), "empty.png is empty", "empty mask"),
        ("line.png", np.ones((1, 40), np.uint8), "line.png is 40x1; sides must be at least 8", "image too small"),
        ("absent.png", None, "absent.png does not exist", "missing mask"),
    ):
        if values is not None:
            Image.fromarray(values).save(tmp_path / name)
        with pytest.raises(bad_data.RecordError, match=message) as caught:
            masks.open_mask(tmp_path / name)
        assert caught.value.kind == kind
