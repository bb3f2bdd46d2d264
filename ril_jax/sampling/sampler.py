"""Sampling a group of responses to every question of a batch, in one compiled program a bucket.

The prompt with its image is encoded and prefilled once a question; its G samples attend to that one cache and to their
own. The decode loop runs on the device until every sample has ended.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ril_jax import sharding
from ril_jax.models.layers import unstack_for_few_rows
from ril_jax.models.parameters import Network
from ril_jax.sampling.logits import SamplingParams, choose_tokens


class Samples(NamedTuple):
    """What was sampled.

    token_ids [B, G, R] int32 (pad after the end); mask [B, G, R] bool, true up to and including EOS; logprobs [B, G, R]
    float32 of the raw model at temperature 1; finished [B, G] bool, ended by EOS; steps [] int32, decode steps that
    were run.
    """

    token_ids: jax.Array
    mask: jax.Array
    logprobs: jax.Array
    finished: jax.Array
    steps: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Sampler:
    """The compiled sampling programs of one network.

    Attributes:
      network: a `Network` of `VisionLanguageModel`.
      eos_token_ids: any of these ends a sample. pad_token_id: fills what follows.
      dtype: compute dtype. unroll: layers per scan step of the prefill; True gives straight-line code in prefill and
        decode, fastest on CPU, at the price of a second copy of the layers' weights.
      mesh: whose axes rows and weights lie on, if not on those of the mesh in use (`sharding.sampling_mesh`); batch and
        features are moved there.
      token_limit: logits at and after this id are never sampled (a vocabulary padded beyond the tokenizer).
    """

    network: Network
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    dtype: jnp.dtype = jnp.float32
    unroll: int | bool = 1
    token_limit: int | None = None
    mesh: Mesh | None = None

    def __call__(self, params, batch, features, keys, *, num_samples: int, max_tokens: int, sampling: SamplingParams):
        """Sample G responses of at most R tokens to each of B prompts.

        Args:
          params: of the network. batch: `packing.PromptBatch` (its images already encoded into `features`, [F, D] or
            None).
          keys: [B, 2] uint32, one PRNG key a question; the draws of a question depend on nothing else in the batch.

        Returns: `Samples`.
        """
        batch = batch._replace(vision=None)
        if self.mesh is not None:
            batch = jax.tree.map(self._place, batch._replace(positions=None))._replace(
                positions=sharding.move_rows(batch.positions, self.mesh, 1)
            )
            features, keys = jax.tree.map(self._place, (features, keys))
        return self._program(num_samples, max_tokens, sampling)(params, batch, features, keys)

    @functools.cached_property
    def encode(self):
        """Jitted: (params, VisionInputs) -> features [X/4, D] in the compute dtype."""

        def encode(params, vision):
            return self.network.bind(params).encode(vision, dtype=self.dtype, unroll=self.unroll)

        return jax.jit(encode)

    def _place(self, array: jax.Array) -> jax.Array:
        assert self.mesh is not None
        return sharding.move_rows(array, self.mesh)

    @functools.cache  # noqa: B019 - a sampler lives as long as the run
    def _program(self, num_samples, max_tokens, sampling):
        def sample(params, batch, features, keys):
            with sharding.using(self.mesh):
                return self._sample(params, batch, features, keys, num_samples, max_tokens, sampling)

        return jax.jit(sample)

    def _sample(self, params, batch, features, keys, G, R, sampling: SamplingParams):
        model = self.network.bind(params)
        config = model.text.config
        L, K, H = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        B, P = batch.token_ids.shape
        V = config.vocab_size

        x = model.embed(batch.token_ids, features, batch.feature_index, dtype=self.dtype)
        hidden, prompt_cache = model.text.rows(
            x, batch.positions, batch.valid, prompt_len=P, keep_cache=True, unroll=self.unroll
        )
        prompt_cache = jax.tree.map(lambda c: jnp.swapaxes(c, 2, 3), prompt_cache)  # [L, B, P, K, H] -> [L, B, K, P, H]
        empty = jnp.zeros((L, B, K, G, R, H), self.dtype)
        own_cache: Any = (empty, empty)
        layers = None
        if self.unroll is True:
            # Straight-line code: layers and caches are taken out of their stacks once, not in every step.
            layers = unstack_for_few_rows(model.text.layers)
            prompt_cache, own_cache = ([(k[i], v[i]) for i in range(L)] for k, v in (prompt_cache, own_cache))
        sample_keys = jax.vmap(lambda key: jax.random.split(key, G))(keys)
        seen = None
        if sampling.repetition_penalty != 1.0:
            ids = jnp.where(batch.valid, batch.token_ids, V)
            seen = jnp.zeros((B, V), bool).at[jnp.arange(B)[:, None], ids].set(True, mode="drop")
            seen = jnp.broadcast_to(seen[:, None], (B, G, V))
        eos = jnp.asarray(self.eos_token_ids)

        def draw(hidden_bgd, t, seen):
            logits = model.text.logits(hidden_bgd)
            # Of the raw model, rows beyond the tokenizer included, as in training.
            normalised = jax.nn.log_softmax(logits)
            if self.token_limit is not None and self.token_limit < V:
                logits = jnp.where(jnp.arange(V) < self.token_limit, logits, -jnp.inf)
            tokens = choose_tokens(logits, seen, sample_keys, t, sampling)
            logprobs = jnp.take_along_axis(normalised, tokens[..., None], axis=-1)[..., 0]
            return tokens, logprobs

        class State(NamedTuple):
            t: jax.Array  # tokens drawn so far
            token: jax.Array  # the last of them [B, G]
            done: jax.Array
            token_ids: jax.Array
            mask: jax.Array
            logprobs: jax.Array
            cache: Any  # (k, v), stacked; a list of L such pairs where layers are unrolled
            seen: jax.Array | None

        def record(state: State, hidden_bgd):
            tokens, logprobs = draw(hidden_bgd, state.t, state.seen)
            tokens = jnp.where(state.done, self.pad_token_id, tokens)
            put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=state.t, axis=2)
            live = ~state.done
            seen = state.seen
            if seen is not None:
                b, g = jnp.arange(B)[:, None], jnp.arange(G)[None, :]
                seen = seen.at[b, g, tokens].max(live)
            return state._replace(
                t=state.t + 1,
                token=tokens,
                done=state.done | jnp.isin(tokens, eos),
                token_ids=put(state.token_ids, tokens),
                mask=put(state.mask, live),
                logprobs=put(state.logprobs, jnp.where(live, logprobs, 0.0)),
                seen=seen,
            )

        def step(state: State):
            at = state.t - 1
            positions = jnp.broadcast_to((batch.next_position + at)[:, None], (B, G))
            x = model.text.embed(state.token).astype(self.dtype)
            hidden, new = model.text.decode(x, positions, prompt_cache, batch.valid, state.cache, at, layers=layers)
            # The caches are loop state, so XLA updates them in place.
            cache = jax.tree.map(
                lambda c, n: jax.lax.dynamic_update_index_in_dim(c, n, at, axis=c.ndim - 2), state.cache, new
            )
            return record(state._replace(cache=cache), hidden)

        state = State(
            t=jnp.int32(0),
            token=jnp.zeros((B, G), jnp.int32),
            done=jnp.broadcast_to(~batch.row_valid[:, None], (B, G)),
            token_ids=jnp.full((B, G, R), self.pad_token_id, jnp.int32),
            mask=jnp.zeros((B, G, R), bool),
            logprobs=jnp.zeros((B, G, R), jnp.float32),
            cache=own_cache,
            seen=seen,
        )
        last = jnp.broadcast_to(hidden[:, -1:], (B, G, hidden.shape[-1]))
        state = record(state, last)
        state = jax.lax.while_loop(lambda s: (s.t < R) & ~jnp.all(s.done), step, state)
        finished = state.done & batch.row_valid[:, None]
        return Samples(state.token_ids, state.mask, state.logprobs, finished, state.t)
