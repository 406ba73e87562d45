"""Mesh, parameter rules, batch specs: the only place with axis names.

A mesh has the axes data (replicas), fsdp (parameters split, batch split) and tensor (heads, MLP and
vocabulary split). `PARAM_RULES` maps a parameter's path to the split of its trailing dimensions.
"""

import dataclasses
import math
import re
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from alto_jax.config import require

AXES = ("data", "fsdp", "tensor")

# (regex on "a/b/c", split of the last dimensions). The first match wins; leading dimensions (the layer
# axis of a stack) are never split. Vectors and what matches nothing are replicated.
PARAM_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"(attn|attention)/qkv/kernel$", ("fsdp", None, "tensor", None)),
    (r"(attn|attention)/q/kernel$", ("fsdp", "tensor", None)),
    (r"(attn|attention)/kv/kernel$", ("fsdp", None, "tensor", None)),
    (r"(attn|attention)/out/kernel$", ("tensor", None, "fsdp")),
    (r"mlp/(fc1|gate|up)/kernel$", ("fsdp", "tensor")),
    (r"mlp/(fc2|down)/kernel$", ("tensor", "fsdp")),
    (r"embed/embedding$", ("tensor", "fsdp")),
    (r"head/kernel$", ("fsdp", "tensor")),
    (r"(fc1|fc2|fc3|ffn1|ffn2|vae_project)/kernel$", ("fsdp", None)),
    (r"(conv(?!_out)\w*|spatial_mapper|patch_embed)/kernel$", (None, None, None, "fsdp")),
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one of them may be -1: whatever remains."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = [self.data, self.fsdp, self.tensor]
        require(
            sizes.count(-1) <= 1 and all(s == -1 or s >= 1 for s in sizes), "mesh", sizes, "at most one -1, others >= 1"
        )


def make_mesh(cfg: MeshConfig, devices: Any = None) -> Mesh:
    """Builds the mesh over `devices` (all of them by default).

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [cfg.data, cfg.fsdp, cfg.tensor]
    known = math.prod(s for s in sizes if s != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise ValueError(f"config.mesh: {dict(zip(AXES, sizes))} does not fit {len(devices)} devices")
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def param_path(path: Any) -> str:
    """Turns a jax key path into "a/b/c"."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def param_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The split of one parameter.

    Raises:
      ValueError: a dimension that the rule splits is not a multiple of its axis; names both.
    """
    for pattern, trailing in PARAM_RULES:
        if re.search(pattern, path) and len(shape) >= len(trailing):
            spec = (None,) * (len(shape) - len(trailing)) + trailing
            for size, axis in zip(shape, spec):
                if axis and size % mesh.shape[axis]:
                    raise ValueError(
                        f"parameter {path} {shape}: {size} is not a multiple of the {mesh.shape[axis]} devices"
                        f" of mesh axis {axis!r}"
                    )
            return PartitionSpec(*spec)
    return PartitionSpec()


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """NamedShardings of a tree of arrays or ShapeDtypeStructs, by the rules.

    Optimizer moments follow their parameter, since their paths end like it.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, param_spec(param_path(path), leaf.shape, mesh)), tree
    )


def batch_spec() -> PartitionSpec:
    """The leading (batch) axis is split over data and fsdp."""
    return PartitionSpec(("data", "fsdp"))


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Places this process's part of a host batch on the mesh, split over the batch axis.

    Raises:
      ValueError: the batch does not divide over the data and fsdp axes.
    """
    sharding = NamedSharding(mesh, batch_spec())
    parts = mesh.shape["data"] * mesh.shape["fsdp"]

    def put(array):
        array = np.asarray(array)
        if array.shape[0] * jax.process_count() % parts:
            raise ValueError(
                f"config.train.batch_size: {array.shape[0] * jax.process_count()} does not split over {parts} devices"
            )
        return jax.make_array_from_process_local_data(sharding, array)

    return jax.tree.map(put, batch)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of values that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())
