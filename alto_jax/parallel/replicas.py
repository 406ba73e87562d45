"""Processes whose devices hold the same parts of every array: one of them reads, the others get it over the links.

Such processes, which differ on the mesh axes alone that split no array (data, as a rule), have one role. What is
spread is the same to the last bit: the parts travel as integers, of which all but one are zero.
"""

from collections.abc import Collection, Iterable, Sequence
import functools
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alto_jax.parallel import distributed

BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}  # Size of a type → the integers of its bits.


def bounds(index: Sequence[slice], shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """A part of an array: (start, stop) of each of its axes."""
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def parts(leaf: Any) -> list[tuple[tuple[int, int], ...]]:
    """The parts of an array (or its ShapeDtypeStruct, with a sharding) that this process's devices hold, sorted."""
    held = leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
    return sorted({bounds(index, leaf.shape) for index in held})


def role_of(leaves: Iterable[Any]) -> str:
    """A hash of what this process holds of all arrays; the same in processes that hold the same."""
    told = [(leaf.shape, str(leaf.dtype), parts(leaf)) for leaf in leaves]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


def readers_of(roles: Sequence[str], able: Sequence[bool]) -> frozenset[int] | None:
    """The first of the processes of each role that is able to read.

    Args:
      roles, able: of each process.

    Returns:
      The numbers of those processes; None: of a role there is none.
    """
    first: dict[str, int] = {}
    for process, (role, is_able) in enumerate(zip(roles, able, strict=True)):
        if is_able:
            first.setdefault(role, process)
    return frozenset(first.values()) if first.keys() == set(roles) else None


def blank(tree: Any) -> Any:
    """Zeros of the shapes, dtypes and shardings of a tree of ShapeDtypeStructs: of a process that does not read."""

    def zeros(leaf: Any) -> jax.Array:
        part = lambda index: np.zeros([b - a for a, b in bounds(index, leaf.shape)], leaf.dtype)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)

    return jax.tree.map(zeros, tree)


def spread(tree: Any, readers: Collection[int]) -> Any:
    """Arrays that all processes hold, of what the readers have read; all processes call this together.

    Args:
      tree: arrays; those of processes that are no readers may hold anything, their memory is given up.
      readers: one process at least of each role.

    Returns:
      The tree, with the readers' bits everywhere.
    """
    return jax.tree.map(lambda leaf: _spread_one(leaf, frozenset(readers)), tree)


def _spread_one(leaf: jax.Array, readers: frozenset[int]) -> jax.Array:
    sharding = leaf.sharding
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return leaf
    used = {name for entry in sharding.spec for name in (entry if isinstance(entry, tuple) else (entry,))}
    others = tuple(name for name, size in sharding.mesh.shape.items() if name not in used and size > 1)
    if not others:
        return leaf
    # Note: of the devices that hold the same part, the first one of a reader gives it.
    gives, found = np.zeros(sharding.mesh.devices.shape, bool), set()
    held = sharding.devices_indices_map(leaf.shape)
    for place, device in np.ndenumerate(sharding.mesh.devices):
        part = bounds(held[device], leaf.shape)
        if device.process_index in readers and part not in found:
            gives[place] = True
            found.add(part)
    split = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*sharding.mesh.axis_names))
    mask = jax.make_array_from_callback(gives.shape, split, lambda index: gives[index])
    return _program(sharding.mesh, sharding.spec, others)(leaf, mask)


@functools.cache
def _program(mesh: jax.sharding.Mesh, spec: jax.sharding.PartitionSpec, others: tuple[str, ...]) -> Any:
    def give(part: jax.Array, gives: jax.Array) -> jax.Array:
        bits = BITS[part.dtype.itemsize]
        known = part.astype(bits) if part.dtype == bool else jax.lax.bitcast_convert_type(part, bits)
        known = jax.lax.psum(jnp.where(gives.reshape(()), known, 0).astype(jnp.uint32), others).astype(bits)
        return known.astype(bool) if part.dtype == bool else jax.lax.bitcast_convert_type(known, part.dtype)

    every = jax.sharding.PartitionSpec(*mesh.axis_names)
    split = jax.shard_map(give, mesh=mesh, in_specs=(spec, every), out_specs=spec, check_vma=False)
    return distributed.meeting(jax.jit(split, donate_argnums=0))
