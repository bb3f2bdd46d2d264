"""XLA compilations: how many, of which functions, a loud word for each unexpected one, and the cache on disk.

The set of compiled programs of a run is small and known (shapes are bucketed); a compilation after warm-up costs
minutes on a TPU and means that a shape, a dtype or the spelling of a sharding slipped through.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

logger = logging.getLogger("ril_jax.compilation")

# JAX announces each program that it hands to the backend as "/jax/core/compile/backend_compile_duration".
_COMPILE_EVENT = re.compile(r"backend_compile\w*(duration|secs|time)")
_CACHE_HIT_EVENT = re.compile(r"compilation_cache/cache_hits?$")
# The module that knows the argument shapes says "Compiling <name> with global shapes and types [...]." at level DEBUG.
_SHAPES_LOGGER = "jax._src.interpreters.pxla"


@dataclass(frozen=True)
class Compilation:
    """One program that was built: the function's name, its argument shapes as JAX prints them, the seconds it took."""

    name: str
    shapes: str
    seconds: float
    after: str | None  # the label given to warm(), None during warm-up
    expected: bool

    def __str__(self) -> str:
        return f"{self.name}{' with arguments ' + self.shapes if self.shapes else ''} ({self.seconds:.1f} s)"


class CompileCounter:
    """Counts the programs that JAX builds from now on, and warns of every one that comes after `warm(label)`.

    A program fetched from the persistent cache counts as well (it was traced anew), and is in `cache_hits` besides.
    Raises RuntimeError if this version of JAX does not announce compilations under a name that we know.

        counter = CompileCounter()
        ...                      # first step
        counter.warm("ril")      # from here on a compilation is a warning and raises counter.after_warm
    """

    def __init__(self) -> None:
        self.compilations: list[Compilation] = []
        self.cache_hits = 0
        self._label: str | None = None
        self._expected = threading.local()
        self._shapes: dict[str, str] = {}
        self._closed = False
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        jax.monitoring.register_event_listener(self._on_event)
        self._watch = _ShapesWatch(self._shapes)
        self._check_that_jax_is_heard()

    @property
    def count(self) -> int:
        """Programs built since this counter began."""
        return len(self.compilations)

    @property
    def after_warm(self) -> int:
        """Unexpected compilations: those after warm() and outside expected()."""
        return sum(c.after is not None and not c.expected for c in self.compilations)

    @property
    def seconds(self) -> float:
        """Seconds spent in the backend's compiler, or in fetching from the persistent cache."""
        return sum(c.seconds for c in self.compilations)

    def warm(self, label: str) -> None:
        """Mark the end of the warm-up of `label` (a stage): every later compilation is reported by a warning."""
        self._label = label

    def cold(self) -> None:
        """Go back to warm-up, at the start of the next stage."""
        self._label = None

    @contextlib.contextmanager
    def expected(self) -> Iterator[None]:
        """In this block of this thread compilations are counted but not reported (a first evaluation, say)."""
        before = getattr(self._expected, "on", False)
        self._expected.on = True
        try:
            yield
        finally:
            self._expected.on = before

    def close(self) -> None:
        """Stop counting."""
        if not self._closed:
            self._closed = True
            jax.monitoring.unregister_event_duration_listener(self._on_duration)
            jax.monitoring.unregister_event_listener(self._on_event)
            self._watch.close()

    def __enter__(self) -> CompileCounter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _on_duration(self, event: str, duration_secs: float, **details: Any) -> None:
        if not _COMPILE_EVENT.search(event):
            return
        name = str(details.get("fun_name", "an unnamed function"))
        expected = getattr(self._expected, "on", False)
        compilation = Compilation(name, self._shapes.pop(name, ""), duration_secs, self._label, expected)
        self.compilations.append(compilation)
        if self._label is not None and not expected:
            logger.warning(
                "RECOMPILED after warm-up of %s (unexpected compilation no. %d): %s",
                self._label,
                self.after_warm,
                compilation,
            )

    def _on_event(self, event: str, **_: Any) -> None:
        if _CACHE_HIT_EVENT.search(event):
            self.cache_hits += 1

    def _check_that_jax_is_heard(self) -> None:
        jax.jit(lambda: 0)()
        if not self.compilations:
            self.close()
            raise RuntimeError(
                f"jax {jax.__version__} announces no event like {_COMPILE_EVENT.pattern!r} when it compiles; "
                "ril_jax.compilation needs the new name"
            )
        self.compilations.clear()
        self.cache_hits = 0


class _ShapesWatch(logging.Filter):
    """Reads the argument shapes from JAX's debug log, and shows those lines only to who asked for them."""

    def __init__(self, shapes: dict[str, str]) -> None:
        super().__init__()
        self._shapes = shapes
        self._logger = logging.getLogger(_SHAPES_LOGGER)
        self._level = self._logger.level
        # A filter that refuses a record ends the matter, so the first watch tells those that came after it.
        self._first = next((f for f in self._logger.filters if isinstance(f, _ShapesWatch)), None)
        self._others: list[dict[str, str]] = []
        self._closed = False
        if self._first is not None:
            self._first._others.append(shapes)
            return
        self._shown_from = self._logger.getEffectiveLevel()
        self._logger.addFilter(self)
        if self._shown_from > logging.DEBUG:
            self._logger.setLevel(logging.DEBUG)

    def filter(self, record: logging.LogRecord) -> bool:
        if str(record.msg).startswith("Compiling %s with") and isinstance(record.args, tuple) and len(record.args) > 1:
            shapes = str(record.args[1])
            for known in (self._shapes, *self._others):
                known[str(record.args[0])] = shapes if len(shapes) <= 400 else shapes[:400] + " ..."
        return record.levelno >= self._shown_from

    def close(self) -> None:
        if self._first is not None:
            self._first._others = [shapes for shapes in self._first._others if shapes is not self._shapes]
            if self._first._closed:
                self._first.close()
            return
        self._closed = True
        if self._others:  # it goes on for them, and is taken away with the last
            return
        self._logger.removeFilter(self)
        if not any(isinstance(f, _ShapesWatch) for f in self._logger.filters):
            self._logger.setLevel(self._level)


def enable_persistent_cache(folder: str | os.PathLike[str] | None = None) -> Path | None:
    """Keep compiled programs on disk, so that the next start of the same run does not compile them again.

    The folder is, in this order: `folder`; $JAX_COMPILATION_CACHE_DIR; $RIL_JAX_CACHE; a folder of this user, this
    JAX and this kind of machine under $XDG_CACHE_HOME or ~/.cache. RIL_JAX_CACHE=off turns the cache off. Programs that
    compile in less than half a second get no file. Returns the folder, or None if off or not writable (then logged).
    Call it before the first compilation; it does not start a backend.
    """
    setting = os.environ.get("RIL_JAX_CACHE", "")
    if setting.lower() in ("off", "0", "false", "none"):
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    chosen = folder or os.environ.get("JAX_COMPILATION_CACHE_DIR") or setting or _default_folder()
    path = Path(chosen).expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(f"{path} is not writable")
    except OSError as error:
        logger.warning("no compilation cache: %s (RIL_JAX_CACHE=DIR names another folder)", error)
        return None
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    return path


def _default_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "ril_jax" / f"xla-{jax.__version__}-{platform.machine()}-{_cpu_fingerprint()}"


def _cpu_fingerprint() -> str:
    """Eight hex digits for this CPU's instruction set: XLA's CPU programs use what the compiling machine had.

    A home folder shared between machines would otherwise hand one machine's programs to another (illegal instruction).
    """
    text = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        text += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(text.encode()).hexdigest()[:8]
