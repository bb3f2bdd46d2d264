"""Claims about runs of several processes, with real ones (gloo): the numbers of one process, and one life."""

import contextlib
import json
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import process_loop, processes, small_run
from safetensors.numpy import load_file

import ril_jax.processes
from ril_jax.training.metrics import read_metrics

# Sums over devices come in another order, and Adam makes much of rounding: 1e-3 is some ten times what is seen.
RTOL, ATOL = 1e-3, 1e-4
CHANGES = {"sft.steps": 2, "discriminator.steps": 2, "ril.steps": 4, "checkpoint.every": 1, "mesh.fsdp": -1}


@pytest.fixture(scope="module")
def begun(trained_workdir, tmp_path_factory) -> Path:
    """A workdir with its made models; everything else is to be done."""
    workdir = tmp_path_factory.mktemp("begun") / "workdir"
    for model in ("student", "teacher_a", "teacher_b"):
        shutil.copytree(trained_workdir / "prepare" / model, workdir / "prepare" / model)
    return workdir


@pytest.fixture(scope="module")
def one(begun, tmp_path_factory) -> Path:
    """The workdir of a whole run in one process."""
    workdir = Path(shutil.copytree(begun, tmp_path_factory.mktemp("one") / "workdir"))
    small_run.train_here(workdir, small_run.small_config(**CHANGES))
    return workdir


def run(folder: Path, workdir: Path, count: int):
    """With weights that are moved for sampling, which makes no difference either."""
    changes = CHANGES | {"sampling.layout": "tensor"}
    command = small_run.command(workdir, *(f"{field}={value}" for field, value in changes.items()))
    return processes.started(folder, command, count, processes.environment() | small_run.environment())


def check_equal(workdir: Path, one: Path) -> None:
    """Metrics of all steps, weights, responses and the summary are those of one process."""
    files = sorted(p.relative_to(one) for p in (one / "metrics").rglob("*.jsonl"))
    assert {str(f) for f in files} >= {"metrics/sft.jsonl", "metrics/discriminator.jsonl", "metrics/ril/ril.jsonl"}
    for file in files:
        expected, actual = (read_metrics(folder / file, wall_clock=False) for folder in (one, workdir))
        assert [row.keys() for row in actual] == [row.keys() for row in expected], file
        for row, wanted in zip(actual, expected, strict=True):
            for name, value in wanted.items():
                np.testing.assert_allclose(row[name], value, rtol=RTOL, atol=ATOL, err_msg=f"{file} {name}")
    for part in sorted((one / "collect").rglob("part-*.json")):
        assert json.loads((workdir / part.relative_to(one)).read_text()) == json.loads(part.read_text())
    for model, start in (("sft/model", "prepare/student"), ("ril/ril/model", "sft/model")):
        before = load_file(one / start / "model.safetensors")
        wanted = load_file(one / model / "model.safetensors")
        actual = load_file(workdir / model / "model.safetensors")
        moved = sum(np.square(wanted[name] - before[name]).sum() for name in wanted) ** 0.5
        apart = sum(np.square(actual[name] - wanted[name]).sum() for name in wanted) ** 0.5
        print(f"{model}: {moved:.2e} from the start, {apart:.2e} from that of one process")
        assert apart < 0.02 * moved, model
    assert json.loads((workdir / "summary.json").read_text()) == json.loads((one / "summary.json").read_text())


def rows_of(workdir: Path) -> list[dict]:
    """The metrics of the RIL stage's steps, with the time that each took."""
    file = workdir / "metrics" / "ril" / "ril.jsonl"
    return read_metrics(file) if file.exists() else []


def steps_of(workdir: Path) -> int:
    return len(rows_of(workdir))


def saved_of(workdir: Path) -> int:
    """The last step of the RIL stage of which a checkpoint is complete, 0 for none."""
    folder = workdir / "ril" / "ril" / "checkpoints"
    return max((int(p.name) for p in folder.iterdir() if p.name.isdigit()), default=0) if folder.exists() else 0


def test_two_processes_train_to_the_numbers_of_one_through_a_kill(one, begun, tmp_path):
    """One is killed in the RIL stage: the other ends within a minute, by a line; started again they go on."""
    workdir = Path(shutil.copytree(begun, tmp_path / "workdir"))
    with run(tmp_path / "first", workdir, 2) as group:
        group.until(lambda: saved_of(workdir) >= 1)
        group.processes[1].kill()
        killed = time.monotonic()
        assert group.processes[0].wait(timeout=60) not in (0, 2)
        print(f"the other ended {time.monotonic() - killed:.1f} s later")
        assert "process 1 is gone: no sign of life" in group.said()[0]
    assert steps_of(workdir) < CHANGES["ril.steps"]
    before = rows_of(workdir)[: saved_of(workdir)]
    with run(tmp_path / "second", workdir, 2) as group:
        assert group.wait() == [0, 0], group.said()
        first, second = group.said()
        assert "sft: done before" in first
        assert "RECOMPILED" not in first + second
        assert "held-out accuracy" in first
        assert "held-out accuracy" not in second
    assert rows_of(workdir)[: len(before)] == before  # to the second: what the checkpoint holds is not done again
    check_equal(workdir, one)


@pytest.mark.slow
@pytest.mark.timeout(3600)  # on two cores, which other work may share
def test_four_processes_train_to_the_numbers_of_one_and_one_or_two_go_on_from_them(one, begun, tmp_path):
    workdir = Path(shutil.copytree(begun, tmp_path / "workdir"))
    with run(tmp_path / "four", workdir, 4) as group:
        group.until(lambda: steps_of(workdir) >= 1, 1800)
        group.processes[2].send_signal(signal.SIGTERM)
        assert group.wait(900) == [143] * 4, group.said()
    assert saved_of(workdir) == steps_of(workdir) < CHANGES["ril.steps"]
    before = rows_of(workdir)
    copy = Path(shutil.copytree(workdir, tmp_path / "copy"))
    for count, folder in ((2, workdir), (1, copy)):
        with run(tmp_path / str(count), folder, count) as group:
            assert group.wait(900) == [0] * count, group.said()
        assert rows_of(folder)[: len(before)] == before
        check_equal(folder, one)


@pytest.mark.slow
def test_two_processes_make_the_models_that_one_makes(trained_workdir, tmp_path):
    folder = tmp_path / "workdir"
    command = small_run.command(folder, "stages=prepare")
    with processes.started(tmp_path, command, 2, processes.environment() | small_run.environment()) as group:
        assert group.wait() == [0, 0], group.said()
    for file in sorted((trained_workdir / "metrics" / "prepare").rglob("*.jsonl")):
        wanted, actual = (
            read_metrics(workdir / file.relative_to(trained_workdir), wall_clock=False)
            for workdir in (trained_workdir, folder)
        )
        assert [row.keys() for row in actual] == [row.keys() for row in wanted]
        for row, other in zip(actual, wanted, strict=True):
            np.testing.assert_allclose(list(row.values()), list(other.values()), rtol=RTOL, atol=ATOL)
    made = {str(p.relative_to(folder)) for p in (folder / "prepare").rglob("*") if p.is_file()}
    assert made == {
        str(p.relative_to(trained_workdir)) for p in (trained_workdir / "prepare").rglob("*") if p.is_file()
    }


# --- a small loop, for what needs no model ----------------------------------------------------------------------------


def loop(folder: Path, workdir: Path, count: int, *flags: str):
    env = processes.environment() | small_run.environment()
    command = [sys.executable, "-m", "helpers.process_loop", f"--workdir={workdir}", *flags]
    return processes.started(folder, command, count, env)


def losses(workdir: Path) -> dict[int, float]:
    """By step; those that were done again are as they were."""
    file = workdir / "losses.jsonl"
    found: dict[int, float] = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        step, loss = json.loads(line)
        assert found.setdefault(step, loss) == pytest.approx(loss, rel=1e-5)
    return found


def test_sigterm_to_one_saves_on_all_and_others_in_number_go_on(tmp_path):
    """Four, two and one process one after another make the losses of one alone, and read every item once an epoch."""
    (tmp_path / "alone").mkdir()
    args = {"steps": 15, "pause": 0.0, "fail_at": 0}
    assert process_loop.main(process_loop.SimpleNamespace(workdir=tmp_path / "alone", **args)) == 0
    workdir = tmp_path / "workdir"
    workdir.mkdir()
    with loop(tmp_path / "four", workdir, 4, "--steps=15", "--pause=0.1") as group:
        group.until(lambda: len(losses(workdir)) >= 3)
        group.processes[2].send_signal(signal.SIGTERM)
        assert group.wait(60) == [143] * 4, group.said()
    stopped = max(losses(workdir))
    assert max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()) == stopped < 15
    with loop(tmp_path / "two", workdir, 2, "--steps=12") as group:
        assert group.wait(60) == [0, 0], group.said()
    assert process_loop.main(process_loop.SimpleNamespace(workdir=workdir, **args)) == 0
    assert losses(workdir) == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    read = [int(line) for file in (workdir / "read").iterdir() for line in file.read_text().split()]
    assert sorted(read) == sorted([*range(process_loop.ITEMS)] * 3)  # 15 batches of 8 are 3 epochs of 40


def test_an_error_of_one_process_ends_all_with_its_line(tmp_path):
    with loop(tmp_path, tmp_path / "workdir", 2, "--steps=100", "--fail_at=3") as group:
        assert group.wait(60) == [2, 2]
        first, second = group.said()
    assert second.splitlines()[-1] == "error: row 7 is corrupt; mend it"
    assert first.splitlines()[-1] == "error: process 1 is gone: row 7 is corrupt; mend it; this process ends, too"
    assert "Traceback" not in first + second


@pytest.mark.parametrize("failed_itself", [False, True])
def test_a_process_that_failed_itself_ends_by_its_own_line_though_the_first_is_gone_before(monkeypatch, failed_itself):
    """The service ends with the first process, which may be quicker to leave than the one that it leaves for."""

    def gone(*_args, **_options):
        raise RuntimeError("UNAVAILABLE: failed to connect")

    state = SimpleNamespace(client=SimpleNamespace(key_value_set=gone), process_id=1, num_processes=2)
    ended = []

    def end(status):
        ended.append(status)
        sys.exit()

    monkeypatch.setattr(ril_jax.processes, "_state", lambda: state)
    monkeypatch.setattr(ril_jax.processes, "_leaving", threading.Event())
    monkeypatch.setattr(ril_jax.processes.os, "_exit", end)
    if failed_itself:
        assert ril_jax.processes.fail("row 7 is corrupt", 2)
    with contextlib.suppress(SystemExit):
        ril_jax.processes.Watch(5.0)._run()
    assert ended == ([] if failed_itself else [ril_jax.processes.LOST])
