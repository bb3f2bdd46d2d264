"""Files that no kill leaves half-written, and folders that belong to one job and one process."""

import fcntl
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ril_jax.errors import InputError


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file as a whole: a reader, or a run after a crash, sees the old content or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def claim(path: Path, fingerprint: Mapping[str, Any], *, mend: str) -> list[str]:
    """Write what defines a job to `path`, or compare it with what is there: the fields that differ, none if it is new.

    Raises InputError, which ends in `mend`, where the file cannot be read.
    """
    ours = json.loads(json.dumps(dict(fingerprint)))
    if not path.exists():
        write_atomically(path, (json.dumps(ours, indent=2) + "\n").encode())
        return []
    try:
        theirs = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); {mend}") from error
    return differing_fields(theirs, ours)


def differing_fields(there: Any, here: Any) -> list[str]:
    """What a person is told of two fingerprints (JSON), field by field: "name was X and is Y now"."""
    old, new = _flattened(there), _flattened(here)
    absent = object()
    shown = lambda value: "absent" if value is absent else json.dumps(value, sort_keys=True)  # noqa: E731
    pairs = ((name, shown(old.get(name, absent)), shown(new.get(name, absent))) for name in sorted(old.keys() | new))
    return [f"{name} was {was} and is {now} now" for name, was, now in pairs if was != now]


def _flattened(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        parts = [_flattened(child, f"{prefix}.{key}" if prefix else key) for key, child in value.items()]
        return {name: leaf for part in parts for name, leaf in part.items()}
    return {prefix: value} if prefix else {}


def lock(
    file: Any, name: Path, notify: Callable[[str], None], *, holder: Callable[[], str] = lambda: "another process"
) -> None:
    """Keep an open file for this process until it is closed, however that happens.

    Raises InputError where `holder` has it; where the file system cannot lock, `notify` is told.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{name} is being written by {holder()}; wait for its end, or name another --output") from None
    except OSError as error:  # some network file systems
        notify(f"{name} cannot be locked ({error.strerror}); see to it that one process at a time writes it")
