"""Claims about real sizes: the TPU compiler takes the paper's runs for real slices, and they leave memory.

Every program is compiled as a run would have it, with the shipped configs, for chips that are not there.
"""

from pathlib import Path

import pytest

from ril_jax import cli
from ril_jax.planning.chips import HEADROOM, Topology
from ril_jax.planning.compiling import compile_program
from ril_jax.planning.serving import ServingPlan
from ril_jax.planning.training import TrainingPlan

pytest.importorskip("libtpu")
CONFIGS = Path(__file__).parents[1] / "configs"
# The shortest name of a config, the smallest slice of a kind on which it is known to fit, and what is compiled.
SIGNED = [
    ("qwen7b", "v5e:4x8", "RIL update"),
    ("qwen7b", "v5p:2x2x2", "RIL update"),
    ("qwen7b", "v6e:4x4", "RIL update"),
    ("internvl1b", "v5e:2x4", "RIL update"),
    ("internvl1b", "v5p:2x2x1", "RIL update"),
    ("internvl1b", "v6e:2x4", "RIL update"),
    ("teacher_qwen72b", "v6e:2x4", "decode"),
    ("teacher_internvl78b", "v6e:2x4", "decode"),
]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("name", "slice_", "wanted"), SIGNED, ids=[f"{n} {s}" for n, s, _ in SIGNED])
def test_a_run_of_the_paper_compiles_for_a_slice_and_leaves_memory(name, slice_, wanted):
    config = cli.load_config(str(CONFIGS / f"{name}.py"))
    topology = Topology.parse(slice_)
    mesh = topology.mesh(**config.mesh)
    plan = TrainingPlan(config, topology, mesh) if "student" in config else ServingPlan(config, topology, mesh)
    (program,) = [p for p in plan.all() if p.name == wanted]
    compiled = compile_program(program, topology)
    assert not compiled.error
    assert compiled.headroom >= HEADROOM
    assert compiled.peak > compiled.program.beside
    assert compiled.flops > 0
