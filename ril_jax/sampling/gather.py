"""Whole results from an engine's news: of one request as they come, or of many in a loop that steps the engine."""

import contextlib
import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from ril_jax.data.chat import ChatTokenizer
from ril_jax.errors import InputError
from ril_jax.sampling.engine import Engine
from ril_jax.sampling.requests import FinishReason, Request, Scored, ScoreRequest, Tokens


@dataclasses.dataclass(frozen=True)
class Result:
    """One finished sample: text without special tokens; token_ids and logprobs up to its end, which is included."""

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason


class Gather:
    """What to give `Engine.submit` as `notify`: calls `done(results, error)` once, when all samples have ended.

    `results`: a `Result` each, or the `Scored` of a ScoreRequest. error: why the engine has failed, or "".
    """

    def __init__(self, chat: ChatTokenizer, request: Request | ScoreRequest, done: Callable[[Any, str], None]):
        self._chat, self._done = chat, done
        self._parts: list[list[Tokens]] = [[] for _ in range(getattr(request, "n", 0))]
        self._left = len(self._parts)

    def __call__(self, news: Tokens | Scored) -> None:
        if isinstance(news, Scored):
            self._done(news, news.error)
            return
        self._parts[news.sample].append(news)
        if news.finish_reason is None:
            return
        self._left -= 1
        if not self._left:
            error = next((part[-1].error for part in self._parts if part[-1].finish_reason == "error"), "")
            self._done([self._result(part) for part in self._parts], error)

    def _result(self, parts: list[Tokens]) -> Result:
        ids = [token for part in parts for token in part.token_ids]
        logprobs = [value for part in parts for value in part.logprobs]
        reason = parts[-1].finish_reason
        assert reason is not None
        return Result(self._chat.decode(np.asarray(ids, np.int32)), ids, logprobs, reason)


def run_each(
    engine: Engine,
    chat: ChatTokenizer,
    requests: Iterable[tuple[Any, Request | ScoreRequest]],
    *,
    in_flight: int,
    before_step: Callable[[], None] = lambda: None,
    launching: Callable[[], AbstractContextManager] = contextlib.nullcontext,
    refused: Callable[[Any, InputError], None] | None = None,
) -> Generator[tuple[Any, Any], None, None]:
    """(key, results) of each (key, request), in the order in which they end; `results` as of `Gather`.

    The engine has no thread of its own: it is stepped here, under `launching`, so that what it does depends on the
    requests alone, which processes of one program must agree in. About `in_flight` requests are with it at a time;
    closing the iterator, or an exception of `before_step`, cancels those. `refused` gets what the engine will never
    run; without it, that is raised.
    """
    ended: deque[tuple[Any, Any]] = deque()
    running: dict[int, Any] = {}
    source = enumerate(requests)
    more, broken = True, False

    def done(number: int, key: Any, results: Any, error: str) -> None:
        running.pop(number, None)
        if error:
            raise RuntimeError(error)
        ended.append((key, results))

    try:
        while more or running:
            while more and len(running) < in_flight:
                entry = next(source, None)
                if entry is None:
                    more = False
                    break
                number, (key, request) = entry
                try:
                    job = engine.submit(request, Gather(chat, request, functools.partial(done, number, key)))
                except InputError as error:
                    if refused is None:
                        raise
                    refused(key, error)
                    continue
                running[number] = job
            if running:
                before_step()
                broken = True
                with launching():
                    engine.step()
                broken = False
            while ended:
                yield ended.popleft()
    finally:
        if running and not broken:
            for job in list(running.values()):
                engine.cancel(job)
            with launching():
                engine.run_until_idle()
