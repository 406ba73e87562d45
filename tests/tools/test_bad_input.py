"""What the converter does with bad input: one clear error, and nothing left behind; pickles; verification."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from alto_jax.checkpoint import rows
from alto_jax.config import ConfigError, to_dict
from tests.conftest import ROOT
from tests.golden_models import ALTO_HEADS, write_altollm
from tests.tools.torch_checkpoints import (
    TINY,
    TINY_TOKENIZER,
    assert_same,
    own_values,
    read_all,
    synthetic,
    tiny_state,
    write_source,
)
from tools.convert_torch_weights import configs_for_torch, exporter, importer, pickles, plans, sources
from tools.convert_torch_weights.__main__ import main
from tools.convert_torch_weights.mapping import get_table
from tools.convert_torch_weights.sources import SourceError, open_source
from tools.convert_torch_weights.staging import staged

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
        fails(["import", source, tmp_path / "out"], r"out: needs 0.1 MB, the disk has 0.0 MB free", tmp_path, OSError)
    # Files above a limit cannot be written: what a full disk does to TensorStore, and to the exporter.
    main(["import", str(source), str(tmp_path / "ok")])
    for command in (["import", source, tmp_path / "out"], ["export", tmp_path / "ok", tmp_path / "out"]):
        script = (
            "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "import alto_jax.checkpoint.runs\n"
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
    assert len(rows.open_params(tmp_path / "out")) == len(get_table("internvit", TINY["internvit"]).target_shapes())


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
    importer.write(plans.make_plan(source, config=own_values("alto")), tmp_path / "out")
    exporter.export(tmp_path / "out", tmp_path / "back")
    back = torch.load(tmp_path / "back" / "alto.pth", weights_only=True)
    assert_same({key: pickles.to_numpy(value) for key, value in back.items()}, state)
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
    (tmp_path / "alto.pth").write_bytes(b"PK\x03\x04")
    with pytest.raises(ImportError, match=r"alto_jax\[convert\]"):
        open_source(tmp_path / "alto.pth")


def test_nonfinite_is_found_in_every_dtype():
    for dtype in (np.float16, np.float32, np.float64, ml_dtypes.bfloat16):
        array = np.linspace(-3, 3, 2 * sources._BLOCK + 5).astype(dtype)
        assert not sources.has_nonfinite(array)
        for bad in (np.nan, np.inf, -np.inf):
            array[-1] = bad
            assert sources.has_nonfinite(array)
    assert not sources.has_nonfinite(np.arange(3))


# --- Verification ----------------------------------------------------------------------------------------


def test_verification_says_that_it_needs_torch(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    source, _ = write_source(tmp_path / "torch", "internvit")
    assert main(["import", str(source), str(tmp_path / "out"), "--verify"]) == 0
    assert "verify: skipped, torch is not installed" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["sam", "internvit", "altollm-qwen2", "altollm-internlm2"])
def test_verification_agrees_and_finds_a_changed_weight(kind, tmp_path, capsys):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tools.convert_torch_weights import verify

    source, state = write_source(tmp_path / "torch", kind)
    command = ["import", str(source), str(tmp_path / "out"), "--verify", "--tokenizer", "none"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "agrees" in shown and ("next-token KL" in shown) == kind.startswith("altollm")
    key = next(k for k in state if k.endswith(("norm1.weight", "ln_1.weight")) and ".0." in k)
    changed = {**state, key: state[key] * np.float32(1.01)}
    write_source(tmp_path / "changed", kind, state=changed)
    assert verify.run(plans.make_plan(open_source(tmp_path / "changed")), tmp_path / "out") == 1
    assert "DIFFERS" in capsys.readouterr().out
