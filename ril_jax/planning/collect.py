"""The programs of the collect stage: every teacher's, each a model of its own, and the student's."""

from jax.sharding import Mesh
from ml_collections import ConfigDict

from ril_jax import sharding
from ril_jax.planning.arguments import ModelArguments
from ril_jax.planning.compiling import Program
from ril_jax.planning.sampling import EnginePlan, encode_images, run_engine, sample_groups
from ril_jax.training.collect import STUDENT


def collect_programs(config: ConfigDict, student: ModelArguments, mesh: Mesh) -> list[Program]:
    """Named `collect: sample <model>` and the like; one model is on the devices at a time, and nothing beside it."""
    out: list[Program] = []
    if not config.data.teacher_data:
        where = sharding.sampling_mesh(mesh, config.collect.layout)
        for name, settings in config.teachers.items():
            out += _programs_of(name, ModelArguments(settings, config.data, mesh), where, config)
    if config.collect.student:
        out += _programs_of(STUDENT, student, sharding.sampling_mesh(mesh, config.sampling.layout), config)
    return out


def _programs_of(name: str, model: ModelArguments, where: Mesh, config: ConfigDict) -> list[Program]:
    """Weights lie on the mesh `where`; a part of `collect.batch_size` questions is one micro-batch."""

    def named(program: str) -> str:
        return f"collect: {program} {name}"

    if config.sampling.backend == "engine":
        return EnginePlan(model.config, model.dtype, run_engine(config), where).all(named=named)
    batch, G = sharding.full_batch(config.collect.batch_size, model.mesh), config.collect.num_generations
    encode = encode_images(model, where, 1, batch, named=named)
    return [*encode, sample_groups(model, config.sampling, where, 1, batch, G, named=named)]
