"""One small workdir for all tests of the stages; every test goes on from a copy of it."""

import shutil
from pathlib import Path

import pytest
from helpers import small_run
from helpers.quick import quick_compilation


@pytest.fixture(scope="session")
def small_runs():
    """What all small runs share: quick compilation, in this process and in others."""
    with quick_compilation(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        yield


@pytest.fixture(scope="session")
def trained_workdir(small_runs, tmp_path_factory) -> Path:
    """A workdir of `small_config` in which every stage before RIL is done; go on from a copy."""
    workdir = tmp_path_factory.mktemp("trained") / "workdir"
    small_run.train_here(workdir, small_run.small_config(), "prepare,sft,collect,discriminator")
    return workdir


@pytest.fixture
def workdir(trained_workdir, tmp_path) -> Path:
    """A copy of `trained_workdir`."""
    return Path(shutil.copytree(trained_workdir, tmp_path / "workdir"))
