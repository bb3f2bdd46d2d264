"""TPU chips by their published figures, slices by their names, and devices to compile for."""

import dataclasses
import functools
import os
from typing import Any

import numpy as np
from jax.sharding import Mesh

from ril_jax.errors import InputError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as the compiler sees it.

    Attributes: hbm (bytes that the compiler can use), flops (bfloat16 a second), hbm_bandwidth and ici_bandwidth (bytes
    a second; the links of a chip together), all as published or as libtpu reports them.
    """

    kind: str
    hbm: float
    flops: float
    hbm_bandwidth: float
    ici_bandwidth: float
    slices: tuple[str, ...]


CHIPS = {
    "v5e": Chip("v5e", 15.75 * GIB, 197e12, 819e9, 200e9, ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")),
    "v5p": Chip("v5p", 95.74 * GIB, 459e12, 2765e9, 600e9, ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8")),
    "v6e": Chip("v6e", 31.25 * GIB, 918e12, 1640e9, 448e9, ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")),
}
DCN_BANDWIDTH = 6.25e9  # bytes a second a chip between slices: 200 Gbit/s a host of 4 chips
HEADROOM = 1 * GIB  # what the runtime, other programs and fragmentation need beside a program's peak


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice (or several alike), e.g. v5e:4x4."""

    chip: Chip
    shape: str
    num_slices: int = 1

    @classmethod
    def parse(cls, text: str, num_slices: int = 1) -> "Topology":
        """`kind:AxB[xC]`. Raises InputError with the known ones."""
        kind, _, shape = text.partition(":")
        if kind not in CHIPS:
            raise InputError(f"--topology={text}: the kind {kind!r} is not known; known are {', '.join(CHIPS)}")
        if not all(part.isdigit() and int(part) for part in shape.split("x")):
            known = ", ".join(CHIPS[kind].slices)
            raise InputError(f"--topology={text}: {shape!r} is no shape; known for {kind} are {known}")
        return cls(CHIPS[kind], shape, num_slices)

    def __str__(self) -> str:
        slices = f" x {self.num_slices} slices" if self.num_slices > 1 else ""
        return f"{self.chip.kind}:{self.shape}{slices}"

    @property
    def num_chips(self) -> int:
        return int(np.prod([int(part) for part in self.shape.split("x")])) * self.num_slices

    def mesh(self, *, data: int, fsdp: int, tensor: int) -> Mesh:
        """A mesh over the absent chips; `data` spans the slices. Raises InputError where the axes do not fit."""
        from ril_jax import sharding

        devices = _devices(f"{self.chip.kind}:{self.shape}", self.num_slices)
        if self.num_slices > 1 and data == 1:
            data = self.num_slices
        return sharding.mesh_of(devices, data=data, fsdp=fsdp, tensor=tensor)


@functools.cache
def _devices(name: str, num_slices: int) -> list[Any]:
    # Set before libtpu is loaded: several processes may compile at once, and its log stays quiet.
    for key, value in (
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"), ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_ACCELERATOR_TYPE", "v5litepod-4"), ("TPU_WORKER_HOSTNAMES", "localhost"),
    ):  # fmt: skip
        os.environ.setdefault(key, value)
    from jax.experimental import topologies

    options: dict[str, Any] = {"num_slices": num_slices} if num_slices > 1 else {}
    if name.endswith(":1x1"):
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except Exception as error:  # libtpu is missing, or knows no such slice
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"--topology={name}: the TPU compiler cannot describe it ({reason}); `pip install 'ril_jax[tpu]'` brings "
            f"the compiler"
        ) from error
