"""The programs of a serving config: the sampling engine's."""

from jax.sharding import Mesh
from ml_collections import ConfigDict

from ril_jax import sharding
from ril_jax.models import attention
from ril_jax.models.lanes import as_served
from ril_jax.planning.arguments import model_config
from ril_jax.planning.chips import Topology
from ril_jax.planning.compiling import Program
from ril_jax.planning.sampling import EnginePlan


class ServingPlan:
    """Abstract programs of a serving config on a mesh of absent chips."""

    def __init__(self, config: ConfigDict, topology: Topology, mesh: Mesh):
        self.topology = topology
        sharding.use(mesh)
        attention.use(config.attention)
        model = as_served(model_config(config.checkpoint), mesh)
        self.engine = EnginePlan(model, config.dtype, config.engine, mesh)

    def all(self) -> list[Program]:
        return self.engine.all()
