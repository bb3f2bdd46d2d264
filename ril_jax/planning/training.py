"""The programs of a training config, with abstract arguments at the largest bucket of each."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ril_jax import config as config_lib
from ril_jax import sharding
from ril_jax.errors import InputError
from ril_jax.models import attention
from ril_jax.planning.arguments import ModelArguments, chip_bytes
from ril_jax.planning.chips import Topology
from ril_jax.planning.collect import collect_programs
from ril_jax.planning.compiling import Program
from ril_jax.planning.sampling import EnginePlan, encode_images, run_engine, sample_groups
from ril_jax.rewards.discriminator import make_discriminator
from ril_jax.training import discriminator as discriminator_lib
from ril_jax.training import ril as ril_lib
from ril_jax.training.batches import micro_rows
from ril_jax.training.state import abstract_state, make_optimizer, make_update, split_frozen


class TrainingPlan:
    """Abstract programs of a training config on a mesh of absent chips."""

    def __init__(self, config: ConfigDict, topology: Topology, mesh: Mesh):
        self.config, self.topology, self.mesh = config, topology, mesh
        sharding.use(mesh)
        attention.use(config.attention)
        self.student = ModelArguments(config.student, config.data, mesh)
        self.buckets = self.student.buckets
        self.sampling_mesh = sharding.sampling_mesh(mesh, config.sampling.layout)

    def all(self) -> list[Program]:
        """Every program of the config's stages, at its largest bucket. Raises InputError where there is none."""
        stages, out = config_lib.stages(self.config), []
        if "sft" in stages:
            out.append(self.sft())
        if "collect" in stages:
            out += collect_programs(self.config, self.student, self.mesh)
        if "ril" in stages:
            out += [*self.encode(), *self.move(), *self.sample(), *self.score()]
        if self.config.discriminator.enabled and {"discriminator", "ril"} & {*stages}:
            out.append(self.discriminator())
        if "ril" in stages:
            out.append(self.ril())
        if not out:
            raise InputError(f"config.stages={self.config.stages}: no stage of it has a program to plan; name others")
        return out

    # --- programs ---

    def sft(self) -> Program:
        c = self.config.sft
        micro = self._micro(c)
        P, R, S = max(self.buckets.prompts), max(self.buckets.responses), max(c.responses_per_question, 1)
        optimizer = make_optimizer(c)
        trained, frozen = self._split(c)
        state = abstract_state(trained, optimizer, self.mesh)
        batch = (
            *self.student.rows(c.batch_size, micro, P, S, R, vision=True),
            self.student.whole((c.batch_size // micro,), jnp.float32),
        )
        return Program(
            "sft update", f"{c.batch_size // micro} x {micro} rows of {P} + {S} x {R}",
            make_update(self.student.programs.sft_loss, optimizer), (state, frozen, batch),
            tokens=c.batch_size * (P + S * R), **self._training_bytes(c.batch_size, micro, P + S * R, trained),
        )  # fmt: skip

    def encode(self) -> list[Program]:
        return encode_images(self.student, self.sampling_mesh, *self._micro_batches(), beside=self._beside())

    def move(self) -> list[Program]:
        """The weights to where sampling wants them, once a step; nothing where they stay.

        They are moved one after another. The program is the largest one's, with the others as they are before and after
        beside it.
        """
        mesh = self.sampling_mesh
        if mesh is self.mesh:
            return []
        params, movers = self.student.params(jnp.float32), self.student.programs.movers(mesh)
        before = {name: chip_bytes(param) for name, param in params.items()}
        moved = self.student.params(self.student.dtype, mesh=mesh)
        after = {name: chip_bytes(param) for name, param in moved.items()}
        largest = max(params, key=after.__getitem__)
        rest = sum(before.values()) + sum(after.values()) - before[largest] - after[largest]
        fsdp = self.mesh.shape["fsdp"]
        shapes = " x ".join(f"{name} {count}" for name, count in mesh.shape.items())
        return [
            Program(
                "move weights", f"to {shapes}", movers[largest], (params[largest],),
                beside=self._beside("master weights") + rest, hbm_bytes=sum(before.values()) + sum(after.values()),
                network_bytes=sum(after.values()) * (fsdp - 1) / fsdp,
            )
        ]  # fmt: skip

    def sample(self) -> list[Program]:
        """The student's groups in RIL; of the engine, which every stage shares, if it is to sample."""
        c, mesh, beside = self.config, self.sampling_mesh, self._beside()
        if c.sampling.backend == "engine":
            return EnginePlan(self.student.config, self.student.dtype, run_engine(c), mesh).all(beside=beside)
        G = c.ril.num_generations
        return [sample_groups(self.student, c.sampling, mesh, *self._micro_batches(), G, beside=beside)]

    def score(self) -> list[Program]:
        """What scores every response before the updates: pi_ref with a KL term, pi_old with several updates a batch."""
        c = self.config.ril
        micro, P, R = self._micro(c), max(self.buckets.prompts), max(self.buckets.responses)
        S = c.num_generations + c.num_teacher_generations
        prompts, responses = self.student.rows(c.batch_size, micro, P, S, R)
        features = self.student.features(c.batch_size // micro, micro)
        scorers = {"reference": self.student.dtype} if c.beta else {}
        scorers |= {"old": jnp.float32} if c.num_iterations > 1 else {}
        return [
            Program(
                f"{name} log-probs", f"{c.batch_size // micro} x {micro} rows of {P} + {S} x {R}",
                self.student.programs.score, (self.student.params(dtype), prompts, responses, features),
                beside=self._beside("reference" if name == "reference" else "master weights"),
                tokens=c.batch_size * (P + S * R), **self.student.weight_bytes("text.", passes=c.batch_size // micro),
            )
            for name, dtype in scorers.items()
        ]  # fmt: skip

    def discriminator(self) -> Program:
        c, ril = self.config.discriminator, self.config.ril
        network = make_discriminator(self.student.config, context=c.context)
        programs = dataclasses.replace(self.student.programs, network=network)
        optimizer = make_optimizer(c, learning_rate=c.ril_learning_rate)
        micro = self._micro(c, ril.batch_size)
        S, P = ril.num_generations + ril.num_teacher_generations, max(c.prompt_buckets)
        R = max(self.buckets.responses)
        trained, frozen = split_frozen(self.student.params(jnp.float32, network=network), train_vision=False)
        state = abstract_state(trained, optimizer, self.mesh)
        rows = self.student.rows(ril.batch_size, micro, P, S, R, vision=c.context == "question_image")
        update = discriminator_lib._make_update(programs, optimizer, c.loss, ril.num_generations)
        return Program(
            "discriminator update", f"{ril.batch_size // micro} x {micro} rows of {P} + {S} x {R}", update,
            (state, frozen, (*rows, self.student.whole((ril.batch_size // micro,), jnp.float32))),
            beside=self._beside("discriminator"),
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
        prompts, responses = self.student.rows(B, micro, P, S, R)
        row = lambda *shape: self.student.array((M, micro, *shape), jnp.float32, 1)  # noqa: E731
        features = self.student.features(M, micro)
        tower = self.student.vision(M, micro) if c.train_vision or c.train_projector else None
        old = row(S, R) if c.num_iterations > 1 else None
        ref = row(S, R) if c.beta else None
        update = ril_lib._policy_update(
            self.student.programs, optimizer, c.num_generations, c.epsilon, c.epsilon_high, c.beta, c.loss_type
        )
        batch = (
            prompts, responses, responses.mask, row(c.num_generations, R), row(S), features, tower, old, ref,
            self.student.whole((M,), jnp.float32),
        )  # fmt: skip
        return Program(
            "RIL update", f"{M} x {micro} rows of {P} + {S} x {R}", update, (state, frozen, batch),
            beside=self._beside("master weights", "moments"), tokens=B * (P + S * R), runs=c.num_iterations,
            **self._training_bytes(B, micro, P + S * R, trained),
        )  # fmt: skip

    # --- arguments ---

    def _micro(self, settings: ConfigDict, batch: int = 0) -> int:
        batch, shards = batch or settings.batch_size, self.student.shards
        micro = micro_rows(batch, settings.micro_batch_size, shards)
        if micro % shards:
            fix = f"batch_size={-(-batch // shards) * shards}"
            raise InputError(
                f"a batch of {batch} questions cannot be spread over {shards} devices (mesh data x fsdp); try {fix}"
            )
        return micro

    def _micro_batches(self) -> tuple[int, int]:
        """Of RIL: their number, and the questions of each."""
        micro = self._micro(self.config.ril)
        return self.config.ril.batch_size // micro, micro

    def _split(self, settings: ConfigDict) -> tuple[Any, Any]:
        params = self.student.params(jnp.float32)
        return split_frozen(params, train_vision=settings.train_vision, train_projector=settings.train_projector)

    # --- bytes, analytic ---

    def _beside(self, *own: str) -> float:
        """Bytes of a chip that the RIL stage keeps while a program runs, but for what it has as arguments (`own`)."""
        return sum(size for name, size in self._kept.items() if name not in own)

    @functools.cached_property
    def _kept(self) -> dict[str, float]:
        """The student's state, pi_ref, and the discriminator's state: bytes of a chip."""
        c, d = self.config.ril, self.config.discriminator
        params = self.student.params(jnp.float32)
        trained, _ = self._split(c)
        state = abstract_state(trained, make_optimizer(c, learning_rate=c.learning_rate), self.mesh)
        kept = {"master weights": chip_bytes(params), "moments": chip_bytes(state.opt)}
        if c.beta:
            kept["reference"] = chip_bytes(self.student.params(self.student.dtype))
        if d.enabled:
            params = self.student.params(
                jnp.float32, network=make_discriminator(self.student.config, context=d.context)
            )
            trained, frozen = split_frozen(params, train_vision=False)
            state = abstract_state(trained, make_optimizer(d, learning_rate=d.ril_learning_rate), self.mesh)
            kept["discriminator"] = chip_bytes((state, frozen))
        return kept

    def _training_bytes(self, B: int, micro: int, row_tokens: int, trained: Any) -> dict[str, Any]:
        """An update: weights read forward, again for remat, and backward; activations; gradients; the optimiser."""
        M, text = B // micro, self.student.config.text
        passes = M * (2 if self.config.student.remat == "none" else 3)
        out = self.student.weight_bytes("", passes=passes)
        weights = sum(math.prod(p.shape) for p in jax.tree.leaves(trained))
        shards = self.mesh.shape["fsdp"] * self.mesh.shape["tensor"]
        tokens = B * row_tokens / self.student.shards
        width = (
            2 * text.num_hidden_layers * (8 * text.hidden_size + 4 * text.intermediate_size / self.mesh.shape["tensor"])
        )
        out["hbm_bytes"] += 28 * weights / shards + 3 * tokens * width * self.student.dtype.itemsize / 2
        reduce = 4 * weights / self.mesh.shape["tensor"]
        fsdp, data, tensor = (self.mesh.shape[a] for a in ("fsdp", "data", "tensor"))
        out["network_bytes"] += M * reduce * (fsdp - 1) / fsdp
        if tensor > 1:  # two sums over `tensor` a layer and pass
            layer = 2 * tokens * text.hidden_size * self.student.dtype.itemsize * 2 * (tensor - 1) / tensor
            out["network_bytes"] += 3 * text.num_hidden_layers * layer
        if data > 1:
            between = 2 * reduce / fsdp * (data - 1) / data
            out["network_bytes"] += between
            if self.topology.num_slices > 1:
                out["across_slices"] = between
        return out
