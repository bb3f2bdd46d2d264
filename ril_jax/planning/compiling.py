"""One program for absent chips: compiled by the real compiler, and its time estimated by a roofline."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from ril_jax import sharding
from ril_jax.planning.arguments import chip_bytes
from ril_jax.planning.chips import DCN_BANDWIDTH, GIB, HEADROOM, Topology
from ril_jax.planning.costs import flops


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function with abstract arguments, and what is known of it beside its jaxpr.

    Attributes:
      name, shapes: for people. hbm_bytes, network_bytes: bytes that a chip moves in one run (analytic, an estimate).
      across_slices: the part of network_bytes that goes between slices. beside: bytes of a chip that other arrays of
        the run take meanwhile. tokens: that one run handles. runs: how often a step runs it. while_trips: of its loops,
        for the FLOPs. mesh: that `sharding.constrain` means in it, if not the one in use.
    """

    name: str
    shapes: str
    function: Callable
    arguments: tuple[Any, ...]
    hbm_bytes: float = 0.0
    network_bytes: float = 0.0
    across_slices: float = 0.0
    beside: float = 0.0
    tokens: float = 0.0
    runs: float = 1.0
    while_trips: int = 1
    mesh: Mesh | None = None

    def trace(self) -> Any:
        with sharding.using(self.mesh):
            return self.function.trace(*self.arguments)  # type: ignore[attr-defined]


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What came of it.

    Attributes: seconds (to compile), peak (bytes of HBM a chip, with what lies beside), flops (of a chip), error (the
    compiler's words if it does not fit), beside (bytes of a chip: the program's, and arguments that it does not read).
    """

    program: Program
    topology: Topology
    seconds: float
    peak: float
    flops: float
    error: str = ""
    beside: float = 0.0

    @property
    def fits(self) -> bool:
        return not self.error and self.headroom >= HEADROOM

    @property
    def headroom(self) -> float:
        """Bytes of a chip's HBM that are left at the peak."""
        return self.topology.chip.hbm - self.peak

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of one run by what would bound it, were it alone: compute, memory, network (estimates)."""
        chip, program = self.topology.chip, self.program
        network = (program.network_bytes - program.across_slices) / chip.ici_bandwidth
        return {
            "compute": self.flops / chip.flops,
            "memory": program.hbm_bytes / chip.hbm_bandwidth,
            "network": network + program.across_slices / DCN_BANDWIDTH,
        }

    @property
    def roofline(self) -> float:
        """Seconds of one run if the longest part hides the others (an estimate, and a floor)."""
        return max(self.parts.values())


def compile_program(program: Program, topology: Topology, *, full_effort: bool = False) -> Compiled:
    """Trace, lower and compile; a program that does not fit comes back with the compiler's words in `error`."""
    start = time.monotonic()
    traced = program.trace()
    total = flops(traced.jaxpr, while_trips=program.while_trips) / topology.num_chips
    held = held_bytes(program)
    if held > topology.chip.hbm:
        words = f"what it reads and what lies beside it take {held / GIB:.2f} of {topology.chip.hbm / GIB:.2f} GiB"
        return Compiled(program, topology, time.monotonic() - start, float("inf"), total, words, program.beside)
    lowered = traced.lower(lowering_platforms=("tpu",))
    try:
        compiled = lowered.compile(compiler_options=None if full_effort else low_effort())
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        text = " ".join(str(error).split())
        begin = max(text.find("Ran out of memory"), 0)
        seconds, words = time.monotonic() - start, text[begin : begin + 220]
        return Compiled(program, topology, seconds, float("inf"), total, words, program.beside)
    memory = compiled.memory_analysis()
    peak = getattr(memory, "peak_memory_in_bytes", 0) or (
        memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )  # fmt: skip
    beside = program.beside + _unread(program, compiled)
    return Compiled(program, topology, time.monotonic() - start, float(peak) + beside, total, beside=beside)


def held_bytes(program: Program) -> float:
    """Bytes of a chip that its arguments and what lies beside them take; no compiled form of it peaks lower."""
    placed = [leaf for leaf in jax.tree.leaves(program.arguments) if getattr(leaf, "sharding", None) is not None]
    return program.beside + chip_bytes(placed)


def _unread(program: Program, compiled: Any) -> float:
    """Bytes of a chip of arguments that the compiled program has none of, such as a tower's where text is decoded."""
    shardings, _ = compiled.input_shardings  # None where an argument is left out
    leaves = functools.partial(jax.tree.leaves, is_leaf=lambda leaf: leaf is None)
    given = zip(leaves(program.arguments), leaves(shardings), strict=True)
    return chip_bytes([array for array, where in given if array is not None and where is None])


def low_effort() -> dict[str, Any]:
    """Options for a compile of seconds: memory within some per cent of full effort; the code is no measure of speed."""
    version = tuple(int(part) for part in jax.__version__.split(".")[:2])
    return {"exec_time_optimization_effort": -1.0} if version < (0, 11) else {"optimization_level": "O1"}
