"""Claims about ril_jax/data/tiles.py, against transformers' PIL processor as InternVLProcessor calls it."""

import json
import pickle

import numpy as np
import pytest
from helpers.internvl_folder import MEAN, STD, build_internvl_folder, processor_config
from PIL import Image
from transformers import AutoImageProcessor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
    GotOcr2ImageProcessorPil,
    get_optimal_tiled_canvas,
)

from ril_jax.data.images import decode_image
from ril_jax.data.tiles import TiledImage, TileImageProcessor, tile_grid
from ril_jax.errors import InputError

SIZES = [
    (1, 1),
    (1, 400),
    (400, 1),
    (3, 2),
    (2, 3),
    (56, 56),
    (112, 112),
    (79, 79),  # 6241 pixels, just under half of 2 x 2 tiles
    (80, 80),  # 6400 pixels, just over
    (13, 2000),
    (2000, 13),
    (100, 640),
    (333, 517),
    (300, 100),
    (90, 150),
]


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(height * 10007 + width).integers(0, 256, (height, width, channels), dtype=np.uint8)


def reference(image: Image.Image, *, tile_size: int = 448, min_patches: int = 1, max_patches: int = 12) -> np.ndarray:
    """[tiles, 3, size, size] of HF's processor with the arguments that InternVLProcessor gives it."""
    processor = GotOcr2ImageProcessorPil(
        size={"height": tile_size, "width": tile_size}, image_mean=MEAN, image_std=STD,
        min_patches=min_patches, max_patches=max_patches,
    )  # fmt: skip
    out = processor(image, crop_to_patches=True, return_tensors="np")
    assert len(out["pixel_values"]) == out["num_patches"].sum()
    return out["pixel_values"]


def pixels(tiled: TiledImage, patch: int = 14) -> np.ndarray:
    """The tiles [tiles, 3, size, size] that the patches were cut from."""
    tiles, n, _ = tiled.patches.shape
    side = int(n**0.5)
    return np.einsum("tijcpq->tcipjq", tiled.patches.reshape(tiles, side, side, 3, patch, patch)).reshape(
        tiles, 3, side * patch, side * patch
    )


# ---------------------------------------------------------------- pixels


@pytest.mark.parametrize("limits", [(1, 12), (1, 1), (1, 4), (2, 6), (4, 4)])
@pytest.mark.parametrize("size", SIZES)
def test_tiles_are_bit_equal_to_hf(size, limits):
    image = Image.fromarray(noise(*size))
    hf = reference(image, tile_size=56, min_patches=limits[0], max_patches=limits[1])
    processor = TileImageProcessor(*limits, tile_size=56)
    ours = processor(image)
    assert ours.patches.dtype == np.float32
    assert ours.patches.flags.c_contiguous
    np.testing.assert_array_equal(pixels(ours), hf)
    assert ours.num_tiles == len(hf) == processor.num_tiles(*size)
    assert ours.num_tokens == 4 * len(hf) == processor.num_tokens(*size)
    assert ours.grid == (len(hf), 4, 4)
    assert ours.nbytes == len(hf) * 3 * 56 * 56  # a byte for a value


@pytest.mark.parametrize("size", [(480, 640), (1200, 180), (448, 448)])
def test_released_tile_size_is_bit_equal_to_hf(size):
    image = Image.fromarray(noise(*size))
    ours = TileImageProcessor()(image)
    np.testing.assert_array_equal(pixels(ours), reference(image))
    assert ours.num_tokens == 256 * ours.num_tiles


def test_random_sizes_are_bit_equal_to_hf():
    rng = np.random.default_rng(3)
    for _ in range(60):
        size = tuple(int(x) for x in np.exp(rng.uniform(0, 6.5, 2)))
        image = Image.fromarray(noise(*size))
        ours = TileImageProcessor(tile_size=28)(image)
        np.testing.assert_array_equal(pixels(ours), reference(image, tile_size=28), err_msg=f"{size}")


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "P", "1", "CMYK"])
def test_images_that_are_not_rgb_are_converted_as_in_hf(mode):
    image = Image.fromarray(noise(60, 170, 4 if "A" in mode else 3)).convert(mode)
    np.testing.assert_array_equal(
        pixels(TileImageProcessor(tile_size=56)(image)), reference(image, tile_size=56, max_patches=12)
    )


def test_patches_stand_row_by_row_and_the_thumbnail_last():
    # Each pixel tells its own place in the 2 x 3 grid of tiles, which is not resized.
    image = np.zeros((112, 168, 3), np.uint8)
    image[..., 0], image[..., 1] = np.arange(112)[:, None], np.arange(168)
    processor = TileImageProcessor(tile_size=56, max_tiles=6, image_mean=(0, 0, 0), image_std=(1, 1, 1))
    tiled = processor(Image.fromarray(image))
    assert processor.grid(112, 168) == (2, 3)
    values = np.rint(tiled.patches.reshape(7, 4, 4, 3, 14, 14) * 255).astype(int)
    for tile, row, column, y, x in ((0, 0, 0, 0, 0), (2, 0, 0, 3, 5), (3, 1, 2, 0, 13), (5, 3, 3, 13, 13)):
        at = (tile // 3 * 56 + row * 14 + y, tile % 3 * 56 + column * 14 + x)
        assert tuple(values[tile, row, column, :2, y, x]) == at
    assert values[6, 0, 0, 1].max() < 168 / 4 + 4  # the thumbnail's first patch shows the image's left quarter
    assert values[6, 3, 3, 1].min() > 168 * 3 / 4 - 4


def test_grey_sixteen_bit_file_goes_through_decode_image(tmp_path):
    wide = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (16, 1))
    Image.fromarray(wide).save(tmp_path / "grey.png")
    decoded = decode_image(tmp_path / "grey.png", name="row")
    ours = TileImageProcessor(tile_size=56)(decoded)
    np.testing.assert_array_equal(pixels(ours), reference(decoded, tile_size=56))


# ---------------------------------------------------------------- the grid


@pytest.mark.parametrize("limits", [(1, 12), (1, 1), (1, 6), (2, 9), (5, 7), (1, 40)])
@pytest.mark.parametrize("tile_size", [448, 56])
def test_grid_equals_hf_on_random_sizes(limits, tile_size):
    rng = np.random.default_rng(0)
    for _ in range(1500):
        height, width = (int(x) for x in np.exp(rng.uniform(0, 8.5, 2)))
        rows, columns = tile_grid(height, width, tile_size=tile_size, min_tiles=limits[0], max_tiles=limits[1])
        assert (columns, rows) == get_optimal_tiled_canvas((height, width), (tile_size, tile_size), *limits)


@pytest.mark.parametrize("ratio", [(1, 1), (1, 2), (2, 1), (1, 3), (3, 2), (3, 4)])
def test_grids_of_one_ratio_are_told_apart_by_area_as_in_hf(ratio):
    """Sizes of exactly a grid's ratio, one pixel each side of every half area at which a larger grid is taken."""
    found = set()
    for tiles in range(1, 13):
        middle = int((0.5 * 448 * 448 * tiles / (ratio[0] * ratio[1])) ** 0.5)
        for scale in (middle - 1, middle, middle + 1):
            height, width = ratio[0] * scale, ratio[1] * scale
            rows, columns = tile_grid(height, width, tile_size=448, min_tiles=1, max_tiles=12)
            assert (columns, rows) == get_optimal_tiled_canvas((height, width), (448, 448), 1, 12)
            found.add((rows, columns))
    assert len(found) == {1: 3, 2: 2, 3: 2, 6: 1, 12: 1}[ratio[0] * ratio[1]]


def test_ratio_between_two_grids_is_decided_as_in_hf():
    """1.25 lies as near to 1 as to 1.5: equal distances of different ratios."""
    for scale in range(1, 300, 7):
        height, width = 4 * scale, 5 * scale
        for limits in ((1, 6), (1, 9)):
            rows, columns = tile_grid(height, width, tile_size=448, min_tiles=limits[0], max_tiles=limits[1])
            assert (columns, rows) == get_optimal_tiled_canvas((height, width), (448, 448), *limits)


def test_thumbnail_can_be_switched_off():
    image = Image.fromarray(noise(56, 168))
    with_it, without = (TileImageProcessor(tile_size=56, use_thumbnail=use) for use in (True, False))
    assert (with_it(image).num_tiles, without(image).num_tiles) == (4, 3)
    assert without.num_tokens(56, 168) == 12
    np.testing.assert_array_equal(without(image).patches, with_it(image).patches[:3])


def test_zero_size_has_no_grid():
    with pytest.raises(InputError, match="zero size"):
        TileImageProcessor().num_tokens(0, 10)


# ---------------------------------------------------------------- folders

HF_FORMS = {
    "flat": lambda config: {"preprocessor_config.json": config},
    "nested": lambda config: {
        "processor_config.json": {
            "processor_class": "InternVLProcessor", "image_seq_length": 4, "image_processor": config,
        }
    },
    "nested over flat": lambda config: {
        "processor_config.json": {"image_processor": config},
        "preprocessor_config.json": {**config, "max_patches": 2},
    },
    "flat with the processor's own file": lambda config: {
        "processor_config.json": {"processor_class": "InternVLProcessor", "image_seq_length": 4},
        "preprocessor_config.json": config,
    },
}  # fmt: skip


@pytest.mark.parametrize("form", HF_FORMS)
def test_from_pretrained_reads_each_form_as_hf_does(form, tmp_path):
    for name, content in HF_FORMS[form](processor_config(56, 1, 5)).items():
        (tmp_path / name).write_text(json.dumps(content))
    image = Image.fromarray(noise(100, 420))
    hf = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")(image, crop_to_patches=True, return_tensors="np")
    ours = TileImageProcessor.from_pretrained(tmp_path)
    assert ours.max_tiles == 5
    np.testing.assert_array_equal(pixels(ours(image)), hf["pixel_values"])


def test_patches_and_pixel_shuffle_come_from_the_models_config(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor_config(48)))
    config = {"model_type": "internvl", "vision_config": {"patch_size": [8, 8]}, "downsample_ratio": 1 / 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    processor = TileImageProcessor.from_pretrained(tmp_path)
    assert (processor.patch_size, processor.downsample, processor.tile_tokens) == (8, 3, 4)
    image = Image.fromarray(noise(48, 96))
    tiled = processor(image)
    assert tiled.patches.shape == (3, 36, 3 * 8 * 8)
    assert tiled.num_tokens == 12
    np.testing.assert_array_equal(pixels(tiled, 8), reference(image, tile_size=48))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, (1, 6, True)),
        ({"max_dynamic_patch": 4, "min_dynamic_patch": 2}, (2, 4, True)),
        ({"use_thumbnail": False}, (1, 6, False)),
        ({"dynamic_image_size": False}, (1, 1, True)),
    ],
)
def test_opengvlab_folder_is_read_from_its_config(change, expected, tmp_path):
    folder = build_internvl_folder(tmp_path, layout="opengvlab")
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    processor = TileImageProcessor.from_pretrained(folder)
    assert (processor.min_tiles, processor.max_tiles, processor.use_thumbnail) == expected
    assert (processor.tile_size, processor.image_mean, processor.image_std) == (56, tuple(MEAN), tuple(STD))
    (folder / "preprocessor_config.json").unlink()
    assert TileImageProcessor.from_pretrained(folder) == processor
    del config["force_image_size"]
    config["vision_config"]["image_size"] = 84
    (folder / "config.json").write_text(json.dumps(config))
    assert TileImageProcessor.from_pretrained(folder).tile_size == 84


@pytest.mark.parametrize("layout", ["hf", "opengvlab"])
def test_tile_limit_given_by_the_caller_replaces_the_folders(layout, tmp_path):
    folder = build_internvl_folder(tmp_path, layout=layout)
    assert [TileImageProcessor.from_pretrained(folder, limit).max_tiles for limit in (None, 0, 3)] == [6, 6, 3]


@pytest.mark.parametrize("use_thumbnail", [True, False])
def test_written_files_are_read_back_here_and_by_hf(use_thumbnail, tmp_path):
    processor = TileImageProcessor(2, 7, 56, use_thumbnail)
    for name, content in processor.files().items():
        (tmp_path / name).write_text(json.dumps(content))
    assert TileImageProcessor.from_pretrained(tmp_path) == processor
    image = Image.fromarray(noise(100, 300))
    hf = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")(image, return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(pixels(processor(image)), hf if use_thumbnail else hf[:-1])
    assert json.loads((tmp_path / "processor_config.json").read_text())["image_seq_length"] == processor.tile_tokens


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_processor_type": "Qwen2VLImageProcessor"}, "image_processor_type is Qwen2VLImageProcessor"),
        ({"image_processor_type": None, "feature_extractor_type": "CLIPFeatureExtractor"}, "is CLIPFeatureExtractor"),
        ({"resample": 2}, "resample=2 is not supported, only 3"),
        ({"do_normalize": False}, "do_normalize=False is not supported"),
        ({"size": {"height": 448, "width": 224}}, "only squares are supported"),
        ({"size": {"height": 448}}, "'width'"),
        ({"size": None}, "wrong type"),
        ({"image_mean": "grey"}, "wrong type"),
        ({"image_std": [1.0]}, "three numbers"),
        ({"size": {"height": 450, "width": 450}}, "450 pixels do not divide into tokens of 28 pixels"),
        ({"min_patches": 13}, "min_tiles=13, max_tiles=12"),
        ({"min_patches": 0}, "must be positive"),
    ],
)
def test_settings_that_cannot_be_used_are_refused_with_their_file(change, message, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**processor_config(), **change}))
    with pytest.raises(InputError, match=message) as refusal:
        TileImageProcessor.from_pretrained(tmp_path)
    assert str(refusal.value).startswith(str(tmp_path / "preprocessor_config.json"))
    assert "\n" not in str(refusal.value)


def test_folder_whose_token_count_contradicts_its_tiles_is_refused(tmp_path):
    folder = build_internvl_folder(tmp_path, tile_size=56)
    (folder / "processor_config.json").write_text('{"image_seq_length": 256}')
    with pytest.raises(InputError, match="image_seq_length is 256, and a tile of 56 pixels makes 4 tokens"):
        TileImageProcessor.from_pretrained(folder)


def test_folder_without_a_processor_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no processor_config\.json or preprocessor_config.json"):
        TileImageProcessor.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "internvl_chat"}')
    with pytest.raises(InputError, match=r"config.json: a field is missing.*'vision_config'"):
        TileImageProcessor.from_pretrained(tmp_path)


def test_processor_and_tiles_survive_pickling_to_a_worker():
    processor = TileImageProcessor(tile_size=56)
    tiled = processor(Image.fromarray(noise(50, 160)))
    again = pickle.loads(pickle.dumps(processor))(Image.fromarray(noise(50, 160)))
    np.testing.assert_array_equal(again.patches, tiled.patches)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(tiled)).patches, tiled.patches)
