"""The programs of a serving config: the sampling engine's, with abstract arguments."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ril_jax import sharding
from ril_jax.models import attention
from ril_jax.planning.chips import Topology
from ril_jax.planning.compiling import Program
from ril_jax.planning.training import abstract_params, model_config
from ril_jax.pretrained import make_network
from ril_jax.sampling.engine_programs import EnginePrograms, empty_chunk, empty_control
from ril_jax.sampling.images import FeatureStore
from ril_jax.sampling.local import engine_shapes


class ServingPlan:
    """Abstract programs of the engine on a mesh of absent chips."""

    def __init__(self, config: ConfigDict, topology: Topology, mesh: Mesh):
        self.config, self.topology, self.mesh = config, topology, mesh
        sharding.use(mesh)
        attention.use(config.attention)
        self.model = model_config(config.checkpoint)
        network = make_network(self.model)
        self.shapes = engine_shapes(config.engine, max_positions=self.model.text.max_position_embeddings)
        dtype = jnp.dtype(config.dtype)
        vocab = self.model.text.vocab_size
        self.programs = EnginePrograms(network, self.model, self.shapes, mesh, (1, 2), vocab, dtype, unroll=False)
        self.params = abstract_params(network, dtype, sharding.param_shardings(network.specs, mesh))
        self.state = self.programs.abstract_state()
        self.weights = sum(math.prod(s.shape) for s in network.specs.values()) * dtype.itemsize

    def all(self) -> list[Program]:
        """Encoding the largest image, every prefill, and both decode programs of all slots."""
        out = []
        if self.model.vision is not None:
            largest = self._whole(list(FeatureStore(self.model, self.shapes.feature_rows).examples())[-1])
            arguments = (self.params, self.state, largest, self._whole(jnp.int32(0)))
            shape = str(largest.patches.shape[:-1])
            out.append(Program("encode an image", shape, self.programs.encode, arguments, **self._bytes()))
        for tokens, rows in self.shapes.prefill:
            chunk = self._whole(empty_chunk(tokens, rows, self.shapes.table_width))
            out.append(
                Program(
                    "prefill", f"{rows} x {tokens} tokens", self.programs.prefill, (self.params, self.state, chunk),
                    tokens=rows * tokens, while_trips=self._blocks, **self._bytes(),
                )
            )  # fmt: skip
        for full in (False, True):
            slots = self.shapes.slots
            control = self._whole(empty_control(slots, self.shapes.table_width))
            out.append(
                Program(
                    "decode" + (" with filters" if full else ""), f"{slots} slots x {self.shapes.decode_steps} tokens",
                    self.programs.decode(slots, full), (self.params, self.state, control),
                    tokens=slots * self.shapes.decode_steps, while_trips=self.shapes.decode_steps,
                    **self._bytes(passes=self.shapes.decode_steps, cached=slots * self.shapes.max_model_len / 2),
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
        text = self.model.text
        token = (
            2
            * text.num_hidden_layers
            * text.num_key_value_heads
            * text.head_dim
            * jnp.dtype(self.config.dtype).itemsize
        )
        weights = self.weights / tensor
        return {
            "hbm_bytes": passes * (weights + cached * token / tensor),
            "network_bytes": passes * weights * (fsdp - 1) / fsdp,
        }
