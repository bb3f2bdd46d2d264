#!/usr/bin/env bash
# One TPU VM from creation to deletion; launch/README.md tells the order. --dry-run prints the gcloud commands instead.
set -euo pipefail

usage() {
  cat <<'USAGE'
usage: launch/tpu_vm.sh [--dry-run] COMMAND [ARGUMENT ...]

  create             ask for the TPU VM with a queued resource and wait until it is there
  install            copy this checkout (committed files) to the VM and install it with the tpu extra
  run FLAG ...       start python -m ril_jax.train with these flags in the background, or go on with it
  watch              follow the run's output (Ctrl-C leaves the run alone)
  stop               SIGTERM: the run saves itself and leaves
  fetch DIR          copy the run's workdir, without checkpoints, into DIR
  delete             delete the VM and its queued resource

settings, from the environment (with their defaults):
  TPU_NAME=ril  TPU_ZONE=us-east5-a  TPU_TYPE=v6e-8  TPU_VERSION=v2-alpha-tpuv6e  TPU_PROJECT=(gcloud's)  TPU_SPOT=0
  WORKDIR=runs/tpu (on the VM)
USAGE
}

dry_run=0
if [[ "${1:-}" == "--dry-run" ]]; then
  dry_run=1
  shift
fi

name=${TPU_NAME:-ril}
zone=${TPU_ZONE:-us-east5-a}
type=${TPU_TYPE:-v6e-8}
version=${TPU_VERSION:-v2-alpha-tpuv6e}
workdir=${WORKDIR:-runs/tpu}
place=(--zone="$zone")
if [[ -n "${TPU_PROJECT:-}" ]]; then
  place+=(--project="$TPU_PROJECT")
fi
home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

main() {
  local command=${1:-}
  shift || true
  case "$command" in
    create) create ;;
    install) install ;;
    run) run "$@" ;;
    watch) on_vm "cd ril_jax_project && tail -n 50 -F $(quoted "$workdir")/output.log" ;;
    stop) on_vm "cd ril_jax_project && kill -TERM \$(cat $(quoted "$workdir")/pid)" ;;
    fetch) fetch "$@" ;;
    delete) call gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet ;;
    "" | -h | --help | help) usage ;;
    *)
      echo "error: unknown command $command" >&2
      usage >&2
      exit 2
      ;;
  esac
}

create() {
  local spot=()
  if [[ "${TPU_SPOT:-0}" == 1 ]]; then
    spot=(--spot)
  fi
  call gcloud compute tpus queued-resources create "$name" --node-id="$name" "${place[@]}" \
    --accelerator-type="$type" --runtime-version="$version" "${spot[@]}"
  local state=""
  while [[ "$dry_run" == 0 && "$state" != ACTIVE ]]; do
    state=$(gcloud compute tpus queued-resources describe "$name" "${place[@]}" --format='value(state.state)')
    echo "$(date +%T) $name is $state"
    case "$state" in
      ACTIVE) ;;
      FAILED | SUSPENDED)
        echo "error: the request ended as $state; delete it and ask again, or in another zone" >&2
        exit 1
        ;;
      *) sleep 30 ;;
    esac
  done
}

install() {
  local folder
  folder=$(mktemp -d)
  call git -C "$home" archive --format=tar.gz --output="$folder/project.tar.gz" HEAD
  call gcloud compute tpus tpu-vm scp "$folder/project.tar.gz" "$name:ril_jax_project.tar.gz" "${place[@]}"
  rm -rf "$folder"
  on_vm "set -e; mkdir -p ril_jax_project; cd ril_jax_project; tar xzf ../ril_jax_project.tar.gz;
    python=\$(for p in python3.13 python3.12 python3.11; do command -v \$p && break; done);
    [ -n \"\$python\" ] || { sudo apt-get update -q && sudo apt-get install -y -q python3.11 python3.11-venv && python=python3.11; };
    [ -d .venv ] || \$python -m venv .venv;
    .venv/bin/pip install --quiet --editable '.[tpu]' --constraint constraints.txt;
    .venv/bin/python -c 'import jax; print(jax.devices())'"
}

run() {
  if [[ $# == 0 ]]; then
    echo "error: run needs the flags of ril_jax.train, such as --config=configs/qwen3b.py" >&2
    exit 2
  fi
  local folder flags
  folder=$(quoted "$workdir")
  flags=$(quoted "$@")
  # A run that was there goes on: the same flags in the same workdir resume it.
  on_vm "cd ril_jax_project && mkdir -p $folder &&
    if [ -e $folder/pid ] && ps -o stat= -p \$(cat $folder/pid) | grep -q '^[^Z]'; then
      echo 'error: a run is going on; stop it first' >&2; exit 1;
    fi &&
    { nohup .venv/bin/python -m ril_jax.train --workdir=$folder $flags >>$folder/output.log 2>&1 </dev/null & echo \$! >$folder/pid; } &&
    echo \"started as process \$(cat $folder/pid); look at it with: launch/tpu_vm.sh watch\""
}

fetch() {
  local to=${1:?"fetch needs the folder to copy into"}
  on_vm "cd ril_jax_project && tar czf ../ril_jax_results.tar.gz --exclude=checkpoints --exclude=model $(quoted "$workdir")"
  call mkdir -p "$to"
  call gcloud compute tpus tpu-vm scp "$name:ril_jax_results.tar.gz" "$to/results.tar.gz" "${place[@]}"
  call tar xzf "$to/results.tar.gz" -C "$to"
}

on_vm() {
  call gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --command="$1"
}

quoted() {
  printf '%q ' "$@" | sed 's/ $//'
}

call() {
  if [[ "$dry_run" == 1 ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

main "$@"
