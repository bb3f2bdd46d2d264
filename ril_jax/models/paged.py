"""The decoder over a paged key-value cache: chunks of prompts and single tokens, each row at its own place in its text.

The cache is one pool of pages for keys and one for values. A row's text lies in the pages that its table names, in
order, so rows may share pages; layer l keeps page p at l * num_pages + p, so that no layer is ever sliced out of the
pool. Page 0 takes what rows that are idle write.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ril_jax import sharding
from ril_jax.models import attention
from ril_jax.models.config import TextConfig
from ril_jax.models.layers import scan_layers
from ril_jax.models.paged_writes import write
from ril_jax.models.qwen2 import Qwen2

_MASKED = -1e30
_LANES = 128  # the TPU's kernel reads pages of heads that are a multiple of this wide
_TOKENS_OF_A_BLOCK = 512  # that the TPU's kernel reads at a time


class PagePool(NamedTuple):
    """Keys and values of all layers, [K, L * num_pages, page_size, W] each.

    W is the head width, for the TPU's kernel up to the next multiple of 128, filled with zeros: a TPU's memory pads the
    last axis of a page so far in any case.
    """

    k: jax.Array
    v: jax.Array

    @classmethod
    def shape(cls, config: TextConfig, num_pages: int, page_size: int) -> tuple[int, ...]:
        """The shape of `k` and of `v` for the backend in use."""
        width = config.head_dim if attention.backend() == "xla" else -(-config.head_dim // _LANES) * _LANES
        return (config.num_key_value_heads, config.num_hidden_layers * num_pages, page_size, width)


def run_chunk(
    text: Qwen2, x, positions, pool: PagePool, tables, start, length, *, layers=None, block: int = 256, unit: int = 1
):
    """Hidden states of the next `length` tokens of every row, whose keys and values go into the row's pages.

    Args:
      text: the decoder. x: [B, C, D] embeddings. positions: [3, B, C] or [B, C] of the rotary embedding.
      tables: [B, M] int32, the pages of each row's text in order. start: [B] int32, tokens in the cache before.
      length: [B] int32, tokens of this chunk that are real; the rest (and all of a row with 0) write to page 0.
      layers: the layers one by one (`layers.unstack`), instead of a scan over them.
      block: tokens that plain attention reads at a time (a multiple of the page size); results do not depend on how
        much other rows hold. Single tokens (C = 1) go through the TPU's paged kernel where that is the backend.
      unit: tokens that are written at a time: divides C, the page size and every `start`. What is beyond `length` in
        a row's last one is overwritten too.

    Returns: (hidden [B, C, D] after the final norm, pool).
    """
    x = sharding.constrain_features(x)
    C = x.shape[1]
    page_size, num_pages = pool.k.shape[2], pool.k.shape[1] // text.config.num_hidden_layers
    rope = text.rope(positions, x.dtype)
    at = start[:, None] + jnp.arange(C)
    real = jnp.arange(C) < length[:, None]
    page = jnp.take_along_axis(tables, jnp.minimum(at // page_size, tables.shape[1] - 1), axis=1)
    page, offset = jnp.where(real, page, 0), jnp.where(real, at % page_size, 0)
    context = jnp.where(length > 0, start + length, 0)

    def body(layer, carry, number):
        x, pool = carry
        base = number * num_pages

        def attend(q, k, v):
            q, k, v = (_widened(a, pool.k.shape[-1]) for a in (q, k, v))
            written = PagePool(*write(pool, (k, v), base + page, offset, unit=unit))
            out = paged_attention(q * text.config.head_dim**-0.5, written, base + tables, at, context, block=block)
            return out[..., : text.config.head_dim], written

        x, pool = layer(x, rope, attend)
        return (sharding.constrain_features(x), pool), None

    if layers is None:
        numbers = jnp.arange(text.config.num_hidden_layers)
        (x, pool), _ = scan_layers(text.layers, body, (x, pool), numbers)
    else:
        for number, layer in enumerate(layers):
            (x, pool), _ = body(layer, (x, pool), number)
    return sharding.constrain_features(text.norm(x)), pool


def paged_attention(q, pool: PagePool, tables, at, context, *, block: int):
    """Causal attention of each row's queries to its own pages, block by block.

    What a row gets does not depend, not by one bit, on the other rows and how much they hold.

    Args:
      q: [B, C, N, H], scaled. tables: [B, M] pages of this layer. at: [B, C] place of each query in its text.
      context: [B] tokens of each row that are written. block: tokens a step, a multiple of the page size.

    Returns: [B, C, N, H]; finite values without meaning where a query has nothing to see.
    """
    if q.shape[1] == 1:  # the query stands at the end of its row
        if attention.backend() == "pallas":
            return _kernel_attention(q[:, 0], pool, tables, context)[:, None]
        return _attention_of_last(q[:, 0], pool, tables, context, block=block)[:, None]
    return _attention_of_chunks(q, pool, tables, at, context, block=block)


def _attention_of_last(q, pool: PagePool, tables, context, *, block: int):
    """Attention of one query a row to the whole row: [B, N, H], zeros where a row is empty.

    Rows of any lengths take no more work than their blocks: all rows' blocks stand in one list, as many as there are
    rows are done at a time, each by itself, and every row then puts the results of its own together.
    """
    B, N, H = q.shape
    K, _, page_size, _ = pool.k.shape
    pages = max(1, block // page_size)
    width = pages * page_size
    tables = jnp.pad(tables, ((0, 0), (0, -tables.shape[1] % pages))).reshape(B, -1, pages)
    most = tables.shape[1]
    count = (context + width - 1) // width  # blocks of each row
    ends = jnp.cumsum(count)
    listed = jnp.arange(B * most)
    row = jnp.minimum(jnp.sum(ends[None] <= listed[:, None], axis=1), B - 1)
    number = jnp.clip(listed - (ends - count)[row], 0, most - 1)
    q = q.reshape(B, K, N // K, H)

    def step(i, carry):
        rows, numbers = (jax.lax.dynamic_slice_in_dim(a, i * B, B) for a in (row, number))
        k, v = (_pages_of_rows(p, tables[rows, numbers]).astype(q.dtype) for p in pool)
        scores = jnp.einsum("bkgh,bkth->bkgt", q[rows], k, preferred_element_type=jnp.float32)
        seen = numbers[:, None] * width + jnp.arange(width) < context[rows][:, None]
        scores = jnp.where(seen[:, None, None], scores, _MASKED)
        top = scores.max(axis=-1)
        weights = jnp.exp(scores - top[..., None])
        out = jnp.einsum("bkgt,bkth->bkgh", weights.astype(q.dtype), v, preferred_element_type=jnp.float32)
        new = (top, weights.sum(axis=-1), out)
        return tuple(jax.lax.dynamic_update_slice_in_dim(a, n, i * B, 0) for a, n in zip(carry, new, strict=True))

    shape = (B * most, K, N // K)
    carry = (jnp.full(shape, _MASKED), jnp.zeros(shape), jnp.zeros((*shape, H), jnp.float32))
    top, total, out = jax.lax.fori_loop(0, (ends[-1] + B - 1) // B, step, carry)
    own = jnp.minimum((ends - count)[:, None] + jnp.arange(most), B * most - 1)  # [B, most] in the list
    real = (jnp.arange(most) < count[:, None])[:, :, None, None]
    top = jnp.where(real, top[own], _MASKED)
    scale = jnp.where(real, jnp.exp(top - top.max(axis=1, keepdims=True)), 0.0)
    total = jnp.sum(total[own] * scale, axis=1)
    out = jnp.sum(out[own] * scale[..., None], axis=1) / jnp.maximum(total, 1e-30)[..., None]
    return out.reshape(B, N, H).astype(q.dtype)


def _pages_of_rows(pool, tables):
    """The pages `tables` [B, n] of a pool [K, P, page, H], head by head: [B, K, n * page, H]."""
    K, _, page, H = pool.shape
    numbers = jax.lax.GatherDimensionNumbers(offset_dims=(1, 3, 4), collapsed_slice_dims=(1,), start_index_map=(1,))
    mode = jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS
    found = jax.lax.gather(pool, tables[..., None], numbers, (K, 1, page, H), mode=mode)
    return found.reshape(tables.shape[0], K, -1, H)


def _attention_of_chunks(q, pool: PagePool, tables, at, context, *, block: int):
    """Attention with a running softmax over the blocks of the longest row; for shorter rows a further block changes
    nothing."""
    B, C, N, H = q.shape
    K, _, page_size, _ = pool.k.shape
    pages = max(1, block // page_size)
    width = pages * page_size
    short = -tables.shape[1] % pages
    tables = jnp.pad(tables, ((0, 0), (0, short)))
    # Heads first, as the pool has them; queries of one key-value head and all its tokens are one matrix.
    q = q.reshape(B, C, K, N // K, H).transpose(2, 0, 3, 1, 4).reshape(K, B, N // K * C, H)

    def step(i, carry):
        top, total, out = carry
        ids = jax.lax.dynamic_slice_in_dim(tables, i * pages, pages, axis=1)
        k, v = (jnp.take(p, ids, axis=1).reshape(K, B, width, H) for p in pool)
        scores = jnp.einsum("kbqh,kbth->kbqt", q, k.astype(q.dtype), preferred_element_type=jnp.float32)
        place = i * width + jnp.arange(width)
        seen = (place <= at[:, :, None]) & (place < context[:, None, None])  # [B, C, width]
        scores = jnp.where(seen[:, None], scores.reshape(K, B, N // K, C, width), _MASKED)
        scores = scores.reshape(K, B, N // K * C, width)
        new_top = jnp.maximum(top, scores.max(axis=-1))
        weights = jnp.where(scores > 0.5 * _MASKED, jnp.exp(scores - new_top[..., None]), 0.0)
        keep = jnp.exp(top - new_top)
        total = total * keep + weights.sum(axis=-1)
        summed = jnp.einsum(
            "kbqt,kbth->kbqh", weights.astype(q.dtype), v.astype(q.dtype), preferred_element_type=jnp.float32
        )
        return new_top, total, out * keep[..., None] + summed

    rows = (K, B, N // K * C)
    carry = (jnp.full(rows, _MASKED), jnp.zeros(rows), jnp.zeros((*rows, H), jnp.float32))
    blocks = (jnp.max(context) + width - 1) // width
    _, total, out = jax.lax.fori_loop(0, blocks, step, carry)
    out = out / jnp.maximum(total, 1e-30)[..., None]
    out = out.reshape(K, B, N // K, C, H).transpose(1, 3, 0, 2, 4).reshape(B, C, N, H)
    return out.astype(q.dtype)


def _kernel_attention(q, pool: PagePool, tables, context):
    """One query a row, [B, N, W], through the TPU's paged kernel: rows over data and fsdp, heads over tensor.

    Rows that hold nothing read one token without meaning. Interpreted where the platform is not a TPU.
    """
    from ril_jax.models.attention_pallas import over_mesh  # Pallas is loaded where it is used

    pages = max(1, _TOKENS_OF_A_BLOCK // pool.k.shape[2])
    tables = jnp.pad(tables, ((0, 0), (0, -tables.shape[1] % pages)))
    rows = (tables, jnp.maximum(context, 1))
    local = functools.partial(_kernel, pages=pages)
    return over_mesh(local, q, *pool, rows, over_rows=True, axis=1, kv_axis=0).astype(q.dtype)


def _kernel(q, k, v, rows, *, pages: int):
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention as kernel

    tables, context = rows
    with attention.kernels():
        return kernel(q, k, v, context, tables, pages_per_compute_block=pages)


def _widened(a, width: int):
    """[..., H] -> [..., width], zeros after H."""
    return jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, width - a.shape[-1])])
