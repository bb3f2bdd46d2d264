"""What clients may ask for: the fields of OpenAI's requests, each checked, as plain objects.

Fields that would change the result and are not served are refused unless they ask for nothing; all others that are not
known (`user`, `metadata`, ...) are ignored.
"""

import dataclasses
import json
import re
import secrets
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from ril_jax.sampling.engine_programs import TOP_LOGPROBS
from ril_jax.sampling.logits import SamplingParams
from ril_jax.sampling.server.errors import APIError

MAX_STOP_STRINGS, MAX_STOP_LENGTH = 64, 1024
_MAX_INTEGER = 2**31 - 1  # what the engine's arrays hold
_GREEDY_BELOW = 1e-5  # a temperature at which the logits would overflow, and nothing but the best token is drawn
_LEAST_TOP_P = 1e-6  # keeps the best token alone, as 0 asks for

# Field -> the values that ask for nothing.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
    "suffix": (None, ""),
    "min_p": (None, 0),
    "min_tokens": (None, 0),
    "num_beams": (None, 1),
    "use_beam_search": (None, False),
    "length_penalty": (None, 1),
    "stop_token_ids": (None, []),
    "bad_words": (None, []),
    "allowed_token_ids": (None,),
    "prompt_logprobs": (None,),
    "truncate_prompt_tokens": (None,),
    "add_generation_prompt": (None, True),
    "continue_final_message": (None, False),
    "include_stop_str_in_output": (None, False),
    "chat_template": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "structured_outputs": (None, {}),
}
_REFUSED_IN_MESSAGES = ("tool_calls", "function_call", "audio")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a request may ask for at most, and what it gets where it does not say."""

    max_n: int
    max_prompts: int
    sampling: SamplingParams
    max_tokens: int | None  # None: as OpenAI has it, all that fits in a chat, and 16 in a completion

    @classmethod
    def from_config(cls, config: ConfigDict) -> "Limits":
        """`config`: a `config.serving_config`."""
        s = config.sampling
        if config.server.default_sampling == "config":
            sampling = SamplingParams(s.temperature, s.top_p, s.top_k, s.repetition_penalty)
            return cls(config.server.max_n, config.server.max_queue, sampling, s.max_completion_length)
        return cls(config.server.max_n, config.server.max_queue, SamplingParams(), None)


@dataclasses.dataclass(frozen=True)
class Options:
    """What both kinds of requests have.

    Attributes:
      max_tokens: None for all that fits. logprobs: alternatives a token, None where no log-probabilities are asked for.
      seed: drawn where the request has none.
    """

    model: str
    n: int
    max_tokens: int | None
    sampling: SamplingParams
    seed: int
    stop: tuple[str, ...]
    logprobs: int | None
    stream: bool
    include_usage: bool
    ignore_eos: bool

    @property
    def draws(self) -> int:
        """Samples that differ; greedy ones are all the same."""
        return 1 if self.sampling.temperature == 0 else self.n


@dataclasses.dataclass(frozen=True)
class ChatCall:
    """A request for /v1/chat/completions; `messages` have role and content, which is not looked into yet."""

    options: Options
    messages: list[dict[str, Any]]
    echo: bool = False


@dataclasses.dataclass(frozen=True)
class CompletionCall:
    """A request for /v1/completions; a prompt is a text or token ids."""

    options: Options
    prompts: list[str | list[int]]
    echo: bool


def parse_json(data: bytes) -> dict[str, Any]:
    """The object that a body holds. Raises APIError (400)."""
    try:
        body = json.loads(data)
        if _SURROGATE.search(data):  # half of a pair, alone: no text that can be encoded
            json.dumps(body, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise APIError(400, f"the body is not valid JSON: {_one_line(error)}") from None
    if not isinstance(body, dict):
        raise APIError(400, "the body must be a JSON object")
    return body


_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_chat(body: Mapping[str, Any], limits: Limits) -> ChatCall:
    """Checks a chat request. Raises APIError (400) that names the field."""
    fields = _Fields(body)
    if not fields.flag("logprobs") and body.get("top_logprobs"):
        raise APIError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    logprobs = fields.integer("top_logprobs", 0, 0, TOP_LOGPROBS) if fields.flag("logprobs") else None
    names = [name for name in ("max_completion_tokens", "max_tokens") if body.get(name) is not None]
    max_tokens = fields.integer(names[0], None, 1) if names else limits.max_tokens
    if fields.flag("echo"):
        raise APIError(400, "echo is for /v1/completions; a chat is not given back", param="echo")
    return ChatCall(_options(fields, limits, max_tokens, logprobs), _messages(body.get("messages")))


def read_completion(body: Mapping[str, Any], limits: Limits) -> CompletionCall:
    """Checks a completion request. Raises APIError (400) that names the field."""
    fields = _Fields(body)
    echo = fields.flag("echo")
    logprobs = fields.integer("logprobs", None, 0, TOP_LOGPROBS)
    default = 16 if limits.max_tokens is None else limits.max_tokens
    max_tokens = fields.integer("max_tokens", default, 0 if echo else 1)
    options = _options(fields, limits, max_tokens, logprobs)
    best_of = fields.integer("best_of", options.n, 1)
    if best_of != options.n:
        raise APIError(400, f"best_of is {best_of}; only that of n, {options.n}, is served", param="best_of")
    return CompletionCall(options, _prompts(body.get("prompt"), limits), echo)


def _options(fields: "_Fields", limits: Limits, max_tokens: int | None, logprobs: int | None) -> Options:
    body = fields.body
    _refuse(body)
    stream = fields.flag("stream")
    seed = fields.integer("seed", None, -(2**63), 2**64 - 1)
    return Options(
        model=fields.text("model"),
        n=fields.integer("n", 1, 1, limits.max_n, "config.server.max_n"),
        max_tokens=max_tokens,
        sampling=_sampling(fields, limits.sampling),
        seed=secrets.randbits(63) if seed is None else seed % 2**64,
        stop=_stop(body.get("stop")),
        logprobs=logprobs,
        stream=stream,
        include_usage=_include_usage(body.get("stream_options"), stream),
        ignore_eos=fields.flag("ignore_eos"),
    )


def _sampling(fields: "_Fields", default: SamplingParams) -> SamplingParams:
    temperature = fields.number("temperature", default.temperature, 0, 1e4)
    top_k = fields.integer("top_k", default.top_k, -1)
    top_p = fields.number("top_p", default.top_p, 0, 1)
    penalty = fields.number("repetition_penalty", default.repetition_penalty, 1e-4, 1e4)
    return SamplingParams(
        temperature=temperature if temperature >= _GREEDY_BELOW else 0.0,
        top_p=max(top_p, _LEAST_TOP_P),
        top_k=max(top_k, 0),
        repetition_penalty=penalty,
    )


def _refuse(body: Mapping[str, Any]) -> None:
    for name, neutral in _REFUSED.items():
        value = body.get(name)
        if value not in neutral:
            raise APIError(400, f"{name} is not supported; leave it out", param=name)
    form = body.get("response_format")
    if form is not None and (not isinstance(form, Mapping) or form.get("type") != "text"):
        raise APIError(400, 'response_format can only be {"type": "text"}; leave it out', param="response_format")


def _include_usage(value: Any, stream: bool) -> bool:
    if value is None:
        return False
    if not isinstance(value, Mapping):
        raise APIError(400, "stream_options must be an object", param="stream_options")
    if not stream:
        raise APIError(400, "stream_options is only for stream: true", param="stream_options")
    return _Fields(value, "stream_options.").flag("include_usage")


def _stop(value: Any) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(strings, list) or not all(isinstance(s, str) for s in strings):
        raise APIError(400, "stop must be a string or a list of strings", param="stop")
    if len(strings) > MAX_STOP_STRINGS or any(len(s) > MAX_STOP_LENGTH for s in strings):
        raise APIError(
            400, f"stop may have {MAX_STOP_STRINGS} strings of {MAX_STOP_LENGTH} characters at most", param="stop"
        )
    return tuple(dict.fromkeys(s for s in strings if s))


def _messages(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise APIError(400, "messages must be a list of at least one message", param="messages")
    messages = []
    for i, message in enumerate(value):
        if not isinstance(message, Mapping):
            raise APIError(400, f"messages[{i}] must be an object with role and content", param=f"messages[{i}]")
        for name in _REFUSED_IN_MESSAGES:
            if message.get(name):
                raise APIError(400, f"messages[{i}].{name} is not supported", param=f"messages[{i}].{name}")
        role = message.get("role")
        if not isinstance(role, str):
            raise APIError(400, f"messages[{i}].role must be a string", param=f"messages[{i}].role")
        messages.append({"role": "system" if role == "developer" else role, "content": message.get("content")})
    return messages


def _prompts(value: Any, limits: Limits) -> list[str | list[int]]:
    if isinstance(value, str) or _is_tokens(value):
        prompts = [value]
    elif isinstance(value, list) and value and all(isinstance(p, str) or _is_tokens(p) for p in value):
        prompts = value
    else:
        raise APIError(
            400, "prompt must be a string, a list of token ids, or a list of at least one of these", param="prompt"
        )
    if len(prompts) > limits.max_prompts:
        raise APIError(
            400, f"{len(prompts)} prompts, and config.server.max_queue is {limits.max_prompts}", param="prompt"
        )
    return prompts


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(i) is int for i in value)


class _Fields:
    """Reads single fields; null is the same as a field that is left out."""

    def __init__(self, body: Mapping[str, Any], prefix: str = ""):
        self.body, self._prefix = body, prefix

    def text(self, name: str) -> str:
        value = self.body.get(name)
        if not isinstance(value, str) or not value:
            raise self._error(name, "must be a string that is not empty")
        return value

    def flag(self, name: str) -> bool:
        value = self.body.get(name)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise self._error(name, "must be true or false")
        return value

    def integer(self, name: str, default: Any, least: int, most: int = _MAX_INTEGER, why: str = "") -> Any:
        value = self.body.get(name)
        if value is None:
            return default
        if isinstance(value, float) and value.is_integer():  # 16.0, as some clients write it
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._error(name, "must be a whole number")
        if most == _MAX_INTEGER:
            value = min(value, most)  # as much as there is
        if not least <= value <= most:
            raise self._error(name, f"must be from {least} to {most}{f' ({why})' if why else ''}")
        return value

    def number(self, name: str, default: float, least: float, most: float) -> float:
        value = self.body.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
            raise self._error(name, "must be a number")
        if not least <= value <= most:
            raise self._error(name, f"must be from {least:g} to {most:g}")
        return float(value)

    def _error(self, name: str, what: str) -> APIError:
        value = self.body.get(name)
        shown = json.dumps(value) if value is None or isinstance(value, str | int | float) else type(value).__name__
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        return APIError(400, f"{self._prefix}{name} is {shown}; it {what}", param=self._prefix + name)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
