"""Abstract arguments of the programs of one model on a mesh: weights, prompts, rows, image buffers and features."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ril_jax import sharding
from ril_jax.data.packing import PromptBatch, ResponseBatch, TileRung, VisionRung
from ril_jax.errors import InputError
from ril_jax.models.config import InternVisionConfig, ModelConfig
from ril_jax.models.internvl3 import TileInputs
from ril_jax.models.parameters import Network
from ril_jax.models.qwen2_5_vl import VisionInputs
from ril_jax.pretrained import make_network
from ril_jax.training.batches import Buckets
from ril_jax.training.programs import Programs


def model_config(checkpoint: str) -> ModelConfig:
    """Of a local folder, or by the name of a released checkpoint. Raises InputError for any other."""
    if Path(checkpoint).expanduser().is_dir():
        return ModelConfig.from_folder(Path(checkpoint).expanduser())
    name = checkpoint.rpartition("/")[2].lower()
    kinds = (
        (r"qwen2\.5-vl-(\d+b)", ModelConfig.qwen2_5_vl),
        (r"internvl3-(\d+b)", ModelConfig.internvl3),
        (r"qwen2\.5-([\d.]+b)", ModelConfig.qwen2_5),
    )
    for pattern, make in kinds:
        if found := re.match(pattern, name):
            return make(found[1])
    raise InputError(f"checkpoint {checkpoint!r} is no folder and no released model of a known size; name one of them")


class ModelArguments:
    """Of a run's student or of one of its teachers, in the shapes that the run gives it.

    Attributes: mesh (the run's, on which batches are put), dtype (of computing), programs, buckets; shards, over which
    rows are spread. B questions, P prompt tokens, S responses of R tokens, M micro-batches.
    """

    def __init__(self, settings: ConfigDict, data: ConfigDict, mesh: Mesh):
        """settings: config.student or one of config.teachers; data: config.data."""
        self.data, self.mesh = data, mesh
        self.config = model_config(settings.checkpoint)
        self.network = make_network(self.config)
        self.dtype = jnp.dtype(settings.dtype)
        self.programs = Programs(self.network, self.dtype, remat=settings.remat, chunk=settings.logprob_chunk, unroll=1)
        self.shards = sharding.num_shards(mesh)
        self.buckets = Buckets.from_config(self.config, data, shards=self.shards)

    def array(self, shape: tuple[int, ...], dtype: Any, axis: int) -> jax.ShapeDtypeStruct:
        """One whose `axis` has rows."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.rows(self.mesh, shape, axis))

    def whole(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.replicated(self.mesh))

    def params(self, dtype: Any, *, network: Network | None = None, mesh: Mesh | None = None) -> Any:
        """All weights, of another network or on another mesh where those are given."""
        return abstract_params(network or self.network, dtype, mesh or self.mesh)

    def prompts(self, leading: tuple[int, ...], P: int, vision: Any = None) -> PromptBatch:
        """Of [*leading] rows, the last of which is spread."""
        axis = len(leading) - 1
        make: Callable[..., Any] = lambda shape, dtype, at=axis: self.array(shape, dtype, at)  # noqa: E731
        return PromptBatch(
            make((*leading, P), jnp.int32), make((*leading[:-1], 3, leading[-1], P), jnp.int32, axis + 1),
            make((*leading, P), jnp.bool_), make((*leading, P), jnp.int32),
            make(leading, jnp.int32), make(leading, jnp.bool_), vision,
        )  # fmt: skip

    def rows(self, B: int, micro: int, P: int, S: int, R: int, *, vision: bool = False) -> tuple[Any, Any]:
        """Prompts, perhaps with images, and responses, in micro-batches."""
        M = B // micro
        images = self.vision(M, micro) if vision else None
        shape = (M, micro, S, R)
        responses: Any = ResponseBatch(self.array(shape, jnp.int32, 1), self.array(shape, jnp.bool_, 1))  # type: ignore[arg-type]
        return self.prompts((M, micro), P, images), responses

    def vision(self, M: int, micro: int) -> Any:
        """The buffers [M, groups, ...] of the smallest rung that holds an image of the largest size a question."""
        vision = self.config.vision
        if vision is None:
            return None
        groups = self.buckets.groups(micro)
        rows = micro // groups
        make: Callable[..., Any] = lambda shape, dtype: self.array((M, groups, *shape), dtype, 1)  # noqa: E731
        if isinstance(vision, InternVisionConfig):
            tiles = rows * ((self.data.max_tiles or 12) + 1)
            rung = _smallest([r for r in self.buckets.rungs if isinstance(r, TileRung)], lambda r: r.tiles >= tiles)
            return TileInputs(make((rung.tiles, math.prod(vision.grid), vision.patch_dim), jnp.float32))
        patches = rows * self.data.max_pixels // vision.patch_size**2
        rung = _smallest([r for r in self.buckets.rungs if isinstance(r, VisionRung)], lambda r: r.patches >= patches)
        X, (windows, size) = rung.patches, rung.window_shape(vision)
        return VisionInputs(
            make((X, vision.patch_dim), jnp.float32), make((X, 2), jnp.int32), make((windows, size), jnp.int32),
            make((X,), jnp.int32), make((rung.images, rung.image_patches), jnp.int32), make((X,), jnp.int32),
        )  # fmt: skip

    def features(self, M: int, micro: int) -> Any:
        """Of the images of `vision`, [M, groups, F, D]."""
        vision, buffers = self.config.vision, self.vision(M, micro)
        if buffers is None or vision is None:
            return None
        rows = math.prod(buffers.patches.shape[2:-1]) // vision.merge_unit
        return self.array((M, self.buckets.groups(micro), rows, self.config.text.hidden_size), self.dtype, 1)

    def weight_bytes(self, prefix: str, *, passes: float, mesh: Mesh | None = None) -> dict[str, Any]:
        """Of a `Program`: reading the weights in the compute dtype `passes` times, each gathered over fsdp."""
        mesh = mesh or self.mesh
        size = sum(math.prod(s.shape) for n, s in self.network.specs.items() if n.startswith(prefix))
        size *= self.dtype.itemsize / mesh.shape["tensor"]
        fsdp = mesh.shape["fsdp"]
        return {"hbm_bytes": passes * size, "network_bytes": passes * size * (fsdp - 1) / fsdp}


def abstract_params(network: Network, dtype: Any, mesh: Mesh) -> Any:
    """Shapes of all parameters in their shardings."""
    where = sharding.param_shardings(network.specs, mesh)
    return {n: jax.ShapeDtypeStruct(spec.shape, dtype, sharding=where[n]) for n, spec in network.specs.items()}


def chip_bytes(tree: Any) -> float:
    """Bytes of abstract arrays on one chip."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _smallest(rungs: list[Any], fits: Any) -> Any:
    held = [rung for rung in rungs if fits(rung)]
    return min(held, key=lambda r: r.size) if held else max(rungs, key=lambda r: r.size)
