"""Settings that every test shares: JAX on the CPU, in full precision, and what was compiled once kept for all."""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers have the folder of the process that started them
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="ril-jax-compiled-")  # of this session
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"

import gc
import sys
from pathlib import Path

import jax
import pytest

from ril_jax import sharding
from ril_jax.models import attention

sys.path.insert(0, str(Path(__file__).parent))  # `from helpers import hf_models`


@pytest.fixture(autouse=True)
def mesh_and_backend_end_with_the_test():
    """A plan's mesh of absent chips, or a backend under test, is none for the tests that follow."""
    mesh, backend = sharding.mesh_in_use(), attention.chosen()
    yield
    sharding.use(mesh)
    attention.use(backend)


def pytest_collection_modifyitems(items):
    """The longest files come first: two are run at a time, and at the end short ones keep both processes at work."""
    tests = Path(__file__).parent
    longest = [tests / "training", tests, tests / "sampling"]
    items.sort(key=lambda item: longest.index(item.path.parent) if item.path.parent in longest else len(longest))


# --- memory ---


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """Let go of compiled programs where a folder of tests ends, and where there are too many in between.

    Each maps memory several times, and Linux gives a process no more than 65,530 maps: XLA crashes beyond. What is
    alive in the middle of a folder, such as a server's engine, keeps its programs.
    """
    if nextitem is None or nextitem.path == item.path:
        return
    if nextitem.path.parent != item.path.parent or _memory_maps() > 45_000:
        gc.collect()
        jax.clear_caches()


def _memory_maps() -> int:
    maps = Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else 0


# --- tiny transformers models: built once a session, by those tests that ask for them ---


@pytest.fixture(scope="session")
def tiny_vl(tmp_path_factory):
    """Qwen2.5-VL with an untied head, grouped queries and windowed vision blocks around a full one."""
    from helpers import hf_models

    return hf_models.save_qwen2_5_vl(tmp_path_factory.mktemp("tiny_vl"))


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory):
    """Text-only Qwen2.5 with a tied head."""
    from helpers import hf_models

    return hf_models.save_qwen2(tmp_path_factory.mktemp("tiny_text"), tie=True)


@pytest.fixture(scope="session")
def qwen_tokenizer_folder(tmp_path_factory) -> Path:
    """A folder with a tiny tokenizer, the chat template and the image settings of Qwen2.5-VL; do not write into it."""
    from helpers.tokenizer_folder import build_tokenizer_folder

    return build_tokenizer_folder(tmp_path_factory.mktemp("qwen_tokenizer"))
