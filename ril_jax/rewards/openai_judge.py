"""The judge behind an OpenAI-compatible endpoint: vLLM, our own server, a hosted model."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ril_jax.errors import InputError
from ril_jax.rewards.coroutines import run_coroutine
from ril_jax.rewards.model_judge import JudgeInterrupted, ModelJudge
from ril_jax.rewards.verdict import JudgeItem, Verdict, judge_messages, parse_verdict
from ril_jax.sampling.endpoint import Endpoint, EndpointConfig, Refusal, check_positive


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
        self.connection.check("judge")
        if not self.model:
            raise InputError(f"judge.model is empty: name the model that {self.base_url} serves.")
        for name in ("max_tokens", "cache_size"):
            check_positive("judge", name, getattr(self, name))

    @property
    def endpoint(self) -> str:
        return self.connection.chat_url

    @property
    def connection(self) -> EndpointConfig:
        return EndpointConfig(
            self.base_url, self.api_key_env, self.concurrency, self.connect_timeout, self.read_timeout,
            self.first_wait, self.max_wait,
        )  # fmt: skip


class OpenAIJudge(ModelJudge):
    """Asks the model behind an OpenAI-compatible /v1/chat/completions for verdicts, greedily and concurrently.

    An endpoint that cannot be reached, is busy (429) or fails (408, 5xx, time-outs) is asked again for as long as it
    takes, with waits that double up to `max_wait` and honour Retry-After; each wait is announced through `notify`, and
    no score is ever made up meanwhile. Any other refusal raises InputError.
    """

    def __init__(
        self,
        config: OpenAIJudgeConfig,
        notify: Callable[[str], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ):
        identity = (config.model, config.max_tokens, sorted(dict(config.extra_body).items()))
        super().__init__(identity, cache_path=config.cache_path, cache_size=config.cache_size, notify=notify, stop=stop)
        self._config = config

    def _ask_all(self, items: dict[str, JudgeItem], answered: Callable[[str, Verdict], None]) -> None:
        run_coroutine(self._converse(items, answered))

    async def _converse(self, items: dict[str, JudgeItem], answered: Callable[[str, Verdict], None]) -> None:
        endpoint = Endpoint(self._config.connection, name="judge", notify=self._notify, counts=self._counts)

        async def ask(key: str, item: JudgeItem) -> None:
            answered(key, await self._ask(endpoint, item))

        async with endpoint:
            tasks = [asyncio.create_task(ask(key, item)) for key, item in items.items()]
            try:
                together = asyncio.gather(*tasks)
                while not (await asyncio.wait([together], timeout=0.5 if self._stop else None))[0]:
                    if self._stop and self._stop():
                        raise JudgeInterrupted(f"stopped while waiting for the {endpoint}.")
                together.result()
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, endpoint: Endpoint, item: JudgeItem) -> Verdict:
        body = {
            **self._config.extra_body,
            "model": self._config.model,
            "messages": judge_messages(item),
            "temperature": 0.0,
            "max_tokens": self._config.max_tokens,
        }
        try:
            answer = await endpoint.chat(body)
        except Refusal as refusal:
            raise InputError(
                f"{endpoint} refuses question {item.id!r} with {refusal.status}: {refusal.words}"
            ) from refusal
        try:
            text = answer["choices"][0]["message"]["content"]
        except (LookupError, TypeError) as error:
            raise endpoint.not_openai(str(answer)) from error
        if not isinstance(text, str):
            return Verdict(0.0, "", "the verdict has no text")
        return parse_verdict(text)
