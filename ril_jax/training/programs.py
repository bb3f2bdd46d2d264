"""The compiled programs of one trained model; made once a run, so that every stage and arm shares them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ril_jax import objectives, sharding
from ril_jax.models.parameters import Network, Params, cast
from ril_jax.models.rows import response_hidden, response_logprobs


@dataclasses.dataclass(frozen=True, eq=False)
class Programs:
    """Encoding, scoring and losses of one network in its compute dtype.

    Attributes:
      dtype, remat, chunk: of `config.student` (compute dtype, what the backward pass keeps, tokens a log-prob chunk).
      unroll: layers per scan step; straight-line code (True) is fastest on CPU, 1 compiles fastest.
    """

    network: Network
    dtype: Any
    remat: str = "none"
    chunk: int = 1024
    unroll: int | bool = 1

    @functools.cached_property
    def encode(self):
        """(params, image buffers [M, groups, ...]) -> features [M, groups, F, D], one micro-batch at a time."""

        def encode(params: Params, vision):
            model = self.network.bind(cast(params, self.dtype))
            return jax.lax.map(lambda v: model.encode(v, dtype=self.dtype, unroll=self.unroll), vision)

        return jax.jit(encode)

    @functools.cached_property
    def score(self):
        """(params, prompts, responses stacked [M, b, ...], features) -> (logprobs, entropy), [M, b, S, R] each."""

        def score(params: Params, prompts, responses, features):
            params = cast(params, self.dtype)

            def one(micro):
                return self.logprobs(params, *micro)

            return jax.lax.map(one, (prompts._replace(vision=None), responses, features))

        return jax.jit(score)

    @functools.cached_property
    def cast(self):
        """Parameters in the compute dtype, for sampling; they are returned as they are if they have it."""
        program = jax.jit(lambda params: cast(params, self.dtype))
        return lambda params: params if all(p.dtype == self.dtype for p in params.values()) else program(params)

    @functools.cache  # noqa: B019 - programs live as long as the run
    def movers(self, mesh: Mesh) -> dict[str, Any]:
        """Of every parameter: param -> the same in the compute dtype, moved by the devices to where it lies on `mesh`.

        Each is a program: a compiler that is given all of them gathers all at once, and holds each twice at the peak.
        """
        where = sharding.param_shardings(self.network.specs, mesh)
        return {name: jax.jit(lambda param: param.astype(self.dtype), out_shardings=where[name]) for name in where}

    def move(self, params: Params, mesh: Mesh) -> Params:
        """The parameters in the compute dtype on `mesh`, one after another."""
        movers = self.movers(mesh)
        return {name: movers[name](param) for name, param in params.items()}

    def logprobs(self, params: Params, prompts, responses, features):
        """Differentiable log-probabilities and entropies of one micro-batch, [b, S, R] each."""
        model = self.network.bind(params)
        return response_logprobs(
            model, prompts, responses, features,
            dtype=self.dtype, remat=self.remat, chunk=self.chunk, unroll=self.unroll,
        )  # fmt: skip

    def sft_loss(self, params: Params, frozen: Params, batch):
        """SFT loss of one micro-batch (prompts, responses [b, S, R], normalizer) and its sums."""
        prompts, responses, normalizer = batch
        params = cast(params | frozen, self.dtype)
        features = None
        if prompts.vision is not None:
            model = self.network.bind(params)
            features = model.encode(prompts.vision, dtype=self.dtype, remat=self.remat, unroll=self.unroll)
        logprobs, entropy = self.logprobs(params, prompts._replace(vision=None), responses, features)
        flat = lambda a: a.reshape(-1, a.shape[-1])  # noqa: E731
        mask = flat(responses.mask)
        loss = objectives.sft_loss(flat(logprobs), mask, normalizer=normalizer)
        return loss, {"entropy": jnp.sum(jnp.where(mask, flat(entropy), 0.0)) / normalizer}

    def logits_of_responses(self, params: Params, prompts, responses, features):
        """The discriminator's logits [b, S], read at the last token of every response."""
        model = self.network.bind(params)
        _, hidden = response_hidden(
            model, prompts, responses, features, dtype=self.dtype, remat=self.remat, unroll=self.unroll
        )
        last = jnp.maximum(responses.mask.sum(-1) - 1, 0)
        read = jnp.take_along_axis(hidden, last[..., None, None], axis=2)[:, :, 0]
        return model.text.score(read)[..., 0].astype(jnp.float32)
