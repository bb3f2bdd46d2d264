#!/usr/bin/env bash
# One or more TPU slices of Cloud TPU, from creation to deletion; docs/tpu.md tells the order.
set -euo pipefail
if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "error: this needs bash 4.4 or newer, and found $BASH_VERSION (on macOS: brew install bash)" >&2
  exit 1
fi

usage() {
  cat <<'USAGE'
usage: launch/tpu_vm.sh [--dry-run] COMMAND [ARGUMENT ...]

  create              ask for the slice with a queued resource, and wait until it is there
  install             copy this checkout (committed files) to every host and install it there, with the tpu extra
  run PROGRAM FLAG ...  start python -m ril_jax.PROGRAM (train, generate, serve, evaluate; export on the first host only)
                      on every host, in the background; train with the same flags in the same workdir goes on where it was
  watch               follow the run until it ends; where the slice is preempted, create, install and run again
  status              the state of the slice, and of the run on its hosts
  stop                SIGTERM: the run saves itself and leaves
  fetch DIR           copy the workdir, without models and checkpoints, and the output into DIR
  delete              delete the slice and its queued resource

settings, from the environment (with their defaults):
  TPU_NAME=ril  TPU_ZONE=us-east5-a  TPU_PROJECT=(gcloud's)  TPU_TYPE=v6e-8  TPU_VERSION=(that of TPU_TYPE)
  TPU_SPOT=0          1 for spot: cheaper, and preempted at any time
  TPU_SLICES=1        so many slices of TPU_TYPE, joined by the data centre's network
  TPU_BUCKET=         Cloud Storage bucket that every host mounts as bucket/ in the project's folder
  WORKDIR=            of train; bucket/runs/TPU_NAME where there is a bucket, else runs/tpu on the first host's disk
  TPU_ENV_FILE=       file of NAME=VALUE lines (keys, tokens) that install copies and run sets
  TPU_SERVER=         TPU_NAME of a slice where `run serve` runs: run waits for it and names it as the judge of train, or
                      as the teacher of generate; TPU_SERVER_ZONE=(TPU_ZONE), TPU_PORT=8000
  TPU_RESTARTS=3      so many failures of the run does watch answer by running it again
  TPU_POLL=30         seconds between two looks

`install` keeps the code, and `run` its settings and flags, in runs/launch (TPU_NOTES); `watch` takes them from there.
USAGE
}

dry_run=0
if [[ "${1:-}" == "--dry-run" ]]; then
  dry_run=1
  shift
  exec 3>&1 # where it prints, also out of $(...)
fi
home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
project=ril_jax_project
noted=(TPU_ZONE TPU_PROJECT TPU_TYPE TPU_VERSION TPU_SPOT TPU_SLICES TPU_BUCKET WORKDIR TPU_ENV_FILE TPU_SERVER
  TPU_SERVER_ZONE TPU_PORT TPU_RESTARTS TPU_POLL)
program=() # what run starts: its name and flags

main() {
  local command=${1:-}
  shift || true
  settings
  case "$command" in
    create) create ;;
    install) install ;;
    run) run "$@" ;;
    watch) watch ;;
    status) status ;;
    stop) on_hosts "cd $project && launch/host.sh stop" ;;
    fetch) fetch "$@" ;;
    delete) delete ;;
    "" | -h | --help | help) usage ;;
    *)
      echo "error: unknown command $command" >&2
      usage >&2
      exit 2
      ;;
  esac
}

settings() {
  name=${TPU_NAME:-ril}
  zone=${TPU_ZONE:-us-east5-a}
  slices=${TPU_SLICES:-1}
  bucket=${TPU_BUCKET:-}
  server=${TPU_SERVER:-}
  port=${TPU_PORT:-8000}
  poll=${TPU_POLL:-30}
  workdir=${WORKDIR:-$([[ -n "$bucket" ]] && echo "bucket/runs/$name" || echo runs/tpu)}
  in_project=()
  if [[ -n "${TPU_PROJECT:-}" ]]; then
    in_project=(--project="$TPU_PROJECT")
  fi
  place=(--zone="$zone" "${in_project[@]}")
  type=${TPU_TYPE:-v6e-8}
  case "$type" in
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    *) version=v2-alpha-tpuv6e ;;
  esac
  version=${TPU_VERSION:-$version}
  node=$name
  if [[ "$slices" != 1 ]]; then
    node=$name-0
  fi
  note=${TPU_NOTES:-$home/runs/launch}/$name.sh
  archive=${note%.sh}.tar.gz
}

# --- the slice --------------------------------------------------------------------------------------------------------

create() {
  local nodes=(--node-id="$name") spot=()
  if [[ "$slices" != 1 ]]; then
    nodes=(--node-count="$slices" --node-prefix="$name")
  fi
  if [[ "${TPU_SPOT:-0}" == 1 ]]; then
    spot=(--spot)
  fi
  call gcloud compute tpus queued-resources create "$name" "${place[@]}" "${nodes[@]}" \
    --accelerator-type="$type" --runtime-version="$version" "${spot[@]}" || return
  local found=""
  while [[ "$found" != ACTIVE ]]; do
    found=$(slice_state)
    say "$name is $found"
    case "$found" in
      ACTIVE) ;;
      FAILED | SUSPEND* | MISSING)
        echo "error: the request ended as $found; delete it and ask again, or in another zone" >&2
        return 1
        ;;
      *) sleep "$poll" ;;
    esac
  done
}

delete() {
  call gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
}

# ACTIVE, SUSPENDED and so on; MISSING if there is none; UNKNOWN if gcloud could not tell.
slice_state() {
  local answer errors
  errors=$(mktemp)
  if answer=$(ask ACTIVE call gcloud compute tpus queued-resources describe "$name" "${place[@]}" \
    --format='value(state.state)' 2>"$errors"); then
    echo "${answer:-UNKNOWN}"
  elif grep -qi 'not.found' "$errors"; then
    echo MISSING
  else
    cat "$errors" >&2
    echo UNKNOWN
  fi
  rm -f "$errors"
}

# Spot VMs can be gone while their queued resource still says ACTIVE.
node_state() {
  ask READY call gcloud compute tpus tpu-vm describe "$node" "${place[@]}" --format='value(state)' || echo UNKNOWN
}

install() {
  if [[ $dry_run == 0 ]]; then
    mkdir -p "$(dirname "$archive")"
  fi
  call git -C "$home" archive --format=tar.gz --output="$archive" HEAD
  install_archive
}

# What `install` has packed: after a preemption the run goes on with the code that it began with.
install_archive() {
  copy_to_hosts "$archive" $project.tar.gz || return
  on_hosts "mkdir -p $project/.launch && tar xzf $project.tar.gz -C $project && $project/launch/host.sh install" || return
  if [[ -n "${TPU_ENV_FILE:-}" ]]; then
    copy_to_hosts "$TPU_ENV_FILE" "$project/.launch/env" || return
    on_hosts "chmod 600 $project/.launch/env" || return
  fi
}

# --- the run ----------------------------------------------------------------------------------------------------------

run() {
  if [[ $# -lt 2 || "$1" == -* ]]; then
    echo "error: run needs a program and its flags, such as: run train --config=configs/qwen3b.py" >&2
    exit 2
  fi
  program=("$@")
  if [[ -n "${TPU_ENV_FILE:-}" ]]; then
    TPU_ENV_FILE=$(realpath "$TPU_ENV_FILE") # watch may be called from elsewhere
  fi
  if [[ "$1" == train && "${TPU_SPOT:-0}" == 1 ]] && ! workdir_survives; then
    echo "error: WORKDIR=$workdir is lost with a spot VM: set TPU_BUCKET, or WORKDIR to a mounted disk (/mnt/...)" >&2
    exit 2
  fi
  if [[ $dry_run == 0 ]]; then
    mkdir -p "$(dirname "$note")"
    {
      for setting in "${noted[@]}"; do
        printf '%s=%q\n' "$setting" "${!setting:-}"
      done
      echo "program=($(quoted "$@"))"
    } >"$note"
  fi
  start
}

start() {
  local words=(.venv/bin/python -m "ril_jax.${program[0]}") remote="cd $project" hosts=(all all)
  if [[ -n "$bucket" ]]; then
    remote+=" && launch/host.sh mount $(quoted "$bucket")"
  fi
  case "${program[0]}" in
    train) words+=(--workdir="$workdir") ;;
    serve) words+=(--port="$port" --config.server.host=0.0.0.0) ;;
    export) words=(env JAX_PLATFORMS=cpu "${words[@]}") hosts=(0 0) ;; # from file to file: no TPU, one host
  esac
  if [[ -n "$server" ]]; then
    point_to_server || return
    remote+=" && .venv/bin/python launch/wait_ready.py http://ril-server:$port/ready"
    case "${program[0]}" in
      train) words+=(--config.reward.judge.base_url="http://ril-server:$port/v1") ;;
      generate) words+=(--config.generate.base_url="http://ril-server:$port/v1") ;;
    esac
  fi
  # The user's flags come last, since the last one of a kind counts.
  ssh_to "${hosts[@]}" "$remote && launch/host.sh start $(quoted "${words[@]}" "${program[@]:1}")"
}

# The hosts know the server as ril-server: a server that was created again has another address, and the same name.
point_to_server() {
  local address
  address=$(server_address)
  if [[ -z "$address" ]]; then
    echo "error: TPU_SERVER=$server has no address: create it, and \`run serve\` there" >&2
    return 1
  fi
  on_hosts "$project/launch/host.sh point ril-server $address"
}

server_address() {
  ask "ADDRESS_OF_$server" call gcloud compute tpus tpu-vm describe "$server" --zone="${TPU_SERVER_ZONE:-$zone}" "${in_project[@]}" \
    --format='value(networkEndpoints[0].ipAddress)'
}

workdir_survives() {
  [[ "$workdir" == /* || (-n "$bucket" && "$workdir" == bucket/*) ]]
}

# The state of the run on the first host, in the words of host.sh; `unreachable` without an answer.
run_state() {
  local answer
  answer=$(ask "state: ended 0" ssh_to 0 0 "cd $project && launch/host.sh state" | sed -n 's/^state: //p') || true
  echo "${answer:-unreachable}"
}

status() {
  echo "$name is $(slice_state)"
  on_hosts "$project/launch/host.sh state"
}

# --- watching ---------------------------------------------------------------------------------------------------------

watch() {
  if [[ ! -e "$note" && $dry_run == 0 ]]; then
    echo "error: nothing was run on $name from this checkout ($note is not there); start it with: run PROGRAM FLAG ..." >&2
    exit 1
  fi
  if [[ -e "$note" ]]; then
    # shellcheck source=/dev/null
    source "$note"
    settings
  fi
  if [[ $dry_run == 1 ]]; then
    watch_dry
    return
  fi
  if [[ -n "$server" ]]; then
    follow_server &
    # shellcheck disable=SC2064  # the process of now
    trap "kill $! 2>/dev/null || true" EXIT
  fi
  local failures=0 found
  while true; do
    found=$(slice_state)
    case "$found" in
      ACTIVE)
        ssh_to 0 0 "cd $project && launch/host.sh follow" || true
        found=$(run_state)
        ;;
    esac
    case "$found" in
      running) ;; # the connection broke
      "ended 0")
        say "${program[0]} has ended well"
        return 0
        ;;
      "ended 2")
        say "${program[0]} says what is wrong with its command or its data above; run it again when that is mended"
        return 2
        ;;
      stopped*)
        say "${program[0]} was stopped, with status ${found#stopped }"
        return "${found#stopped }"
        ;;
      MISSING)
        say "$name is not there any more"
        return 1
        ;;
      SUSPENDED | FAILED) create_again ;;
      unreachable)
        case "$(node_state)" in
          PREEMPTED | TERMINATED | STOPPED) create_again ;;
          *) sleep "$poll" ;;
        esac
        ;;
      ended* | gone | none)
        say "${program[0]} is $found on the first host"
        if still_there; then
          if [[ "$found" == ended* && "$found" != "ended 143" ]]; then # 143 comes from outside: the host was told to go
            failures=$((failures + 1))
            if ((failures > ${TPU_RESTARTS:-3})); then
              say "it has failed $failures times"
              return "${found#ended }"
            fi
          fi
          start_again
        fi
        ;;
      *) # on its way up or down
        say "$name is $found"
        sleep "$poll"
        ;;
    esac
  done
}

# Whether the slice still is, some looks later: a run often ends shortly before its host.
still_there() {
  for _ in 1 2 3; do
    sleep "$poll"
    [[ "$(slice_state)" == ACTIVE && "$(node_state)" == READY ]] || return 1
  done
}

start_again() {
  say "starting ${program[0]} again"
  on_hosts "cd $project && launch/host.sh end" || true
  if ! start; then
    say "that did not work"
    sleep "$poll"
  fi
}

create_again() {
  if [[ "${program[0]}" == train ]] && ! workdir_survives; then
    say "error: the slice is gone, and WORKDIR=$workdir with it: there is nothing to go on from"
    exit 1
  fi
  say "$name was preempted; asking for it again"
  until delete && create; do # a request for spot capacity can itself be preempted or fail
    sleep "$poll"
  done
  until install_archive && start; do
    [[ "$(slice_state)" == ACTIVE ]] || return 0 # gone again: the next round asks again
    sleep "$poll"
  done
}

# Tells the hosts the server's address, and its new one when it was created again.
follow_server() {
  local before="" now
  while sleep "$poll"; do
    now=$(server_address 2>/dev/null) || now=""
    if [[ -n "$now" && "$now" != "$before" ]]; then
      say "$server is at $now now"
      point_to_server && before=$now
    fi
  done
}

watch_dry() {
  if [[ ${#program[@]} == 0 ]]; then
    program=(train --config=configs/qwen7b.py)
    echo "# nothing was run on $name yet; as an example:"
  fi
  echo "# again and again:"
  slice_state >/dev/null
  ssh_to 0 0 "cd $project && launch/host.sh follow"
  run_state >/dev/null
  echo "# after a preemption:"
  delete
  create
  install_archive
  start
}

fetch() {
  local to=${1:?"fetch needs the folder to copy into"} results=ril_jax_results.tar.gz
  ssh_to 0 0 "cd $project && tar czf ../$results --exclude=checkpoints --exclude=model .launch/output.log $(quoted "$workdir")"
  call mkdir -p "$to"
  call gcloud compute tpus queued-resources scp "$name:$results" "$to/$results" "${place[@]}" --node=0 --worker=0
  call tar xzf "$to/$results" -C "$to"
}

# --- gcloud -----------------------------------------------------------------------------------------------------------

on_hosts() {
  ssh_to all all "$1"
}

ssh_to() {
  call gcloud compute tpus queued-resources ssh "$name" "${place[@]}" --node="$1" --worker="$2" --command="$3"
}

copy_to_hosts() {
  call gcloud compute tpus queued-resources scp "$1" "$name:$2" "${place[@]}" --node=all --worker=all
}

quoted() {
  local word words=()
  for word in "$@"; do
    if [[ "$word" =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
      words+=("$word")
    else
      words+=("${word@Q}")
    fi
  done
  echo "${words[*]}"
}

say() {
  echo "$(date +%T) $*"
}

call() {
  if [[ $dry_run == 1 ]]; then
    quoted "$@" >&3
  else
    "$@"
  fi
}

# A command whose answer decides what comes next; --dry-run takes the first argument for its answer.
ask() {
  local example=$1
  shift
  "$@" || return
  if [[ $dry_run == 1 ]]; then
    echo "$example"
  fi
}

main "$@"
