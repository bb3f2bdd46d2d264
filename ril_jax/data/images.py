"""Images: from whatever a row holds to the patches that Qwen2.5-VL's vision tower reads; numpy and Pillow only.

InternVL's tiles are made in `tiles.py`.
"""

from __future__ import annotations

import base64
import binascii
import functools
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image, ImageOps

from ril_jax.errors import InputError

# Still-picture formats only: Pillow would hand EPS to Ghostscript, and vector or video formats have no pixels of
# their own. MPO (two-lens phone photographs) comes in through JPEG.
_FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP")
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")  # the first that has an image processor counts
FIXED_STEPS = {  # of every family's processor
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "resample": 3,
    "rescale_factor": 1 / 255,
}
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_MAX_ASPECT_RATIO = 200
_EXIF_ORIENTATION = 0x0112


def decode_image(
    data: bytes | str | Path | Image.Image, *, name: str, max_pixels_decoded: int = 64_000_000
) -> Image.Image:
    """Decodes one still image to 8-bit RGB, upright (EXIF), with transparency laid over white.

    `data` is the encoded bytes, a path, a base64 data URL or a PIL image; 16-bit images are scaled to 8 bits. `name`
    (row or file) stands in every error. Raises InputError for an image that is missing, empty, unreadable, corrupt,
    truncated, animated, of zero size, of floating point, or larger than `max_pixels_decoded` pixels, which is checked
    before any pixel is decoded.
    """
    try:
        image = data if isinstance(data, Image.Image) else _open(data, name=name)
        width, height = image.size
        if width < 1 or height < 1:
            raise InputError(f"{name}: the image has zero size ({width}x{height}); replace it or drop the row")
        if width * height > max_pixels_decoded:
            raise InputError(
                f"{name}: the image has {width}x{height} pixels, more than the {max_pixels_decoded:,} that are "
                "decoded; make it smaller"
            )
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO":  # MPO: one photograph and its previews, not an animation
            raise InputError(f"{name}: the image has {frames} frames (animated or many pages); give a single picture")
        image.load()
        if image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
        return to_rgb(image, name=name)
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{name}: the image is too large to decode ({one_line(error)}); make it smaller") from error
    except Image.UnidentifiedImageError as error:
        raise InputError(
            f"{name}: not an image that can be read (known are {', '.join(_known_formats())}); "
            "it is corrupt, of zero size or of another format"
        ) from error
    except Exception as error:  # Pillow's decoders raise whatever comes to hand on a broken file
        raise InputError(
            f"{name}: the image is truncated or corrupt ({one_line(error)}); replace it or drop the row"
        ) from error


def smart_resize(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Height and width nearest to the image's own that are multiples of `factor` within the two pixel limits.

    As HF's `smart_resize` of Qwen2-VL. Raises InputError for a zero size and for sides more than 200 to 1.
    """
    if height < 1 or width < 1:
        raise InputError(f"the image has zero size ({width}x{height}); replace it or drop the row")
    if max(height, width) / min(height, width) > _MAX_ASPECT_RATIO:
        raise InputError(f"the image is {width}x{height}: its sides may differ by {_MAX_ASPECT_RATIO} to 1; crop it")
    # Python's round goes half to even, and the checkpoints were trained with that.
    new_height = round(height / factor) * factor
    new_width = round(width / factor) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


@dataclass(frozen=True, eq=False)
class PatchedImage:
    """One image, ready for the vision tower; kept as bytes, an eighth of what the tower reads.

    `source`: the patches as float32, or as the bytes [h*w, 3, patch*patch] that `values` [3, 256] turns into them, the
    merge groups contiguous; `grid` (t=1, h, w) counts patches; `frames`: how often a still is repeated in time.
    """

    source: np.ndarray
    grid: tuple[int, int, int]
    merge_size: int = 2
    values: np.ndarray | None = None
    frames: int = 1

    @property
    def patches(self) -> np.ndarray:
        """[h*w, 3*frames*patch*patch] float32, each patch ordered (channel, time, row, column); made at each access."""
        if self.values is None:
            return self.source
        count, channels, size = self.source.shape
        patches = np.empty((count, channels, self.frames, size), np.float32)
        for channel in range(channels):
            patches[:, channel] = self.values[channel].take(self.source[:, channel])[:, None]
        return patches.reshape(count, -1)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes to keep."""
        return self.source.nbytes

    @property
    def num_tokens(self) -> int:
        """Placeholder tokens that the image takes in the prompt."""
        return math.prod(self.grid) // self.merge_size**2


@dataclass(frozen=True)
class QwenImageProcessor:
    """Qwen2-VL's and Qwen2.5-VL's image preprocessing, bit-equal to HF's `Qwen2VLImageProcessorPil`."""

    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    image_mean: tuple[float, ...] = _CLIP_MEAN
    image_std: tuple[float, ...] = _CLIP_STD
    _values: np.ndarray = field(init=False, repr=False, compare=False)

    limit: ClassVar[str] = "max_pixels"  # what a user lowers for fewer tokens an image

    def __post_init__(self) -> None:
        if min(self.patch_size, self.temporal_patch_size, self.merge_size) < 1:
            raise InputError("image processor: patch_size, temporal_patch_size and merge_size must be positive")
        if not 0 < self.min_pixels <= self.max_pixels:
            raise InputError(
                f"image processor: min_pixels={self.min_pixels}, max_pixels={self.max_pixels}; "
                "they must be positive and in this order"
            )
        if len(self.image_mean) != 3 or len(self.image_std) != 3:
            raise InputError("image processor: image_mean and image_std must have three numbers each")
        object.__setattr__(self, "_values", normalized_values(self.image_mean, self.image_std))

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> QwenImageProcessor:
        """Reads `processor_config.json` (nested form) or `preprocessor_config.json` (flat form) of an HF folder.

        `min_pixels` and `max_pixels`, if given, replace the folder's. Raises InputError for a folder without a
        processor, for a processor of another family and for settings that this class does not have.
        """
        source, config = read_processor_config(Path(folder))
        kind = str(config.get("image_processor_type", "Qwen2VLImageProcessor"))
        if not kind.startswith(("Qwen2VL", "Qwen2_5_VL")):
            raise InputError(f"{source}: image_processor_type is {kind}, not Qwen2-VL's; give a Qwen2.5-VL folder")
        refuse_other_steps(source, config)
        size = config.get("size") or {}
        for key, short in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            limits = (config.get(key), size.get(key), size.get(short), getattr(cls, key))
            config[key] = next(limit for limit in limits if limit is not None)
        if min_pixels is not None:
            config["min_pixels"] = min_pixels
        if max_pixels is not None:
            config["max_pixels"] = max_pixels
        names = ("min_pixels", "max_pixels", "patch_size", "temporal_patch_size", "merge_size")
        try:
            numbers = {key: int(config[key]) for key in names if config.get(key) is not None}
            colours = {
                key: tuple(float(x) for x in config[key])
                for key in ("image_mean", "image_std")
                if config.get(key) is not None
            }
        except (TypeError, ValueError) as error:
            raise InputError(f"{source}: a field has the wrong type ({one_line(error)})") from error
        return cls(**numbers, **colours)  # type: ignore[arg-type]

    def to_config(self) -> dict[str, Any]:
        """The content of a `preprocessor_config.json` that old and new releases of transformers read alike."""
        return {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
            **FIXED_STEPS,
            "min_pixels": self.min_pixels,
            "max_pixels": self.max_pixels,
            "size": {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels},
            "patch_size": self.patch_size,
            "temporal_patch_size": self.temporal_patch_size,
            "merge_size": self.merge_size,
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
        }

    def files(self) -> dict[str, dict[str, Any]]:
        """The files, by name, that make transformers process images as this does."""
        return {"preprocessor_config.json": self.to_config()}

    def __call__(self, image: Image.Image) -> PatchedImage:
        """Resizes, normalises and cuts one image into patches; raises InputError for sides more than 200 to 1."""
        _, h, w = self.grid(image.height, image.width)
        patch, merge = self.patch_size, self.merge_size
        if image.mode != "RGB":
            image = to_rgb(image, name="image")
        resized = image.resize((w * patch, h * patch), resample=Image.Resampling.BICUBIC)
        # Rearranged while the pixels are still bytes: a quarter of the memory traffic of doing it in float32.
        pixels = np.asarray(resized).reshape(h // merge, merge, patch, w // merge, merge, patch, 3)
        pixels = pixels.transpose(0, 3, 1, 4, 6, 2, 5).reshape(h * w, 3, patch * patch)
        return PatchedImage(pixels, (1, h, w), merge, self._values, self.temporal_patch_size)

    def grid(self, height: int, width: int) -> tuple[int, int, int]:
        """Patches (t=1, h, w) of an image of that size, without touching pixels; raises as `smart_resize`."""
        new_height, new_width = smart_resize(
            height,
            width,
            factor=self.patch_size * self.merge_size,
            min_pixels=self.min_pixels,
            max_pixels=self.max_pixels,
        )
        return 1, new_height // self.patch_size, new_width // self.patch_size

    def num_tokens(self, height: int, width: int) -> int:
        """Placeholder tokens of an image of that size; raises as `smart_resize`."""
        return math.prod(self.grid(height, width)) // self.merge_size**2


def normalized_values(mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """[3, 256] float32: what each byte becomes in each channel.

    HF scales in float64, rounds to float32 and normalises in float32; the table does it once for all 256 bytes.
    """
    scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    return (scaled[None] - np.array(mean, np.float32)[:, None]) / np.array(std, np.float32)[:, None]


def refuse_other_steps(source: Path, config: Mapping[str, Any]) -> None:
    """Raises InputError, with the file, for a step of a processor's settings that is switched off or done otherwise."""
    for key, value in FIXED_STEPS.items():
        if key != "do_convert_rgb" and config.get(key) not in (None, value):  # all images come as RGB
            raise InputError(f"{source}: {key}={config[key]} is not supported, only {value} is")


def read_processor_config(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The image processor's settings and the file they came from; the nested form goes first, as in transformers."""
    for file_name in PROCESSOR_FILES:
        config: Any = read_json(folder / file_name)
        if file_name == "processor_config.json":
            config = config.get("image_processor")
        if isinstance(config, Mapping) and config:
            return folder / file_name, dict(config)
    raise InputError(f"{folder}: no {' or '.join(PROCESSOR_FILES)} with an image processor in it")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a file, empty where the file is not there."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({one_line(error)})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: must be a JSON object")
    return content


def _open(data: bytes | str | Path, *, name: str) -> Image.Image:
    """Opens encoded bytes, a data URL or a file; Pillow reads the header only."""
    if isinstance(data, str) and data[:5].lower() == "data:":
        data = _data_url_bytes(data, name=name)
    elif isinstance(data, str) and data.split("://", 1)[0].lower() in ("http", "https"):
        raise InputError(f"{name}: images are not fetched from the network; give the file, its bytes or a data URL")
    elif isinstance(data, str | Path):
        try:
            data = Path(data).read_bytes()
        except (OSError, ValueError) as error:
            raise InputError(f"{name}: the image file cannot be read ({one_line(error)})") from error
    elif not isinstance(data, bytes | bytearray | memoryview):
        raise InputError(f"{name}: an image is given as bytes, path, data URL or PIL image, not {type(data).__name__}")
    if not len(data):
        raise InputError(f"{name}: the image is empty (0 bytes); replace it or drop the row")
    return Image.open(io.BytesIO(data), formats=_known_formats())


def _data_url_bytes(url: str, *, name: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise InputError(f"{name}: the data URL must have the form data:image/png;base64,...")
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{name}: the data URL is not valid base64 ({one_line(error)})") from error


def to_rgb(image: Image.Image, *, name: str) -> Image.Image:
    """8-bit RGB of a loaded image of any mode; transparency is laid over white, as in HF's `convert_to_rgb`."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F":
        raise InputError(f"{name}: the image has floating-point pixels, whose range is unknown; save it with 8 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _sixteen_to_eight_bits(image, name=name).convert("RGB")
    if image.has_transparency_data:
        if image.mode == "La":  # premultiplied grey converts to LA only
            image = image.convert("LA")
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")
    return image.convert("RGB")


def _sixteen_to_eight_bits(image: Image.Image, *, name: str) -> Image.Image:
    """Grey image with 0..65535 scaled to 0..255; Pillow's own conversion clips at 255 and turns it white."""
    values = np.asarray(image)
    if image.mode == "I" and (values.min() < 0 or values.max() > 65535):
        raise InputError(f"{name}: the image has 32-bit pixels outside 0..65535; save it with 8 or 16 bits")
    return Image.fromarray(((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))


@functools.lru_cache(maxsize=1)
def _known_formats() -> tuple[str, ...]:
    """The formats above that this Pillow was built with."""
    Image.init()
    return tuple(fmt for fmt in _FORMATS if fmt in Image.OPEN)


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
