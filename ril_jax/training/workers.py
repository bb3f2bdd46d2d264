"""Independent pieces of a stage in processes of their own, side by side on one machine.

Networks of a few hundred thousand parameters do not fill two cores, so on CPU the embedded default trains its models,
and runs its arms, one to a process with its share of the cores. A piece writes into its own folders of the workdir, and
is skipped when it is done; so a killed run goes on where each piece was.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from ril_jax import processes as run_processes
from ril_jax.errors import InputError
from ril_jax.files import write_atomically
from ril_jax.training.run import Run, Stopped


def run_tasks(run: Run, tasks: Mapping[str, Callable[[], bool]], *, processes: int) -> None:
    """Run "prepare:NAME+NAME" and "ril:ARM" tasks in up to `processes` processes.

    A task starts when a process is free and its function says that what it builds on is there. A signal to this process
    goes on to all of them, and they save themselves. Raises InputError where one fails, after the others have ended;
    Stopped where the run was asked to stop.
    """
    config = run.workdir / "workers.json"
    write_atomically(config, run.config.to_json_best_effort().encode())
    shares = _core_shares(processes)
    waiting = dict(tasks)
    running: dict[int, tuple[str, subprocess.Popen]] = {}
    failed: list[tuple[str, int]] = []
    while waiting or running:
        for slot, cores in enumerate(shares):
            task = next((name for name, ready in waiting.items() if ready()), None)
            if slot not in running and task and not failed and not run.stop.should_stop():
                del waiting[task]
                running[slot] = (task, _start(run.workdir, config, task, cores))
        if run.stop.should_stop():
            waiting.clear()
            for _, process in running.values():
                process.send_signal(signal.SIGTERM)
            for _, process in running.values():
                process.wait()
            raise Stopped(run.stop.exit_status)
        for slot, (task, process) in list(running.items()):
            if process.poll() is not None:
                del running[slot]
                if process.returncode:
                    failed.append((task, process.returncode))
        if failed:
            waiting.clear()
        time.sleep(0.1)
    if failed:
        listed = ", ".join(f"{task} (status {status})" for task, status in failed)
        raise InputError(f"{run.workdir}: a part of the run failed, see its line above: {listed}; start again to go on")


def main(argv: Sequence[str]) -> int:
    """One task in this process: WORKDIR CONFIG.json TASK CORES PARENT."""
    _settle(argv[3], int(argv[4]))
    from ril_jax.compilation import enable_persistent_cache
    from ril_jax.training.prepare import make_model
    from ril_jax.training.ril import run_ril
    from ril_jax.training.stopping import StopSignal

    workdir, config_file, task = Path(argv[0]), Path(argv[1]), argv[2]
    config = ConfigDict(json.loads(config_file.read_text()))
    if config.logging.compile_cache:
        enable_persistent_cache()
    kind, _, name = task.partition(":")
    with StopSignal() as stop:
        run = Run.start(config, workdir, stop)
        try:
            if kind == "prepare":
                for part in name.split("+"):
                    make_model(run, part)
            else:
                run_ril(run, name)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            return 2
    return 0


def count(run: Run, tasks: int) -> int:
    """How many processes to run `tasks` pieces in: as config.workers says, and one where the run itself has several."""
    return min(run.config.workers, cores(), tasks) if run_processes.count() == 1 else 1


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def _core_shares(processes: int) -> list[list[int] | None]:
    """Disjoint sets of cores, one a process; None (no pinning) where the system cannot pin."""
    if not hasattr(os, "sched_getaffinity"):
        return [None] * processes
    mine = sorted(os.sched_getaffinity(0))
    count = max(1, min(processes, len(mine)))
    return [mine[i::count] for i in range(count)]


def _start(workdir: Path, config: Path, task: str, share: list[int] | None) -> subprocess.Popen:
    listed = ",".join(map(str, share or []))
    command = [
        sys.executable,
        "-m",
        "ril_jax.training.workers",
        str(workdir),
        str(config),
        task,
        listed,
        str(os.getpid()),
    ]
    return subprocess.Popen(command)


def _settle(listed_cores: str, parent: int) -> None:
    """Take this process's share of the cores, and tie its life to its parent's; before JAX starts its threads."""
    if listed_cores:
        os.sched_setaffinity(0, [int(core) for core in listed_cores.split(",")])
    if sys.platform == "linux":  # a worker whose parent is killed must not go on writing
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        if os.getppid() != parent:
            sys.exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
