"""Claims about the compile counter and the persistent cache."""

import logging
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from ril_jax import compilation
from ril_jax.compilation import CompileCounter


@pytest.fixture
def counter():
    with CompileCounter() as counter:
        yield counter


def triple_of_rows(x):
    return x * 3


def reported(caplog) -> list[logging.LogRecord]:
    """The warnings, but for those of engines that other tests keep warm in this process."""
    return [record for record in caplog.records if record.args[0] != "engine"]


def test_a_new_shape_raises_the_count_by_one_and_the_warning_names_function_and_shape(counter, caplog):
    f = jax.jit(triple_of_rows)
    f(np.zeros(3, np.float32))
    assert counter.count == 1
    counter.warm("ril")
    with caplog.at_level(logging.WARNING, "ril_jax.compilation"):
        f(np.ones(3, np.float32))
        assert counter.count == 1
        assert not reported(caplog)
        f(np.zeros(5, np.float32))
    assert counter.count == 2
    assert counter.after_warm == 1
    [record] = reported(caplog)
    assert record.levelno == logging.WARNING
    message = record.getMessage()
    assert "triple_of_rows" in message
    assert "float32[5]" in message
    assert "ril" in message


def test_compilations_before_warm_and_after_cold_are_silent(counter, caplog):
    f = jax.jit(lambda x: x - 1)
    counter.warm("sft")
    counter.cold()
    f(np.zeros(2, np.float32))
    assert counter.count == 1
    assert counter.after_warm == 0
    assert not reported(caplog)


def test_expected_compilations_are_counted_but_not_reported(counter, caplog):
    f = jax.jit(lambda x: x - 2)
    counter.warm("sft")
    with counter.expected():
        f(np.zeros(2, np.float32))
    assert (counter.count, counter.after_warm) == (1, 0)
    assert not reported(caplog)
    f(np.zeros(4, np.float32))
    assert (counter.count, counter.after_warm) == (2, 1)


def test_ahead_of_time_compilation_is_counted(counter):
    jax.jit(lambda x: x + 7).lower(np.zeros(2, np.float32)).compile()
    assert counter.count == 1
    assert counter.seconds > 0


def test_a_closed_counter_counts_no_more_and_leaves_jax_logging_as_it_was():
    logger = logging.getLogger(compilation._SHAPES_LOGGER)
    before = (logger.level, list(logger.filters))
    with CompileCounter() as counter:
        pass
    jax.jit(lambda x: x + 9)(np.zeros(2, np.float32))
    assert counter.count == 0
    assert (logger.level, list(logger.filters)) == before


def test_debug_lines_of_jax_stay_hidden(counter, caplog):
    caplog.handler.setLevel(0)
    jax.jit(lambda x: x + 11)(np.zeros(2, np.float32))
    assert not [r for r in caplog.records if r.levelno == logging.DEBUG]


def test_a_renamed_event_is_an_error_not_a_silent_zero(monkeypatch):
    import re

    monkeypatch.setattr(compilation, "_COMPILE_EVENT", re.compile("no such event"))
    with pytest.raises(RuntimeError, match="announces no event"):
        CompileCounter()


PROGRAM = """
import jax, numpy as np
from ril_jax.compilation import CompileCounter, enable_persistent_cache
folder = enable_persistent_cache()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
counter = CompileCounter()
jax.jit(lambda x: jax.numpy.sin(x) @ x)(np.ones((8, 8), np.float32)).block_until_ready()
print(folder, counter.count, counter.cache_hits)
"""


def cached_run(environment):
    words = [sys.executable, "-c", PROGRAM]
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION")} | environment
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    folder, count, hits = done.stdout.split()
    return folder, int(count), int(hits)


def test_a_second_process_takes_its_program_from_the_cache(tmp_path):
    home = {"XDG_CACHE_HOME": str(tmp_path), "RIL_JAX_CACHE": ""}
    folder, count, hits = cached_run(home)
    assert folder.startswith(str(tmp_path / "ril_jax"))
    assert (count, hits) == (1, 0)
    assert cached_run(home) == (folder, 1, 1)
    assert cached_run(home | {"RIL_JAX_CACHE": "off"}) == ("None", 1, 0)


def test_an_unusable_cache_folder_is_reported_and_the_run_goes_on(tmp_path, caplog, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("RIL_JAX_CACHE", raising=False)
    assert compilation.enable_persistent_cache(tmp_path / "file" / "inside") is None
    assert "no compilation cache" in caplog.text
