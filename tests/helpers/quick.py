"""Programs that compile quickly: for tests of what a run does, not of how fast it is."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import jax


@contextlib.contextmanager
def quick_compilation() -> Iterator[None]:
    """In this process."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


def quick_environment() -> dict[str, str]:
    """The same for processes that are started with this environment."""
    root = Path(__file__).parents[2]
    paths = [str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")]
    quick = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return os.environ | quick | {"PYTHONPATH": os.pathsep.join(p for p in paths if p)}
