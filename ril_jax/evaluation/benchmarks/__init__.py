"""The 14 benchmarks of the paper's table, a module each, or for two that differ in their files alone."""

from ril_jax.errors import InputError
from ril_jax.evaluation.benchmark import Benchmark
from ril_jax.evaluation.benchmarks.ai2d import AI2D
from ril_jax.evaluation.benchmarks.blink import Blink
from ril_jax.evaluation.benchmarks.chartqa import ChartQA
from ril_jax.evaluation.benchmarks.mathvista import MathVista
from ril_jax.evaluation.benchmarks.mmbench import MMBench, MMBenchCN
from ril_jax.evaluation.benchmarks.mmmu import MMMU
from ril_jax.evaluation.benchmarks.mmmu_pro import MMMUPro
from ril_jax.evaluation.benchmarks.mmstar import MMStar
from ril_jax.evaluation.benchmarks.mmvet import MMVet, MMVetV2
from ril_jax.evaluation.benchmarks.realworldqa import RealWorldQA
from ril_jax.evaluation.benchmarks.seedbench import SeedBench, SeedBench2Plus

# In the order of the paper's table.
BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        AI2D(), ChartQA(), MathVista(), MMBench(), MMBenchCN(), MMVet(), MMVetV2(), MMMU(), MMMUPro(), MMStar(),
        Blink(), SeedBench(), SeedBench2Plus(), RealWorldQA(),
    )
}  # fmt: skip


def chosen(names: list[str]) -> list[Benchmark]:
    """The benchmarks of these names, or all for ["all"]. Raises InputError for an unknown name."""
    if names == ["all"]:
        return list(BENCHMARKS.values())
    for name in names:
        if name not in BENCHMARKS:
            raise InputError(f"--benchmarks: {name!r} is not known; known are all, {', '.join(BENCHMARKS)}")
    return [BENCHMARKS[name] for name in dict.fromkeys(names)]
