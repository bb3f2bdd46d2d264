"""Serve a checkpoint to OpenAI's clients: chat with images, completions, scoring (docs/serving.md).

    python -m ril_jax.serve --config=configs/judge_qwen32b.py --config.checkpoint=HF_DIR --port=8000

The port is open at once; /ready answers 503 until every program is compiled. SIGTERM and Ctrl-C let running requests
finish (config.server.shutdown_grace); a second signal stops them.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import uvicorn
from ml_collections import ConfigDict

from ril_jax import cli
from ril_jax import config as config_lib
from ril_jax.errors import InputError
from ril_jax.sampling.server.app import Service

FAILED_STATUS = 1
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_KEEP_ALIVE = 75  # seconds that an idle connection stays open; longer than clients keep theirs


def main(args: SimpleNamespace) -> int:
    config = args.config
    _check(config)
    port = config.server.port if args.port is None else args.port
    key = _api_key(config)
    listener = _listen(config.server.host, port)
    port = listener.getsockname()[1]
    if not key and not _is_loopback(config.server.host):
        print(
            f"warning: {config.server.host} is open to other machines, and no API key is asked for; name a variable "
            f"with one in config.server.api_key_env",
            file=sys.stderr,
            flush=True,
        )
    service = Service(config, model_name=_model_name(config), api_key=key)
    server = _Server(service, config.server)
    address = f"http://{_in_url(config.server.host)}:{port}/v1"
    loader = _Loader(service, server, config, address)
    loader.start()
    server.run(sockets=[listener])
    return _finish(service, loader)


class _Server(uvicorn.Server):
    """uvicorn, which ends well at a signal, and at the engine's failure."""

    def __init__(self, service: Service, config: ConfigDict):
        super().__init__(
            uvicorn.Config(
                service.app,
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                lifespan="off",
                ws="none",
                timeout_keep_alive=_KEEP_ALIVE,
                timeout_graceful_shutdown=max(1, int(config.shutdown_grace)),
                callback_notify=self._look,
                timeout_notify=1,
            )
        )
        self._service, self._grace = service, config.shutdown_grace
        self._seen_failure = False

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        name = signal.Signals(sig).name
        if self.should_exit:
            self.force_exit = True
            _tell(f"{name} again: stopping at once")
            return
        self._service.drain()
        self.should_exit = True
        _tell(f"{name}: no new requests; those that run have {self._grace:g} seconds to finish")

    async def _look(self) -> None:
        """Once a second: the end, a second after the engine's, so that who waits is answered and /health is seen."""
        if self._seen_failure:
            self.should_exit = True
        self._seen_failure = bool(self._service.failure)


class _Loader(threading.Thread):
    """Loads the model and compiles its programs beside the event loop, which says meanwhile that it is not ready."""

    def __init__(self, service: Service, server: _Server, config: ConfigDict, address: str):
        super().__init__(name="loader", daemon=True)
        self._service, self._server, self._config, self._address = service, server, config, address
        self.error: BaseException | None = None
        self.engine: Any = None

    def run(self) -> None:
        try:
            self._load()
        except BaseException as error:
            self.error = error
            self._server.should_exit = True

    def _load(self) -> None:
        from ril_jax.compilation import enable_persistent_cache
        from ril_jax.progress import duration, of_bytes
        from ril_jax.sampling.local import load_engine

        started = time.monotonic()
        self._say(f"loading {self._config.checkpoint}")
        enable_persistent_cache()
        last: list[float] = []

        def compiling(name: str, i: int, total: int) -> None:
            now = time.monotonic()
            last.append(now)
            before = f" (the one before took {duration(now - last[-2])})" if len(last) > 1 else ""
            self._say(f"program {i + 1} of {total}: {name}{before}")

        model, engine = load_engine(self._config, progress=compiling, loading=of_bytes("loading"))
        engine.start()
        self.engine = engine
        self._service.open(model, engine)
        shapes, memory = engine.shapes, engine.memory
        parameters = sum(leaf.size for leaf in engine.params.values())
        sizes = ", ".join(f"{name} {_short(size)}B" for name, size in memory.items() if size)
        devices = engine.programs.mesh.devices
        print(
            f"{len(last)} programs are compiled, {duration(time.monotonic() - started)} after the start\n"
            f"memory: {sizes} ({shapes.num_pages} pages of {shapes.page_size} tokens); {shapes.slots} responses at "
            f"once, of {shapes.max_model_len} tokens at most with their prompts\n"
            f"serving {self._service.model_name} ({model.config.family}, {_short(parameters)} parameters, "
            f"{self._config.dtype}) on {devices.size} x {devices.flat[0].platform} at {self._address}",
            flush=True,
        )

    def _say(self, what: str) -> None:
        self._service.progress = what
        print(what, flush=True)


def _finish(service: Service, loader: _Loader) -> int:
    """The exit status, when nothing is served any more."""
    service.close()
    if loader.error is not None:
        raise loader.error
    if loader.is_alive():  # told to stop while it was loading: a compiler cannot be interrupted
        print("stopped", flush=True)
        os._exit(0)
    if service.failure:
        print(f"error: {service.failure}", file=sys.stderr, flush=True)
        return FAILED_STATUS
    loader.engine.close()
    print("stopped", flush=True)
    return 0


def _check(config: ConfigDict) -> None:
    for name in ("checkpoint", *config_lib.serving_config()):
        if name not in config:
            raise InputError(f"--config: it has no {name}; start from ril_jax.config.serving_config()")
    server = config.server
    if not config.checkpoint:
        raise InputError("config.checkpoint is empty; name a Hugging Face folder or a hub id")
    if server.default_sampling not in ("openai", "config"):
        raise InputError(f"config.server.default_sampling is {server.default_sampling!r}; use openai or config")
    for name in ("max_queue", "timeout", "max_body_bytes", "max_image_pixels", "max_n", "threads"):
        if server[name] <= 0:
            raise InputError(f"config.server.{name} is {server[name]}; give a number above 0")
    if isinstance(server.allowed_image_hosts, str):
        raise InputError(
            f"config.server.allowed_image_hosts is one text; write a tuple: ({server.allowed_image_hosts!r},)"
        )


def _api_key(config: ConfigDict) -> str:
    name = config.server.api_key_env
    key = os.environ.get(name, "") if name else ""
    if name and not key:
        raise InputError(f"config.server.api_key_env names {name}, which is not set; export it")
    return key


def _model_name(config: ConfigDict) -> str:
    """The configured one; of a folder its name, of a hub id all of it."""
    if config.server.model_name:
        return config.server.model_name
    path = Path(config.checkpoint)
    return path.resolve().name if path.is_dir() else str(config.checkpoint)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise InputError(f"--port={port}: {host}:{port} cannot be listened on ({error}); give another port") from None


def _short(number: float) -> str:
    """Three digits and the unit: 7.62 G."""
    unit = 0
    while number >= 1000:
        number, unit = number / 1000, unit + 1
    return f"{number:.3g} {' kMGTP'[unit].strip()}"


def _tell(what: str) -> None:
    """Prints a line from a signal handler, which may have interrupted another print."""
    os.write(1, f"{what}\n".encode())


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


if __name__ == "__main__":
    cli.run(
        main,
        required=("config",),
        flags=(cli.Flag("port", int, None, help="where to listen, instead of config.server.port; 0 for any free one"),),
    )
