"""What all stages of a run share: config, folders, mesh, models, metrics, checkpoints, and the wish to stop."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ril_jax import config as config_lib
from ril_jax import processes, sharding
from ril_jax.compilation import CompileCounter
from ril_jax.data.packing import PromptBatch
from ril_jax.data.records import QuestionDataset, read_dataset
from ril_jax.errors import InputError
from ril_jax.files import write_atomically
from ril_jax.models import attention, hub
from ril_jax.models.parameters import Params
from ril_jax.pretrained import Pretrained
from ril_jax.progress import StageTimer, of_bytes
from ril_jax.sampling.engine import Engine
from ril_jax.sampling.local import make_engine
from ril_jax.sampling.logits import SamplingParams
from ril_jax.sampling.rollouts import EngineSampler
from ril_jax.sampling.sampler import Sampler, Samples
from ril_jax.training.batches import Buckets, PromptEncoder, flatten_features, flatten_micro, put
from ril_jax.training.checkpoints import Checkpointer
from ril_jax.training.metrics import MetricsWriter
from ril_jax.training.programs import Programs
from ril_jax.training.stopping import StopSignal

# Fields that may differ between two starts in one workdir: they say what to do and how to show it, not what comes out.
_FREE_FIELDS = (
    "stages", "arms", "workers", "xla_flags", "allow_config_change", "logging", "checkpoint", "mesh", "attention",
)  # fmt: skip


class Stopped(SystemExit):
    """The run was asked to stop, and has saved itself; carries the exit status."""


@dataclasses.dataclass(eq=False)
class Run:
    """One start of a run in a workdir."""

    config: ConfigDict
    workdir: Path
    mesh: Mesh
    stop: StopSignal
    counter: CompileCounter
    timer: StageTimer
    _shapes: set[tuple[Any, ...]] = dataclasses.field(default_factory=set)
    _engine: Engine | None = None  # the student's, once it is asked for

    @classmethod
    def start(cls, config: ConfigDict, workdir: Path, stop: StopSignal) -> "Run":
        """Check the config and claim the workdir for it. Raises InputError for either."""
        config_lib.validate(config)
        mesh = sharding.make_mesh(**config.mesh)
        sharding.use(mesh)
        attention.use(config.attention)
        return cls(config, workdir, mesh, stop, CompileCounter(), StageTimer(workdir))

    def fingerprint(self) -> dict[str, Any]:
        """The config fields that define what the run computes."""
        fields = json.loads(self.config.to_json_best_effort())
        del fields["sampling"]["layout"], fields["collect"]["layout"]  # where, as the mesh says it for training
        return {name: value for name, value in fields.items() if name not in _FREE_FIELDS}

    def path(self, template: str) -> str:
        """A path of the config with {workdir} filled in."""
        return str(template).replace("{workdir}", str(self.workdir))

    def dataset(self, field: str) -> QuestionDataset:
        """The data set that config.data.<field> names."""
        folder = self.path(self.config.data[field])
        if not folder:
            raise InputError(f"config.data.{field} is empty; name a data set that `python -m ril_jax.data` wrote")
        return read_dataset(folder)

    @functools.cached_property
    def student(self) -> Pretrained:
        """The student's checkpoint folder, opened."""
        return self.open_model("config.student", self.config.student)

    def open_model(self, field: str, model: ConfigDict) -> Pretrained:
        if not model.checkpoint:
            raise InputError(f"{field}.checkpoint is empty; name a Hugging Face folder or a hub id")
        data = self.config.data
        limits = {name: data[name] for name in ("min_pixels", "max_pixels", "max_tiles")}
        return Pretrained.open(self.path(model.checkpoint), **limits)

    @functools.cached_property
    def programs(self) -> Programs:
        """The student's compiled programs."""
        return self.make_programs(self.student, self.config.student)

    def make_programs(self, model: Pretrained, settings: ConfigDict) -> Programs:
        return Programs(
            model.network,
            jnp.dtype(settings.dtype),
            remat=settings.remat,
            chunk=settings.logprob_chunk,
            unroll=layers_unroll(),
        )

    @functools.cached_property
    def sampler(self) -> Sampler:
        """The student's sampler."""
        return self.make_sampler(self.student, self.config.student)

    def make_sampler(self, model: Pretrained, settings: ConfigDict, mesh: Mesh | None = None) -> Sampler:
        """A sampler of weights on `mesh`, by default the student's sampling mesh."""
        mesh = mesh or self.sampling_mesh
        return Sampler(
            model.network,
            model.chat.eos_token_ids,
            model.chat.pad_token_id,
            dtype=jnp.dtype(settings.dtype),
            unroll=layers_unroll(),
            token_limit=model.chat.vocab_size,
            mesh=None if mesh is self.mesh else mesh,
        )

    def make_engine(
        self, model: Pretrained, settings: ConfigDict, params: Params, mesh: Mesh | None = None
    ) -> Engine | None:
        """An engine, warmed up, where config.sampling.backend asks for one. `params` in the compute dtype, on `mesh`.

        Raises InputError for settings that do not go together.
        """
        if self.config.sampling.backend != "engine":
            return None
        if processes.count() > 1:
            raise InputError("config.sampling.backend=engine is for runs of one process; set it to batch")
        shapes = ConfigDict(self.config.sampling.engine.to_dict())
        longest = max(self.config.data.prompt_buckets) + self.config.sampling.max_completion_length
        if shapes.max_model_len and shapes.max_model_len < longest:
            raise InputError(
                f"config.sampling.engine.max_model_len={shapes.max_model_len} is less than the longest prompt bucket "
                f"and config.sampling.max_completion_length, {longest} tokens; raise it, or set it to 0"
            )
        shapes.max_model_len = shapes.max_model_len or longest
        with self.counter.expected(), _fields_of("config.sampling.engine"):
            engine = make_engine(
                model, params, shapes, mesh or self.sampling_mesh, dtype=settings.dtype, counter=self.counter
            )
            engine.warm_up()
        sharding.use(self.mesh)  # the run's own programs are for its mesh
        self.counter.cold()  # the run's own programs are still to come
        return engine

    def student_groups(
        self, params: Params, launching: Callable[[], AbstractContextManager] = nullcontext
    ) -> EngineSampler | None:
        """The student's groups by the engine, which all stages share; None where `sampler` is to be used."""
        if self._engine is None:
            self._engine = self.make_engine(self.student, self.config.student, params)
        return None if self._engine is None else EngineSampler(self._engine, self.student.chat, launching=launching)

    def sample_batch(
        self, sampler: Sampler, programs: Programs, params: Params, prompts: PromptBatch, keys: np.ndarray, **asked: Any
    ) -> Samples:
        """One micro-batch of prompts, as `Buckets.pack_prompts` gives it, through a model's tower and its sampler.

        keys: [B, 2] uint32, of this process's rows. asked: as of `Sampler`. Returns what lies on the devices.
        """
        vision = prompts.vision
        features = programs.encode(params, put(vision, self.mesh)) if vision is not None else None
        rows, keys_b = put((flatten_micro(prompts), keys), self.mesh, micro=False)
        return sampler(params, rows, flatten_features(features), keys_b, **asked)

    @functools.cached_property
    def sampling_mesh(self) -> Mesh:
        """The mesh that the student's weights lie on for sampling (config.sampling.layout)."""
        return sharding.sampling_mesh(self.mesh, self.config.sampling.layout)

    @functools.cached_property
    def teacher_mesh(self) -> Mesh:
        """The mesh that a teacher's weights lie on (config.collect.layout)."""
        return sharding.sampling_mesh(self.mesh, self.config.collect.layout)

    def for_sampling(self, params: Params) -> Params:
        """The student's weights as its sampler wants them: in the compute dtype, on the sampling mesh."""
        if self.sampling_mesh is self.mesh:
            return self.programs.cast(params)
        return self.programs.move(params, self.sampling_mesh)

    @functools.cached_property
    def buckets(self) -> Buckets:
        return self.make_buckets(self.student)

    def make_buckets(self, model: Pretrained) -> Buckets:
        shards, part = sharding.num_shards(self.mesh), sharding.part(self.mesh)
        return Buckets.from_config(model.config, self.config.data, shards=shards, part=part)

    @functools.cached_property
    def encoder(self) -> PromptEncoder:
        return PromptEncoder(self.student.chat, max_length=max(self.config.data.prompt_buckets))

    def sampling_params(self) -> SamplingParams:
        s = self.config.sampling
        return SamplingParams(s.temperature, s.top_p, s.top_k, s.repetition_penalty)

    def pi_init(self) -> Params:
        """The student before RIL, float32: what the sft stage left in this workdir, else the student's checkpoint."""
        folder = self.workdir / "sft" / "model"
        if processes.decide(folder.exists, "is there an sft model"):
            return self.student_params(folder)
        return self.student_params(self.student.folder)

    def student_params(self, folder: Path) -> Params:
        shardings = sharding.param_shardings(self.student.network.specs, self.mesh)
        return hub.load_params(folder, self.student.network, shardings=shardings, progress=of_bytes("load the student"))

    def metrics(self, label: str) -> MetricsWriter:
        logging = self.config.logging
        wandb = {"project": logging.wandb} if logging.wandb else None
        return MetricsWriter(self.workdir, label, tensorboard=logging.tensorboard, wandb=wandb)

    def checkpointer(self, label: str) -> Checkpointer:
        c = self.config.checkpoint
        return Checkpointer(self.workdir / label / "checkpoints", keep=c.keep, every=c.every)

    def expect(self, program: str, *arguments: Any) -> None:
        """Announce a call on arrays of these shapes: where they are new, compiling for them is no surprise.

        Loops mark the counter warm after every step, so any other compilation is reported.
        """
        key = (program, *((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(arguments)))
        if key not in self._shapes:
            self._shapes.add(key)
            self.counter.cold()

    def is_done(self, label: str) -> bool:
        """Whether a stage (or an arm of it) has ended in this workdir."""
        return processes.decide((self.workdir / label / "done.json").exists, f"is {label} done")

    def mark_done(self, label: str, result: dict[str, Any]) -> None:
        path, content = self.workdir / label / "done.json", json.dumps(result, indent=2).encode()
        processes.by_first(lambda: write_atomically(path, content), f"{label} is done")

    def result(self, label: str) -> dict[str, Any]:
        """What a stage that is done has reported."""
        path = self.workdir / label / "done.json"
        return processes.decide(lambda: json.loads(path.read_text()), f"the result of {label}")

    def stop_if_asked(self) -> None:
        """Leave now if a signal came; for loops that have nothing to save."""
        if self.stop.should_stop():
            raise Stopped(self.stop.exit_status)


@contextmanager
def _fields_of(place: str) -> Iterator[None]:
    """Errors about the fields of an engine name them where they stand in the config."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).replace("config.engine", place)) from error


def layers_unroll() -> int | bool:
    """Layers per scan step: straight-line code on CPU, where a scan would copy each layer's weights every time."""
    return True if jax.default_backend() == "cpu" else 1
