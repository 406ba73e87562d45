"""PEFT adapters: merged into a base, found unmerged in a model, or as a run of adapters on one of our checkpoints."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from alto_jax.checkpoint import loading, rows
from alto_jax.config import ConfigError, to_dict
from alto_jax.lora.__main__ import merge
from tests.tools.torch_checkpoints import exported_headers, language, synthetic, tiny_mllm, tiny_state, write_source
from tests.tools.user_checkpoints import ADDED, NEW, hf_config, hf_state, peft_adapter, qwen2_tokenizer
from tools.convert_torch_weights import configs_for_torch, peft, rules, text
from tools.convert_torch_weights.__main__ import main
from tools.convert_torch_weights.files import SourceError
from tools.convert_torch_weights.sources import open_source

LAYER = "language_model.model.layers.0."
# Of the small ALToLLM with Qwen2: width 8, 4 heads, 1 key head of width 2, MLP 10; vision width 8, MLP 12.
QWEN2 = {f"{LAYER}self_attn.q_proj": (8, 8), f"{LAYER}self_attn.v_proj": (2, 8), f"{LAYER}self_attn.o_proj": (8, 8),
         f"{LAYER}mlp.down_proj": (8, 10)}  # fmt: skip
VISION = {"vision_model.encoder.layers.1.attn.qkv": (24, 8), "vision_model.encoder.layers.0.mlp.fc1": (12, 8)}


def assert_merged(source, state, deltas, part=""):
    """The source's tensors are the base's with the differences added, and nothing else changed."""
    assert set(source) == set(state)
    for key, value in state.items():
        expected = value.astype(np.float64) + deltas.get(key.removeprefix(part).removesuffix(".weight"), 0)
        np.testing.assert_allclose(source[key], expected, rtol=1e-5, atol=1e-5, err_msg=key)


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"lora_alpha": 0.5}], ids=["plain", "rslora", "alpha"])
def test_adapter_is_merged(config, tmp_path):
    base, state = write_source(tmp_path / "base", "altollm-qwen2")
    shapes = QWEN2 | VISION
    deltas = peft_adapter(tmp_path / "adapter", shapes, rank={m: 1 + i % 3 for i, m in enumerate(shapes)}, **config)
    source = open_source(base, adapter=tmp_path / "adapter")
    assert_merged(source, state, deltas)
    assert any(f"adapters of {len(shapes)} modules, rank 1, 2, 3" in note for note in source.notes)


def test_adapter_of_a_part_and_of_patterns(tmp_path):
    """Trained on the language model alone; alpha_pattern names modules."""
    base, state = write_source(tmp_path / "base", "altollm-qwen2")
    part = "language_model."
    shapes = {module.removeprefix(part): shape for module, shape in QWEN2.items()}
    deltas = peft_adapter(tmp_path / "adapter", shapes, alpha_pattern={"layers.0.mlp.down_proj": 3})
    deltas["model.layers.0.mlp.down_proj"] /= 2
    assert_merged(open_source(base, adapter=tmp_path / "adapter"), state, deltas, part)


def test_adapter_with_whole_modules_and_embeddings(tmp_path):
    base, state = write_source(tmp_path / "base", "qwen2")
    rng = np.random.default_rng(1)
    head = rng.normal(size=(11, 8)).astype(np.float32)
    a, b = rng.normal(size=(2, 11)).astype(np.float32), rng.normal(size=(8, 2)).astype(np.float32)
    extra = {"base_model.model.lm_head.weight": head, "base_model.model.model.embed_tokens.lora_embedding_A": a,
             "base_model.model.model.embed_tokens.lora_embedding_B": b}  # fmt: skip
    deltas = peft_adapter(tmp_path / "adapter", {"model.layers.2.self_attn.k_proj": (4, 8)}, extra=extra)
    deltas["model.embed_tokens"] = 3 * (b @ a).T
    source = open_source(base, adapter=tmp_path / "adapter")
    assert_merged(source, {**state, "lm_head.weight": head}, deltas)


def test_adapter_of_hugging_faces_own_internvl(tmp_path):
    chat, state = write_source(tmp_path / "chat", "internvl-qwen2")
    (tmp_path / "hf").mkdir()
    save_file(hf_state(state, NEW), tmp_path / "hf" / "model.safetensors")
    config = hf_config(json.loads((chat / "config.json").read_text()))
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    shapes = {"model.language_model.layers.0.self_attn.q_proj": (8, 8), "lm_head": (11, 8),
              "model.vision_tower.encoder.layer.1.attention.k_proj": (8, 8)}  # fmt: skip
    deltas = peft_adapter(tmp_path / "adapter", shapes)
    query, head, key = deltas.values()
    expected = {f"{LAYER}self_attn.q_proj": query, "language_model.lm_head": head,
                "vision_model.encoder.layers.1.attn.qkv": np.concatenate([0 * key, key, 0 * key])}  # fmt: skip
    assert_merged(open_source(tmp_path / "hf", adapter=tmp_path / "adapter"), state, expected)


def test_adapter_folder_alone_finds_its_base(tmp_path):
    base, state = write_source(tmp_path / "base", "qwen2")
    deltas = peft_adapter(tmp_path / "a", {"lm_head": (11, 8)}, base_model_name_or_path=str(base))
    assert_merged(open_source(tmp_path / "a"), state, deltas)
    peft_adapter(tmp_path / "b", {"lm_head": (11, 8)}, base_model_name_or_path="OpenGVLab/InternVL2_5-8B")
    with pytest.raises(SourceError, match="OpenGVLab/InternVL2_5-8B.*is no folder here; give both: import BASE OUT"):
        open_source(tmp_path / "b")


@pytest.mark.parametrize("kind", ["internvl-internlm2", "altollm-qwen2"])
def test_model_saved_with_its_adapters(kind, tmp_path):
    """As InternVL's own training code saves a model whose language model PEFT wraps."""
    state = tiny_state(kind)
    modules = [m for m in ("attention.wqkv", "self_attn.q_proj") if f"{LAYER}{m}.weight" in state]
    key = f"{LAYER}{modules[0]}.weight"
    rng, (outer, inner) = np.random.default_rng(2), state[key].shape
    a, b = rng.normal(size=(2, inner)).astype(np.float32), rng.normal(size=(outer, 2)).astype(np.float32)
    wrap = lambda name: name.replace("language_model.", "language_model.base_model.model.")
    saved = {wrap(name): value for name, value in state.items() if name != key}
    stem = wrap(key).removesuffix(".weight")
    saved |= {f"{stem}.base_layer.weight": state[key], f"{stem}.lora_A.default.weight": a,
              f"{stem}.lora_B.default.weight": b}  # fmt: skip
    save_file(saved, tmp_path / "model.safetensors")
    with pytest.raises(SourceError, match="not merged, whose alpha no file tells; merge them first"):
        open_source(tmp_path)
    (tmp_path / "config.json").write_text('{"use_llm_lora": 2}')
    assert_merged(open_source(tmp_path), state, {key.removesuffix(".weight"): 2.0 * (b @ a)})


@pytest.mark.parametrize(
    ("config", "shapes", "match"),
    [
        ({"use_dora": True}, {"lm_head": (11, 8)}, "adapter_config.json: use_dora: expected False"),
        ({"peft_type": "IA3"}, {"lm_head": (11, 8)}, "peft_type: expected 'LORA', got 'IA3'"),
        ({"lora_alpha": "16"}, {}, "lora_alpha: expected a number above 0, got '16'"),
        ({"lora_alpha": None}, {}, "lora_alpha: expected a number above 0, got None"),
        ({"lora_alpha": True}, {}, "lora_alpha: expected a number above 0, got True"),
        ({"alpha_pattern": [1]}, {}, r"alpha_pattern: expected a group of fields, got \[1\]"),
        ({"alpha_pattern": {"(": 1}}, {"lm_head": (11, 8)}, r"alpha_pattern: '\(' is not a regular expression"),
        ({}, {"model.layers.9.self_attn.q_proj": (8, 8)}, "of which the base has nothing; is it the base"),
        ({}, {"lm_head": (11, 7)}, r"lm_head adapts a weight of shape \(11, 7\), the base's is \(11, 8\)"),
        ({}, {"mlp.up_proj": (10, 8)}, "of which the base has 3 tensors, such as"),
    ],
)  # fmt: skip
def test_adapters_that_do_not_fit_are_named(config, shapes, match, tmp_path):
    base, _ = write_source(tmp_path / "base", "qwen2")
    peft_adapter(tmp_path / "adapter", shapes or {"lm_head": (11, 8)})
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    with pytest.raises(SourceError, match=match):
        open_source(base, adapter=tmp_path / "adapter")


def test_halves_and_other_methods_are_named(tmp_path):
    base, _ = write_source(tmp_path / "base", "qwen2")
    peft_adapter(tmp_path / "adapter", {"lm_head": (11, 8)})
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({key: value for key, value in tensors.items() if "lora_B" not in key}, file)
    with pytest.raises(SourceError, match="lm_head has only one of lora_A and lora_B"):
        open_source(base, adapter=tmp_path / "adapter")
    save_file({**tensors, "base_model.model.lm_head.lora_magnitude_vector": np.ones(11, np.float32)}, file)
    with pytest.raises(SourceError, match="lora_magnitude_vector belongs to an adapter that is not plain LoRA"):
        open_source(base, adapter=tmp_path / "adapter")
    file.unlink()
    with pytest.raises(FileNotFoundError, match="a PEFT adapter without weights"):
        open_source(base, adapter=tmp_path / "adapter")
    with pytest.raises(FileNotFoundError, match="not a PEFT adapter"):
        open_source(base, adapter=base)


def test_thirds_of_a_joined_weight(tmp_path):
    """An adapter of Hugging Face's own InternVL (q, k and v apart) on a base in the reference's layout."""
    base, state = write_source(tmp_path / "base", "internvl-qwen2")
    modules = [f"model.vision_tower.encoder.layer.0.attention.{name}_proj" for name in "qv"]
    query, value = peft_adapter(tmp_path / "adapter", dict.fromkeys(modules, (8, 8))).values()
    expected = {"vision_model.encoder.layers.0.attn.qkv": np.concatenate([query, 0 * query, value])}
    assert_merged(open_source(base, adapter=tmp_path / "adapter"), state, expected)


# --- As a run of adapters --------------------------------------------------------------------------------


def write_base(folder, family):
    """A small ALToLLM with a tokenizer that fits, in the reference's layout; its state dict."""
    model = tiny_mllm(language(8, 2, 4, 1, 10, 300 + len(ADDED) + 2 + 8, family == "qwen2"))
    state = synthetic(f"altollm-{family}", model)
    config = configs_for_torch.torch_config(f"altollm-{family}", to_dict(model), {}, exported_headers(state))
    qwen2_tokenizer(folder)
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return state


@pytest.mark.parametrize("family", ["qwen2", "internlm2"])
def test_adapter_becomes_a_run_of_adapters(family, tmp_path):
    """The same model as from the merged weights; the checkpoint holds the adapters alone."""
    state = write_base(tmp_path / "torch", family)
    names = {"qwen2": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj"),
             "internlm2": ("attention.wqkv", "attention.wo", "feed_forward.w2")}[family]  # fmt: skip
    modules = [f"{LAYER}{name}" for name in names] + [*VISION, "mlp1.1"]
    shapes = {module: state[f"{module}.weight"].shape for module in modules}
    if family == "qwen2":
        shapes[f"{LAYER.replace('0', '1')}self_attn.v_proj"] = (2, 8)  # without its k_proj
    thirds = {f"model.vision_tower.encoder.layer.0.attention.{name}_proj": (8, 8) for name in "qv"}
    shapes |= thirds
    rank = {module: 1 + i % 3 for i, module in enumerate(shapes)}
    deltas = peft_adapter(tmp_path / "adapter", shapes, rank=rank, lora_alpha=5)
    query, value = (deltas.pop(module) for module in thirds)
    deltas["vision_model.encoder.layers.0.attn.qkv"] = np.concatenate([query, 0 * query, value])

    assert main(["import", str(tmp_path / "torch"), str(tmp_path / "base")]) == 0
    command = ["import", str(tmp_path / "base"), str(tmp_path / "run"), "--adapter", str(tmp_path / "adapter")]
    assert main(command) == 0
    written = rows.open_params(tmp_path / "run")
    assert written and all(path.endswith(("lora_a", "lora_b")) for path in written)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["init_from"] == str(tmp_path / "base") and config["lora"]["rank"] == (5 if family == "qwen2" else 3)

    save_file(
        {key: (value + deltas.get(key.removesuffix(".weight"), 0)).astype(np.float32) for key, value in state.items()},
        tmp_path / "torch" / "model.safetensors",
    )
    assert main(["import", str(tmp_path / "torch"), str(tmp_path / "merged")]) == 0
    ours, expected, base = (
        rules.flatten(loading.load_model(tmp_path / name).params) for name in ("run", "merged", "base")
    )
    assert ours.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_allclose(ours[path], array, rtol=1e-5, atol=2e-5, err_msg=path)
    changed = [path for path in expected if not np.array_equal(expected[path], base[path])]
    assert len(changed) == len(written) // 2


def test_merged_adapters_are_exported_like_their_base(tmp_path, capsys):
    """With the files of PyTorch, in which the mask tokens have their names; adapters alone are not exported."""
    write_base(tmp_path / "torch", "qwen2")
    peft_adapter(tmp_path / "adapter", QWEN2)
    command = lambda *words: main([str(tmp_path / w) if w in ("torch", "base", "run", "out") else w for w in words])
    command("import", "torch", "base")
    adapter = ["--adapter", str(tmp_path / "adapter")]
    command("import", "base", "run", *adapter)
    for words in (("export", "run", "out"), ("import", "run", "out", *adapter)):
        with pytest.raises(ConfigError, match="run: a run of adapters, .*: python -m alto_jax.lora merge .*run OUT"):
            command(*words)
    merge(str(tmp_path / "run"), str(tmp_path / "merged"))
    for name in ("base", "merged"):
        capsys.readouterr()
        main(["export", str(tmp_path / name), str(tmp_path / f"{name}_out")])
        assert "note: no files of PyTorch" not in capsys.readouterr().out
    expected, found = (sorted(p.name for p in (tmp_path / f"{name}_out").iterdir()) for name in ("base", "merged"))
    assert found == expected and {"vocab.json", "merges.txt", "tokenizer_config.json"} < {*found}
    (tmp_path / "merged_out" / "tokenizer.json").unlink()
    tokens = text.read(tmp_path / "merged_out").tokenizer.get_vocab()
    assert tokens == text.read(tmp_path / "merged").tokenizer.get_vocab() and "<TOK_7>" in tokens
    shutil.rmtree(tmp_path / "merged" / "torch_files")
    main(["export", str(tmp_path / "merged"), str(tmp_path / "bare")])
    assert "note: no files of PyTorch beside" in capsys.readouterr().out


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "loftq"])
def test_adapters_that_changed_their_base_are_refused(start, tmp_path):
    peft_adapter(tmp_path / "adapter", {"model.layers.2.self_attn.k_proj": (4, 8)}, init_lora_weights=start)
    with pytest.raises(SourceError, match=f"init_lora_weights: '{start}' changes the base's own weights too"):
        peft.open_adapter(tmp_path / "adapter")
    for plain in (True, "gaussian", "eva"):
        folder = tmp_path / f"{plain}"
        peft_adapter(folder, {"model.layers.2.self_attn.k_proj": (4, 8)}, init_lora_weights=plain)
        assert len(peft.open_adapter(folder).pairs) == 1


def test_what_adapters_here_cannot_is_named(tmp_path):
    write_base(tmp_path / "torch", "qwen2")
    assert main(["import", str(tmp_path / "torch"), str(tmp_path / "base")]) == 0
    command = ["import", str(tmp_path / "base"), str(tmp_path / "run"), "--adapter"]
    extra = {"base_model.model.language_model.lm_head.weight": np.zeros((11, 8), np.float32)}
    peft_adapter(tmp_path / "a", {f"{LAYER}mlp.up_proj": (10, 8)}, extra=extra)
    with pytest.raises(SourceError, match="replaces language_model.lm_head.weight whole, .*merge it instead: import"):
        main([*command, str(tmp_path / "a")])
    peft_adapter(tmp_path / "b", {"vision_model.embeddings.patch_embedding": (8, 12)})
    with pytest.raises(SourceError, match="adapts vision_model.embeddings.patch_embedding, no matrix product"):
        main([*command, str(tmp_path / "b")])
    peft_adapter(tmp_path / "c", {f"{LAYER}mlp.up_proj": (10, 7)})
    with pytest.raises(SourceError, match=r"mlp.up_proj adapts a weight of shape \(10, 7\), the base's is \(10, 8\)"):
        main([*command, str(tmp_path / "c")])
    assert not (tmp_path / "run").exists()
