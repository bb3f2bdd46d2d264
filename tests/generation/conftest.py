"""One tiny model, one engine and one endpoint for all tests of the offline job: what is compiled is compiled once."""

import dataclasses
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.generated import generated_config
from helpers.quick import quick_compilation, quick_environment
from helpers.running import running
from helpers.tiny_folder import build_tiny_folder

from ril_jax.pretrained import Pretrained
from ril_jax.sampling.engine import Engine
from ril_jax.sampling.local import load_engine
from ril_jax.sampling.server.app import Service


class Recorder:
    """Keeps what is asked of an ASGI app; `answer(body)` may give (status, JSON) in its stead."""

    def __init__(self, app: Any):
        self._app, self._lock = app, threading.Lock()
        self.reset()

    def reset(self) -> None:
        self.bodies: list[dict] = []
        self.answered = 0
        self.answer: Callable[[dict], tuple[int, dict] | None] = lambda body: None

    async def __call__(self, scope, receive, send) -> None:
        if scope.get("method") != "POST":
            await self._app(scope, receive, send)
            return
        parts, more = [], True
        while more:
            message = await receive()
            parts.append(message.get("body", b""))
            more = message.get("more_body", False)
        content = b"".join(parts)
        body = json.loads(content)
        with self._lock:
            self.bodies.append(body)
        given = self.answer(body)
        if given is not None:
            headers = [(b"content-type", b"application/json"), (b"retry-after", b"0")]
            await send({"type": "http.response.start", "status": given[0], "headers": headers})
            await send({"type": "http.response.body", "body": json.dumps(given[1]).encode()})
            return
        messages = [{"type": "http.request", "body": content, "more_body": False}]

        async def replay():
            return messages.pop() if messages else await receive()

        await self._app(scope, replay, send)
        with self._lock:
            self.answered += 1


@dataclasses.dataclass
class Made:
    """A model's folder, an engine over it, and a server of it that runs."""

    folder: Path
    model: Pretrained
    engine: Engine
    url: str
    recorder: Recorder

    def another_engine(self) -> Engine:
        """An engine of its own over the same compiled programs; not started."""
        with self.engine.counter.expected():
            return Engine(
                self.engine.programs, self.engine.params, image_token_id=self.model.chat.image_token_id,
                counter=self.engine.counter,
            )  # fmt: skip

    def environment(self) -> dict[str, str]:
        return quick_environment()


@pytest.fixture(scope="session")
def made_here(tmp_path_factory) -> Iterator[Made]:
    folder = tmp_path_factory.mktemp("generated") / "tiny"
    folder.mkdir()
    build_tiny_folder(folder)
    config = generated_config(folder)
    with quick_compilation():
        model, engine = load_engine(config)
    engine.start()
    service = Service(config, model_name="tiny")
    service.open(model, engine)
    recorder = Recorder(service.app)
    with running(SimpleNamespace(app=recorder, close=service.close)) as url:
        yield Made(folder, model, engine, url, recorder)
    engine.close()


@pytest.fixture
def made(made_here) -> Made:
    made_here.recorder.reset()
    return made_here
