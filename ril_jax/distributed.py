"""One run in many processes: finds them, joins them, and ends them together.

`cli.run(main, processes=True)` calls `initialize` before an entry point begins. Where the processes are is found, in
this order, from the flags --coordinator, --num_processes and --process_id; from RIL_JAX_COORDINATOR,
RIL_JAX_NUM_PROCESSES and RIL_JAX_PROCESS_ID (launch/local.py sets them); on GKE from what it gives TPU pods
(TPU_WORKER_HOSTNAMES, TPU_WORKER_ID, MEGASCALE_*); in a SLURM step from SLURM_*; on a Cloud TPU VM from its metadata
server. Found nowhere, or being one process only, a run is an ordinary program.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import threading
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

from ril_jax import processes
from ril_jax.errors import InputError

TPU_PORT = 8482  # of the coordinator on TPU hosts; libtpu itself takes 8080, 8431 and 8471 to 8479
START_TIMEOUT = 600  # seconds until every process must be there: pods and hosts come up minutes apart
HEARTBEAT_TIMEOUT = 20  # seconds without a sign of life after which a process counts as dead, and ends the others
# JAX says the same, in many lines: after a silence of its own time-out. Its processes give a sign of life twice in that
# time, so half of it may be over when one is killed; what is left has to be longer than ours.
_JAX_TIMEOUT = 2 * HEARTBEAT_TIMEOUT + 15

Metadata = Callable[[str], str | None]


@dataclass(frozen=True)
class Cluster:
    """The processes of a run, and this one's place among them."""

    source: str  # who told it
    coordinator: str  # host:port on which process 0 listens
    num_processes: int
    process_id: int
    local_devices: tuple[int, ...] | None = None  # GPUs of this process, where several share a machine


def initialize(args: SimpleNamespace, *, start_timeout: float = START_TIMEOUT) -> None:
    """Join the run's other processes, if there are any; call it before anything asks JAX for a device.

    args: the parsed flags `coordinator`, `num_processes`, `process_id`, each None where it is not given. Raises
    InputError for a value that is wrong or missing, and for a port that is taken. Where not all processes come within
    `start_timeout` seconds, says so in one line and ends this process with status 2.
    """
    cluster = detect(
        os.environ,
        coordinator=args.coordinator,
        num_processes=args.num_processes,
        process_id=args.process_id,
        metadata=_tpu_metadata(os.environ),
    )
    if cluster is None:
        return
    import jax

    if cluster.process_id == 0:
        _check_port_is_free(cluster)
    print(
        f"process {cluster.process_id} of {cluster.num_processes} (from {cluster.source}), "
        f"coordinator {cluster.coordinator}",
        flush=True,
    )
    if "JAX_CPU_COLLECTIVES_IMPLEMENTATION" not in os.environ:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # JAX's own preemption service takes SIGTERM away from this process; StopSignal does the work instead.
    jax.config.update("jax_enable_preemption_service", False)
    with _Watchdog(cluster, start_timeout):
        jax.distributed.initialize(
            cluster.coordinator,
            cluster.num_processes,
            cluster.process_id,
            local_device_ids=cluster.local_devices,
            cluster_detection_method="deactivate",
            initialization_timeout=int(start_timeout) + 60,  # beyond ours, since it ends with a stack trace
            heartbeat_timeout_seconds=_JAX_TIMEOUT,
            shutdown_timeout_seconds=3600,  # process 0 may still be writing a model when the others are done
        )
    processes.Watch(HEARTBEAT_TIMEOUT).start()


def joined() -> bool:
    """Whether this process is one of several."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def leave(status: int, line: str) -> NoReturn:
    """Say `line` and end this process after a failure of its own.

    One of several leaves at once, and has the others leave: the orderly way waits for them, which wait for this one in
    their next collective. Of processes that all fail by the same line one says it.
    """
    if not joined():
        print(line, file=sys.stderr, flush=True)
        sys.exit(status)
    sys.stdout.flush()
    if processes.fail(line.removeprefix("error: "), status):
        print(line, file=sys.stderr, flush=True)
    sys.stderr.flush()
    os._exit(status)


def leave_by_bug(error: Exception) -> NoReturn:
    """The same for an error that should not be. Where it may come of another process's end, that is told instead."""
    if "JaxRuntimeError" in {kind.__name__ for kind in type(error).__mro__}:
        processes.wait_for_failure(HEARTBEAT_TIMEOUT + 8 * processes.BEAT)
    traceback.print_exception(error)
    leave(1, f"error: {type(error).__name__}: {' '.join(str(error).split())[:300]}")


# --- who is there -----------------------------------------------------------------------------------------------------


def detect(
    env: Mapping[str, str],
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    metadata: Metadata | None = None,
) -> Cluster | None:
    """The cluster that flags, environment or the TPU VM's metadata describe; None for a single process.

    metadata gives an attribute of this TPU VM by name, or None where it has none; None as a whole off TPU VMs. Raises
    InputError naming the flag or variable that is missing or wrong.
    """
    cluster = _from_user(env, coordinator, num_processes, process_id)
    if cluster is None and _wants_tpu(env):
        cluster = _from_gke(env)
    cluster = cluster or _from_slurm(env)
    if cluster is None and _wants_tpu(env) and metadata is not None:
        cluster = _from_tpu_vm(env, metadata)
    return None if cluster is None or cluster.num_processes == 1 else cluster


def _from_user(
    env: Mapping[str, str], coordinator: str | None, num_processes: int | None, process_id: int | None
) -> Cluster | None:
    """By flags, each of which goes before its variable."""
    flags: dict[str, object] = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    names: dict[str, str] = {}
    values: dict[str, object] = {}
    for flag, value in flags.items():
        variable = f"RIL_JAX_{flag.upper()}"
        names[flag], values[flag] = (f"--{flag}", value) if value is not None else (variable, env.get(variable) or None)
    given = [names[flag] for flag in flags if values[flag] is not None]
    if not given:
        return None
    if values["num_processes"] is None:
        raise InputError(f"{given[0]} is given and --num_processes is not; say how many processes there are in all")
    count = _whole(names["num_processes"], values["num_processes"], least=1)
    if count == 1:
        return Cluster("flags", "", 1, 0)
    if values["process_id"] is None and "JOB_COMPLETION_INDEX" in env:  # an indexed Kubernetes Job numbers its pods
        names["process_id"], values["process_id"] = "JOB_COMPLETION_INDEX", env["JOB_COMPLETION_INDEX"]
    for flag, meaning in (("coordinator", "HOST:PORT of process 0"), ("process_id", f"0 to {count - 1}")):
        if values[flag] is None:
            raise InputError(f"{given[0]} is given and --{flag} is not; it is {meaning}")
    number = _number_below(names["process_id"], values["process_id"], count, names["num_processes"])
    source = "flags" if any(value is not None for value in flags.values()) else "RIL_JAX_*"
    return Cluster(source, _address(names["coordinator"], str(values["coordinator"])), count, number)


def _from_gke(env: Mapping[str, str]) -> Cluster | None:
    """GKE gives every pod of a slice the slice's host names and the pod's number; several slices add MEGASCALE_*."""
    hosts = _hosts(env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES") or "")
    if not hosts:
        return None
    worker = 0
    if len(hosts) > 1:
        name = "TPU_WORKER_ID" if "TPU_WORKER_ID" in env else "JOB_COMPLETION_INDEX"
        if name not in env:
            raise InputError(
                f"TPU_WORKER_HOSTNAMES names {len(hosts)} hosts, but TPU_WORKER_ID is missing; it is this host's place "
                "among them, from 0"
            )
        worker = _number_below(name, env[name], len(hosts), "hosts of TPU_WORKER_HOSTNAMES")
    return _of_slices("GKE", env.get, hosts, worker)


def _from_tpu_vm(env: Mapping[str, str], metadata: Metadata) -> Cluster | None:
    """A Cloud TPU VM's metadata has its number and the addresses of its slice; `tpu-env` has the MEGASCALE_* values."""
    number, endpoints = metadata("agent-worker-number"), metadata("worker-network-endpoints")
    if not number or not endpoints:
        return None
    # Each is HOST, or ID:ID:HOST on older images.
    hosts = [endpoint.rpartition(":")[2].strip() for endpoint in endpoints.split(",")]
    worker = _number_below("the metadata agent-worker-number", number, len(hosts), "worker-network-endpoints")
    lines = (line.partition(":") for line in (metadata("tpu-env") or "").splitlines())
    described = {key.strip(): value.strip().strip("'\"") for key, _, value in lines}
    return _of_slices("the TPU VM", lambda key: env.get(key) or described.get(key), hosts, worker)


def _of_slices(source: str, get: Metadata, hosts: list[str], worker: int) -> Cluster:
    """One slice, or as many as MEGASCALE_NUM_SLICES says; processes count through the slices in order."""
    slices = _whole("MEGASCALE_NUM_SLICES", get("MEGASCALE_NUM_SLICES") or 1, least=1)
    first, number = hosts[0], 0
    if slices > 1:
        for name in ("MEGASCALE_SLICE_ID", "MEGASCALE_COORDINATOR_ADDRESS"):
            if not get(name):
                raise InputError(f"MEGASCALE_NUM_SLICES={slices}, but {name} is missing; the launcher must set both")
        number = _number_below("MEGASCALE_SLICE_ID", get("MEGASCALE_SLICE_ID"), slices, "MEGASCALE_NUM_SLICES")
        first = _hosts(get("MEGASCALE_COORDINATOR_ADDRESS") or "")[0]
    return Cluster(source, f"{first}:{TPU_PORT}", slices * len(hosts), number * len(hosts) + worker)


def _from_slurm(env: Mapping[str, str]) -> Cluster | None:
    """A task that srun started; a shell or batch script inside an allocation is none, though it has most of SLURM_*."""
    nodes = env.get("SLURM_STEP_NODELIST")
    if not nodes or "SLURM_PROCID" not in env:
        return None
    name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    if name not in env:
        raise InputError("SLURM_PROCID is set, but SLURM_NTASKS is missing; start the run by srun")
    tasks = _whole(name, env[name], least=1)
    number = _number_below("SLURM_PROCID", env["SLURM_PROCID"], tasks, name)
    # Two steps of a job, or two jobs on a node, must not share a port; these lie above Linux' own ephemeral ones.
    job = sum(int(env.get(key, "0")) for key in ("SLURM_JOB_ID", "SLURM_STEP_ID") if env.get(key, "0").isdigit())
    address = f"{_first_node(nodes)}:{61000 + job % 4000}"
    return Cluster("SLURM", address, tasks, number, _slurm_devices(env))


def _slurm_devices(env: Mapping[str, str]) -> tuple[int, ...] | None:
    """This task's GPU where several tasks see all of a node's GPUs; None (all that are visible) otherwise."""
    counts = _tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node, local = env.get("SLURM_NODEID", ""), env.get("SLURM_LOCALID", "")
    if not (node.isdigit() and local.isdigit()) or int(node) >= len(counts) or counts[int(node)] == 1:
        return None
    bound = len(env.get("CUDA_VISIBLE_DEVICES", "").split(",")) == 1 and env.get("CUDA_VISIBLE_DEVICES")
    return None if bound else (int(local),)


def _tasks_per_node(text: str) -> list[int]:
    """[4, 4, 3] of SLURM's "4(x2),3"."""
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(count) for count, times in parts for _ in range(int(times or 1))]


def _first_node(nodes: str) -> str:
    """The first host of SLURM's list: "a[03-05,9],b" gives a03."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[([^,\-\]]+)[^\]]*\]", r"\1", first.group() if first else nodes)


def _wants_tpu(env: Mapping[str, str]) -> bool:
    """Whether JAX may take the TPU: JAX_PLATFORMS=cpu on a TPU host is a program of its own."""
    platforms = env.get("JAX_PLATFORMS", "")
    return not platforms or "tpu" in platforms.split(",")


# --- values -----------------------------------------------------------------------------------------------------------


def _whole(name: str, value: object, *, least: int) -> int:
    text = str(value).strip()
    if not re.fullmatch(r"\d+", text) or int(text) < least:
        raise InputError(f"{name}={text} is not a whole number of at least {least}")
    return int(text)


def _number_below(name: str, value: object, count: int, of: str) -> int:
    number = _whole(name, value, least=0)
    if number >= count:
        raise InputError(f"{name}={number} does not fit {of}={count}; the processes are numbered 0 to {count - 1}")
    return number


def _address(name: str, text: str) -> str:
    host, _, port = text.strip().rpartition(":")
    plain = host and "/" not in host and (":" not in host or re.fullmatch(r"\[[^\[\]]+\]", host))
    if not plain or not port.isdigit() or not 0 < int(port) < 65536:
        raise InputError(f"{name}={text} is not HOST:PORT, such as 10.0.0.2:{TPU_PORT}")
    return f"{host}:{port}"


def _hosts(text: str) -> list[str]:
    """The hosts of a comma-separated list of HOST or HOST:PORT."""
    return [entry.strip().partition(":")[0] for entry in text.split(",") if entry.strip()]


# --- the outside world ------------------------------------------------------------------------------------------------


def _tpu_metadata(env: Mapping[str, str]) -> Metadata | None:
    """Reads this machine's metadata server; None where no TPU chip is attached, or the user keeps us from asking."""
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    if not chips or env.get("TPU_SKIP_MDS_QUERY"):
        return None
    server = env.get("GCE_METADATA_HOST") or "metadata.google.internal"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def get(attribute: str) -> str | None:
        request = urllib.request.Request(
            f"http://{server}/computeMetadata/v1/instance/attributes/{attribute}", headers={"Metadata-Flavor": "Google"}
        )
        for attempt in range(3):
            try:
                with opener.open(request, timeout=5) as answer:
                    return answer.read().decode()
            except urllib.error.HTTPError as error:
                if error.code < 500:
                    return None  # the server is there, and this machine has no such attribute: no TPU VM
            except OSError as error:
                if isinstance(getattr(error, "reason", None), socket.gaierror) or attempt == 2:
                    return None  # no metadata server: not on Google Cloud
        return None

    return get


def _check_port_is_free(cluster: Cluster) -> None:
    """gRPC would share the port with another run on this machine without a word."""
    port = int(cluster.coordinator.rpartition(":")[2])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise InputError(
                f"coordinator {cluster.coordinator}: port {port} cannot be taken on this machine ({error.strerror}); "
                "end the other run there, or choose another --coordinator=HOST:PORT"
            ) from error


class _Watchdog:
    """Ends the process with one line if the block takes too long; JAX would abort it with a stack trace."""

    def __init__(self, cluster: Cluster, timeout: float) -> None:
        self._cluster, self._timeout = cluster, timeout
        self._done = threading.Event()

    def __enter__(self) -> None:
        threading.Thread(target=self._watch, daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def _watch(self) -> None:
        if self._done.wait(self._timeout):
            return
        c = self._cluster
        print(
            f"error: process {c.process_id} of {c.num_processes} (from {c.source}) waited {self._timeout:.0f} s: "
            f"{self._reason()}; start all {c.num_processes} processes, with the same coordinator and numbers 0 to "
            f"{c.num_processes - 1}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    def _reason(self) -> str:
        c = self._cluster
        missing = "not all of the others came"
        if c.process_id == 0:
            return missing
        host, _, port = c.coordinator.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError as error:
            return f"process 0 does not answer at {c.coordinator} ({error.strerror or error})"
        return missing
