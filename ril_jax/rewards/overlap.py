"""Judging beside other work: verdicts are asked for as soon as there are texts, and waited for when they are needed."""

import threading
from collections.abc import Sequence

from ril_jax.rewards.judge import Judge, JudgeItem, Verdict


class Verdicts:
    """The verdicts of one batch, for which a thread asks the judge.

    A context manager. Whoever leaves it by an exception does not wait for what is not judged yet: `abandon` is set,
    which the judge's `stop` has to tell it of. A judge that is not worth a thread is asked in `get`. What comes out is
    what the judge gives for the same items at once; what it raises comes out of `get`.
    """

    def __init__(self, judge: Judge, abandon: threading.Event):
        self._judge, self._abandon = judge, abandon
        self._known: dict[JudgeItem, Verdict] = {}
        self._begun: set[JudgeItem] = set()  # all that were ever asked for
        self._asked: list[JudgeItem] = []  # not handed to the judge yet
        self._busy = self._closed = False
        self._error: BaseException | None = None
        self._change = threading.Condition()
        self._thread: threading.Thread | None = None

    def ask(self, items: Sequence[JudgeItem]) -> None:
        """Begin to judge these, but for those that were asked for before; returns at once."""
        items = [item for item in items if item not in self._begun]
        if not self._judge.overlaps or not items:
            return
        self._begun.update(items)
        with self._change:
            self._asked += items
            self._change.notify_all()
        if self._thread is None:
            # A daemon: a judge that is away must not keep a process that has failed.
            self._thread = threading.Thread(target=self._run, name="judge", daemon=True)
            self._thread.start()

    def get(self, items: Sequence[JudgeItem]) -> list[Verdict]:
        """One verdict an item, in order; waits for those that were asked for, and asks for the others."""
        if not self._judge.overlaps:
            return self._judge(items)
        self._wait()
        if unknown := [item for item in items if item not in self._known]:
            self.ask(unknown)
            self._wait()
        return [self._known[item] for item in items]

    def __enter__(self) -> "Verdicts":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._change:
            self._closed = True
            self._change.notify_all()
        if self._thread is None:
            return
        if kind is not None:
            self._abandon.set()
            self._thread.join(timeout=10.0)
        else:
            self._thread.join()
        if not self._thread.is_alive():
            self._abandon.clear()

    def _wait(self) -> None:
        with self._change:
            while (self._asked or self._busy) and self._error is None:
                self._change.wait()
            if self._error is not None:
                raise self._error

    def _run(self) -> None:
        while True:
            with self._change:
                while not self._asked:
                    if self._closed:
                        return
                    self._change.wait()
                if self._closed and self._abandon.is_set():
                    return
                items, self._asked, self._busy = self._asked, [], True
            try:
                verdicts = self._judge(items)
            except BaseException as error:
                with self._change:
                    self._error, self._busy = error, False
                    self._change.notify_all()
                return
            with self._change:
                self._known.update(zip(items, verdicts, strict=True))
                self._busy = False
                self._change.notify_all()
