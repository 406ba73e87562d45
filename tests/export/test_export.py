"""Exported programs, run where alto_jax cannot be imported, give what the library gives; what does not fit is named."""

import dataclasses
import importlib.util
import json
import pathlib
import shutil
import subprocess
import sys
import types

import jax
from jax import export
import numpy as np
import pytest
from safetensors.numpy import load_file

import alto_jax
from alto_jax import metrics
from alto_jax.checkpoint import loading
from alto_jax.config import ConfigError
from alto_jax.data import transforms
from alto_jax.export import __main__ as command
from alto_jax.export import loader, programs, writing
from alto_jax.mllm import text as words

PREFIX = words.FORCED_ANSWER_PREFIX
PHRASES = {"adaptive": "the red thing", "full": "a zebra", 5: "the red thing"}
# A process in which only what the loader needs can be imported, of what stands in these packages.
ALONE = """
import importlib.abc, sys

class Refused(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("alto_jax", "flax", "PIL", "safetensors", "ml_collections", "orbax"):
            raise ImportError(f"{name} is refused")

sys.meta_path.insert(0, Refused())
try:
    import alto_jax
    raise SystemExit("alto_jax was imported")
except ImportError:
    pass
sys.path.insert(0, sys.argv[1])
import alto_loader
import jax
from jax import export
import numpy as np

model, given, out = alto_loader.load(sys.argv[1]), np.load(sys.argv[2]), {}
image, mask = given["image"], given["mask"]
out["codes"] = model.encode(mask)
out["three"] = model.encode(mask, 3)
out["decoded"] = model.decode(out["codes"], mask.shape, image)
out["without"] = model.decode(out["codes"], mask.shape)
for length, phrase in PHRASES.items():
    answer = model.segment(image, model.prompt(phrase, full=length == "full"), length=length)
    out |= {f"{length} {field}": getattr(answer, field) for field in ("mask", "probability", "codes", "token_ids")}
assert not [name for name in sys.modules if name.split(".")[0] in ("alto_jax", "flax", "PIL")]
np.savez(sys.argv[3], **out)
"""


@pytest.fixture(scope="module")
def scene():
    image = np.random.default_rng(0).integers(0, 256, (97, 131, 3), np.uint8)
    mask = np.zeros((97, 131), bool)
    mask[20:60, 30:90] = mask[70:90, 5:20] = True
    image[mask] = (220, 40, 30)
    return types.SimpleNamespace(image=image, mask=mask)


@pytest.fixture(scope="module")
def exported(debug_model, tmp_path_factory):
    """The debug model's export, for platforms that are not here too."""
    out = tmp_path_factory.mktemp("exported") / "out"
    loaded = loading.load_model(debug_model.path, for_inference=True)
    manifest = writing.export_model(loaded, out)
    return types.SimpleNamespace(out=out, manifest=manifest, loaded=loaded, checkpoint=debug_model.path)


def open_copy(folder):
    """The loader that lies in an export."""
    spec = importlib.util.spec_from_file_location("alto_loader_copy", folder / writing.LOADER)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.load(folder), module.ExportError


def test_without_the_library_as_with_it(exported, scene, tmp_path):
    np.savez(tmp_path / "in.npz", image=scene.image, mask=scene.mask)
    script = ALONE.replace("PHRASES", repr(PHRASES))
    words = [sys.executable, "-c", script, exported.out, tmp_path / "in.npz", tmp_path / "out.npz"]
    done = subprocess.run([str(w) for w in words], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found, model = np.load(tmp_path / "out.npz"), alto_jax.load(exported.checkpoint)
    codes = model.encode(scene.mask)
    assert found["codes"].tolist() == codes and found["three"].tolist() == model.encode(scene.mask, 3)
    np.testing.assert_array_equal(found["decoded"], model.decode(codes, scene.mask.shape, scene.image))
    np.testing.assert_array_equal(found["without"], model.decode(codes, scene.mask.shape))
    assert (found["decoded"] != found["without"]).any()
    for length, phrase in PHRASES.items():
        answer = model.segment(scene.image, phrase, length=length)
        prefix = len(answer.token_ids) - len(found[f"{length} token_ids"])
        assert found[f"{length} token_ids"].tolist() == answer.token_ids[prefix:]
        assert found[f"{length} codes"].tolist() == answer.codes and answer.length
        np.testing.assert_allclose(found[f"{length} probability"], answer.probability, atol=1e-5)
        near = np.abs(answer.probability - 0.5) < 1e-5
        assert ((found[f"{length} mask"] == answer.mask) | near).all()
    assert found["adaptive codes"].tolist() != found["full codes"][: len(found["adaptive codes"])].tolist()


def test_the_manifest_says_what_is_there(exported):
    manifest = json.loads((exported.out / "manifest.json").read_text(encoding="utf-8"))
    assert manifest == json.loads(json.dumps(exported.manifest))
    assert manifest["platforms"] == ["cpu", "cuda", "tpu"] and manifest["checkpoint"] == exported.loaded.identity
    stored = load_file(exported.out / "weights.safetensors")
    programs = manifest["programs"]
    assert list(programs) == ["encode", "decode", "decode_with_image", "segment"]
    assert set(stored) == {name for about in programs.values() for name in about["weights"]}
    assert not any("encoder/" in name and "sam" not in name for name in programs["decode_with_image"]["weights"])
    assert not any(name.startswith(("vision", "language")) for name in programs["encode"]["weights"])
    side = manifest["model"]["mask_size"]
    assert programs["encode"]["inputs"] == [{"name": "mask", "shape": ["b", side, side], "dtype": "float32"}]
    assert programs["decode"]["outputs"] == [{"name": "probability", "shape": ["b", side, side], "dtype": "float32"}]
    # Weights stand beside the programs, not in them.
    assert (exported.out / "segment.stablehlo").stat().st_size < (exported.out / "weights.safetensors").stat().st_size
    copy = (exported.out / writing.LOADER).read_text()
    assert copy == pathlib.Path(loader.__file__).read_text()


def test_prompts_are_the_librarys(exported):
    model, _ = open_copy(exported.out)
    text, count = exported.loaded.text, exported.loaded.cfg.num_image_tokens
    for phrase, full in (("the red thing", False), ("a {} b", True), ("<box>[[0,10,500,1000]]</box>", False)):
        question = words.question(phrase, adaptive=not full)
        wanted = words.render_prompt(text, question, count, exported.loaded.meta["data"]["system"], PREFIX)
        assert model.prompt(phrase, full=full) == wanted


def test_any_number_of_rows(exported, scene):
    model, _ = open_copy(exported.out)
    side = exported.manifest["model"]["mask_size"]
    masks = np.stack([transforms.soft_mask(m.astype(np.uint8) * 255, side) for m in (scene.mask, ~scene.mask)])
    both = model.call("encode", masks)
    for row, mask in enumerate(masks):
        one = model.call("encode", mask[None])
        np.testing.assert_array_equal(one["codes"][0], both["codes"][row])
    assert both["codes"].shape == (2, exported.manifest["model"]["num_latent_tokens"])


def test_resizing_is_pillows():
    rng = np.random.default_rng(0)
    for shape in ((97, 131), (300, 50), (64, 64), (20, 700), (9, 8)):
        image = rng.integers(0, 256, (*shape, 3), np.uint8)
        for side in (33, 64, 128):
            np.testing.assert_array_equal(loader.squash(image, side), transforms.squash(image, side))
        mask = np.zeros(shape, np.uint8)
        mask[3:5, 4:5] = 255  # so small that it would vanish, at some of the sizes
        np.testing.assert_array_equal(loader.soft_mask(mask, 16), transforms.soft_mask(mask, 16))
        probability = rng.random((64, 64)).astype(np.float32)
        wanted = metrics.resize_probability(probability, *shape)
        np.testing.assert_allclose(loader.resize_probability(probability, *shape), wanted, atol=1e-6)


def test_weights_of_every_type_come_back(tmp_path):
    arrays = {name: np.arange(6).reshape(2, 3).astype(dtype) for name, dtype in loader.DTYPES.items()}
    arrays["one"] = np.float32(3)
    writing._write_weights(tmp_path / "w.safetensors", arrays)
    found = loader.read_safetensors(tmp_path / "w.safetensors")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    content = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(content[:-1])
    with pytest.raises(loader.ExportError, match="w.safetensors: cannot be read: its size is not"):
        loader.read_safetensors(tmp_path / "w.safetensors")


def test_arguments_that_do_not_fit_are_named(exported, scene, monkeypatch):
    model, error = open_copy(exported.out)
    side, tokens = exported.manifest["model"]["mask_size"], exported.manifest["model"]["num_latent_tokens"]
    refused = [
        (lambda: model.call("encod", 1), "no program 'encod'; it has encode, decode"),
        (lambda: model.call("encode"), "encode: expected mask, got 0 arrays"),
        (lambda: model.call("encode", np.zeros((1, side, side))), rf"mask: expected float32\[b, {side}, {side}\], got"),
        (lambda: model.call("decode", np.zeros((2, tokens), np.int32), np.zeros(1, np.int32)), r"got int32\[1\]"),
        (lambda: model.encode(np.zeros((9, 9), bool)), "mask: expected an array"),
        (lambda: model.encode(np.full((9, 9), 0.2)), "mask: expected bool or integers of at least 0, got float64"),
        (lambda: model.encode(np.full((9, 9), -1)), "mask: expected bool or integers of at least 0, got int64"),
        (lambda: model.encode(scene.mask, 99), r"length: expected 'adaptive', 'full' or a whole number in 1\.\."),
        (lambda: model.decode([9999], (9, 9)), r"codes: expected 1\.\.\d+ codes in 0\.\.\d+, got \[9999\]"),
        (lambda: model.decode([1], (9, 9), np.zeros((9, 9))), r"image: expected uint8\[H, W, 3\]"),
        (lambda: model.decode([1.5], (9, 9)), r"codes: expected 1\.\.\d+ codes in 0\.\.\d+, got \[1.5\]"),
        (lambda: model.decode(5, (9, 9)), r"codes: expected 1\.\.\d+ codes in 0\.\.\d+, got 5"),
        (lambda: model.decode([[1], [1, 2]], (9, 9)), r"codes: expected 1\.\.\d+ codes in 0\.\.\d+, got \[\[1\]"),
        (lambda: model.decode([1], (0, 9)), r"size: expected \(height, width\) in 1\.\.16384, got \(0, 9\)"),
        (lambda: model.decode([1], scene.image.shape), r"size: expected \(height, width\).* got \(97, 131, 3\)"),
        (lambda: model.decode([1], 9), r"size: expected \(height, width\)"),
        (lambda: model.prompt(3), "phrase: expected the name .* got 3"),
        (lambda: model.segment(scene.image, "the cup"), "prompt_ids: expected token ids, .* got 'the cup'"),
        (lambda: model.segment(scene.image, [1.5]), "prompt_ids: expected token ids, .* got"),
        (lambda: model.segment(scene.image, [-1]), "prompt_ids: expected token ids, .* got"),
        (lambda: model.segment(scene.image, [1], min_length=1.5), "expected 1 <= min <= max <= .*, got 1.5, "),
        (lambda: model.segment(scene.image, [1], max_length="2"), "expected 1 <= min <= max <= .*, got 1, '2'"),
        (lambda: model.segment(scene.image, [1], end_bias=float("nan")), "end_bias: expected a finite number, got nan"),
        (lambda: model.segment(scene.image, [1], end_bias=None), "end_bias: expected a finite number, got None"),
        (lambda: model.prompt(" ."), "phrase: expected the name"),
        (lambda: model.prompt("a <IMG_CONTEXT>"), "phrase: the special token '<IMG_CONTEXT>'"),
        (lambda: model.segment(scene.image, [1] * 9999), r"prompt_ids: expected 1\.\.\d+ ids, .*got 9999"),
        (lambda: model.segment(scene.image, [1], max_length=0), "expected 1 <= min <= max"),
    ]  # fmt: skip
    for ask, message in refused:
        with pytest.raises(error, match=message):
            ask()
    # Integers of every type are what they are.
    assert model.encode(scene.mask, np.int64(3)) == model.encode(scene.mask, 3)
    codes = model.encode(scene.mask, 3)
    for same in (np.array(codes, np.uint16), jax.numpy.array(codes), tuple(codes)):
        np.testing.assert_array_equal(model.decode(same, np.array([9, 9])), model.decode(codes, (9, 9)))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    copy, error = open_copy(exported.out)
    with pytest.raises(error, match="pip install tokenizers"):
        copy.prompt("the cup")


def test_damaged_exports_are_named(exported, scene, tmp_path):
    def spoiled(change):
        folder = tmp_path / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(exported.out, folder)
        change(folder)
        return folder

    def other_format(folder):
        (folder / "manifest.json").write_text(json.dumps(exported.manifest | {"format": 2}))

    changes = [
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json: cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json: cannot be read"),
        (other_format, "manifest.json: format 2; this loader reads 1"),
        (lambda folder: (folder / "encode.stablehlo").write_bytes(b"x"), "encode.stablehlo: damaged"),
        (lambda folder: (folder / "encode.stablehlo").unlink(), "encode.stablehlo: No such file"),
        (lambda folder: (folder / "weights.safetensors").write_bytes(b"x" * 9), "weights.safetensors: cannot be read"),
    ]
    for change, message in changes:
        folder = spoiled(change)
        with pytest.raises(loader.ExportError, match=message):
            loader.load(folder).encode(scene.mask)
    for change in (
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: (folder / "tokenizer.json").write_text("{"),
    ):
        folder = spoiled(change)
        with pytest.raises(loader.ExportError, match="tokenizer.json: cannot be read"):
            loader.load(folder).prompt("the cup")


def test_a_mask_tokenizer_alone(exported, tmp_path, monkeypatch):
    every = programs.tokenizer_programs
    monkeypatch.setattr(programs, "tokenizer_programs", lambda cfg: every(cfg)[:1])  # Note: one is enough here.
    alone = dataclasses.replace(exported.loaded, text=None)
    manifest = writing.export_model(alone, tmp_path / "out", ["tpu"])
    assert list(manifest["programs"]) == ["encode"] and "prompt" not in manifest
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    model = loader.load(tmp_path / "out")
    side = manifest["model"]["mask_size"]
    with pytest.raises(loader.ExportError, match="exported for tpu, but this machine has cpu"):
        model.encode(np.ones((side, side), bool))
    with pytest.raises(loader.ExportError, match="a mask tokenizer alone"):
        model.prompt("the cup")
    with pytest.raises(loader.ExportError, match="a mask tokenizer alone"):
        model.segment(np.zeros((9, 9, 3), np.uint8), [1, 2])
    # JAX calls the GPUs of every maker so.
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(platform="gpu")])
    with pytest.raises(loader.ExportError, match="exported for tpu, but this machine has gpu"):
        model.encode(np.ones((side, side), bool))
    for platform in ("cuda", "rocm"):
        program = types.SimpleNamespace(platforms=("cpu", platform))
        monkeypatch.setattr(export, "deserialize", lambda content, program=program: program)
        assert model._read_program(manifest["programs"]["encode"]) is program


@pytest.mark.parametrize(
    "options, message",
    [
        (["--platforms", "cpu,gpu"], r"--platforms=cpu,gpu: expected some of cpu, cuda, rocm, tpu, got \['gpu'\]"),
        (["--platforms", ","], "--platforms=: expected some of cpu, cuda, rocm, tpu, got none"),
        (["--prompt_tokens", "0"], "--prompt_tokens=0: expected at least 1"),
        (["--out", "EXPORTED"], "holds manifest.json already"),
        (["--out", "gs://bucket/out"], "--out: expected a path on this machine"),
        (["--step", "7"], "step"),
    ],
)
def test_wrong_requests(options, message, exported, tmp_path, monkeypatch):
    words = [str(exported.out) if word == "EXPORTED" else word for word in options]
    out = [] if "--out" in words else ["--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["export", "--checkpoint", str(exported.checkpoint), *words, *out])
    monkeypatch.setattr(loading, "load_model", lambda *a, **k: exported.loaded)
    with pytest.raises(ConfigError, match=message):
        command.main()
    assert not (tmp_path / "out").exists()


def test_without_flatbuffers_it_says_so(exported, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(ConfigError, match=r"pip install 'alto_jax\[export\]'"):
        writing.export_model(exported.loaded, tmp_path / "out")
