#!/usr/bin/env python3
"""Print the Kubernetes manifest of a run on GKE: a JobSet of one or more TPU slices, and perhaps a server beside it.

    launch/gke.py --config=configs/qwen7b.py:cached --topology=v5e:4x4 --image=IMAGE --bucket=BUCKET \\
        --server-config=configs/judge_qwen32b.py --server-topology=v5e:2x4 -- --config.data.sft=/shared/data/sft ...

Flags of the program come behind --. The server is the judge of `train` or the teacher of `generate`: the run waits
until it is ready, and finds it under a name that stays when it is restarted. Run and server are two JobSets, so that
neither restarts the other, and so that GKE does not take the server for one more slice of the run. docs/tpu.md tells
what the cluster needs. Needs nothing but Python.
"""

import argparse
import json
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHARED = "/shared"  # where bucket or claim are mounted
# Nothing is remembered of what exists in the bucket: hosts must see at once what another one wrote. GKE's own settings
# for TPU machines remember it for ever.
MOUNT_OPTIONS = (
    "implicit-dirs",
    "metadata-cache:ttl-secs:0",
    "metadata-cache:negative-ttl-secs:0",
    "file-system:kernel-list-cache-ttl-secs:0",
)
SERVER_PORT = 8000
MISTAKE = 2  # exit status of a program that names a mistake of its user


@dataclass(frozen=True)
class Kind:
    """A generation of TPUs in GKE: node label, machine type by chips of a host, and slices of one and of many hosts."""

    label: str
    machine: str
    single_host: tuple[str, ...]
    multi_host: tuple[str, ...]  # all with 4 chips a host


KINDS = {
    "v5e": Kind(
        "tpu-v5-lite-podslice",
        "ct5lp-hightpu-{}t",
        ("1x1", "2x2", "2x4"),
        ("4x4", "4x8", "8x8", "8x16", "16x16"),
    ),
    "v5p": Kind(
        "tpu-v5p-slice",
        "ct5p-hightpu-{}t",
        ("2x2x1",),
        ("2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16"),
    ),
    "v6e": Kind(
        "tpu-v6e-slice",
        "ct6e-standard-{}t",
        ("1x1", "2x2", "2x4"),
        ("4x4", "4x8", "8x8", "8x16", "16x16"),
    ),
}


@dataclass(frozen=True)
class Slice:
    """A TPU slice: `v5e:4x4` has 16 chips on 4 hosts."""

    kind: str
    shape: str

    @property
    def chips(self) -> int:
        return math.prod(map(int, self.shape.split("x")))

    @property
    def hosts(self) -> int:
        return self.chips // 4 if self.shape in KINDS[self.kind].multi_host else 1

    @property
    def chips_per_host(self) -> int:
        return self.chips // self.hosts

    @property
    def machine(self) -> str:
        return KINDS[self.kind].machine.format(self.chips_per_host)


class Refused(ValueError):
    """A flag that cannot be used; the message names it and the mend."""


def main(argv: Sequence[str]) -> int:
    try:
        args = parse(argv)
        objects = manifests(args)
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = "\n".join(f"# {line}".rstrip() for line in notes(args)) + "\n"
    text += "".join(f"---\n{to_yaml(each)}\n" for each in objects)
    apply = ["kubectl", "apply", f"--namespace={args.namespace}", "--filename=-"]
    if args.apply and not args.dry_run:
        return subprocess.run(apply, input=text, text=True).returncode
    print(f"# {shlex.join(apply)}\n{text}" if args.apply else text, end="")
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", required=True, help="config of the run, as in the image")
    add("--topology", required=True, help="of each slice, such as v5e:4x4, v5p:2x2x4 or v6e:4x4")
    add("--slices", type=int, default=1, help="joined by the data centre's network (default: 1)")
    add("--image", required=True, help="made with launch/Dockerfile, and pushed")
    add("--program", default="train", choices=("train", "generate", "evaluate"), help="(default: train)")
    add("--name", default="ril", help="of the run (default: ril)")
    add("--namespace", default="default")
    add("--bucket", help=f"Cloud Storage bucket, mounted at {SHARED}")
    add("--claim", help=f"PersistentVolumeClaim (ReadWriteMany, such as Filestore), mounted at {SHARED} instead")
    add("--workdir", help=f"of train (default: {SHARED}/runs/NAME)")
    add("--spot", action="store_true", help="on spot nodes")
    add("--restarts", type=int, default=50, help="after preemptions and failures (default: 50)")
    add("--service-account", default="default", help="Kubernetes service account that may use the bucket")
    add("--secret", help="Kubernetes secret whose entries become environment variables, such as HF_TOKEN")
    add("--server-config", help="config of a server beside the run")
    add("--server-topology", help="of one host, such as v5e:2x4 or v5p:2x2x1")
    add("--server-flag", action="append", default=[], metavar="FLAG", help="a flag of ril_jax.serve; may be repeated")
    add("--apply", action="store_true", help="hand the manifest to kubectl instead of printing it")
    add("--dry-run", action="store_true", help="with --apply: print the command and the manifest")
    add("flags", nargs=argparse.REMAINDER, metavar="-- FLAG ...", help="of the program")
    args = parser.parse_args(argv)
    args.flags = args.flags[1:] if args.flags[:1] == ["--"] else args.flags
    args.slice = parse_slice("--topology", args.topology)
    args.server_slice = parse_slice("--server-topology", args.server_topology) if args.server_topology else None
    args.workdir = args.workdir or f"{SHARED}/runs/{args.name}"
    check(args)
    return args


def parse_slice(flag: str, text: str) -> Slice:
    kind, _, shape = text.partition(":")
    if kind not in KINDS:
        raise Refused(f"{flag}={text}: {kind!r} is not known; use one of {', '.join(KINDS)}, such as v5e:4x4")
    shapes = KINDS[kind].single_host + KINDS[kind].multi_host
    if shape not in shapes:
        raise Refused(f"{flag}={text}: {kind} comes as {', '.join(shapes)}")
    return Slice(kind, shape)


def check(args: argparse.Namespace) -> None:
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,30}[a-z0-9])?", args.name):
        raise Refused(f"--name={args.name}: at most 32 small letters, digits and dashes, the first one a letter")
    if args.slices < 1 or args.restarts < 0:
        raise Refused(f"--slices={args.slices} must be at least 1, and --restarts={args.restarts} at least 0")
    if args.slices > 1 and args.slice.hosts == 1:
        raise Refused(f"--slices={args.slices}: GKE joins slices of several hosts only, and {args.topology} has one")
    if bool(args.bucket) == bool(args.claim):
        raise Refused("give either --bucket or --claim: pods share no disk otherwise, and theirs are lost with them")
    for flag, config in (("--config", args.config), ("--server-config", args.server_config)):
        if config and not (ROOT / config.partition(":")[0]).is_file():
            raise Refused(f"{flag}={config}: there is no such file in this checkout, of which the image is made")
    if bool(args.server_config) != bool(args.server_slice):
        raise Refused("--server-config and --server-topology go together")
    if args.server_slice and args.server_slice.hosts > 1:
        raise Refused(f"--server-topology={args.server_topology} has {args.server_slice.hosts} hosts; a server has one")
    if args.server_slice and args.program == "evaluate":
        raise Refused("--server-config: evaluate has no use for a server")


# --- the objects ------------------------------------------------------------------------------------------------------


def manifests(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The JobSets, the server's first."""
    return [server(args), run(args)] if args.server_slice else [run(args)]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The slices of the run. When one fails all begin again, and the run goes on from its last checkpoint."""
    words = ["python", "-m", f"ril_jax.{args.program}", f"--config={args.config}"]
    if args.program == "train":
        words.append(f"--workdir={args.workdir}")
    waits = []
    if args.server_slice:
        host = f"{args.name}-server-serve-0-0.{args.name}-server"
        field = {"train": "reward.judge.base_url", "generate": "generate.base_url"}[args.program]
        words.append(f"--config.{field}=http://{host}:{SERVER_PORT}/v1")
        command = ["python", "launch/wait_ready.py", f"http://{host}:{SERVER_PORT}/ready", "--timeout=86400"]
        waits.append({"name": "wait-for-server", "image": args.image, "command": command})
    env = []
    if args.slices > 1:
        # What libtpu joins slices by; the labels are JobSet's.
        env = [
            {"name": "MEGASCALE_NUM_SLICES", "value": str(args.slices)},
            {"name": "MEGASCALE_SLICE_ID", "valueFrom": label("jobset.sigs.k8s.io/job-index")},
            {"name": "MEGASCALE_COORDINATOR_ADDRESS", "value": f"{args.name}-{args.program}-0-0.{args.name}"},
        ]
    container = {
        "name": args.program,
        "command": [*words, *args.flags],
        "env": env,
        "ports": [{"containerPort": port} for port in (8471, 8080, 8482)],  # libtpu, its slices, our coordinator
    }
    template = pod(args, args.slice, container, waits, grace=300)
    return jobset(args, args.name, args.slices, args.slice, template)


def server(args: argparse.Namespace) -> dict[str, Any]:
    """One host that serves a model to the run."""
    words = ["python", "-m", "ril_jax.serve", f"--config={args.server_config}", f"--port={SERVER_PORT}"]
    container = {
        "name": "serve",
        "command": [*words, "--config.server.host=0.0.0.0", *args.server_flag],
        "env": [],
        "ports": [{"containerPort": SERVER_PORT}],
        "readinessProbe": {"httpGet": {"path": "/ready", "port": SERVER_PORT}, "periodSeconds": 10},
    }
    template = pod(args, args.server_slice, container, [], grace=90)
    return jobset(args, f"{args.name}-server", 1, args.server_slice, template)


def jobset(
    args: argparse.Namespace, name: str, replicas: int, slice: Slice, template: dict[str, Any]
) -> dict[str, Any]:
    """A Job a slice, a pod a host; its only container gives the Jobs their name."""
    program = template["spec"]["containers"][0]["name"]
    metadata: dict[str, Any] = {"name": name, "namespace": args.namespace, "labels": {"ril-run": args.name}}
    if slice.hosts > 1:  # all hosts of a slice in one node pool, and no other slice in it
        metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    # A mistake of the user stays one: such a Job fails for the reason PodFailurePolicy, and is not begun again.
    mistake = {"containerName": program, "operator": "In", "values": [MISTAKE]}
    job = {
        "parallelism": slice.hosts,
        "completions": slice.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": mistake}]},
        "template": template,
    }
    rule = {"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {"maxRestarts": args.restarts, "rules": [rule]},
            "replicatedJobs": [{"name": program, "replicas": replicas, "template": {"spec": job}}],
        },
    }


def pod(
    args: argparse.Namespace, slice: Slice, container: dict[str, Any], waits: list[dict[str, Any]], *, grace: int
) -> dict[str, Any]:
    """A host of a slice, with all of its chips."""
    chips = {"google.com/tpu": slice.chips_per_host}
    container = {
        "name": container["name"],
        "image": args.image,
        **container,
        # Compiled programs outlive the pod, so that a restart does not compile them again.
        "env": [*container["env"], {"name": "RIL_JAX_CACHE", "value": f"{SHARED}/cache/{args.name}"}],
        "resources": {"requests": chips, "limits": chips},
        "volumeMounts": [{"name": "shared", "mountPath": SHARED}],
    }
    if args.secret:
        container["envFrom"] = [{"secretRef": {"name": args.secret}}]
    selector = {
        "cloud.google.com/gke-tpu-accelerator": KINDS[slice.kind].label,
        "cloud.google.com/gke-tpu-topology": slice.shape,
    }
    if args.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    volume: dict[str, Any] = {"name": "shared", "persistentVolumeClaim": {"claimName": args.claim}}
    metadata: dict[str, Any] = {"labels": {"ril-run": args.name}}
    if args.bucket:
        attributes = {"bucketName": args.bucket, "mountOptions": ",".join(MOUNT_OPTIONS)}
        volume = {"name": "shared", "csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}}
        # The helper that mounts the bucket is held to little memory and space otherwise.
        limits = {f"gke-gcsfuse/{of}-limit": "0" for of in ("cpu", "memory", "ephemeral-storage")}
        metadata["annotations"] = {"gke-gcsfuse/volumes": "true", **limits}
    spec = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": grace,  # after SIGTERM, to save
        "serviceAccountName": args.service_account,
        "nodeSelector": selector,
        "initContainers": waits,
        "containers": [container],
        "volumes": [volume],
    }
    if not waits:
        del spec["initContainers"]
    return {"metadata": metadata, "spec": spec}


def label(name: str) -> dict[str, Any]:
    return {"fieldRef": {"fieldPath": f"metadata.labels['{name}']"}}


# --- the text ---------------------------------------------------------------------------------------------------------


def notes(args: argparse.Namespace) -> Iterator[str]:
    """What the reader does with the manifest, and the node pools that it needs."""
    yield "Node pools that this needs, one a slice (none with Autopilot):"
    pools = [(f"{args.name}-{number}", args.slice) for number in range(args.slices)]
    if args.server_slice:
        pools.append((f"{args.name}-server", args.server_slice))
    for name, slice in pools:
        topology = f" --tpu-topology={slice.shape}" if slice.hosts > 1 else ""
        spot = " --spot" if args.spot else ""
        yield (
            f"  gcloud container node-pools create {name} --cluster=CLUSTER --location=LOCATION --node-locations=ZONE "
            f"--machine-type={slice.machine}{topology} --num-nodes={slice.hosts}{spot} --workload-metadata=GKE_METADATA"
        )
    first = f"jobset.sigs.k8s.io/jobset-name={args.name},batch.kubernetes.io/job-completion-index=0"
    yield f"State: kubectl get jobset,pod --namespace={args.namespace} -l ril-run={args.name}"
    yield f"Output: kubectl logs --namespace={args.namespace} -l {first} --tail=50 --follow"
    yield f"End: kubectl delete jobset --namespace={args.namespace} -l ril-run={args.name}"
    if args.server_slice:
        yield "The server goes on, and costs, after the run: delete it then."


def to_yaml(value: Any, indent: int = 0) -> str:
    """YAML of dicts, lists, strings, numbers and booleans; strings that could be read as anything else are quoted."""
    pad = "  " * indent
    if isinstance(value, dict) and value:
        lines = []
        for key, child in value.items():
            nested = isinstance(child, dict | list) and child
            lines.append(
                f"{pad}{scalar(key)}:" + (f"\n{to_yaml(child, indent + 1)}" if nested else f" {scalar(child)}")
            )
        return "\n".join(lines)
    if isinstance(value, list) and value:
        items = []
        for child in value:
            nested = isinstance(child, dict | list) and child
            text = to_yaml(child, indent + 1)[len(pad) + 2 :] if nested else scalar(child)
            items.append(f"{pad}- {text}")
        return "\n".join(items)
    return pad + scalar(value)


def scalar(value: Any) -> str:
    plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z/][A-Za-z0-9_./-]*", value)
    if plain and value.lower() not in ("true", "false", "yes", "no", "on", "off", "null", "y", "n"):
        return value
    return json.dumps(value, ensure_ascii=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
