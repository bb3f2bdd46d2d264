"""Every program of the shipped configs, compiled for the smallest slice of each kind of TPU that holds it.

    python benchmarks/plan_table.py [--only=qwen7b,teacher_qwen72b] > docs/plan.md

Method. For each config and kind the slices are tried in the order of their size, from the one of FIRST on, until every
program leaves a GiB; that slice's programs are printed. Compiled at low effort by the real compiler: peaks are
within a few per cent of a full compile, times are rooflines. Nothing here has run on a TPU.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Where the search begins: one size below what is known to be needed.
FIRST = {
    "qwen7b": {"v5e": "4x8", "v5p": "2x2x2", "v6e": "4x4"},
    "internvl8b": {"v5e": "4x8", "v5p": "2x2x2", "v6e": "4x4"},
    "qwen3b": {"v5e": "4x4", "v5p": "2x2x1", "v6e": "2x4"},
    "internvl2b": {"v5e": "2x4", "v5p": "2x2x1", "v6e": "2x4"},
    "internvl1b": {"v5e": "2x4", "v5p": "2x2x1", "v6e": "2x2"},
    "teacher_qwen72b": {"v5e": "8x8", "v5p": "2x2x2", "v6e": "4x4"},
    "teacher_internvl78b": {"v5e": "8x8", "v5p": "2x2x2", "v6e": "4x4"},
    "judge_qwen32b": {"v5e": "2x4", "v5p": "2x2x1", "v6e": "2x4"},
}
HEAD = """# What fits where

Written by `python benchmarks/plan_table.py > docs/plan.md`. The compiler is the real one, the chips were absent: peaks
are the compiler's at low effort, with what the run keeps beside a program; times are rooflines of FLOPs and analytic
bytes, a floor. Nothing here has run on a TPU. The paper's batch of 144 questions; slices are the smallest, of those
that were tried in the order of their size, on which every program leaves a GiB."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(FIRST), help="names of configs")
    parser.add_argument("--kinds", default="v5e,v5p,v6e")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from ril_jax.planning.chips import CHIPS

    print(HEAD)
    for name in args.only.split(","):
        print(f"\n## configs/{name}.py", flush=True)
        for kind in args.kinds.split(","):
            slices = CHIPS[kind].slices
            for shape in slices[slices.index(FIRST[name][kind]) :]:
                if plan(name, f"{kind}:{shape}"):
                    break
            else:
                print(f"\nNo slice of {kind} that was tried holds it.", flush=True)


def plan(name: str, topology: str) -> bool:
    """Print the table if everything fits; one line if not."""
    command = [sys.executable, "-m", "ril_jax.plan", f"--config={ROOT}/configs/{name}.py", f"--topology={topology}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    if done.returncode == 0:
        print(done.stdout.rstrip(), flush=True)
        return True
    lines = [line for line in done.stdout.splitlines() if "does not fit" in line]
    reason = lines[0] if lines else (done.stderr.strip() or done.stdout.strip()).splitlines()[-1]
    print(f"\n{topology}: {reason}", flush=True)
    return False


if __name__ == "__main__":
    main()
