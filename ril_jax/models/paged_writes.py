"""How new keys and values reach the pages of a pool, so that the pool stays where and as it lies.

A TPU keeps the last two axes of a page, tokens and width, in tiles. A scatter of single tokens makes its compiler turn
the whole pool to another layout and back, in every layer of every step. So prompts are written in units of several
tokens, and a decoded token by a kernel that reads its tile, puts the token in, and writes the tile back.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ril_jax import sharding
from ril_jax.models import attention


def write(pools, new, page, offset, *, unit: int = 1):
    """New keys and values to their places.

    Args:
      pools: arrays [K, P, page, W]. new: as many [B, C, K, W]. page, offset: [B, C], of each token. Places that several
        rows name (of the page that idle rows write) end with any one's token.
      unit: tokens that are written at a time. It divides C and the page size, and each run of so many tokens of a row
        begins at a multiple of it in one page; the places of the first one count, and the others follow.
    """
    size = _tile(pools[0].dtype)
    if attention.backend() == "pallas" and new[0].shape[1] == 1 and pools[0].shape[2] % size == 0:
        return _by_tiles(pools, [a[:, 0] for a in new], page[:, 0], offset[:, 0], size)
    K, P, tokens, W = pools[0].shape
    index = (page[:, ::unit] * (tokens // unit) + offset[:, ::unit] // unit).reshape(-1)

    def put(pool, a):
        a = jnp.moveaxis(a.astype(pool.dtype).reshape(-1, unit, K, W), 2, 0)
        return pool.reshape(K, P * tokens // unit, unit, W).at[:, index].set(a).reshape(pool.shape)

    return tuple(put(pool, a) for pool, a in zip(pools, new, strict=True))


def _tile(dtype) -> int:
    """Tokens of a tile in a TPU's memory: 8 of 32 bits, 16 of 16."""
    return 32 // jnp.dtype(dtype).itemsize


def _by_tiles(pools, new, page, offset, size: int):
    """`write` of single tokens, [B, K, W], by the kernel, each device its own key-value heads."""
    mesh = sharding.mesh_in_use()
    local = functools.partial(_put_rows, size=size)
    if mesh is None or mesh.size == 1:
        return local(tuple(pools), tuple(new), page, offset)
    heads = "tensor" if pools[0].shape[0] % mesh.shape["tensor"] == 0 else None
    of_pool, of_new, of_rows = PartitionSpec(heads), PartitionSpec(None, heads), PartitionSpec()
    return jax.shard_map(
        local, mesh=mesh, in_specs=((of_pool,) * len(pools), (of_new,) * len(new), of_rows, of_rows),
        out_specs=(of_pool,) * len(pools), check_vma=False,
    )(tuple(pools), tuple(new), page, offset)  # fmt: skip


def _put_rows(pools, new, page, offset, *, size: int):
    from jax.experimental import pallas as pl  # loaded where it is used
    from jax.experimental.pallas import tpu as pltpu

    K, P, tokens, W = pools[0].shape
    count, B = len(pools), page.shape[0]
    tiles = [pool.reshape(K, P * (tokens // size), size, W) for pool in pools]
    new = [a.astype(pool.dtype) for pool, a in zip(pools, new, strict=True)]
    which, row = page * (tokens // size) + offset // size, offset % size

    def kernel(which_ref, row_ref, *refs):
        token = jax.lax.broadcasted_iota(jnp.int32, (K, 1, size, W), 2)
        here = token == row_ref[pl.program_id(0)]
        for old, a, out in zip(refs[:count], refs[count : 2 * count], refs[2 * count :], strict=True):
            out[...] = jnp.where(here, a[...].reshape(K, 1, 1, W), old[...])

    tile = pl.BlockSpec((K, 1, size, W), lambda b, which, row: (0, which[b], 0, 0))
    token = pl.BlockSpec((1, K, W), lambda b, which, row: (b, 0, 0))
    with attention.kernels():
        out = pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2, grid=(B,), in_specs=[*[tile] * count, *[token] * count], out_specs=[tile] * count
            ),
            out_shape=[jax.ShapeDtypeStruct(t.shape, t.dtype) for t in tiles],
            input_output_aliases={2 + i: i for i in range(count)},
            compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        )(which, row, *tiles, *new)
    return tuple(a.reshape(pool.shape) for a, pool in zip(out, pools, strict=True))
