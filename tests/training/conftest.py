"""One small workdir for all tests of the stages; every test goes on from a copy of it."""

import os
import shutil
from pathlib import Path

import jax
import pytest
from helpers import small_run


@pytest.fixture(scope="session")
def small_runs(tmp_path_factory):
    """What all small runs share, in this process and in others: compiled programs on disk, and quick compilation."""
    cache = tmp_path_factory.mktemp("compiled")
    settings = {
        "RIL_JAX_CACHE": str(cache),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PLATFORMS": "cpu",
    }
    before = {name: os.environ.get(name) for name in settings}
    kept = {name: getattr(jax.config, name) for name in ("jax_compilation_cache_dir", "jax_enable_compilation_cache")}
    os.environ.update(settings)
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    jax.config.update("jax_disable_most_optimizations", True)
    yield cache
    jax.config.update("jax_disable_most_optimizations", False)
    for name, value in kept.items():
        jax.config.update(name, value)
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


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
