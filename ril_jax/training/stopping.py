"""The wish to stop: SIGTERM and Ctrl-C become "save, then leave", in all processes of a run after the same step."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Any

from ril_jax import processes


class StopSignal:
    """Turns SIGTERM (preemption) and SIGINT (Ctrl-C) into a flag that the loop reads at the end of each step.

        with StopSignal() as stop:
            for step in ...:
                ...
                if stop.should_stop():
                    checkpointer.save(step, arrays, host, force=True)
                    checkpointer.close()
                    raise SystemExit(stop.exit_status)

    A second Ctrl-C leaves at once with status 130, without saving; what is on disk stays good.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    @property
    def exit_status(self) -> int:
        """128 plus the number of the signal: 143 for SIGTERM, 130 for SIGINT."""
        return 128 + (self.received or signal.SIGTERM)

    def should_stop(self) -> bool:
        """Whether this or any other process was asked to stop; all processes must call it after the same step."""
        return processes.any_of(self.received is not None, "asked to stop")

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        # os.write, not print: a handler may interrupt a print of the main program.
        if number == signal.SIGINT and self.received == signal.SIGINT:
            os.write(sys.stderr.fileno(), b"\nleaving without saving\n")
            os._exit(130)
        self.received = number
        how = b" (Ctrl-C again leaves at once)" if number == signal.SIGINT else b""
        os.write(2, b"\nstopping after this step, saving first" + how + b"\n")
