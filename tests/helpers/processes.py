"""Several processes of one run on this machine, as a launcher would start them."""

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path


class Group:
    """The processes, in order, and the files of what each prints (both streams)."""

    def __init__(self, processes: list[subprocess.Popen], outputs: list[Path]):
        self.processes, self.outputs = processes, outputs

    def wait(self, seconds: float = 300.0) -> list[int]:
        """Their statuses, once all have ended."""
        end = time.monotonic() + seconds
        try:
            return [process.wait(timeout=max(end - time.monotonic(), 0.1)) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds:.0f} s: {self.said()}") from None

    def until(self, happened, seconds: float = 300.0) -> None:
        """Wait until `happened()`; not beyond the end of a process."""
        end = time.monotonic() + seconds
        while not happened():
            ended = [i for i, process in enumerate(self.processes) if process.poll() is not None]
            assert not ended, f"process {ended} ended before: {self.said()}"
            assert time.monotonic() < end, f"it did not happen: {self.said()}"
            time.sleep(0.02)

    def said(self) -> list[str]:
        return [output.read_text()[-3000:] for output in self.outputs]


@contextlib.contextmanager
def started(folder: Path, command: Sequence[str], count: int, env: dict[str, str], devices: int = 1) -> Iterator[Group]:
    """`count` processes of `command` on CPU with so many devices each; killed at the end of the block."""
    env = env | {"RIL_JAX_COORDINATOR": f"127.0.0.1:{free_port()}", "RIL_JAX_NUM_PROCESSES": str(count)}
    env |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONUNBUFFERED": "1"}
    folder.mkdir(parents=True, exist_ok=True)
    group = Group([], [folder / f"output{i}" for i in range(count)])
    try:
        for i, output in enumerate(group.outputs):
            with output.open("w") as file:
                mine = env | {"RIL_JAX_PROCESS_ID": str(i)}
                group.processes.append(subprocess.Popen(command, env=mine, stdout=file, stderr=subprocess.STDOUT))
        yield group
    finally:
        for process in group.processes:
            process.kill()
            process.wait()


def environment() -> dict[str, str]:
    """This process's, without what would make it one of several."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("RIL_JAX_COORD", "RIL_JAX_NUM"))}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
