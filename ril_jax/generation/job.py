"""The loop of a job: rows are read and checked, questions asked, outcomes kept, and shards published."""

import contextlib
import os
import queue
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from ril_jax.data.records import Question
from ril_jax.data.rows import Refusal, Row, check_row
from ril_jax.data.threads import map_in_threads
from ril_jax.errors import InputError
from ril_jax.generation.folder import Finished, JobFolder
from ril_jax.generation.outcomes import Outcome, ResponseSource, question_digest
from ril_jax.progress import Progress

REPEATED = "duplicate id, it came before; give every row an id of its own"
_HOPELESS = 32  # questions in a row that fail: then something is wrong with the job, not with them
_GRACE = 20.0  # seconds that running questions get after a signal; a machine that is taken away leaves some 30


@dataclass
class _OpenShard:
    """Rows of a shard that is not whole yet; `kept`: outcomes of an earlier start."""

    kept: dict[int, Finished]
    rows: dict[int, tuple[str, Question | None, Outcome | Refusal]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Ready:
    """A row as the threads leave it: a question and what its source made of it, unless it was asked before."""

    question: Question
    digest: str
    prepared: Any = None
    failed: str = ""


def run_job(
    folder: JobFolder,
    read: Callable[[Callable[[int], bool]], Iterator[tuple[int, Row]]],
    source: ResponseSource,
    *,
    concurrency: int,
    threads: int,
    enabled: bool = True,
) -> None:
    """Ask about every row that has no outcome yet, until the folder is whole.

    read(wanted): (number, row) of the job's rows whose number is wanted, in order. concurrency: questions that are with
    the source at a time. threads: that read images and prepare questions. enabled: show progress. Raises InputError
    where no question is answered any more, or where the input has changed.

    At SIGTERM or SIGINT no further question is asked, those that run get `_GRACE` seconds, and SystemExit is raised
    with 128 plus the signal's number; a second signal leaves the process at once. Nothing that was kept is lost.
    """
    loop = _Loop(folder, source, concurrency, enabled)
    with _signals(loop.stop):
        loop.run(read, threads)


class _Loop:
    def __init__(self, folder: JobFolder, source: ResponseSource, concurrency: int, enabled: bool):
        self._folder, self._source, self._concurrency = folder, source, concurrency
        self._ids = {id_ for facts in folder.facts.values() for id_ in facts.ids}
        self._open: dict[int, _OpenShard] = {}
        for shard in range(folder.num_shards):
            if shard not in folder.facts:
                self._open[shard] = _OpenShard(folder.read_journal(shard))
        self._news: queue.SimpleQueue[tuple[int, Outcome | BaseException | None]] = queue.SimpleQueue()
        self._running: dict[int, _Ready] = {}
        self._signal = 0
        self._answered = any(facts.questions for facts in folder.facts.values()) or any(
            not finished.outcome.failed for shard in self._open.values() for finished in shard.kept.values()
        )
        self._held: list[tuple[int, _Ready, Outcome]] = []  # failures since the last answer
        self._began, self._tokens = time.monotonic(), 0
        done = folder.num_rows - sum(len(folder.rows_of(n)) - len(shard.kept) for n, shard in self._open.items())
        self._progress = Progress(f"generate {source.name}", folder.num_rows, start=done, enabled=enabled)

    def run(self, read: Callable[[Callable[[int], bool]], Iterator[tuple[int, Row]]], threads: int) -> None:
        try:
            self._ask(read, threads)
            while self._running and not self._signal:
                self._hear()
            if self._signal:
                self._leave()
            if self._held and not self._answered:
                raise self._hopeless()
            self._record_held()
        except BaseException:
            self._progress.close(summary=False)
            raise
        self._progress.close()

    def stop(self, number: int) -> None:
        """What a signal does; it may interrupt anything, and may come twice."""
        if self._signal:
            os._exit(128 + number)
        self._signal = number
        name, running = signal.Signals(number).name, len(self._running)
        os.write(2, f"\n{name}: {running} questions that run have {_GRACE:g} s; again to leave at once\n".encode())
        self._news.put((-1, None))  # wakes who waits

    def _ask(self, read: Callable[[Callable[[int], bool]], Iterator[tuple[int, Row]]], threads: int) -> None:
        rows = read(lambda number: self._folder.shard_of(number) in self._open)
        for (number, row), ready in map_in_threads(self._prepare, rows, num_threads=threads):
            if self._signal:
                return
            if isinstance(ready, _Ready) and ready.question.id in self._ids:
                ready = Refusal(ready.question.id, row.file, row.number, REPEATED)
            if isinstance(ready, Refusal):
                self._progress.message(f"refused {row.file}:{row.number} (id {ready.id}): {ready.reason}")
                self._settle(number, ready.id, None, ready)
                continue
            self._ids.add(ready.question.id)
            self._take(number, ready)
            while not self._news.empty():
                self._hear()

    def _leave(self) -> None:
        end = time.monotonic() + _GRACE
        with contextlib.suppress(queue.Empty):
            while self._running:  # what has come by the end is kept, however long that takes
                self._hear(timeout=max(end - time.monotonic(), 0.0))
        rows, left_over = self._folder.num_rows, 0
        for shard, opened in self._open.items():
            left_over += len(self._folder.rows_of(shard)) - len(opened.rows.keys() | opened.kept.keys())
        self._progress.message(f"stopped with {rows - left_over} of {rows} rows done; start again to go on")
        raise SystemExit(128 + self._signal)

    def _prepare(self, item: tuple[int, Row]) -> _Ready | Refusal:
        number, row = item
        question = check_row(row)
        if isinstance(question, Refusal):
            return question
        digest = question_digest(question)
        if number in self._open[self._folder.shard_of(number)].kept:
            return _Ready(question, digest)
        try:
            return _Ready(question, digest, self._source.prepare(question))
        except InputError as error:
            return _Ready(question, digest, failed=str(error))

    def _take(self, number: int, ready: _Ready) -> None:
        kept = self._open[self._folder.shard_of(number)].kept.get(number)
        if kept is not None:
            if (kept.id, kept.digest) != (ready.question.id, ready.digest):
                raise InputError(
                    f"{self._folder.folder}: question {kept.id!r} has changed since it was asked; bring the input back "
                    "as it was, or name another --output"
                )
            self._settle(number, kept.id, ready.question, kept.outcome, fresh=False)
        elif ready.failed:
            self._keep(number, ready, Outcome(failed=ready.failed))
        else:
            while self._running and (len(self._running) >= self._concurrency or len(self._held) >= _HOPELESS):
                if self._signal:
                    return
                self._hear()
            if len(self._held) >= _HOPELESS:
                raise self._hopeless()
            self._running[number] = ready
            self._source.start(ready.prepared, lambda outcome: self._news.put((number, outcome)))

    def _hear(self, timeout: float | None = None) -> None:
        """Wait for the next outcome, and keep it; or for a signal, or `timeout` seconds (queue.Empty)."""
        number, outcome = self._news.get(timeout=timeout)
        if outcome is None:
            return
        if isinstance(outcome, BaseException):
            raise outcome
        self._keep(number, self._running.pop(number), outcome)

    def _keep(self, number: int, ready: _Ready, outcome: Outcome) -> None:
        """Record an answer at once, and a failure when an answer after it shows that it was the question's own."""
        if outcome.failed and (self._source.remote or not self._answered):
            self._held.append((number, ready, outcome))
            return
        self._answered |= not outcome.failed
        self._record_held()
        self._record(number, ready, outcome)

    def _record_held(self) -> None:
        held, self._held = self._held, []
        for entry in held:
            self._record(*entry)

    def _record(self, number: int, ready: _Ready, outcome: Outcome) -> None:
        question = ready.question
        self._folder.record(number, Finished(question.id, ready.digest, outcome))
        self._tokens += sum(response.token_count for response in outcome.responses)
        if outcome.failed:
            self._progress.message(f"failed {question.id}: {outcome.failed}")
        self._settle(number, question.id, question, outcome)

    def _settle(
        self, number: int, id_: str, question: Question | None, outcome: Outcome | Refusal, *, fresh: bool = True
    ) -> None:
        """A row has its outcome; the last one of its shard publishes that."""
        shard = self._folder.shard_of(number)
        rows = self._open[shard].rows
        if question is not None and isinstance(outcome, Outcome) and not outcome.failed:
            rows[number] = (id_, replace(question, responses=outcome.responses), outcome)
        else:
            rows[number] = (id_, None, outcome)
        if len(rows) == len(self._folder.rows_of(shard)):
            self._folder.publish(shard, [rows[n] for n in sorted(rows)])
            del self._open[shard]
        if fresh:
            rate = self._tokens / max(time.monotonic() - self._began, 1e-9)
            self._progress.advance(1, {"tokens/s": f"{rate:,.0f}"})

    def _hopeless(self) -> InputError:
        _, ready, outcome = self._held[0]
        return InputError(
            f"no question is answered, of the last {len(self._held)} that were asked; the first, "
            f"{ready.question.id!r}: {outcome.failed}"
        )


@contextlib.contextmanager
def _signals(handle: Callable[[int], None]) -> Iterator[None]:
    """SIGTERM and SIGINT go to `handle`, where this is the main thread."""
    before = {}
    with contextlib.suppress(ValueError):  # another thread gets no signals
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, lambda number, _: handle(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
