"""Evaluations in this process: their config, and an endpoint that says what a function says."""

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

from helpers.generated import generated_config
from helpers.running import running
from ml_collections import ConfigDict
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from ril_jax import evaluate
from ril_jax.evaluation.results import read_results

CONFIG = Path(__file__).with_name("evaluated_config.py")
Say = Callable[[list[dict]], str]  # from the messages of a request to the answer


def evaluated_config(folder: Path | str = "", url: str = "", **changes) -> ConfigDict:
    """Of a local model or an endpoint; `changes` are of the `evaluate` section."""
    c = generated_config(folder, base_url=url, concurrency=4, model_name="")
    c.engine.update({"max_model_len": 1024, "feature_rows": 64})
    c.evaluate.max_tokens, c.evaluate.bootstrap = 8, 100
    c.evaluate.update(changes)
    return c


def run(config: ConfigDict, data: Path, output: Path, *names: str, **flags) -> dict:
    """What results.json then has of the benchmarks; {} where it is not there yet."""
    values = {"checkpoint": "", "shard": "", "limit": 0, "paper": "", "summary": False} | flags
    args = SimpleNamespace(
        config=config, data=str(data), output=str(output), benchmarks=list(names) or ["all"], **values
    )
    assert evaluate.main(args) == 0
    return read_results(output)["benchmarks"] if (output / "results.json").exists() else {}


class Endpoint:
    """Keeps what it is asked; `say` answers, in a thread."""

    def __init__(self, say: Say, name: str):
        self.say, self.name, self.bodies = say, name, []
        self.app = Starlette(
            routes=[
                Route("/v1/models", self._models),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
            ]
        )

    def close(self) -> None:
        pass

    async def _models(self, request: Request) -> JSONResponse:
        return JSONResponse({"data": [{"id": self.name}]})

    async def _chat(self, request: Request) -> JSONResponse:
        body = json.loads(await request.body())
        self.bodies.append(body)
        text = await asyncio.to_thread(self.say, body["messages"])
        message = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 10, "completion_tokens": len(text.split())}
        return JSONResponse({"choices": [message], "usage": usage})


@contextlib.contextmanager
def endpoint(say: Say, name: str = "said") -> Iterator[tuple[str, Endpoint]]:
    """(its address, it)."""
    service = Endpoint(say, name)
    with running(service) as url:  # type: ignore[arg-type]
        yield url, service


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    """Until it is true, which it must be in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


def asked(messages: list[dict]) -> str:
    """All text of the messages."""
    return "\n".join(
        part["text"] if isinstance(part, dict) else part
        for message in messages
        for part in ([message["content"]] if isinstance(message["content"], str) else message["content"])
        if isinstance(part, str) or part["type"] == "text"
    )
