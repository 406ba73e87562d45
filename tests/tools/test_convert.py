"""The converter's command: round trips of every kind, composite starts, the whole model, and bad inputs."""

import errno
import json
import os
from pathlib import Path
import shutil
import signal
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import alto_jax
from alto_jax import checkpoint
from alto_jax.config import ConfigError, to_dict
from alto_jax.data import transforms
from tests.conftest import ROOT
from tests.golden_io import golden, tolerance
from tests.golden_models import ALTO_HEADS, altollm_weights, write_altollm
from tests.tools.test_mapping import TINY, TINY_TOKENIZER, source_shapes, synthetic
from tools.convert_torch_weights import configs_for_torch, exporter, importer, plans, sources
from tools.convert_torch_weights.__main__ import main
from tools.convert_torch_weights.mapping import get_table
from tools.convert_torch_weights.rules import MappingError
from tools.convert_torch_weights.sources import SourceError, open_source
from tools.convert_torch_weights.staging import staged

GOLDEN = ROOT / "tests" / "golden"
KINDS = [*TINY, "titok"]
PARTS = {"alto": "tokenizer", "titok": "tokenizer", "sam": "sam", "internvit": "vision", "internlm2": "language_model",
         "qwen2": "language_model"}  # fmt: skip


def own_values(kind):
    """Our configuration of a tiny kind, as plain ModelConfig values."""
    config = to_dict(TINY_TOKENIZER if kind == "titok" else TINY[kind])
    if kind == "sam":
        return {"tokenizer": {"sam": config}}
    return {PARTS[kind]: config} if kind in PARTS else config


def tiny_state(kind, dtype=np.float32):
    if kind != "titok":
        state = synthetic(kind, TINY[kind], dtype)
    else:
        rng, table = np.random.default_rng(0), get_table("titok", TINY_TOKENIZER)
        state = {
            key: rng.normal(size=[8 if n is None else n for n in shape]).astype(dtype)
            for key, shape in source_shapes(table).items()
        }
    return state


def write_source(folder, kind, dtype=np.float32, state=None):
    """A checkpoint of a tiny kind in the reference's layout: model.safetensors and config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    state = tiny_state(kind, dtype) if state is None else state
    save_file(state, folder / "model.safetensors")
    config = configs_for_torch.torch_config(kind, own_values(kind), {}, exported_headers(state))
    (folder / "config.json").write_text(json.dumps(config))
    return folder, state


def exported_headers(state):
    return {key: (value.shape, value.dtype, value.nbytes) for key, value in state.items()}


def read_all(path):
    """Every tensor of a PyTorch checkpoint."""
    source = open_source(path)
    return {key: source[key] for key in source}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype and actual[key].shape == value.shape, key
        assert actual[key].tobytes() == value.tobytes(), key


@pytest.fixture(scope="module")
def altollm(tmp_path_factory):
    """The small ALToLLM in the reference's layout, and its conversion."""
    folder = tmp_path_factory.mktemp("altollm")
    (folder / "torch").mkdir()
    source, out = write_altollm(folder / "torch"), folder / "converted"
    assert main(["import", str(source), str(out), "--config", json.dumps(ALTO_HEADS)]) == 0
    return source, out


# --- Round trips -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_import_then_export_returns_every_bit(kind, dtype, tmp_path):
    source, state = write_source(tmp_path / "torch", kind, dtype)
    plan = plans.make_plan(open_source(source))
    assert plan.kind == kind
    importer.write(plan, tmp_path / "out")
    arrays = checkpoint.open_params(tmp_path / "out")
    assert {str(array.dtype) for array in arrays.values()} == {np.dtype(dtype).name}
    assert exporter.export(tmp_path / "out", tmp_path / "back", max_shard_bytes=2000) == kind
    assert_same(read_all(tmp_path / "back"), state)
    again = plans.make_plan(open_source(tmp_path / "back"))
    assert again.values == plan.values


def test_whole_model_gives_the_references_answers(altollm):
    """Greedy token ids equal, masks within the fixture's tolerance, by the library's own call."""
    fixture, texts = golden("altollm"), json.loads((GOLDEN / "altollm_text.json").read_text())
    model = alto_jax.load(altollm[1])
    for row, prompt in enumerate(texts["prompts"]):
        result = model.segment(fixture["image"][row], prompt=prompt)
        expected = fixture["gen_sequences"][row]
        assert result.token_ids == expected[expected != model.text.ids.pad].tolist()
        assert result.length == fixture["gen_lengths"][row]
        mask = transforms.resize_probability(fixture["gen_masks"][row], 56, 56)
        assert np.max(np.abs(result.probability - mask)) <= tolerance("altollm", "gen_masks")


def test_whole_model_comes_back_with_its_files(altollm, tmp_path, capsys):
    source, out = altollm
    assert main(["export", str(out), str(tmp_path / "back"), "--max-shard-size", "3MB"]) == 0
    assert_same(read_all(tmp_path / "back"), altollm_weights())
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) >= 4
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in altollm_weights().values())
    for name in ("tokenizer.model", "tokenizer_config.json", "added_tokens.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "back"))
    assert all(new[key] == value for key, value in old.items() if key not in ("llm_config", "vision_config"))
    for part in ("llm_config", "vision_config"):
        assert all(new[part][key] == value for key, value in old[part].items())
    # Our own section makes a second import need no further configuration.
    assert main(["import", str(tmp_path / "back"), str(tmp_path / "again")]) == 0
    capsys.readouterr()
    assert main(["inspect", str(out), str(tmp_path / "again")]) == 0
    assert "222 of 222 parameters are equal bit for bit" in capsys.readouterr().out


def test_inspect_shows_tree_and_differences(altollm, tmp_path, capsys):
    source, out = altollm
    assert main(["inspect", str(out), "--depth", "1"]) == 0
    shown = capsys.readouterr().out
    assert "tokenizer/*" in shown and "222 parameters, 2,673,919 values" in shown
    assert main(["inspect", str(out)]) == 0
    assert "language_model/head/kernel" in capsys.readouterr().out
    changed = altollm_weights()
    changed["mlp1.1.bias"] = changed["mlp1.1.bias"] + np.float32(0.25)
    changed["extra"] = changed.pop("mlp1.3.bias")
    save_file(changed, tmp_path / "changed.safetensors")
    assert main(["inspect", str(source), str(tmp_path / "changed.safetensors")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["only in the first:  mlp1.3.bias", "only in the second: extra"]
    assert lines[2] == "mlp1.1.bias: largest difference 0.25" and lines[3].startswith("293 of 296")


def test_dry_run_prints_the_mapping_and_writes_nothing(tmp_path, capsys):
    source, state = write_source(tmp_path / "torch", "sam")
    state |= {"mask_decoder.a": np.zeros(1, np.float32), "pixel_mean": np.zeros(3, np.float32)}
    save_file(state, source / "model.safetensors")
    assert main(["import", str(source), str(tmp_path / "out"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert (
        "image_encoder.blocks.{1,3}.attn.qkv.weight → tokenizer/sam_encoder/global_blocks/layers/attn/qkv/kernel"
        in shown
    )
    assert "ignored: mask_decoder.a: ALTo uses SAM's image encoder only" in shown
    assert sorted(f.name for f in tmp_path.iterdir()) == ["torch"]
    del state["image_encoder.neck.1.weight"]
    save_file({**state, "new": np.zeros(1, np.float32)}, source / "model.safetensors")
    with pytest.raises(MappingError):
        main(["import", str(source), "--dry-run"])
    shown = capsys.readouterr().out.splitlines()
    assert shown == ["missing in the source: image_encoder.neck.1.weight", "not known in the source: new"]


def test_dtype_is_applied_and_read_back(tmp_path):
    source, state = write_source(tmp_path / "torch", "internvit")
    assert main(["import", str(source), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    exporter.export(tmp_path / "out", tmp_path / "back")
    assert_same(read_all(tmp_path / "back"), {k: v.astype(ml_dtypes.bfloat16) for k, v in state.items()})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model"]["vision"]["param_dtype"] == "bfloat16"


# --- Composite starts ------------------------------------------------------------------------------------


def test_stage1_start_from_titok_and_sam(tmp_path, capsys):
    titok, state = write_source(tmp_path / "titok", "titok")
    sam, sam_state = write_source(tmp_path / "sam", "sam")
    command = ["import", "--titok", str(titok), "--sam", str(sam / "model.safetensors"), str(tmp_path / "out")]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "initialised: tokenizer/length/fc1/kernel [8, 8]: TiTok has no length predictor" in shown
    model = alto_jax.load(tmp_path / "out")  # every parameter is filled
    assert model.cfg.tokenizer == TINY_TOKENIZER
    tokenizer = model.params["tokenizer"]
    np.testing.assert_array_equal(tokenizer["latent_tokens"], state["latent_tokens"])
    patch = sam_state["image_encoder.patch_embed.proj.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(tokenizer["sam_encoder"]["patch_embed"]["kernel"], patch)
    assert np.std(tokenizer["decoder"]["spatial_mapper"]["kernel"]) > 0


def test_stage2_start_from_internvl_and_alto(altollm, tmp_path):
    """The vocabulary grows in the reference's order; new rows are the mean of the old."""
    source = tmp_path / "internvl"
    shutil.copytree(altollm[0], source)
    (source / "model.safetensors.index.json").unlink()
    for shard in source.glob("*.safetensors"):
        shard.unlink()
    state = altollm_weights()
    save_file(
        {k.removeprefix("mask_decoder."): v for k, v in state.items() if k.startswith("mask_")},
        tmp_path / "alto.safetensors",
    )
    internvl = {k: v for k, v in state.items() if not k.startswith("mask_decoder.")}
    embed, head = "language_model.model.tok_embeddings.weight", "language_model.output.weight"
    old = {key: internvl[key][:521] for key in (embed, head)}
    save_file({**internvl, **old}, source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    config["llm_config"]["vocab_size"] = 521
    (source / "config.json").write_text(json.dumps(config))
    tokens = json.loads((source / "tokenizer_config.json").read_text())
    tokens["added_tokens_decoder"] = {k: v for k, v in tokens["added_tokens_decoder"].items() if int(k) < 521}
    (source / "tokenizer_config.json").write_text(json.dumps(tokens))
    (source / "added_tokens.json").unlink()
    command = ["import", "--internvl", str(source), "--alto", str(tmp_path / "alto.safetensors"), str(tmp_path / "out")]
    assert main([*command, "--config", json.dumps(ALTO_HEADS)]) == 0
    params = checkpoint.open_params(tmp_path / "out")
    for path, key in (("embed/embedding", embed), ("head/kernel", head)):
        table = np.asarray(params[f"language_model/{path}"])
        table = table.T if path.startswith("head") else table
        np.testing.assert_array_equal(table[:521], old[key])
        np.testing.assert_allclose(table[521:], np.tile(old[key].astype(np.float64).mean(0), (1026, 1)), rtol=1e-6)
    text = alto_jax.mllm.text.TextTokenizer.load(tmp_path / "out")
    assert (text.ids.mask_start, text.ids.mask_end, text.ids.code_0, text.ids.num_codes) == (521, 522, 523, 1024)
    assert text.vocab_size == 1547 and alto_jax.load(tmp_path / "out").cfg.language_model.vocab_size == 1547


# --- Bad inputs ------------------------------------------------------------------------------------------


def fails(command, match, folder, error=ValueError):
    """The command ends with one error that names what is wrong, and leaves nothing in `folder`."""
    before = sorted(p.name for p in folder.iterdir())
    with pytest.raises(error, match=match):
        main([str(part) for part in command])
    assert sorted(p.name for p in folder.iterdir()) == before


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"latent_tokens": None}, "missing in the source: latent_tokens"),
        ({"extra.weight": np.zeros(1, np.float32)}, "not known in the source: extra.weight"),
        ({"decoder.ln_post.bias": np.zeros(13, np.float32)}, r"decoder.ln_post.bias: expected shape \(12,\)"),
        ({"encoder.ln_post.bias": np.zeros(8, np.int32)}, "encoder.ln_post.bias: expected floating.* got int32"),
        ({"encoder.ln_post.bias": np.zeros(8, np.float64)}, "encoder.ln_post.bias: has dtype float64.*--dtype"),
        ({"encoder.transformer.1.ln_1.bias": np.zeros(8, np.float16)}, "encoder.transformer.1.ln_1.bias float16"),
        ({"encoder.ln_post.bias": np.full(8, np.nan, np.float32)}, "encoder.ln_post.bias: holds NaN.*--allow"),
        ({"encoder.attn_mask": np.zeros((9, 9), bool)}, "encoder.attn_mask: holds other values"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(change, match, tmp_path):
    source, state = write_source(tmp_path / "torch", "alto")
    state = {key: value for key, value in {**state, **change}.items() if value is not None}
    if "encoder.attn_mask" in change:
        state["encoder.attn_mask"] = np.zeros_like(synthetic("alto", TINY["alto"])["encoder.attn_mask"])
    save_file(state, source / "model.safetensors")
    fails(["import", source, tmp_path / "out"], match, tmp_path)


def test_nan_is_taken_if_asked_for(tmp_path):
    state = tiny_state("internvit")
    state["class_embedding" if "class_embedding" in state else "embeddings.class_embedding"][..., 0] = np.inf
    source, _ = write_source(tmp_path / "torch", "internvit", state=state)
    fails(["import", source, tmp_path / "out"], "class_embedding: holds NaN or infinity", tmp_path)
    assert main(["import", str(source), str(tmp_path / "out"), "--allow-nonfinite"]) == 0
    exporter.export(tmp_path / "out", tmp_path / "back")
    assert_same(read_all(tmp_path / "back"), state)


def test_damaged_files_are_named(tmp_path):
    source = tmp_path / "torch"
    source.mkdir()
    write_altollm(source)
    command = ["import", source, tmp_path / "out", "--config", json.dumps(ALTO_HEADS)]
    shard = source / "model-00002-of-00002.safetensors"
    content = shard.read_bytes()
    shard.unlink()
    fails(command, "missing shard model-00002-of-00002.safetensors", tmp_path)
    shard.write_bytes(content[: len(content) // 2])
    fails(command, "model-00002-of-00002.safetensors: cut short", tmp_path)
    shard.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    fails(command, "a Git LFS pointer", tmp_path)
    save_file({**load_file(source / "model-00001-of-00002.safetensors")}, shard)
    fails(command, "00002-of-00002.safetensors: lacks .* that the index places there", tmp_path)
    shard.write_bytes(content)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (source / name).rename(source / f"{name}.bak")
    fails(command, "no tokenizer files", tmp_path, FileNotFoundError)
    fails(["import", tmp_path / "none", tmp_path / "out"], "no such checkpoint", tmp_path, FileNotFoundError)


@pytest.mark.parametrize(
    ("part", "field", "value", "match"),
    [
        ("llm_config", "hidden_size", 48, r"llm_config.hidden_size: says 48, but the weights .* say 8"),
        ("llm_config", "num_key_value_heads", 1, "llm_config.num_key_value_heads: says 1"),
        ("llm_config", "num_hidden_layers", 3, "llm_config.num_hidden_layers: says 3, .* say 2"),
        ("llm_config", "vocab_size", 12, "llm_config.vocab_size: says 12"),
        (
            "llm_config",
            "rope_scaling",
            {"type": "yarn", "factor": 2.0},
            "rope_scaling: expected type 'dynamic'.*'yarn'",
        ),
        ("vision_config", "qk_normalization", True, "vision_config.qk_normalization: says True"),
        ("vision_config", "image_size", 448, "vision_config.image_size: says 448, .* say 8"),
        (None, "template", "Hermes-2", "template: expected 'internvl2_5'.*'Hermes-2'"),
        (None, "force_image_size", 448, "force_image_size: says 448"),
    ],
)
def test_config_that_contradicts_the_weights(part, field, value, match, tmp_path):
    source, _ = write_source(tmp_path / "torch", "altollm-internlm2")
    config = json.loads((source / "config.json").read_text())
    (config if part is None else config[part])[field] = value
    (source / "config.json").write_text(json.dumps(config))
    fails(["import", source, tmp_path / "out", "--tokenizer", "none"], match, tmp_path, ConfigError)


def test_unknown_heads_are_asked_for(tmp_path):
    source, _ = write_source(tmp_path / "torch", "alto")
    (source / "config.json").unlink()
    fails(["import", source, tmp_path / "out"], "tokenizer.encoder.num_heads: the weights do not tell it", tmp_path)
    fails(["import", source, tmp_path / "out", "--config", "{"], "--config: not readable as JSON", tmp_path)
    heads = {"tokenizer": {"encoder": {"num_heads": 2}, "decoder": {"num_heads": 3}}}
    plan = plans.make_plan(open_source(source), config=heads)
    assert plan.model.tokenizer == TINY_TOKENIZER


def test_out_that_exists_and_forms_that_pytorch_lacks(altollm, tmp_path):
    _, converted = altollm
    (tmp_path / "out").mkdir()
    fails(["import", altollm[0], tmp_path / "out"], "out: exists already", tmp_path, FileExistsError)
    fails(["export", converted, tmp_path / "out"], "out: exists already", tmp_path, FileExistsError)
    fails(["export", tmp_path / "out", tmp_path / "new"], "no checkpoint there", tmp_path, FileNotFoundError)
    corrected = to_dict(TINY_TOKENIZER) | {"length_rule": "unified", "length_logit_scale": "divide"}
    with pytest.raises(ConfigError, match="length_logit_scale is 'divide'.*length_rule is 'unified'.*--force"):
        configs_for_torch.check_forms("alto", {"tokenizer": corrected})


# --- All or nothing --------------------------------------------------------------------------------------


def test_full_disk_leaves_nothing(tmp_path, monkeypatch):
    source, _ = write_source(tmp_path / "torch", "alto")
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        fails(["import", source, tmp_path / "out"], r"out: needs 0.00 GB, the disk has 0.00 GB free", tmp_path, OSError)
    # Files above a limit cannot be written: what a full disk does to TensorStore, and to the exporter.
    main(["import", str(source), str(tmp_path / "ok")])
    for command in (["import", source, tmp_path / "out"], ["export", tmp_path / "ok", tmp_path / "out"]):
        script = (
            "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "import alto_jax.checkpoint\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
            "from alto_jax import cli; from tools.convert_torch_weights.__main__ import main; cli.run(main)"
        )
        before = sorted(p.name for p in tmp_path.iterdir())
        done = subprocess.run(
            [sys.executable, "-c", script, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 2 and "out: the disk is full; what had been written is removed" in done.stderr
        assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_killed_run_leaves_no_checkpoint_and_the_next_one_starts_clean(tmp_path):
    source, state = write_source(tmp_path / "torch", "internvit")
    script = (
        "import sys, time\n"
        "from tools.convert_torch_weights import importer\n"
        "from tools.convert_torch_weights.__main__ import main\n"
        "def slow(array): print('reading', flush=True); time.sleep(60)\n"
        "importer.has_nonfinite = slow\n"
        "main(sys.argv[1:])"
    )
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = subprocess.Popen(
            [sys.executable, "-c", script, "import", source, tmp_path / "out"], cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while "reading" not in process.stdout.readline():
            assert process.poll() is None
        if number == signal.SIGTERM:
            with pytest.raises(BlockingIOError, match="another process is writing it"), staged(tmp_path / "out"):
                pass
        process.send_signal(number)
        process.wait(60)
        left = sorted(p.name for p in tmp_path.iterdir())
        assert left == ([".out.incomplete", "torch"] if number == signal.SIGKILL else ["torch"])
    assert main(["import", str(source), str(tmp_path / "out")]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "torch"]
    assert len(checkpoint.open_params(tmp_path / "out")) == len(
        get_table("internvit", TINY["internvit"]).target_shapes()
    )


def test_staging_keeps_errors_apart(tmp_path):
    with pytest.raises(OSError, match="the disk is full") as caught, staged(tmp_path / "out"):
        raise ValueError("RESOURCE_EXHAUSTED: Error writing chunk")
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(PermissionError), staged(tmp_path / "out"):
        raise PermissionError("no")
    assert not list(tmp_path.iterdir())
    with staged(tmp_path / "a" / "out") as folder:
        (folder / "file").write_text("x")
        time.sleep(0)
    assert [p.name for p in (tmp_path / "a" / "out").iterdir()] == ["file"]


# --- Pickles ---------------------------------------------------------------------------------------------


def test_pickles_are_read_without_running_code(tmp_path):
    torch = pytest.importorskip("torch")
    state = tiny_state("alto")
    tensors = {f"module.{key}": torch.from_numpy(value) for key, value in state.items()}
    torch.save({"model": tensors, "epoch": 3}, tmp_path / "alto.pth")
    source = open_source(tmp_path / "alto.pth")
    assert_same({key: source[key] for key in source}, state)
    assert source.dropped == {"epoch": "beside the state dict in `model`"}
    half = {"a": torch.arange(8).to(torch.bfloat16)}
    torch.save(half, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    np.testing.assert_array_equal(open_source(tmp_path / "pytorch_model.bin")["a"].astype(np.float32), np.arange(8))

    class Runs:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'harm'}",)

    torch.save({"a": torch.zeros(1), "b": Runs()}, tmp_path / "bad.pth")
    with pytest.raises(SourceError, match="bad.pth: refused: .* would run code"):
        open_source(tmp_path / "bad.pth")
    assert not (tmp_path / "harm").exists()
    (tmp_path / "short.pth").write_bytes((tmp_path / "alto.pth").read_bytes()[:1000])
    with pytest.raises(SourceError, match="short.pth: cut short, or not a PyTorch file"):
        open_source(tmp_path / "short.pth")


def test_pickles_without_torch_name_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "alto.pth").write_bytes(b"")
    with pytest.raises(ImportError, match=r"alto_jax\[convert\]"):
        open_source(tmp_path / "alto.pth")


def test_nonfinite_is_found_in_every_dtype():
    for dtype in (np.float16, np.float32, np.float64, ml_dtypes.bfloat16):
        array = np.linspace(-3, 3, 2 * sources._BLOCK + 5).astype(dtype)
        assert not sources.has_nonfinite(array)
        for bad in (np.nan, np.inf, -np.inf):
            array[-1] = bad
            assert sources.has_nonfinite(array)
    assert not sources.has_nonfinite(np.arange(3)) and Path(ROOT).is_dir()
