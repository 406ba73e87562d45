"""The converter's command: round trips of every kind, the whole model, composite starts."""

import json
import shutil

import grain
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import alto_jax
from alto_jax import metrics
from alto_jax.checkpoint import rows, runs
from alto_jax.config import to_dict
from alto_jax.params import split_params
from alto_jax.train.state import TrainState
from tests.conftest import ROOT
from tests.golden_io import golden, tolerance
from tests.golden_models import ALTO_HEADS, altollm_weights
from tests.tools.torch_checkpoints import KINDS, TINY, TINY_TOKENIZER, assert_same, read_all, tiny_state, write_source
from tools.convert_torch_weights import exporter, importer, plans
from tools.convert_torch_weights.__main__ import main
from tools.convert_torch_weights.mapping import import_state_dict
from tools.convert_torch_weights.rules import MappingError
from tools.convert_torch_weights.sources import open_source

GOLDEN = ROOT / "tests" / "golden"


# --- Round trips -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_import_then_export_returns_every_bit(kind, dtype, tmp_path):
    source, state = write_source(tmp_path / "torch", kind, dtype)
    plan = plans.make_plan(open_source(source))
    assert plan.kind == kind
    importer.write(plan, tmp_path / "out")
    arrays = rows.open_params(tmp_path / "out")
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
        mask = metrics.resize_probability(fixture["gen_masks"][row], 56, 56)
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


def test_a_trained_run_is_exported(tmp_path):
    """A run's own checkpoint (sharded by Orbax, split into trained and frozen), with the files of where it started."""
    state = tiny_state("altollm-qwen2")
    params = import_state_dict("altollm-qwen2", state, TINY["altollm-qwen2"])
    trained, frozen = split_params({**params, "reference": params["language_model"]}, "^language_model/")
    train_state = TrainState(step=np.int32(3), params=trained, frozen=frozen, opt_state={"mu": trained}, stats={})
    checkpointer = runs.Checkpointer(tmp_path / "run")
    meta = {"stage": "stage3", "model": to_dict(TINY["altollm-qwen2"]), "data": {"system": None}}
    checkpointer.save(3, train_state, iter(grain.MapDataset.range(4).to_iter_dataset()), meta)
    checkpointer.close()
    start = tmp_path / "start" / "torch_files"
    start.mkdir(parents=True)
    (start / "config.json").write_text('{"template": "internvl2_5", "use_thumbnail": true}')
    (start / "tokenizer_config.json").write_text("{}")
    (tmp_path / "run" / "config.json").write_text(json.dumps({"init_from": str(tmp_path / "start")}))
    (tmp_path / "run" / "tokenizer.json").write_text("{}")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert_same(read_all(tmp_path / "out"), state)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["use_thumbnail"] is True and config["llm_config"]["architectures"] == ["Qwen2ForCausalLM"]
    assert {"tokenizer_config.json", "tokenizer.json"} <= {f.name for f in (tmp_path / "out").iterdir()}


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
    params = rows.open_params(tmp_path / "out")
    for path, key in (("embed/embedding", embed), ("head/kernel", head)):
        table = np.asarray(params[f"language_model/{path}"])
        table = table.T if path.startswith("head") else table
        np.testing.assert_array_equal(table[:521], old[key])
        np.testing.assert_allclose(table[521:], np.tile(old[key].astype(np.float64).mean(0), (1026, 1)), rtol=1e-6)
    text = alto_jax.mllm.text.TextTokenizer.load(tmp_path / "out")
    assert (text.ids.mask_start, text.ids.mask_end, text.ids.code_0, text.ids.num_codes) == (521, 522, 523, 1024)
    assert text.vocab_size == 1547 and alto_jax.load(tmp_path / "out").cfg.language_model.vocab_size == 1547
