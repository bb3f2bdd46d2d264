"""What callers hand to the engine, what it tells them, and what it knows of each request while it runs."""

import dataclasses
from collections import deque
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from ril_jax.sampling.logits import SamplingParams
from ril_jax.sampling.pages import Segment

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclasses.dataclass(frozen=True)
class Tokens:
    """News of one sample of a request: what was drawn since the last news, and why it ended if it did.

    `top`: for every token its alternatives as (ids, logprobs), best first; None if none were asked for.
    """

    sample: int
    token_ids: list[int]
    logprobs: list[float]
    top: list[tuple[np.ndarray, np.ndarray]] | None = None
    finish_reason: FinishReason | None = None
    error: str = ""


@dataclasses.dataclass(frozen=True)
class Scored:
    """Log-probabilities of a scored text's tokens, from the request's first one on; `top` as of `Tokens`."""

    logprobs: list[float]
    top: list[tuple[np.ndarray, np.ndarray]]
    error: str = ""


@dataclasses.dataclass(frozen=True)
class Request:
    """What to sample from one prompt.

    Attributes:
      prompt: an `EncodedPrompt`. n: samples. max_tokens: of each; clipped to what the context leaves.
      seed: sample i draws from (seed, i) alone. top_logprobs: alternatives a token, up to 20.
      ignore_eos: go on until max_tokens (benchmarks).
    """

    prompt: Any
    n: int = 1
    max_tokens: int = 128
    sampling: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    seed: int = 0
    top_logprobs: int = 0
    ignore_eos: bool = False

    @property
    def full(self) -> bool:
        """Whether it needs the decode program that filters and tells alternatives."""
        s = self.sampling
        filters = s.temperature > 0 and (s.top_p < 1.0 or s.top_k > 0)
        return filters or s.repetition_penalty != 1.0 or self.top_logprobs > 0


@dataclasses.dataclass(frozen=True)
class ScoreRequest:
    """A text to score: `prompt` (an `EncodedPrompt`) holds all of it; log-probabilities are told from `first` on."""

    prompt: Any
    first: int = 1
    top_logprobs: int = 0


@dataclasses.dataclass(eq=False)
class Sample:
    """One response: waiting, then in a slot, then done."""

    job: "Job"
    index: int
    slot: int = -1
    pages: list[int] = dataclasses.field(default_factory=list)
    drawn: int = 0
    done: bool = False


@dataclasses.dataclass(eq=False)
class Job:
    """A submitted request. `notify` is called from the engine's thread with `Tokens` or `Scored`."""

    request: Any
    notify: Callable[[Any], None]
    number: int
    arrays: Any  # PromptBatch of this one row
    limit: int
    keys: list[bytes] = dataclasses.field(default_factory=list)
    whole_key: bytes = b""
    image_rows: list[tuple[bytes, int, int, Any]] = dataclasses.field(default_factory=list)
    # While it runs:
    segments: list[Segment] = dataclasses.field(default_factory=list)
    end: Segment | None = None
    done_tokens: int = 0  # of the prompt, in the cache
    samples: list[Sample] = dataclasses.field(default_factory=list)
    waiting: deque[Sample] = dataclasses.field(default_factory=deque)
    running: int = 0
    reserved: int = 0
    score_pages: list[int] = dataclasses.field(default_factory=list)
    scores: list[Any] = dataclasses.field(default_factory=list)
    cancelled: bool = False
    cancelled_samples: set[int] = dataclasses.field(default_factory=set)
    submitted: float = 0.0

    @property
    def length(self) -> int:
        return len(self.request.prompt.token_ids)

    @property
    def scoring(self) -> bool:
        return isinstance(self.request, ScoreRequest)
