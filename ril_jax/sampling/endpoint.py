"""The client of a chat endpoint that speaks OpenAI's protocol: vLLM, our own server, a hosted one.

What is busy, slow or away is asked again for as long as it takes; no answer is ever made up meanwhile.
"""

import asyncio
import email.utils
import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from ril_jax.errors import InputError


@dataclass(frozen=True)
class EndpointConfig:
    """Where and how an `Endpoint` asks; times in seconds.

    base_url: "http://host:8000/v1", the /v1 may be left out. api_key_env: the environment variable that holds the key,
    "" for none. concurrency: requests at the same time. first_wait: after a failed request; doubles up to max_wait.
    """

    base_url: str
    api_key_env: str = ""
    concurrency: int = 64
    connect_timeout: float = 10.0
    read_timeout: float = 120.0
    first_wait: float = 1.0
    max_wait: float = 120.0

    def check(self, section: str) -> None:
        """Raises InputError for bad values, which it calls `section`.name."""
        if not self.base_url.startswith(("http://", "https://")):
            raise InputError(f"{section}.base_url is {self.base_url!r}: give an address like http://host:8000/v1.")
        for name in ("concurrency", "connect_timeout", "read_timeout", "first_wait", "max_wait"):
            check_positive(section, name, getattr(self, name))
        if self.api_key_env and not os.environ.get(self.api_key_env):
            raise InputError(f"{section}.api_key_env names {self.api_key_env}, which is not set: export it.")

    @property
    def chat_url(self) -> str:
        return f"{self._root}/chat/completions"

    @property
    def models_url(self) -> str:
        return f"{self._root}/models"

    @property
    def _root(self) -> str:
        base = self.base_url.rstrip("/").removesuffix("/chat/completions").rstrip("/")
        return base if base.endswith("/v1") else f"{base}/v1"


def check_positive(section: str, name: str, value: Any) -> None:
    """Raises InputError unless `value` is a number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise InputError(f"{section}.{name} is {value!r}: give a number above 0.")


class Refusal(Exception):
    """An answer that asking again does not change: `status`, and `words`, the beginning of its body as JSON text."""

    def __init__(self, status: int, words: str):
        super().__init__(f"{status}: {words}")
        self.status, self.words = status, words


class Endpoint:
    """The requests of one event loop, and the pause that they share while the endpoint fails.

    An async context manager. `name` says in messages who it is ("judge"); `notify` is told of every pause; `counts`
    counts "requests" and "retries".
    """

    def __init__(
        self, config: EndpointConfig, *, name: str, notify: Callable[[str], None], counts: Counter[str] | None = None
    ):
        self.config, self.name, self.counts = config, name, Counter() if counts is None else counts
        self._notify = notify
        self._slots = asyncio.Semaphore(int(config.concurrency))
        self._answers = 0
        self._failures_in_a_row = 0
        self._resume_at = 0.0
        self._failing_since: float | None = None
        # Its own generator: the wait of a retry must not shift any seeded stream of the run.
        self._jitter = random.Random()

    def __str__(self) -> str:
        return f"{self.name} {self.config.chat_url}"

    async def __aenter__(self) -> "Endpoint":
        config = self.config
        key = os.environ.get(config.api_key_env, "") if config.api_key_env else ""
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(config.read_timeout, connect=config.connect_timeout, pool=None),
            limits=httpx.Limits(max_connections=config.concurrency, max_keepalive_connections=config.concurrency),
            # A proxy meant for the outside world must not swallow an endpoint on this machine.
            trust_env=httpx.URL(config.chat_url).host not in ("localhost", "127.0.0.1", "::1"),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def chat(self, body: Mapping[str, Any], *, patience: int | None = None) -> dict[str, Any]:
        """The answer to a request for /chat/completions.

        patience: failures of this one request, with others answered in between, after which it counts as refused; None
        for no end. Raises Refusal for a status that asking again does not change, and InputError where the endpoint
        cannot be asked at all or does not answer in JSON.
        """
        return await self._ask("POST", self.config.chat_url, body, patience)

    async def models(self) -> list[str]:
        """The names of the models that are served. Raises as `chat`."""
        answer = await self._ask("GET", self.config.models_url, None, None)
        try:
            return [str(model["id"]) for model in answer["data"]]
        except (LookupError, TypeError) as error:
            raise self.not_openai(json.dumps(answer)) from error

    def not_openai(self, text: str) -> InputError:
        """The error for an answer that is not of OpenAI's form."""
        return InputError(f"{self} does not answer as OpenAI's API does: {_shorten(text)}")

    async def _ask(self, method: str, url: str, body: Mapping[str, Any] | None, patience: int | None) -> dict[str, Any]:
        strikes, answers_before = 0, self._answers
        while True:
            async with self._slots:
                await self._pause()
                sent_at = time.monotonic()
                self.counts["requests"] += 1
                status, wait = 0, 0.0
                try:
                    response = await self._client.request(method, url, json=body)
                    status, text = response.status_code, response.text
                    failing = status in (408, 429) or status >= 500
                    reason, wait = f"answers {status}: {_shorten(text)}", _retry_after(response) if failing else 0.0
                except (httpx.UnsupportedProtocol, httpx.InvalidURL, httpx.LocalProtocolError) as error:
                    raise InputError(f"{self} cannot be asked: {error}.") from error
                except httpx.RequestError as error:
                    failing, text = True, ""
                    reason = f"cannot be reached ({type(error).__name__}: {error or 'no answer'})"
                if failing:
                    self._failed(sent_at, reason, wait)
            if failing:
                strikes += self._answers > answers_before
                answers_before = self._answers
                if patience is not None and strikes >= patience:
                    raise Refusal(status, f"{json.dumps(reason, ensure_ascii=False)}, {strikes} times")
                continue
            self._failures_in_a_row, self._failing_since = 0, None
            self._answers += 1
            return self._read(response)

    def _read(self, response: httpx.Response) -> dict[str, Any]:
        if response.status_code != 200:
            raise Refusal(response.status_code, _shorten(response.text))
        try:
            answer = response.json()
        except ValueError as error:
            raise self.not_openai(response.text) from error
        if not isinstance(answer, dict):
            raise self.not_openai(response.text)
        return answer

    def _failed(self, sent_at: float, reason: str, retry_after: float) -> None:
        """Begins the next, longer pause, or joins the one that another request of the same time began."""
        self.counts["retries"] += 1
        now = time.monotonic()
        if sent_at < self._resume_at:
            self._resume_at = max(self._resume_at, now + retry_after)
            return
        if self._failing_since is None:
            self._failing_since = now
        grown = min(self.config.max_wait, self.config.first_wait * 2.0 ** min(self._failures_in_a_row, 30))
        wait = max(grown * self._jitter.uniform(0.5, 1.0), retry_after)
        self._failures_in_a_row += 1
        self._resume_at = now + wait
        self._notify(
            f"{self} {reason}; the run pauses and asks again in {wait:.1f} s "
            f"(attempt {self._failures_in_a_row}, failing for {now - self._failing_since:.0f} s)."
        )

    async def _pause(self) -> None:
        while (wait := self._resume_at - time.monotonic()) > 0:
            await asyncio.sleep(wait)


def _retry_after(response: httpx.Response) -> float:
    """Seconds that the Retry-After header asks for, given as seconds or as a date; 0 without one."""
    value = response.headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError):
            return 0.0
    # An hour at most: a nonsensical header must not stop a run for good.
    return min(max(seconds, 0.0), 3600.0) if seconds == seconds else 0.0


def _shorten(text: str) -> str:
    return json.dumps(text[:300], ensure_ascii=False)
