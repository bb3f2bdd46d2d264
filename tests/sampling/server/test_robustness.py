"""Claims about clients that ask too much, leave, or send nonsense: they get a 4xx, and nobody else notices."""

import contextlib
import json
import socket
import threading
import time

import httpx
import openai
import pytest
from helpers.served import assert_idle, data_url, image_part, picture, running, wait_for

from ril_jax.sampling.server.app import Service

BODY = {"model": "tiny", "messages": [{"role": "user", "content": "How many?"}], "temperature": 0, "max_tokens": 8}
LONG = BODY | {"max_tokens": 200, "ignore_eos": True}


def post(url, body, path="/v1/chat/completions", **kwargs):
    content = body if isinstance(body, bytes | str) else json.dumps(body)
    headers = {"content-type": "application/json"} | kwargs.pop("headers", {})
    return httpx.post(f"{url}{path}", content=content, headers=headers, timeout=60, **kwargs)


def error_of(response, status, param=None):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert "\n" not in error["message"]
    return error["message"]


@pytest.fixture
def control(served):
    """Fails if the test changes what a good request gets, or leaves anything behind."""
    expected = post(served.url, BODY).json()["choices"]
    yield
    assert post(served.url, BODY).json()["choices"] == expected
    assert_idle(served.engine)
    assert served.engine.counter.after_warm == 0


def raw(path, body):
    """A request as bytes; `body` an object, or how many bytes are promised and never come."""
    data = b"" if isinstance(body, int) else json.dumps(body).encode()
    length = body if isinstance(body, int) else len(data)
    head = (f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {length}", "", "")
    return "\r\n".join(head).encode() + data


def connect(url):
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def images(*urls):
    return BODY | {"messages": [{"role": "user", "content": [image_part(url) for url in urls]}]}


def test_bad_requests_name_what_is_wrong(served, control, tmp_path):
    secret = tmp_path / "picture.png"
    picture(30, 30).save(secret)
    url = served.url
    assert "not valid JSON" in error_of(post(url, "{"), 400)
    assert "JSON object" in error_of(post(url, "[]"), 400)
    assert "temperature" in error_of(post(url, BODY | {"temperature": "hot"}), 400, "temperature")
    assert error_of(post(url, BODY | {"model": "gpt-4o"}), 404, "model")
    assert "application/json" in error_of(post(url, BODY, headers={"content-type": "text/plain"}), 415)
    assert error_of(httpx.get(f"{url}/v1/chat/completions"), 405)
    assert error_of(httpx.get(f"{url}/v1/embeddings"), 404)
    assert error_of(httpx.get(f"{url}/v1/models/other"), 404, "model")
    bad = {"role": "user", "content": [{"type": "image_url"}]}
    assert "message 0, part 0" in error_of(post(url, BODY | {"messages": [bad]}), 400, "messages")
    for role, content in (
        ("king", "a"),
        ("user", None),
        ("user", 3),
        ("user", [{"type": "video_url", "video_url": 1}]),
    ):
        error_of(post(url, BODY | {"messages": [{"role": role, "content": content}]}), 400, "messages")
    for prompt in ([1, 10**6], [-1], "a<|image_pad|>b", [290], ""):
        error_of(post(url, {"model": "tiny", "prompt": prompt}, "/v1/completions"), 400, "prompt")
    # Files are not opened, whatever they are called, and no address is asked.
    for source in (str(secret), secret.as_uri(), "http://169.254.169.254/latest", "data:image/png,abc", "file://["):
        error_of(post(url, images(source)), 400, "messages")
    for key in ("path", "image", "url"):
        part = {"type": "image", key: str(secret)}
        error_of(post(url, BODY | {"messages": [{"role": "user", "content": [part]}]}), 400, "messages")
    for broken in (data_url(picture(30, 30))[:200], "data:image/png;base64,AAAA", "data:image/png;base64,%%%"):
        error_of(post(url, images(broken)), 400, "messages")


def test_limits_of_bodies_images_and_texts(served, control):
    small, many = data_url(picture(30, 30)), 6
    with running(served.service(max_images=many - 1, max_image_pixels=2000, max_body_bytes=40_000, max_n=2)) as url:
        assert "config.server.max_images" in error_of(post(url, images(*[small] * many)), 400, "messages")
        assert "pixels" in error_of(post(url, images(data_url(picture(60, 60), "JPEG"))), 400, "messages")
        assert "config.server.max_n" in error_of(post(url, BODY | {"n": 3}), 400, "n")
        assert "40,000 bytes" in error_of(post(url, BODY | {"user": "x" * 40_000}), 413)

        def chunks():  # without a length
            for _ in range(60):
                yield b"x" * 1000

        response = httpx.post(
            f"{url}/v1/chat/completions", content=chunks(), headers={"content-type": "application/json"}
        )
        assert "40,000 bytes" in error_of(response, 413)
        assert post(url, BODY).status_code == 200
    text = BODY | {"messages": [{"role": "user", "content": "word " * 100_000}]}
    assert "characters" in error_of(post(served.url, text), 400, "messages")
    longer = BODY | {"messages": [{"role": "user", "content": "7" * 400}]}
    assert "tokens" in error_of(post(served.url, longer), 400, "messages")


def test_more_images_than_the_feature_store_holds_are_refused_and_do_not_stop_the_engine(served, control):
    urls = [data_url(picture(28, 28 + i)) for i in range(8)]
    response = post(served.url, images(*urls))
    assert "config.engine.feature_rows" in error_of(response, 400, "messages")
    # As many as fit, of sizes that leave gaps between them, over and over.
    for turn in range(6):
        chosen = [data_url(picture(28 + 28 * (turn % 3), 28 + turn)), data_url(picture(56, 112 + turn))]
        assert post(served.url, images(*chosen)).status_code == 200


def test_the_key_is_asked_for(served):
    with running(served.service(api_key="secret ключ")) as url:
        for headers in ({}, {"authorization": "Bearer no"}, {"authorization": "secret"}, {"authorization": "Basic x"}):
            for path in ("/v1/models", "/metrics"):
                response = httpx.get(f"{url}{path}", headers=headers)
                assert error_of(response, 401)
                assert response.headers["www-authenticate"] == "Bearer"
            assert error_of(post(url, BODY, headers=headers), 401)
        right = {"authorization": "Bearer secret ключ".encode()}
        assert httpx.get(f"{url}/v1/models", headers=right).status_code == 200
        assert httpx.get(f"{url}/health").status_code == httpx.get(f"{url}/ready").status_code == 200
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            client.models.list()


def test_a_full_queue_says_when_to_come_again(served, control):
    with running(served.service(max_queue=3)) as url:
        with served.gate.closed():
            threads = [threading.Thread(target=post, args=(url, BODY)) for _ in range(3)]
            for thread in threads:
                thread.start()
            wait_for(lambda: served.engine.num_waiting == 3)
            for path, body in (("chat/completions", BODY), ("completions", {"model": "tiny", "prompt": ["a", "b"]})):
                response = post(url, body, f"/v1/{path}")
                assert "waiting" in error_of(response, 429)
                assert 1 <= int(response.headers["retry-after"]) <= 60
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            with pytest.raises(openai.RateLimitError):
                client.chat.completions.create(model="tiny", messages=BODY["messages"])
        for thread in threads:
            thread.join(30)
        assert post(url, BODY).status_code == 200
        error_of(post(url, {"model": "tiny", "prompt": ["a"] * 4}, "/v1/completions"), 400, "prompt")


def test_a_request_that_takes_too_long_is_stopped(served, control):
    with running(served.service(timeout=0.5)) as url:
        with served.gate.closed():
            assert "config.server.timeout" in error_of(post(url, LONG), 504)
            assert "config.server.timeout" in error_of(post(url, LONG | {"stream": True}), 504)
        assert_idle(served.engine)
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=LONG | {"stream": True}) as response:
            lines = response.iter_lines()
            first = next(lines)
            assert first.startswith("data: {")
            with served.gate.closed():
                rest = [line for line in lines if line]
        if "[DONE]" not in rest[-1]:  # it may have been quicker than the gate
            assert json.loads(rest[-1].removeprefix("data: "))["error"]["type"] == "timeout_error"


def test_a_body_that_does_not_come_is_given_up(served, control):
    with running(served.service(timeout=0.5)) as url, connect(url) as connection:
        connection.sendall(raw("/v1/completions", 99) + b"{")
        assert b" 408 " in connection.recv(1000)


@pytest.mark.parametrize("stream", [False, True])
def test_the_work_of_a_client_that_leaves_is_stopped(served, control, stream):
    """While it waits, and while it is being decoded."""
    for started in (False, True):
        before = served.engine.stats.generated_tokens
        body = LONG | {"stream": stream, "n": 3, "temperature": 1.0}
        with served.gate.closed() if not started else contextlib.nullcontext():
            connection = connect(served.url)
            connection.sendall(raw("/v1/chat/completions", body))
            if started:
                wait_for(lambda before=before: served.engine.stats.generated_tokens > before)
            else:
                wait_for(lambda: served.engine.num_waiting == 1)
            connection.close()
            if not started:
                time.sleep(0.3)  # the server hears of it
        assert_idle(served.engine)
        most = 3 * LONG["max_tokens"] if started else 0
        assert served.engine.stats.generated_tokens - before < max(most, 1)


def test_a_soak_of_clients_that_vanish(served, control):
    """Sixty clients that leave at any moment, some in the middle of a line, beside some that stay."""
    expected = post(served.url, BODY | {"max_tokens": 30, "ignore_eos": True}).json()["choices"]
    wrong = []

    def vanish(i):
        stream = i % 3 != 0
        content = [{"type": "text", "text": "x" * (i % 40)}]
        if i % 4 == 0:
            content.append(image_part(data_url(picture(28, 30 + i))))
        body = LONG | {"stream": stream, "n": 1 + i % 4, "temperature": 1.0, "seed": i, "logprobs": i % 5 == 0}
        whole = raw("/v1/chat/completions", body | {"messages": [{"role": "user", "content": content}]})
        with connect(served.url) as connection:
            connection.sendall(whole[: len(whole) * (i % 7) // 6 if i % 7 else len(whole)])
            connection.settimeout(0.02 * (i % 9) + 0.001)
            with contextlib.suppress(TimeoutError):
                connection.recv(1 + 300 * (i % 3))
            if i % 2:  # a reset instead of an end
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")

    def stay():
        got = post(served.url, BODY | {"max_tokens": 30, "ignore_eos": True}).json()["choices"]
        if got != expected:
            wrong.append(got)

    threads = [threading.Thread(target=vanish, args=(i,)) for i in range(60)]
    threads += [threading.Thread(target=stay) for _ in range(10)]
    for thread in sorted(threads, key=id):
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []
    assert_idle(served.engine)


def test_it_says_whether_it_is_alive_and_ready(served):
    service = Service(served.service()._config, model_name="tiny")
    service.progress = "program 3 of 10"
    with running(service) as url:
        assert httpx.get(f"{url}/health").status_code == 200
        ready = httpx.get(f"{url}/ready")
        assert (ready.status_code, ready.json()) == (503, {"status": "loading", "detail": "program 3 of 10"})
        assert "being loaded" in error_of(post(url, BODY), 503)
        assert "ril_ready 0.0" in httpx.get(f"{url}/metrics").text
        service.open(served.model, served.engine)
        assert httpx.get(f"{url}/ready").json() == {"status": "ready"}
        assert post(url, BODY).status_code == 200
        service.drain()
        assert httpx.get(f"{url}/ready").status_code == 503
        assert httpx.get(f"{url}/health").status_code == 200
        assert "shutting down" in error_of(post(url, BODY), 503)


def test_when_the_engine_fails_everybody_is_told(served):
    engine = served.another_engine()
    step, fail = engine.step, threading.Event()

    def broken():
        if not fail.is_set():
            return step()
        wait_for(lambda: engine.num_waiting == 4)
        raise RuntimeError("the device is gone")

    engine.step = broken
    engine.start()
    results = []
    with running(served.service(engine=engine)) as url:
        assert post(url, BODY).status_code == 200

        def ask(stream):
            results.append(post(url, LONG | {"stream": stream}))

        fail.set()
        threads = [threading.Thread(target=ask, args=(i % 2 == 0,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(results) == 4
        for response in results:
            assert "the device is gone" in error_of(response, 500)
        health = httpx.get(f"{url}/health")
        assert (health.status_code, health.json()["status"]) == (503, "failed")
        assert httpx.get(f"{url}/ready").status_code == 503
        assert error_of(post(url, BODY), 500)


def test_a_mistake_of_the_server_is_a_500_and_not_the_end(served, control, monkeypatch):
    from ril_jax.sampling.server import app

    def mistake(*_):
        raise ZeroDivisionError("a mistake")

    with monkeypatch.context() as patch:
        patch.setattr(app, "read_chat", mistake)
        assert "its log tells more" in error_of(post(served.url, BODY), 500)
