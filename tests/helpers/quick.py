"""Programs that compile quickly and once: for tests of what a run does, not of how fast it is."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import jax

_CACHE = (
    "jax_enable_compilation_cache", "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)  # fmt: skip


@contextlib.contextmanager
def quick_compilation(cache: Path) -> Iterator[None]:
    """In this process; what was compiled once is taken from the folder `cache`."""
    before = {name: getattr(jax.config, name) for name in _CACHE}
    jax.config.update("jax_disable_most_optimizations", True)
    for name, value in zip(_CACHE, (True, str(cache), 0.0, 0), strict=True):
        jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
        for name, value in before.items():
            jax.config.update(name, value)


def quick_environment(cache: Path) -> dict[str, str]:
    """The same for processes that are started with this environment."""
    root = Path(__file__).parents[2]
    paths = [str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "RIL_JAX_CACHE": str(cache), "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PYTHONPATH": os.pathsep.join(p for p in paths if p),
    }  # fmt: skip
