"""From logits to the next token: repetition penalty, temperature, top-k, top-p, in HF's order."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """Sampling filters (defaults: plain sampling). temperature 0 is greedy; top_k 0 and top_p 1 are off."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0


def choose_tokens(logits, seen, keys, step, params: SamplingParams):
    """Draw one token a sample.

    Args:
      logits: [B, G, V] float32. seen: [B, G, V] bool, tokens of the prompt and the sample so far; None without penalty.
      keys: [B, G, 2] uint32, one PRNG key a sample. step: [] int32, folded into the keys.

    Returns: [B, G] int32.
    """
    logits, order = filter_logits(logits, seen, params)
    if params.temperature == 0.0:
        choice = jnp.argmax(logits, axis=-1)
    else:
        draw = jax.vmap(jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, step), row)))
        choice = draw(keys, logits)
    if order is not None:
        choice = jnp.take_along_axis(order, choice[..., None], axis=-1)[..., 0]
    return choice.astype(jnp.int32)


def filter_logits(logits, seen, params: SamplingParams):
    """The logits whose softmax is sampled from (HF's logits processors), -inf for tokens that are filtered out.

    Args: as of `choose_tokens`.

    Returns: (logits [B, G, k], order [B, G, k] int32: the token of each, best first; None if logit i is of token i).
    """
    if params.repetition_penalty != 1.0:
        penalised = jnp.where(logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty)
        logits = jnp.where(seen, penalised, logits)
    if params.temperature == 0.0:
        return logits, None
    logits = logits / params.temperature
    vocab = logits.shape[-1]
    limited = 0 < params.top_k < vocab
    if not limited and params.top_p >= 1.0:
        return logits, None
    # As a matrix: of three axes the compiler for TPUs sorts the whole vocabulary, for every token.
    found = jax.lax.top_k(logits.reshape(-1, vocab), params.top_k if limited else vocab)
    logits, order = (a.reshape(*logits.shape[:-1], -1) for a in found)
    if params.top_p < 1.0:
        # Sorted from the top: a token stays if less than top_p of the mass lies above it, so one always stays.
        probs = jax.nn.softmax(logits, axis=-1)
        logits = jnp.where(jnp.cumsum(probs, axis=-1) - probs < params.top_p, logits, -jnp.inf)
    return logits, order


class RowParams(NamedTuple):
    """`SamplingParams` of each row of a batch, as arrays: temperature, top_p, repetition_penalty [B] float32; top_k [B]
    int32."""

    temperature: jax.Array
    top_p: jax.Array
    top_k: jax.Array
    repetition_penalty: jax.Array


def choose_row_tokens(logits, seen, keys, steps, params: RowParams, *, filtered: bool):
    """Draw one token a row, every row by its own parameters.

    Without `filtered` only the temperature counts; rows whose filters are off are given the same token either way, so a
    row's draw does not depend on whether others in the batch filter.

    Args:
      logits: [B, V] float32. seen: [B, V] bool (ignored unless filtered). keys: [B, 2] uint32. steps: [B] int32, folded
        into the keys.

    Returns: [B] int32.
    """
    if filtered:
        penalty = params.repetition_penalty[:, None]
        logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)  # what greedy rows get
    drawing = params.temperature > 0
    scaled = logits / jnp.where(drawing, params.temperature, 1.0)[:, None]
    keys = jax.vmap(jax.random.fold_in)(keys, steps)
    from_all = drawing
    if filtered:
        few = drawing & (params.top_k > 0) & (params.top_k <= min(_FEW, logits.shape[-1]))
        from_all = drawing & ~few
        drawn = jax.lax.cond(jnp.any(few), lambda: _draw_from_few(scaled, keys, params), lambda: tokens)
        tokens = jnp.where(few, drawn, tokens)

    def draw():
        return jax.vmap(jax.random.categorical)(keys, _filtered(scaled, params, from_all) if filtered else scaled)

    # Random numbers for the whole vocabulary cost as much as a layer: none are made where no row needs them.
    drawn = jax.lax.cond(jnp.any(from_all), lambda: draw().astype(jnp.int32), lambda: tokens)
    return jnp.where(from_all, drawn, tokens)


_FEW = 128  # candidates up to which the vocabulary is not sorted


def _draw_from_few(logits, keys, params: RowParams):
    """[B] int32: one of each row's `top_k` best tokens, top_p among them; for rows whose top_k is 1 to `_FEW`."""
    best, order = jax.lax.top_k(logits, min(_FEW, logits.shape[-1]))
    best = jnp.where(jnp.arange(best.shape[-1]) < params.top_k[:, None], best, -jnp.inf)
    probs = jax.nn.softmax(best, axis=-1)
    inside = jnp.cumsum(probs, axis=-1) - probs < params.top_p[:, None]
    choice = jax.vmap(jax.random.categorical)(keys, jnp.where(inside, best, -jnp.inf))
    return jnp.take_along_axis(order, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)


def _filtered(logits, params: RowParams, rows):
    """The logits [B, V] with -inf where top-k and top-p leave a token out; `rows` [B] are those that count."""
    filters = rows & ((params.top_k > 0) | (params.top_p < 1.0))
    least = jax.lax.cond(
        jnp.any(filters), lambda: _thresholds(logits, params), lambda: jnp.full(logits.shape[:1], -jnp.inf)
    )
    return jnp.where(logits >= least[:, None], logits, -jnp.inf)


def _thresholds(logits, params: RowParams):
    """[B]: the least logit that top-k and top-p keep in each row, -inf where both are off."""
    vocab = logits.shape[-1]
    ranked = jnp.sort(logits, axis=-1, descending=True)
    count = jnp.where(params.top_k > 0, jnp.minimum(params.top_k, vocab), vocab)
    kth = jnp.take_along_axis(ranked, count[:, None] - 1, axis=-1)
    kept = jnp.where(ranked >= kth, ranked, -jnp.inf)
    probs = jax.nn.softmax(kept, axis=-1)
    inside = jnp.cumsum(probs, axis=-1) - probs < params.top_p[:, None]
    least = jnp.min(jnp.where(inside & jnp.isfinite(kept), kept, jnp.inf), axis=-1)
    off = (params.top_k <= 0) & (params.top_p >= 1.0)
    return jnp.where(off, -jnp.inf, least)
