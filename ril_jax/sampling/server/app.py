"""The routes: who may ask, what waits, what is answered when, and with which status."""

import asyncio
import hmac
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ml_collections import ConfigDict
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ril_jax.pretrained import Pretrained
from ril_jax.sampling.engine import Engine
from ril_jax.sampling.server import answers
from ril_jax.sampling.server.errors import APIError
from ril_jax.sampling.server.metrics import CONTENT_TYPE, Metrics
from ril_jax.sampling.server.prompts import PromptReader
from ril_jax.sampling.server.protocol import (
    ChatCall,
    CompletionCall,
    Limits,
    Options,
    parse_json,
    read_chat,
    read_completion,
)
from ril_jax.sampling.server.streams import ClientGone, Mailbox, Timing, Work
from ril_jax.sampling.server.token_texts import TokenTexts

logger = logging.getLogger("ril_jax.serve")

_LARGE_BODY = 2**16  # bytes from which a body is parsed off the event loop
_STREAM_GRACE = 5.0  # seconds after the time-out that a stream has to be taken by its reader
_GONE = 499  # the status that is counted where the client left


class Service:
    """One model behind the routes of `app`. Requests are refused until `open`, and again after `drain`.

    config: a `config.serving_config`. api_key: what clients must send; none if empty.
    """

    def __init__(self, config: ConfigDict, *, model_name: str, api_key: str = ""):
        self._config, self._server, self._key = config, config.server, api_key.encode()
        self.model_name = model_name
        self._names = {model_name, str(config.checkpoint)}
        self._limits = Limits.from_config(config)
        self.metrics = Metrics(lambda: (self._engine, len(self._preparing), self.state == "ready"))
        self.progress = ""  # what is being done before it opens
        self._engine: Engine | None = None
        self._draining = False
        self._preparing: set[Timing] = set()  # of requests that the engine does not know yet
        self._seconds = 1.0  # that a request takes, about
        self._created = int(time.time())
        self._mailbox: Mailbox | None = None
        self._pool = ThreadPoolExecutor(int(self._server.threads), thread_name_prefix="prompts")
        self.app = Starlette(
            routes=[
                Route("/v1/models", self._route("models", self._models), methods=["GET"]),
                Route("/v1/models/{name:path}", self._route("models", self._models), methods=["GET"]),
                Route("/v1/chat/completions", self._route("chat", self._chat), methods=["POST"]),
                Route("/v1/completions", self._route("completions", self._completions), methods=["POST"]),
                Route("/metrics", self._route("metrics", self._metrics), methods=["GET"]),
                Route("/health", self._health, methods=["GET"]),
                Route("/ready", self._ready, methods=["GET"]),
            ],
            exception_handlers={HTTPException: _http_error},
        )

    def open(self, model: Pretrained, engine: Engine) -> None:
        """Take requests from now on, for an engine that is warmed up and runs in its thread."""
        self._model, self._texts = model, TokenTexts(model.chat)
        self._reader = PromptReader(model, self._server, engine.shapes.max_model_len)
        self._engine = engine

    def drain(self) -> None:
        """Take no more requests; those that run go on."""
        self._draining = True

    def close(self) -> None:
        """Stop the threads that read prompts."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    @property
    def failure(self) -> str:
        """Why the engine does not run any more, if it does not."""
        return self._engine.failure if self._engine is not None else ""

    @property
    def state(self) -> str:
        """loading, ready, draining or failed."""
        if self.failure:
            return "failed"
        if self._draining:
            return "draining"
        return "ready" if self._engine is not None else "loading"

    # --- small routes ---

    async def _health(self, request: Request) -> Response:
        failed = self.state == "failed"
        body = {"status": self.state} | ({"detail": self.failure} if failed else {})
        return _json(body, 503 if failed else 200)

    async def _ready(self, request: Request) -> Response:
        state = self.state
        body = {"status": state} | ({"detail": self.progress} if state == "loading" and self.progress else {})
        return _json(body, 200 if state == "ready" else 503)

    async def _metrics(self, request: Request, timing: Timing) -> Response:
        return Response(self.metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def _models(self, request: Request, timing: Timing) -> Response:
        engine = self._check_open()
        model = {
            "id": self.model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "ril_jax",
            "max_model_len": engine.shapes.max_model_len,
        }
        name = request.path_params.get("name")
        if name is None:
            return _json({"object": "list", "data": [model]})
        self._check_model(name)
        return _json(model)

    # --- sampling ---

    async def _chat(self, request: Request, timing: Timing) -> Any:
        return await self._sample(request, timing, "chat", read_chat, answers.ChatAnswer)

    async def _completions(self, request: Request, timing: Timing) -> Any:
        return await self._sample(request, timing, "completions", read_completion, answers.CompletionAnswer)

    async def _sample(
        self,
        request: Request,
        timing: Timing,
        endpoint: str,
        read: Callable[[dict[str, Any], Limits], Any],
        form: type[answers.Answer],
    ) -> Any:
        engine = self._check_open()
        self._check_queue(1)
        self._preparing.add(timing)
        try:
            options, work = await self._prepare(request, timing, read, engine)
        finally:
            self._preparing.discard(timing)
        answer = form(self.model_name, work.choices, self._texts if options.logprobs is not None else None)
        watcher = asyncio.create_task(_watch(request.receive, work))
        left = self._seconds_left(timing)
        timer = asyncio.get_running_loop().call_later(left, work.interrupt, _timed_out(self._server.timeout))

        def end(status: int) -> None:
            watcher.cancel()
            timer.cancel()
            work.cancel()
            if status == 200:
                self._observe(timing, work)

        pieces = work.pieces()
        if not options.stream:
            try:
                got = [piece async for piece in pieces]
            except BaseException:
                end(500)
                raise
            end(200)
            body = answer.whole(got, answers.usage(work.prompt_tokens, work.completion_tokens))
            return _json(body, headers={"x-request-id": answer.id})
        try:
            first = await anext(pieces)  # until here an error has a status of its own
        except BaseException:
            end(500)
            raise
        chunks = _chunks(answer, first, pieces, work, options.include_usage)
        return _EventStream(
            chunks, {"x-request-id": answer.id}, left + _STREAM_GRACE, end, lambda status: self._count(endpoint, status)
        )

    async def _prepare(
        self, request: Request, timing: Timing, read: Callable[[dict[str, Any], Limits], Any], engine: Engine
    ) -> tuple[Options, Work]:
        """What is asked for, and its work handed to the engine."""
        loop = asyncio.get_running_loop()
        if self._mailbox is None:
            self._mailbox = Mailbox(loop)
        try:
            async with asyncio.timeout(self._seconds_left(timing)):
                data = await _read_body(request, self._server.max_body_bytes)
        except TimeoutError:
            raise APIError(408, f"the body did not come within {self._server.timeout:g} seconds") from None
        large = len(data) > _LARGE_BODY
        body = await loop.run_in_executor(self._pool, parse_json, data) if large else parse_json(data)
        call = read(body, self._limits)
        del data, body
        self._check_model(call.options.model)
        encode = self._reader.chat if isinstance(call, ChatCall) else self._reader.completion
        if isinstance(call, CompletionCall):
            self._check_queue(len(call.prompts) - 1)  # one of them is counted already
        try:
            async with asyncio.timeout(self._seconds_left(timing)):
                prompts = await loop.run_in_executor(self._pool, encode, call)
                work = Work(
                    engine, self._model.chat, self._texts, self._mailbox, call.options, prompts,
                    param="messages" if isinstance(call, ChatCall) else "prompt", echo=call.echo, timing=timing,
                    inter_token=self.metrics.inter_token.observe,
                )  # fmt: skip

                def submit() -> None:
                    self._preparing.discard(timing)
                    work.submit()

                try:
                    await loop.run_in_executor(self._pool, submit)
                except BaseException:
                    work.cancel()
                    raise
        except TimeoutError:
            raise _timed_out(self._server.timeout) from None
        return call.options, work

    def _seconds_left(self, timing: Timing) -> float:
        return max(0.0, timing.arrived + self._server.timeout - time.monotonic())

    def _check_open(self) -> Engine:
        if self.failure:
            raise APIError(500, self.failure)
        if self._draining:
            raise APIError(503, "the server is shutting down", headers={"retry-after": "5", "connection": "close"})
        if self._engine is None:
            raise APIError(503, "the model is still being loaded; /ready says when", headers={"retry-after": "5"})
        return self._engine

    def _check_queue(self, prompts: int) -> None:
        assert self._engine is not None
        waiting = len(self._preparing) + self._engine.num_waiting
        if waiting + prompts > self._server.max_queue:
            seconds = math.ceil(waiting * self._seconds / self._engine.shapes.slots)
            raise APIError(
                429, f"{waiting} requests are waiting; try again later",
                code="rate_limit_exceeded", headers={"retry-after": str(min(max(seconds, 1), 60))},
            )  # fmt: skip

    def _check_model(self, name: str) -> None:
        if name not in self._names:
            raise APIError(
                404, f"there is no model {name[:200]!r} here, only {self.model_name!r}",
                param="model", code="model_not_found",
            )  # fmt: skip

    # --- around all routes ---

    def _route(
        self, endpoint: str, handler: Callable[[Request, Timing], Awaitable[Any]]
    ) -> Callable[[Request], Awaitable[Any]]:
        async def route(request: Request) -> Any:
            timing = Timing(time.monotonic())
            try:
                self._check_key(request)
                response = await handler(request, timing)
            except APIError as error:
                response = _json(error.body(), error.status, error.headers)
            except (ClientGone, ClientDisconnect):
                response = _json({}, _GONE)
            except Exception:
                logger.exception("a request has failed")
                response = _json(APIError(500, "the server has made a mistake; its log tells more").body(), 500)
            if isinstance(response, Response):
                self._count(endpoint, response.status_code)
            return response

        return route

    def _check_key(self, request: Request) -> None:
        if not self._key:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        sent = given.strip().encode("latin-1") if kind.lower() == "bearer" else b""
        if not hmac.compare_digest(sent, self._key):
            raise APIError(
                401, "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                code="invalid_api_key", headers={"www-authenticate": "Bearer"},
            )  # fmt: skip

    def _count(self, endpoint: str, status: int) -> None:
        self.metrics.requests.labels(endpoint, str(status)).inc()

    def _observe(self, timing: Timing, work: Work) -> None:
        seconds = time.monotonic() - timing.arrived
        self._seconds += 0.1 * (seconds - self._seconds)
        self.metrics.end_to_end.observe(seconds)
        if timing.first_token is not None:
            self.metrics.first_token.observe(timing.first_token - timing.arrived)
        self.metrics.prompt_tokens.inc(work.prompt_tokens)
        self.metrics.completion_tokens.inc(work.completion_tokens)


class _EventStream:
    """Server-sent events. `end(status)` and `count(status)` are called once, however it ends."""

    def __init__(
        self,
        chunks: AsyncIterator[bytes],
        headers: dict[str, str],
        seconds: float,
        end: Callable[[int], None],
        count: Callable[[int], None],
    ):
        self._chunks, self._headers, self._seconds, self._end, self._count = chunks, headers, seconds, end, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = 500
        headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"} | self._headers
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        try:
            async with asyncio.timeout(self._seconds):
                await send({"type": "http.response.start", "status": 200, "headers": raw})
                async for chunk in self._chunks:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            status = 200
        except APIError as error:
            await send({"type": "http.response.body", "body": answers.event(error.body()), "more_body": False})
            status = error.status
        except ClientGone:
            status = _GONE
        except TimeoutError:  # it is not read; the connection is closed, since the answer is not complete
            status = 504
        finally:
            self._end(status)
            self._count(status)


async def _chunks(
    answer: answers.Answer, first: answers.Piece, rest: AsyncIterator[answers.Piece], work: Work, with_usage: bool
) -> AsyncIterator[bytes]:
    """The events of a stream."""
    no_usage = {"usage": None} if with_usage else {}
    for chunk in answer.first():
        yield answers.event(chunk | no_usage)
    yield answers.event(answer.part(first) | no_usage)
    async for piece in rest:
        yield answers.event(answer.part(piece) | no_usage)
    if with_usage:
        yield answers.event(answer.end(answers.usage(work.prompt_tokens, work.completion_tokens)))
    yield b"data: [DONE]\n\n"


async def _watch(receive: Receive, work: Work) -> None:
    """Stops the work when the client leaves."""
    while (await receive())["type"] != "http.disconnect":
        pass
    work.interrupt(ClientGone())
    work.cancel()


async def _read_body(request: Request, limit: int) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which a web page of another site cannot send unasked
        raise APIError(415, "send the body as Content-Type: application/json")
    too_large = APIError(413, f"the body is larger than {limit:,} bytes (config.server.max_body_bytes)")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limit:
        raise too_large
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > limit:
            raise too_large
    return bytes(data)


def _timed_out(seconds: float) -> APIError:
    return APIError(504, f"the request took more than {seconds:g} seconds (config.server.timeout)", code="timeout")


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path} is not served" if error.status_code in (404, 405) else error.detail
    return _json(APIError(error.status_code, message).body(), error.status_code, dict(error.headers or {}))


def _json(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(answers.dumps(body), status, {"content-type": "application/json"} | (headers or {}))
