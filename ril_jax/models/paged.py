"""The decoder over a paged key-value cache: chunks of prompts and single tokens, each row at its own place in its text.

The cache is one pool of pages for keys and one for values. A row's text lies in the pages that its table names, in
order, so rows may share pages; layer l keeps page p at l * num_pages + p, so that no layer is ever sliced out of the
pool. Page 0 takes what rows that are idle write.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ril_jax.models.config import TextConfig
from ril_jax.models.layers import scan_layers
from ril_jax.models.qwen2 import Qwen2

_MASKED = -1e30


class PagePool(NamedTuple):
    """Keys and values of all layers, [K, L * num_pages, page_size, H] each."""

    k: jax.Array
    v: jax.Array

    @classmethod
    def shape(cls, config: TextConfig, num_pages: int, page_size: int) -> tuple[int, ...]:
        """The shape of `k` and of `v`."""
        return (config.num_key_value_heads, config.num_hidden_layers * num_pages, page_size, config.head_dim)


def run_chunk(text: Qwen2, x, positions, pool: PagePool, tables, start, length, *, layers=None, block: int = 256,
              kernel: str = "xla"):  # fmt: skip
    """Hidden states of the next `length` tokens of every row, whose keys and values go into the row's pages.

    Args:
      text: the decoder. x: [B, C, D] embeddings. positions: [3, B, C] or [B, C] of the rotary embedding.
      tables: [B, M] int32, the pages of each row's text in order. start: [B] int32, tokens in the cache before.
      length: [B] int32, tokens of this chunk that are real; the rest (and all of a row with 0) write to page 0.
      layers: the layers one by one (`layers.unstack`), instead of a scan over them.
      block: tokens that attention reads at a time (a multiple of the page size); results do not depend on how much
        other rows hold. kernel: "xla", or "pallas" for the TPU's paged kernel (C = 1, H a multiple of 128).

    Returns: (hidden [B, C, D] after the final norm, pool).
    """
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
            rows = base + page
            new = (jnp.moveaxis(a, 2, 0) for a in (k, v))  # heads first
            written = PagePool(*(p.at[:, rows, offset].set(a.astype(p.dtype)) for p, a in zip(pool, new, strict=True)))
            if kernel == "pallas":
                return _pallas_attention(q, written, base + tables, context), written
            return paged_attention(q, written, base + tables, at, context, block=block), written

        x, pool = layer(x, rope, attend)
        return (x, pool), None

    if layers is None:
        numbers = jnp.arange(text.config.num_hidden_layers)
        (x, pool), _ = scan_layers(text.layers, body, (x, pool), numbers)
    else:
        for number, layer in enumerate(layers):
            (x, pool), _ = body(layer, (x, pool), number)
    return text.norm(x), pool


def paged_attention(q, pool: PagePool, tables, at, context, *, block: int):
    """Causal attention of each row's queries to its own pages, block by block, in plain XLA.

    What a row gets does not depend, not by one bit, on the other rows and how much they hold.

    Args:
      q: [B, C, N, H]. tables: [B, M] pages of this layer. at: [B, C] place of each query in its text.
      context: [B] tokens of each row that are written. block: tokens a step, a multiple of the page size.

    Returns: [B, C, N, H]; finite values without meaning where a query has nothing to see.
    """
    if q.shape[1] == 1:  # the query stands at the end of its row
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
    q = (q * (H**-0.5)).reshape(B, K, N // K, H)

    def step(i, carry):
        rows, numbers = (jax.lax.dynamic_slice_in_dim(a, i * B, B) for a in (row, number))
        k, v = (jnp.take(p, tables[rows, numbers], axis=1) for p in pool)  # [K, B, pages, page, H]
        scores = jnp.einsum("bkgh,kbpth->bkgpt", q[rows], k.astype(q.dtype), preferred_element_type=jnp.float32)
        place = numbers[:, None] * width + jnp.arange(width)
        seen = (place < context[rows][:, None]).reshape(B, 1, 1, pages, page_size)
        scores = jnp.where(seen, scores, _MASKED)
        top = scores.max(axis=(-2, -1))
        weights = jnp.exp(scores - top[..., None, None])
        out = jnp.einsum(
            "bkgpt,kbpth->bkgh", weights.astype(q.dtype), v.astype(q.dtype), preferred_element_type=jnp.float32
        )
        new = (top, weights.sum(axis=(-2, -1)), out)
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
    q = (q * (H**-0.5)).reshape(B, C, K, N // K, H).transpose(2, 0, 3, 1, 4).reshape(K, B, N // K * C, H)

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


def _pallas_attention(q, pool: PagePool, tables, context, *, pages_per_block: int = 8):
    """One query a row through the TPU's paged attention kernel (same layout of pages)."""
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention as kernel

    B, C, N, H = q.shape
    short = -tables.shape[1] % pages_per_block
    tables = jnp.pad(tables, ((0, 0), (0, short)))
    out = kernel(
        q[:, 0] * (H**-0.5), pool.k, pool.v, jnp.maximum(context, 1), tables,
        pages_per_compute_block=pages_per_block,
    )  # fmt: skip
    return out.reshape(B, C, N, H).astype(q.dtype)
