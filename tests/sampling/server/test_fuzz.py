"""Claim: whatever is sent, the answer is a result or a 4xx in OpenAI's form, and the engine goes on as before."""

import json

import httpx
from helpers.served import assert_idle, data_url, image_part, picture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ODD = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8) | st.just("\ud800")
    | st.lists(st.integers(-3, 300), max_size=4) | st.dictionaries(st.text(max_size=3), st.integers(), max_size=2)
)  # fmt: skip
URLS = st.sampled_from(
    [
        data_url(picture(28, 40)), data_url(picture(60, 30), "JPEG"), data_url(picture(1, 300)),
        data_url(picture(1, 1)),
        "data:image/png;base64,AAAA", "data:,", "http://127.0.0.1/", "file:///etc/passwd", "", "https://[",
    ]
)  # fmt: skip
TEXTS = st.text(max_size=40) | st.sampled_from(["<|im_end|>", "<image>", "<|image_pad|>", "\0", "🙂" * 9, "a" * 2000])
PARTS = (
    st.builds(lambda text: {"type": "text", "text": text}, TEXTS)
    | st.builds(image_part, URLS)
    | st.dictionaries(st.sampled_from(["type", "text", "image_url", "image", "path"]), ODD, max_size=3)
    | ODD
)
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "system", "assistant", "tool", "developer", "king"]) | ODD},
    optional={"content": TEXTS | st.lists(PARTS, max_size=5) | ODD, "name": ODD, "tool_calls": ODD, "type": ODD},
)
GOOD = {
    "n": st.integers(1, 3), "max_tokens": st.integers(1, 12), "temperature": st.floats(0, 3), "stream": st.booleans(),
    "top_p": st.floats(0, 1), "top_k": st.integers(-1, 400), "seed": st.integers(-(2**63), 2**64 - 1),
    "repetition_penalty": st.floats(0.1, 5), "stop": TEXTS | st.lists(st.text(max_size=3), max_size=3),
    "stream_options": st.builds(lambda flag: {"include_usage": flag}, st.booleans()), "user": ODD,
}  # fmt: skip


def bodies(required, optional):
    """Each field good, odd or absent."""
    fields = {name: value | ODD for name, value in (GOOD | optional).items()}
    mostly_good = st.fixed_dictionaries(required, optional=GOOD | optional)
    return mostly_good | st.fixed_dictionaries({}, optional=fields | {k: v | ODD for k, v in required.items()})


CHATS = bodies(
    {
        "model": st.just("tiny"),
        "messages": st.lists(MESSAGES, max_size=3) | st.just([{"role": "user", "content": "a"}]),
    },
    {"logprobs": st.booleans(), "top_logprobs": st.integers(0, 20), "tools": ODD, "response_format": ODD},
)
COMPLETIONS = bodies(
    {
        "model": st.just("tiny"),
        "prompt": TEXTS | st.lists(st.integers(0, 293), max_size=9) | st.lists(TEXTS, max_size=3),
    },
    {"logprobs": st.integers(0, 20), "echo": st.booleans(), "suffix": ODD, "best_of": ODD},
)
CONTROL = {"model": "tiny", "messages": [{"role": "user", "content": "How many?"}], "max_tokens": 8, "seed": 1}
RELAXED = settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))


def ask(http, path, body):
    """The body as a client would write it; JSON has no word for some numbers, and Python writes them all the same."""
    response = http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    assert response.status_code == 200 or 400 <= response.status_code < 500, (response.status_code, response.text)
    if response.status_code != 200:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"].strip()
    elif response.headers["content-type"].startswith("text/event-stream"):
        events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
        assert events.pop() == "[DONE]"
        assert not any("error" in json.loads(event) for event in events)
    else:
        assert all(choice["finish_reason"] in ("stop", "length") for choice in response.json()["choices"])


def test_any_chat(served):
    fuzz(served, "/v1/chat/completions", CHATS)


def test_any_completion(served):
    fuzz(served, "/v1/completions", COMPLETIONS)


def fuzz(served, path, strategy):
    with httpx.Client(base_url=served.url, timeout=60) as http:
        expected = http.post("/v1/chat/completions", json=CONTROL).json()["choices"]

        @RELAXED
        @given(strategy)
        def anything(body):
            ask(http, path, body)

        anything()
        assert http.post("/v1/chat/completions", json=CONTROL).json()["choices"] == expected
        assert http.get("/health").status_code == 200
    assert_idle(served.engine)
    assert served.engine.counter.after_warm == 0


def test_bytes_that_are_no_json(served):
    @settings(max_examples=60, deadline=None)
    @given(st.binary(max_size=60) | st.text(max_size=40).map(str.encode))
    def anything(data):
        response = http.post("/v1/chat/completions", content=data, headers={"content-type": "application/json"})
        assert response.status_code == 400

    with httpx.Client(base_url=served.url) as http:
        anything()
