"""Compile every program of a config with the real TPU compiler, on any machine: what fits, and how fast it may be.

    python -m ril_jax.plan --config=configs/qwen7b.py --topology=v5p:2x2x4
    python -m ril_jax.plan --config=configs/judge_qwen32b.py --topology=auto

Works for training and serving configs. `--topology=auto` looks for the smallest slice of each kind that holds it,
`--num_slices=2` joins slices over the data-centre network, `--effort=full` compiles as a run would (minutes a program),
`--programs=WORD,...` takes those whose names contain one of these words, `--first` ends at the first that does not fit,
and `--config.stages=collect` takes those of a stage. Peaks are the compiler's; times are estimates:
a roofline of matrix FLOPs and analytic bytes, a floor for what a chip will take. Ends with status 1 where something
does not fit.
"""

import math
import os
import resource
import sys
from types import SimpleNamespace

from ril_jax import cli
from ril_jax.errors import InputError
from ril_jax.planning.chips import CHIPS, GIB, HEADROOM, Topology
from ril_jax.planning.compiling import Compiled, compile_program, held_bytes
from ril_jax.planning.serving import ServingPlan
from ril_jax.planning.training import TrainingPlan
from ril_jax.training.collect import STUDENT

FLAGS = (
    cli.Flag("topology", str, "v5e:4x4", "kind:shape of the slice, or auto"),
    cli.Flag("num_slices", int, 1, "slices joined over the data-centre network"),
    cli.Flag("effort", str, "low", "low (seconds to a minute a program) or full"),
    cli.Flag("programs", list, [], "words; only programs whose names contain one"),
    cli.Flag("first", bool, False, "end at the first program that does not fit"),
)
_HEADER = (
    "| program | shapes | compile | peak HBM | beside | headroom | TFLOP a chip | compute | memory | network | floor |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
)


def main(args: SimpleNamespace) -> int:
    if args.effort not in ("low", "full"):
        raise InputError(f"--effort={args.effort}: give low or full")
    if args.topology == "auto":
        return _search(args)
    return 0 if _plan(args, Topology.parse(args.topology, args.num_slices), stop_early=args.first) else 1


def _plan(args: SimpleNamespace, topology: Topology, *, stop_early: bool = False) -> bool:
    """Compile and print; whether everything fits."""
    config = args.config
    mesh = topology.mesh(**{axis: int(config.mesh[axis]) for axis in ("data", "fsdp", "tensor")})
    kind = TrainingPlan if "student" in config else ServingPlan
    plan = kind(config, topology, mesh)
    programs = [p for p in plan.all() if not args.programs or any(word in p.name for word in args.programs)]
    if not programs:
        raise InputError(f"--programs={','.join(args.programs)}: no program has such a name")
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    print(f"\n{topology}: {topology.num_chips} chips, mesh {axes}, {len(programs)} programs, {args.effort} effort")
    print("\n".join(_HEADER), flush=True)
    done: list[Compiled] = []
    if stop_early:  # at what needs no compilation to see
        programs.sort(key=lambda program: held_bytes(program) <= topology.chip.hbm)
    for program in programs:
        done.append(compile_program(program, topology, full_effort=args.effort == "full"))
        print(_row(done[-1]), flush=True)
        if stop_early and not done[-1].fits:
            break
    bad = [c for c in done if not c.fits]
    for c in bad:
        print(f"{c.program.name} does not fit: {c.error or _gib(c.headroom) + ' left, less than 1 GiB'}; {_advice(c)}")
    if not bad:
        print(_summary(done, topology))
    return not bad


def _search(args: SimpleNamespace) -> int:
    found = {}
    for kind, chip in CHIPS.items():
        for shape in chip.slices:
            try:
                if _plan(args, Topology.parse(f"{kind}:{shape}", args.num_slices), stop_early=True):
                    found[kind] = shape
                    break
            except InputError as error:
                print(f"{kind}:{shape}: {error}")
    print("\nsmallest slices: " + (", ".join(f"{k}:{s}" for k, s in found.items()) or "none of those that are known"))
    return 0 if found else 1


def _row(c: Compiled) -> str:
    parts = c.parts
    cells = [
        c.program.name, c.program.shapes, f"{c.seconds:.0f} s", "over" if math.isinf(c.peak) else _gib(c.peak),
        _gib(c.beside), "none" if math.isinf(c.peak) else _gib(c.headroom), f"{c.flops / 1e12:.2f}",
        *(f"{1e3 * parts[name]:.1f} ms" for name in ("compute", "memory", "network")), f"{1e3 * c.roofline:.1f} ms",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _summary(done: list[Compiled], topology: Topology) -> str:
    """Time of a step and what it means, as estimates."""
    lines = [f"all fit, {_gib(min(c.headroom for c in done))} left at the least (a GiB is kept for the runtime)"]
    updates = [c for c in done if "update" in c.program.name]
    for c in updates:
        mfu = c.flops / c.roofline / topology.chip.flops
        lines.append(
            f"{c.program.name}: at most {c.program.tokens / c.roofline:,.0f} tokens/s, {mfu:.0%} MFU (estimate)"
        )
    step = [c for c in done if c.program.name in _RIL_STEP]
    if {c.program.name for c in step} >= {"sample", "RIL update"}:
        seconds = sum(c.program.runs * c.roofline for c in step)
        lines.append(f"a RIL step: at least {seconds:.1f} s on the devices, without the judge (estimate)")
    for c in done:
        if c.program.name.removeprefix("collect: ").startswith(("decode", "sample")):
            lines.append(f"{c.program.name}: at most {c.program.tokens / c.roofline:,.0f} tokens/s (estimate)")
    return "\n".join(lines)


_RIL_STEP = {
    "encode images", "move weights", "sample", "reference log-probs", "old log-probs", "discriminator update",
    "RIL update",
}  # fmt: skip


def _advice(c: Compiled) -> str:
    name = c.program.name
    if "update" in name:
        less = "" if name == "sft update" else "ril.beta=0 (no reference is kept then), "
        return f"try a smaller micro_batch_size, student.remat=full, {less}smaller buckets, or more chips (mesh.fsdp)"
    if name.startswith("collect: ") and c.program.mesh is None:  # of a batch, not of the engine
        teacher = "" if name.endswith(f" {STUDENT}") else "another collect.layout, "
        return (
            f"try {teacher}a smaller collect.batch_size or collect.num_generations, or more chips (those of "
            "--config.stages=collect may be others than of RIL)"
        )
    if name.removeprefix("collect: ").startswith(("decode", "prefill", "encode an image")):
        return "try fewer slots or pages, smaller prefill chunks, or more chips (mesh.tensor)"
    return (
        f"needs more than {_gib(c.topology.chip.hbm - HEADROOM)}: try a smaller batch, smaller buckets, or more chips"
    )


def _gib(count: float) -> str:
    return f"{count / GIB:.2f} GiB"


def _with_large_stack() -> None:
    """Start again with all the stack that the system allows: the TPU compiler recurses deeply in its own threads."""
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    enough = 2**30
    if soft != resource.RLIM_INFINITY and soft < enough and (hard == resource.RLIM_INFINITY or hard > soft):
        wanted = enough if hard == resource.RLIM_INFINITY else min(enough, hard)
        resource.setrlimit(resource.RLIMIT_STACK, (wanted, hard))
        os.execv(sys.executable, [sys.executable, "-m", "ril_jax.plan", *sys.argv[1:]])


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the compiler is all that is wanted of a TPU
    _with_large_stack()
    cli.run(main, required=("config",), flags=FLAGS, argv=sys.argv)
