"""docs/differences.md, "Fixed, without a switch": one test for every line, which has the line as its docstring."""

import dataclasses
import json
import logging
import pickle
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alto_jax import metrics
from alto_jax.batch import MaskBatch, PromptBatch
from alto_jax.data import files
from alto_jax.data.examples import Examples
from alto_jax.evaluate import tasks
from alto_jax.evaluate.device import Programs
from alto_jax.evaluate.options import EvaluateOptions
from alto_jax.experiment import make_experiment
from alto_jax.main import load_config
from alto_jax.mllm import alto_llm, mask_tokens
from alto_jax.mllm.generate import GenerateConfig, Generated
from alto_jax.mllm.text import SpecialIds
from alto_jax.parallel import sharding
from alto_jax.stages import grpo, tokenizer
from alto_jax.tokenizer.alto import ALTo
from alto_jax.train import loop
from tests import fake_stage
from tests.conftest import ROOT
from tests.golden_models import ALTO_CONFIG, golden_weights, random_params
from tests.stages import test_grpo as small_mllm
from tests.train.test_loop import arrays
from tools.convert_torch_weights.mapping import import_state_dict


def config_of(name, **groups):
    values = load_config(str(ROOT / "configs" / name)).to_dict()
    for group, changes in groups.items():
        values[group].update(changes)
    return make_experiment(values)


def one_device():
    return sharding.make_mesh(sharding.MeshConfig(1, 1, 1), jax.devices()[:1])


def test_every_line_of_the_list_has_a_test():
    text = (ROOT / "docs/differences.md").read_text(encoding="utf-8").split("Fixed, without a switch")[1]
    lines = [" ".join(line.split()) for line in re.split(r"^- ", text.split("\n\n")[1], flags=re.MULTILINE) if line]
    tests = {" ".join((f.__doc__ or "").split()) for name, f in globals().items() if name.startswith("test_fixed_")}
    assert len(lines) > 12 and sorted(set(lines) - tests) == [] and sorted(tests - set(lines)) == []


# --- runs ------------------------------------------------------------------------------------------


def test_fixed_resume(tmp_path, monkeypatch):
    """Resume restores step, schedule, optimizer, random numbers and the position in the data."""
    monkeypatch.setattr(loop, "make_stage", lambda config, mesh, directory=None: fake_stage.stage())
    loop.train(fake_stage.config(), tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed/checkpoints/12")
    (tmp_path / "resumed/result.json").unlink()
    loop.train(fake_stage.config(), tmp_path / "resumed")
    whole, resumed = (arrays(tmp_path / name, 12) for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys() and all(np.array_equal(whole[k], resumed[k]) for k in whole)
    before = arrays(tmp_path / "whole", 10)
    assert any("opt_state" in k and not np.array_equal(before[k], whole[k]) for k in whole), "there was something to do"


def test_fixed_missing_and_unused_parameters():
    """A missing or unused parameter is an error, not a silent skip."""
    weights = dict(golden_weights("alto"))
    with pytest.raises(ValueError, match="encoder.surprise.weight"):
        import_state_dict("alto", {**weights, "encoder.surprise.weight": np.zeros(3, np.float32)}, ALTO_CONFIG)
    weights.pop("decoder.mask_token")
    with pytest.raises(ValueError, match="decoder.mask_token"):
        import_state_dict("alto", weights, ALTO_CONFIG)


# --- mask tokenizer --------------------------------------------------------------------------------


def test_fixed_validation_lengths(quickstart):
    """Stage 1 is validated at fixed numbers of tokens and at the predicted length, not at random ones."""
    first, second = (json.loads((quickstart.path / f"{name}/result.json").read_text())["eval"]
                     for name in ("stage1", "stage1_5"))  # fmt: skip
    assert list(first["giou_by_tokens"]) == list(second["giou_by_tokens"]) == ["1", "8"]
    assert "giou_adaptive" not in first and 0 <= second["giou_adaptive"] <= 1
    # The encoder is the same in both, and so are the numbers: nothing is drawn.
    assert first["giou_by_tokens"] == second["giou_by_tokens"]


def test_fixed_length_statistics(quickstart):
    """Length statistics are measured."""
    found = json.loads((quickstart.path / "stage1_5/result.json").read_text())["eval"]
    assert len(found["lengths"]) == 4 and set(found["lengths"]) <= set(range(1, 9))
    assert found["mean_length"] == pytest.approx(np.mean(found["lengths"]))
    assert found["std_length"] == pytest.approx(np.std(found["lengths"]))


@pytest.mark.parametrize("leaks", [False, True])
def test_fixed_length_loss_of_stage_1(leaks):
    """The length loss does not reach the encoder (`tokenizer.length_loss_reaches_encoder`: as in the reference)."""
    only_length = {"edge_weighted_mse": 0.0, "edge": 0.0, "quantizer": 0.0, "length": 1.0, "bce": 0.0, "dice": 0.0}
    config = config_of("stage1.py:debug")
    assert not config.tokenizer.length_loss_reaches_encoder
    assert not config_of("stage1.py:base").tokenizer.length_loss_reaches_encoder
    config = config_of("stage1.py:debug", tokenizer={"loss": only_length, "length_loss_reaches_encoder": leaks})
    stage, size = tokenizer.make(config, one_device()), config.model.tokenizer
    rng = np.random.default_rng(0)
    mask = (rng.random((2, size.mask_size, size.mask_size)) > 0.5).astype(np.float32)
    image = np.zeros((2, size.image_size, size.image_size, 3), np.uint8)
    params = {"tokenizer": random_params(ALTo(size), mask, image)}
    batch = MaskBatch(image=image, mask=mask)
    drawn = {"kept": jnp.array([3, 5]), "withheld": jnp.zeros(2, bool)}
    loss = lambda params: stage.loss_fn(params, batch, drawn, 0)[0]
    grads = jax.device_get(jax.jit(jax.grad(loss))(params))["tokenizer"]
    largest = {name: max(float(np.abs(g).max()) for g in jax.tree.leaves(grads[name])) for name in grads}
    assert (largest["encoder"] > 1e-6) == leaks and (largest["latent_tokens"] > 1e-6) == leaks
    assert largest["length"] > 1e-6 and largest["quantizer"] == largest["decoder"] == 0


def test_fixed_tokenizer_without_image_features():
    """The tokenizer runs without image features."""
    size = dataclasses.replace(small_mllm.CONFIG.tokenizer, sam=None)
    mask = (np.random.default_rng(0).random((2, 16, 16)) > 0.5).astype(np.float32)
    model, image = ALTo(size), np.zeros((2, 16, 16, 3), np.uint8)
    params = random_params(model, mask, image)
    run = jax.jit(model.apply, static_argnames="method")
    apply = lambda *args, method: run({"params": params}, *args, method=method)
    codes, _ = apply(mask, method="tokenize")
    features = apply(image, method="image_features")
    logits = apply(codes, np.array([2, 4]), features, method="decode_codes")
    assert features is None and logits.shape == (2, 16, 16) and bool(jnp.all(jnp.isfinite(logits)))


# --- conversations ---------------------------------------------------------------------------------


def test_fixed_number_of_masks():
    """SFT takes any number of masks per sample, in requests and answers."""
    start, end, first, length, masks = 10, 11, 12, 3, 4
    special = SpecialIds(*[0] * 11, mask_start=start, mask_end=end, code_0=first, num_codes=6)
    span = [start, *[first + 1] * length, end]
    ids, labels = [], []
    for m in range(masks):  # The second and fourth are in requests.
        ids += [*span, 7]
        labels += [*span, 7] if m % 2 == 0 else [-100] * 6
    codes = np.arange(masks * length).reshape(1, masks, length) % 6
    lengths = np.array([[1, 2, 3, 2]])
    new, new_labels, _ = mask_tokens.replace_mask_tokens(
        np.array([ids]), np.array([labels]), codes, lengths, np.ones((1, masks), bool), special
    )
    expected = [[start, *(first + codes[0, m, : lengths[0, m]]), end, 7] for m in range(masks)]
    flat = [int(t) for row in expected for t in row]
    wanted = [int(t) if m % 2 == 0 else -100 for m, row in enumerate(expected) for t in row]
    assert new[0, : len(flat)].tolist() == flat and new_labels[0, : len(flat)].tolist() == wanted


def test_fixed_bad_records(caplog):
    """A bad record is logged with its path and passed over, up to a limit (0.1 %), then an error: never replaced in
    silence."""

    class Source:
        bad: set[int] = set()

        def __len__(self):
            return 2000

        def __getitem__(self, index):
            if index in self.bad:
                raise ValueError(f"data/{index}.jpg: cannot be read: truncated")
            return index

    assert config_of("stage2.py:8b").data.max_bad_fraction == 0.001
    source = Source()
    examples = Examples(source, lambda index, record: record, max_bad_fraction=0.001)
    source.bad = {3, 40}
    with caplog.at_level(logging.WARNING):
        assert examples.get(3) is None and examples.get(40) is None and examples.get(4) == 4
    assert "data/3.jpg" in caplog.text and "data/40.jpg" in caplog.text
    source.bad = {3, 40, 41}
    with pytest.raises(ValueError, match=r"data/41.jpg.*3 bad of 2000"):
        examples.get(41)


# --- GRPO ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mllm():
    """Parameters of a small MLLM and two prompts with different images."""
    config, rng = small_mllm.CONFIG, np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: alto_llm.init_params(config, key), jax.random.key(0))
    params = jax.tree.map(lambda s: (0.3 * rng.normal(size=s.shape)).astype(np.float32), shapes)
    ids = rng.integers(13, 40, (2, 7)).astype(np.int32)
    ids[:, 3] = small_mllm.SPECIAL.img_context
    images = rng.integers(0, 256, (2, 28, 28, 3)).astype(np.uint8)
    mask = np.zeros((2, 16, 16), np.float32)
    pixels = np.zeros((2, 16, 16, 3), np.uint8)
    return params, PromptBatch(images, pixels, ids, np.ones(ids.shape, bool), mask)


def test_fixed_images_per_device(mllm):
    """GRPO works for any number of images per device."""
    params, batch = mllm
    completions = np.random.default_rng(1).integers(12, 40, (2, 3, 4)).astype(np.int32)

    @jax.jit
    def logps(batch, completions):
        tokens = alto_llm.ALToLLM(small_mllm.CONFIG).apply({"params": params}, batch.image, method="image_tokens")
        return grpo.completion_logps(small_mllm.CONFIG, params, small_mllm.SPECIAL, batch, tokens, completions)[0]

    both = logps(batch, completions)
    for row in range(2):
        alone = logps(jax.tree.map(lambda a, i=row: a[i : i + 1], batch), completions[row : row + 1])
        np.testing.assert_allclose(both[row], alone[0], atol=1e-5)
    assert not np.allclose(logps(batch.replace(image=batch.image[::-1]), completions), both, atol=1e-4)


def test_fixed_reference_policy(mllm):
    """The reference policy shares a frozen, deterministic vision tower with the policy."""
    params, batch = mllm
    vision = dataclasses.replace(small_mllm.CONFIG.vision, drop_path_rate=0.5)
    config = dataclasses.replace(small_mllm.CONFIG, vision=vision)
    generate = GenerateConfig(max_new_tokens=2, temperature=1.0)

    @jax.jit
    def image_tokens(params, key):
        return alto_llm.segment(config, params, batch, generate, small_mllm.SPECIAL, key, 2).image_tokens

    # Drop path is for training alone.
    np.testing.assert_array_equal(*(image_tokens(params, jax.random.key(seed)) for seed in (0, 1)))
    stage3 = config_of("stage3.py:debug")
    stage = grpo.make(stage3, one_device())
    made = stage.finish_init({"language_model": "the start", "vision": "one tower"})
    assert made == {"language_model": "the start", "vision": "one tower", "reference": "the start"}
    assert not re.search(stage3.trainable, "vision/blocks") and not re.search(stage3.trainable, "reference/blocks")


def test_fixed_length_of_answers():
    """Answers are no longer than a mask and a sentence need."""
    for size in ("8b", "1b", "2b", "4b", "26b", "tiny", "small", "debug"):
        config = config_of(f"stage3.py:{size}")
        num_tokens = config.model.tokenizer.num_latent_tokens
        assert num_tokens + 2 <= config.grpo.generate.max_new_tokens <= num_tokens + 32


def test_fixed_logs_of_grpo(quickstart):
    """Rewards and lengths are logged."""
    lines = [json.loads(line) for line in (quickstart.path / "stage3/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == 4
    assert all({"reward", "format", "iou", "length", "num_masks", "valid"} <= line.keys() for line in steps)


# --- evaluation ------------------------------------------------------------------------------------


@pytest.fixture
def answering(debug_model, monkeypatch):
    """`answering(ids)`: a task on one scene whose model gives this answer."""
    import alto_jax

    model = alto_jax.load(debug_model.path)

    def make(answer):
        def generate(language_model, params, inputs, prompt_mask, cfg, special, rng, num_samples=None, **kwargs):
            row = jnp.tile(jnp.array(answer(special), jnp.int32), (len(inputs), 1))
            return Generated(row, row >= 0, jnp.zeros(row.shape), jnp.zeros(row.shape), jnp.int32(row.shape[1]))

        monkeypatch.setattr(alto_llm, "generate", generate)
        options = EvaluateOptions(debug_model.path, ["scenes"], "", "", scenes=1)
        return tasks.make_tasks(options, model.cfg, model.params, model.text, model.system, Programs(one_device()))[0]

    return make


def test_fixed_whole_data_sets(debug_model):
    """Evaluation covers whole data sets."""
    import alto_jax

    model = alto_jax.load(debug_model.path)
    options = EvaluateOptions(debug_model.path, ["scenes"], "", "", scenes=300)
    assert options.limit == 0
    arguments = model.cfg, model.params, model.text, model.system, Programs(one_device())
    assert len(tasks.make_tasks(options, *arguments)[0]) == 300


def test_fixed_malformed_answers(answering):
    """A malformed answer counts as IoU 0 and is never decoded."""
    task = answering(lambda ids: [ids.mask_start, ids.code_0, ids.code_0, ids.mask_start, ids.im_end])
    example = task.example(0)
    line = task.line(example, task.answer([example]), 0)
    assert line["mask"] is None and not line["valid"] and line["length"] == line["num_masks"] == 0
    assert line["iou"] == 0 and line["predicted_pixels"] == 0 < line["target_pixels"]


def test_fixed_ignored_pixels():
    """Ignored pixels are left out."""
    target = np.array([[1, 1, 0, 0]], bool)
    ignore = np.array([[0, 1, 0, 1]], bool)
    prediction, kept = metrics.apply_protocol(np.array([[0.9, 0.1, 0.1, 0.9]]), target, ignore)
    assert prediction.tolist() == kept.tolist() == [[True, False, False, False]]


# --- ids, paths, pickles ---------------------------------------------------------------------------


def sources():
    return [path for folder in ("alto_jax", "configs", "tools") for path in (ROOT / folder).rglob("*.py")]


def test_fixed_token_ids():
    """Token ids are read from the tokenizer."""
    from alto_jax.data.vocabulary import text_tokenizer

    found = [text_tokenizer(config_of("stage2.py:debug", data={"base_vocab_size": size})).ids for size in (380, 400)]
    assert found[0].mask_start != found[1].mask_start and found[0].code_0 != found[1].code_0
    for path in sources():
        assert not re.search(r"\b9255[345]\b", path.read_text()) or path.name == "common.py", path
    assert "92553 + extra" in (ROOT / "configs/common.py").read_text()  # The size of a published vocabulary, no id.


def test_fixed_paths():
    """There are no absolute paths."""
    for path in sources():
        assert not re.search(r"[\"'](/(home|root|data|mnt|tmp|Users|public)\b|[A-Z]:\\)", path.read_text()), path


class Evil:
    """Would write a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_fixed_pickles(tmp_path):
    """Pickles are never trusted."""
    file, written = tmp_path / "refs(unc).p", tmp_path / "written"
    file.write_bytes(pickle.dumps([Evil(written)]))
    with pytest.raises(ValueError, match="refused as a pickle"):
        files.load_pickle(file)
    assert not written.exists()
    for path in sources():
        text = path.read_text()
        # Reading processes get pickles from their own parent, through a socket that only these two have.
        assert not re.search(r"\bpickle\.loads?\(", text) or path.name == "workers.py", path
        assert all("weights_only=True" in call for call in re.findall(r"torch\.load\([^)]*\)", text)), path
