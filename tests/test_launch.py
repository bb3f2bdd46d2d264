"""Claims about launch/tpu_vm.sh, with a stand-in for gcloud that runs the remote commands in a local folder."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "launch" / "tpu_vm.sh"
COMMANDS = (
    ("create",), ("install",), ("run", "--config=configs/tiny.py"), ("watch",), ("stop",), ("fetch", "out"), ("delete",)
)  # fmt: skip

GCLOUD = """#!/usr/bin/env bash
echo "$*" >>"$LOG"
for word in "$@"; do
  case "$word" in
    --command=*) cd "$VM" && exec bash -c "${word#--command=}" ;;
    scp) exit 0 ;;
  esac
done
[[ "$*" != *describe* ]] || echo ACTIVE
"""
# Stands for the VM's Python: writes down its arguments and trains until it is told to stop.
PYTHON = """#!/usr/bin/env bash
trap 'echo saved; exit 0' TERM
printf '%s\\n' "$@" >arguments
while true; do sleep 0.05; done
"""


@pytest.fixture
def tpu(tmp_path):
    """Runs the script; `tpu.vm` is the VM's home, `tpu.log` what gcloud was asked."""

    def call(*words, status=0):
        env = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "LOG": str(call.log), "VM": str(call.vm)}
        result = subprocess.run([SCRIPT, *words], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert result.returncode == status, result.stderr
        return result

    call.log, call.vm = tmp_path / "log", tmp_path / "vm"
    project = call.vm / "ril_jax_project"
    for path, text in ((tmp_path / "bin/gcloud", GCLOUD), (project / ".venv/bin/python", PYTHON)):
        path.parent.mkdir(parents=True)
        path.write_text(text)
        path.chmod(0o755)
    call.project = project
    yield call
    if (project / "runs/tpu/pid").exists():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int((project / "runs/tpu/pid").read_text()), signal.SIGKILL)


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[0])
def test_dry_run_asks_gcloud_for_nothing(tpu, words, tmp_path):
    result = tpu("--dry-run", *words)
    assert "gcloud compute tpus" in result.stdout
    assert not tpu.log.exists()
    assert not (tmp_path / "out").exists()


def test_a_run_gets_its_flags_is_alone_and_stops_when_told(tpu):
    flags = ["--config=configs/qwen3b.py:cached", "--config.reward.functions=('a b.py:f',)"]
    tpu("run", *flags)
    arguments = wait_for(tpu.project / "arguments").splitlines()
    assert arguments == ["-m", "ril_jax.train", "--workdir=runs/tpu", *flags]
    assert "a run is going on" in tpu("run", *flags, status=1).stderr
    tpu("stop")
    assert wait_for(tpu.project / "runs/tpu/output.log") == "saved\n"
    time.sleep(0.2)  # the process has told that it saved, and ends now
    tpu("run", *flags)


def test_create_waits_until_the_vm_is_there(tpu):
    assert "ril is ACTIVE" in tpu("create").stdout
    asked = tpu.log.read_text().splitlines()
    assert "queued-resources create ril" in asked[0]
    assert "--accelerator-type=v6e-8" in asked[0]
    assert "describe" in asked[1]


def test_unknown_commands_are_refused(tpu):
    assert "unknown command" in tpu("destroy", status=2).stderr
    assert "needs the flags" in tpu("run", status=2).stderr
    assert not tpu.log.exists()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_scripts_are_shellcheck_clean():
    scripts = [SCRIPT, SCRIPT.parents[1] / ".ci" / "run"]
    result = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def wait_for(path, seconds=20.0):
    """The text of a file, once there is some."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if path.exists() and (text := path.read_text()):
            return text
        time.sleep(0.02)
    raise AssertionError(f"{path} did not appear")
