"""What a person sees while a stage runs: one line with rate and time left, and where the seconds went.

Time that is not training (checkpoints, evaluation, compilation) is measured apart, so that it spoils neither the
rate nor the estimate.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from ril_jax import processes
from ril_jax.errors import InputError
from ril_jax.files import write_atomically

TRAINING = "training"


class Progress:
    """The progress of one stage of `total` units, `start` of which were done by an earlier run.

    On a terminal one line is updated in place; into a file or a pipe a plain line goes about every `interval` seconds.
    `scale`: of what is counted, so many make one `unit` of those that are shown (10**9 bytes a GB).
    """

    def __init__(
        self,
        stage: str,
        total: int,
        unit: str = "questions",
        *,
        start: int = 0,
        scale: int = 1,
        stream: TextIO | None = None,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
        enabled: bool = True,
    ) -> None:
        self.stage = stage
        self.total = total
        self.unit = unit
        self.done = start
        self._start = start
        self._scale = scale
        self._stream = sys.stderr if stream is None else stream
        self._on_terminal = self._stream.isatty()
        self._interval = interval if not self._on_terminal else min(interval, 0.2)
        self._clock = clock
        self._enabled = enabled
        self._seconds: dict[str, float] = {TRAINING: 0.0}
        self._parts = [TRAINING]  # a stack: the part that runs now is the last
        self._since = clock()
        self._shown = float("-inf")
        self._metrics: dict[str, Any] = {}

    def advance(self, units: int = 1, metrics: Mapping[str, Any] | None = None) -> None:
        """Count `units` as done; `metrics` are the few numbers to show (they stay until given anew)."""
        self.done += units
        if metrics:
            self._metrics.update(metrics)
        if self._clock() - self._shown >= self._interval or self.done == self.total:
            self._show()

    @contextlib.contextmanager
    def pause(self, part: str) -> Iterator[None]:
        """Count the time of this block as `part` ("checkpoint", "evaluation", "compile"), not as training."""
        self._switch()
        self._parts.append(part)
        self._seconds.setdefault(part, 0.0)
        if self._on_terminal:
            self._show(note=f"{part} ...")
        try:
            yield
        finally:
            self._switch()
            self._parts.pop()

    def seconds(self) -> dict[str, float]:
        """Seconds of each part up to now: "training" and every name given to pause()."""
        self._switch()
        return dict(self._seconds)

    def rate(self) -> float:
        """Units a second of training time, of this run; 0 before the first."""
        trained = self.seconds()[TRAINING]
        return (self.done - self._start) / trained if trained > 0 else 0.0

    def eta(self) -> float | None:
        """Seconds that are left, pauses included in the share they had so far; compilation, which is over, apart."""
        done = self.done - self._start
        if done <= 0:
            return None
        seconds = self.seconds()
        recurring = sum(value for part, value in seconds.items() if part != "compile")
        return recurring / done * max(self.total - self.done, 0)

    def message(self, text: str) -> None:
        """Print a line of its own without tearing the progress line."""
        if self._enabled:
            self._write(text + "\n", over=True)
            if self._on_terminal:
                self._show()

    def summary(self) -> str:
        """One line: how much was done, in how long, and the seconds of each part."""
        seconds = self.seconds()
        parts = ", ".join(f"{part} {duration(value)}" for part, value in seconds.items() if value >= 0.05)
        done = self.done - self._start
        amount = f"{self._count(done)} {self.unit} in {duration(sum(seconds.values()))}"
        return f"{self.stage}: {amount} ({parts}), {self._rate_words()}"

    def close(self, *, summary: bool = True) -> None:
        """Show the last state and the summary."""
        if self._enabled:
            self._show()
            self._write(("\n" if self._on_terminal else "") + (self.summary() + "\n" if summary else ""))

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def line(self) -> str:
        """The progress line as it is now."""
        width = len(self._count(self.total))
        percent = 100 * self.done // self.total if self.total else 100
        eta = self.eta()
        words = [
            f"{self.stage}  {self._count(self.done):>{width}}/{self._count(self.total)} {self.unit}  {percent:3d}%",
            self._rate_words(),
            f"ETA {'?' if eta is None else duration(eta)}",
            *(f"{name} {_short(value)}" for name, value in self._metrics.items()),
        ]
        return "  ".join(words)

    def _count(self, done: int) -> str:
        return str(done) if self._scale == 1 else f"{done / self._scale:.1f}"

    def _rate_words(self) -> str:
        rate = self.rate() / self._scale
        if rate == 0:
            return f"- {self.unit}/s"
        if rate < 0.5:
            return f"{1 / rate:.1f} s/{self.unit.removesuffix('s')}"
        return f"{rate:.{1 if rate < 100 else 0}f} {self.unit}/s"

    def _switch(self) -> None:
        """Credit the time since the last switch to the part that runs now."""
        now = self._clock()
        self._seconds[self._parts[-1]] += now - self._since
        self._since = now

    def _show(self, note: str = "") -> None:
        if not self._enabled:
            return
        self._shown = self._clock()
        text = self.line() + (f"  [{note}]" if note else "")
        if self._on_terminal:
            self._write(text[: shutil.get_terminal_size().columns - 1], over=True)
        else:
            self._write(text + "\n")

    def _write(self, text: str, over: bool = False) -> None:
        start = "\r\x1b[K" if over and self._on_terminal else ""
        self._stream.write(start + text)
        self._stream.flush()


def of_bytes(stage: str, *, least: int = 2 * 10**9, **settings: Any) -> Callable[[int, int], None]:
    """A `progress(done, total)` in bytes, such as `hub.load_params` calls: shows GB, GB/s and the time left.

    Nothing is shown where the total is under `least`, which takes seconds, and by other processes than the first.
    `settings` are those of `Progress`.
    """
    progress: Progress | None = None

    def show(done: int, total: int) -> None:
        nonlocal progress
        if total < least or not processes.is_first():
            return
        if progress is None:
            progress = Progress(stage, total, "GB", scale=10**9, **settings)
        if done < total:
            progress.advance(done - progress.done)
        else:
            progress.done = done
            progress.close(summary=False)

    return show


def duration(seconds: float) -> str:
    """Seconds as people say them: 4.2s, 1m07s, 3h05m, 2d04h."""
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def _short(value: Any) -> str:
    return value if isinstance(value, str) else f"{float(value):.4g}"


class StageTimer:
    """Seconds per stage, kept in workdir/stages.json and added up over the runs of a workdir.

    The file: {stage: {"seconds": total, "parts": {part: seconds}}}. Raises InputError if it is there and damaged.
    """

    def __init__(self, workdir: str | Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.path = Path(workdir) / "stages.json"
        self._clock = clock
        self._stages: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            try:
                self._stages = json.loads(self.path.read_text())
            except ValueError as error:
                raise InputError(f"{self.path} is not JSON ({error}): delete it; only timings are lost") from error

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time this block as `name` and save, also if it ends by an error."""
        before = self._clock()
        try:
            yield
        finally:
            self.add(name, self._clock() - before)
            self.save()

    def add(self, name: str, seconds: float = 0.0, parts: Mapping[str, float] | None = None) -> None:
        """Add seconds to a stage, or the parts that Progress.seconds() gives (which do not count twice)."""
        entry = self._stages.setdefault(name, {"seconds": 0.0, "parts": {}})
        entry["seconds"] += seconds
        for part, value in (parts or {}).items():
            entry["parts"][part] = entry["parts"].get(part, 0.0) + value

    def save(self) -> None:
        """Write the file atomically; of several processes the first one does."""
        if not processes.is_first():
            return
        rounded = {
            name: {
                "seconds": round(entry["seconds"], 3),
                "parts": {part: round(value, 3) for part, value in entry["parts"].items()},
            }
            for name, entry in self._stages.items()
        }
        write_atomically(self.path, (json.dumps(rounded, indent=2) + "\n").encode())

    def table(self) -> str:
        """A plain-text table: stage, time, share, parts; the total below."""
        total = sum(entry["seconds"] for entry in self._stages.values())
        width = max([len(name) for name in self._stages] + [len("total")])
        share = 100 / total if total else 0.0
        rows = [
            f"{name:<{width}}  {duration(entry['seconds']):>7}  {share * entry['seconds']:3.0f}%  "
            + ", ".join(f"{part} {duration(value)}" for part, value in entry["parts"].items())
            for name, entry in self._stages.items()
        ]
        return "\n".join([row.rstrip() for row in rows] + [f"{'total':<{width}}  {duration(total):>7}"])
