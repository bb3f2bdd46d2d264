"""Claims about many processes: where they are found, what a wrong value answers, and two that live and die together."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from ril_jax import cli, distributed
from ril_jax.distributed import TPU_PORT, Cluster, detect
from ril_jax.errors import InputError

SLURM = {
    "SLURM_JOB_ID": "4123",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "tpu[07-08,11],extra",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1(x2)",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "3",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "1",
}
GKE = {"TPU_WORKER_HOSTNAMES": "ril-0-0.ril,ril-0-1.ril,ril-0-2.ril,ril-0-3.ril", "TPU_WORKER_ID": "2"}
SLICES = {"MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "ril-0-0.ril:8080"}
OURS = {"RIL_JAX_COORDINATOR": "10.0.0.5:7777", "RIL_JAX_NUM_PROCESSES": "4", "RIL_JAX_PROCESS_ID": "1"}


def tpu_vm(number, endpoints, tpu_env=""):
    found = {"agent-worker-number": number, "worker-network-endpoints": endpoints, "tpu-env": tpu_env}
    return lambda name: found[name] or None


@pytest.mark.parametrize(
    ("env", "flags", "cluster"),
    [
        ({}, {}, None),
        # flags, and our own variables
        ({}, {"coordinator": "h:1", "num_processes": 2, "process_id": 1}, Cluster("flags", "h:1", 2, 1)),
        ({}, {"coordinator": "[::1]:80", "num_processes": 2, "process_id": 0}, Cluster("flags", "[::1]:80", 2, 0)),
        (OURS, {}, Cluster("RIL_JAX_*", "10.0.0.5:7777", 4, 1)),
        (OURS, {"process_id": 3}, Cluster("flags", "10.0.0.5:7777", 4, 3)),
        (OURS | GKE | SLURM, {}, Cluster("RIL_JAX_*", "10.0.0.5:7777", 4, 1)),
        (OURS | SLURM, {"num_processes": 1}, None),
        (
            {**OURS, "RIL_JAX_PROCESS_ID": "", "JOB_COMPLETION_INDEX": "2"},
            {},
            Cluster("RIL_JAX_*", "10.0.0.5:7777", 4, 2),
        ),
        # GKE
        (GKE, {}, Cluster("GKE", f"ril-0-0.ril:{TPU_PORT}", 4, 2)),
        (GKE | SLICES, {}, Cluster("GKE", f"ril-0-0.ril:{TPU_PORT}", 12, 6)),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "JOB_COMPLETION_INDEX": "1"}, {}, Cluster("GKE", f"a:{TPU_PORT}", 2, 1)),
        (
            {"TPU_PROCESS_ADDRESSES": "a:8476,b:8476", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "1"},
            {},
            Cluster("GKE", f"a:{TPU_PORT}", 2, 1),
        ),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, {}, None),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}, {}, None),
        (GKE | {"JAX_PLATFORMS": "cpu"}, {}, None),
        (GKE | {"JAX_PLATFORMS": "tpu,cpu"}, {}, Cluster("GKE", f"ril-0-0.ril:{TPU_PORT}", 4, 2)),
        ({"JOB_COMPLETION_INDEX": "3"}, {}, None),  # some indexed Job; nobody said that its pods belong together
        # SLURM
        (SLURM, {}, Cluster("SLURM", "tpu07:61123", 6, 3, (1,))),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "2"}, {}, Cluster("SLURM", "tpu07:61123", 6, 3)),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1"}, {}, Cluster("SLURM", "tpu07:61123", 6, 3, (1,))),
        (SLURM | {"SLURM_NODEID": "2", "SLURM_LOCALID": "0"}, {}, Cluster("SLURM", "tpu07:61123", 6, 3)),
        (SLURM | {"SLURM_STEP_NODELIST": "n1,n2", "SLURM_STEP_ID": "2"}, {}, Cluster("SLURM", "n1:61125", 6, 3, (1,))),
        (SLURM | {"SLURM_STEP_NODELIST": "r[1-2]n[04,09]"}, {}, Cluster("SLURM", "r1n04:61123", 6, 3, (1,))),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, {}, None),
        ({k: v for k, v in SLURM.items() if "STEP" not in k} | {"SLURM_PROCID": "0"}, {}, None),  # sbatch, no srun
    ],
)
def test_processes_are_found(env, flags, cluster):
    assert detect(env, **flags) == cluster


def test_tpu_vm_metadata():
    old = "unknown:unknown:10.1.0.2,unknown:unknown:10.1.0.3"
    assert detect({}, metadata=tpu_vm("1", old)) == Cluster("the TPU VM", f"10.1.0.2:{TPU_PORT}", 2, 1)
    assert detect({}, metadata=tpu_vm("1", "w0,w1")) == Cluster("the TPU VM", f"w0:{TPU_PORT}", 2, 1)
    assert detect({}, metadata=tpu_vm("0", old.split(",")[0])) is None
    assert detect({}, metadata=tpu_vm("", "")) is None  # a machine that is no TPU VM
    assert detect({"JAX_PLATFORMS": "cpu"}, metadata=tpu_vm("1", old)) is None
    slices = "NODE_ID: 'ril-1'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
    slices += "MEGASCALE_COORDINATOR_ADDRESS: '10.9.0.2:8080'\n"
    found = detect({}, metadata=tpu_vm("1", old, slices))
    assert found == Cluster("the TPU VM", f"10.9.0.2:{TPU_PORT}", 4, 3)


@pytest.mark.parametrize(
    ("env", "flags", "names"),
    [
        ({}, {"coordinator": "h:1"}, ["--coordinator is given", "--num_processes"]),
        ({}, {"num_processes": 2}, ["--num_processes is given", "--coordinator"]),
        ({}, {"num_processes": 2, "coordinator": "h:1"}, ["--process_id", "0 to 1"]),
        ({}, {"num_processes": 2, "coordinator": "h:1", "process_id": 2}, ["--process_id=2", "--num_processes=2"]),
        ({}, {"num_processes": 2, "coordinator": "h:1", "process_id": -1}, ["--process_id=-1"]),
        ({}, {"num_processes": 0, "coordinator": "h:1", "process_id": 0}, ["--num_processes=0"]),
        ({}, {"num_processes": 2, "coordinator": "h", "process_id": 0}, ["--coordinator=h ", "HOST:PORT"]),
        ({}, {"num_processes": 2, "coordinator": "http://h:1", "process_id": 0}, ["HOST:PORT"]),
        ({}, {"num_processes": 2, "coordinator": "h:70000", "process_id": 0}, ["HOST:PORT"]),
        (OURS | {"RIL_JAX_NUM_PROCESSES": "four"}, {}, ["RIL_JAX_NUM_PROCESSES=four"]),
        (OURS | {"RIL_JAX_PROCESS_ID": "4"}, {}, ["RIL_JAX_PROCESS_ID=4", "RIL_JAX_NUM_PROCESSES=4"]),
        ({"RIL_JAX_COORDINATOR": "h:1"}, {}, ["RIL_JAX_COORDINATOR is given", "--num_processes"]),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}, ["TPU_WORKER_ID is missing"]),
        (GKE | {"TPU_WORKER_ID": "4"}, {}, ["TPU_WORKER_ID=4", "TPU_WORKER_HOSTNAMES=4"]),
        (GKE | {"TPU_WORKER_ID": ""}, {}, ["TPU_WORKER_ID="]),
        (GKE | {"MEGASCALE_NUM_SLICES": "2"}, {}, ["MEGASCALE_SLICE_ID is missing"]),
        (GKE | SLICES | {"MEGASCALE_SLICE_ID": "3"}, {}, ["MEGASCALE_SLICE_ID=3", "MEGASCALE_NUM_SLICES=3"]),
        (GKE | SLICES | {"MEGASCALE_COORDINATOR_ADDRESS": ""}, {}, ["MEGASCALE_COORDINATOR_ADDRESS is missing"]),
        (GKE | {"MEGASCALE_NUM_SLICES": "two"}, {}, ["MEGASCALE_NUM_SLICES=two"]),
        (SLURM | {"SLURM_PROCID": "x"}, {}, ["SLURM_PROCID=x"]),
        (SLURM | {"SLURM_PROCID": "6"}, {}, ["SLURM_PROCID=6", "SLURM_STEP_NUM_TASKS=6"]),
        ({"SLURM_STEP_NODELIST": "a", "SLURM_PROCID": "0"}, {}, ["SLURM_NTASKS is missing"]),
    ],
)
def test_a_wrong_or_missing_value_is_named(env, flags, names):
    with pytest.raises(InputError) as caught:
        detect(env, **flags)
    assert "\n" not in str(caught.value)
    assert [name for name in names if name not in str(caught.value)] == []


def test_a_taken_port_is_refused():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} cannot be taken"):
            distributed.initialize(SimpleNamespace(coordinator=f"127.0.0.1:{port}", num_processes=2, process_id=0))


def test_a_failed_process_of_several_leaves_at_once(monkeypatch, capfd):
    """Not by sys.exit, after which jax waits for the others, which wait for this process."""

    class Left(BaseException):
        pass

    def leave_now(status):
        raise Left(status)

    def mistake(_):
        raise InputError("row 7 is corrupt")

    monkeypatch.setattr(distributed, "joined", lambda: True)
    monkeypatch.setattr(os, "_exit", leave_now)
    with pytest.raises(Left) as caught:
        cli.run(mistake, required=(), argv=["prog"])
    assert caught.value.args == (2,)
    assert capfd.readouterr().err == "error: row 7 is corrupt\n"


@pytest.mark.parametrize("name", ["workdir", "output"])
def test_remote_folders_are_refused(name):
    """They would become a folder named gs: on the local disk."""
    with pytest.raises(InputError, match=f"--{name}=gs://bucket/run: .*mount the bucket"):
        cli.parse_arguments(["prog", f"--{name}=gs://bucket/run"], required=(), flags=[cli.Flag("output")])


PROGRAM = """
import time
from ril_jax import cli

def main(args):
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from ril_jax.training.stopping import StopSignal

    with StopSignal() as stop:
        mesh = Mesh(np.asarray(jax.devices()), "x")
        mine = np.arange(2.0) + 10 * jax.process_index()
        x = jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec("x")), mine)
        total = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, PartitionSpec()))(x)
        print("sum", float(total), "of", x.shape, "on", jax.device_count(), flush=True)
        for _ in range(600):  # not for ever: the tests may be gone
            if stop.should_stop():
                print("told to stop", flush=True)
                break
            time.sleep(0.2)
    time.sleep(120)  # idle: only heartbeats tell that the other is gone

cli.run(main, required=(), processes=True)
"""


def test_two_processes_compute_stop_and_die_together(tmp_path):
    """A sum over both; SIGTERM to one reaches both; SIGKILL of one ends the other, idle as it is, within a minute."""
    (tmp_path / "program.py").write_text(PROGRAM)
    with pair(tmp_path, "program.py") as (processes, outputs):
        for output in outputs:
            wait_for(output, "sum 22.0 of (4,) on 4")
        processes[1].send_signal(signal.SIGTERM)
        for output in outputs:
            wait_for(output, "told to stop")
        processes[1].kill()
        started = time.monotonic()
        status = processes[0].wait(timeout=60)
        assert status != 0
        assert time.monotonic() - started > 1, "it should have been waiting"
        assert "error: process 1 is gone: no sign of life for 20 seconds" in outputs[0].read_text()


MISSING = """
import sys
from types import SimpleNamespace
from ril_jax import distributed
args = SimpleNamespace(coordinator=sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
distributed.initialize(args, start_timeout=1)
"""


@pytest.mark.parametrize(("number", "reason"), [(0, "not all of the others came"), (1, "process 0 does not answer")])
def test_a_missing_process_is_told_in_one_line(number, reason):
    words = [sys.executable, "-c", MISSING, f"127.0.0.1:{free_port()}", str(number)]
    result = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: process {number} of 2 (from flags) waited 1 s: {reason}")


@contextlib.contextmanager
def pair(folder, program):
    """Two processes of one run, started as a launcher would, and the files of what they print."""
    env = os.environ | {"RIL_JAX_COORDINATOR": f"127.0.0.1:{free_port()}", "RIL_JAX_NUM_PROCESSES": "2"}
    env |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    outputs = [folder / f"output{i}" for i in range(2)]
    processes = []
    try:
        for i, output in enumerate(outputs):
            with output.open("w") as file:
                words = [sys.executable, "-u", str(folder / program)]
                environment = env | {"RIL_JAX_PROCESS_ID": str(i)}
                processes.append(subprocess.Popen(words, env=environment, stdout=file, stderr=subprocess.STDOUT))
        yield processes, outputs
    finally:
        for process in processes:
            process.kill()
            process.wait()


def wait_for(path, text, seconds=60.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if text in path.read_text():
            return
        time.sleep(0.1)
    raise AssertionError(f"{text!r} did not appear: {path.read_text()}")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
