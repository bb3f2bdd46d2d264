"""A run that is killed or asked to stop, and started again, ends as one that never was: bit for bit on the CPU."""

import json
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from helpers import small_run

from ril_jax.training.metrics import read_metrics

SEED = 20  # of the moments; they are printed, so that a failure can be run again


@pytest.fixture(scope="module")
def uninterrupted(small_runs, tmp_path_factory) -> Path:
    """The workdir of a run that nobody disturbed."""
    workdir = tmp_path_factory.mktemp("whole") / "workdir"
    done = small_run.train_apart(workdir)
    assert done.returncode == 0, done.stderr[-2000:]
    return workdir


def outcome(workdir: Path) -> dict:
    """All that must not differ: weights as bytes, metrics without the clock, sample tables, collected responses."""
    metrics = {p.stem: read_metrics(p, wall_clock=False) for p in sorted((workdir / "metrics").rglob("*.jsonl"))}
    return {
        "weights": {str(p.relative_to(workdir)): p.read_bytes() for p in sorted(workdir.rglob("model.safetensors"))},
        "metrics": metrics,
        "samples": {p.name: p.read_bytes() for p in sorted((workdir / "samples").rglob("step_*.json"))},
        "responses": {str(p): json.loads((workdir / p).read_text()) for p in _parts(workdir)},
        "summary": json.loads((workdir / "summary.json").read_text()),
    }


def _parts(workdir: Path) -> list[Path]:
    return [p.relative_to(workdir) for p in sorted((workdir / "collect").rglob("part-*.json"))]


def done_in(workdir: Path) -> int:
    """How much of a run is on disk: steps of which metrics are told, and parts of collected responses."""
    told = sum(p.read_bytes().count(b"\n") for p in (workdir / "metrics").rglob("*.jsonl"))
    return told + len(_parts(workdir))


def interrupt(workdir: Path, at: int, number: signal.Signals, after: float = 0.0) -> int:
    """Start the run, send it a signal so many seconds after so much is done, and return its status."""
    with subprocess.Popen(
        small_run.command(workdir), env=small_run.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        until = time.monotonic() + 300
        while process.poll() is None and done_in(workdir) < at:
            assert time.monotonic() < until, f"{done_in(workdir)} of {at} done"
            time.sleep(0.01)
        time.sleep(after)
        process.send_signal(number)
        return process.wait(timeout=300)


def test_sigkill_at_random_moments_changes_nothing(uninterrupted, tmp_path):
    workdir, moments, whole = tmp_path / "workdir", random.Random(SEED), done_in(uninterrupted)
    for low, high in ((0.1, 0.4), (0.45, 0.65), (0.7, 0.9)):
        at, after = round(moments.uniform(low, high) * whole), moments.uniform(0.0, 0.1)
        print(f"to be killed {after:.3f} s after {at} of {whole}")
        assert interrupt(workdir, at, signal.SIGKILL, after) == -signal.SIGKILL
        assert not (workdir / "summary.json").exists()
    done = small_run.train_apart(workdir)
    assert done.returncode == 0, done.stderr[-2000:]
    expected, actual = outcome(uninterrupted), outcome(workdir)
    assert expected["weights"].keys() >= {"sft/model/model.safetensors", "ril/ril/model/model.safetensors"}
    assert len(expected["samples"]) == 3
    for part in expected:
        assert actual[part] == expected[part], part


def test_sigterm_saves_first_and_changes_nothing(uninterrupted, tmp_path):
    workdir = tmp_path / "workdir"
    lines = workdir / "metrics" / "ril" / "ril.jsonl"
    before_ril = done_in(uninterrupted) - len(read_metrics(uninterrupted / "metrics" / "ril" / "ril.jsonl"))
    status = interrupt(workdir, before_ril + 1, signal.SIGTERM)
    if status != 0:  # 0: the signal came after the last step
        assert status == 143
        steps = [int(p.name) for p in (workdir / "ril" / "ril" / "checkpoints").iterdir() if p.name.isdigit()]
        assert max(steps) == len(read_metrics(lines))
    done = small_run.train_apart(workdir)
    assert done.returncode == 0, done.stderr[-2000:]
    expected, actual = outcome(uninterrupted), outcome(workdir)
    for part in expected:
        assert actual[part] == expected[part], part


def test_a_workdir_of_another_config_is_refused_in_one_line(uninterrupted):
    done = small_run.train_apart(uninterrupted, "ril.beta=0.5")
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1
    assert "ril.beta was 0.01 and is 0.5" in lines[0]
    assert "workdir" in lines[0]
