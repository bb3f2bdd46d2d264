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
def uninterrupted(small_runs, tmp_path_factory):
    """(workdir, seconds) of a run that nobody disturbed; the first, slower for compiling, is thrown away."""
    small_run.train_apart(tmp_path_factory.mktemp("first") / "workdir")
    workdir = tmp_path_factory.mktemp("whole") / "workdir"
    begun = time.monotonic()
    done = small_run.train_apart(workdir)
    assert done.returncode == 0, done.stderr[-2000:]
    return workdir, time.monotonic() - begun


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


def interrupt(workdir: Path, after: float, number: signal.Signals) -> subprocess.Popen:
    """Start the run and send it a signal after so many seconds; returns the ended process."""
    process = subprocess.Popen(
        small_run.command(workdir), env=small_run.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        process.communicate(timeout=after)
    except subprocess.TimeoutExpired:
        process.send_signal(number)
        process.communicate(timeout=300)
    return process


def test_sigkill_at_random_moments_changes_nothing(uninterrupted, tmp_path):
    workdir, seconds = uninterrupted
    moments = random.Random(SEED)
    killed = 0
    # Shares of the whole run's time; what is left after the first kill takes longer than the second one waits.
    for low, high in ((0.3, 0.55), (0.2, 0.3), (0.1, 0.3)):
        after = moments.uniform(low, high) * seconds
        process = interrupt(tmp_path / "workdir", after, signal.SIGKILL)
        print(f"killed after {after:.1f} s of {seconds:.1f} s: status {process.returncode}")
        killed += process.returncode == -signal.SIGKILL
    assert killed >= 2
    done = small_run.train_apart(tmp_path / "workdir")
    assert done.returncode == 0, done.stderr[-2000:]
    expected, actual = outcome(workdir), outcome(tmp_path / "workdir")
    assert expected["weights"].keys() >= {"sft/model/model.safetensors", "ril/ril/model/model.safetensors"}
    assert len(expected["samples"]) == 3
    for part in expected:
        assert actual[part] == expected[part], part


def test_sigterm_saves_first_and_changes_nothing(uninterrupted, tmp_path):
    workdir, seconds = uninterrupted
    target = tmp_path / "workdir"
    process = subprocess.Popen(
        small_run.command(target), env=small_run.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    lines = target / "metrics" / "ril" / "ril.jsonl"
    until = time.monotonic() + 10 * seconds + 60
    while time.monotonic() < until and not (lines.exists() and lines.read_text().count("\n") >= 1):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    if process.returncode != 0:  # 0: the signal came after the last step
        assert process.returncode == 143
        steps = [int(p.name) for p in (target / "ril" / "ril" / "checkpoints").iterdir() if p.name.isdigit()]
        assert max(steps) == len(read_metrics(lines))
    done = small_run.train_apart(target)
    assert done.returncode == 0, done.stderr[-2000:]
    expected, actual = outcome(workdir), outcome(target)
    for part in expected:
        assert actual[part] == expected[part], part


def test_a_workdir_of_another_config_is_refused_in_one_line(uninterrupted):
    workdir, _ = uninterrupted
    done = small_run.train_apart(workdir, "ril.beta=0.5")
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1
    assert "ril.beta was 0.01 and is 0.5" in lines[0]
    assert "workdir" in lines[0]
