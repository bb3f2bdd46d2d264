"""Questions go to whoever answers (ril_jax.generation's sources), many at a time, and every answer is kept at once."""

from __future__ import annotations

import functools
import queue
from collections.abc import Callable, Iterable

from ril_jax.data.records import Question
from ril_jax.data.threads import map_in_threads
from ril_jax.errors import InputError
from ril_jax.generation.outcomes import Outcome, ResponseSource
from ril_jax.progress import Progress

_HOPELESS = 8  # questions that fail before any is answered: then something is wrong with more than them


def ask_all(
    source: ResponseSource,
    questions: Iterable[Question],
    keep: Callable[[str, Outcome], None],
    *,
    concurrency: int,
    threads: int,
    progress: Progress,
) -> None:
    """Ask every question, and call keep(question.id, outcome) for each, in the order in which they end.

    concurrency: questions with the source at a time. threads: that prepare them. Raises InputError where none of the
    first can be answered, and whatever the source ends with.
    """
    news: queue.SimpleQueue[tuple[str, Outcome | BaseException]] = queue.SimpleQueue()
    failed: list[tuple[str, Outcome]] = []  # before the first answer
    running, answered = 0, False

    def prepare(question: Question) -> object:
        try:
            return source.prepare(question)
        except InputError as error:
            return Outcome(failed=str(error))

    def settle(key: str, outcome: Outcome) -> None:
        nonlocal answered
        if outcome.failed and not answered:
            failed.append((key, outcome))
            if len(failed) >= _HOPELESS:
                raise _hopeless(failed)
            return
        answered = True
        for entry in [*failed, (key, outcome)]:
            keep(*entry)
            if entry[1].failed:
                progress.message(f"failed {entry[0]}: {entry[1].failed}")
            progress.advance()
        failed.clear()

    def hear() -> None:
        nonlocal running
        key, outcome = news.get()
        if isinstance(outcome, BaseException):
            raise outcome
        running -= 1
        settle(key, outcome)

    for question, prepared in map_in_threads(prepare, questions, num_threads=threads):
        if isinstance(prepared, Outcome):
            settle(question.id, prepared)
            continue
        while running >= concurrency:
            hear()
        running += 1
        source.start(prepared, functools.partial(_tell, news, question.id))
        while not news.empty():
            hear()
    while running:
        hear()
    if failed:
        raise _hopeless(failed)


def _tell(news: queue.SimpleQueue, key: str, outcome: Outcome | BaseException) -> None:
    news.put((key, outcome))


def _hopeless(failed: list[tuple[str, Outcome]]) -> InputError:
    key, outcome = failed[0]
    return InputError(
        f"no question is answered, of {len(failed)} that were asked; the first, {key!r}: {outcome.failed}"
    )
