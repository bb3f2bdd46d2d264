"""Claims about writing to pages: units and the TPU's kernel leave what a scatter of single tokens leaves."""

import jax.numpy as jnp
import numpy as np
import pytest

from ril_jax.models import attention, paged_writes

K, PAGES, PAGE, W = 2, 12, 32, 128


def pools(dtype, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(K, PAGES, PAGE, W)), dtype) for _ in range(2)]


def expected(pools, new, page, offset):
    out = [np.array(pool, np.float32) for pool in pools]
    for pool, a in zip(out, new, strict=True):
        for b, c in np.ndindex(page.shape):
            pool[:, page[b, c], offset[b, c]] = np.asarray(a[b, c], np.float32)
    return out


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("backend", ["xla", "pallas"])
def test_single_tokens_go_to_their_places(dtype, backend):
    before = pools(dtype)
    new = [jnp.asarray(np.random.default_rng(1).normal(size=(5, 1, K, W)), dtype) for _ in range(2)]
    page, offset = np.array([[3], [7], [3], [11], [1]]), np.array([[0], [31], [17], [8], [15]])  # two tiles of page 3
    attention.use(backend)
    after = paged_writes.write(before, new, jnp.asarray(page), jnp.asarray(offset))
    for got, want in zip(after, expected(before, new, page, offset), strict=True):
        np.testing.assert_array_equal(np.asarray(got, np.float32), want)


def test_idle_rows_of_the_kernel_disturb_no_page_but_the_first():
    before = pools(jnp.bfloat16)
    new = [jnp.ones((4, 1, K, W), jnp.bfloat16)] * 2
    page, offset = jnp.asarray([[0], [5], [0], [0]]), jnp.asarray([[0], [20], [0], [0]])
    attention.use("pallas")
    for got, old in zip(paged_writes.write(before, new, page, offset), before, strict=True):
        assert (np.asarray(got[:, 5, 20]) == 1).all()
        same = np.array(got[:, 1:] == old[:, 1:])
        same[:, 4, 20] = True
        assert same.all()


@pytest.mark.parametrize("unit", [32, 8, 4])
def test_units_of_a_chunk_go_to_the_pages_of_their_row(unit):
    """Rows of 64 tokens: a whole one, one that ends within a unit, one that begins within a page, an idle one."""
    before = pools(jnp.float32)
    new = [jnp.asarray(np.random.default_rng(2).normal(size=(4, 64, K, W)), jnp.float32) for _ in range(2)]
    tables = np.array([[2, 9, 4], [1, 3, 0], [8, 5, 10], [6, 7, 11]])
    start, length = np.array([32, 0, 32 if unit == 32 else 16, 0]), np.array([64, 35, 64, 0])
    at = start[:, None] + np.arange(64)
    real = np.arange(64) < length[:, None]
    page = np.take_along_axis(tables, np.minimum(at // PAGE, 2), axis=1)
    page, offset = (np.where(real, x, 0) for x in (page, at % PAGE))
    after = paged_writes.write(before, new, jnp.asarray(page), jnp.asarray(offset), unit=unit)
    want = expected(before, [a[:3] for a in new], page[:3], offset[:3])
    for got, expect in zip(after, want, strict=True):
        got = np.array(got)
        rest = -(-35 // unit) * unit - 35  # of the last unit of the second row, behind its last token
        got[:, 3, 3 : 3 + rest], expect[:, 3, 3 : 3 + rest] = 0, 0
        np.testing.assert_array_equal(got[:, 1:], expect[:, 1:])
