"""Predicted scaling of a RIL step over v5e chips, at a fixed batch a chip, by the real compiler and a roofline.

    python benchmarks/scaling.py [--config=configs/qwen7b.py] [--chips=16,32,64,128,256] > docs/scaling.md

Method. For each number of chips (and for two slices of half as many) the batch is `--rows` questions a chip, the mesh
the config's `tensor` and the rest over `fsdp`; over slices, `data` spans them. Micro-batches are `--micro` questions
for each part of the batch. The RIL update is compiled (low effort) for its peak memory; the largest peak of the other
programs is the plan's matter. Collective bytes are counted in the compiler's own module after partitioning, each
instruction as often as its loops run; the time of a step is the roofline of FLOPs, analytic memory traffic and network,
once if all three hide behind each other (the floor) and once if network hides behind nothing (the ceiling). Times do
not ask whether it fits. Efficiency is the questions a second and chip against those of 16 chips, or of the first row
where there is none of 16. All of it is an estimate: nothing has run on a TPU.
"""

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

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
    parser.add_argument("--micro", type=int, default=1, help="questions of a micro-batch for each part of the batch")
    args = parser.parse_args()
    counts = [int(count) for count in args.chips.split(",")]
    rows = []
    for chips, slices in [*((count, 1) for count in counts), *((count, 2) for count in counts if count >= 64)]:
        rows.append(measure(args, chips, slices))
        print(rows[-1], file=sys.stderr, flush=True)
    first = next((row for row in rows if (row.chips, row.slices) == (16, 1)), rows[0])

    name = f"{Path(args.config).stem}, {args.rows} questions a chip, v5e"
    command = f"python benchmarks/scaling.py --config={args.config} --rows={args.rows} --micro={args.micro}"
    print(f"# Scaling on paper: {name}\n\n`{command} > docs/scaling.md`; the method stands in the script's head.")
    print("**Estimates by compiler and roofline; nothing has run on a TPU.**\n")
    cells = ("chips", "mesh data x fsdp x tensor", "questions", "peak HBM of the update", "collectives a chip, update",
             "a step, floor", "ceiling", f"efficiency to {first.chips}, floor", "ceiling")  # fmt: skip
    print(f"| {' | '.join(cells)} |\n|{'---|' * len(cells)}")
    for row in rows:
        where = f"{row.chips}" + (f" in {row.slices} slices" if row.slices > 1 else "")
        print(
            f"| {where} | {row.mesh} | {row.chips * args.rows} | {row.peak} | {row.moved / 1e9:.0f} GB "
            f"| {row.floor:.1f} s | {row.ceiling:.1f} s "
            f"| {first.floor / row.floor:.0%} | {first.ceiling / row.ceiling:.0%} |"
        )


class Row(NamedTuple):
    """A number of chips. peak: in words; moved: bytes of the update's collectives a chip; floor, ceiling: seconds."""

    chips: int
    slices: int
    mesh: str
    peak: str
    moved: float
    floor: float
    ceiling: float


def measure(args: argparse.Namespace, chips: int, slices: int) -> Row:
    config = cli.load_config(args.config)
    topology = Topology.parse(f"v5e:{SHAPES[chips // slices]}", slices)
    tensor = config.mesh.tensor
    mesh = topology.mesh(data=slices, fsdp=-1, tensor=tensor)
    set_batch(config, args.rows * chips, args.micro * chips // tensor)
    plan = TrainingPlan(config, topology, mesh)
    programs = {program.name: program for program in plan.all()}
    update = compile_program(programs["RIL update"], topology)
    peak = f"{update.peak / GIB:.2f} GiB" if update.peak < float("inf") else "over"
    peak += "" if update.fits else f" (does not fit {topology.chip.hbm / GIB:.2f})"
    floor = ceiling = 0.0
    for name in PROGRAMS:
        if name in programs:
            compiled = traced(programs[name], topology)
            parts = compiled.parts
            floor += compiled.roofline
            ceiling += max(parts["compute"], parts["memory"]) + parts["network"]
    axes = " x ".join(str(size) for size in mesh.shape.values())
    return Row(chips, slices, axes, peak, collective_bytes(programs["RIL update"], topology), floor, ceiling)


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
        try:
            lowered.compile(compiler_options={**low_effort(), **options})
        except Exception as error:  # that it does not fit turns out after the partitioning
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
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
