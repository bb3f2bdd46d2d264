"""Rows `[prompt | response 1 | ... | response S]`: log-probabilities of the responses, with the prompt computed once.

This is the group-shared form. With S = 1 it is the ordinary form that SFT uses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ril_jax import objectives, sharding
from ril_jax.models.vlm import VisionLanguageModel

if TYPE_CHECKING:  # for the names of the arrays alone; data stands above models
    from ril_jax.data.packing import PromptBatch, ResponseBatch


def response_hidden(
    model: VisionLanguageModel,
    prompts: PromptBatch,
    responses: ResponseBatch,
    features: jax.Array | None,
    *,
    dtype: Any,
    remat: str = "none",
    unroll: int | bool = 1,
):
    """Final hidden states of a batch of rows.

    Args:
      prompts: [B, P] arrays; responses: [B, S, R] arrays; features: encoded images that `feature_index` points
        into, as `VisionLanguageModel.embed` takes them.

    Returns: (hidden of the prompt's last token [B, D], hidden of the responses [B, S, R, D]).
    """
    B, P = prompts.token_ids.shape
    _, S, R = responses.token_ids.shape
    x_prompt = model.embed(prompts.token_ids, features, prompts.feature_index, dtype=dtype)
    x_responses = model.text.embed(responses.token_ids.reshape(B, S * R)).astype(dtype)
    positions_bsr = jnp.broadcast_to(prompts.next_position[:, None, None] + jnp.arange(R), (B, S, R)).reshape(B, S * R)
    positions = jnp.concatenate([prompts.positions, jnp.broadcast_to(positions_bsr, (3, B, S * R))], axis=-1)
    hidden, _ = model.text.rows(
        jnp.concatenate([x_prompt, x_responses], axis=1),
        positions,
        jnp.concatenate([prompts.valid, responses.mask.reshape(B, S * R)], axis=1),
        prompt_len=P,
        num_responses=S,
        remat=remat,
        unroll=unroll,
    )
    return hidden[:, P - 1], hidden[:, P:].reshape(B, S, R, -1)  # prompts are padded on the left


def response_logprobs(
    model: VisionLanguageModel,
    prompts: PromptBatch,
    responses: ResponseBatch,
    features: jax.Array | None,
    *,
    dtype: Any,
    remat: str = "none",
    chunk: int = 1024,
    unroll: int | bool = 1,
):
    """Log-probability (temperature 1, raw model) and entropy of every response token.

    Arguments as `response_hidden`; chunk: tokens of a device whose [V] logits stand at the same time.

    Returns: (logprobs [B, S, R], entropy [B, S, R]) float32; values outside `responses.mask` have no meaning.
    """
    B, S, R = responses.token_ids.shape
    last, hidden = response_hidden(model, prompts, responses, features, dtype=dtype, remat=remat, unroll=unroll)
    D = hidden.shape[-1]
    # The first token of every response is predicted by the prompt's last.
    first = jnp.broadcast_to(last[:, None, None], (B, S, 1, D))
    predicting = jnp.concatenate([first, hidden[:, :, :-1]], axis=2)
    score = _over_rows(functools.partial(objectives.chunked_logprobs, chunk=chunk, tied=True), B)
    logprobs, entropy = score(
        predicting.reshape(-1, D), model.text.head().astype(dtype), responses.token_ids.reshape(-1)
    )
    return logprobs.reshape(B, S, R), entropy.reshape(B, S, R)


def _over_rows(score: Callable, rows: int) -> Callable:
    """`score(hidden [N, D], head, targets [N])` on every device of data and fsdp with its share of the rows.

    Left to the compiler, the head is gathered and its gradient summed over all devices for every chunk of tokens;
    this way it is gathered once, and what each device has summed up goes around once. What lies over `tensor` is left
    to the compiler.
    """
    mesh = sharding.mesh_in_use()
    if mesh is None or sharding.num_shards(mesh) == 1 or rows % sharding.num_shards(mesh):
        return score
    of_rows = PartitionSpec(sharding.BATCH)
    return jax.shard_map(
        score, mesh=mesh, in_specs=(of_rows, PartitionSpec(), of_rows), out_specs=of_rows,
        axis_names=set(sharding.BATCH), check_vma=False,
    )  # fmt: skip
