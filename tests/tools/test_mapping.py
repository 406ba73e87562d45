"""The conversion tables: keys and sizes of the published checkpoints, exact round trips, clear errors."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest

from alto_jax.config import build, to_dict
from alto_jax.mllm.alto_llm import ModelConfig
from alto_jax.mllm.language_model import LanguageModelConfig
from alto_jax.tokenizer.alto import TokenizerConfig
from alto_jax.tokenizer.sam_encoder import SamEncoderConfig
from configs import common
from tests.golden_models import ALTO_CONFIG, INTERNVIT_6B, INTERNVIT_300M, golden_weights
from tests.tools.torch_checkpoints import TINY, TINY_TOKENIZER, TINY_VIT, assert_same, source_shapes, synthetic
from tools.convert_torch_weights import configs_for_torch, configs_from_torch, plans, rules
from tools.convert_torch_weights.mapping import KINDS, detect_kind, export_params, get_table, import_state_dict
from tools.convert_torch_weights.rules import MappingError


def published_mllm(size, num_codes=0):
    vision = common.internvit("6b" if size == "26b" else "300m")
    return build(ModelConfig, {"vision": vision, "language_model": common.language_model(size, num_codes)})


# Published checkpoint → kind, config.
PUBLISHED = {
    "alto": ("alto", build(TokenizerConfig, common.tokenizer("base"))),
    **{f"sam_{name}": ("sam", build(SamEncoderConfig, size)) for name, size in common.SAM_SIZES.items()},
    "internvl2_5_1b": ("internvl-qwen2", published_mllm("1b")),
    "internvl2_5_2b": ("internvl-internlm2", published_mllm("2b")),
    "internvl2_5_4b": ("internvl-qwen2", published_mllm("4b")),
    "internvl2_5_8b": ("internvl-internlm2", published_mllm("8b")),
    "internvl2_5_26b": ("internvl-internlm2", published_mllm("26b")),
    "altollm_8b": ("altollm-internlm2", published_mllm("8b", common.NUM_CODES)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_shapes_and_parameter_counts_of_published_checkpoints(name, published):
    kind, config = PUBLISHED[name]
    keys = {key: tuple(shape) for key, shape in published["keys"][name].items()}
    assert detect_kind(keys) == kind
    table = get_table(kind, config)
    used = {key: shape for key, shape in keys.items() if table.ignored_reason(key) is None}
    assert source_shapes(table) == used
    assert sum(int(np.prod(shape)) for shape in keys.values()) == published["num_elements"][name]
    buffers = {key for rule in table.rules if not rule.targets for key in rule.keys(None)}
    ours = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(KINDS[kind].abstract(config)))
    assert ours == sum(int(np.prod(shape)) for key, shape in used.items() if key not in buffers)
    if not kind.startswith("sam"):
        assert used == keys


def test_titok_keys_are_used_or_ignored_with_a_reason(published):
    keys = {key: tuple(shape) for key, shape in published["keys"]["titok_l32"].items()}
    assert detect_kind(keys) == "titok"
    table = get_table("titok", TokenizerConfig())
    ignored = {key for key in keys if table.ignored_reason(key)}
    assert ignored == {"pixel_quantize.embedding.weight", "pixel_decoder.conv_in.weight"}
    shapes = source_shapes(table)
    assert shapes.pop("quantize.embedding.weight") == (None, 12)
    assert shapes == {key: keys[key] for key in keys.keys() - ignored - {"quantize.embedding.weight"}}


@pytest.mark.parametrize("kind", TINY)
def test_round_trip_is_exact(kind):
    state = synthetic(kind, TINY[kind], ml_dtypes.bfloat16 if "qwen2" in kind else np.float32)
    assert detect_kind(state) == kind
    params = import_state_dict(kind, state, TINY[kind])
    shapes = jax.tree.map(lambda leaf: leaf.shape, KINDS[kind].abstract(TINY[kind]))
    assert jax.tree.map(np.shape, params) == shapes
    assert_same(export_params(kind, params, TINY[kind]), state)


def test_round_trip_of_the_golden_weights():
    for name, kind, config in (
        ("alto", "alto", ALTO_CONFIG),
        ("internvit_300m", "internvit", INTERNVIT_300M),
        ("internvit_6b", "internvit", INTERNVIT_6B),
    ):
        state = golden_weights(name)
        assert_same(export_params(kind, import_state_dict(kind, state, config), config), state)


def test_layers_go_to_their_row_of_the_right_stack():
    state = synthetic("sam", TINY["sam"])
    params = import_state_dict("sam", state, TINY["sam"])
    for name, blocks in (("window_blocks", (0, 2, 4)), ("global_blocks", (1, 3))):
        for row, block in enumerate(blocks):
            kernel = params[name]["layers"]["mlp"]["fc1"]["kernel"][row]
            np.testing.assert_array_equal(kernel, state[f"image_encoder.blocks.{block}.mlp.lin1.weight"].T)


def test_packed_projections():
    """Torch's rows are (q, k, v), or for InternLM2 (query heads, key, value) of each key head."""
    state = synthetic("alto", TINY_TOKENIZER)
    packed = state["encoder.transformer.1.attn.in_proj_weight"]  # width 8, two heads
    qkv = import_state_dict("alto", state, TINY_TOKENIZER)["encoder"]["blocks"]["layers"]["attn"]["qkv"]["kernel"][1]
    np.testing.assert_array_equal(qkv[:, 1, 1], packed[8 + 4 : 8 + 8].T)

    state = synthetic("internlm2", TINY["internlm2"])
    packed = state["model.layers.2.attention.wqkv.weight"]  # head width 2, two key heads with two query heads each
    attn = import_state_dict("internlm2", state, TINY["internlm2"])["blocks"]["layers"]["attn"]
    for head in range(4):
        row = (head // 2) * 8 + (head % 2) * 2
        np.testing.assert_array_equal(attn["q"]["kernel"][2, :, head], packed[row : row + 2].T)
    for head in range(2):
        np.testing.assert_array_equal(attn["kv"]["kernel"][2, :, 0, head], packed[8 * head + 4 : 8 * head + 6].T)
        np.testing.assert_array_equal(attn["kv"]["kernel"][2, :, 1, head], packed[8 * head + 6 : 8 * head + 8].T)


def test_titok_fills_its_part_and_crops_the_codebook():
    state = {
        key: np.zeros([20 if size is None else size for size in shape], np.float32)
        for key, shape in source_shapes(get_table("titok", TINY_TOKENIZER)).items()
    }
    state["quantize.embedding.weight"] = np.arange(80, dtype=np.float32).reshape(20, 4)
    state["pixel_quantize.embedding.weight"] = np.zeros((3, 2), np.float32)
    params = import_state_dict("titok", state, TINY_TOKENIZER)
    np.testing.assert_array_equal(params["quantizer"]["embedding"], state["quantize.embedding.weight"][:8])
    assert "length" not in params and "kernel" not in params["pixel_decoder"]["conv_in"]
    state["quantize.embedding.weight"] = state["quantize.embedding.weight"][:5]
    with pytest.raises(MappingError, match="at least 8 rows, got 5"):
        import_state_dict("titok", state, TINY_TOKENIZER)


def test_llama_shapes_and_tied_embeddings():
    config = LanguageModelConfig(11, 8, 2, 4, 2, tie_embeddings=True)
    state = synthetic("qwen2", config)
    assert "lm_head.weight" not in state and not any(key.endswith(".bias") for key in state)
    params = import_state_dict("qwen2", {**state, "lm_head.weight": np.zeros((11, 8), np.float32)}, config)
    assert_same(export_params("qwen2", params, config), state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent_tokens": None}, "missing in the source: latent_tokens"),
        ({"encoder.new.weight": np.zeros(1, np.float32)}, "not known in the source: encoder.new.weight"),
        ({"latent_tokens": np.zeros((4, 9), np.float32)}, r"latent_tokens: expected shape \(4, 8\), got \(4, 9\)"),
        ({"decoder.transformer.0.ln_1.bias": np.zeros(13, np.float32)}, r"decoder.transformer.0.ln_1.bias: expected"),
        (
            {"encoder.transformer.1.ln_1.bias": np.zeros(8, np.float16)},
            "encoder.transformer.1.ln_1.bias: dtypes differ",
        ),
        ({"encoder.attn_mask": np.zeros((9, 9), bool)}, "encoder.attn_mask: holds other values"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    state = {**synthetic("alto", TINY_TOKENIZER), **change}
    state = {key: value for key, value in state.items() if value is not None}
    with pytest.raises(MappingError, match=message):
        import_state_dict("alto", state, TINY_TOKENIZER)


def test_incomplete_tables_and_unknown_kinds_are_errors():
    table = get_table("internvit", TINY_VIT)
    shapes = table.target_shapes()
    with pytest.raises(MappingError, match="parameters that no rule fills: extra"):
        rules.check_filled(table, {**shapes, "extra": (1,)})
    with pytest.raises(MappingError, match="the model lacks: class_embedding"):
        rules.check_filled(table, {path: shape for path, shape in shapes.items() if path != "class_embedding"})
    with pytest.raises(MappingError, match="kind: expected one of"):
        get_table("bert", TINY_VIT)
    with pytest.raises(MappingError, match="no known kind"):
        detect_kind(["bert.embeddings.weight"])
    params = rules.unflatten({path: np.zeros(shape) for path, shape in shapes.items()})
    del params["class_embedding"]
    with pytest.raises(MappingError, match="missing for the export: class_embedding"):
        export_params("internvit", params, TINY_VIT)


def test_import_writes_into_given_arrays():
    state, made = synthetic("internvit", TINY_VIT), {}

    def allocate(path, shape, dtype):
        made[path] = np.full(shape, np.nan, dtype)
        return made[path]

    params = import_state_dict("internvit", state, TINY_VIT, allocate)
    assert rules.flatten(params).keys() == made.keys()
    assert all(np.isfinite(array).all() for array in made.values())


@pytest.mark.parametrize("name", PUBLISHED)
def test_configurations_of_the_published_checkpoints(name, published):
    """Keys, shapes and the few fields of config.json that they do not tell give the sizes of configs/common.py."""
    kind, expected = PUBLISHED[name]
    shapes = {key: tuple(shape) for key, shape in published["keys"][name].items()}
    torch_config = {}
    if "-" in kind:
        language = configs_for_torch._language(kind.rpartition("-")[2], to_dict(expected.language_model))
        torch_config = {"llm_config": language, "vision_config": {"drop_path_rate": 0.1}}
    values = configs_from_torch.model_values(kind, shapes, torch_config)
    configs_from_torch.check_heads(values)
    if kind == "sam":
        assert plans.mapping_config(kind, values) == dataclasses.replace(expected, scaled_rel_pos_query=False)
    else:
        assert plans.mapping_config(kind, values) == expected
