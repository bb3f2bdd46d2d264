"""Judges, the one over HTTP against a real server on this machine that is good, slow, flaky, busy or away."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ril_jax.errors import InputError
from ril_jax.rewards.judge import JudgeInterrupted, JudgeItem, OpenAIJudge, OpenAIJudgeConfig, RulesJudge, make_judge

RIGHT = "Both say the same. <answer>1</answer>"
WRONG = "They differ. <answer>0</answer>"


def item(response, solution="5", question="How many?", id="q1"):
    return JudgeItem(question, solution, response, id)


def grade(body):
    """An honest judge: reads the two texts out of the prompt and compares them."""
    user = body["messages"][-1]["content"]
    solution = user.split("<ground_truth>\n")[1].split("\n</ground_truth>")[0]
    response = user.split("<response-")[1].split(">\n", 1)[1].split("\n</response-")[0]
    return RIGHT if solution == response else WRONG


class Endpoint:
    """An OpenAI-like server; `script[i]` says what befalls request i, and from its end on, requests are graded.

    An entry is a status, (status, headers), seconds to sleep, "drop" (the connection), or the text of the reply.
    """

    def __init__(self, script=(), port=0, delay=0.0):
        self.bodies, self.headers, self.paths, self.times = [], [], [], []
        self.running, self.most_running = 0, 0
        lock, endpoint, script = threading.Lock(), self, list(script)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    endpoint.bodies.append(body)
                    endpoint.headers.append(self.headers)
                    endpoint.paths.append(self.path)
                    endpoint.times.append(time.monotonic())
                    endpoint.running += 1
                    endpoint.most_running = max(endpoint.most_running, endpoint.running)
                    step = script.pop(0) if script else None
                time.sleep(step if isinstance(step, float) else delay)
                with lock:
                    endpoint.running -= 1
                if step == "drop":
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                status, headers = step if isinstance(step, tuple) else (step if isinstance(step, int) else 200, {})
                text = step if isinstance(step, str) else grade(body)
                reply = {"choices": [{"message": {"content": text}}]} if status == 200 else {"error": "told you so"}
                payload = b"not JSON" if step == "not JSON" else json.dumps(reply).encode()
                with contextlib.suppress(OSError):  # the client may have hung up after its time-out
                    self.send_response(status)
                    for name, value in {**headers, "Content-Length": str(len(payload))}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(payload)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def judge_of(url, lines=None, stop=None, **fields):
    config = {"model": "judge", "first_wait": 0.02, "max_wait": 0.1, "read_timeout": 20.0, **fields}
    return OpenAIJudge(OpenAIJudgeConfig(base_url=url, **config), (lines if lines is not None else []).append, stop)


def test_verdicts_come_in_order_from_a_greedy_request():
    with Endpoint() as endpoint:
        verdicts = judge_of(endpoint.url)([item("5"), item("6"), item("7", solution="7")])
    assert [v.score for v in verdicts] == [1.0, 0.0, 1.0]
    assert verdicts[0].explanation == "Both say the same."
    body = endpoint.bodies[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge", 0.0, 256)
    assert endpoint.paths == ["/v1/chat/completions"] * 3
    assert "Authorization" not in endpoint.headers[0]


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_base_url_may_or_may_not_name_the_version(suffix):
    assert OpenAIJudgeConfig(base_url="http://h:1" + suffix, model="m").endpoint == "http://h:1/v1/chat/completions"


def test_api_key_comes_from_the_named_environment_variable(monkeypatch):
    monkeypatch.setenv("MY_JUDGE_KEY", "s3cret")
    with Endpoint() as endpoint:
        judge_of(endpoint.url, api_key_env="MY_JUDGE_KEY", extra_body={"top_k": 1})([item("5")])
    assert endpoint.headers[0]["Authorization"] == "Bearer s3cret"
    assert endpoint.bodies[0]["top_k"] == 1
    monkeypatch.delenv("MY_JUDGE_KEY")
    with pytest.raises(InputError, match="MY_JUDGE_KEY"):
        judge_of(endpoint.url, api_key_env="MY_JUDGE_KEY")


def test_requests_run_side_by_side_up_to_the_limit():
    with Endpoint(delay=0.15) as endpoint:
        verdicts = judge_of(endpoint.url, concurrency=3)([item(str(i)) for i in range(9)])
    assert [v.score for v in verdicts] == [float(i == 5) for i in range(9)]
    assert endpoint.most_running == 3


def test_flaky_endpoint_is_asked_again_until_it_answers():
    lines = []
    with Endpoint(script=[500, "drop", 503, 408, 429]) as endpoint:
        judge = judge_of(endpoint.url, lines, concurrency=1)
        assert [v.score for v in judge([item("5"), item("6")])] == [1.0, 0.0]
    assert len(endpoint.bodies) == 7
    assert len(lines) == 5
    assert all(endpoint.url in line for line in lines)
    assert "500" in lines[0]
    assert "told you so" in lines[0]
    metrics = judge.pop_metrics()
    assert metrics["judge/retries"] == 5
    assert metrics["judge/requests"] == 7
    assert metrics["judge/error_rate"] == 0


@pytest.mark.parametrize("seconds", [0.6, "date"])
def test_retry_after_is_honoured_for_every_request(seconds):
    def headers():
        if seconds != "date":
            return {"Retry-After": str(seconds)}
        return {"Retry-After": time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 3))}

    with Endpoint(script=[(429, headers())]) as endpoint:
        judge_of(endpoint.url, concurrency=1)([item("5"), item("6")])
    assert endpoint.times[1] - endpoint.times[0] >= 0.6
    assert len(endpoint.times) == 3


def test_slow_answer_times_out_and_is_asked_again():
    lines = []
    with Endpoint(script=[1.5]) as endpoint:
        assert judge_of(endpoint.url, lines, read_timeout=0.3)([item("5")])[0].score == 1.0
    assert len(endpoint.bodies) == 2
    assert "ReadTimeout" in lines[0]


def test_unreachable_judge_pauses_the_run_and_is_believed_when_it_is_back():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    lines, result = [], []
    judge = judge_of(f"http://127.0.0.1:{port}", lines)
    thread = threading.Thread(target=lambda: result.extend(judge([item("5"), item("6"), item("5 ")])), daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while len(lines) < 6 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert thread.is_alive()
    assert result == []
    assert len(lines) >= 6
    assert all(f"http://127.0.0.1:{port}/v1/chat/completions cannot be reached" in line for line in lines)
    # One line a pause, whatever the number of requests that wait in it, and pauses that grow up to max_wait.
    waits = [float(line.split("again in ")[1].split(" s")[0]) for line in lines]
    assert waits[0] < waits[5] <= 0.1
    assert [line.split("(attempt ")[1].split(",")[0] for line in lines[:6]] == list("123456")
    with Endpoint(port=port):
        thread.join(20)
    assert [v.score for v in result] == [1.0, 0.0, 0.0]
    assert judge.pop_metrics()["judge/retries"] >= 2 * len(lines)


def test_a_run_that_is_asked_to_stop_does_not_wait_for_the_judge():
    stopped = threading.Event()
    threading.Timer(0.3, stopped.set).start()
    judge = judge_of("http://127.0.0.1:9", stop=stopped.is_set, first_wait=60.0, max_wait=60.0)
    started = time.monotonic()
    with pytest.raises(JudgeInterrupted, match=r"127\.0\.0\.1:9"):
        judge([item("5")])
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("status", [400, 401, 404, 422, 301])
def test_refusals_name_endpoint_question_and_body(status):
    with Endpoint(script=[status] * 3) as endpoint, pytest.raises(InputError) as error:
        judge_of(endpoint.url)([item("5", id="q77"), item("6", id="q77"), item("7", id="q77")])
    for part in (endpoint.url, str(status), "told you so", "q77"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_an_endpoint_that_is_no_openai_server_is_named():
    with Endpoint(script=["not JSON"]) as endpoint, pytest.raises(InputError, match="not JSON") as error:
        judge_of(endpoint.url)([item("5")])
    assert endpoint.url in str(error.value)


def test_unreadable_verdicts_score_zero_are_counted_and_not_kept():
    with Endpoint(script=["I cannot say.", "<answer>1"]) as endpoint:
        judge = judge_of(endpoint.url, concurrency=1)
        verdicts = judge([item("5"), item("5 ")])
        assert [v.score for v in verdicts] == [0.0, 0.0]
        assert all(v.error for v in verdicts)
        assert judge.pop_metrics()["judge/error_rate"] == 1.0
        assert judge([item("5")])[0].score == 1.0
        assert judge.pop_metrics()["judge/error_rate"] == 0.0


def test_empty_and_degenerate_responses_score_zero_unasked():
    with Endpoint() as endpoint:
        verdicts = judge_of(endpoint.url)([item(""), item(" \n"), item("..."), item("5 5 5 5"), item("5")])
    assert [v.score for v in verdicts] == [0, 0, 0, 0, 1]
    assert len(endpoint.bodies) == 1


def test_equal_items_are_asked_about_once_and_remembered():
    with Endpoint() as endpoint:
        judge = judge_of(endpoint.url)
        assert [v.score for v in judge([item("5"), item("5"), item("6")])] == [1, 1, 0]
        assert [v.score for v in judge([item("6"), item("5", id="another")])] == [0, 1]
        assert len(endpoint.bodies) == 2
        assert judge.pop_metrics()["judge/cache_hits"] == 2
        judge([item("5", question="How few?"), item("5", solution="6")])
        assert len(endpoint.bodies) == 4


def test_cache_file_outlives_the_run_and_a_half_written_line(tmp_path):
    path, lines = tmp_path / "new" / "verdicts.jsonl", []
    with Endpoint() as endpoint:
        judge_of(endpoint.url, cache_path=str(path))([item("5"), item("6")])
        path.write_text(path.read_text()[:-9])  # killed while writing the second verdict
        again = judge_of(endpoint.url, lines, cache_path=str(path))
        assert "1 unreadable" in lines[0]
        assert str(path) in lines[0]
        assert sorted(v.score for v in again([item("5"), item("6")])) == [0, 1]
        assert len(endpoint.bodies) == 3
        third = judge_of(endpoint.url, cache_path=str(path))
        assert [v.score for v in third([item("5"), item("6")])] == [1, 0]
        assert len(endpoint.bodies) == 3
        judge_of(endpoint.url, cache_path=str(path), model="another")([item("5")])
        assert len(endpoint.bodies) == 4


def test_cache_file_that_cannot_be_used_is_named(tmp_path):
    with pytest.raises(InputError, match="cache_path"):
        judge_of("http://h", cache_path=str(tmp_path))


def test_memory_holds_the_verdicts_used_last():
    with Endpoint() as endpoint:
        judge = judge_of(endpoint.url, cache_size=2)
        for response in ("1", "2", "1", "3", "1"):
            judge([item(response)])
        assert len(endpoint.bodies) == 3
        judge([item("2")])
        assert len(endpoint.bodies) == 4


def test_judge_works_inside_a_running_event_loop():
    async def notebook_cell():
        return judge_of(endpoint.url)([item("5")])

    with Endpoint() as endpoint:
        assert asyncio.run(notebook_cell())[0].score == 1.0


def test_an_empty_solution_is_refused_by_both_judges():
    for judge in (RulesJudge(), judge_of("http://h")):
        with pytest.raises(InputError, match=r"'q9'.*solution is empty"):
            judge([item("5", solution=" ", id="q9")])


def test_rules_judge_scores_and_explains():
    verdicts = RulesJudge()([item("so 5"), item("so 6"), item("!!")])
    assert [v.score for v in verdicts] == [1.0, 0.0, 0.0]
    assert "degenerate" in verdicts[2].explanation
    assert RulesJudge().pop_metrics() == {"judge/error_rate": 0.0}


def test_make_judge_reads_one_config_for_every_kind():
    shared = {"base_url": "http://h:1", "model": "m", "relative_tolerance": 0.05, "patterns": [r"=(\d+)"]}
    assert make_judge({"kind": "none", **shared}) is None
    rules = make_judge({"kind": "rules", **shared})
    assert [v.score for v in rules([item("x=104", solution="100"), item("104", solution="100")])] == [1.0, 1.0]
    assert isinstance(make_judge({"kind": "openai", **shared}), OpenAIJudge)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "judge.kind"),
        ({"kind": "llm"}, "rules, openai, engine, none"),
        ({"kind": "rules", "modle": "x"}, "did you mean model"),
        ({"kind": "openai", "model": "m"}, "base_url"),
        ({"kind": "openai", "base_url": "localhost:8000", "model": "m"}, "base_url"),
        ({"kind": "openai", "base_url": "http://h"}, "judge.model"),
        ({"kind": "openai", "base_url": "http://h", "model": "m", "concurrency": 0}, "concurrency"),
        ({"kind": "openai", "base_url": "http://h", "model": "m", "max_wait": "long"}, "max_wait"),
        ({"kind": "engine", "model": "m"}, "judge.checkpoint is empty"),
        ({"kind": "engine", "checkpoint": "DIR", "dtype": "int8"}, "judge.dtype"),
    ],
)
def test_bad_judge_configs_are_refused(config, message):
    with pytest.raises(InputError, match=message):
        make_judge(config)
