"""Attention by JAX's splash kernel for TPUs: scores never leave the chip, and blocks that a mask empties are skipped.

Arguments and results are those of `models/attention.py`. What is known while tracing is a static mask, whose empty
blocks cost nothing; what is known only later (padding, frames) is told by segment ids. A kernel works on one device, so
each call is divided over the mesh in use: rows over `data` and `fsdp`, heads over `tensor`. Key-value heads are never
repeated: the kernel reads one for all of its query heads. Heads may have any width; where the mesh's platform is not a
TPU the kernel is interpreted.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import PartitionSpec

from ril_jax import sharding

_LANES = 128  # tokens come in multiples of a vector register's width
_BLOCKS = (512, 384, 256, 128)  # tokens of a block; larger ones overrun the memory that v5e gives a kernel


def group_attention(q, k, v, valid, *, prompt_len: int, num_responses: int):
    """The group mask is static; segment ids keep padding apart."""
    T = q.shape[1]
    response_len = (T - prompt_len) // num_responses if num_responses else 0
    make = functools.partial(GroupMask, prompt_len=prompt_len, response_len=response_len)
    return _attend(q, k, v, valid.astype(jnp.int32), make, over_rows=True)


def full_attention(q, k, v):
    """The tokens that fill up the last block are masked as keys."""
    return _attend(q, k, v, None, functools.partial(PrefixMask, length=q.shape[1]), over_rows=False)


def frame_attention(q, k, v, index, slot):
    """The buffer as one row: a static band as wide as the longest frame, and segment ids for frames within it.

    Costs X * 2M, where frames as the rows of a batch, each padded to the longest, would cost S * M^2 and a gather.
    """
    frame = slot // index.shape[1]  # S for padding
    out = _attend(
        q[None], k[None], v[None], frame[None], functools.partial(BandMask, width=index.shape[1]), over_rows=False
    )
    return out[0]


@dataclasses.dataclass(frozen=True)
class _StaticMask(splash_mask.Mask):
    """A mask that is computed block by block; equal masks are one to the kernel's cache."""

    size: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.size, self.size

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        rows, columns = (np.arange(self.size)[part] for part in index)
        if not self._may_see(rows[0], rows[-1], columns[0], columns[-1]):
            return np.zeros((len(rows), len(columns)), bool)
        return np.broadcast_to(self._sees(rows[:, None], columns[None]), (len(rows), len(columns)))

    def count_blocks(self, block: int) -> int:
        """Blocks that are not empty."""
        edges = [(first, first + block - 1) for first in range(0, self.size, block)]
        return sum(self._may_see(*query, *key) for query in edges for key in edges)

    def _sees(self, query: np.ndarray, key: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def _may_see(self, first_query: int, last_query: int, first_key: int, last_key: int) -> bool:
        """False where no query of a block sees any key of it."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class GroupMask(_StaticMask):
    """`[prompt | response 1 | ... | response S]`: a token sees the prompt and its own response, causally.

    What fills up the last block counts as further responses; response_len 0 makes the mask causal.
    """

    prompt_len: int
    response_len: int

    def _sees(self, query, key):
        return (key <= query) & ((key < self.prompt_len) | (self._response(query) == self._response(key)))

    def _may_see(self, first_query, last_query, first_key, last_key):
        own = self._response(last_key) >= self._response(first_query)
        return first_key <= last_query and bool(first_key < self.prompt_len or own)

    def _response(self, token):
        return (token - self.prompt_len) // (self.response_len or self.size)


@dataclasses.dataclass(frozen=True)
class PrefixMask(_StaticMask):
    """Everyone sees the first `length` tokens."""

    length: int

    def _sees(self, query, key):
        return key < self.length

    def _may_see(self, first_query, last_query, first_key, last_key):
        return first_key < self.length


@dataclasses.dataclass(frozen=True)
class BandMask(_StaticMask):
    """A token sees those that are fewer than `width` away."""

    width: int

    def _sees(self, query, key):
        return np.abs(query - key) < self.width

    def _may_see(self, first_query, last_query, first_key, last_key):
        return first_key - last_query < self.width and first_query - last_key < self.width


def block_size(tokens: int) -> int:
    """The largest block that makes a row no more than a sixteenth longer than whole registers do."""
    least = -(-tokens // _LANES) * _LANES
    return next(b for b in _BLOCKS if -(-tokens // b) * b <= least + least // 16)


def blocks_scope(computed: Any, in_row: Any) -> str:
    """The name around a kernel in profiles and jaxprs, by which `planning/costs.py` counts what it computes."""
    return f"{computed}_blocks_of_{in_row}_a_row"


def _attend(q, k, v, segments, make_mask: Callable[..., _StaticMask], *, over_rows: bool):
    """q [B, T, N, H]; k, v [B, T, K, H]; segments [B, T] int32 or None; make_mask(size=...) -> mask of padded rows."""
    T, H = q.shape[1], q.shape[-1]
    block = block_size(T)
    fill = -T % block
    q, k, v = (jnp.pad(a, ((0, 0), (0, fill), (0, 0), (0, 0))) for a in (q * H**-0.5, k, v))
    if segments is not None:
        segments = jnp.pad(segments, ((0, 0), (0, fill)), constant_values=-1)
    local = functools.partial(
        _local, mask=make_mask(size=T + fill), block=block, interpret=sharding.platform() != "tpu"
    )
    return over_mesh(local, q, k, v, segments, over_rows=over_rows)[:, :T]


def _local(q, k, v, segments, *, mask: _StaticMask, block: int, interpret: bool):
    """On one device."""
    sizes: Any = dict.fromkeys(_BLOCK_FIELDS, block)
    kernel = splash.make_splash_mha(
        splash_mask.MultiHeadMask([mask] * q.shape[2]), block_sizes=splash.BlockSizes(**sizes), head_shards=1,
        q_seq_shards=1, interpret=interpret,
    )  # fmt: skip

    def one(q, k, v, segments=None):
        ids = None if segments is None else splash.SegmentIds(segments, segments)
        return kernel(q, k, v, segment_ids=ids)

    with jax.named_scope(blocks_scope(mask.count_blocks(block), mask.size // block)):
        q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q, k, v))
        out = jax.vmap(one)(q, k, v) if segments is None else jax.vmap(one)(q, k, v, segments)
    return jnp.swapaxes(out, 1, 2)


_BLOCK_FIELDS = (
    "block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq",
    "block_kv_dq",
)  # fmt: skip


def over_mesh(function: Callable, q, k, v, rows: Any, *, over_rows: bool, axis: int = 2, kv_axis: int = 2):
    """`function(q, k, v, rows)` on every device of the mesh in use, each with its share of rows and heads.

    Args:
      q: query heads at `axis`; k, v: key-value heads at `kv_axis`; rows: a pytree of arrays that have rows alone.
      over_rows: whether axis 0 of q and of `rows` is divided over data and fsdp; of k and v too where it is theirs
        (kv_axis > 0).

    Heads are divided over `tensor` where it divides the query heads, and each device's read one key-value head or whole
    groups; otherwise every device of a `tensor` group computes all heads, as with 14 heads on 4 devices.
    """
    mesh = sharding.mesh_in_use()
    if mesh is None or mesh.size == 1:
        return function(q, k, v, rows)
    N, K, count = q.shape[axis], k.shape[kv_axis], mesh.shape["tensor"]
    whole_groups = K % count == 0
    divided = count > 1 and N % count == 0 and (whole_groups or (N // K) % (N // count) == 0)
    batch = sharding.BATCH if over_rows and q.shape[0] % sharding.num_shards(mesh) == 0 else None

    def spec(ndim: int, heads_at: int, heads: bool, rows: bool) -> PartitionSpec:
        parts: list[Any] = [None] * ndim
        if rows:
            parts[0] = batch
        if heads:
            parts[heads_at] = "tensor"
        return PartitionSpec(*parts)

    def local(q, k, v, rows):
        if divided and not whole_groups:
            head = jax.lax.axis_index("tensor") * (N // count) // (N // K)
            k, v = (jax.lax.dynamic_slice_in_dim(a, head, 1, kv_axis) for a in (k, v))
        return function(q, k, v, rows)

    of_q = spec(q.ndim, axis, divided, True)
    of_kv = spec(k.ndim, kv_axis, divided and whole_groups, kv_axis > 0)
    of_rows = jax.tree.map(lambda a: spec(a.ndim, 0, False, True), rows)
    return jax.shard_map(
        local, mesh=mesh, in_specs=(of_q, of_kv, of_kv, of_rows), out_specs=of_q, check_vma=False
    )(q, k, v, rows)  # fmt: skip
