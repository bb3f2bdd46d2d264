"""An append-only file of entries by key: what stands there is on the disk, whenever the process is killed."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ril_jax.errors import InputError
from ril_jax.files import lock


class Journal:
    """Entries by key, one a line of JSON; make one with `open`, which keeps others from writing it meanwhile."""

    def __init__(self, file: Any, entries: dict[str, dict[str, Any]]):
        self._file, self.entries = file, entries

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path, notify: Callable[[str], None]) -> Iterator[Journal]:
        """What an earlier start wrote, and room for more; what a kill left half-written at its end is cut off.

        notify: told of that. Raises InputError where another process writes it, or it cannot be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+b")
        except OSError as error:
            raise InputError(f"{path} cannot be written ({error.strerror}); name another --output") from error
        with file:
            lock(file, path, notify)
            file.seek(0)
            data = file.read()
            entries, good = _read(data)
            if good < len(data):
                notify(f"{path}: {len(data) - good} bytes at its end are unreadable; those questions are asked again")
                file.truncate(good)
            yield cls(file, entries)

    def add(self, key: str, entry: dict[str, Any]) -> None:
        """Keep an entry; it is on the disk when this returns."""
        self._file.write(json.dumps({"key": key, **entry}, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        self._file.flush()
        os.fdatasync(self._file.fileno())
        self.entries[key] = entry


def read_journal(path: Path) -> dict[str, dict[str, Any]]:
    """The entries of a journal, also while it is written; none where there is no such file."""
    return _read(path.read_bytes())[0] if path.exists() else {}


def _read(data: bytes) -> tuple[dict[str, dict[str, Any]], int]:
    """The entries, and how many bytes are whole lines."""
    entries, good = {}, 0
    for line in data.splitlines(keepends=True):
        try:
            entry = json.loads(line)
            key = str(entry.pop("key"))
        except (ValueError, LookupError, TypeError, AttributeError):
            break
        if not line.endswith(b"\n"):
            break
        entries[key] = entry
        good += len(line)
    return entries, good
