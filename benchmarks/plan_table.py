"""Every program of the shipped configs, compiled for the smallest slice of each kind of TPU that holds it.

    python benchmarks/plan_table.py [--only=qwen7b,teacher_qwen72b] [--kinds=v5e] [--keep=FOLDER] > docs/plan.md

Method. For each config and kind the entries of TRIED are taken in turn until every program leaves a GiB; that slice's
programs are printed, and of those before it the first program that does not fit. Compiled at low effort by the real
compiler: peaks are within a few per cent of a full compile, times are rooflines. Nothing here has run on a TPU.
What was compiled is kept in FOLDER and not compiled again, so a table that was broken off goes on; with --kept it is
printed as far as it is.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# What is tried, by size: shapes, perhaps with flags. The first is one size below what was thought to be needed.
TRIED = {
    "qwen7b": {"v5e": ("4x8",), "v5p": ("2x2x1", "2x2x2"), "v6e": ("2x4", "4x4")},
    "internvl8b": {"v5e": ("4x8", "8x8"), "v5p": ("2x2x1", "2x2x2"), "v6e": ("2x4", "4x4")},
    "qwen3b": {"v5e": ("4x4", "4x8"), "v5p": ("2x2x1", "2x2x2"), "v6e": ("2x4", "4x4")},
    "internvl2b": {"v5e": ("4x4", "4x8 --config.mesh.tensor=2"), "v5p": ("2x2x1", "2x2x2"), "v6e": ("2x4", "4x4")},
    "internvl1b": {"v5e": ("4x4", "4x8 --config.mesh.tensor=2"), "v5p": ("2x2x1", "2x2x2"), "v6e": ("2x4", "4x4")},
    "teacher_qwen72b": {
        "v5e": ("4x4", "4x8", "4x8 --config.engine.slots=96 --config.engine.num_pages=2304"),
        "v5p": ("2x2x1 --config.mesh.tensor=4",), "v6e": ("2x4", "4x4"),
    },
    "teacher_internvl78b": {
        "v5e": ("4x4", "4x8", "8x8"), "v5p": ("2x2x1 --config.mesh.tensor=4", "2x2x2"), "v6e": ("2x4", "4x4"),
    },
    "judge_qwen32b": {
        "v5e": ("2x4", "4x4"), "v5p": ("2x2x1 --config.mesh.tensor=4",), "v6e": ("2x2 --config.mesh.tensor=4", "2x4"),
    },
}  # fmt: skip
HEAD = """# What fits where

Written by `python benchmarks/plan_table.py > docs/plan.md`. The compiler is the real one, the chips were absent: peaks
are the compiler's at low effort, with what the run keeps beside a program; times are rooflines of FLOPs and analytic
bytes, a floor. **Nothing here has run on a TPU.** The paper's batch of 144 questions. Slices are the smallest, of those
that were tried in the order of their size, on which every program leaves a GiB. A student's programs include those of
its teacher in the collect stage."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(TRIED), help="names of configs")
    parser.add_argument("--kinds", default="v5e,v5p,v6e")
    parser.add_argument("--keep", type=Path, help="folder of what was compiled before")
    parser.add_argument("--kept", action="store_true", help="compile nothing more, and say what is missing")
    args = parser.parse_args()
    print(HEAD)
    for name in args.only.split(","):
        print(f"\n## configs/{name}.py", flush=True)
        for kind in args.kinds.split(","):
            for tried in TRIED[name][kind]:
                if args.kept and not kept_file(args.keep, name, f"{kind}:{tried}").exists():
                    print(f"\nNot compiled yet: {kind}:{tried}.")
                    break
                if plan(name, f"{kind}:{tried}", args.keep):
                    break
            else:
                print(f"\nNo slice of {kind} that was tried holds it.", flush=True)


def plan(name: str, tried: str, keep: Path | None) -> bool:
    """Print the table if everything fits; one line if not."""
    topology, *flags = tried.split()
    command = ["ril_jax.plan", f"--config=configs/{name}.py", f"--topology={topology}", *flags]
    kept = None if keep is None else kept_file(keep, name, tried)
    if kept is not None and kept.exists():
        status, _, text = kept.read_text().partition("\n")
    else:
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        run = [sys.executable, "-m", *command, "--first"]
        done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, env=environment)
        status, text = str(done.returncode), done.stdout + done.stderr * (done.returncode not in (0, 1))
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(f"{status}\n{text}")
    lines = text.strip().splitlines()
    if status == "0":
        rows = [line for line in lines if line.startswith("|")]
        notes = lines[lines.index(rows[-1]) + 1 :]
        print(f"\n`python -m {' '.join(command)}`: {'; '.join(notes)}\n\n{chr(10).join(rows)}", flush=True)
        return True
    reason = next((line for line in lines if "does not fit" in line), lines[-1])
    print(f"\n{' '.join([topology, *flags])}: {reason}", flush=True)
    return False


def kept_file(keep: Path, name: str, tried: str) -> Path:
    return keep / f"{name} {tried}.txt".replace(":", " ")


if __name__ == "__main__":
    main()
