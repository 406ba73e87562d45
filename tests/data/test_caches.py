"""Cached SAM features and mask tokens: what would be computed, used in training, refused with another tokenizer."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import time

import jax
import ml_dtypes
import numpy as np
import pytest

from alto_jax.checkpoint import loading, rows, runs
from alto_jax.config import ConfigError
from alto_jax.data import caches, prepare, sources, vocabulary
from alto_jax.data.caches import CacheMaker
from alto_jax.data.mixture import Mixture
from alto_jax.data.prepared import Prepared
from alto_jax.mllm.alto_llm import ALToLLM
from alto_jax.parallel import sharding
from alto_jax.tokenizer.alto import ALTo
from tests.data.test_prepare import NONE, digest
from tests.forking import SERVER
from tests.one_step import one_step_program  # noqa: F401 - a fixture

SIZES = {"vision_size": 56, "image_size": 64, "mask_size": 32}
NUM = 16  # one of them without a mask


def job(model, name="scene_chats", sizes=SIZES, features=True, tokens=True):
    found = prepare.open_source(name, "", seed=0, protocol="joined", images=None, draws=1, num=NUM)
    maker = CacheMaker(found[1], sizes, str(model) if features else "", str(model) if tokens else "")
    return prepare.Job(*found, sizes, "png", 4, 0, maker)


@pytest.fixture(scope="module")
def chats(debug_model, tmp_path_factory):
    return prepare.prepare(job(debug_model.path), tmp_path_factory.mktemp("prepared"), max_bad_fraction=0)


def with_data(debug_model, root, **data):
    config = debug_model.config
    data = dataclasses.replace(config.data, source="prepared", root=str(root), **data)
    train = dataclasses.replace(config.train, steps=2, batch_size=4)
    quick = dataclasses.replace(config.eval, num_samples=0)
    return dataclasses.replace(config, init_from=str(debug_model.path), data=data, train=train, eval=quick)


def batches(config, count=4):
    iterator = sources.chat_iterator(config, vocabulary.text_tokenizer(config))
    return [next(iterator) for _ in range(count)]


def test_cached_equals_computed(debug_model, chats):
    """Codes exactly, features to bfloat16's rounding, in batches of another size than they were made with."""
    model = loading.load_model(debug_model.path, sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1]))
    variables = {"params": model.params}
    features = jax.jit(lambda *a: ALToLLM(model.cfg).apply(variables, *a, method="image_features"))
    tokenizer = {"params": model.params["tokenizer"]}
    tokenize = jax.jit(lambda m: ALTo(model.cfg.tokenizer).apply(tokenizer, m, method="tokenize"))
    plain = batches(with_data(debug_model, chats, use_caches=False))
    cached = batches(with_data(debug_model, chats))
    lengths = set()
    for one, two in zip(plain, cached, strict=True):
        assert one.features is None and one.codes is None and two.pixel_image is None
        for name in ("image", "ids", "labels", "masks", "mask_valid"):
            np.testing.assert_array_equal(getattr(one, name), getattr(two, name), err_msg=name)
        computed = np.asarray(features(one.image, one.pixel_image))
        assert two.features.dtype == ml_dtypes.bfloat16 and two.features.shape == computed.shape
        np.testing.assert_allclose(two.features.astype(np.float32), computed, rtol=2**-8, atol=1e-5)
        codes, length = tokenize(one.masks.reshape(-1, 32, 32))
        valid = one.mask_valid.reshape(-1)
        np.testing.assert_array_equal(two.codes.reshape(-1, 8)[valid], np.asarray(codes)[valid])
        np.testing.assert_array_equal(two.code_lengths.reshape(-1)[valid], np.asarray(length)[valid])
        assert len(np.unique(two.codes[two.mask_valid])) > 4
        lengths |= set(two.code_lengths[two.mask_valid].tolist())
    assert np.std(computed) > 0.1 and lengths


def test_masks_have_features_too(debug_model, tmp_path):
    raw = job(debug_model.path, "scene_masks", SIZES | {"vision_size": 0}, tokens=False)
    folder = prepare.prepare(raw, tmp_path, max_bad_fraction=0)
    one, two = Prepared(folder)[3], Prepared(folder, use_caches=True)[3]
    assert "features" not in one and "image" not in two
    model = raw.caches._loaded["features"]
    tokenizer = {"params": model.params["tokenizer"]}
    features = jax.jit(lambda image: ALTo(model.model.tokenizer).apply(tokenizer, image, method="image_features"))
    computed = features(one["image"][None])[0]
    np.testing.assert_allclose(two["features"].astype(np.float32), computed, rtol=2**-8, atol=1e-5)
    config = dataclasses.replace(with_data(debug_model, folder), stage="stage1_5")
    optim = dataclasses.replace(config.optim, trainable="^tokenizer/length/")
    batch = next(sources.mask_iterator(dataclasses.replace(config, optim=optim)))
    assert batch.image is None and batch.features.shape == (4, *computed.shape)
    optim = dataclasses.replace(config.optim, trainable="^tokenizer/")
    with pytest.raises(ConfigError, match="cached features.*sam_encoder.*config.optim.trainable trains here"):
        sources.mask_iterator(dataclasses.replace(config, optim=optim))
    with pytest.raises(ConfigError, match="--cache-tokens: .*'masks'"):
        job(debug_model.path, "scene_masks", SIZES)
    with pytest.raises(ConfigError, match="--cache-features: --image-size is 0"):
        job(debug_model.path, sizes=NONE)


@pytest.mark.usefixtures("one_step_program")
def test_two_steps_train_from_caches_as_without(debug_model, chats, tmp_path):
    """With packed rows: the losses agree to what bfloat16 features change; resumed, the result is the same."""
    from alto_jax.train.loop import train

    data = {"pack_samples": 2, "max_length": 320}
    cached = with_data(debug_model, chats, **data)
    found = train(cached, tmp_path / "cached")
    plain = train(with_data(debug_model, chats, **data, use_caches=False), tmp_path / "plain")
    for name in ("token_loss", "mask_bce", "mask_dice", "length"):
        assert found["metrics_last"][name] == pytest.approx(plain["metrics_last"][name], rel=2e-3), name
    shutil.copytree(tmp_path / "cached", tmp_path / "again")
    (tmp_path / "again" / "result.json").unlink()
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "2")
    again = train(cached, tmp_path / "again")
    assert again["metrics_last"]["loss"] == found["metrics_last"]["loss"]


def test_prompts_carry_features(debug_model, chats):
    config = with_data(debug_model, chats, max_length=120)
    raw = [Prepared(chats)[i] for i in range(NUM)]
    assert any(not record["masks"] for record in raw)  # left out in stage 3
    data = dataclasses.replace(config.data, max_bad_fraction=0.5)
    config = dataclasses.replace(config, stage="stage3", data=data)
    batch = next(sources.prompt_iterator(config, vocabulary.text_tokenizer(config)))
    assert batch.pixel_image is None and batch.features.shape == (4, 8, 8, 16)


def test_another_tokenizer_is_refused(debug_model, chats, tmp_path):
    """The cache belongs to the tokenizer's parameters: another language model may stand beside them."""
    arrays = {path: np.asarray(a) for path, a in rows.open_params(debug_model.path).items()}

    def save(name, change):
        changed = {**arrays, change: arrays[change] + 1e-6}
        fill = lambda sinks: [sink.__setitem__(..., changed[path]) for path, sink in sinks.items()]
        rows.save_params(
            tmp_path / name, {p: (a.shape, a.dtype) for p, a in changed.items()}, fill,
            runs.load_meta(debug_model.path),
        )  # fmt: skip
        shutil.copy(debug_model.path / "tokenizer.json", tmp_path / name)
        return str(tmp_path / name)

    config = with_data(debug_model, chats)
    later = save("later", "language_model/embed/embedding")
    batches(dataclasses.replace(config, init_from=later), 1)
    other = dataclasses.replace(config, init_from=save("other", "tokenizer/quantizer/embedding"))
    found = caches.identity(other.init_from, "tokens")
    made = Prepared(chats, use_caches=True).caches["tokens"]["identity"]
    with pytest.raises(ConfigError, match=f"cached tokens in {chats}: made with stage2 step 0.*{made}.*{found}"):
        batches(other, 1)
    batches(dataclasses.replace(other, data=dataclasses.replace(other.data, use_caches=False)), 1)
    model = dataclasses.replace(config.model, pixel_input="mllm")
    with pytest.raises(ConfigError, match="cached features.*pixel_input 'native', this run has 'mllm'"):
        batches(dataclasses.replace(config, model=model), 1)
    with pytest.raises(ConfigError, match="config.init_from is empty"):
        caches.check(Prepared(chats, use_caches=True).caches, dataclasses.replace(config, init_from=""), "chat", None)
    with pytest.raises(ValueError, match="one and two have different caches"):
        Mixture({"one": (Prepared(chats, use_caches=True), 1.0), "two": (Prepared(chats), 1.0)})


def test_killed_preparation_ends_with_the_same_bytes(debug_model, chats, tmp_path):
    """Killed in the middle, then finished with another number of threads in another process."""
    command = ["-m", "alto_jax.data.prepare", "scene_chats", "--num-scenes", str(NUM), "--workers", "1",
               "--records-per-shard", "4", "--out", str(tmp_path), "--cache-features", str(debug_model.path),
               "--cache-tokens", str(debug_model.path)]  # fmt: skip
    command += [f"--{name.replace('_', '-')}={size}" for name, size in SIZES.items()]
    process = SERVER.start(command, os.environ)
    folder = tmp_path / "scene_chats" / "1.0.0"
    while process.poll() is None and not (folder / ".work" / "00000.json").exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=300)
    assert not (folder / "manifest.json").exists()
    prepare.prepare(job(debug_model.path), tmp_path, max_bad_fraction=0, workers=3)
    assert digest(folder) == digest(pathlib.Path(chats))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["caches"]) == {"features", "tokens"}
    with pytest.raises(ConfigError, match="caches"):
        prepare.prepare(job(debug_model.path, tokens=False), tmp_path, max_bad_fraction=0)
