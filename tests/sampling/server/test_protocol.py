"""Claims about what a request may say: a bad field is answered with 400 and its name, a neutral one is taken."""

import json

import pytest

from ril_jax.sampling.logits import SamplingParams
from ril_jax.sampling.server.errors import APIError
from ril_jax.sampling.server.protocol import Limits, parse_json, read_chat, read_completion

LIMITS = Limits(max_n=8, max_prompts=4, sampling=SamplingParams(), max_tokens=None)
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": "m", "prompt": "hi"}


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("model", None, "model"), ("model", 3, "model"), ("model", "", "model"),
        ("messages", None, "messages"), ("messages", [], "messages"), ("messages", "hi", "messages"),
        ("messages", ["hi"], "messages[0]"), ("messages", [{"content": "a"}], "messages[0].role"),
        ("messages", [*CHAT["messages"], {"role": "assistant", "tool_calls": [{}]}], "messages[1].tool_calls"),
        ("n", 0, "n"), ("n", 9, "n"), ("n", "2", "n"), ("n", True, "n"), ("n", 1.5, "n"),
        ("max_tokens", 0, "max_tokens"), ("max_tokens", -1, "max_tokens"), ("max_tokens", "many", "max_tokens"),
        ("max_completion_tokens", 0, "max_completion_tokens"),
        ("temperature", -0.1, "temperature"), ("temperature", "hot", "temperature"),
        ("temperature", float("nan"), "temperature"), ("temperature", float("inf"), "temperature"),
        ("temperature", 10**400, "temperature"), ("temperature", True, "temperature"),
        ("top_p", 1.1, "top_p"), ("top_p", -1, "top_p"), ("top_k", -2, "top_k"), ("top_k", 1.5, "top_k"),
        ("repetition_penalty", 0, "repetition_penalty"), ("repetition_penalty", -1, "repetition_penalty"),
        ("seed", 2**64, "seed"), ("seed", "x", "seed"), ("seed", 0.5, "seed"),
        ("stop", 3, "stop"), ("stop", ["a", 3], "stop"), ("stop", ["a"] * 65, "stop"), ("stop", "a" * 1025, "stop"),
        ("stream", "yes", "stream"), ("stream", 1, "stream"),
        ("stream_options", {"include_usage": True}, "stream_options"), ("stream_options", [], "stream_options"),
        ("logprobs", 5, "logprobs"), ("top_logprobs", 3, "top_logprobs"),
        ("tools", [{"type": "function"}], "tools"), ("tool_choice", "required", "tool_choice"),
        ("functions", [{}], "functions"), ("logit_bias", {"5": 1}, "logit_bias"),
        ("presence_penalty", 0.5, "presence_penalty"), ("frequency_penalty", -1, "frequency_penalty"),
        ("response_format", {"type": "json_object"}, "response_format"), ("response_format", "text", "response_format"),
        ("modalities", ["text", "audio"], "modalities"), ("min_p", 0.1, "min_p"), ("num_beams", 2, "num_beams"),
        ("guided_json", {}, "guided_json"), ("echo", True, "echo"),
        ("continue_final_message", True, "continue_final_message"),
    ],
)  # fmt: skip
def test_a_bad_field_of_a_chat_is_named(field, value, param):
    with pytest.raises(APIError) as error:
        read_chat(CHAT | {field: value}, LIMITS)
    assert (error.value.status, error.value.param) == (400, param)
    assert "\n" not in error.value.message
    assert error.value.body()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("prompt", None, "prompt"), ("prompt", [], "prompt"), ("prompt", [[]], "prompt"),
        ("prompt", ["a", 3], "prompt"),
        ("prompt", [1, True], "prompt"), ("prompt", [1, 2.5], "prompt"), ("prompt", {"a": 1}, "prompt"),
        ("prompt", ["a"] * 5, "prompt"), ("max_tokens", 0, "max_tokens"), ("logprobs", 21, "logprobs"),
        ("logprobs", True, "logprobs"), ("suffix", "end", "suffix"), ("best_of", 3, "best_of"), ("echo", "yes", "echo"),
    ],
)  # fmt: skip
def test_a_bad_field_of_a_completion_is_named(field, value, param):
    with pytest.raises(APIError) as error:
        read_completion(COMPLETION | {field: value}, LIMITS)
    assert (error.value.status, error.value.param) == (400, param)


def test_neutral_and_unknown_fields_change_nothing():
    neutral = {
        "tools": None, "tool_choice": "none", "logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0.0,
        "response_format": {"type": "text"}, "modalities": ["text"], "user": "me", "metadata": {"a": "b"}, "n": 1.0,
        "store": False, "service_tier": "auto", "parallel_tool_calls": True, "stream": False, "stop": None,
        "temperature": None, "top_p": None, "seed": 4, "dataset": "MMBench", "reasoning_effort": "medium",
    }  # fmt: skip
    assert read_chat(CHAT | neutral, LIMITS) == read_chat(CHAT | {"seed": 4}, LIMITS)


def test_fields_mean_what_openai_says():
    options = read_chat(CHAT | {"max_completion_tokens": 7, "max_tokens": 9}, LIMITS).options
    assert options.max_tokens == 7
    assert options.sampling == SamplingParams(temperature=1.0, top_p=1.0, top_k=0, repetition_penalty=1.0)
    assert read_chat(CHAT, LIMITS).options.max_tokens is None
    assert read_completion(COMPLETION, LIMITS).options.max_tokens == 16
    assert read_completion(COMPLETION | {"max_tokens": 0, "echo": True}, LIMITS).options.max_tokens == 0
    assert read_chat(CHAT | {"logprobs": True}, LIMITS).options.logprobs == 0
    assert read_chat(CHAT | {"stop": "a"}, LIMITS).options.stop == ("a",)
    assert read_chat(CHAT | {"stop": ["a", "", "a"]}, LIMITS).options.stop == ("a",)
    developer = read_chat(CHAT | {"messages": [{"role": "developer", "content": "a"}]}, LIMITS)
    assert developer.messages == [{"role": "system", "content": "a"}]
    assert read_chat(CHAT, LIMITS).options.seed != read_chat(CHAT, LIMITS).options.seed
    for prompt, prompts in (("a", ["a"]), ([1, 2], [[1, 2]]), (["a", "b"], ["a", "b"]), ([[1], [2]], [[1], [2]])):
        assert read_completion(COMPLETION | {"prompt": prompt}, LIMITS).prompts == prompts


def test_edges_of_sampling_are_what_they_tend_to():
    assert read_chat(CHAT | {"temperature": 1e-6}, LIMITS).options.sampling.temperature == 0
    assert 0 < read_chat(CHAT | {"top_p": 0}, LIMITS).options.sampling.top_p < 1e-5
    assert read_chat(CHAT | {"top_k": -1}, LIMITS).options.sampling.top_k == 0
    assert read_chat(CHAT | {"top_k": 10**30}, LIMITS).options.sampling.top_k == 2**31 - 1
    assert read_chat(CHAT | {"max_tokens": 10**30}, LIMITS).options.max_tokens == 2**31 - 1
    assert read_chat(CHAT | {"n": 5, "temperature": 0}, LIMITS).options.draws == 1


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[1]", b'"a"', b"\xff\xfe\x00", b'{"a": "\\ud800"}', b"[" * 100_000, b'{"a": 1' + b"0" * 5000 + b"}"],
    ids=["empty", "half", "list", "text", "bytes", "surrogate", "deep", "long"],
)
def test_a_body_that_is_no_object_is_refused(data):
    with pytest.raises(APIError) as error:
        parse_json(data)
    assert error.value.status == 400


def test_pairs_of_surrogates_are_a_character():
    assert parse_json(json.dumps({"a": "🙂"}).encode()) == {"a": "🙂"}


def test_the_configs_sampling_is_the_default_where_it_says_so():
    from ril_jax.config import serving_config

    config = serving_config()
    assert Limits.from_config(config).sampling == SamplingParams()
    assert Limits.from_config(config).max_tokens is None
    config.server.default_sampling = "config"
    limits = Limits.from_config(config)
    assert limits.sampling == SamplingParams(1.0, 0.95, 50, 1.05)
    assert read_chat(CHAT, limits).options.max_tokens == 512
    assert read_chat(CHAT | {"top_k": 0, "max_tokens": 3}, limits).options.sampling == SamplingParams(
        1.0, 0.95, 0, 1.05
    )
