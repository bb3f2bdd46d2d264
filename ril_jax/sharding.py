"""Where arrays live: the mesh, and one table from logical axes to mesh axes.

Mesh axes: `data` (replicas, spans slices), `fsdp` (batch and weights), `tensor` (heads, feed-forward, vocabulary).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

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
        raise InputError(f"config.mesh {sizes} does not fit {len(devices)} devices; leave at most one axis at -1")
    if free:
        sizes[free[0]] = len(devices) // fixed
    return Mesh(np.asarray(devices).reshape(tuple(sizes.values())), tuple(sizes))


def spec_of(spec: ParamSpec, mesh: Mesh) -> PartitionSpec:
    """The partition of one parameter; an axis whose size the mesh axis does not divide is replicated."""
    used: set[str] = set()
    parts: list[str | None] = []
    for size, axis in zip(spec.shape, spec.axes, strict=True):
        target = RULES.get(axis or "")
        if target is None or target in used or size % mesh.shape[target] or mesh.shape[target] == 1:
            parts.append(None)
        else:
            parts.append(target)
            used.add(target)
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


def use(mesh: Mesh) -> None:
    """From here on `constrain` means this mesh; every program of a process is for one set of devices."""
    global _mesh
    _mesh = mesh


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


def put(tree: Any, mesh: Mesh) -> Any:
    """Host arrays on the devices, replicated; scalars and small index tables, and batches on a single device."""
    return jax.device_put(tree, replicated(mesh))
