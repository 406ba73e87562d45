"""Mesh, parameter rules, activation rules, batch specs: the only place with axis names.

A mesh has the axes data (replicas), fsdp (parameters split, batch split) and tensor (heads, MLP and
vocabulary split). `PARAM_RULES` maps a parameter's path to the split of its trailing dimensions,
`ACTIVATION_RULES` a dimension's meaning to the axes that an activation is split over; the model says what its
dimensions mean by `constrain`, and which mesh it runs on is said once, by `on_mesh`.
`python -m alto_jax.plan --config=FILE --rules` prints the rules as applied to a configuration.
"""

from collections.abc import Callable, Iterator
import contextvars
import dataclasses
import functools
import math
import re
from types import EllipsisType
from typing import Any, cast

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from alto_jax.config import require
from alto_jax.parallel import slices
from alto_jax.parallel.devices import find_device
from alto_jax.parallel.shares import BatchShare

AXES = ("data", "fsdp", "tensor")
_BOTH = ("fsdp", "tensor")

# (regex on "a/b/c", splits of the last dimensions: the preferred one, then what is taken instead where the sizes
# do not divide). The first regex that matches wins; leading dimensions (the layer axis of a stack) are never split.
# Vectors and what matches nothing are replicated. A rule without a split that divides is an error: the language
# model's heads and every MLP's width must be multiples of the tensor axis.
PARAM_RULES: tuple[tuple, ...] = (
    # Scales of kernels of 8 bits: split as their outputs are over tensor, whole over fsdp.
    (r"attn/(q|kv)/kernel_scale$", ("tensor", None), (None, None)),
    (r"(mlp/(gate|up)|head)/kernel_scale$", ("tensor",), (None,)),
    # Kernels of 8 bits: outputs before inputs.
    (r"attn/q/kernel_t$", ("tensor", None, "fsdp"), ("tensor", None, None)),
    (r"attn/kv/kernel_t$", (None, "tensor", None, "fsdp"), (None, None, None, _BOTH), (None, None, None, "fsdp"),
     (None, "tensor", None, None), (None, None, None, None)),
    (r"attn/out/kernel_t$", ("fsdp", "tensor", None), (None, "tensor", None)),
    (r"mlp/(gate|up)/kernel_t$", ("tensor", "fsdp"), (_BOTH, None), ("tensor", None)),
    (r"mlp/down/kernel_t$", ("fsdp", "tensor"), (None, _BOTH), (None, "tensor")),
    (r"head/kernel_t$", ("tensor", "fsdp"), (None, _BOTH), (None, "tensor")),
    # Note: InternViT-6B has 25 heads. It is then stored in parts of its width, and every device computes all heads.
    (r"(attn|attention)/qkv/kernel$", ("fsdp", None, "tensor", None), (_BOTH, None, None, None),
     ("fsdp", None, None, None), (None, None, "tensor", None), (None, None, None, None)),
    (r"(vision|tokenizer)/.*attn/out/kernel$", ("tensor", None, "fsdp"), (None, None, _BOTH), (None, None, "fsdp"),
     ("tensor", None, None), (None, None, None)),
    (r"(attn|attention)/q/kernel$", ("fsdp", "tensor", None), (None, "tensor", None)),
    # Note: fewer key/value heads than tensor devices (two in the 1B and 4B models): every device computes them all.
    (r"(attn|attention)/kv/kernel$", ("fsdp", None, "tensor", None), (_BOTH, None, None, None),
     ("fsdp", None, None, None), (None, None, "tensor", None), (None, None, None, None)),
    (r"(attn|attention)/out/kernel$", ("tensor", None, "fsdp"), ("tensor", None, None)),
    (r"mlp/(fc1|gate|up)/kernel$", ("fsdp", "tensor"), (None, _BOTH), (None, "tensor")),
    (r"mlp/(fc2|down)/kernel$", ("tensor", "fsdp"), (_BOTH, None), ("tensor", None)),
    # Note: by width, so that a lookup is local. Published vocabularies and the mask tokens make odd numbers (93,579
    # tokens), so the head falls back to its width too; its logits are split over the vocabulary all the same.
    (r"embed/embedding$", (None, _BOTH), (None, "fsdp"), (None, "tensor"), (None, None)),
    (r"head/kernel$", ("fsdp", "tensor"), (_BOTH, None), ("tensor", None)),
    (r"(fc1|fc2|fc3|ffn1|ffn2|vae_project)/kernel$", ("fsdp", None), (None, "fsdp"), (None, None)),
    (r"(conv(?!_out)\w*|spatial_mapper|patch_embed)/kernel$", (None, None, None, "fsdp"), (None, None, "fsdp", None),
     (None, None, None, None)),
)  # fmt: skip

# What a dimension of an activation means → the axes that it is split over. A dimension that does not divide is left
# whole, but for the names in UNEVEN, whose last device gets the smaller part (the compiler pads).
ACTIVATION_RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "replica": ("data",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "width": ("fsdp", "tensor"),
    "channels": ("tensor",),
}
UNEVEN = ("vocab",)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis, data, fsdp and tensor; one of them may be -1: whatever remains.

    auto: choose all three from the number of devices and the model (`choose_sizes`), whatever the other fields say.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    auto: bool = False

    def __post_init__(self) -> None:
        sizes = [self.data, self.fsdp, self.tensor]
        require(
            sizes.count(-1) <= 1 and all(s == -1 or s >= 1 for s in sizes), "mesh", sizes, "at most one -1, others >= 1"
        )


@dataclasses.dataclass(frozen=True)
class AutoInputs:
    """What `mesh.auto` decides by: what an update holds (ShapeDtypeStructs) and the global batch."""

    state: Any
    batch_size: int


def make_mesh(cfg: MeshConfig, devices: Any = None, auto_inputs: Callable[[], AutoInputs] | None = None) -> Mesh:
    """Builds the mesh over `devices` (all of them by default).

    Args:
      cfg: sizes, or `auto`.
      devices: the devices, also those of a topology that is not here.
      auto_inputs: called if `cfg.auto`.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or auto without `auto_inputs`.
    """
    devices = jax.devices() if devices is None else devices
    if cfg.auto:
        if auto_inputs is None:
            raise ValueError("config.mesh.auto: only a training run chooses its mesh; give data, fsdp and tensor here")
        inputs, device = auto_inputs(), find_device(devices[0].device_kind)
        memory = None if device is None else device.usable
        cfg = choose_sizes(inputs.state, len(devices), inputs.batch_size, memory, slices.count_slices(devices))
    cfg = fill_sizes(cfg, len(devices))
    sizes = (cfg.data, cfg.fsdp, cfg.tensor)
    return Mesh(slices.arrange(sizes, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def fill_sizes(cfg: MeshConfig, num_devices: int) -> MeshConfig:
    """The sizes with -1 replaced by what remains of `num_devices`.

    Raises:
      ValueError: they do not multiply to the number of devices.
    """
    sizes = [cfg.data, cfg.fsdp, cfg.tensor]
    known = math.prod(s for s in sizes if s != -1)
    if -1 in sizes and num_devices % known == 0:
        sizes[sizes.index(-1)] = num_devices // known
    if math.prod(sizes) != num_devices:
        raise ValueError(f"config.mesh: {dict(zip(AXES, sizes))} does not fit {num_devices} devices")
    data, fsdp, tensor = sizes
    return MeshConfig(data, fsdp, tensor)


AUTO_STATE_SHARE = 0.4  # of a device's memory; the rest is for activations


def mesh_sizes(num_devices: int, batch_size: int) -> Iterator[MeshConfig]:
    """The meshes worth trying: all of `num_devices`, tensor up to 8, the batch split evenly over data and fsdp.

    In order of preference: the smallest tensor axis first (it communicates in every layer), then the smallest fsdp
    axis (it gathers parameters in every layer; data alone reduces gradients once a step).
    """
    for tensor in (1, 2, 4, 8):
        rest = num_devices // tensor
        if num_devices % tensor == 0 and batch_size % rest == 0:
            yield from (MeshConfig(rest // f, f, tensor) for f in range(1, rest + 1) if rest % f == 0)


def held_in_update(state: Any) -> tuple[Any, Any]:
    """A TrainState and its gradients."""
    return state, state.params


def choose_sizes(state: Any, num_devices: int, batch_size: int, memory: int | None, num_slices: int = 1) -> MeshConfig:
    """The rule of `mesh.auto`: the first of `mesh_sizes` whose state takes at most 40 % of a device's memory.

    With several slices, those come first that have nothing but the data axis between them. If none takes so little (or
    the memory is unknown), the one with the least state on a device.

    Args:
      state: ShapeDtypeStructs of parameters, gradients and optimizer state (`held_in_update`).
      num_devices, batch_size: devices, and rows of the global batch.
      memory: bytes of one device, or None.
      num_slices: that the devices are of (`alto_jax.parallel.slices`).

    Raises:
      ValueError: the batch or the model does not divide over any mesh of so many devices.
    """
    best, reasons = None, []
    for sizes in sorted(mesh_sizes(num_devices, batch_size), key=lambda sizes: sizes.data % num_slices > 0):
        try:
            needed = bytes_per_device(state, sizes)
        except ValueError as error:
            reasons.append(str(error))
            continue
        if memory is not None and needed <= AUTO_STATE_SHARE * memory:
            return sizes
        if best is None or needed < best[0]:
            best = needed, sizes
    if best is None:
        reason = reasons[0] if reasons else f"config.train.batch_size {batch_size} does not split"
        raise ValueError(f"config.mesh.auto: no mesh of {num_devices} devices: {reason}")
    return best[1]


def param_path(path: Any) -> str:
    """Turns a jax key path into "a/b/c"."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def axis_sizes(mesh: Any) -> dict[str, int]:
    """Devices along each axis, of a Mesh, an AbstractMesh or a MeshConfig without -1."""
    return dataclasses.asdict(mesh) if isinstance(mesh, MeshConfig) else dict(mesh.shape)


def _axes(entry: Any) -> tuple[str, ...]:
    """The axes of one entry of a split: None, a name or several names."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _ways(entry: Any, sizes: dict[str, int]) -> int:
    return math.prod(sizes[axis] for axis in _axes(entry))


def matching_rule(path: str, shape: tuple[int, ...], mesh: Any) -> tuple[str, int, PartitionSpec] | None:
    """The rule of one parameter: (regex, which of its splits is taken, that split); None if no rule matches.

    Raises:
      ValueError: none of the rule's splits divides; names the parameter, the dimension and the axis.
    """
    sizes = axis_sizes(mesh)
    for pattern, *splits in PARAM_RULES:
        if not re.search(pattern, path) or len(shape) < len(splits[0]):
            continue
        for index, trailing in enumerate(splits):
            spec = (None,) * (len(shape) - len(trailing)) + trailing
            if all(size % _ways(entry, sizes) == 0 for size, entry in zip(shape, spec)):
                return pattern, index, PartitionSpec(*spec)
        # The last split is the one that asks for least, so what fails in it cannot be avoided.
        for size, entry in zip(shape, spec):
            if size % _ways(entry, sizes):
                names = " and ".join(repr(axis) for axis in _axes(entry))
                raise ValueError(
                    f"parameter {path} {shape}: {size} is not a multiple of the {_ways(entry, sizes)} devices"
                    f" of mesh axis {names}"
                )
    return None


def param_spec(path: str, shape: tuple[int, ...], mesh: Any) -> PartitionSpec:
    """The split of one parameter.

    Raises:
      ValueError: see `matching_rule`.
    """
    found = matching_rule(path, shape, mesh)
    return PartitionSpec() if found is None else found[2]


def bytes_per_device(tree: Any, mesh: Any) -> int:
    """Bytes that a tree of arrays or ShapeDtypeStructs takes on each device, by the rules."""
    sizes = axis_sizes(mesh)
    return sum(
        math.prod(leaf.shape)
        // math.prod(_ways(entry, sizes) for entry in param_spec(param_path(path), leaf.shape, mesh))
        * leaf.dtype.itemsize
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    )


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


_device: contextvars.ContextVar = contextvars.ContextVar("device", default=None)


def on_mesh(mesh: Mesh, function: Callable) -> Callable:
    """`function`, traced so that `constrain` and `traced_device` inside it know the mesh. For what is jitted."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        token = _device.set(mesh.devices.flat[0])
        try:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return function(*args, **kwargs)
        finally:
            _device.reset(token)

    return wrapped


def traced_device() -> Any:
    """One of the devices that what is traced will run on: of the mesh of `on_mesh` (perhaps of a topology that is not
    here), else JAX's default one."""
    return _device.get() or jax.local_devices()[0]


def activation_spec(shape: tuple[int, ...], names: tuple[str | None, ...], mesh: Any) -> PartitionSpec:
    """The split of an activation whose dimensions mean `names`, by ACTIVATION_RULES."""
    sizes = axis_sizes(mesh)
    spec = [() if name is None else ACTIVATION_RULES[name] for name in names]
    return PartitionSpec(
        *(
            axes if axes and (name in UNEVEN or size % _ways(axes, sizes) == 0) else None
            for size, name, axes in zip(shape, names, spec)
        )
    )


def constrain(x: jax.Array, *names: str | None | EllipsisType) -> jax.Array:
    """Says what the dimensions of an activation mean, so that the compiler splits them by ACTIVATION_RULES.

    Without this XLA is free to split activations like the parameters they meet, which moves far more data. Does
    nothing outside of `on_mesh` or on one device.

    Args:
      x: the activation.
      *names: one of ACTIVATION_RULES for each dimension, or None; `...` stands for as many None as are missing.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    if ... in names:
        at = names.index(...)
        names = names[:at] + (None,) * (x.ndim - len(names) + 1) + names[at + 1 :]
    return jax.lax.with_sharding_constraint(x, activation_spec(x.shape, cast(tuple[str | None, ...], names), mesh))


def gather_params(tree: Any, path: str) -> Any:
    """Parameters gathered over fsdp, so that what is left is the split over tensor. Does nothing outside of `on_mesh`.

    Args:
      tree: of arrays; those of one layer, taken out of a stack, are known by the same rules.
      path: of the tree among all parameters, by which the rules know them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return tree

    def gather(key: Any, leaf: jax.Array) -> jax.Array:
        spec = param_spec(f"{path}/{param_path(key)}", leaf.shape, mesh)
        kept = [tuple(axis for axis in _axes(entry) if axis == "tensor") or None for entry in spec]
        return jax.lax.with_sharding_constraint(leaf, PartitionSpec(*kept))

    return jax.tree_util.tree_map_with_path(gather, tree)


def batch_share(mesh: Any, process: int | None = None) -> BatchShare:
    """The part of every batch that lies on the devices of a process (None: this one), by `batch_spec`."""
    process = jax.process_index() if process is None else process
    num_parts = mesh.shape["data"] * mesh.shape["fsdp"]
    # Note: by the devices' own processes, since a mesh of a TPU slice does not follow the processes' order.
    owners = [{device.process_index for device in row} for row in mesh.devices.reshape(num_parts, -1)]
    parts = tuple(part for part, found in enumerate(owners) if process in found)
    if not parts:
        raise ValueError(f"config.mesh: process {process} has no device in a mesh of {mesh.devices.size} devices")
    return BatchShare(parts, num_parts, len(set().union(*owners)))


def put_batch(batch: Any, mesh: Mesh, num_rows: int, field: str = "config.train.batch_size") -> Any:
    """Places this process's rows of a host batch on the mesh, split over the batch axis.

    Args:
      batch: a tree of host arrays with the rows that `batch_share(mesh).rows(num_rows)` names, in this order.
      mesh: of the run.
      num_rows: rows of the batch over all processes.
      field: what says so, for messages.

    Raises:
      ValueError: the batch does not divide over the data and fsdp axes, or another number of rows is there.
    """
    sharding, share = NamedSharding(mesh, batch_spec()), batch_share(mesh)
    num_local, size = len(share.rows(num_rows, field)), num_rows // share.num_parts
    place = {part * size: slice(i * size, (i + 1) * size) for i, part in enumerate(share.parts)}

    def put(array: Any) -> jax.Array:
        array = np.asarray(array)
        if array.shape[0] != num_local:
            raise ValueError(
                f"{field}: process {jax.process_index()} has {array.shape[0]} rows, where {num_local} of the"
                f" {num_rows} are on its devices"
            )
        shape = (num_rows, *array.shape[1:])
        # Shape: the global one is stated, since from the local one alone JAX would take rows that two processes share
        # for a smaller batch.
        piece = lambda index: array[place[index[0].start or 0 if index else 0]]
        return jax.make_array_from_callback(shape, sharding, piece)

    return jax.tree.map(put, batch)


def constrain_batch(batch: Any) -> Any:
    """Splits what a jitted function makes for a batch as `put_batch` does; see `constrain`."""
    return jax.tree.map(lambda leaf: constrain(leaf, "batch", ...), batch)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of values that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())
