"""Responses from an endpoint that speaks OpenAI's protocol."""

import asyncio
import base64
import io
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict
from PIL import Image

from ril_jax.data.chat import ChatTokenizer, chat_messages
from ril_jax.data.images import decode_image
from ril_jax.data.records import Question, Response, question_prompt
from ril_jax.errors import InputError
from ril_jax.generation.outcomes import Outcome, Tell, sample_seed
from ril_jax.models import hub
from ril_jax.sampling.endpoint import Endpoint, EndpointConfig, Refusal, check_positive

_KINDS = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}  # what every endpoint reads
_ORIENTATION = 0x0112
_HOPELESS = (401, 404, 405)  # no question would be answered otherwise


class EndpointSource:
    """N requests a question, each with a seed of its own; all of them wait in one event loop, which has a thread.

    Of a request that fails again and again while others are answered, the question counts as failed; an endpoint that
    answers nothing is waited for.
    """

    remote = True

    def __init__(self, config: ConfigDict, *, notify: Callable[[str], None]):
        """`config`: a serving_config with generate.base_url. Raises InputError where the endpoint cannot be used."""
        g, s = config.generate, config.sampling
        connection = EndpointConfig(
            g.base_url, g.api_key_env, g.concurrency, g.connect_timeout, g.read_timeout, max_wait=g.max_wait
        )
        connection.check("config.generate")
        check_positive("config.generate", "retries", g.retries)
        self._config = config
        self._chat: ChatTokenizer | None = None
        self._chat_lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="endpoint", daemon=True)
        self._thread.start()
        self.counts: Counter[str] = Counter()
        self._endpoint: Endpoint = self._wait(self._open(connection, notify))
        try:
            self.model = g.endpoint_model or self._only_model()
        except BaseException:
            self.close()
            raise
        self.name = g.model_name or self.model.rstrip("/").rsplit("/", 1)[-1]
        self._body = {
            "model": self.model, "n": 1, "temperature": s.temperature, "top_p": s.top_p,
            "max_tokens": s.max_completion_length,
        }  # fmt: skip
        # Not OpenAI's own fields, so only where they do something.
        if s.top_k > 0:
            self._body["top_k"] = s.top_k
        if s.repetition_penalty != 1.0:
            self._body["repetition_penalty"] = s.repetition_penalty

    def prepare(self, question: Question) -> tuple[Question, list[dict[str, Any]]]:
        return question, openai_messages(question)

    def start(self, prepared: tuple[Question, list[dict[str, Any]]], tell: Tell) -> None:
        async def run() -> None:
            try:
                tell(await self._answer(*prepared))
            except asyncio.CancelledError:
                raise
            except BaseException as error:
                tell(error)

        asyncio.run_coroutine_threadsafe(run(), self._loop)

    def close(self) -> None:
        """Let go of what is running."""

        async def cancel() -> None:
            running = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            await self._endpoint.__aexit__()

        self._wait(cancel())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _open(self, connection: EndpointConfig, notify: Callable[[str], None]) -> Endpoint:
        return await Endpoint(connection, name="endpoint", notify=notify, counts=self.counts).__aenter__()

    def _only_model(self) -> str:
        try:
            models = self._wait(self._endpoint.models())
        except Refusal as refusal:
            raise InputError(
                f"endpoint {self._endpoint.config.models_url} answers {refusal}; name its model in "
                "config.generate.endpoint_model"
            ) from refusal
        if len(models) != 1:
            raise InputError(
                f"{self._endpoint} serves {', '.join(models) or 'no model'}; name one in config.generate.endpoint_model"
            )
        return models[0]

    async def _answer(self, question: Question, messages: list[dict[str, Any]]) -> Outcome:
        n = self._config.generate.num_generations
        try:
            async with asyncio.TaskGroup() as group:  # the first that fails cancels the others
                tasks = [group.create_task(self._sample(question, messages, i)) for i in range(n)]
        except ExceptionGroup as errors:
            error = next((e for e in errors.exceptions if not isinstance(e, Refusal)), errors.exceptions[0])
            if not isinstance(error, Refusal):
                raise error from None
            if error.status in _HOPELESS:
                raise InputError(f"{self._endpoint} answers {error}") from None
            return Outcome(failed=f"the endpoint answers {error}")
        samples = [task.result() for task in tasks]
        prompt_tokens = sum(tokens for _, tokens, _ in samples)
        if cut := [failed for _, _, failed in samples if failed]:
            return Outcome((), prompt_tokens, cut[0])
        return Outcome(tuple(r for r, _, _ in samples if r is not None), prompt_tokens)

    async def _sample(
        self, question: Question, messages: list[dict[str, Any]], i: int
    ) -> tuple[Response | None, int, str]:
        """(the response, prompt tokens as the endpoint counts them, why there is none)."""
        seed = sample_seed(self._config.seed, question.id, i)
        body = {**self._body, "messages": messages, "seed": seed}
        answer = await self._endpoint.chat(body, patience=self._config.generate.retries)
        try:
            choice = answer["choices"][0]
            text, reason = choice["message"]["content"] or "", choice["finish_reason"]
            usage = answer.get("usage") or {}
            prompt_tokens, token_count = int(usage.get("prompt_tokens") or 0), usage.get("completion_tokens")
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise self._endpoint.not_openai(str(answer)) from error
        if reason not in ("stop", "length"):
            return None, prompt_tokens, f"the endpoint ended sample {i} by {reason!r}"
        if token_count is None:
            token_count = len(await asyncio.to_thread(self._tokens, text, reason == "stop"))
        return Response(self.name, text, int(token_count), reason), prompt_tokens, ""

    def _tokens(self, text: str, finished: bool) -> Any:
        """For an endpoint that does not count."""
        with self._chat_lock:
            if self._chat is None:
                if not self._config.checkpoint:
                    raise InputError(
                        f"{self._endpoint} tells no usage; name the model's folder or hub id in config.checkpoint, for "
                        "its tokenizer to count with"
                    )
                self._chat = ChatTokenizer.from_pretrained(hub.resolve(self._config.checkpoint))
        return self._chat.encode_response(text, finished=finished)

    def _wait(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


def openai_messages(question: Question) -> list[dict[str, Any]]:
    """The question's messages in OpenAI's form, its images as data URLs in their places."""
    messages = chat_messages(question_prompt(question), len(question.images), name=f"question {question.id}")
    images = iter(enumerate(question.images))
    result = []
    for message in messages:
        parts: list[dict[str, Any]] = []
        for part in message["content"]:
            if part["type"] == "image":
                i, data = next(images)
                url = data_url(data, name=f"question {question.id}, image {i}")
                parts.append({"type": "image_url", "image_url": {"url": url}})
            else:
                parts.append(part)
        texts = [part["text"] for part in parts if part["type"] == "text"]
        plain = len(texts) == len(parts)  # also for templates that read no parts
        result.append({"role": message["role"], "content": "".join(texts) if plain else parts})
    return result


def data_url(data: bytes, *, name: str) -> str:
    """The file as it is if every endpoint reads it and sees what we see, else its pixels as PNG.

    Not every server turns a picture as its EXIF says, or lays transparency over white.
    """
    kind = None
    with Image.open(io.BytesIO(data)) as image:
        upright = image.getexif().get(_ORIENTATION, 1) == 1
        opaque = image.mode in ("RGB", "L", "1", "CMYK", "P") and "transparency" not in image.info
        if upright and opaque:
            kind = _KINDS.get(image.format or "")
    if kind is None:
        buffer = io.BytesIO()
        decode_image(data, name=name).save(buffer, "PNG")
        kind, data = "image/png", buffer.getvalue()
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
