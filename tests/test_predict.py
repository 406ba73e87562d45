"""`predict` and `tokenize` as commands: the files they write, and the same from Python."""

import json
import shutil

import grain
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

import alto_jax
from alto_jax import predict, report, tokenize
from alto_jax.checkpoint import loading, runs
from alto_jax.config import ConfigError
from alto_jax.data import rle
from alto_jax.data.composition import ScenesConfig
from alto_jax.data.scenes import SceneMasks
from alto_jax.evaluate import tasks
from alto_jax.evaluate.device import Programs
from alto_jax.evaluate.options import EvaluateOptions
from alto_jax.inference import segmenter
from alto_jax.inference.segmenter import Segmenter
from alto_jax.mllm import alto_llm
from alto_jax.mllm import generate as generation
from alto_jax.mllm.generate import Generated
from alto_jax.parallel import sharding
from alto_jax.tokenizer.alto import ALTo
from alto_jax.train.state import TrainState
from tests.conftest import run_python
from tests.golden_models import random_params

HEIGHT, WIDTH = 50, 70
L, CODES = 8, 64


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """An image and a mask that are not square, and the folder that holds them as files."""
    folder = tmp_path_factory.mktemp("scene")
    record = SceneMasks(ScenesConfig(image_size=(HEIGHT, WIDTH), num_scenes=1, split="validation"))[0]
    Image.fromarray(record["image"]).save(folder / "image.png")
    Image.fromarray(record["mask"]).save(folder / "mask.png")
    return folder, record


@pytest.fixture(scope="module")
def run(quickstart, scene, tmp_path_factory):
    """The quickstart's stage 3 with weights that draw: after four steps, answers hold no mask and masks no pixel.

    The mask tokenizer's weights are random; the language model's head is turned so that it begins a mask at
    once (a head without bias can: the hidden state has a component along the column of that token).
    """
    path = tmp_path_factory.mktemp("runs") / "stage3"
    model = loading.load_model(quickstart.path / "stage3")
    size, ids = model.cfg.tokenizer, model.text.ids
    image = np.zeros((1, size.image_size, size.image_size, 3), np.uint8)
    tokenizer = random_params(ALTo(size), np.zeros((1, size.mask_size, size.mask_size), np.float32), image)
    kernel = np.array(model.params["language_model"]["head"]["kernel"])
    for sign in (1, -1):
        turned = kernel.copy()
        turned[:, ids.mask_start], turned[:, ids.im_end] = (sign * s * 40 * kernel.std() for s in (1, -1))
        language_model = {**model.params["language_model"], "head": {"kernel": jnp.asarray(turned)}}
        params = {**model.params, "tokenizer": tokenizer, "language_model": language_model}
        turned_model = Segmenter(model.cfg, params, "", model.text, model.meta["data"])
        if turned_model.segment(scene[1]["image"], "apple", forced_prefix=False).length:
            break
    state = TrainState(step=jnp.int32(1), params=params, frozen={}, opt_state={}, stats={})
    checkpointer = runs.Checkpointer(path)
    data = iter(grain.MapDataset.range(1).to_iter_dataset())
    checkpointer.save(1, state, data, runs.load_meta(quickstart.path / "stage3"))
    checkpointer.close()
    shutil.copy(quickstart.path / "stage3" / "tokenizer.json", path)
    return path


@pytest.fixture(scope="module")
def opened(run) -> Segmenter:
    """The run as a model, whose programs are traced and compiled once for all tests."""
    return alto_jax.load(run)


@pytest.fixture
def opened_once(opened, run, monkeypatch):
    """Commands of this process open the run as `opened`."""

    def load(directory, *options):
        assert str(directory) == str(run)
        return opened

    monkeypatch.setattr(segmenter, "load", load)
    return opened


def command(*arguments):
    done = run_python("-m", *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_predict_writes_what_the_python_call_gives(run, opened, scene, tmp_path):
    folder, record = scene
    out, overlay, file = tmp_path / "mask.png", tmp_path / "overlay.png", tmp_path / "result.json"
    printed = command(
        "alto_jax.predict", "--checkpoint", run, "--image", folder / "image.png", "--text", "the red apple",
        "--length", "5", "--target", folder / "mask.png", "--out", out, "--overlay", overlay, "--json", file,
    )  # fmt: skip
    mask, result = np.asarray(Image.open(out)), json.loads(file.read_text())
    assert mask.shape == (HEIGHT, WIDTH) and mask.dtype == np.uint8 and set(np.unique(mask)) == {0, 255}
    assert set(result) == {"text", "token_ids", "codes", "length", "num_masks", "seconds", "iou", "score",
                           "token_probability", "confidence", "masks"}  # fmt: skip
    assert [one["codes"] for one in result["masks"]] == [result["codes"]]
    assert result["length"] == len(result["codes"]) == 5 and all(0 <= code < CODES for code in result["codes"])
    # The start of the answer is given, and its mask's end is its end.
    assert result["text"].startswith(f"The mask appears at <ALTo_Start><TOK_{result['codes'][0]}>")
    assert result["text"].endswith("<ALTo_End>") and len(result["token_ids"]) > result["length"] + 2
    assert "mask tokens: 5" in printed and f"IoU {result['iou']:.3f}" in printed and result["text"] in printed

    called = opened.segment(record["image"], "the red apple", length=5, target=record["mask"])
    np.testing.assert_array_equal(called.mask, mask > 0)
    np.testing.assert_array_equal(called.mask, called.probability > 0.5)
    same = ("text", "token_ids", "codes", "length", "iou")
    assert {name: result[name] for name in same} == {name: getattr(called, name) for name in same}
    target = record["mask"] > 0
    assert called.iou == pytest.approx((called.mask & target).sum() / (called.mask | target).sum())
    np.testing.assert_array_equal(np.asarray(Image.open(overlay)), report.overlay(record["image"], called.mask))


def main_of(module, monkeypatch, *arguments) -> None:
    monkeypatch.setattr("sys.argv", [module.__name__, *map(str, arguments)])
    assert module.main() == 0


def test_a_users_own_photo_is_turned_upright(run, opened_once, scene, tmp_path, monkeypatch):
    _, record = scene
    exif = Image.Exif()
    exif[0x0112] = 6
    photo, out, file = tmp_path / "photo.png", tmp_path / "mask.png", tmp_path / "result.json"
    Image.fromarray(np.rot90(record["image"])).save(photo, exif=exif)  # upright it is the scene's image
    Image.fromarray(record["mask"]).save(tmp_path / "drawn.png")
    model = opened_once
    wanted = model.segment(record["image"], "apple", length=3, target=record["mask"])
    arguments = ["--checkpoint", run, "--image", photo, "--text", "apple", "--length", 3, "--out", out, "--json", file]
    main_of(predict, monkeypatch, *arguments, "--target", tmp_path / "drawn.png")
    np.testing.assert_array_equal(np.asarray(Image.open(out)) > 0, wanted.mask)
    assert json.loads(file.read_text())["iou"] == wanted.iou
    for image in (photo, str(photo), Image.open(photo)):
        np.testing.assert_array_equal(model.segment(image, "apple", length=3).mask, wanted.mask)

    main_of(predict, monkeypatch, *arguments, "--exif", "stored")
    stored = model.segment(np.ascontiguousarray(np.rot90(record["image"])), "apple", length=3)
    assert np.asarray(Image.open(out)).shape == (WIDTH, HEIGHT)
    np.testing.assert_array_equal(np.asarray(Image.open(out)) > 0, stored.mask)

    code = {"codes": wanted.codes, "size": [HEIGHT, WIDTH]}
    (tmp_path / "codes.json").write_text(json.dumps(code))
    decode = ["decode", "--checkpoint", run, "--codes", tmp_path / "codes.json", "--image", photo, "--out", out]
    main_of(tokenize, monkeypatch, *decode)
    drawn = model.decode(wanted.codes, (HEIGHT, WIDTH), record["image"])
    np.testing.assert_array_equal(np.asarray(Image.open(out)) > 0, drawn)
    np.testing.assert_array_equal(model.decode(wanted.codes, (HEIGHT, WIDTH), photo), drawn)


def test_a_users_own_mask_is_read_by_a_rule(run, opened_once, scene, tmp_path, monkeypatch):
    folder, record = scene
    mask = record["mask"] > 0
    ignored = np.where(mask, 1, 0).astype(np.uint8)
    ignored[-5:] = 255
    mask[-5:] = False
    Image.fromarray(ignored).save(tmp_path / "ignore.png")
    encode = ["encode", "--checkpoint", run, "--mask", tmp_path / "ignore.png", "--out", tmp_path / "codes.json"]
    ask = ["--checkpoint", run, "--image", folder / "image.png", "--text", "apple", "--target", tmp_path / "ignore.png"]
    for module, arguments in ((tokenize, encode), (predict, ask)):
        with pytest.raises(
            ValueError, match=r"ignore.png can be read in several ways: values 0, 1, 255; .*'ignore:255'"
        ):
            main_of(module, monkeypatch, *arguments)
        with pytest.raises(ValueError, match="--mask_rule: expected auto, nonzero.*got 'grey'"):
            main_of(module, monkeypatch, *arguments, "--mask_rule", "grey")
    model = opened_once
    main_of(tokenize, monkeypatch, *encode, "--mask_rule", "ignore:255")
    assert json.loads((tmp_path / "codes.json").read_text())["codes"] == model.encode(mask)
    main_of(predict, monkeypatch, *ask, "--mask_rule", "equals:1", "--json", tmp_path / "result.json", "--length", 2)
    wanted = model.segment(record["image"], "apple", length=2, target=mask).iou
    assert json.loads((tmp_path / "result.json").read_text())["iou"] == wanted


def test_files_that_no_decoder_takes_end_with_one_line(run, tmp_path):
    (tmp_path / "truncated mask.jpg").write_bytes(b"\xff\xd8\xff\xe1\x00\x08Exif\0\0" + bytes(40))
    for arguments in (
        ["alto_jax.predict", "--image", tmp_path / "truncated mask.jpg", "--text", "apple"],
        ["alto_jax.tokenize", "encode", "--mask", tmp_path / "truncated mask.jpg", "--out", tmp_path / "x.json"],
    ):
        done = run_python("-m", *arguments, "--checkpoint", run)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert done.stderr.startswith("error: ") and "truncated mask.jpg cannot be read: " in done.stderr


def test_length_and_prompt_of_the_call(opened, scene):
    model, image = opened, scene[1]["image"]
    assert model.segment(image, "apple", length="full").length == L
    assert 1 <= model.segment(image, "apple").length <= L
    one = model.segment(image, "apple", length=1)
    assert one.length == 1
    # A question of one's own, or whoever says so, gets the answer that the model gives: here it begins a mask at once.
    for free in (
        model.segment(image, prompt="Where is it?", length=1),
        model.segment(image, "x", length=1, forced_prefix=False),
    ):
        assert free.length == 1 and free.text.startswith("<ALTo_Start>")
    assert model.segment(image, prompt="Where is it?", forced_prefix=True).text.startswith(
        "The mask appears at <ALTo_Start>"
    )
    with pytest.raises(ValueError, match=r"image: expected uint8\[H, W, 3\], got float64"):
        model.segment(image / 255.0, "apple")
    with pytest.raises(ValueError, match=r"target: expected the image's size \(50, 70\), got \(70, 50\)"):
        model.segment(image, "apple", target=np.ones((WIDTH, HEIGHT)))


def test_an_answer_without_a_mask_gives_an_empty_one(quickstart, scene):
    """The quickstart's own checkpoint has not learned to begin a mask in four steps."""
    result = alto_jax.load(quickstart.path / "stage3").segment(
        scene[1]["image"], "apple", target=scene[1]["mask"], forced_prefix=False
    )
    assert result.length == 0 and result.codes == [] and not result.mask.any() and result.iou == 0


def answer_of(monkeypatch, model, *masks):
    """The ids of an answer with these masks, which the model gives from now on to whoever lets it choose the start."""
    ids, written = model.text.ids, []
    for codes in masks:
        written += [ids.mask_start, *(ids.code_0 + c for c in codes), ids.mask_end]
    written.append(ids.im_end)

    def advance(language_model, params, given, state, cfg, special, until):
        rows, end = state.ids.shape[0], jnp.arange(state.ids.shape[1]) < jnp.minimum(until, len(written))
        row = jnp.zeros(state.ids.shape[1], jnp.int32).at[: len(written)].set(jnp.array(written))
        done = jnp.full(rows, until >= len(written))
        return state.replace(ids=jnp.tile(row, (rows, 1)), mask=jnp.tile(end, (rows, 1)), step=until, done=done)

    begin = generation.begin

    def first(language_model, cfg, special, count, params, *given):
        given, state = begin(language_model, cfg, special, count, params, *given)
        return given, advance(language_model, params, given, state, cfg, special, jnp.int32(1))

    monkeypatch.setattr(generation, "begin", first)
    monkeypatch.setattr(generation, "advance", advance)
    return written


def test_an_answer_with_several_masks_gives_all(debug_model, scene, tmp_path, monkeypatch):
    """In prediction and its files; evaluation takes the first."""
    model, image = alto_jax.load(debug_model.path), scene[1]["image"]
    answer = answer_of(monkeypatch, model, [5, 7], [9])

    def generate(language_model, params, inputs, prompt_mask, cfg, special, rng, num_samples=None, **kwargs):
        rows = (
            (len(inputs),)
            if "questions" not in kwargs or kwargs["questions"] is None
            else kwargs["questions"].mask.shape[:2]
        )
        row = jnp.broadcast_to(jnp.array(answer, jnp.int32), (*rows, len(answer)))
        return Generated(row, row >= 0, jnp.zeros(row.shape), jnp.zeros(row.shape), jnp.int32(len(answer)))

    monkeypatch.setattr(alto_llm, "generate", generate)
    found = model.segment(image, "apple", forced_prefix=False)
    assert found.num_masks == 2 and found.codes == [5, 7] and found.length == 2
    assert found.to_json()["num_masks"] == 2
    # The probability of the first mask alone, not that of no codes.
    wanted = [model.decode(codes, image.shape[:2], image) for codes in ([5, 7], [9])]
    np.testing.assert_array_equal(found.mask, wanted[0])
    assert found.mask.any() and (found.mask != wanted[1]).any()
    assert [one.codes for one in found.masks] == [[5, 7], [9]] and [one.length for one in found.masks] == [2, 1]
    np.testing.assert_array_equal(found.masks, wanted)
    assert found.masks[0].confidence == found.confidence > 0 and found.masks[1].confidence > 0
    np.testing.assert_array_equal(found.overlay(image), report.overlay(report.overlay(image, wanted[0]), wanted[1]))
    told = found.to_json()["masks"]
    assert [one["codes"] for one in told] == [[5, 7], [9]]
    np.testing.assert_array_equal([rle.decode(one["rle"], *image.shape[:2], "test") for one in told], wanted)
    # Streamed and in a conversation likewise.
    *growing, last = model.stream(image, "apple", forced_prefix=False)
    shown = [(event.mask_index, event.length) for event in growing if event.mask is not None]
    assert shown == [(0, 1), (0, 2), (1, 1)] and [e.token_id for e in growing] == answer
    np.testing.assert_array_equal([growing[2].mask, growing[5].mask], wanted)
    assert growing[5].change == wanted[1].mean() and last.answer.num_masks == 2
    said = model.chat([{"role": "user", "content": "Both?", "image": image}])
    np.testing.assert_array_equal(said.masks, wanted)
    assert said.text == found.text == "<ALTo_Start><TOK_5><TOK_7><ALTo_End><ALTo_Start><TOK_9><ALTo_End>"

    monkeypatch.setattr(segmenter, "load", lambda *arguments: model)
    monkeypatch.setattr(predict, "describe", lambda *arguments: {"stage": "stage2", "model": {"tokenizer": {
        "num_latent_tokens": L}}})  # fmt: skip
    out = tmp_path / "mask.png"
    given = ("--checkpoint", "x", "--image", scene[0] / "image.png", "--text", "apple", "--no-forced_prefix")
    main_of(predict, monkeypatch, *given, "--out", out)
    files = [np.asarray(Image.open(file)) > 0 for file in (out, tmp_path / "mask_2.png")]
    np.testing.assert_array_equal(files, wanted)

    options = EvaluateOptions(debug_model.path, ["scenes"], "", "", scenes=1)
    programs = Programs(sharding.make_mesh(sharding.MeshConfig(1, 1, 1), jax.devices()[:1]))
    [task] = tasks.make_tasks(options, model.cfg, model.params, model.text, model.system, programs)
    example = task.example(0)
    line = task.line(example, task.answer([example]), 0)
    assert line["valid"] and line["length"] == 2 and line["num_masks"] == 2 and line["predicted_pixels"] > 0


def test_tokenize_there_and_back(run, opened, scene, tmp_path):
    folder, record = scene
    codes, out = tmp_path / "codes.json", tmp_path / "mask.png"
    common = ("--checkpoint", run, "--out")
    command("alto_jax.tokenize", "encode", "--mask", folder / "mask.png", "--length", "6", *common, codes)
    saved = json.loads(codes.read_text())
    assert saved["size"] == [HEIGHT, WIDTH] and saved["length"] == len(saved["codes"]) == 6
    printed = command("alto_jax.tokenize", "decode", "--codes", codes, "--image", folder / "image.png", *common, out)
    mask = np.asarray(Image.open(out))
    assert mask.shape == (HEIGHT, WIDTH) and set(np.unique(mask)) == {0, 255}
    assert f"{(mask > 0).sum()} pixels of {WIDTH}x{HEIGHT}" in printed

    model = opened
    assert model.encode(record["mask"], 6) == saved["codes"]
    assert model.encode(record["mask"], "full")[:6] == saved["codes"] and len(model.encode(record["mask"], "full")) == L
    assert model.encode(record["mask"]) == model.encode(record["mask"], "full")[: len(model.encode(record["mask"]))]
    np.testing.assert_array_equal(model.decode(saved["codes"], (HEIGHT, WIDTH), record["image"]), mask > 0)
    # The image and every code have a say in the result.
    assert (model.decode(saved["codes"], (HEIGHT, WIDTH)) != (mask > 0)).any()
    assert (model.decode(saved["codes"][:5], (HEIGHT, WIDTH), record["image"]) != (mask > 0)).any()


@pytest.mark.parametrize("kind", [int, np.int8, np.int32, np.int64, np.uint16])
def test_any_integer_is_a_length(kind, opened, scene):
    assert len(opened.encode(scene[1]["mask"], kind(3))) == 3
    result = opened.segment(scene[1]["image"], "apple", length=kind(2), max_new_tokens=kind(20))
    assert result.length == 2
    codes = [kind(code) for code in result.codes if code < 100] or [kind(1)]
    assert opened.decode(codes, (kind(5), kind(7))).shape == (5, 7)


def test_lengths_codes_and_sizes_that_are_none(opened, scene):
    model, image = opened, scene[1]["image"]
    for length in (0, -1, L + 1, True, False, np.True_, 1.5, np.float32(2), "3", "²", "", None, [3], np.array([3])):
        message = r"length: expected 'adaptive', 'full' or a whole number in 1..8"
        with pytest.raises(ValueError, match=message):
            model.segment(image, "apple", length=length)
        with pytest.raises(ValueError, match=message):
            model.encode(scene[1]["mask"], length)
    for name, most in (("max_length", L), ("min_length", L), ("max_new_tokens", 65536)):
        for value in (0, -1, most + 1, True, 1.5, "3"):
            with pytest.raises(ValueError, match=f"{name}: expected a whole number in 1..{most}, got"):
                model.segment(image, "apple", **{name: value})
    for bias in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="end_bias: expected a finite number"):
            model.segment(image, "apple", end_bias=bias)
    for code in (-1, CODES, 1.5, True, "1"):
        with pytest.raises(ValueError, match=rf"codes: expected values in 0..{CODES - 1}, got"):
            model.decode([1, code], (5, 7))
    for size in ((0, 5), (5,), (5, 7, 3), (10**6, 5), (5.5, 7), (True, 7)):
        with pytest.raises(ValueError, match="size: expected height and width in 1..16384"):
            model.decode([1], size)


def test_commands_check_before_they_load(run, scene, quickstart, tmp_path, monkeypatch):
    """Each refusal comes before a parameter is read."""
    folder = scene[0]
    image, mask = str(folder / "image.png"), str(folder / "mask.png")
    codes = tmp_path / "codes.json"
    codes.write_text('{"codes": [1], "size": [5, 7]}')
    monkeypatch.setattr(segmenter, "load", lambda *arguments: pytest.fail("loaded"))
    ask = ["--checkpoint", str(run), "--image", image, "--text", "apple"]
    encode = ["encode", "--checkpoint", str(run), "--mask", mask, "--out", str(tmp_path / "a.json")]
    lengths = [("²", "expected adaptive, full or a whole number of at least 1"), ("0", "expected adaptive"),
               ("-1", "expected adaptive"), ("1.5", "expected adaptive"), ("", "expected adaptive"),
               ("9", r"the model of .* has 8 mask tokens at most"), ("True", "expected adaptive"),
               ("9" * 30, "expected adaptive")]  # fmt: skip
    for value, match in lengths:
        for module, rest in ((predict, ask), (tokenize, encode)):
            with pytest.raises(ConfigError, match=f"--length={value}: {match}"):
                call(monkeypatch, module, *rest, "--length", value)
    steps = r"--step=7: .* has the steps 1"
    torch_folder = tmp_path / "hf"
    torch_folder.mkdir()
    (torch_folder / "model.safetensors").write_bytes(b"x")
    refused = [
        (predict, [*ask, "--step", "7"], ConfigError, steps),
        (tokenize, [*encode, "--step", "7"], ConfigError, steps),
        (predict, [*ask, "--max_length", "9"], ConfigError, "--max_length=9: expected 1..8"),
        (predict, [*ask, "--max_length", "0"], ConfigError, "--max_length=0: expected 1..8"),
        (predict, [*ask, "--end_bias", "nan"], ConfigError, "--end_bias=nan: expected a finite number"),
        (predict, [*ask, "--out", str(tmp_path / "none" / "a.png")], ConfigError, "there is no folder"),
        (predict, [*ask, "--out", image], ConfigError, "the same file as --image"),
        (predict, [*ask, "--json", str(tmp_path / "a.png")], ConfigError, "expected a name that ends in .json"),
        (predict, [*ask[:-1], "?!"], ConfigError, "--text='\\?!': expected the name"),
        (predict, [*ask, "--prompt", " "], ConfigError, "--prompt=' ': expected a question"),
        (predict, ["--checkpoint", str(quickstart.path / "stage1"), *ask[2:]], ConfigError, "a mask tokenizer alone"),
        (predict, ["--checkpoint", str(torch_folder), *ask[2:]], FileNotFoundError, "import it first: python -m tools"),
        (tokenize, [*encode[:-1], mask], ConfigError, "expected a name that ends in .json"),
        (tokenize, ["decode", "--checkpoint", str(run), "--codes", str(codes), "--out", str(codes)], ConfigError,
         "expected a name that ends in .png"),
    ]  # fmt: skip
    for module, arguments, error, match in refused:
        with pytest.raises(error, match=match):
            call(monkeypatch, module, *arguments)
    assert json.loads(codes.read_text())["codes"] == [1] and np.asarray(Image.open(image)).shape == (HEIGHT, WIDTH, 3)


def call(monkeypatch, module, *arguments):
    """Runs a command in this process."""
    monkeypatch.setattr("sys.argv", [module.__name__, *arguments])
    return module.main()


def test_a_step_to_choose(run, scene, tmp_path):
    """Of a run with two steps; the older one is another model."""
    both = tmp_path / "run"
    shutil.copytree(run, both)
    shutil.copytree(both / "checkpoints" / "1", both / "checkpoints" / "2")
    assert alto_jax.load(both, step=1).encode(scene[1]["mask"], 4) == alto_jax.load(both).encode(scene[1]["mask"], 4)
    with pytest.raises(ConfigError, match=r"--step=3: .* has the steps 1, 2"):
        alto_jax.load(both, step=3)


def test_a_tokenizer_alone_opens_too(quickstart, scene):
    model = alto_jax.load(quickstart.path / "stage1_5")
    assert not isinstance(model, Segmenter)
    assert 1 <= len(model.encode(scene[1]["mask"])) <= L
