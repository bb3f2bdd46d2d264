#!/usr/bin/env bash
# What launch/tpu_vm.sh has done on each host of a slice; it lives in the project's folder there, .launch/ holds its state.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'USAGE'
usage: launch/host.sh [--dry-run] COMMAND [ARGUMENT ...]

  install              make .venv with the tpu extra
  mount BUCKET         mount a Cloud Storage bucket as bucket/, unless it is there
  point NAME ADDRESS   let NAME stand for ADDRESS on this host
  start COMMAND ...    start the command in the background; its output goes to .launch/output.log
  state                print `state: ` and running, ended STATUS, stopped STATUS (by stop), gone (killed), or none
  follow               print the output of what runs until it ends
  stop                 SIGTERM: a run saves itself and leaves
  end                  stop, and SIGKILL after 90 seconds
USAGE
}

dry_run=0
if [[ "${1:-}" == "--dry-run" ]]; then
  dry_run=1
  shift
fi

main() {
  local command=${1:-}
  shift || true
  if [[ $dry_run == 0 ]]; then
    mkdir -p .launch
  fi
  case "$command" in
    install) install ;;
    mount) mount_bucket "${1:?"mount needs the bucket"}" ;;
    point) point "${1:?"point needs a name"}" "${2:?"point needs an address"}" ;;
    start) start "$@" ;;
    supervise) supervise "$@" ;; # what start leaves behind
    state) echo "state: $(state)" ;;
    follow) follow ;;
    stop) stop ;;
    end) end ;;
    "" | -h | --help | help) usage ;;
    *) fail "unknown command $command; launch/host.sh help lists them" ;;
  esac
}

install() {
  if [[ ! -d .venv ]]; then
    local python
    python=$(for p in python3.13 python3.12 python3.11; do
      "$p" -c 'import ensurepip' 2>/dev/null && echo "$p" && break
    done || true)
    if [[ -n "$python" ]]; then
      call "$python" -m venv .venv
    else # the image has an older Python only, or a release candidate without venv
      call python3 -m pip install --quiet --user uv
      call python3 -m uv venv --quiet --seed --python 3.12 .venv
    fi
  fi
  call .venv/bin/python -m pip install --quiet --editable '.[tpu]' --constraint constraints.txt
  # Only the import: asking for devices would wait for the other hosts of the slice.
  call .venv/bin/python -c 'import jax, libtpu; print("jax", jax.__version__, "with libtpu on", __import__("socket").gethostname())'
}

mount_bucket() {
  local source=https://packages.cloud.google.com/apt key=/usr/share/keyrings/cloud.google.asc
  if [[ $dry_run == 0 ]] && mountpoint -q bucket; then
    return
  fi
  if ! command -v gcsfuse >/dev/null; then
    call sudo bash -c "curl -fsSL $source/doc/apt-key.gpg >$key &&
      echo \"deb [signed-by=$key] $source gcsfuse-\$(lsb_release -c -s) main\" >/etc/apt/sources.list.d/gcsfuse.list &&
      apt-get update -q && apt-get install -y -q gcsfuse"
  fi
  call mkdir -p bucket
  # Nothing is remembered of what exists: hosts must see at once what another one wrote. And no --rename-dir-limit: on a
  # bucket without hierarchical namespace the renaming of a folder then fails, loudly, where it would be a slow copy that
  # a kill leaves half done. Checkpoints rely on both.
  call gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
    --kernel-list-cache-ttl-secs=0 "$1" bucket
}

point() {
  # Not sed -i: in a container /etc/hosts can be written, but not replaced.
  call sudo bash -c "hosts=\$(grep -v '[[:space:]]$1\$' /etc/hosts); printf '%s\n' \"\$hosts\" '$2 $1' >/etc/hosts"
}

start() {
  [[ $# -gt 0 ]] || fail "start needs a command"
  if [[ $dry_run == 1 ]]; then
    call "$@"
    return
  fi
  [[ "$(state)" != running ]] || fail "a run is going on on $(hostname); stop it first"
  rm -f .launch/pid .launch/status .launch/stopped
  cat /proc/sys/kernel/random/boot_id >.launch/boot
  { date '+--- %F %T'; quoted "$@"; } >>.launch/output.log
  nohup launch/host.sh supervise "$@" >>.launch/output.log 2>&1 </dev/null &
  while [[ ! -s .launch/pid ]]; do
    sleep 0.1
  done
  echo "started on $(hostname) as process $(<.launch/pid)"
}

supervise() {
  if [[ -e .launch/env ]]; then
    set -a
    # shellcheck source=/dev/null
    source .launch/env
    set +a
  fi
  local status=0
  "$@" &
  echo $! >.launch/pid
  wait $! || status=$?
  echo "$status" >.launch/status
}

state() {
  if [[ ! -e .launch/pid ]]; then
    echo none
  elif [[ ! -s .launch/status && "$(<.launch/boot)" != "$(</proc/sys/kernel/random/boot_id)" ]]; then
    echo gone # with its host, which has started again
  elif [[ ! -s .launch/status ]] && kill -0 "$(<.launch/pid)" 2>/dev/null; then
    echo running
  else
    for _ in {1..20}; do # its supervisor is writing the status
      [[ ! -s .launch/status ]] || break
      sleep 0.1
    done
    if [[ ! -s .launch/status ]]; then
      echo gone
    elif [[ -e .launch/stopped ]]; then
      echo "stopped $(<.launch/status)"
    else
      echo "ended $(<.launch/status)"
    fi
  fi
}

follow() {
  [[ -e .launch/pid ]] || fail "nothing was started here"
  call tail -n 50 -F --pid="$(<.launch/pid)" .launch/output.log
}

stop() {
  [[ "$(state)" == running ]] || fail "nothing runs on $(hostname)"
  touch .launch/stopped
  call kill -TERM "$(<.launch/pid)"
}

end() {
  [[ "$(state)" == running ]] || return 0
  call kill -TERM "$(<.launch/pid)"
  for _ in {1..90}; do
    [[ $dry_run == 0 && "$(state)" == running ]] || return 0
    sleep 1
  done
  call kill -KILL "$(<.launch/pid)"
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

call() {
  if [[ $dry_run == 1 ]]; then
    quoted "$@"
  else
    "$@"
  fi
}

fail() {
  echo "error: $*" >&2
  exit 1
}

main "$@"
