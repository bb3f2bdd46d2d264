"""Claims about ril_jax/data/packing.py: index tables against transformers' own, padding, buckets and their errors."""

import itertools

import numpy as np
import pytest
import torch
from helpers import hf_internvl, hf_models
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from ril_jax.data.packing import (
    TileRung,
    VisionRung,
    mrope_positions,
    pack_images,
    pack_prompts,
    pack_responses,
    patch_positions,
    pick_bucket,
    pick_rung,
    window_order,
)
from ril_jax.errors import InputError
from ril_jax.models.config import InternVisionConfig, ModelConfig, QwenVisionConfig, TextConfig

GRIDS = [(2, 2), (2, 40), (40, 2), (6, 8), (8, 8), (10, 18), (16, 24), (34, 22)]


def vision_config(window_size=112):
    return QwenVisionConfig(
        depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64, fullatt_block_indexes=(1,),
        window_size=window_size,
    )  # fmt: skip


@pytest.mark.parametrize("window_size", [56, 112, 168])
@pytest.mark.parametrize("grid", GRIDS)
def test_window_order_equals_transformers(grid, window_size):
    order, lengths, inverse = window_order(*grid, vision_config(window_size))
    index, cu_seqlens = get_vision_window_index(torch.tensor([[1, *grid]]), 2, window_size, 14)
    np.testing.assert_array_equal(order, index)
    np.testing.assert_array_equal(np.cumsum(lengths), cu_seqlens[1:])
    np.testing.assert_array_equal(order[inverse], np.arange(len(order)))


@pytest.mark.parametrize("grid", GRIDS)
def test_patch_positions_equal_transformers(grid):
    np.testing.assert_array_equal(
        patch_positions(*grid, 2).reshape(-1, 2), get_vision_position_ids(torch.tensor([[1, *grid]]), 2)
    )


def test_rotary_positions_equal_transformers_for_random_prompts(tiny_vl):
    rng = np.random.default_rng(0)
    for _ in range(25):
        sizes = [(2 * rng.integers(1, 8), 2 * rng.integers(1, 8)) for _ in range(rng.integers(0, 4))]
        p = hf_models.prompt(rng, int(rng.integers(1, 9)), *sizes, text_between=int(rng.integers(0, 5)))
        where = p.token_ids == hf_models.IMAGE
        positions, following = mrope_positions(where, [im.grid for im in p.images], merge=2)
        grids = torch.tensor([im.grid for im in p.images]) if p.images else None
        reference, delta = tiny_vl.hf.model.get_rope_index(
            torch.tensor(p.token_ids)[None], mm_token_type_ids=torch.tensor(where)[None].int(), image_grid_thw=grids
        )
        np.testing.assert_array_equal(positions, reference[:, 0])
        assert following == len(p.token_ids) + int(delta[0, 0])


def test_a_rung_has_windows_enough_for_every_image_of_16_patches_and_more():
    """`VisionRung.windows` counts on 9 patches a window; the processor's min_pixels never go below 16 patches."""
    config = vision_config()
    for height, width in itertools.product(range(2, 66, 2), repeat=2):
        if height * width >= 16:
            assert len(window_order(height, width, config)[1]) * 9 <= height * width


def test_packed_images_can_be_read_back_from_every_table():
    rng = np.random.default_rng(1)
    config, rung = vision_config(), VisionRung(patches=320, images=4, image_patches=192)
    images = [hf_models.image(rng, *size) for size in ((10, 18), (4, 4), (6, 8))]
    packed = pack_images(images, config, rung)
    used = sum(len(im.patches) for im in images)
    assert np.all(packed.patches[used:] == 0)
    start = 0
    for i, im in enumerate(images):
        n = len(im.patches)
        rows = packed.frame_index[i, :n]
        np.testing.assert_array_equal(rows, np.arange(start, start + n))
        # By position, each row is the patch that stands there in the image.
        original = {tuple(at): row for at, row in zip(patch_positions(*im.grid[1:], 2).reshape(-1, 2), im.patches)}  # noqa: B905
        for row in rows:
            np.testing.assert_array_equal(packed.patches[row], original[tuple(packed.positions[row])])
        start += n
    for index, slot in ((packed.window_index, packed.window_slot), (packed.frame_index, packed.frame_slot)):
        members = index[index < rung.patches]
        np.testing.assert_array_equal(np.sort(members), np.arange(used))
        np.testing.assert_array_equal(index.reshape(-1)[slot[:used]], np.arange(used))
        assert np.all(slot[used:] == index.size)
    # A window holds the patches of one image and one 8 x 8 block of it.
    frame_of = packed.frame_slot // rung.image_patches
    for window in packed.window_index:
        window = window[window < rung.patches]
        if len(window):
            assert len(np.unique(frame_of[window])) == 1
            assert len(np.unique(packed.positions[window] // 8, axis=0)) == 1


def test_prompts_are_padded_left_and_each_placeholder_finds_its_feature(tiny_vl):
    rng = np.random.default_rng(2)
    prompts = [hf_models.prompt(rng, 3, (6, 8)), hf_models.prompt(rng, 5), hf_models.prompt(rng, 2, (4, 4), (2, 6))]
    batch = pack_prompts(prompts, tiny_vl.config, batch=4, prompt_len=40, rung=VisionRung(128, 4, 64))
    features = []
    for b, p in enumerate(prompts):
        n = len(p.token_ids)
        np.testing.assert_array_equal(batch.token_ids[b, -n:], p.token_ids)
        np.testing.assert_array_equal(batch.valid[b], np.arange(40) >= 40 - n)
        np.testing.assert_array_equal(batch.feature_index[b] >= 0, batch.token_ids[b] == hf_models.IMAGE)
        rows = batch.feature_index[b][batch.feature_index[b] >= 0]
        features += rows.tolist()
        # The k-th placeholder stands for the k-th merge group along the rows of its image.
        groups = np.concatenate([im.patches.reshape(-1, 4, im.patches.shape[-1]) for im in p.images] or [np.empty(0)])
        packed = batch.vision.patches.reshape(-1, 4, hf_models.PATCH_DIM)
        np.testing.assert_array_equal(packed[rows].ravel(), groups.ravel())
    assert sorted(features) == list(range(12 + 4 + 3))
    np.testing.assert_array_equal(batch.row_valid, [True, True, True, False])
    assert not batch.valid[3].any()


def test_text_only_batches_have_no_vision_inputs(tiny_text):
    rng = np.random.default_rng(3)
    prompts = [hf_models.prompt(rng, n) for n in (3, 6)]
    batch = pack_prompts(prompts, tiny_text.config, batch=2, prompt_len=8, rung=None)
    assert batch.vision is None
    np.testing.assert_array_equal(batch.next_position, [3, 6])
    np.testing.assert_array_equal(batch.positions[:, 1], [[0, 0, 0, 1, 2, 3, 4, 5]] * 3)


def test_responses_are_padded_right_and_cut():
    rows = [[np.array([5, 6]), np.array([7])], [np.arange(9), np.array([], np.int32)]]
    batch = pack_responses(rows, batch=3, response_len=4)
    np.testing.assert_array_equal(batch.token_ids[0], [[5, 6, 0, 0], [7, 0, 0, 0]])
    np.testing.assert_array_equal(batch.token_ids[1], [[0, 1, 2, 3], [0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.mask.sum(-1), [[2, 1], [4, 0], [0, 0]])


def test_the_smallest_bucket_that_holds_is_picked():
    assert [pick_bucket(n, [64, 16, 32], name="x") for n in (1, 16, 17, 64)] == [16, 16, 32, 64]
    with pytest.raises(InputError, match="prompt of row q7 is 65 tokens long, over the largest bucket 64"):
        pick_bucket(65, [64, 16], name="prompt of row q7")


def test_the_smallest_rung_that_holds_is_picked():
    rng = np.random.default_rng(4)
    rungs = [VisionRung(512, 8, 256), VisionRung(128, 4, 64), VisionRung(256, 4, 256)]
    config = vision_config()

    def pick(*sizes):
        return pick_rung([hf_models.image(rng, *size) for size in sizes], rungs, config)

    assert pick() is None
    assert pick((8, 8), (8, 8)) == rungs[1]
    assert pick((8, 8), (8, 8), (2, 2)) == rungs[2]  # 132 patches
    assert pick((8, 10)) == rungs[2]  # 80 patches in one image
    assert pick(*[(4, 4)] * 5) == rungs[0]  # 5 images
    with pytest.raises(InputError, match=r"9 images with 144 patches \(16 in the largest\).*vision_rungs"):
        pick(*[(4, 4)] * 9)
    # 40 patches fit four times over, but 10 images of 2 x 2 are 10 windows of 4 patches.
    assert (
        pick_rung([hf_models.image(rng, 2, 2)] * 10, [VisionRung(81, 10, 64), VisionRung(99, 10, 64)], config).patches
        == 99
    )


# ---------------------------------------------------------------- InternVL's tiles


def internvl_config(image_size=56):
    text = TextConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-6,
    )  # fmt: skip
    vision = InternVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, out_hidden_size=32,
        norm="layer_norm", qkv_bias=True, qk_norm=False, image_size=(image_size, image_size),
    )  # fmt: skip
    return ModelConfig("internvl", text, vision, image_token_id=hf_models.IMAGE)


@pytest.mark.parametrize("size", [56, 84])
def test_each_placeholder_finds_the_feature_of_its_own_square_of_its_own_tile(size):
    """Rows of several images, of one, and of text alone; tiles of the position table's size and of another."""
    rng = np.random.default_rng(5)
    config = internvl_config()
    prompts = [
        hf_internvl.prompt(rng, 3, 2, 1, 4, text_between=0, size=size),
        hf_internvl.prompt(rng, 5),
        hf_internvl.prompt(rng, 2, 3, size=size),
    ]
    images = [image for p in prompts for image in p.images]
    rung = pick_rung(images, [TileRung(16), TileRung(12), TileRung(4)], config.vision)
    batch = pack_prompts(prompts, config, batch=4, prompt_len=128, rung=rung)
    n = (size // 14) ** 2
    assert batch.vision.patches.shape == (12, n, 588)
    assert batch.vision.patches.dtype == np.float32
    assert rung.num_features(config.vision) == 12 * n // 4
    tiles = np.concatenate([image.pixels for image in images])  # [10, 3, size, size]
    # What the tower makes of the buffer, were a feature the pixels that it sees: the square of 28 pixels.
    side = size // 28
    squares = tiles.reshape(10, 3, side, 28, side, 28).transpose(0, 2, 4, 1, 3, 5).reshape(-1, 3 * 28 * 28)
    cut = batch.vision.patches.reshape(12, side, 2, side, 2, 3, 14, 14)
    seen = np.einsum("tarbscpq->tabcrpsq", cut).reshape(-1, 3 * 28 * 28)
    np.testing.assert_array_equal(seen[: len(squares)], squares)
    assert not seen[len(squares) :].any()
    expected = iter(range(len(squares)))
    for b, p in enumerate(prompts):
        length = len(p.token_ids)
        np.testing.assert_array_equal(batch.token_ids[b, -length:], p.token_ids)
        np.testing.assert_array_equal(batch.positions[:, b, -length:], [np.arange(length)] * 3)
        assert batch.next_position[b] == length
        where = batch.feature_index[b] >= 0
        np.testing.assert_array_equal(where, batch.token_ids[b] == hf_models.IMAGE)
        for row in batch.feature_index[b][where]:
            assert row == next(expected)
    assert next(expected, None) is None
    np.testing.assert_array_equal(batch.row_valid, [True, True, True, False])
    assert not batch.valid[3].any()


def test_internvl_batch_of_text_alone_has_no_tiles():
    rng = np.random.default_rng(6)
    prompts = [hf_internvl.prompt(rng, n) for n in (3, 6)]
    assert pick_rung([], [TileRung(4)], internvl_config().vision) is None
    batch = pack_prompts(prompts, internvl_config(), batch=2, prompt_len=8, rung=None)
    assert batch.vision is None
    assert (batch.feature_index == -1).all()


def test_the_smallest_rung_of_tiles_that_holds_is_picked_and_those_of_patches_are_passed_over():
    rng = np.random.default_rng(7)
    rungs = [TileRung(20), VisionRung(512, 8, 256), TileRung(5), TileRung(10)]
    config = internvl_config().vision

    def pick(*tiles):
        return pick_rung(hf_internvl.prompt(rng, 1, *tiles).images, rungs, config)

    assert [pick(*tiles).tiles for tiles in ((1,), (2, 3), (6,), (1,) * 10, (13, 7))] == [5, 5, 10, 10, 20]
    with pytest.raises(InputError, match=r"3 images with 21 tiles \(13 in the largest\).*\(21,\).*max_tiles"):
        pick(13, 7, 1)
    patches = [hf_models.image(rng, 4, 4)]
    assert pick_rung(patches, rungs, vision_config()) == rungs[1]
