"""Judges: whoever says whether a response's answer is right, by rule or through an OpenAI-compatible endpoint."""

import asyncio
import difflib
import email.utils
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import httpx

from ril_jax.errors import InputError
from ril_jax.rewards.coroutines import run_coroutine
from ril_jax.rewards.rules import AnswerRules, is_degenerate, score_answer
from ril_jax.rewards.verdict import PROMPT_VERSION, JudgeItem, Verdict, judge_messages, parse_verdict
from ril_jax.rewards.verdict_cache import VerdictCache

__all__ = [
    "Judge",
    "JudgeInterrupted",
    "JudgeItem",
    "OpenAIJudge",
    "OpenAIJudgeConfig",
    "RulesJudge",
    "Verdict",
    "make_judge",
]

DEGENERATE = Verdict(0.0, "empty or degenerate response")


class Judge(Protocol):
    """Gives one verdict an item, in order; `pop_metrics` gives what happened since it was last called."""

    def __call__(self, questions: Sequence[JudgeItem]) -> list[Verdict]: ...

    def pop_metrics(self) -> dict[str, float]: ...


class JudgeInterrupted(RuntimeError):
    """The run was asked to stop while it waited for the judge; verdicts that had arrived are in the cache."""


def make_judge(
    config: Mapping[str, Any],
    *,
    notify: Callable[[str], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Judge | None:
    """The judge of a config: {"kind": "rules" | "openai" | "none"} and the fields of AnswerRules and OpenAIJudgeConfig.

    Fields of the other kind may stand there unused; "none" gives None. `notify` and `stop` as in OpenAIJudge. Raises
    InputError for an unknown kind or field and for bad values.
    """
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    kind = values.pop("kind", None)
    kinds = ("rules", "openai", "none")
    if kind not in kinds:
        raise InputError(f"judge.kind is {kind!r}: use one of {', '.join(kinds)}.")
    rule_names = {f.name for f in fields(AnswerRules)}
    openai_names = {f.name for f in fields(OpenAIJudgeConfig)}
    for name in values:
        if name not in rule_names | openai_names:
            near = difflib.get_close_matches(name, rule_names | openai_names, n=1)
            raise InputError(f"judge.{name} is no field of the judge" + (f": did you mean {near[0]}?" if near else "."))
    if kind == "rules":
        rules = {name: value for name, value in values.items() if name in rule_names}
        if "patterns" in rules:
            rules["patterns"] = tuple(rules["patterns"])
        return RulesJudge(AnswerRules(**rules))
    if kind == "openai":
        return OpenAIJudge(OpenAIJudgeConfig(**{n: v for n, v in values.items() if n in openai_names}), notify, stop)
    return None


class RulesJudge:
    """Compares final answers with solutions by `rules.score_answer`; needs no model and no network."""

    def __init__(self, rules: AnswerRules | None = None):
        self._rules = rules or AnswerRules()

    def __call__(self, questions: Sequence[JudgeItem]) -> list[Verdict]:
        """One verdict an item; raises InputError, naming the question, for an empty solution."""
        return [self._judge(item) for item in questions]

    def pop_metrics(self) -> dict[str, float]:
        return {"judge/error_rate": 0.0}

    def _judge(self, item: JudgeItem) -> Verdict:
        try:
            score = score_answer(item.response, item.solution, self._rules)
        except InputError as error:
            raise InputError(f"question {item.id!r}: {error}") from error
        if score == 0 and is_degenerate(item.response):
            return DEGENERATE
        return Verdict(
            score, "the final answer equals the solution" if score else "the final answer is not the solution"
        )


@dataclass(frozen=True)
class OpenAIJudgeConfig:
    """Where and how an `OpenAIJudge` asks; times in seconds. Raises InputError for bad values."""

    base_url: str = ""  # "http://host:8000/v1"; the /v1 may be left out
    model: str = ""
    api_key_env: str = ""  # name of the environment variable that holds the key; none if empty
    max_tokens: int = 256
    concurrency: int = 32
    connect_timeout: float = 10.0
    read_timeout: float = 120.0
    first_wait: float = 1.0  # after a failed request; doubles from then on
    max_wait: float = 120.0  # where the doubling ends
    cache_path: str = ""  # JSONL file that keeps verdicts between runs; memory only if empty
    cache_size: int = 100_000  # verdicts held in memory
    extra_body: Mapping[str, Any] = field(default_factory=dict)  # further fields of the request

    def __post_init__(self):
        if not self.base_url.startswith(("http://", "https://")):
            raise InputError(f"judge.base_url is {self.base_url!r}: give an address like http://host:8000/v1.")
        if not self.model:
            raise InputError(f"judge.model is empty: name the model that {self.base_url} serves.")
        for name in (
            "max_tokens",
            "concurrency",
            "connect_timeout",
            "read_timeout",
            "first_wait",
            "max_wait",
            "cache_size",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise InputError(f"judge.{name} is {value!r}: give a number above 0.")
        if self.api_key_env and not os.environ.get(self.api_key_env):
            raise InputError(f"judge.api_key_env names {self.api_key_env}, which is not set: export it.")

    @property
    def endpoint(self) -> str:
        base = self.base_url.rstrip("/")
        if base.endswith("/chat/completions"):
            return base
        return f"{base}/chat/completions" if base.endswith("/v1") else f"{base}/v1/chat/completions"


class OpenAIJudge:
    """Asks the model behind an OpenAI-compatible /v1/chat/completions for verdicts, greedily and concurrently.

    An endpoint that cannot be reached, is busy (429) or fails (408, 5xx, time-outs) is asked again for as long as it
    takes, with waits that double up to `max_wait` and honour Retry-After; each wait is announced through `notify`, and
    no score is ever made up meanwhile. Any other refusal raises InputError. Items asked before come from the cache.
    While it waits, `stop` is called twice a second, and once it is true, JudgeInterrupted is raised: that is how a run
    that got SIGTERM can still save itself.
    """

    def __init__(
        self,
        config: OpenAIJudgeConfig,
        notify: Callable[[str], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ):
        self._config = config
        self._stop = stop
        self._notify = notify or (lambda line: print(line, file=sys.stderr, flush=True))
        self._cache = VerdictCache(config.cache_path, config.cache_size, self._notify)
        self._counts: Counter[str] = Counter()

    def __call__(self, questions: Sequence[JudgeItem]) -> list[Verdict]:
        """One verdict an item, in order; empty and degenerate responses score 0 without being asked about."""
        verdicts: dict[int, Verdict] = {}
        asked: dict[str, list[int]] = {}  # equal items are asked about once
        for i, item in enumerate(questions):
            if not item.solution.strip():
                raise InputError(f"question {item.id!r}: solution is empty: give every question one.")
            key = self._key(item)
            if is_degenerate(item.response):
                verdicts[i] = DEGENERATE
            elif cached := self._cache.get(key):
                verdicts[i] = cached
                self._counts["cache_hits"] += 1
            else:
                asked.setdefault(key, []).append(i)
        if asked:
            answers = run_coroutine(self._ask_all({key: questions[where[0]] for key, where in asked.items()}))
            verdicts.update((i, answers[key]) for key, where in asked.items() for i in where)
        result = [verdicts[i] for i in range(len(questions))]
        self._counts["judged"] += len(result)
        self._counts["errors"] += sum(verdict.error is not None for verdict in result)
        return result

    def pop_metrics(self) -> dict[str, float]:
        """Since the last call: share of verdicts that could not be read, requests, failed requests, cache hits."""
        counts, self._counts = self._counts, Counter()
        return {
            "judge/error_rate": counts["errors"] / max(counts["judged"], 1),
            "judge/requests": float(counts["requests"]),
            "judge/retries": float(counts["retries"]),
            "judge/cache_hits": float(counts["cache_hits"]),
        }

    def _key(self, item: JudgeItem) -> str:
        extra = sorted(dict(self._config.extra_body).items())
        parts = (item.question, item.solution, item.response, self._config.model, self._config.max_tokens, extra)
        return VerdictCache.key(*parts, PROMPT_VERSION)

    async def _ask_all(self, items: dict[str, JudgeItem]) -> dict[str, Verdict]:
        config = self._config
        key = os.environ.get(config.api_key_env, "") if config.api_key_env else ""
        async with httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(config.read_timeout, connect=config.connect_timeout, pool=None),
            limits=httpx.Limits(max_connections=config.concurrency, max_keepalive_connections=config.concurrency),
            # A proxy meant for the outside world must not swallow a judge on this machine.
            trust_env=httpx.URL(config.endpoint).host not in ("localhost", "127.0.0.1", "::1"),
        ) as client:
            conversation = _Conversation(client, config, self._notify, self._counts)

            async def ask(key: str, item: JudgeItem) -> Verdict:
                verdict = await conversation.ask(item)
                if verdict.error is None:
                    self._cache.put(key, verdict)  # at once: a run killed while it waits loses nothing
                return verdict

            tasks = [asyncio.create_task(ask(key, item)) for key, item in items.items()]
            try:
                together = asyncio.gather(*tasks)
                while not (await asyncio.wait([together], timeout=0.5 if self._stop else None))[0]:
                    if self._stop and self._stop():
                        raise JudgeInterrupted(f"stopped while waiting for the judge {config.endpoint}.")
                return dict(zip(items, together.result(), strict=True))
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)


class _Conversation:
    """The requests of one call of the judge, and the pause that they share when the endpoint fails."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        config: OpenAIJudgeConfig,
        notify: Callable[[str], None],
        counts: Counter[str],
    ):
        self._client, self._config, self._notify, self._counts = client, config, notify, counts
        self._slots = asyncio.Semaphore(int(config.concurrency))
        self._failures_in_a_row = 0
        self._resume_at = 0.0
        self._failing_since: float | None = None
        # Its own generator: the wait of a retry must not shift any seeded stream of the run.
        self._jitter = random.Random()

    async def ask(self, item: JudgeItem) -> Verdict:
        body = {
            **self._config.extra_body,
            "model": self._config.model,
            "messages": judge_messages(item),
            "temperature": 0.0,
            "max_tokens": self._config.max_tokens,
        }
        while True:
            async with self._slots:
                await self._pause()
                sent_at = time.monotonic()
                self._counts["requests"] += 1
                try:
                    response = await self._client.post(self._config.endpoint, json=body)
                except (httpx.UnsupportedProtocol, httpx.InvalidURL, httpx.LocalProtocolError) as error:
                    raise InputError(f"judge {self._config.endpoint} cannot be asked: {error}.") from error
                except httpx.RequestError as error:
                    self._failed(sent_at, f"cannot be reached ({type(error).__name__}: {error or 'no answer'})")
                    continue
                if response.status_code in (408, 429) or response.status_code >= 500:
                    self._failed(
                        sent_at, f"answers {response.status_code}: {_shorten(response.text)}", _retry_after(response)
                    )
                    continue
            self._failures_in_a_row, self._failing_since = 0, None
            return self._read(response, item)

    def _read(self, response: httpx.Response, item: JudgeItem) -> Verdict:
        endpoint = self._config.endpoint
        if response.status_code != 200:
            raise InputError(
                f"judge {endpoint} refuses question {item.id!r} with {response.status_code}: {_shorten(response.text)}"
            )
        try:
            text = response.json()["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            raise InputError(
                f"judge {endpoint} does not answer as OpenAI's API does: {_shorten(response.text)}"
            ) from error
        if not isinstance(text, str):
            return Verdict(0.0, "", "the verdict has no text")
        return parse_verdict(text)

    def _failed(self, sent_at: float, reason: str, retry_after: float = 0.0) -> None:
        """Begins the next, longer pause, or joins the one that another request of the same time began."""
        self._counts["retries"] += 1
        now = time.monotonic()
        if sent_at < self._resume_at:
            self._resume_at = max(self._resume_at, now + retry_after)
            return
        if self._failing_since is None:
            self._failing_since = now
        grown = min(self._config.max_wait, self._config.first_wait * 2.0 ** min(self._failures_in_a_row, 30))
        wait = max(grown * self._jitter.uniform(0.5, 1.0), retry_after)
        self._failures_in_a_row += 1
        self._resume_at = now + wait
        self._notify(
            f"judge {self._config.endpoint} {reason}; the run pauses and asks again in {wait:.1f} s "
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
