"""The table of parameter rules, and what does not divide. Arithmetic on names and sizes: one device is enough."""

import jax
import numpy as np
import pytest

from alto_jax import sharding
from alto_jax.experiment import make_experiment
from alto_jax.main import load_config
from alto_jax.mllm.alto_llm import init_params
from alto_jax.sharding import MeshConfig, make_mesh, param_spec
from tests.conftest import ROOT


class Sizes:
    """Stands for a mesh of (data, fsdp, tensor) devices where only its shape is asked for."""

    def __init__(self, data, fsdp, tensor):
        self.shape = dict(zip(sharding.AXES, (data, fsdp, tensor)))


MESH = Sizes(2, 4, 2)


@pytest.mark.parametrize(
    "path, shape, expected",
    [
        ("vision/blocks/layers/attn/qkv/kernel", (24, 64, 3, 4, 16), (None, "fsdp", None, "tensor", None)),
        ("vision/blocks/layers/attn/qkv/bias", (24, 3, 4, 16), ()),
        ("language_model/blocks/layers/attn/q/kernel", (2, 64, 4, 16), (None, "fsdp", "tensor", None)),
        ("language_model/blocks/layers/attn/kv/kernel", (2, 64, 2, 2, 16), (None, "fsdp", None, "tensor", None)),
        ("language_model/blocks/layers/attn/out/kernel", (2, 4, 16, 64), (None, "tensor", None, "fsdp")),
        ("language_model/blocks/layers/mlp/gate/kernel", (2, 64, 128), (None, "fsdp", "tensor")),
        ("language_model/blocks/layers/mlp/down/kernel", (2, 128, 64), (None, "tensor", "fsdp")),
        ("language_model/embed/embedding", (1152, 64), ("tensor", "fsdp")),
        ("language_model/head/kernel", (64, 1152), ("fsdp", "tensor")),
        ("projector/fc1/kernel", (256, 64), ("fsdp", None)),
        ("tokenizer/encoder/patch_embed/kernel", (16, 16, 3, 64), (None, None, None, "fsdp")),
        ("opt_state/1/0/mu/language_model/head/kernel", (64, 1152), ("fsdp", "tensor")),
        ("language_model/norm/scale", (64,), ()),
        ("tokenizer/quantizer/embedding", (1024, 12), ()),
    ],
)
def test_rules(path, shape, expected):
    assert param_spec(path, shape, MESH) == jax.sharding.PartitionSpec(*expected)


def test_indivisible_dimension_names_parameter_and_axis():
    with pytest.raises(ValueError, match=r"language_model/head/kernel \(64, 1151\): 1151 .* 2 devices.*'tensor'"):
        param_spec("language_model/head/kernel", (64, 1151), MESH)
    assert param_spec("language_model/head/kernel", (64, 1151), Sizes(4, 4, 1))


@pytest.mark.parametrize("size", ["1b", "2b", "8b", "26b"])
def test_published_sizes_shard(size):
    """Every matrix of the paper's sizes is split somewhere, eight ways by fsdp."""
    config = make_experiment(load_config(str(ROOT / "configs" / f"stage2.py:{size}")).to_dict())
    shapes = jax.eval_shape(lambda key: init_params(config.model, key), jax.random.key(0))
    per_device = total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        spec = param_spec(sharding.param_path(path), leaf.shape, Sizes(1, 8, 1))
        total += leaf.size
        per_device += leaf.size // (8 if "fsdp" in spec else 1)
    # What stays whole: vectors, position tables, the codebook.
    assert total / 8 <= per_device < total / 8 * 1.2


def test_mesh_sizes():
    devices = jax.devices()[:1]
    assert dict(make_mesh(MeshConfig(), devices).shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    with pytest.raises(ValueError, match=r"config.mesh: .*'fsdp': 2.* does not fit 1 devices"):
        make_mesh(MeshConfig(data=1, fsdp=2), devices)
    with pytest.raises(ValueError, match="at most one -1"):
        MeshConfig(data=-1, fsdp=-1)


def test_batch_must_split():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    batch = sharding.put_batch({"x": np.arange(6.0).reshape(3, 2)}, mesh)
    np.testing.assert_array_equal(batch["x"], np.arange(6.0).reshape(3, 2))
    assert batch["x"].sharding.spec == sharding.batch_spec()
