"""From the engine's news, which come in its thread, to the pieces of an answer, which go out in the event loop."""

import asyncio
import dataclasses
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any

from ril_jax.data.chat import ChatTokenizer, EncodedPrompt
from ril_jax.errors import InputError
from ril_jax.sampling.engine import Engine
from ril_jax.sampling.local import TextStream
from ril_jax.sampling.requests import Job, Request, Scored, ScoreRequest, Tokens
from ril_jax.sampling.server.answers import Entry, Piece
from ril_jax.sampling.server.errors import APIError
from ril_jax.sampling.server.protocol import Options
from ril_jax.sampling.server.token_texts import TokenTexts


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Mailbox:
    """Carries news from the engine's thread into an event loop, all that has gathered in one go."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._items: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._called = False

    def post(self, receive: Callable[[Any], None], news: Any) -> None:
        """Have `receive(news)` called in the loop."""
        self._items.append((receive, news))
        if not self._called:
            self._called = True
            try:
                self._loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:  # the loop is closed: nobody is left to be told
                self._items.clear()

    def _deliver(self) -> None:
        self._called = False
        while self._items:
            receive, news = self._items.popleft()
            receive(news)


@dataclasses.dataclass(eq=False)
class _Draw:
    """One sample of one prompt while it runs."""

    prompt: int
    index: int
    text: TextStream
    count: int = 0  # tokens up to its end
    last_news: float | None = None
    done: bool = False


@dataclasses.dataclass(eq=False)
class Timing:
    """When a request came and its first token was drawn, in monotonic seconds."""

    arrived: float
    first_token: float | None = None


class Work:
    """The samples of one HTTP request, from submission to the last piece.

    `submit` runs in any thread; the rest belongs to the event loop. Whoever makes one calls `cancel` in the end,
    whatever happened: what still runs is stopped, and its pages come back. `param`: the field that holds the prompts.
    """

    def __init__(
        self,
        engine: Engine,
        chat: ChatTokenizer,
        texts: TokenTexts,
        mailbox: Mailbox,
        options: Options,
        prompts: Sequence[EncodedPrompt],
        *,
        param: str,
        echo: bool = False,
        timing: Timing,
        inter_token: Callable[[float], None] = lambda seconds: None,
    ):
        self._engine, self._texts, self._mailbox = engine, texts, mailbox
        self._options, self._prompts, self._param, self._echo = options, prompts, param, echo
        self._timing, self._inter_token = timing, inter_token
        self._scores_wanted = echo and options.logprobs is not None
        self._draws_wanted = options.max_tokens != 0
        self._draws = [
            _Draw(i, j, TextStream(chat, options.stop)) for i in range(len(prompts)) for j in range(options.draws)
        ]
        self._news: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        self._lock = threading.Lock()
        self._jobs: set[Job] = set()  # that may still run
        self._score_jobs: dict[int, Job] = {}
        self._draw_jobs: dict[int, Job] = {}
        self._cancelled = False

    @property
    def choices(self) -> int:
        """How many choices the answer has."""
        return len(self._prompts) * self._options.n

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts, each once."""
        return sum(len(prompt.token_ids) for prompt in self._prompts)

    @property
    def completion_tokens(self) -> int:
        """Tokens of all choices so far, each up to its end."""
        copies = self._options.n // self._options.draws
        return copies * sum(draw.count for draw in self._draws)

    def submit(self) -> None:
        """Hand everything to the engine. Raises APIError where it cannot be run."""
        try:
            for i, prompt in enumerate(self._prompts):
                if self._scores_wanted:
                    self._score_jobs[i] = self._add(i, ScoreRequest(prompt, top_logprobs=self._options.logprobs or 0))
                if self._draws_wanted:
                    self._draw_jobs[i] = self._add(i, self._request(prompt))
        except InputError as error:
            raise APIError(400, str(error), param=self._param) from None
        except RuntimeError as error:
            raise APIError(500, str(error)) from None

    def interrupt(self, error: Exception) -> None:
        """Have `pieces` raise this instead of waiting on."""
        self._news.put_nowait((-1, error))

    def cancel(self) -> None:
        """Stop all that still runs."""
        with self._lock:
            self._cancelled = True
            jobs, self._jobs = self._jobs, set()
        for job in jobs:
            self._engine.cancel(job)

    async def pieces(self) -> AsyncIterator[Piece]:
        """All pieces of all choices, the last of each with a finish reason. Raises APIError, or what interrupts."""
        held: dict[int, list[Tokens]] = {i: [] for i in range(len(self._prompts)) if self._scores_wanted}
        if self._echo and not self._scores_wanted:
            for i in range(len(self._prompts)):
                for piece in self._echoed(i, []):
                    yield piece
        while held or (self._draws_wanted and not all(draw.done for draw in self._draws)):
            i, news = await self._news.get()
            if isinstance(news, Exception):
                raise news
            if news.error:
                raise APIError(500, news.error)
            if isinstance(news, Scored):
                self._jobs.discard(self._score_jobs[i])
                for piece in self._echoed(i, self._prompt_entries(i, news)):
                    yield piece
                for tokens in held.pop(i):
                    for piece in self._drawn(tokens, i):
                        yield piece
            elif i in held:  # the prompt's own tokens come first
                held[i].append(news)
            else:
                for piece in self._drawn(news, i):
                    yield piece

    # --- to the engine ---

    def _request(self, prompt: EncodedPrompt) -> Request:
        options = self._options
        room = self._engine.room(len(prompt.token_ids))
        if room < 1:
            length, fits = len(prompt.token_ids), room + len(prompt.token_ids) - 1
            raise APIError(
                400, f"the prompt takes {length} tokens, and {fits} are room for; shorten it, or use smaller images",
                param=self._param, code="context_length_exceeded",
            )  # fmt: skip
        return Request(
            prompt,
            n=options.draws,
            max_tokens=room if options.max_tokens is None else min(options.max_tokens, room),
            sampling=options.sampling,
            seed=options.seed,
            top_logprobs=options.logprobs or 0,
            ignore_eos=options.ignore_eos,
        )

    def _add(self, i: int, request: Request | ScoreRequest) -> Job:
        job = self._engine.submit(request, partial(self._mailbox.post, partial(self._receive, i)))
        with self._lock:
            if self._cancelled:  # the client left while this was being submitted
                self._engine.cancel(job)
            else:
                self._jobs.add(job)
        return job

    def _receive(self, i: int, news: Any) -> None:
        self._news.put_nowait((i, news))

    # --- from the engine ---

    def _drawn(self, news: Tokens, i: int) -> list[Piece]:
        """The pieces that news of one sample make: one, or one for each of `n` equal choices."""
        draw = self._draws[i * self._options.draws + news.sample]
        if draw.done:  # it was ended by a stop string, and what the engine had drawn meanwhile is dropped
            return []
        self._time(draw, len(news.token_ids))
        text = draw.text.push(news.token_ids, last=news.finish_reason is not None)
        before, draw.count = draw.count, len(draw.text.token_ids)
        entries = self._entries(news, draw.count - before)
        finish = "stop" if draw.text.stopped else news.finish_reason
        if draw.text.stopped and news.finish_reason is None:
            self._engine.cancel(self._draw_jobs[i], news.sample)
        if finish is not None:
            draw.done = True
            if all(d.done for d in self._draws if d.prompt == i):
                self._jobs.discard(self._draw_jobs[i])
        if not (text or entries or finish):
            return []
        return [Piece(choice, text, entries, finish) for choice in self._choices_of(draw)]

    def _choices_of(self, draw: _Draw) -> range:
        first = draw.prompt * self._options.n
        if self._options.draws == 1:
            return range(first, first + self._options.n)
        return range(first + draw.index, first + draw.index + 1)

    def _entries(self, news: Tokens, count: int) -> list[Entry]:
        if self._options.logprobs is None:
            return []
        top = [list(zip(ids.tolist(), logprobs.tolist(), strict=True)) for ids, logprobs in news.top or ()]
        return [
            Entry(news.token_ids[t], news.logprobs[t], top[t] if top else ())
            for t in range(min(count, len(news.token_ids)))
        ]

    def _prompt_entries(self, i: int, scored: Scored) -> list[Entry]:
        ids = self._prompts[i].token_ids.tolist()
        entries = [Entry(ids[0], None)]
        for t, token in enumerate(ids[1:]):
            top = tuple(zip(*(a.tolist() for a in scored.top[t]), strict=True)) if scored.top else ()
            entries.append(Entry(token, scored.logprobs[t], top))
        return entries

    def _echoed(self, i: int, entries: list[Entry]) -> list[Piece]:
        """The prompt itself; it is all there is where nothing is to be drawn."""
        text = self._texts.join(self._prompts[i].token_ids.tolist())
        finish = None if self._draws_wanted else "length"
        n = self._options.n
        return [Piece(choice, text, entries, finish, echoed=True) for choice in range(i * n, (i + 1) * n)]

    def _time(self, draw: _Draw, count: int) -> None:
        now = time.monotonic()
        if self._timing.first_token is None:
            self._timing.first_token = now
        if draw.last_news is not None and count:
            self._inter_token((now - draw.last_news) / count)
        draw.last_news = now
