"""Claims about ril_jax/data/images.py, against transformers' PIL processor and against files written here."""

import base64
import io
import json
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as hf_smart_resize

from ril_jax.data.images import QwenImageProcessor, decode_image, smart_resize
from ril_jax.errors import InputError

SIZES = [
    (1, 1),
    (1, 200),
    (200, 1),
    (2, 3),
    (27, 29),
    (28, 28),
    (64, 48),
    (100, 640),
    (13, 2000),
    (333, 517),
    (900, 40),
]


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(height * 10007 + width).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def png_file(width: int, height: int, pixels: bytes = b"") -> bytes:
    """A PNG with any size in its header, whatever its data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def grey_ramp() -> Image.Image:
    return Image.fromarray(np.tile(np.arange(0, 256, 4, dtype=np.uint8), (16, 1)))


# ---------------------------------------------------------------- the processor


@pytest.mark.parametrize("limits", [{}, {"min_pixels": 4 * 784, "max_pixels": 64 * 784}, {"min_pixels": 100 * 784}])
@pytest.mark.parametrize("size", SIZES)
def test_patches_are_bit_equal_to_hf(size, limits):
    image = Image.fromarray(noise(*size))
    reference = Qwen2VLImageProcessorPil(**limits)(image, return_tensors="np")
    ours = QwenImageProcessor(**limits)(image)
    assert ours.patches.dtype == np.float32
    assert ours.patches.flags.c_contiguous
    assert ours.grid == tuple(reference["image_grid_thw"][0])
    np.testing.assert_array_equal(ours.patches, reference["pixel_values"])
    assert ours.num_tokens == np.prod(ours.grid) // 4
    assert ours.grid == QwenImageProcessor(**limits).grid(*size)


def test_other_patch_sizes_means_and_stds_are_bit_equal_to_hf():
    settings = {
        "patch_size": 8,
        "temporal_patch_size": 3,
        "merge_size": 3,
        "image_mean": (0.1, 0.5, 0.9),
        "image_std": (0.3, 0.2, 1.0),
    }
    image = Image.fromarray(noise(90, 130))
    reference = Qwen2VLImageProcessorPil(**settings)(image, return_tensors="np")
    ours = QwenImageProcessor(**settings)(image)
    np.testing.assert_array_equal(ours.patches, reference["pixel_values"])
    assert ours.num_tokens == len(ours.patches) // 9


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "P", "1", "CMYK"])
def test_images_that_are_not_rgb_are_converted_as_in_hf(mode):
    image = Image.fromarray(noise(60, 70, 4 if "A" in mode else 3)).convert(mode)
    reference = Qwen2VLImageProcessorPil()(image, return_tensors="np")
    np.testing.assert_array_equal(QwenImageProcessor()(image).patches, reference["pixel_values"])


def test_smart_resize_equals_hf_on_random_sizes():
    rng = np.random.default_rng(0)
    for _ in range(3000):
        height, width = (int(x) for x in np.exp(rng.uniform(0, 8, 2)))
        limits = {"factor": 28, "min_pixels": 3136 * int(rng.integers(1, 9)), "max_pixels": int(rng.integers(9e4, 2e6))}
        if max(height, width) / min(height, width) <= 200:
            assert smart_resize(height, width, **limits) == hf_smart_resize(height, width, **limits)


@pytest.mark.parametrize("size", [(1, 201), (4000, 19)])
def test_aspect_ratio_over_200_is_refused(size):
    with pytest.raises(ValueError):
        hf_smart_resize(*size)
    with pytest.raises(InputError, match=f"{size[1]}x{size[0]}.*200 to 1"):
        QwenImageProcessor()(Image.new("RGB", size[::-1]))


def test_zero_size_has_no_grid():
    with pytest.raises(InputError, match="zero size"):
        QwenImageProcessor().grid(0, 10)


FLAT = {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 3136, "max_pixels": 50 * 784, "merge_size": 2}
CONFIGS = {
    "flat": {"preprocessor_config.json": FLAT},
    "flat with size": {
        "preprocessor_config.json": {
            "image_processor_type": "Qwen2VLImageProcessorFast",
            "size": {"shortest_edge": 60 * 784, "longest_edge": 90 * 784},
            "rescale_factor": 0.00392156862745098,
            "resample": 3,
        }
    },
    "limits over size": {
        "preprocessor_config.json": {**FLAT, "size": {"shortest_edge": 60 * 784, "longest_edge": 90 * 784}}
    },
    "nested": {
        "processor_config.json": {
            "processor_class": "Qwen2_5_VLProcessor",
            "image_processor": {
                "image_processor_type": "Qwen2VLImageProcessor",
                "size": {"shortest_edge": 3136, "longest_edge": 30 * 784},
                "image_mean": [0.5, 0.4, 0.3],
            },
        }
    },
    "nested over flat": {
        "processor_config.json": {
            "image_processor": {
                "image_processor_type": "Qwen2VLImageProcessor",
                "size": {"shortest_edge": 3136, "longest_edge": 30 * 784},
            }
        },
        "preprocessor_config.json": FLAT,
    },
    "processor file without an image processor": {
        "processor_config.json": {"processor_class": "Qwen2_5_VLProcessor"},
        "preprocessor_config.json": FLAT,
    },
}


@pytest.mark.parametrize("form", CONFIGS)
def test_from_pretrained_reads_each_form_as_hf_does(form, tmp_path):
    for name, content in CONFIGS[form].items():
        (tmp_path / name).write_text(json.dumps(content))
    image = Image.fromarray(noise(300, 420))
    reference = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")(image, return_tensors="np")
    ours = QwenImageProcessor.from_pretrained(tmp_path)(image)
    assert ours.grid == tuple(reference["image_grid_thw"][0])
    np.testing.assert_array_equal(ours.patches, reference["pixel_values"])


def test_pixel_limits_given_by_the_caller_replace_the_folders(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(FLAT))
    processor = QwenImageProcessor.from_pretrained(tmp_path, max_pixels=20 * 784)
    assert (processor.min_pixels, processor.max_pixels) == (3136, 20 * 784)
    reference = Qwen2VLImageProcessorPil(max_pixels=20 * 784, min_pixels=3136)
    image = Image.fromarray(noise(300, 420))
    np.testing.assert_array_equal(processor(image).patches, reference(image, return_tensors="np")["pixel_values"])


def test_written_config_gives_the_same_processor_in_hf_and_here(tmp_path):
    processor = QwenImageProcessor(min_pixels=4 * 784, max_pixels=40 * 784, image_mean=(0.5, 0.5, 0.25))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor.to_config()))
    assert QwenImageProcessor.from_pretrained(tmp_path) == processor
    reference = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    image = Image.fromarray(noise(300, 420))
    np.testing.assert_array_equal(processor(image).patches, reference(image, return_tensors="np")["pixel_values"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_processor_type": "GotOcr2ImageProcessor"}, "GotOcr2ImageProcessor"),
        ({"do_resize": False}, "do_resize=False"),
        ({"resample": 2}, "resample=2"),
        ({"rescale_factor": 0.5}, "rescale_factor=0.5"),
        ({"min_pixels": 10**7}, "min_pixels=10000000"),
        ({"patch_size": "wide"}, "wrong type"),
        ({"merge_size": 0}, "must be positive"),
        ({"image_std": [1.0]}, "three numbers"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(change, message, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**FLAT, **change}))
    with pytest.raises(InputError, match=message):
        QwenImageProcessor.from_pretrained(tmp_path)


def test_folder_without_or_with_a_broken_processor_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no processor_config\.json or preprocessor_config.json"):
        QwenImageProcessor.from_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(InputError, match=r"preprocessor_config.json: not readable as JSON"):
        QwenImageProcessor.from_pretrained(tmp_path)


def test_processor_survives_pickling_to_a_worker():
    processor = QwenImageProcessor(max_pixels=30 * 784)
    image = Image.fromarray(noise(50, 60))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(processor))(image).patches, processor(image).patches)


# ---------------------------------------------------------------- good files of every kind


@pytest.mark.parametrize("form", ["bytes", "path", "str path", "data url", "pil"])
def test_every_way_to_give_an_image_gives_the_same_pixels(form, tmp_path):
    pixels = noise(20, 30)
    data = encoded(Image.fromarray(pixels), "PNG")
    (tmp_path / "picture.png").write_bytes(data)
    given = {
        "bytes": data,
        "path": tmp_path / "picture.png",
        "str path": str(tmp_path / "picture.png"),
        "data url": "data:image/png;base64," + base64.b64encode(data).decode(),
        "pil": Image.fromarray(pixels),
    }[form]
    image = decode_image(given, name="row 1")
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), pixels)


def test_grey_and_one_bit_images_keep_their_values():
    ramp = grey_ramp()
    np.testing.assert_array_equal(
        np.asarray(decode_image(encoded(ramp, "PNG"), name="x")), np.repeat(np.asarray(ramp)[:, :, None], 3, 2)
    )
    bits = Image.fromarray(np.asarray(ramp) > 100)
    assert bits.mode == "1"
    decoded = np.asarray(decode_image(encoded(bits, "PNG"), name="x"))
    np.testing.assert_array_equal(decoded[:, :, 0], np.where(np.asarray(bits), 255, 0))


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_images_are_scaled_and_not_clipped(file_format):
    wide = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (16, 1))
    decoded = np.asarray(decode_image(encoded(Image.fromarray(wide), file_format), name="x"))
    np.testing.assert_array_equal(decoded[:, :, 0], np.round(wide / 257.0))
    assert len(np.unique(decoded)) == 64


def test_palette_images_become_their_colours_and_transparent_entries_white():
    image = Image.new("P", (8, 4))
    image.putpalette([200, 10, 20, 0, 0, 255])
    image.paste(1, (4, 0, 8, 4))
    decoded = np.asarray(decode_image(encoded(image, "PNG"), name="x"))
    assert decoded[0, 0].tolist() == [200, 10, 20]
    assert decoded[0, 7].tolist() == [0, 0, 255]
    decoded = np.asarray(decode_image(encoded(image, "PNG", transparency=1), name="x"))
    assert decoded[0, 0].tolist() == [200, 10, 20]
    assert decoded[0, 7].tolist() == [255, 255, 255]


def test_transparency_is_laid_over_white():
    rgba = noise(12, 13, 4)
    decoded = np.asarray(decode_image(encoded(Image.fromarray(rgba), "PNG"), name="x")).astype(float)
    alpha = rgba[:, :, 3:] / 255.0
    np.testing.assert_allclose(decoded, rgba[:, :, :3] * alpha + 255 * (1 - alpha), atol=1)
    grey_alpha = Image.merge("LA", [Image.new("L", (3, 3), 40), Image.new("L", (3, 3), 0)])
    assert np.asarray(decode_image(encoded(grey_alpha, "PNG"), name="x")).min() == 255
    keyed = encoded(Image.new("RGB", (3, 3), (1, 2, 3)), "PNG", transparency=(1, 2, 3))
    assert np.asarray(decode_image(keyed, name="x")).min() == 255


def test_cmyk_jpeg_becomes_the_colour_it_prints():
    image = Image.new("CMYK", (32, 32), (0, 255, 255, 0))  # magenta and yellow: red
    decoded = np.asarray(decode_image(encoded(image, "JPEG", quality=95), name="x"))
    np.testing.assert_allclose(decoded[16, 16], [255, 0, 0], atol=8)


def test_photographs_are_turned_upright():
    pixels = noise(10, 20)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: turn clockwise to see it upright
    data = encoded(Image.fromarray(pixels), "PNG", exif=exif)
    np.testing.assert_array_equal(np.asarray(decode_image(data, name="x")), np.rot90(pixels, -1))
    given = Image.open(io.BytesIO(data))
    decode_image(given, name="x")
    assert given.size == (20, 10), "the caller's image must stay as it is"


def test_photograph_with_a_preview_inside_is_one_picture():
    data = encoded(
        Image.new("RGB", (32, 24), (250, 0, 0)), "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))]
    )
    decoded = decode_image(data, name="x")
    assert decoded.size == (32, 24)
    assert np.asarray(decoded)[5, 5, 0] > 240


def test_one_frame_gif_and_webp_are_stills():
    for file_format, options in (("GIF", {}), ("WEBP", {"lossless": True})):
        image = Image.new("RGB", (9, 7), (255, 0, 0))
        assert np.asarray(decode_image(encoded(image, file_format, **options), name="x"))[3, 3].tolist() == [255, 0, 0]


# ---------------------------------------------------------------- bad files


def broken_files() -> dict[str, tuple[object, str]]:
    frames = [Image.fromarray(noise(16, 16)), Image.fromarray(noise(16, 16)[::-1].copy())]
    moving = {"save_all": True, "append_images": frames[1:]}
    png = encoded(Image.fromarray(noise(64, 64)), "PNG")
    jpeg = encoded(Image.fromarray(noise(64, 64)), "JPEG", quality=95)
    middle = len(png) // 2
    return {
        "nothing": (b"", r"empty \(0 bytes\)"),
        "text": (b"GET OUT, this is a web page" * 20, "not an image"),
        "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image"),
        "corrupt png": (png[:middle] + bytes(32) + png[middle + 32 :], "truncated or corrupt"),
        "truncated png": (png[:middle], "truncated or corrupt"),
        "truncated jpeg": (jpeg[: len(jpeg) // 2], "truncated or corrupt"),
        "header only": (png[:20], "truncated or corrupt"),
        "png without pixels": (png_file(5, 5), "truncated or corrupt"),
        "bomb": (png_file(9000, 9000), "9000x9000 pixels, more than the 64,000,000"),
        "giant bomb": (png_file(60000, 60000), "too large to decode"),
        "zero width": (png_file(0, 5), "zero size"),
        "zero height gif": (b"GIF89a" + struct.pack("<HHBBB", 4, 0, 0, 0, 0) + b";", "zero size"),
        "empty pil image": (Image.new("RGB", (0, 3)), "zero size"),
        "animated gif": (encoded(frames[0], "GIF", **moving), "2 frames"),
        "animated png": (encoded(frames[0], "PNG", **moving), "2 frames"),
        "animated webp": (encoded(frames[0], "WEBP", **moving), "2 frames"),
        "many-page tiff": (encoded(frames[0], "TIFF", **moving), "2 frames"),
        "float tiff": (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "floating-point"),
        "wide int tiff": (encoded(Image.fromarray(np.full((4, 4), 70000, np.int32)), "TIFF"), "32-bit"),
        "missing file": ("no/such/picture.png", "cannot be read"),
        "address": ("https://example.org/a.png", "not fetched"),
        "bad base64": ("data:image/png;base64,@@@", "not valid base64"),
        "data url without base64": ("data:image/png,abc", "data:image/png;base64"),
        "array": (noise(4, 4), "not ndarray"),
    }


@pytest.mark.parametrize("kind", broken_files())
def test_bad_image_is_refused_in_one_line_that_names_the_row(kind):
    data, message = broken_files()[kind]
    with pytest.raises(InputError, match=message) as refusal:
        decode_image(data, name="row q-17")
    text = str(refusal.value)
    assert text.startswith("row q-17: ")
    assert "\n" not in text
    assert len(text) < 400


def test_decompression_bomb_is_refused_before_its_pixels_are_decoded(monkeypatch):
    data = encoded(Image.new("RGB", (300, 300)), "PNG")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(InputError, match="300x300"):
        decode_image(data, name="x", max_pixels_decoded=300 * 300 - 1)
