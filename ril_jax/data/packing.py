"""From prompts and responses of any size to arrays of a few known shapes (numpy, on the host).

Image grids, window order, rotary positions and placeholders become index arrays here, so that what is compiled depends
only on the bucket: the padded prompt length, the padded response length, and the rung of the vision ladder.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from ril_jax.errors import InputError
from ril_jax.models.config import InternVisionConfig, ModelConfig, QwenVisionConfig
from ril_jax.models.internvl3 import TileInputs
from ril_jax.models.qwen2_5_vl import VisionInputs

VisionConfig = QwenVisionConfig | InternVisionConfig


class Patches(Protocol):
    """What packing needs of an image of Qwen2.5-VL (`images.PatchedImage`): patches [h*w, C] and grid (1, h, w)."""

    @property
    def patches(self) -> np.ndarray: ...
    @property
    def grid(self) -> tuple[int, int, int]: ...


class Tiles(Protocol):
    """What packing needs of an image of InternVL (`tiles.TiledImage`): patches [num_tiles, n, C], num_tokens of all."""

    @property
    def patches(self) -> np.ndarray: ...
    @property
    def num_tiles(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...


class Prompt(Protocol):
    """What packing needs of a prompt (`chat.EncodedPrompt`)."""

    @property
    def token_ids(self) -> np.ndarray: ...
    @property
    def images(self) -> Sequence[Any]: ...  # Patches or Tiles, as the model reads them


@dataclasses.dataclass(frozen=True)
class VisionRung:
    """One shape of Qwen2.5-VL's image buffer: at most `patches` in all, `images` images, `image_patches` in each.

    `windows` attention windows of at most `window_patches`; 0 stands for one to every 9 patches (a full window holds
    64, but the edges of images make smaller ones), and for the model's own window.
    """

    patches: int
    images: int
    image_patches: int
    windows: int = 0
    window_patches: int = 0

    @property
    def size(self) -> tuple[int, ...]:
        """What rungs are ordered by: the memory that they take."""
        return self.patches, self.images * self.image_patches

    def window_shape(self, config: QwenVisionConfig) -> tuple[int, int]:
        full = (config.window_size // config.patch_size) ** 2
        return self.windows or max(1, self.patches // 9), self.window_patches or full

    def num_features(self, config: VisionConfig) -> int:
        """Rows of the encoded features."""
        return self.patches // config.merge_unit


@dataclasses.dataclass(frozen=True)
class TileRung:
    """One shape of InternVL's image buffer: at most `tiles` tiles of all images together.

    `tile_patches`: patches of a tile; 0 stands for as many as the model's position table has.
    """

    tiles: int
    tile_patches: int = 0

    @property
    def size(self) -> tuple[int, ...]:
        """What rungs are ordered by: the memory that they take."""
        return (self.tiles,)

    def num_features(self, config: VisionConfig) -> int:
        """Rows of the encoded features."""
        assert isinstance(config, InternVisionConfig)
        return self.tiles * (self.tile_patches or math.prod(config.grid)) // config.merge_unit


Rung = VisionRung | TileRung


class PromptBatch(NamedTuple):
    """B prompts, padded on the left to P, and their images.

    token_ids: [B, P] int32; positions: [3, B, P] int32 (M-RoPE axes; equal for text and for InternVL);
    valid: [B, P] bool; feature_index: [B, P] int32, row of the encoded features, -1 for text; next_position: [B] int32,
    of the first response token; row_valid: [B] bool, False for rows that only fill the batch; vision: what the tower of
    the model reads, None for text only.
    """

    token_ids: np.ndarray
    positions: np.ndarray
    valid: np.ndarray
    feature_index: np.ndarray
    next_position: np.ndarray
    row_valid: np.ndarray
    vision: VisionInputs | TileInputs | None


class ResponseBatch(NamedTuple):
    """S responses a row, padded on the right to R: token_ids [B, S, R] int32, mask [B, S, R] bool."""

    token_ids: np.ndarray
    mask: np.ndarray


def pick_bucket(length: int, buckets: Sequence[int], *, name: str) -> int:
    """The smallest bucket that holds `length`. Raises InputError with the mend where none does."""
    for bucket in sorted(buckets):
        if length <= bucket:
            return bucket
    raise InputError(f"{name} is {length} tokens long, over the largest bucket {max(buckets)}; raise it in the config")


def pick_rung(images: Sequence[Any], rungs: Sequence[Rung], config: VisionConfig) -> Rung | None:
    """The smallest rung of the model's family that holds all images, None for no images.

    Raises InputError where none does.
    """
    if not images:
        return None
    ordered = sorted(rungs, key=lambda rung: rung.size)
    if isinstance(config, InternVisionConfig):
        return _pick_tile_rung(images, [rung for rung in ordered if isinstance(rung, TileRung)], config)
    return _pick_patch_rung(images, [rung for rung in ordered if isinstance(rung, VisionRung)], config)


def _pick_patch_rung(images: Sequence[Patches], rungs: Sequence[VisionRung], config: QwenVisionConfig) -> VisionRung:
    sizes = [image.grid[0] * image.grid[1] * image.grid[2] for image in images]
    lengths = np.concatenate([window_order(image.grid[1], image.grid[2], config)[1] for image in images])
    for rung in rungs:
        fits = sum(sizes) <= rung.patches and len(sizes) <= rung.images and max(sizes) <= rung.image_patches
        windows, window_patches = rung.window_shape(config)
        if fits and len(lengths) <= windows and max(lengths) <= window_patches:
            return rung
    raise InputError(
        f"a batch has {len(sizes)} images with {sum(sizes)} patches ({max(sizes)} in the largest), over every rung of "
        f"config.data.vision_rungs; add a larger one, or lower max_pixels or the batch size"
    )


def _pick_tile_rung(images: Sequence[Tiles], rungs: Sequence[TileRung], config: InternVisionConfig) -> TileRung:
    tiles = [image.num_tiles for image in images]
    for rung in rungs:
        if sum(tiles) <= rung.tiles:
            # The processor's tiles may be of another size than the position table; all are of one.
            return dataclasses.replace(rung, tile_patches=images[0].num_tokens * config.merge_unit // tiles[0])
    raise InputError(
        f"a batch has {len(tiles)} images with {sum(tiles)} tiles ({max(tiles)} in the largest), over every rung of "
        f"tiles in config.data.vision_rungs; add a larger one, such as ({sum(tiles)},), or lower max_tiles or the "
        f"batch size"
    )


def pack_prompts(
    prompts: Sequence[Prompt], model: ModelConfig, *, batch: int, prompt_len: int, rung: Rung | None
) -> PromptBatch:
    """Arrays of `batch` rows from at most as many prompts; the rest are filling rows that nothing attends to."""
    ids = np.zeros((batch, prompt_len), np.int32)
    positions = np.zeros((3, batch, prompt_len), np.int32)
    valid = np.zeros((batch, prompt_len), bool)
    feature_index = np.full((batch, prompt_len), -1, np.int32)
    next_position = np.zeros((batch,), np.int32)
    images: list[Any] = []
    offset = 0
    for b, prompt in enumerate(prompts):
        length = len(prompt.token_ids)
        row = slice(prompt_len - length, prompt_len)
        ids[b, row], valid[b, row] = prompt.token_ids, True
        where = prompt.token_ids == model.image_token_id if model.image_token_id is not None else np.zeros(length, bool)
        positions[:, b, row], next_position[b] = prompt_positions(where, prompt.images, model)
        features = []
        for image in prompt.images:
            assert model.vision is not None
            order = feature_order(image, model.vision)
            features.append(offset + order)
            offset += len(order)
            images.append(image)
        if features:
            feature_index[b, row][where] = np.concatenate(features)
    vision = None if rung is None else pack_images(images, model.vision, rung)  # type: ignore[arg-type]
    row_valid = np.arange(batch) < len(prompts)
    return PromptBatch(ids, positions, valid, feature_index, next_position, row_valid, vision)


def prompt_positions(is_image: np.ndarray, images: Sequence[Any], model: ModelConfig) -> tuple[np.ndarray, int]:
    """Positions [3, T] of one unpadded prompt and the position of what follows, as the model's family counts them."""
    if isinstance(model.vision, QwenVisionConfig):
        return mrope_positions(is_image, [image.grid for image in images], merge=model.vision.spatial_merge_size)
    return np.broadcast_to(np.arange(len(is_image), dtype=np.int32), (3, len(is_image))), len(is_image)


def feature_order(image: Any, config: VisionConfig) -> np.ndarray:
    """Which of an image's features, as they stand in the buffer, belongs to each of its placeholders in turn."""
    if isinstance(config, QwenVisionConfig):
        return window_order(image.grid[1], image.grid[2], config)[2]
    return np.arange(image.num_tokens)


def pack_responses(
    responses: Sequence[Sequence[np.ndarray]], *, batch: int, response_len: int, slots: int = 0
) -> ResponseBatch:
    """Arrays [batch, S, R] from B lists of up to S token arrays; S is the longest list, or `slots`. Cuts at R."""
    num = slots or max((len(row) for row in responses), default=0)
    ids = np.zeros((batch, num, response_len), np.int32)
    mask = np.zeros((batch, num, response_len), bool)
    for b, row in enumerate(responses):
        for s, tokens in enumerate(row):
            tokens = tokens[:response_len]
            ids[b, s, : len(tokens)], mask[b, s, : len(tokens)] = tokens, True
    return ResponseBatch(ids, mask)


def pack_images(images: Sequence[Any], config: VisionConfig, rung: Rung) -> VisionInputs | TileInputs:
    """All images of a batch in a buffer of the rung's shape, as the model's tower reads them."""
    if isinstance(config, QwenVisionConfig):
        assert isinstance(rung, VisionRung)
        return _pack_patches(images, config, rung)
    assert isinstance(rung, TileRung)
    return _pack_tiles(images, config, rung)


def _pack_tiles(images: Sequence[Tiles], config: InternVisionConfig, rung: TileRung) -> TileInputs:
    """One buffer of `rung.tiles` tiles, image after image, each with its thumbnail last."""
    patches = np.zeros((rung.tiles, rung.tile_patches or math.prod(config.grid), config.patch_dim), np.float32)
    start = 0
    for image in images:
        patches[start : start + image.num_tiles] = image.patches
        start += image.num_tiles
    return TileInputs(patches)  # type: ignore[arg-type]  # on the host still; a device array from the jitted call on


def _pack_patches(images: Sequence[Patches], config: QwenVisionConfig, rung: VisionRung) -> VisionInputs:
    """One buffer of `rung.patches` rows in window order, with its index tables."""
    X, unit = rung.patches, config.merge_unit
    windows, window_patches = rung.window_shape(config)
    patches = np.empty((X, config.patch_dim), np.float32)
    positions = np.zeros((X, 2), np.int32)
    window_index = np.full((windows, window_patches), X, np.int32)
    window_slot = np.full((X,), window_index.size, np.int32)
    frame_index = np.full((rung.images, rung.image_patches), X, np.int32)
    frame_slot = np.full((X,), frame_index.size, np.int32)
    start, w = 0, 0
    for i, image in enumerate(images):
        _, height, width = image.grid
        order, lengths, _ = window_order(height, width, config)
        n = height * width
        rows = slice(start, start + n)
        if len(lengths) == 1:  # one window is in order as it is
            patches[rows] = image.patches
        else:
            patches[rows] = image.patches.reshape(-1, unit, config.patch_dim)[order].reshape(n, -1)
        positions[rows] = patch_positions(height, width, config.spatial_merge_size)[order].reshape(n, 2)
        frame_index[i, :n] = np.arange(start, start + n)
        frame_slot[rows] = i * rung.image_patches + np.arange(n)
        at = start
        for length in lengths:
            window_index[w, :length] = np.arange(at, at + length)
            window_slot[at : at + length] = w * window_patches + np.arange(length)
            at, w = at + length, w + 1
        start += n
    patches[start:] = 0
    tables = (patches, positions, window_index, window_slot, frame_index, frame_slot)
    return VisionInputs(*tables)  # type: ignore[arg-type]  # on the host still; device arrays from the jitted call on


@functools.lru_cache(maxsize=4096)
def window_order(height: int, width: int, config: QwenVisionConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Window order of one image of height x width patches (HF `get_window_index`).

    Returns: (order: merge groups in window order, lengths: patches of each window, inverse: row of each group in the
    ordered buffer, groups counted along rows).
    """
    merge = config.spatial_merge_size
    rows, cols = height // merge, width // merge
    side = config.window_size // merge // config.patch_size
    groups = np.arange(rows * cols).reshape(rows, cols)
    blocks = [
        groups[r : r + side, c : c + side].reshape(-1) for r in range(0, rows, side) for c in range(0, cols, side)
    ]
    order = np.concatenate(blocks)
    lengths = np.array([len(block) * merge * merge for block in blocks])
    return order, lengths, np.argsort(order).astype(np.int32)


@functools.lru_cache(maxsize=4096)
def patch_positions(height: int, width: int, merge: int) -> np.ndarray:
    """(row, column) of every patch, [groups, merge^2, 2], in the processor's order of patches."""
    grid = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), axis=-1)
    grid = grid.reshape(height // merge, merge, width // merge, merge, 2).transpose(0, 2, 1, 3, 4)
    return grid.reshape(-1, merge * merge, 2).astype(np.int32)


def mrope_positions(
    is_image: np.ndarray, grids: Sequence[tuple[int, int, int]], *, merge: int
) -> tuple[np.ndarray, int]:
    """M-RoPE positions [3, T] of one unpadded prompt and the position of what follows (HF `get_rope_index`).

    Args:
      is_image: [T] bool, the expanded image placeholders, in as many runs as there are grids.
    """
    length = len(is_image)
    positions = np.empty((3, length), np.int32)
    current, at = 0, 0
    for t, h, w in grids:
        start = at + int(np.argmax(is_image[at:]))
        positions[:, at:start] = current + np.arange(start - at)
        current += start - at
        h, w = h // merge, w // merge
        index = np.indices((t, h, w)).reshape(3, -1)
        positions[:, start : start + t * h * w] = index + current
        current += max(h, w)
        at = start + t * h * w
    positions[:, at:] = current + np.arange(length - at)
    return positions, current + length - at
