"""Claims about images from the network: named hosts only, within limits, and never from inside."""

import contextlib
import http.server
import threading
import time

import pytest

from ril_jax.errors import InputError
from ril_jax.sampling.server.fetch import ImageFetcher, is_public

DATA = b"image bytes" * 100


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        port = self.server.server_address[1]
        if self.path == "/slow":
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(50):
                    self.wfile.write(b"x")
                    time.sleep(0.1)
            return
        targets = {
            "/moved": "/image", "/away": f"http://127.0.0.1:{port}/image", "/round": "/round", "/odd": "http://[::",
        }  # fmt: skip
        if self.path in targets:
            self.send_response(302)
            self.send_header("Location", targets[self.path])
            self.end_headers()
            return
        self.send_response(200 if self.path.startswith("/image") else 404)
        self.end_headers()
        self.wfile.write(DATA)
        self.server.hosts.append(self.headers["Host"])

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def port():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hosts = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()


def fetcher(**settings):
    defaults = {"hosts": ("localhost",), "max_bytes": 10_000, "allowed": lambda address: address == "127.0.0.1"}
    given = defaults | settings
    return ImageFetcher(given.pop("hosts"), given.pop("max_bytes"), **given)


def test_a_named_host_is_asked(port):
    for path in ("image", "image?a=b#c", "moved"):
        assert fetcher()(f"http://LOCALHOST:{port}/{path}", "part 0") == DATA


@pytest.mark.parametrize(
    ("url", "settings", "line"),
    [
        ("http://localhost:{port}/image", {"hosts": ()}, "images are not fetched from localhost"),
        ("http://127.0.0.1:{port}/image", {}, "images are not fetched from 127.0.0.1"),
        ("http://localhost@example.com/image", {}, "images are not fetched from example.com"),
        ("http://localhost.example.com/image", {}, "images are not fetched from localhost.example.com"),
        ("http:///image", {}, "images are not fetched from there"),
        ("ftp://localhost/image", {}, "no http"),
        ("http://localhost:99999/image", {}, "no http"),
        ("http://[::1/image", {}, "no http"),
        ("http://localhost:{port}/image", {"allowed": is_public}, "inside a private network"),
        ("http://localhost:{port}/away", {}, "leads on to another host"),
        ("http://localhost:{port}/round", {}, "leads on and on"),
        ("http://localhost:{port}/odd", {}, "cannot be fetched"),
        ("http://localhost:{port}/none", {}, "status 404"),
        ("http://localhost:{port}/image", {"max_bytes": 1000}, "more than 1,000 bytes"),
        ("http://localhost:{port}/slow", {"seconds": 0.5}, "did not come within 0.5 seconds|cannot be fetched"),
        ("http://localhost:1/image", {}, "cannot be fetched"),
        ("http://no-such-host.invalid/image", {"hosts": ("no-such-host.invalid",)}, "cannot be fetched"),
    ],
)
def test_everything_else_is_refused_in_one_line(port, url, settings, line):
    started = time.monotonic()
    with pytest.raises(InputError, match=line) as error:
        fetcher(**settings)(url.format(port=port), "part 0")
    assert str(error.value).startswith("part 0: ")
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True), ("2606:4700::1111", True), ("127.0.0.1", False), ("10.0.0.1", False),
        ("192.168.1.1", False), ("172.16.0.1", False), ("169.254.169.254", False), ("0.0.0.0", False),
        ("100.64.0.1", False), ("224.0.0.1", False), ("::1", False), ("fe80::1", False), ("fd00::1", False),
        ("::ffff:127.0.0.1", False), ("::ffff:10.0.0.1", False), ("::ffff:8.8.8.8", True),
    ],
)  # fmt: skip
def test_which_addresses_are_public(address, public):
    assert is_public(address) == public
