"""Claims about attention: the kernels for TPUs, interpreted here, compute what plain XLA computes, gradients too.

Products are float32 in both, so results differ by rounding alone, some 1e-6 of the largest value; 2e-5 leaves room for
sums in another order.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import attention_cases

from ril_jax import sharding
from ril_jax.data.packing import VisionRung, pack_images
from ril_jax.errors import InputError
from ril_jax.models import attention, attention_pallas, attention_xla
from ril_jax.models.attention_pallas import BandMask, GroupMask, PrefixMask, block_size
from ril_jax.models.config import QwenVisionConfig

TESTS = Path(__file__).parents[1]


def assert_same(found, expected, message=""):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        scale = np.abs(b).max()
        assert scale > 0
        np.testing.assert_allclose(a, b, atol=2e-5 * scale, err_msg=message)


@pytest.mark.parametrize(
    ("prompt_len", "num_responses", "response_len", "heads", "kv_heads"),
    [(100, 3, 60, 4, 2), (40, 2, 150, 3, 3), (130, 0, 0, 4, 1)],
    ids=["blocks hold several responses", "a response lies in several blocks", "a prompt alone"],
)
def test_group_kernel_equals_the_reference(prompt_len, num_responses, response_len, heads, kv_heads):
    case = attention_cases.group(2, prompt_len, num_responses, response_len, heads, kv_heads)
    expected = attention_cases.run(attention_xla.group_attention, case)
    assert_same(attention_cases.run(attention_pallas.group_attention, case), expected)


def test_padding_is_finite_and_seen_by_no_token():
    case = attention_cases.group(2, 100, 2, 60, 4, 2)
    *qkv, valid, sizes = case.q, case.k, case.v, case.valid, case.sizes
    plain = attention_pallas.group_attention(*qkv, valid, **sizes)
    changed = (jnp.where(valid[..., None, None], a, 1e4) for a in qkv)
    other = attention_pallas.group_attention(*changed, valid, **sizes)
    assert bool(jnp.isfinite(other).all())
    np.testing.assert_array_equal(*(np.asarray(a)[np.asarray(valid)] for a in (plain, other)))


def test_tile_kernel_equals_the_reference():
    q, k, v = attention_cases.arrays((2, 150, 3, 12), (2, 150, 3, 12), (2, 150, 3, 12))
    expected = attention_cases.value_and_gradients(attention_xla.full_attention, q, k, v)
    assert_same(attention_cases.value_and_gradients(attention_pallas.full_attention, q, k, v), expected)


def test_frame_kernel_equals_the_reference_on_packed_images():
    vision = QwenVisionConfig(1, 24, 48, 2, 64, (0,), patch_size=14, window_size=56)
    shapes = [(8, 12), (4, 6), (10, 10)]
    images = [
        SimpleNamespace(patches=np.zeros((h * w, vision.patch_dim), np.float32), grid=(1, h, w)) for h, w in shapes
    ]
    packed = pack_images(images, vision, VisionRung(280, 4, 100))
    index, slot = packed.frame_index, jnp.asarray(packed.frame_slot)
    real = (slot < index.size)[:, None, None]
    assert 0 < real.sum() < len(slot)
    q, k, v = attention_cases.arrays(*[(280, 2, 12)] * 3)
    results = [
        attention_cases.value_and_gradients(lambda *qkv, f=form: f(*qkv, index, slot) * real, q, k, v)
        for form in (attention_xla.frame_attention, attention_pallas.frame_attention)
    ]
    assert_same(results[1], results[0])


@pytest.mark.parametrize(
    "mask",
    [
        GroupMask(768, 200, 130),
        GroupMask(512, 128, 128),
        GroupMask(512, 300, 0),
        PrefixMask(512, 300),
        BandMask(768, 150),
    ],
    ids=str,
)
def test_masks_are_the_rule_and_know_their_empty_blocks(mask):
    i, j = np.indices(mask.shape)
    if isinstance(mask, GroupMask):
        part = lambda t: np.where(t < mask.prompt_len, -1, (t - mask.prompt_len) // (mask.response_len or 10**6))  # noqa: E731
        expected = (j <= i) & ((part(j) == -1) | (part(i) == part(j)))
    else:
        expected = j < mask.length if isinstance(mask, PrefixMask) else abs(i - j) < mask.width
    np.testing.assert_array_equal(mask[:, :], expected)
    blocks = expected.reshape(-1, 128, mask.size // 128, 128).any(axis=(1, 3))
    assert mask.count_blocks(128) == blocks.sum() < blocks.size
    for a, b in np.ndindex(blocks.shape):
        part = (slice(128 * a, 128 * a + 128), slice(128 * b, 128 * b + 128))
        np.testing.assert_array_equal(mask[part], expected[part])


def test_blocks_are_large_where_padding_is_small():
    assert [block_size(n) for n in (90, 1025, 1280, 2048, 7936)] == [128, 384, 256, 512, 512]


def test_the_backend_follows_choice_and_devices():
    sharding.use(sharding.mesh_of(jax.devices()[:1], data=1, fsdp=1, tensor=1))
    assert attention.backend() == "xla"
    attention.use("pallas")
    assert attention.backend() == "pallas"
    attention.use("auto")
    with pytest.raises(InputError, match=r"config\.attention='flash' is not known"):
        attention.use("flash")


def test_every_mesh_gives_what_one_device_gives(tmp_path):
    """In a process of its own with eight virtual devices; see `helpers/attention_cases.py`."""
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}
    command = [sys.executable, "-m", "helpers.attention_cases", str(tmp_path / "out.npz")]
    subprocess.run(command, check=True, env=environment, timeout=420)
    with np.load(tmp_path / "out.npz") as arrays:
        found = {name: arrays[name] for name in arrays}
    names = {name.rpartition("/")[0] for name in found}
    assert len(names) == 4 * 4 + 2
    for name in names:
        assert_same(found[f"{name}/found"], found[f"{name}/expected"], name)
