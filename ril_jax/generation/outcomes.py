"""What comes of a question, and who gives it."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from ril_jax.data.records import Question, Response
from ril_jax.models.parameters import hash_name


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Responses to one question, or why there are none; `prompt_tokens` as far as they were paid for."""

    responses: tuple[Response, ...] = ()
    prompt_tokens: int = 0
    failed: str = ""

    def to_json(self) -> dict[str, Any]:
        fields = {"prompt_tokens": self.prompt_tokens, "failed": self.failed}
        return fields | {"responses": [dataclasses.asdict(response) for response in self.responses]}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Outcome":
        responses = tuple(Response(**response) for response in value["responses"])
        return cls(responses, int(value["prompt_tokens"]), str(value["failed"]))


Tell = Callable[[Outcome | BaseException], None]


class ResponseSource(Protocol):
    """Gives responses to questions, several questions at a time."""

    name: str  # what the responses are filed under
    remote: bool  # whether a failure may be the source's and not the question's

    def prepare(self, question: Question) -> Any:
        """Everything about a question that can be done in a thread of one's own; InputError where it has no use."""

    def start(self, prepared: Any, tell: Tell) -> None:
        """Begin with a question; `tell` is called once, from any thread, with an exception where the job must end."""

    def close(self) -> None:
        """Let go of what is running."""


def question_seed(seed: int, question_id: str) -> int:
    """64 bits that depend on the run's seed and the question's id alone."""
    return int(np.random.SeedSequence([seed, hash_name(question_id)]).generate_state(1, np.uint64)[0])


def sample_seed(seed: int, question_id: str, sample: int) -> int:
    """31 bits (what every endpoint takes) that depend on the run's seed, the question's id and the sample alone."""
    return int(np.random.SeedSequence([seed, hash_name(question_id), sample]).generate_state(1)[0]) >> 1


def question_digest(question: Question) -> str:
    """What was asked: prompt and images."""
    state = hashlib.blake2b(json.dumps([question.id, question.prompt, question.solution]).encode(), digest_size=8)
    for image in question.images:
        state.update(len(image).to_bytes(8, "little") + image)
    return state.hexdigest()
