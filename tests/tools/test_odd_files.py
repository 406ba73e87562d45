"""Files that are something else than their name says, and JSON of odd types: one line with the file, no traceback."""

import copy
import json
import random

import numpy as np
import pytest
from safetensors.numpy import save_file

from alto_jax.config import ConfigError
from tests.tools.torch_checkpoints import tiny_state, write_source
from tests.tools.user_checkpoints import qwen2_tokenizer
from tools.convert_torch_weights import configs_from_torch, plans, text
from tools.convert_torch_weights.__main__ import main
from tools.convert_torch_weights.files import SourceError, read_json
from tools.convert_torch_weights.rules import MappingError
from tools.convert_torch_weights.sources import open_source

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
HTML = b"<!DOCTYPE html>\n<html><body>Sign in</body></html>"
ODD = (
    None,
    True,
    False,
    [],
    ["a"],
    "text",
    "",
    {},
    {"a": {"b": []}},
    0,
    -1,
    3,
    1.5,
    10**40,
    float("nan"),
    float("inf"),
)


def refused(path, match, **options):
    with pytest.raises((SourceError, FileNotFoundError), match=match) as caught:
        open_source(path, **options)
    assert "\n" not in str(caught.value)


# --- Weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["alto.pth", "model.safetensors", "pytorch_model.bin", "last.ckpt"])
@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "empty .0 bytes.; copy or download it again"),
        (LFS, "a Git LFS pointer, not the file itself; fetch it with: git lfs pull"),
        (HTML, "an HTML page, saved in place of the file"),
        (b"\xef\xbb\xbf  <html>", "an HTML page"),
        (b"\x1f\x8b\x08" + bytes(600), "a compressed archive, expected .*; unpack it first"),
        (b"GGUF\x03" + bytes(600), "a GGUF file, whose weights are quantised"),
        (b"Access denied: no such revision", "text that begins with 'Access denied"),
    ],
)
def test_weights_that_are_something_else(name, content, match, tmp_path):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, f"{name}: {match}")


def test_weights_under_another_name(tmp_path):
    save_file(tiny_state("sam"), tmp_path / "sam.pth")
    refused(tmp_path / "sam.pth", "a safetensors file under another name; rename it to sam.safetensors")
    (tmp_path / "sam.safetensors").write_bytes(b"PK\x03\x04" + bytes(100))
    refused(tmp_path / "sam.safetensors", "a PyTorch pickle under another name; rename it to sam.pth")
    (tmp_path / "gone.pth").symlink_to(tmp_path / "nowhere")
    refused(tmp_path / "gone.pth", "a link to .*nowhere, which is not there")
    (tmp_path / "notes.txt").write_text("x")
    refused(tmp_path / "notes.txt", "expected .safetensors, .pth, .pt, .bin, .ckpt, got '.txt'")


def header(folder, content):
    text_ = content if isinstance(content, bytes) else json.dumps(content).encode()
    (folder / "model.safetensors").write_bytes(len(text_).to_bytes(8, "little") + text_)


def test_damaged_headers_of_safetensors(tmp_path):
    whole = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    for content in ([], "x", 3, None):
        header(tmp_path, content)
        refused(tmp_path, "model.safetensors: the safetensors header is damaged: expected an object")
    for content in (b"{", b"\xff\xfe", b"[" * 100_000):
        header(tmp_path, content)
        refused(tmp_path, "model.safetensors: the safetensors header is damaged")
    for field in whole:
        for value in ODD:
            if (field, value) not in (("shape", []), ("dtype", "F32")):
                header(tmp_path, {"a": {**whole, field: value}})
                refused(tmp_path, "model.safetensors: .*a ")
        header(tmp_path, {"a": {name: value for name, value in whole.items() if name != field}})
        refused(tmp_path, "model.safetensors: the safetensors header is damaged: a is described by")
    for value in ODD:
        header(tmp_path, {"a": value})
        refused(tmp_path, "model.safetensors: the safetensors header is damaged: a is described by")
    (tmp_path / "model.safetensors").write_bytes((10**15).to_bytes(8, "little") + b"{")
    refused(tmp_path, "model.safetensors: cut short, or not a safetensors file")


def test_empty_tensors_of_zero3(tmp_path):
    state = tiny_state("alto")
    save_file({key: value[:0] if value.ndim > 1 else value for key, value in state.items()}, tmp_path / "a.safetensors")
    refused(tmp_path / "a.safetensors", r"\d+ of \d+ tensors are empty, such as .* ZeRO-3 .*zero_to_fp32.py FOLDER OUT")


# --- Folders ---------------------------------------------------------------------------------------------


def test_folders_that_hold_no_checkpoint(tmp_path):
    def folder(name, *files):
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).parent.mkdir(exist_ok=True)
            (tmp_path / name / file).write_bytes(b"PK\x03\x04")
        return tmp_path / name

    parts = ("global_step10/mp_rank_00_model_states.pt", "global_step10/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    deepspeed = folder("deepspeed", "latest", "zero_to_fp32.py", *parts)
    for path in (deepspeed, deepspeed / "global_step10"):
        refused(path, "DeepSpeed's own form, .*: python zero_to_fp32.py FOLDER OUT")
    shards = folder("shards", "pytorch_model-00001-of-00003.bin", "pytorch_model-00003-of-00003.bin")
    refused(shards, "shards without an index: pytorch_model.bin.index.json is missing .*3 shards, 2 are missing too")
    refused(folder("two", "a.pth", "b.pth"), r"several weight files without an index: \['a.pth', 'b.pth'\]; name one")
    refused(folder("distributed", "__0_0.distcp", ".metadata"), "distributed form; .*dcp_to_torch FOLDER OUT.pth")
    refused(folder("gguf", "model.gguf"), "model.gguf is of a form that is not read")
    refused(folder("nothing", "README.md"), "holds no weights")
    refused(folder("deep", "snapshots/model.safetensors"), "holds no weights .*; there are some in .*deep/snapshots")
    refused(folder("ours", "checkpoints/0"), "a checkpoint of alto_jax already")
    refused(folder("adapter", "adapter_config.json"), "adapter_config.json: not readable as JSON")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    refused(tmp_path / "adapter", "a PEFT adapter, and its base .* is no folder here")
    trained = folder("trained", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin")
    refused(trained, "holds no weights")


def test_folder_named_like_a_file(tmp_path):
    """What zero_to_fp32.py makes of a large checkpoint: a folder pytorch_model.bin with shards and their index."""
    _, state = write_source(tmp_path / "source", "internvit")
    inner = tmp_path / "model" / "pytorch_model.bin"
    inner.mkdir(parents=True)
    keys = sorted(state)
    names = {key: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(keys)}
    for name in set(names.values()):
        save_file({key: state[key] for key in keys if names[key] == name}, inner / name)
    (inner / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    config = (tmp_path / "source" / "config.json").read_text()
    (tmp_path / "model" / "config.json").write_text(config)
    refused(tmp_path / "model", "pytorch_model.bin: a folder named like a file, .*; import that folder itself")
    source = open_source(inner)
    assert set(source) == set(state) and source.config == json.loads(config)


def test_odd_indexes(tmp_path):
    write_source(tmp_path, "internvit")
    file = tmp_path / "model.safetensors.index.json"
    for value in ODD:
        file.write_text(json.dumps({"weight_map": value}))
        refused(tmp_path, "model.safetensors.index.json: (holds no weight_map|weight_map.a: expected a file's name)")
    file.write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    refused(tmp_path, "weight_map.a: expected a file's name, got '../other.safetensors'")
    for content in (LFS, HTML, b"", b"[]", b"{", b"[" * 100_000):
        file.write_bytes(content)
        refused(tmp_path, "model.safetensors.index.json: ")


# --- config.json -----------------------------------------------------------------------------------------


def paths_of(values, where=()):
    """The places of all values in nested groups, groups included."""
    for name, value in values.items():
        yield (*where, name)
        if isinstance(value, dict):
            yield from paths_of(value, (*where, name))


@pytest.mark.parametrize("kind", ["internvl-qwen2", "altollm-internlm2", "internvit", "qwen2", "alto"])
def test_odd_types_in_config_json(kind, tmp_path):
    """Fields take odd values, each field two of them: an import, or one line that names the file."""
    folder, _ = write_source(tmp_path, kind)
    config = json.loads((folder / "config.json").read_text())
    told, draw = 0, random.Random(kind)
    for place, value in [(place, value) for place in paths_of(config) for value in draw.sample(ODD, 2)]:
        changed = copy.deepcopy(config)
        group = changed
        for name in place[:-1]:
            group = group[name]
        group[place[-1]] = value
        source = open_source(folder)
        source.config = changed
        try:
            plans._completed(configs_from_torch.model_values(kind, source.shapes(), changed, "F"), source, None)
        except ConfigError as error:
            told += 1
            message = str(error)
            assert "\n" not in message and len(message) < 700
            assert "config.json" in message or message.startswith(("F", "tokenizer.")), message
        except MappingError as error:
            told += 1
            assert "\n" not in str(error)
    assert told > 6


@pytest.mark.parametrize(
    ("place", "value", "match"),
    [
        (("vision_config",), [], r"config.json: vision_config: expected a group of fields, got \[\]"),
        (("vision_config", "layer_norm_eps"), None, None),
        (("vision_config", "layer_norm_eps"), "1e-6", "vision_config.layer_norm_eps: expected a number .* got '1e-6'"),
        (("llm_config", "rms_norm_eps"), float("nan"), "llm_config.rms_norm_eps: expected a number .* got nan"),
        (("llm_config", "num_attention_heads"), "4", "num_attention_heads: expected a whole number .* got '4'"),
        (("llm_config", "num_attention_heads"), None, "llm_config.num_attention_heads: missing"),
        (("llm_config", "num_attention_heads"), 10**40, "num_attention_heads: expected a whole number"),
        (("llm_config", "rope_scaling"), {"type": "dynamic"}, "llm_config.rope_scaling.factor: missing"),
        (("llm_config", "rope_scaling"), "dynamic", "rope_scaling: expected a group of fields, got 'dynamic'"),
        (("llm_config", "tie_word_embeddings"), "false", "tie_word_embeddings: expected true or false, got 'false'"),
        (("alto_jax",), 3, "config.json: alto_jax: expected a group of fields, got 3"),
        (("alto_jax", "vision"), [1], r"alto_jax.vision: expected a group of fields, got \[1\]"),
        (("alto_jax", "language_model", "num_layers"), 2**30, "num_layers: says 1073741824, but the weights say 1"),
    ],
)
def test_odd_fields_are_named(place, value, match, tmp_path):
    folder, _ = write_source(tmp_path / "torch", "internvl-qwen2")
    config = json.loads((folder / "config.json").read_text())
    group = config
    for name in place[:-1]:
        group = group[name]
    group[place[-1]] = value
    (folder / "config.json").write_text(json.dumps(config))
    if match is None:
        assert plans.make_plan(open_source(folder)).kind == "internvl-qwen2"
        return
    with pytest.raises(ConfigError, match=match) as caught:
        plans.make_plan(open_source(folder))
    assert str(folder) in str(caught.value)


def test_config_of_the_command_line(tmp_path):
    folder, _ = write_source(tmp_path / "torch", "alto")
    command = ["import", str(folder), str(tmp_path / "out"), "--config"]
    for value, match in (("{", "not readable as JSON"), ('{"tokenizer": 5}', "--config: tokenizer: expected a group"),
                         ('{"tokenizer": {"encoder": []}}', r"--config: tokenizer.encoder: expected a group"),
                         ('{"language_model": {}, "x": 1}', "model.x: unknown field"),
                         ("{" + '"a":{' * 5000, "--config: not readable as JSON")):  # fmt: skip
        with pytest.raises((ConfigError, SourceError), match=match):
            main([*command, value])
    with pytest.raises(FileNotFoundError, match="--config: no such file nowhere.json"):
        main([*command, "nowhere.json"])


# --- Tokenizer files -------------------------------------------------------------------------------------


def test_odd_tokenizer_files(tmp_path):
    """Every JSON file of a tokenizer with every odd value, as a whole and in its fields."""
    qwen2_tokenizer(tmp_path)
    good = {name: (tmp_path / name).read_bytes() for name in ("vocab.json", "merges.txt", "tokenizer_config.json")}
    decoder = json.loads(good["tokenizer_config.json"])["added_tokens_decoder"]
    first = next(iter(decoder))

    def fails(name, content, match):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        with pytest.raises(ValueError, match=match) as caught:
            text.read(tmp_path, num_codes=4)
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
        for name_, content_ in good.items():
            (tmp_path / name_).write_bytes(content_)
        (tmp_path / "added_tokens.json").unlink(missing_ok=True)

    for name in ("vocab.json", "tokenizer_config.json", "added_tokens.json"):
        for content in (LFS, HTML, b"", b"{", b"[]", b"null", b"\xff\xff", b"[" * 100_000):
            fails(name, content, f"{name}: ")
    for value in ODD:
        if value is not None and value != {}:
            fails(
                "tokenizer_config.json", {"added_tokens_decoder": value}, "tokenizer_config.json: added_tokens_decoder"
            )
        fails("tokenizer_config.json", {"added_tokens_decoder": {"x": value}}, "added_tokens_decoder.x: expected")
        fails("tokenizer_config.json", {"added_tokens_decoder": decoder | {first: {"content": value}}},
              f"added_tokens_decoder.{first}: expected a token" if not isinstance(value, str) or not value
              else "special token 'text'|is missing|should have id")  # fmt: skip
        if value not in (0, 3) or isinstance(value, bool):
            fails("added_tokens.json", {"<x>": value}, "added_tokens.json: <x>: expected an id")
            fails("vocab.json", json.loads(good["vocab.json"]) | {"a": value}, "vocab.json: 'a': expected an id")
    for index in ("-1", "1.5", "²", "1_0", "9" * 5000, " 7"):
        fails("tokenizer_config.json", {"added_tokens_decoder": {index: {"content": "<a>"}}}, "expected an id")
    fails("vocab.json", {}, "vocab.json: holds no tokens")
    fails("vocab.json", json.loads(good["vocab.json"]) | {"zzz": 0}, "have the same id 0")
    fails("merges.txt", b"", "merges.txt: empty")
    fails("merges.txt", b"#version: 0.2\n", "merges.txt: holds no merges")
    fails("merges.txt", LFS, "merges.txt: a Git LFS pointer")
    fails("merges.txt", b"#version: 0.2\na b c\n", "merges.txt: line 2: expected two tokens with a space between")
    fails("merges.txt", b"\xff\xfe\x00", "merges.txt: not UTF-8 text")
    fails("merges.txt", b"#version: 0.2\nzq zq\n", "merges.txt: does not fit vocab.json")
    for value in (LFS, HTML, b"", b"{}", b"[]", json.dumps({"model": {"type": "BPE", "vocab": 3}}).encode()):
        fails("tokenizer.json", value, "tokenizer.json: ")
        (tmp_path / "tokenizer.json").unlink()
    assert text.read(tmp_path, num_codes=4).size == 318


def test_folder_in_the_place_of_a_json_file(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(SourceError, match="config.json: a folder, expected a file"):
        read_json(tmp_path / "config.json")
    assert read_json(tmp_path / "none.json") == {}


def test_sources_are_not_changed_by_trials(tmp_path):
    """The tensors of a refused import are never read: a shape of another form is an error of the headers."""
    state = tiny_state("internvit")
    name = "embeddings.patch_embedding.weight"
    save_file({**state, name: np.zeros((8, 3), np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(MappingError, match=f"{name}: expected 4 axes, got shape"):
        plans.make_plan(open_source(tmp_path))


def test_a_download_that_has_not_ended_is_refused(tmp_path):
    """aria2 gives a file its whole size at once: the header is there, the later tensors are zeros."""
    source, _ = write_source(tmp_path / "torch", "sam")
    file = source / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2].ljust(len(content), b"\0"))
    (source / "model.safetensors.aria2").write_bytes(b"\0\1")
    refused(source, "model.safetensors: its download by aria2 has not ended .model.safetensors.aria2 lies beside it")
    (source / "model.safetensors.aria2").rename(source / "config.json.aria2")
    (source / "config.json").write_text("{}")
    refused(source, "config.json: its download by aria2 has not ended")
