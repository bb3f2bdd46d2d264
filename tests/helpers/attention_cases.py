"""Inputs of attention, and a process of its own with 8 virtual devices that compares meshes with one device.

python -m helpers.attention_cases OUTPUT.npz
"""

import functools
import os
import sys
from typing import Any, NamedTuple

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np

from ril_jax import sharding
from ril_jax.models import attention_pallas, attention_xla, paged


class Group(NamedTuple):
    """Rows with padding on the left of a prompt, within a response and at the ends of some, and one row of nothing."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    valid: jax.Array
    sizes: dict[str, int]


def arrays(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def group(B: int, P: int, S: int, R: int, N: int, K: int, H: int = 12) -> Group:
    T = P + S * R
    valid = np.ones((B, T), bool)
    valid[0, :7] = False
    if S:
        valid[0, P + R - 20 : P + R] = False
        valid[0, P + R + 5 : P + R + 8] = False
    valid[B - 1] = False
    q, k, v = arrays((B, T, N, H), (B, T, K, H), (B, T, K, H))
    return Group(q, k, v, jnp.asarray(valid), {"prompt_len": P, "num_responses": S})


def run(function, case: Group):
    """Output and gradients where tokens are real."""

    def masked(q, k, v):
        return function(q, k, v, case.valid, **case.sizes) * case.valid[..., None, None]

    return value_and_gradients(masked, case.q, case.k, case.v)


def value_and_gradients(function, q, k, v):
    weights = arrays(q.shape)[0][::-1]

    def loss(q, k, v):
        out = function(q, k, v)
        return jnp.sum(out * weights), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return jax.block_until_ready((out, *gradients))


def main(output: str) -> None:
    # One program at a time: virtual devices share few threads, and a program that waits for the others holds them.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    out: dict[str, Any] = {}

    def mesh(data: int, fsdp: int, tensor: int) -> None:
        count = data * fsdp * tensor
        sharding.use(sharding.mesh_of(jax.devices()[:count], data=data, fsdp=fsdp, tensor=tensor))

    def compare(name: str, found, expected) -> None:
        for i, (a, b) in enumerate(zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)):
            out[f"{name} {i}/found"], out[f"{name} {i}/expected"] = np.asarray(a), np.asarray(b)

    # Rows and heads over devices, by the kernel; then one key-value head for several devices, and heads and rows that
    # do not divide, by the plain form, which is quicker.
    def divided(q, k, v, valid, **sizes):
        plain = lambda q, k, v, valid: attention_xla.group_attention(q, k, v, valid, **sizes)  # noqa: E731
        return attention_pallas.over_mesh(plain, q, k, v, valid, over_rows=True)

    for name, form, sizes, B, N, K in (
        ("kernel", attention_pallas.group_attention, (2, 2, 2), 4, 4, 2),
        ("shared", divided, (1, 2, 4), 2, 8, 2), ("on every device", divided, (2, 2, 2), 3, 3, 1),
    ):  # fmt: skip
        mesh(1, 1, 1)
        case = group(B, 40, 2, 30, N, K)
        expected = run(attention_xla.group_attention, case)
        mesh(*sizes)
        compare(f"group {name}", run(form, case), expected)

    # Buffers of images one a device, as `VisionLanguageModel.encode` has them.
    qkv = arrays(*[(4, 1, 50, 2, 12)] * 3)
    mesh(1, 1, 1)
    expected = value_and_gradients(jax.vmap(attention_xla.full_attention), *qkv)
    mesh(2, 2, 2)
    over_groups = jax.vmap(attention_pallas.full_attention, spmd_axis_name=sharding.batch_axes(4))
    compare("tiles", value_and_gradients(over_groups, *qkv), expected)

    # Pages, divided as the decode kernel's are; the kernel itself is interpreted on one device in test_engine.py.
    def last(q, k, v, rows):
        return paged._attention_of_last(q, paged.PagePool(k, v), *rows, block=16)

    rng = np.random.default_rng(1)
    for name, sizes, N, K in (("divided", (2, 2, 2), 4, 2), ("shared", (1, 2, 4), 8, 2)):
        B, H, page, pages = 4, 16, 8, 14
        q, *pool = arrays((B, N, H), (K, pages, page, H), (K, pages, page, H))
        tables = jnp.asarray(rng.permutation(np.arange(1, pages))[:12].reshape(B, 3), jnp.int32)
        rows = (tables, jnp.asarray([5, 24, 17, 1], jnp.int32))
        mesh(*sizes)
        spread = jax.jit(functools.partial(attention_pallas.over_mesh, last, over_rows=True, axis=1, kv_axis=0))
        compare(f"decode {name}", spread(q, *pool, rows), last(q, *pool, rows))
    np.savez(output, **out)


if __name__ == "__main__":
    main(*sys.argv[1:])
