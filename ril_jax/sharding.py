"""Where arrays live: the mesh, and one table from logical axes to mesh axes.

Mesh axes: `data` (replicas, spans slices), `fsdp` (batch and weights), `tensor` (heads, feed-forward, vocabulary).
"""

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ril_jax import processes
from ril_jax.errors import InputError
from ril_jax.models.parameters import ParamSpec

# Logical axis of a parameter -> mesh axis. What is not named here is replicated.
RULES: dict[str, str] = {
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "ff": "tensor",
    "vocab": "tensor",
    "vision_embed": "fsdp",
    "vision_heads": "tensor",
    "vision_ff": "tensor",
}
# Where `tensor` does not divide one of these (151,674 words, the 25 heads of InternViT-6B), it divides the other, which
# a parameter with the first has too: what each device then adds up is small beside weights that all of them would hold.
INSTEAD: dict[str, str] = {"vocab": "embed", "vision_heads": "vision_embed"}
BATCH = ("data", "fsdp")
_mesh: Mesh | None = None


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1) -> Mesh:
    """A mesh over all devices; one size may be -1. Raises InputError where the product is not the device count."""
    return mesh_of(jax.devices(), data=data, fsdp=fsdp, tensor=tensor)


def mesh_of(devices: Sequence[Any], *, data: int, fsdp: int, tensor: int) -> Mesh:
    """The same over given devices, absent ones too."""
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    free = [name for name, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or fixed <= 0 or len(devices) % fixed or (not free and fixed != len(devices)):
        raise InputError(
            f"config.mesh {sizes} does not fit {len(devices)} devices; leave one axis at -1 and give the others sizes "
            f"whose product divides that, such as --config.mesh.tensor=1"
        )
    if free:
        sizes[free[0]] = len(devices) // fixed
    return Mesh(np.asarray(devices).reshape(tuple(sizes.values())), tuple(sizes))


def sampling_mesh(mesh: Mesh, layout: str) -> Mesh:
    """The same devices in the same order as a mesh to sample on, for which weights are moved.

    Weights that are spread over `fsdp` are gathered for every token. "replicated" keeps them only over `tensor`, rows
    being spread as in training; "tensor" spreads heads, feed-forward and vocabulary over `fsdp` and `tensor` together,
    and rows over `data` alone. "training" is `mesh` itself.
    """
    data, fsdp, tensor = (mesh.shape[name] for name in ("data", "fsdp", "tensor"))
    if layout == "training" or fsdp == 1:
        return mesh
    sizes = (data * fsdp, 1, tensor) if layout == "replicated" else (data, 1, fsdp * tensor)
    return Mesh(mesh.devices.reshape(sizes), mesh.axis_names)


def spec_of(spec: ParamSpec, mesh: Mesh) -> PartitionSpec:
    """The partition of one parameter; an axis that the mesh axis does not divide is replicated, or see `INSTEAD`."""
    targets: dict[str, tuple[str, ...]] = {axis: (RULES[axis],) for axis in spec.axes if axis in RULES}
    for first, other in INSTEAD.items():
        if first in targets and spec.shape[spec.axes.index(first)] % mesh.shape["tensor"]:
            targets |= {first: (), other: (*targets.get(other, ()), "tensor")}
    used: set[str] = set()
    parts: list[Any] = []
    for size, axis in zip(spec.shape, spec.axes, strict=True):
        over = tuple(t for t in targets.get(axis or "", ()) if t not in used and mesh.shape[t] > 1)
        while over and size % math.prod(mesh.shape[t] for t in over):
            over = over[:-1]
        parts.append(over[0] if len(over) == 1 else over or None)
        used.update(over)
    while parts and parts[-1] is None:  # P('x') and P('x', None) are the same, but jit counts them as two
        parts.pop()
    return PartitionSpec(*parts)


def param_shardings(specs: Mapping[str, ParamSpec], mesh: Mesh) -> dict[str, NamedSharding]:
    """The sharding of every parameter of a network."""
    return {name: NamedSharding(mesh, spec_of(spec, mesh)) for name, spec in specs.items()}


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def rows(mesh: Mesh, shape: tuple[int, ...], axis: int) -> NamedSharding:
    """The rows of an array (one of its axes) over data and fsdp; replicated where there are none to divide."""
    if len(shape) <= axis or shape[axis] % num_shards(mesh) or num_shards(mesh) == 1:
        return replicated(mesh)
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH))


def num_shards(mesh: Mesh) -> int:
    """Over how many devices the rows of a batch are spread."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def full_batch(size: int, mesh: Mesh) -> int:
    """The smallest batch of at least `size` rows that spreads over the mesh, for programs that may have idle rows."""
    return -(-size // num_shards(mesh)) * num_shards(mesh)


class Part(NamedTuple):
    """Of the `num_shards` shares of a batch those that lie on this process's devices, in order.

    Where the devices of one share belong to several processes, all of them hold it, and the first owns it: it answers
    for what is done once a row, such as asking a judge.
    """

    held: tuple[int, ...]
    owned: tuple[int, ...]


def part(mesh: Mesh) -> Part | None:
    """This process's part of a batch; None in a run of one process, which has all of it."""
    if processes.count() == 1:
        return None
    holders = [sorted({device.process_index for device in row}) for row in mesh.devices.reshape(num_shards(mesh), -1)]
    me = processes.index()
    held = tuple(i for i, them in enumerate(holders) if me in them)
    return Part(held, tuple(i for i in held if holders[i][0] == me))


def use(mesh: Mesh | None) -> None:
    """From here on `constrain` means this mesh; every program of a process is for one set of devices."""
    global _mesh
    _mesh = mesh


@contextlib.contextmanager
def using(mesh: Mesh | None) -> Iterator[None]:
    """In this block `constrain` means this mesh; None changes nothing. For the body of a function that is traced."""
    global _mesh
    before = _mesh
    _mesh = before if mesh is None else mesh
    try:
        yield
    finally:
        _mesh = before


def mesh_in_use() -> Mesh | None:
    return _mesh


def platform() -> str:
    """Of the devices that programs are for: those of the mesh in use, which may be absent, else this process's own."""
    return jax.default_backend() if _mesh is None else _mesh.devices.flat[0].platform


def batch_axes(rows: int) -> tuple[str, ...] | None:
    """The axes of the mesh in use that so many rows are spread over, None where they are not."""
    return BATCH if _mesh is not None and num_shards(_mesh) > 1 and rows % num_shards(_mesh) == 0 else None


def constrain(tree: Any, *axes: str | None) -> Any:
    """Inside jit: say where arrays lie, by logical axes ("batch", or those of RULES), leading ones first.

    Without it XLA may choose to gather activations instead of weights. Nothing on one device; an axis that does not
    divide is left to XLA.
    """
    mesh = _mesh
    if mesh is None or mesh.size == 1:
        return tree

    def one(x):
        parts: list[Any] = []
        for size, axis in zip(x.shape, axes, strict=False):
            target = BATCH if axis == "batch" else RULES.get(axis or "")
            count = num_shards(mesh) if axis == "batch" else mesh.shape[target] if target else 1
            parts.append(target if target and count > 1 and size % count == 0 else None)
        if not any(parts):
            return x
        while parts and parts[-1] is None:
            parts.pop()
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*parts)))

    return jax.tree.map(one, tree)


def constrain_features(x) -> Any:
    """Inside jit: x [..., D] is whole along its last axis on every device, and lies as XLA likes along the others."""
    if _mesh is None or _mesh.size == 1:
        return x
    free = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, NamedSharding(_mesh, PartitionSpec(*free, None)))


def put(tree: Any, mesh: Mesh) -> Any:
    """Host arrays on the devices, replicated; scalars and small index tables, and batches on a single device."""
    if processes.count() == 1:
        return jax.device_put(tree, replicated(mesh))
    return jax.tree.map(lambda leaf: of_all(np.asarray(leaf), replicated(mesh)), tree)


def of_all(array: np.ndarray, where: NamedSharding) -> jax.Array:
    """An array that every process has as a whole, in its sharding; unlike jax.device_put without comparing them."""
    return jax.make_array_from_callback(array.shape, where, array.__getitem__)


def put_rows(array: np.ndarray, mesh: Mesh, axis: int) -> jax.Array:
    """A host array whose `axis` has rows, over data and fsdp; of several processes each gives the rows of its `part`.

    Replicated where the array has no such axis, or, in one process, a number of rows that does not divide.
    """
    mine = part(mesh)
    if mine is None:
        return jax.device_put(array, rows(mesh, np.shape(array), axis))
    array = np.asarray(array)
    if array.ndim <= axis or num_shards(mesh) == 1:
        return of_all(array, replicated(mesh))
    share = array.shape[axis] // len(mine.held)  # rows of a shard
    shape = (*array.shape[:axis], share * num_shards(mesh), *array.shape[axis + 1 :])

    def of(index: Any) -> np.ndarray:
        at = mine.held.index(index[axis].indices(shape[axis])[0] // share)
        return array[(*index[:axis], slice(at * share, (at + 1) * share))]

    return jax.make_array_from_callback(shape, rows(mesh, shape, axis), of)


def own_rows(tree: Any, mesh: Mesh, axis: int = 0) -> Any:
    """The inverse: this process's rows of arrays on the devices, on the host; in one process all. All must call it."""
    mine = part(mesh)
    if mine is None:
        return jax.device_get(tree)
    where = jax.tree.map(lambda leaf: rows(mesh, leaf.shape, axis), tree)

    def fetch(leaf: jax.Array) -> np.ndarray:
        if leaf.sharding.is_fully_replicated:
            return np.asarray(leaf)
        parts = {shard.index[axis].start or 0: shard for shard in leaf.addressable_shards}
        return np.concatenate([np.asarray(parts[start].data) for start in sorted(parts)], axis)

    return jax.tree.map(fetch, _laid_out(tree, where))


def move_rows(array: jax.Array, mesh: Mesh, axis: int = 0) -> jax.Array:
    """An array on the devices with its rows over another mesh of the same devices."""
    where = rows(mesh, array.shape, axis)
    return array if array.sharding.is_equivalent_to(where, array.ndim) else _laid_out(array, where)


def gathered(tree: Any, mesh: Mesh) -> Any:
    """Arrays on the devices as a whole on every host. All processes must call it."""
    if processes.count() == 1:
        return jax.device_get(tree)
    return jax.device_get(_laid_out(tree, jax.tree.map(lambda _: replicated(mesh), tree)))


def _laid_out(tree: Any, where: Any) -> Any:
    """The arrays moved into these shardings, by the devices."""
    leaves, structure = jax.tree.flatten(where)
    return _move(structure, tuple(leaves))(tree)


@functools.cache
def _move(structure: Any, shardings: tuple[NamedSharding, ...]):
    def move(tree):
        return tree

    return jax.jit(move, out_shardings=jax.tree.unflatten(structure, shardings))
