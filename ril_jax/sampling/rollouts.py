"""Groups of responses by the engine: a response leaves when it ends, and another question's takes its place.

`Sampler` decodes the groups of a batch in one program until the longest response has ended; here no slot waits for
that. What is drawn for a question depends on its seed and nothing else, so both may be resumed and reordered.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from ril_jax.data.chat import ChatTokenizer, EncodedPrompt
from ril_jax.models.parameters import Params
from ril_jax.sampling.engine import Engine
from ril_jax.sampling.gather import run_each
from ril_jax.sampling.logits import SamplingParams
from ril_jax.sampling.requests import Request
from ril_jax.sampling.sampler import Samples


class EngineSampler:
    """Samples G responses to every question with an engine that has no thread of its own.

    Between calls the engine sleeps, and training has the memory of its pages. launching: as of `gather.run_each`.
    before_step: called before every step; what it raises ends the call, and the requests that were running are dropped.
    """

    def __init__(
        self,
        engine: Engine,
        chat: ChatTokenizer,
        *,
        launching: Callable[[], AbstractContextManager] = nullcontext,
        before_step: Callable[[], None] = lambda: None,
    ):
        self.engine, self._chat = engine, chat
        self._launching, self._before_step = launching, before_step

    def __call__(
        self,
        params: Params,
        prompts: Sequence[EncodedPrompt],
        keys: np.ndarray,
        *,
        num_samples: int,
        max_tokens: int,
        sampling: SamplingParams,
        ended: Callable[[int, list[Any]], None] = lambda index, results: None,
    ) -> Samples:
        """Sample G responses of at most R tokens to each of B prompts.

        Args:
          params: of the network, in the engine's dtype; they are used where they lie.
          prompts: B, with their images. keys: [B, 2] uint32, one a question.
          ended: told of every question's `gather.Result`s when its last response has ended, in any order.

        Returns: `Samples` of numpy arrays. Raises InputError for a prompt that the engine has no room for.
        """
        engine, shape = self.engine, (len(prompts), num_samples, max_tokens)
        token_ids: np.ndarray = np.full(shape, self._chat.pad_token_id, np.int32)
        mask, logprobs = np.zeros(shape, bool), np.zeros(shape, np.float32)
        finished: np.ndarray = np.zeros(shape[:2], bool)
        with self._launching():
            engine.set_params(params)
        before = engine.stats.decode_steps
        try:
            for b, results in run_each(
                engine, self._chat, self._requests(prompts, keys, num_samples, max_tokens, sampling),
                in_flight=max(2, -(-2 * engine.shapes.slots // num_samples)),
                before_step=self._before_step, launching=self._launching,
            ):  # fmt: skip
                for g, result in enumerate(results):
                    count = len(result.token_ids)
                    token_ids[b, g, :count], logprobs[b, g, :count] = result.token_ids, result.logprobs
                    mask[b, g, :count] = True
                    finished[b, g] = result.finish_reason == "stop"
                ended(b, results)
        finally:
            if not (engine.num_running or engine.num_waiting):
                engine.sleep()
        steps: Any = np.int32(engine.stats.decode_steps - before)
        return Samples(token_ids, mask, logprobs, finished, steps)  # type: ignore[arg-type]

    def _requests(
        self, prompts: Sequence[EncodedPrompt], keys: np.ndarray, n: int, max_tokens: int, sampling: SamplingParams
    ) -> Iterator[tuple[int, Request]]:
        for b, prompt in enumerate(prompts):
            seed = int(keys[b, 0]) << 32 | int(keys[b, 1])
            yield b, Request(prompt, n=n, max_tokens=max_tokens, sampling=sampling, seed=seed)
