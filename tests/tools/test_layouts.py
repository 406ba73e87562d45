"""Checkpoints in the forms that users have give the same parameters as in the reference's own."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import alto_jax
from alto_jax.checkpoint import rows
from alto_jax.config import ConfigError, to_dict
from alto_jax.mllm.text import TextTokenizer
from tests.tools.torch_checkpoints import (
    TINY,
    assert_same,
    exported_headers,
    language,
    read_all,
    synthetic,
    tiny_mllm,
    tiny_state,
    write_source,
)
from tests.tools.user_checkpoints import ADDED, NEW, OLD, hf_config, hf_state, qwen2_tokenizer
from tools.convert_torch_weights import configs_for_torch, configs_from_torch, exporter, importer, plans
from tools.convert_torch_weights.__main__ import main
from tools.convert_torch_weights.files import SourceError
from tools.convert_torch_weights.rules import MappingError
from tools.convert_torch_weights.sources import open_source


def params(directory):
    return {path: np.asarray(array) for path, array in rows.open_params(directory).items()}


def assert_same_params(first, second):
    assert first.keys() == second.keys()
    for path, value in first.items():
        np.testing.assert_array_equal(second[path], value, err_msg=path)


# --- Prefixes and wrappers -------------------------------------------------------------------------------

PREFIXES = ("module.", "model.", "base_model.model.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.model.",
            "base_model.model.model.", "_fsdp_wrapped_module.", "net.")  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("kind", ["alto", "titok", "sam", "internvit", "internlm2", "qwen2", "internvl-qwen2",
                                  "altollm-internlm2"])  # fmt: skip
def test_prefixes_of_wrappers(kind, prefix, tmp_path):
    state = tiny_state(kind)
    save_file({f"{prefix}{key}": value for key, value in state.items()}, tmp_path / "model.safetensors")
    source = open_source(tmp_path)
    assert_same({key: source[key] for key in source}, state)
    assert any("prefix" in note or "wrappers" in note for note in source.notes)


def test_wrappers_in_the_middle_of_names(tmp_path):
    state = tiny_state("internvl-qwen2")
    names = {
        key: key.replace("language_model.", "language_model._orig_mod.").replace("layers.", "layers.module.")
        for key in state
    }
    save_file({names[key]: value for key, value in state.items()}, tmp_path / "model.safetensors")
    assert_same(read_all(tmp_path), state)
    name = next(iter(state))
    save_file({**state, f"module.{name}": state[name]}, tmp_path / "model.safetensors")
    with pytest.raises(SourceError, match="would both be"):
        open_source(tmp_path)


def test_language_model_without_its_head(tmp_path):
    """`AutoModel` saves the trunk alone: no `model.` before it, no head; a head that is not tied must be there."""
    source, state = write_source(tmp_path / "torch", "qwen2")
    trunk = {key.removeprefix("model."): value for key, value in state.items() if key != "lm_head.weight"}
    save_file(trunk, source / "model.safetensors")
    with pytest.raises(ConfigError, match="tie_word_embeddings: says False, but the weights have no lm_head.weight"):
        plans.make_plan(open_source(source))
    config = json.loads((source / "config.json").read_text())
    config["tie_word_embeddings"] = True
    del config["alto_jax"]
    (source / "config.json").write_text(json.dumps(config))
    plan = plans.make_plan(open_source(source))
    assert plan.values["language_model"]["tie_embeddings"] and plan.kind == "qwen2"
    assert not any("head" in path for path in plan.shapes)


def test_entries_of_pickles(tmp_path):
    torch = pytest.importorskip("torch")
    state = tiny_state("internvit")
    tensors = {key: torch.from_numpy(value) for key, value in state.items()}
    wrapped = {
        "state_dict": {"state_dict": tensors, "epoch": 1},
        "module": {"module": tensors, "ds_version": "0.1"},
        "model": {"model": tensors, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}},
        "twice": {"state_dict": {"model": {f"module.{key}": value for key, value in tensors.items()}}},
        "named": {"teacher": tensors},
        "counted": {"model": tensors, "step": torch.tensor(3)},
    }
    for name, content in wrapped.items():
        torch.save(content, tmp_path / f"{name}.pth")
        assert_same(read_all(tmp_path / f"{name}.pth"), state)
    torch.save({"student": tensors, "teacher": {"a": torch.zeros(1)}}, tmp_path / "two.pth")
    with pytest.raises(SourceError, match=r"two.pth: several groups of tensors, \['student', 'teacher'\]; name one"):
        open_source(tmp_path / "two.pth")
    source = open_source(tmp_path / "two.pth", entry="student")
    assert_same({key: source[key] for key in source}, state)
    with pytest.raises(SourceError, match="--entry nobody: no 'nobody' in it; it holds"):
        open_source(tmp_path / "two.pth", entry="nobody")
    torch.save({"epoch": 1}, tmp_path / "none.pth")
    with pytest.raises(SourceError, match=r"none.pth: holds no tensors, only \['epoch'\]"):
        open_source(tmp_path / "none.pth")


# --- Hugging Face's own InternVL -------------------------------------------------------------------------


def write_hf(folder, state, names, config):
    folder.mkdir()
    save_file(hf_state(state, names), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(hf_config(config)))
    return folder


@pytest.mark.parametrize("names", [NEW, OLD], ids=["new", "old"])
def test_hugging_faces_own_internvl(names, tmp_path):
    chat, state = write_source(tmp_path / "chat", "internvl-qwen2")
    config = json.loads((chat / "config.json").read_text())
    del config["alto_jax"]
    (chat / "config.json").write_text(json.dumps(config))
    hf = write_hf(tmp_path / "hf", state, names, config)
    plan = plans.make_plan(open_source(hf))
    assert plan.kind == "internvl-qwen2"
    expected = plans.make_plan(open_source(chat)).values
    for part in ("vision", "language_model"):
        assert plan.values[part] == expected[part]
    importer.write(plan, tmp_path / "from_hf")
    importer.write(plans.make_plan(open_source(chat)), tmp_path / "from_chat")
    assert_same_params(params(tmp_path / "from_hf"), params(tmp_path / "from_chat"))
    # The way back is the reference's layout.
    exporter.export(tmp_path / "from_hf", tmp_path / "back")
    assert_same(read_all(tmp_path / "back"), state)
    assert "text_config" not in json.loads((tmp_path / "back" / "config.json").read_text())


def test_hugging_faces_own_internvl_reports_what_is_left(tmp_path):
    chat, state = write_source(tmp_path / "chat", "internvl-qwen2")
    config = json.loads((chat / "config.json").read_text())
    hf = write_hf(tmp_path / "hf", state, NEW, config)
    tensors = load_file(hf / "model.safetensors")
    mask, final = np.zeros((1, 1, 8), np.float32), np.ones(8, np.float32)
    save_file({**tensors, "model.vision_tower.embeddings.mask_token": mask}, hf / "model.safetensors")
    source = open_source(hf)
    part = plans.make_plan(source).parts[0]
    assert "masked" in part.table.ignored_reason("vision_model.embeddings.mask_token")
    save_file({**tensors, "model.vision_tower.layernorm.weight": final}, hf / "model.safetensors")
    with pytest.raises(MappingError, match="not known in the source: vision_model.layernorm.weight"):
        plans.make_plan(open_source(hf))
    del tensors["model.vision_tower.encoder.layer.0.attention.k_proj.weight"]
    save_file(tensors, hf / "model.safetensors")
    with pytest.raises(MappingError, match="missing in the source: vision_model.encoder.layers.0.attn.qkv.weight"):
        plans.make_plan(open_source(hf))


@pytest.mark.parametrize("model_type", ["qwen2", "llama"])
def test_names_are_those_that_transformers_saves(model_type, tmp_path):
    """Against the model itself: its keys, its configuration, and its answers for text."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    text = {"model_type": model_type, "vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 10, "use_sliding_window": False,
            "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "rope_theta": 1e6}  # fmt: skip
    vision = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12,
              "image_size": 8, "patch_size": 2, "attention_bias": True}  # fmt: skip
    config = transformers.InternVLConfig(vision_config=vision, text_config=text, tie_word_embeddings=False)
    torch.manual_seed(0)
    model = transformers.InternVLForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "hf")
    plan = plans.make_plan(open_source(tmp_path / "hf"))
    assert plan.kind == "internvl-qwen2" and plan.values["language_model"]["rope_theta"] == 1e6
    importer.write(plan, tmp_path / "out")
    from tools.convert_torch_weights import verify

    assert verify.run(plan, tmp_path / "out") == 0
    ours = params(tmp_path / "out")
    query = model.model.vision_tower.encoder.layer[1].attention.q_proj.weight.detach().numpy()
    kernel = ours["vision/blocks/layers/attn/qkv/kernel"][1][:, 0]
    np.testing.assert_array_equal(kernel.reshape(8, 8).T, query)


# --- The start of stage 2 --------------------------------------------------------------------------------


def stage2_sources(folder, rows_, tie=False, hf=False):
    """An InternVL with so many rows in its embedding, its tokenizer, and an ALTo; (state, number of tokens)."""
    model = tiny_mllm(language(8, 1, 4, 2, 10, rows_, True))
    state = synthetic("internvl-qwen2", model)
    config = configs_for_torch.torch_config("internvl-qwen2", to_dict(model), {}, exported_headers(state))
    if tie:
        del state["language_model.lm_head.weight"], config["alto_jax"]
        config["llm_config"]["tie_word_embeddings"] = True
    folder.mkdir()
    save_file(hf_state(state) if hf else state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(hf_config(config) if hf else config))
    write_source(folder / "alto", "alto")
    return state, qwen2_tokenizer(folder)


@pytest.mark.parametrize("form", ["chat", "hf", "tied", "tied hf"])
@pytest.mark.parametrize("padding", [-3, 0, 2, 20])
def test_mask_tokens_get_the_mean_row_whatever_the_padding(form, padding, tmp_path):
    """Fewer rows than tokens, as many, and more: no mask token starts from a row that belongs to nobody."""
    source, num_tokens = tmp_path / "internvl", 300 + len(ADDED)
    state, found = stage2_sources(source, num_tokens + padding, tie="tied" in form, hf="hf" in form)
    assert found == num_tokens
    assert main(["import", "--internvl", str(source), "--alto", str(source / "alto"), str(tmp_path / "out")]) == 0
    text = TextTokenizer.load(tmp_path / "out")
    codes = TINY["alto"].codebook_size
    assert text.ids.mask_start == num_tokens and text.vocab_size == num_tokens + 2 + codes
    written = params(tmp_path / "out")
    tables = [("embed/embedding", "model.embed_tokens.weight", False), ("head/kernel", "lm_head.weight", True)]
    assert ("language_model/head/kernel" in written) == ("tied" not in form)
    for path, key, turned in tables[: 1 if "tied" in form else 2]:
        table, old = written[f"language_model/{path}"], state[f"language_model.{key}"]
        table = table.T if turned else table
        assert len(table) == text.vocab_size
        kept = min(num_tokens, len(old))
        np.testing.assert_array_equal(table[:kept], old[:kept])
        mean = np.tile(old.astype(np.float64).mean(0), (len(table) - kept, 1))
        np.testing.assert_allclose(table[kept:], mean, rtol=1e-5, atol=1e-7)
    if padding == 20 and "hf" not in form:
        model = alto_jax.load(tmp_path / "out")
        assert model.cfg.language_model.tie_embeddings == ("tied" in form)
        result = model.segment(np.zeros((8, 8, 3), np.uint8), "apple", length=3)
        assert len(result.codes) in (0, 3) and len(result.token_ids) > 0


def test_vision_tokens_that_the_vocabulary_lacks_are_new_too(tmp_path):
    source, num_tokens = tmp_path / "internvl", 303
    state, _ = stage2_sources(source, num_tokens + 40)
    qwen2_tokenizer(source, ADDED[:3])
    assert main(["import", "--internvl", str(source), "--alto", str(source / "alto"), str(tmp_path / "out")]) == 0
    table = params(tmp_path / "out")["language_model/embed/embedding"]
    assert len(table) == num_tokens + 9 + 2 + TINY["alto"].codebook_size
    old = state["language_model.model.embed_tokens.weight"]
    np.testing.assert_array_equal(table[:num_tokens], old[:num_tokens])
    assert len(np.unique(table[num_tokens:], axis=0)) == 1


def test_without_a_tokenizer_all_rows_are_tokens(tmp_path, capsys):
    source = tmp_path / "internvl"
    state, _ = stage2_sources(source, 330)
    command = ["import", "--internvl", str(source), "--alto", str(source / "alto"), str(tmp_path / "out")]
    assert main([*command, "--tokenizer", "none"]) == 0
    table = params(tmp_path / "out")["language_model/embed/embedding"]
    np.testing.assert_array_equal(table[:330], state["language_model.model.embed_tokens.weight"])
    assert len(table) == 330 + 2 + TINY["alto"].codebook_size
    assert "grown: language_model.lm_head.weight: 330 rows of the source, and 10" in capsys.readouterr().out
    with pytest.raises(MappingError, match="expected an ALTo tokenizer, its keys are of the kind 'internvl-qwen2'"):
        main(["import", "--internvl", str(source), "--alto", str(source), str(tmp_path / "again")])


def test_export_takes_no_layout_of_hugging_face_over():
    config = {"text_config": {}, "model_type": "internvl", "image_seq_length": 4}
    assert configs_from_torch.is_hf(config) and not configs_from_torch.is_hf({"llm_config": {}, "text_config": {}})
    values = to_dict(TINY["internvl-qwen2"])
    made = configs_for_torch.torch_config("internvl-qwen2", values, config, exported_headers({"a": np.zeros(1)}))
    assert made["model_type"] == "internvl_chat" and "image_seq_length" not in made
