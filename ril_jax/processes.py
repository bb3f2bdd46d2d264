"""What the processes of one run tell each other: small values, and that one of them is gone.

All of it goes over the network between the hosts, by the service that `jax.distributed` brings, and not through the
devices: it needs no place in the order of their programs, and works while they compute. In a run of one process every
function here does the obvious thing at once. Values are exchanged in the main thread, by all processes in one order.
"""

from __future__ import annotations

import atexit
import base64
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import numpy as np

T = TypeVar("T")
LOST = 1  # the status of a process that ends because another one is gone
BEAT = 0.5  # seconds between two signs of life
_ROOT, _FAILED, _ALIVE = "ril_jax/values", "ril_jax/failed", "ril_jax/alive"
_exchanges = 0  # so many of this process are over
_leaving = threading.Event()  # this process has failed and ends by itself: nothing that it hears matters any more


def count() -> int:
    """How many processes the run has. Unlike jax.process_count() it does not start a backend."""
    state = _state()
    return 1 if state is None else state.num_processes


def index() -> int:
    """Which of them this one is; the first, 0, writes the files."""
    state = _state()
    return 0 if state is None else state.process_id


def is_first() -> bool:
    return index() == 0


def gather(value: T, name: str) -> list[T]:
    """The `value` (anything that JSON can hold) of every process, in their order.

    All must call it with the same `name`; RuntimeError where they do not, which is a bug.
    """
    global _exchanges
    state = _state()
    if state is None:
        return [value]
    client, folder = state.client, f"{_ROOT}/{_exchanges}"
    _exchanges += 1
    client.key_value_set(f"{folder}/{state.process_id}", json.dumps([name, value]))
    if state.process_id == 0:
        given = [json.loads(_wait_for(client, f"{folder}/{i}")) for i in range(state.num_processes)]
        names = [said for said, _ in given]
        values = [said for _, said in given]
        client.key_value_set(f"{folder}/all", json.dumps([names, values]))
        if _exchanges > 1:  # all have come here, so all have read what was before
            client.key_value_delete(f"{_ROOT}/{_exchanges - 2}")
    else:
        names, values = json.loads(_wait_for(client, f"{folder}/all"))
    if set(names) != {name}:
        raise RuntimeError(f"the processes are at different places: {dict(enumerate(names))}")
    return values


def decide(choice: Callable[[], T], name: str) -> T:
    """What `choice` gives on the first process (JSON), on all: whatever depends on files, clocks or the outside."""
    return gather(choice() if is_first() else None, name)[0]  # type: ignore[return-value]


def by_first(work: Callable[[], Any], name: str) -> None:
    """Do `work` on the first process; the others wait until it is done."""
    if is_first():
        work()
    gather(None, name)


def any_of(value: bool, name: str) -> bool:
    """Whether it is true on any process."""
    return any(gather(bool(value), name))


def gather_rows(
    values: Mapping[str, np.ndarray], positions: Sequence[int] | np.ndarray, total: int, name: str, *, beside: T
) -> tuple[dict[str, np.ndarray], list[T]]:
    """Arrays [n, ...] of the rows at `positions` as arrays [total, ...] of all rows, which the processes have between
    them; a process without rows may lack some. And every process's `beside`.
    """
    if count() == 1:
        return dict(values), [beside]
    whole: dict[str, np.ndarray] = {}
    mine: Any = [[int(i) for i in positions], {key: _packed(value) for key, value in values.items()}, beside]
    all_of_them: list[Any] = gather(mine, name)
    for where, arrays, _ in all_of_them:
        for key, packed in arrays.items() if where else ():
            rows = _unpacked(packed)
            if key not in whole:
                whole[key] = np.zeros((total, *rows.shape[1:]), rows.dtype)
            whole[key][where] = rows
    return whole, [other for _, _, other in all_of_them]


def say(text: str) -> None:
    """Print a line once, not once a process."""
    if is_first():
        print(text, flush=True)


# --- living and dying together ---------------------------------------------------------------------------------------


class Watch:
    """A thread that ends this process, with one line, when another one has failed or is gone.

    A process that fails says why (`fail`). One that was killed is missed by the first process after `timeout` seconds
    without a sign of life; the first process itself is missed at once, since the service is a part of it.
    """

    def __init__(self, timeout: float):
        self._state, self._timeout = _state(), timeout
        self._over = threading.Event()
        self._beats: dict[str, tuple[str, float]] = {}
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        if self._state is not None:
            self._thread.start()
            atexit.register(self._leave)

    def _run(self) -> None:
        state, beat = self._state, 0
        while not self._over.is_set() and not _leaving.is_set():
            beat += 1
            try:
                state.client.key_value_set(f"{_ALIVE}/{state.process_id}", str(beat), allow_overwrite=True)
                told = _ask(state.client, _FAILED, BEAT)
                silent = self._silent() if state.process_id == 0 and told is None else []
            except Exception:  # whatever gRPC says of a service that is gone
                if self._over.is_set() or _leaving.is_set():
                    return
                _end("process 0 is gone", LOST)
            if silent:
                line = f"no sign of life for {self._timeout:.0f} seconds"
                _tell(silent[0], line, LOST)
                _end(f"process {silent[0]} is gone: {line}", LOST)
            if told is not None and (failure := json.loads(told))["process"] != state.process_id:
                _end(f"process {failure['process']} is gone: {failure['line']}", failure["status"])

    def _silent(self) -> list[int]:
        """The processes whose last sign of life is too long ago."""
        now = time.monotonic()
        for key, beat in self._state.client.key_value_dir_get(_ALIVE):
            if self._beats.get(key, ("", 0.0))[0] != beat:
                self._beats[key] = (beat, now)
        late = [key for key, (beat, when) in self._beats.items() if beat != "left" and now - when > self._timeout]
        return sorted(int(key.rpartition("/")[2]) for key in late)

    def _leave(self) -> None:
        """This process ends as it should."""
        self._over.set()
        self._thread.join(timeout=10.0)  # inside the service's client it would not survive the interpreter's end
        try:
            self._state.client.key_value_set(f"{_ALIVE}/{self._state.process_id}", "left", allow_overwrite=True)
        except Exception:  # the service is gone, and nobody misses this process
            return


def fail(line: str, status: int) -> bool:
    """Tell the other processes that this one ends, and why. Returns whether none has told the same before."""
    if _state() is None:
        return True
    _leaving.set()
    told = _tell(index(), line, status)
    _let_others_hear()
    return told


def wait_for_failure(seconds: float) -> None:
    """After an error that another process's end may have caused: let `Watch` find out, which then ends this one."""
    if _state() is not None:
        time.sleep(seconds)


def _tell(process: int, line: str, status: int) -> bool:
    client = _state().client
    try:
        client.key_value_set(_FAILED, json.dumps({"process": process, "line": line, "status": status}))
        return True
    except Exception:  # another one was first, or there is no service any more
        try:
            earlier = _ask(client, _FAILED, 0.1)
        except Exception:
            return True
        return earlier is None or json.loads(earlier)["line"] != line


def _let_others_hear() -> None:
    """Before this process ends: the service ends with the first one, and with it what the others have not read."""
    if is_first():
        time.sleep(2 * BEAT)


def _end(line: str, status: int) -> NoReturn:
    if _leaving.is_set():  # in the main thread, with a line and a status of its own
        threading.Event().wait()
    sys.stdout.flush()
    print(f"error: {line}; this process ends, too", file=sys.stderr, flush=True)
    _let_others_hear()
    os._exit(status)


# --- the service -----------------------------------------------------------------------------------------------------


def _state() -> Any:
    """JAX's own record of the processes it has joined; None for one process. JAX gives no public way to the service."""
    if "jax" not in sys.modules:
        return None
    from jax._src import distributed

    state = distributed.global_state
    return state if state.client is not None and state.num_processes > 1 else None


def _ask(client: Any, key: str, seconds: float) -> str | None:
    try:
        return client.blocking_key_value_get(key, int(1000 * seconds))
    except Exception as error:
        if "DEADLINE_EXCEEDED" in str(error):
            return None
        raise


def _wait_for(client: Any, key: str) -> str:
    """Without end: a process that is gone is `Watch`'s matter. In short waits, so that signals reach this process."""
    while True:
        try:
            value = _ask(client, key, 1.0)
        except Exception:
            wait_for_failure(5.0)
            raise
        if value is not None:
            return value


def _packed(array: np.ndarray) -> list[Any]:
    array = np.ascontiguousarray(array)
    return [array.dtype.str, list(array.shape), base64.b64encode(array.tobytes()).decode()]


def _unpacked(packed: Sequence[Any]) -> np.ndarray:
    dtype, shape, text = packed
    return np.frombuffer(base64.b64decode(text), np.dtype(dtype)).reshape(shape)
