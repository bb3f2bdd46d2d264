"""An ASGI app behind a real socket, in a thread of this process."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import uvicorn


@contextlib.contextmanager
def running(service: Any) -> Iterator[str]:
    """The address of `service.app`; `service.close` is called at the end."""
    # log_config: uvicorn's own closes the streams of other handlers, and with absl's the one that pytest captures.
    settings = uvicorn.Config(service.app, port=0, log_level="warning", log_config=None, lifespan="off", ws="none")
    server = uvicorn.Server(settings)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        service.close()
        assert not thread.is_alive()
