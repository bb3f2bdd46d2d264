"""The programs of a training config, with abstract arguments at the largest bucket of each."""

import dataclasses
import functools
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from ril_jax import sharding
from ril_jax.data.packing import PromptBatch, ResponseBatch, TileRung, VisionRung
from ril_jax.errors import InputError
from ril_jax.models import attention
from ril_jax.models.config import InternVisionConfig, ModelConfig
from ril_jax.models.internvl3 import TileInputs
from ril_jax.models.parameters import Network
from ril_jax.models.qwen2_5_vl import VisionInputs
from ril_jax.planning.chips import Topology
from ril_jax.planning.compiling import Program
from ril_jax.pretrained import make_network
from ril_jax.rewards.discriminator import make_discriminator
from ril_jax.sampling.logits import SamplingParams
from ril_jax.sampling.sampler import Sampler
from ril_jax.training import discriminator as discriminator_lib
from ril_jax.training import ril as ril_lib
from ril_jax.training.batches import Buckets, micro_rows
from ril_jax.training.programs import Programs
from ril_jax.training.state import abstract_state, make_optimizer, make_update, split_frozen


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


class TrainingPlan:
    """Abstract programs of a training config on a mesh of absent chips."""

    def __init__(self, config: ConfigDict, topology: Topology, mesh: Mesh):
        self.config, self.topology, self.mesh = config, topology, mesh
        sharding.use(mesh)
        attention.use(config.attention)
        self.model = model_config(config.student.checkpoint)
        self.network = make_network(self.model)
        student = config.student
        self.dtype = jnp.dtype(student.dtype)
        self.programs = Programs(self.network, self.dtype, remat=student.remat, chunk=student.logprob_chunk, unroll=1)
        self.shards = sharding.num_shards(mesh)
        self.sampling_mesh = sharding.sampling_mesh(mesh, config.sampling.layout)
        self.buckets = Buckets.from_config(self.model, config.data, shards=self.shards)

    def all(self) -> list[Program]:
        """Every program of sft, discriminator and ril, at its largest bucket."""
        out = [self.sft(), *self.encode(), *self.move(), self.sample(), self.score()]
        if self.config.discriminator.enabled:
            out.append(self.discriminator())
        return [*out, self.ril()]

    # --- programs ---

    def sft(self) -> Program:
        c = self.config.sft
        micro = self._micro(c)
        P, R, S = max(self.buckets.prompts), max(self.buckets.responses), max(c.responses_per_question, 1)
        optimizer = make_optimizer(c)
        trained, frozen = self._split(c)
        state = abstract_state(trained, optimizer, self.mesh)
        batch = (*self._rows(c.batch_size, micro, P, S, R, vision=True), self._normalizer(c.batch_size // micro))
        return Program(
            "sft update", f"{c.batch_size // micro} x {micro} rows of {P} + {S} x {R}",
            make_update(self.programs.sft_loss, optimizer), (state, frozen, batch),
            tokens=c.batch_size * (P + S * R), **self._training_bytes(c.batch_size, micro, P + S * R, trained),
        )  # fmt: skip

    def encode(self) -> list[Program]:
        c = self.config.ril
        micro = self._micro(c)
        vision = self._vision(c.batch_size // micro, micro)
        if vision is None:
            return []
        images = f"{c.batch_size // micro} x {self.buckets.groups(micro)} buffers {vision.patches.shape[2:]}"
        return [
            Program(
                "encode images", images, self.programs.encode, (self._params(self.dtype), vision),
                beside=self._beside(),
                **self._weight_bytes("vision.", passes=c.batch_size // micro),
            )
        ]  # fmt: skip

    def move(self) -> list[Program]:
        """The weights to where sampling wants them, once a step; nothing where they stay."""
        mesh = self.sampling_mesh
        if mesh is self.mesh:
            return []
        params = self._params(jnp.float32)
        size = sum(math.prod(p.shape) for p in params.values())
        before = 4 * size / (self.mesh.shape["fsdp"] * self.mesh.shape["tensor"])
        after = self.dtype.itemsize * size / mesh.shape["tensor"]
        fsdp = self.mesh.shape["fsdp"]
        shapes = " x ".join(f"{name} {count}" for name, count in mesh.shape.items())
        return [
            Program(
                "move weights", f"to {shapes}", self.programs.move(mesh), (params,),
                beside=self._beside("master weights"), hbm_bytes=before + after,
                network_bytes=after * (fsdp - 1) / fsdp,
            )
        ]  # fmt: skip

    def sample(self) -> Program:
        c, L = self.config.ril, self.config.sampling.max_completion_length
        B, P, G = c.batch_size, max(self.buckets.prompts), c.num_generations
        s = self.config.sampling
        mesh = self.sampling_mesh
        sampler = Sampler(
            self.network, (1, 2), 0, dtype=self.dtype, unroll=1, token_limit=self.model.text.vocab_size,
            mesh=None if mesh is self.mesh else mesh,
        )  # fmt: skip
        program = sampler._program(G, L, SamplingParams(s.temperature, s.top_p, s.top_k, s.repetition_penalty))
        prompts = self._prompts((B,), P)
        micro = self._micro(c)
        features = self._features(B // micro, micro)
        features = (
            None
            if features is None
            else self._array((features.shape[0] * features.shape[1], *features.shape[2:]), features.dtype, 0)
        )
        keys = self._array((B, 2), jnp.uint32, 0)
        if mesh is not self.mesh:
            rows = lambda a, axis=0: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding.rows(mesh, a.shape, axis))  # noqa: E731
            positions = rows(prompts.positions, 1)
            prompts, features, keys = jax.tree.map(rows, (prompts, features, keys))
            prompts = prompts._replace(positions=positions)
        text = self.model.text
        cache = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * self.dtype.itemsize
        chips = self.topology.num_chips
        weights = self._weight_bytes("text.", passes=1 + L, mesh=mesh)
        weights["hbm_bytes"] += L * cache * (B * P + B * G * L / 2) / chips
        return Program(
            "sample", f"{B} prompts of {P}, {G} x {L} tokens each", program,
            (self._params(self.dtype, mesh=mesh), prompts, features, keys),
            beside=self._beside(), tokens=B * G * L, while_trips=L, **weights,
        )  # fmt: skip

    def score(self) -> Program:
        c = self.config.ril
        micro, P, R = self._micro(c), max(self.buckets.prompts), max(self.buckets.responses)
        S = c.num_generations + c.num_teacher_generations
        prompts, responses = self._rows(c.batch_size, micro, P, S, R)
        features = self._features(c.batch_size // micro, micro)
        return Program(
            "reference log-probs", f"{c.batch_size // micro} x {micro} rows of {P} + {S} x {R}", self.programs.score,
            (self._params(self.dtype), prompts, responses, features), beside=self._beside("reference"),
            tokens=c.batch_size * (P + S * R), **self._weight_bytes("text.", passes=c.batch_size // micro),
        )  # fmt: skip

    def discriminator(self) -> Program:
        c, ril = self.config.discriminator, self.config.ril
        network = make_discriminator(self.model, context=c.context)
        programs = dataclasses.replace(self.programs, network=network)
        optimizer = make_optimizer(c, learning_rate=c.ril_learning_rate)
        micro = self._micro(c, ril.batch_size)
        S, P = ril.num_generations + ril.num_teacher_generations, max(c.prompt_buckets)
        R = max(self.buckets.responses)
        trained, frozen = split_frozen(self._params(jnp.float32, network), train_vision=False)
        state = abstract_state(trained, optimizer, self.mesh)
        rows = self._rows(ril.batch_size, micro, P, S, R, vision=c.context == "question_image")
        update = discriminator_lib._make_update(programs, optimizer, c.loss, ril.num_generations)
        return Program(
            "discriminator update", f"{ril.batch_size // micro} x {micro} rows of {P} + {S} x {R}", update,
            (state, frozen, (*rows, self._normalizer(ril.batch_size // micro))), beside=self._beside("discriminator"),
            tokens=ril.batch_size * (P + S * R), **self._training_bytes(ril.batch_size, micro, P + S * R, trained),
        )  # fmt: skip

    def ril(self) -> Program:
        c = self.config.ril
        B, micro = c.batch_size, self._micro(c)
        M, P, R = B // micro, max(self.buckets.prompts), max(self.buckets.responses)
        S = c.num_generations + c.num_teacher_generations
        optimizer = make_optimizer(c, learning_rate=c.learning_rate)
        trained, frozen = self._split(c)
        state = abstract_state(trained, optimizer, self.mesh)
        prompts, responses = self._rows(B, micro, P, S, R)
        row = lambda *shape: self._array((M, micro, *shape), jnp.float32, 1)  # noqa: E731
        features = self._features(M, micro)
        tower = self._vision(M, micro) if c.train_vision or c.train_projector else None
        old = row(S, R) if c.num_iterations > 1 else None
        ref = row(S, R) if c.beta else None
        update = ril_lib._policy_update(
            self.programs, optimizer, c.num_generations, c.epsilon, c.epsilon_high, c.beta, c.loss_type
        )
        batch = (
            prompts, responses, responses.mask, row(c.num_generations, R), row(S), features, tower, old, ref,
            self._normalizer(M),
        )  # fmt: skip
        return Program(
            "RIL update", f"{M} x {micro} rows of {P} + {S} x {R}", update, (state, frozen, batch),
            beside=self._beside("master weights", "moments"), tokens=B * (P + S * R), runs=c.num_iterations,
            **self._training_bytes(B, micro, P + S * R, trained),
        )  # fmt: skip

    # --- arguments ---

    def _micro(self, settings: ConfigDict, batch: int = 0) -> int:
        batch = batch or settings.batch_size
        micro = micro_rows(batch, settings.micro_batch_size, self.shards)
        if micro % self.shards:
            fix = f"batch_size={-(-batch // self.shards) * self.shards}"
            raise InputError(
                f"a batch of {batch} questions cannot be spread over {self.shards} devices (mesh data x fsdp); try "
                f"{fix}"
            )
        return micro

    def _array(self, shape: tuple[int, ...], dtype: Any, axis: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.rows(self.mesh, shape, axis))

    def _normalizer(self, count: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count,), jnp.float32, sharding=sharding.replicated(self.mesh))

    def _params(self, dtype: Any, network: Network | None = None, mesh: Mesh | None = None) -> Any:
        network = network or self.network
        return abstract_params(network, dtype, sharding.param_shardings(network.specs, mesh or self.mesh))

    def _split(self, settings: ConfigDict) -> tuple[Any, Any]:
        return split_frozen(
            self._params(jnp.float32), train_vision=settings.train_vision, train_projector=settings.train_projector
        )

    def _prompts(self, leading: tuple[int, ...], P: int, vision: Any = None) -> PromptBatch:
        axis = len(leading) - 1
        make = lambda shape, dtype, at=axis: self._array(shape, dtype, at)  # noqa: E731
        batch: Any = PromptBatch(
            make((*leading, P), jnp.int32),  # type: ignore[arg-type]
            make((*leading[:-1], 3, leading[-1], P), jnp.int32, axis + 1),  # type: ignore[arg-type]
            make((*leading, P), jnp.bool_),  # type: ignore[arg-type]
            make((*leading, P), jnp.int32),  # type: ignore[arg-type]
            make(leading, jnp.int32),  # type: ignore[arg-type]
            make(leading, jnp.bool_),  # type: ignore[arg-type]
            vision,
        )
        return batch

    def _rows(self, B: int, micro: int, P: int, S: int, R: int, *, vision: bool = False) -> tuple[Any, Any]:
        M = B // micro
        images = self._vision(M, micro) if vision else None
        shape = (M, micro, S, R)
        responses: Any = ResponseBatch(self._array(shape, jnp.int32, 1), self._array(shape, jnp.bool_, 1))  # type: ignore[arg-type]
        return self._prompts((M, micro), P, images), responses

    def _vision(self, M: int, micro: int) -> Any:
        """The buffers [M, groups, ...] of the smallest rung that holds an image of the largest size a question."""
        vision = self.model.vision
        if vision is None:
            return None
        groups = self.buckets.groups(micro)
        rows, data = micro // groups, self.config.data
        lead = (M, groups)
        make = lambda shape, dtype: self._array((*lead, *shape), dtype, 1)  # noqa: E731
        if isinstance(vision, InternVisionConfig):
            tiles = rows * ((data.max_tiles or 12) + 1)
            rung = _smallest([r for r in self.buckets.rungs if isinstance(r, TileRung)], lambda r: r.tiles >= tiles)
            return TileInputs(make((rung.tiles, math.prod(vision.grid), vision.patch_dim), jnp.float32))  # type: ignore[arg-type]
        patches = rows * data.max_pixels // vision.patch_size**2
        rung = _smallest([r for r in self.buckets.rungs if isinstance(r, VisionRung)], lambda r: r.patches >= patches)
        X, (windows, size) = rung.patches, rung.window_shape(vision)
        return VisionInputs(
            make((X, vision.patch_dim), jnp.float32), make((X, 2), jnp.int32),  # type: ignore[arg-type]
            make((windows, size), jnp.int32), make((X,), jnp.int32),  # type: ignore[arg-type]
            make((rung.images, rung.image_patches), jnp.int32), make((X,), jnp.int32),  # type: ignore[arg-type]
        )  # fmt: skip

    def _features(self, M: int, micro: int) -> Any:
        vision, buffers = self.model.vision, self._vision(M, micro)
        if buffers is None or vision is None:
            return None
        rows = math.prod(buffers.patches.shape[2:-1]) // vision.merge_unit
        shape = (M, self.buckets.groups(micro), rows, self.model.text.hidden_size)
        return self._array(shape, self.dtype, 1)

    # --- bytes, analytic ---

    def _beside(self, *own: str) -> float:
        """Bytes of a chip that the RIL stage keeps while a program runs, but for what it has as arguments (`own`)."""
        return sum(size for name, size in self._kept.items() if name not in own)

    @functools.cached_property
    def _kept(self) -> dict[str, float]:
        """The student's state, pi_ref, and the discriminator's state: bytes of a chip."""
        c, d = self.config.ril, self.config.discriminator
        params = self._params(jnp.float32)
        trained, _ = self._split(c)
        state = abstract_state(trained, make_optimizer(c, learning_rate=c.learning_rate), self.mesh)
        kept = {"master weights": chip_bytes(params), "moments": chip_bytes(state.opt)}
        if c.beta:
            kept["reference"] = chip_bytes(self._params(self.dtype))
        if d.enabled:
            params = self._params(jnp.float32, make_discriminator(self.model, context=d.context))
            trained, frozen = split_frozen(params, train_vision=False)
            state = abstract_state(trained, make_optimizer(d, learning_rate=d.ril_learning_rate), self.mesh)
            kept["discriminator"] = chip_bytes((state, frozen))
        return kept

    def _weight_bytes(self, prefix: str, *, passes: float, mesh: Mesh | None = None) -> dict[str, Any]:
        """Reading the weights in the compute dtype `passes` times, each gathered over fsdp."""
        mesh = mesh or self.mesh
        size = sum(math.prod(s.shape) for n, s in self.network.specs.items() if n.startswith(prefix))
        size *= self.dtype.itemsize / mesh.shape["tensor"]
        fsdp = mesh.shape["fsdp"]
        return {"hbm_bytes": passes * size, "network_bytes": passes * size * (fsdp - 1) / fsdp}

    def _training_bytes(self, B: int, micro: int, row_tokens: int, trained: Any) -> dict[str, Any]:
        """An update: weights read forward, again for remat, and backward; activations; gradients; the optimiser."""
        M, text = B // micro, self.model.text
        passes = M * (2 if self.config.student.remat == "none" else 3)
        out = self._weight_bytes("", passes=passes)
        weights = sum(math.prod(p.shape) for p in jax.tree.leaves(trained))
        shards = self.mesh.shape["fsdp"] * self.mesh.shape["tensor"]
        tokens = B * row_tokens / self.shards
        width = (
            2 * text.num_hidden_layers * (8 * text.hidden_size + 4 * text.intermediate_size / self.mesh.shape["tensor"])
        )
        out["hbm_bytes"] += 28 * weights / shards + 3 * tokens * width * self.dtype.itemsize / 2
        reduce = 4 * weights / self.mesh.shape["tensor"]
        fsdp, data, tensor = (self.mesh.shape[a] for a in ("fsdp", "data", "tensor"))
        out["network_bytes"] += M * reduce * (fsdp - 1) / fsdp
        if tensor > 1:  # two sums over `tensor` a layer and pass
            layer = 2 * tokens * text.hidden_size * self.dtype.itemsize * 2 * (tensor - 1) / tensor
            out["network_bytes"] += 3 * text.num_hidden_layers * layer
        if data > 1:
            between = 2 * reduce / fsdp * (data - 1) / data
            out["network_bytes"] += between
            if self.topology.num_slices > 1:
                out["across_slices"] = between
        return out


def abstract_params(network: Network, dtype: Any, shardings: dict[str, NamedSharding]) -> Any:
    """Shapes of all parameters in their shardings."""
    return {
        name: jax.ShapeDtypeStruct(spec.shape, dtype, sharding=shardings[name]) for name, spec in network.specs.items()
    }


def _smallest(rungs: list[Any], fits: Any) -> Any:
    held = [rung for rung in rungs if fits(rung)]
    return min(held, key=lambda r: r.size) if held else max(rungs, key=lambda r: r.size)


def chip_bytes(tree: Any) -> float:
    """Bytes of abstract arrays on one chip."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )
