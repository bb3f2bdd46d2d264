"""OpenAI's answers: what a request got, whole or piece by piece."""

import dataclasses
import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from ril_jax.sampling.server.token_texts import Offsets, TokenTexts

Alternatives = Sequence[tuple[int, float]]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A token with its log-probability (None for a text's first one) and its alternatives, best first."""

    token_id: int
    logprob: float | None
    top: Alternatives = ()


@dataclasses.dataclass(frozen=True)
class Piece:
    """News of one choice: text that it adds, its tokens' entries, and why it ended if it did.

    `echoed`: it is a part of the prompt.
    """

    choice: int
    text: str
    entries: list[Entry]
    finish_reason: str | None = None
    echoed: bool = False


class Answer:
    """Puts the pieces of one request into OpenAI's form.

    texts: None where no log-probabilities are asked for.
    """

    def __init__(self, model: str, choices: int, texts: TokenTexts | None):
        self.created = int(time.time())
        self._model, self._choices, self._texts = model, choices, texts
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"

    prefix = ""
    whole_object = ""
    part_object = ""

    def whole(self, pieces: Sequence[Piece], usage: dict[str, int]) -> dict[str, Any]:
        """The answer without streaming."""
        choices = []
        for index in range(self._choices):
            mine = [piece for piece in pieces if piece.choice == index]
            text = "".join(piece.text for piece in mine)
            logprobs = None if self._texts is None else self._logprobs(index, mine)
            finish = mine[-1].finish_reason
            choices.append(self._choice(index, text) | {"logprobs": logprobs, "finish_reason": finish})
        return self._frame(self.whole_object) | {"choices": choices, "usage": usage}

    def first(self) -> list[dict[str, Any]]:
        """What a stream begins with."""
        return []

    def part(self, piece: Piece) -> dict[str, Any]:
        """A piece of a stream."""
        logprobs = None
        if self._texts is not None and (piece.entries or piece.echoed):
            logprobs = self._logprobs(piece.choice, [piece])
        choice = self._delta(piece) | {"logprobs": logprobs, "finish_reason": piece.finish_reason}
        return self._frame(self.part_object) | {"choices": [choice]}

    def end(self, usage: dict[str, int]) -> dict[str, Any]:
        """A stream's last chunk, with the usage."""
        return self._frame(self.part_object) | {"choices": [], "usage": usage}

    def _frame(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self._model}

    def _choice(self, index: int, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def _delta(self, piece: Piece) -> dict[str, Any]:
        raise NotImplementedError

    def _logprobs(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        raise NotImplementedError


class ChatAnswer(Answer):
    """Of /v1/chat/completions."""

    prefix, whole_object, part_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def first(self) -> list[dict[str, Any]]:
        delta = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return [
            self._frame(self.part_object) | {"choices": [{"index": index} | delta]} for index in range(self._choices)
        ]

    def _choice(self, index: int, text: str) -> dict[str, Any]:
        return {"index": index, "message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, piece: Piece) -> dict[str, Any]:
        return {"index": piece.choice, "delta": {"content": piece.text} if piece.text else {}}

    def _logprobs(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        entries = [entry for piece in pieces for entry in piece.entries]
        content = [
            self._token(entry.token_id, entry.logprob)
            | {"top_logprobs": [self._token(token, logprob) for token, logprob in entry.top]}
            for entry in entries
        ]
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        assert self._texts is not None
        return {
            "token": self._texts.text(token_id),
            "logprob": _finite(logprob),
            "bytes": list(self._texts.encoded(token_id)),
        }


class CompletionAnswer(Answer):
    """Of /v1/completions."""

    prefix, whole_object, part_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, choices: int, texts: TokenTexts | None):
        super().__init__(model, choices, texts)
        self._offsets = [Offsets() for _ in range(choices)]

    def _choice(self, index: int, text: str) -> dict[str, Any]:
        return {"index": index, "text": text}

    def _delta(self, piece: Piece) -> dict[str, Any]:
        return {"index": piece.choice, "text": piece.text}

    def _logprobs(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        texts = self._texts
        assert texts is not None
        entries = [entry for piece in pieces for entry in piece.entries]
        # A special token that was drawn has no place in the text; one of the prompt is written out.
        written = [
            b"" if not piece.echoed and entry.token_id in texts.special else texts.encoded(entry.token_id)
            for piece in pieces
            for entry in piece.entries
        ]
        return {
            "tokens": [texts.text(entry.token_id) for entry in entries],
            "token_logprobs": [_finite(entry.logprob) for entry in entries],
            "top_logprobs": [self._top(entry) for entry in entries],
            "text_offset": self._offsets[index].next(written),
        }

    def _top(self, entry: Entry) -> dict[str, float] | None:
        """The alternatives by their texts, the token itself among them; of two that are written alike the better."""
        if entry.logprob is None:
            return None
        assert self._texts is not None
        found: dict[str, float] = {}
        for token, logprob in (*entry.top, (entry.token_id, entry.logprob)):
            value = _finite(logprob)
            assert value is not None
            text = self._texts.text(token)
            found[text] = max(value, found.get(text, value))
        return found


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """OpenAI's `usage`."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def dumps(value: Any) -> bytes:
    """Compact JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def event(value: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + dumps(value) + b"\n\n"


def _finite(logprob: float | None) -> float | None:
    """JSON has no infinity; a token that the model excludes gets what OpenAI writes for one."""
    return None if logprob is None else max(logprob, -9999.0)
