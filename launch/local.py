#!/usr/bin/env python3
"""Run one command as several processes on this machine, joined through ril_jax/distributed.py.

    launch/local.py --processes=4 -- python -m ril_jax.train --config=configs/tiny.py --workdir=runs/tiny

Each line of output begins with its process's number. SIGTERM and Ctrl-C go to all processes, which save themselves and
leave. When one fails the others are ended too, and its status is that of the launcher. Needs nothing but Python.
"""

import argparse
import contextlib
import ctypes
import os
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

KILLED = 128 + signal.SIGKILL


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    address = f"127.0.0.1:{args.port or free_port()}"
    additions = [environment(args, address, number) for number in range(args.processes)]
    if args.dry_run:
        for added in additions:
            print(shlex.join(["env", *(f"{name}={value}" for name, value in added.items()), *args.command]))
        return 0
    return run(args.command, additions, args.grace)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=positive, required=True, metavar="N", help="how many")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--cpu-devices", type=positive, metavar="N", help="run on CPU, with so many devices a process")
    kind.add_argument("--gpus", type=positive, metavar="N", help="GPUs of each process; all see all by default")
    parser.add_argument("--port", type=positive, help="of the coordinator; a free one by default")
    parser.add_argument("--grace", type=float, default=60, metavar="SECONDS", help="to end in, when told (default: 60)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands instead of running them")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    args = parser.parse_args(argv)
    args.command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not args.command:
        parser.error("no command; write it behind --")
    return args


def environment(args: argparse.Namespace, address: str, number: int) -> dict[str, str]:
    """What the environment of one process has beside this one's."""
    added = {
        "RIL_JAX_COORDINATOR": address,
        "RIL_JAX_NUM_PROCESSES": str(args.processes),
        "RIL_JAX_PROCESS_ID": str(number),
    }
    if args.cpu_devices:
        added |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(args.cpu_devices)}
    if args.gpus:
        mine = range(number * args.gpus, (number + 1) * args.gpus)
        added["JAX_LOCAL_DEVICE_IDS"] = ",".join(map(str, mine))
    return added


def run(command: Sequence[str], additions: Sequence[Mapping[str, str]], grace: float) -> int:
    """Run the processes to their end. Returns the status of the first that failed, 0 if none did."""
    signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: signals.append(received))
    processes: list[subprocess.Popen] = []
    outputs = selectors.DefaultSelector()
    try:
        for number, added in enumerate(additions):
            processes.append(start(command, added))
            os.set_blocking(processes[-1].stdout.fileno(), False)
            outputs.register(processes[-1].stdout, selectors.EVENT_READ, Lines(number))
    except OSError as error:
        end(processes)
        print(f"error: {command[0]}: {error.strerror}", file=sys.stderr)
        return 2
    deadline, failed = None, 0
    while any(process.poll() is None for process in processes):
        copy(outputs, wait=0.1)
        while signals:
            tell(processes, signals.pop(0))
            deadline = deadline or time.monotonic() + grace
        for number, process in enumerate(processes):
            if process.poll() and not failed:
                failed = process.returncode if process.returncode > 0 else 128 - process.returncode
                if deadline is None:  # nobody asked for it: the others are of no use without this one
                    say(f"process {number} ended with status {failed}; the others are told to end")
                    tell(processes, signal.SIGTERM)
                    deadline = time.monotonic() + grace
        if deadline and time.monotonic() > deadline:
            say(f"not all processes ended within {grace:g} s; they are killed")
            end(processes)
            failed = failed or KILLED
    end(processes)  # what they started and left behind
    last = time.monotonic() + 1  # for what is still in the pipes
    while outputs.get_map() and time.monotonic() < last:
        copy(outputs, wait=0.1)
    statuses = [process.returncode for process in processes if process.returncode]
    return failed or next((s if s > 0 else 128 - s for s in statuses), 0)


def start(command: Sequence[str], added: Mapping[str, str]) -> subprocess.Popen:
    """A process in a session of its own: a Ctrl-C at the terminal reaches it once, through us."""
    return subprocess.Popen(
        command,
        env=os.environ | added | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=die_with_parent if sys.platform == "linux" else None,
    )


def die_with_parent() -> None:
    """Have the kernel send SIGTERM when the launcher is killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def copy(outputs: selectors.BaseSelector, wait: float) -> None:
    """Copy what the processes have printed, waiting so many seconds for some."""
    for key, _ in outputs.select(timeout=wait):
        if not key.data.read(key.fileobj):
            outputs.unregister(key.fileobj)


class Lines:
    """Copies whole lines of one process to stdout, behind its number."""

    def __init__(self, number: int) -> None:
        self._prefix = f"[{number}] ".encode()
        self._rest = b""

    def read(self, source) -> bool:
        """Copy what there is; False at the end."""
        data = source.read()
        if data is None:
            return True
        lines = (self._rest + data).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self._rest = lines.pop()
        if not data and self._rest:
            lines.append(self._rest)
        sys.stdout.buffer.write(b"".join(self._prefix + line + b"\n" for line in lines))
        sys.stdout.buffer.flush()
        return bool(data)


def tell(processes: Sequence[subprocess.Popen], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def end(processes: Sequence[subprocess.Popen]) -> None:
    """Kill the processes and whatever they have started."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
