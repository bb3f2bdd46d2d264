"""The programs that sample groups of one model: its tower and a batch's groups, or those of the engine."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ril_jax import sharding
from ril_jax.models.config import ModelConfig
from ril_jax.planning.arguments import ModelArguments, abstract_params
from ril_jax.planning.compiling import Program
from ril_jax.pretrained import make_network
from ril_jax.sampling.engine_programs import EnginePrograms, empty_chunk, empty_control
from ril_jax.sampling.images import FeatureStore
from ril_jax.sampling.local import engine_shapes
from ril_jax.sampling.logits import SamplingParams
from ril_jax.sampling.sampler import Sampler

Named = Callable[[str], str]  # the name of a program in the run that it is part of


def encode_images(
    model: ModelArguments, mesh: Mesh, M: int, micro: int, *, named: Named = str, beside: float = 0.0
) -> list[Program]:
    """Features of all images of a batch, M micro-batches; the weights lie on `mesh`. None for a model without a tower.

    beside: as of a `Program`, beyond the weights.
    """
    vision = model.vision(M, micro)
    if vision is None:
        return []
    images = f"{M} x {model.buckets.groups(micro)} buffers {vision.patches.shape[2:]}"
    arguments = model.params(model.dtype, mesh=mesh), vision
    return [
        Program(
            named("encode images"), images, model.programs.encode, arguments, beside=beside,
            **model.weight_bytes("vision.", passes=M, mesh=mesh),
        )
    ]  # fmt: skip


def sample_groups(
    model: ModelArguments, sampling: ConfigDict, mesh: Mesh, M: int, micro: int, G: int, *,
    named: Named = str, beside: float = 0.0,
) -> Program:  # fmt: skip
    """G responses to every question of a batch, M micro-batches, by weights that lie on `mesh`."""
    B, P, R = M * micro, max(model.buckets.prompts), sampling.max_completion_length
    moved = None if mesh is model.mesh else mesh
    sampler = Sampler(
        model.network, (1, 2), 0, dtype=model.dtype, unroll=1, token_limit=model.config.text.vocab_size, mesh=moved
    )
    how = SamplingParams(sampling.temperature, sampling.top_p, sampling.top_k, sampling.repetition_penalty)
    prompts, features = model.prompts((B,), P), model.features(M, micro)
    if features is not None:
        features = model.array((features.shape[0] * features.shape[1], *features.shape[2:]), features.dtype, 0)
    keys: Any = model.array((B, 2), jnp.uint32, 0)
    if moved is not None:
        rows = lambda a, axis=0: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding.rows(mesh, a.shape, axis))  # noqa: E731
        positions = rows(prompts.positions, 1)
        prompts, features, keys = jax.tree.map(rows, (prompts, features, keys))
        prompts = prompts._replace(positions=positions)
    cost = model.weight_bytes("text.", passes=1 + R, mesh=mesh)
    cost["hbm_bytes"] += R * _token_bytes(model.config, model.dtype) * (B * P + B * G * R / 2) / mesh.size
    return Program(
        named("sample"), f"{B} prompts of {P}, {G} x {R} tokens each", sampler._program(G, R, how),
        (model.params(model.dtype, mesh=mesh), prompts, features, keys),
        beside=beside, tokens=B * G * R, while_trips=R, **cost,
    )  # fmt: skip


class EnginePlan:
    """Abstract programs of the sampling engine on a mesh of absent chips."""

    def __init__(self, model: ModelConfig, dtype: Any, engine: ConfigDict, mesh: Mesh):
        """engine: as of `config.engine_config`, with its max_model_len. Raises InputError where it is wrong."""
        self.model, self.dtype, self.mesh = model, jnp.dtype(dtype), mesh
        network = make_network(model)
        self.shapes = engine_shapes(engine, max_positions=model.text.max_position_embeddings)
        self.programs = EnginePrograms(
            network, model, self.shapes, mesh, (1, 2), model.text.vocab_size, self.dtype, unroll=False
        )
        self.params = abstract_params(network, self.dtype, mesh)
        self.state = self.programs.abstract_state()
        self.weights = sum(math.prod(s.shape) for s in network.specs.values()) * self.dtype.itemsize

    def all(self, *, named: Named = str, beside: float = 0.0) -> list[Program]:
        """Encoding the largest image, every prefill, and both decode programs of all slots."""
        out = []
        common: dict[str, Any] = {"beside": beside, "mesh": self.mesh}
        if self.model.vision is not None:
            largest = self._whole(list(FeatureStore(self.model, self.shapes.feature_rows).examples())[-1])
            arguments = (self.params, self.state, largest, self._whole(jnp.int32(0)))
            shape = str(largest.patches.shape[:-1])
            out.append(
                Program(
                    named("encode an image"), shape, self.programs.encode, arguments, **self._bytes(), **common
                )
            )  # fmt: skip
        for tokens, rows in self.shapes.prefill:
            chunk = self._whole(empty_chunk(tokens, rows, self.shapes.table_width))
            out.append(
                Program(
                    named("prefill"), f"{rows} x {tokens} tokens", self.programs.prefill,
                    (self.params, self.state, chunk),
                    tokens=rows * tokens, while_trips=self._blocks, **self._bytes(), **common,
                )
            )  # fmt: skip
        for full in (False, True):
            slots = self.shapes.slots
            control = self._whole(empty_control(slots, self.shapes.table_width))
            out.append(
                Program(
                    named("decode" + (" with filters" if full else "")),
                    f"{slots} slots x {self.shapes.decode_steps} tokens",
                    self.programs.decode(slots, full), (self.params, self.state, control),
                    tokens=slots * self.shapes.decode_steps, while_trips=self.shapes.decode_steps,
                    **self._bytes(passes=self.shapes.decode_steps, cached=slots * self.shapes.max_model_len / 2),
                    **common,
                )
            )  # fmt: skip
        return out

    @property
    def _blocks(self) -> int:
        return -(-self.shapes.max_model_len // self.shapes.attention_block)

    def _whole(self, tree: Any) -> Any:
        where = sharding.replicated(self.mesh)
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(jnp.shape(a), a.dtype, sharding=where), tree)

    def _bytes(self, *, passes: float = 1, cached: float = 0) -> dict[str, Any]:
        """Reading the weights (gathered over fsdp) and the cache `passes` times; both a chip's share."""
        tensor, fsdp = self.mesh.shape["tensor"], self.mesh.shape["fsdp"]
        weights = self.weights / tensor
        return {
            "hbm_bytes": passes * (weights + cached * _token_bytes(self.model, self.dtype) / tensor),
            "network_bytes": passes * weights * (fsdp - 1) / fsdp,
        }


def run_engine(config: ConfigDict) -> ConfigDict:
    """config.sampling.engine with the length of a response that a training run fills in."""
    shapes = ConfigDict(config.sampling.engine.to_dict())
    longest = max(config.data.prompt_buckets) + config.sampling.max_completion_length
    shapes.max_model_len = shapes.max_model_len or longest
    return shapes


def _token_bytes(model: ModelConfig, dtype: Any) -> float:
    """Keys and values of a token."""
    text = model.text
    return 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * jnp.dtype(dtype).itemsize
