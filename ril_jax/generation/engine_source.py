"""Responses from the sampling engine in this process."""

import threading
from typing import Any

from ml_collections import ConfigDict

from ril_jax.data.chat import ChatTokenizer
from ril_jax.data.images import decode_image
from ril_jax.data.records import Question, Response, question_prompt
from ril_jax.errors import InputError
from ril_jax.generation.outcomes import Outcome, Tell, question_seed
from ril_jax.sampling.engine import Engine
from ril_jax.sampling.gather import Gather, Result
from ril_jax.sampling.logits import SamplingParams
from ril_jax.sampling.requests import Job, Request


class EngineSource:
    """N samples a question, which share its prompt; the engine is started, and runs in a thread of its own.

    A response's tokens depend on the weights, the config's seed, the question's id and its number alone.
    """

    remote = False

    def __init__(self, engine: Engine, chat: ChatTokenizer, config: ConfigDict, *, name: str):
        """`config`: a serving_config."""
        s = config.sampling
        self.name, self._engine, self._chat = name, engine, chat
        self._sampling = SamplingParams(s.temperature, s.top_p, s.top_k, s.repetition_penalty)
        self._max_tokens, self._seed = s.max_completion_length, config.seed
        self._n = config.generate.num_generations
        self._jobs: dict[int, Job] = {}  # by the request
        self._lock = threading.Lock()
        engine.start()

    def prepare(self, question: Question) -> Request:
        name = f"question {question.id}"
        images = [decode_image(data, name=f"{name}, image {i}") for i, data in enumerate(question.images)]
        messages = self._chat.messages(question_prompt(question), len(images), name=name)
        prompt = self._chat.encode_prompt(messages, images, name=name)
        seed = question_seed(self._seed, question.id)
        return Request(prompt, n=self._n, max_tokens=self._max_tokens, sampling=self._sampling, seed=seed)

    def start(self, prepared: Request, tell: Tell) -> None:
        def done(results: list[Result], error: str) -> None:
            with self._lock:
                self._jobs.pop(id(prepared), None)
            if error:
                tell(RuntimeError(error))
                return
            responses = [Response(self.name, r.text, len(r.token_ids), r.finish_reason) for r in results]
            tell(Outcome(tuple(responses), len(prepared.prompt.token_ids)))

        with self._lock:  # so that it is known before it can end
            try:
                self._jobs[id(prepared)] = self._engine.submit(prepared, Gather(self._chat, prepared, done))
                return
            except InputError as error:  # it can never run
                reason = str(error)
        tell(Outcome(failed=reason))

    def close(self) -> None:
        """Stop the engine and whatever is running."""
        with self._lock:
            jobs = list(self._jobs.values())
        for job in jobs:
            self._engine.cancel(job)
        self._engine.close()


def engine_fields(config: ConfigDict, digest: str) -> dict[str, Any]:
    """Of the config, what the responses depend on; digest: of the checkpoint."""
    return {
        "checkpoint": digest,
        "dtype": config.dtype,
        "image limits": [config.min_pixels, config.max_pixels, config.max_tiles],
        "engine.max_model_len": config.engine.max_model_len,
    }
