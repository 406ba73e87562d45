"""The table of parameter rules, and what does not divide. Arithmetic on names and sizes: one device is enough."""

import jax
import numpy as np
import pytest

from alto_jax.experiment import make_experiment
from alto_jax.main import load_config
from alto_jax.mllm.alto_llm import init_params
from alto_jax.parallel import sharding
from alto_jax.parallel.sharding import MeshConfig, bytes_per_device, make_mesh, param_spec
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
        ("language_model/blocks/layers/attn/q/kernel_scale", (2, 4, 16), (None, "tensor", None)),
        ("language_model/blocks/layers/1/attn/kv/kernel_scale", (2, 2, 16), (None, "tensor", None)),
        ("language_model/blocks/layers/attn/out/kernel_scale", (2, 64), ()),
        ("language_model/blocks/layers/mlp/up/kernel_scale", (2, 128), (None, "tensor")),
        ("language_model/head/kernel_scale", (1153,), (None,)),
        ("language_model/embed/embedding", (1153, 64), (None, ("fsdp", "tensor"))),
        ("language_model/head/kernel", (64, 1152), ("fsdp", "tensor")),
        ("language_model/head/kernel", (64, 1153), (("fsdp", "tensor"), None)),
        (
            "language_model/blocks/layers/attn/kv/kernel",
            (2, 64, 2, 1, 16),
            (None, ("fsdp", "tensor"), None, None, None),
        ),
        ("vision/blocks/layers/attn/qkv/kernel", (24, 64, 3, 25, 8), (None, ("fsdp", "tensor"), None, None, None)),
        ("vision/blocks/layers/attn/out/kernel", (24, 25, 8, 64), (None, None, None, ("fsdp", "tensor"))),
        ("vision/blocks/layers/mlp/fc1/kernel", (24, 66, 128), (None, None, ("fsdp", "tensor"))),
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
    path, shape = "language_model/blocks/layers/attn/q/kernel", (24, 896, 15, 64)
    with pytest.raises(ValueError, match=r"attn/q/kernel \(24, 896, 15, 64\): 15 .* 2 devices.*'tensor'"):
        param_spec(path, shape, MESH)
    assert param_spec(path, shape, Sizes(4, 4, 1)) == jax.sharding.PartitionSpec(None, "fsdp", "tensor", None)


@pytest.mark.parametrize("size", ["8b", "1b", "2b", "4b", "26b", "tiny", "small", "debug"])
def test_every_size_shards(size):
    """Nearly everything is split over all devices of a model axis, whatever the vocabulary; heads alone set a limit."""
    config = make_experiment(load_config(str(ROOT / "configs" / f"stage2.py:{size}")).to_dict())
    shapes = jax.eval_shape(lambda key: init_params(config.model, key), jax.random.key(0))
    total = bytes_per_device(shapes, MeshConfig(1, 1, 1))
    for tensor in (1, 2, 4, 8):
        heads = config.model.language_model.num_heads
        for fsdp in (1, 2, 8, 64, 128, 256):
            sizes = MeshConfig(1, fsdp, tensor)
            if heads % tensor:
                with pytest.raises(ValueError, match=rf"attn/(q|out)/kernel .*: {heads} is not .* {tensor} devices"):
                    bytes_per_device(shapes, sizes)
                continue
            held = bytes_per_device(shapes, sizes)
            assert total / (fsdp * tensor) <= held
            # What stays whole: vectors, position tables, the codebook (2.3 MB to 24 MB); over the tensor axis also
            # convolutions and small projections.
            if size not in ("tiny", "small", "debug") and 2 <= fsdp and fsdp * tensor <= 64:
                assert held < total / (fsdp * tensor) + 0.03 * total / fsdp + 3e7, (fsdp, tensor, held, total)


def test_auto_chooses_the_least_communication_that_fits():
    state = {"mlp": {"fc1": {"kernel": jax.ShapeDtypeStruct((1024, 2**20), np.float32)}}}  # 4 GiB
    choose = lambda devices, batch, memory: sharding.choose_sizes(state, devices, batch, memory)
    assert choose(16, 64, 16 * 2**30) == MeshConfig(16, 1, 1)  # 4 GiB are within 40 % of 16
    assert choose(16, 64, 4 * 2**30) == MeshConfig(4, 4, 1)  # 1.6 GiB: a quarter fits, a half does not
    assert choose(16, 4, 4 * 2**30) == MeshConfig(4, 1, 4)  # four rows cannot use more than four devices
    assert choose(16, 64, 2**20) == MeshConfig(1, 16, 1)  # nothing fits: the least state
    assert choose(16, 64, None) == MeshConfig(1, 16, 1)
    with pytest.raises(ValueError, match="config.mesh.auto: no mesh of 16 devices: config.train.batch_size 1 does not"):
        choose(16, 1, None)


def test_activations_split_by_meaning():
    spec = lambda shape, *names: sharding.activation_spec(shape, names, Sizes(2, 4, 2))
    P = jax.sharding.PartitionSpec
    assert spec((8, 5, 4, 16), "batch", None, "heads", None) == P(("data", "fsdp"), None, ("tensor",), None)
    assert spec((8, 5, 3, 16), "batch", None, "heads", None) == P(("data", "fsdp"), None, None, None)
    assert spec((6, 5, 93579), "batch", None, "vocab") == P(None, None, ("tensor",))
    assert spec((8, 5, 64), "replica", None, "width") == P(("data",), None, ("fsdp", "tensor"))
    # Outside of a mesh, nothing happens.
    x = jax.numpy.ones((2, 3))
    assert sharding.constrain(x, "batch", ...) is x


def test_mesh_sizes():
    devices = jax.devices()[:1]
    assert dict(make_mesh(MeshConfig(), devices).shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    with pytest.raises(ValueError, match=r"config.mesh: .*'fsdp': 2.* does not fit 1 devices"):
        make_mesh(MeshConfig(data=1, fsdp=2), devices)
    with pytest.raises(ValueError, match="at most one -1"):
        MeshConfig(data=-1, fsdp=-1)


def test_batch_must_split():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    batch = sharding.put_batch({"x": np.arange(6.0).reshape(3, 2)}, mesh, 3)
    np.testing.assert_array_equal(batch["x"], np.arange(6.0).reshape(3, 2))
    assert batch["x"].sharding.spec == sharding.batch_spec()
