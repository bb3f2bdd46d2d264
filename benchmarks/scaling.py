"""Predicted scaling of a RIL step over v5e chips, at a fixed batch a chip, by the real compiler and a roofline.

    python benchmarks/scaling.py [--config=configs/qwen7b.py] [--chips=16,32,64,128,256] > docs/scaling.md

Method. For each number of chips (and for two slices of half as many) the batch is `--rows` questions a chip, the mesh
the config's `tensor` and the rest over `fsdp`; over slices, `data` spans them. The RIL update is compiled (low effort)
for its peak memory. Collective bytes are counted in the compiler's own module after partitioning, each instruction as
often as its loops run; the time of a step is the roofline of FLOPs, analytic memory traffic and network, once if all
three hide behind each other (the floor) and once if network hides behind nothing (the ceiling). Efficiency is the
questions a second and chip against those of the first row. All of it is an estimate: nothing has run on a TPU.
"""

import argparse
import os
import re
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from ml_collections import ConfigDict

from ril_jax import cli
from ril_jax.planning.chips import GIB, Topology
from ril_jax.planning.compiling import Compiled, Program, compile_program, low_effort
from ril_jax.planning.costs import flops
from ril_jax.planning.training import TrainingPlan

SHAPES = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
PROGRAMS = ("encode images", "move weights", "sample", "reference log-probs", "discriminator update", "RIL update")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/qwen7b.py")
    parser.add_argument("--chips", default="4,8,16,32,64,128,256")
    parser.add_argument("--rows", type=int, default=4, help="questions a chip and step")
    args = parser.parse_args()
    name = f"{Path(args.config).stem}, {args.rows} questions a chip, v5e"
    command = f"python benchmarks/scaling.py --config={args.config} --rows={args.rows} > docs/scaling.md"
    print(f"# Scaling on paper: {name}\n\n`{command}`; the method stands in the script's head.")
    print("**Estimates by compiler and roofline; nothing has run on a TPU.**\n")
    cells = ("chips", "mesh data x fsdp x tensor", "questions", "peak HBM of the update", "collectives a chip, update",
             "a step, floor", "ceiling", "efficiency, floor", "ceiling")  # fmt: skip
    print(f"| {' | '.join(cells)} |\n|{'---|' * len(cells)}", flush=True)
    first: tuple[float, float] | None = None
    counts = [int(count) for count in args.chips.split(",")]
    for chips, slices in [*((count, 1) for count in counts), *((count, 2) for count in counts if count >= 64)]:
        row, times = measure(args, chips, slices)
        if times is not None:
            first = first or times
            row += f" {times[0]:.1f} s | {times[1]:.1f} s | {first[0] / times[0]:.0%} | {first[1] / times[1]:.0%} |"
        else:
            row += " | | | |"
        print(row, flush=True)


def measure(args: argparse.Namespace, chips: int, slices: int) -> tuple[str, tuple[float, float] | None]:
    """The beginning of a row, and seconds of a step (floor, ceiling); None where the update does not fit."""
    config = cli.load_config(args.config)
    topology = Topology.parse(f"v5e:{SHAPES[chips // slices]}", slices)
    tensor = config.mesh.tensor
    mesh = topology.mesh(data=slices, fsdp=-1, tensor=tensor)
    set_batch(config, args.rows * chips, args.rows * chips // 4)
    plan = TrainingPlan(config, topology, mesh)
    programs = {program.name: program for program in plan.all()}
    update = compile_program(programs["RIL update"], topology)
    where = f"{chips}" + (f" in {slices} slices" if slices > 1 else "")
    axes = " x ".join(str(size) for size in mesh.shape.values())
    head = f"| {where} | {axes} | {args.rows * chips} |"
    if not update.fits:
        return f"{head} over the chip's {topology.chip.hbm / GIB:.2f} GiB | |", None
    moved = collective_bytes(programs["RIL update"], topology)
    floor = ceiling = 0.0
    for name in PROGRAMS:
        if name in programs:
            compiled = traced(programs[name], topology)
            parts = compiled.parts
            floor += compiled.roofline
            ceiling += max(parts["compute"], parts["memory"]) + parts["network"]
    return f"{head} {update.peak / GIB:.2f} GiB | {moved / 1e9:.0f} GB |", (floor, ceiling)


def set_batch(config: ConfigDict, batch: int, micro: int) -> None:
    for stage in ("ril", "discriminator", "sft"):
        config[stage].batch_size, config[stage].micro_batch_size = batch, micro


def traced(program: Program, topology: Topology) -> Compiled:
    """FLOPs and bytes of a program that is not compiled."""
    jaxpr = program.function.trace(*program.arguments).jaxpr
    return Compiled(program, topology, 0.0, 0.0, flops(jaxpr, while_trips=program.while_trips) / topology.num_chips)


# --- collectives, in the module after partitioning ---

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_COLLECTIVE = re.compile(r"= (.+?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\(")


def collective_bytes(program: Program, topology: Topology) -> float:
    """Bytes of the results of all collectives of one run on a chip; an all-reduce counts twice.

    An upper bound: later passes of the compiler may turn an all-reduce into a cheaper reduce-scatter.
    """
    lowered = program.function.trace(*program.arguments).lower(lowering_platforms=("tpu",))
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_pass_re": "tpu-spmd-partitioning"}
        lowered.compile(compiler_options={**low_effort(), **options})
        (path,) = [p for p in Path(folder).iterdir() if "after_tpu-spmd-partitioning" in p.name and p.suffix == ".txt"]
        return count_collectives(path.read_text())


def count_collectives(text: str) -> float:
    """Of a module's text: every computation's collectives, those of loop bodies as often as the loop runs."""
    computations: dict[str, list[str]] = {}
    entry, current = "", None
    for line in text.splitlines():
        opened = re.match(r"^(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if opened:
            current = opened[2]
            computations[current] = []
            entry = current if opened[1] else entry
        elif current and line.startswith("}"):
            current = None
        elif current:
            computations[current].append(line)

    def total(name: str) -> float:
        bytes_ = 0.0
        for line in computations.get(name, ()):
            if found := _COLLECTIVE.search(line):
                size = sum(_BYTES.get(kind, 4) * _count(dims) for kind, dims in _SHAPE.findall(found[1]))
                bytes_ += size * (2 if found[2] == "all-reduce" else 1)
            if " while(" in line:
                body, condition = (re.search(rf"{part}=%?([\w.\-]+)", line)[1] for part in ("body", "condition"))
                bytes_ += trips(condition) * total(body)
            for called in re.findall(r"(?:to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)", line):
                bytes_ += total(called)
            if branches := re.search(r"branch_computations=\{([^}]*)\}", line):
                bytes_ += max(total(branch.strip().lstrip("%")) for branch in branches[1].split(","))
        return bytes_

    def trips(condition: str) -> int:
        """A scan's condition compares its counter with a constant."""
        constants = [int(n) for line in computations.get(condition, ()) for n in re.findall(r"constant\((\d+)\)", line)]
        return max(constants, default=1)

    return total(entry)


def _count(dims: str) -> int:
    product = 1
    for size in dims.split(","):
        product *= int(size) if size else 1
    return product


if __name__ == "__main__":
    main()
