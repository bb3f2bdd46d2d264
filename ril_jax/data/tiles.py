"""InternVL's images: square tiles of one size, and a thumbnail where there are several; numpy and Pillow only."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from ril_jax.data.images import (
    FIXED_STEPS,
    PROCESSOR_FILES,
    normalized_values,
    one_line,
    read_json,
    read_processor_config,
    refuse_other_steps,
    to_rgb,
)
from ril_jax.errors import InputError

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, eq=False)
class TiledImage:
    """One image in tiles, ready for the vision tower; kept as bytes, a quarter of what the tower reads.

    `source`: uint8 [tiles, n, 3, patch*patch], the n patches of a tile row by row, the thumbnail last; `values`
    [3, 256] float32: what each byte becomes in each channel; `merge_unit`: how many patches make one token.
    """

    source: np.ndarray
    values: np.ndarray
    merge_unit: int = 4

    @property
    def patches(self) -> np.ndarray:
        """[tiles, n, 3*patch*patch] float32, each patch ordered (channel, row, column); made at each access."""
        tiles, n, channels, size = self.source.shape
        patches = np.empty((tiles, n, channels, size), np.float32)
        for channel in range(channels):
            patches[:, :, channel] = self.values[channel].take(self.source[:, :, channel])
        return patches.reshape(tiles, n, -1)

    @property
    def num_tiles(self) -> int:
        """Tiles, the thumbnail included."""
        return len(self.source)

    @property
    def grid(self) -> tuple[int, int, int]:
        """(tiles, rows and columns of patches in each)."""
        side = math.isqrt(self.source.shape[1])
        return len(self.source), side, side

    @property
    def num_tokens(self) -> int:
        """Placeholder tokens that the image takes in the prompt, without the two brackets."""
        return self.source.shape[0] * self.source.shape[1] // self.merge_unit

    @property
    def nbytes(self) -> int:
        """Bytes that it takes to keep."""
        return self.source.nbytes


@dataclass(frozen=True)
class TileImageProcessor:
    """InternVL's image preprocessing, bit-equal to HF's `GotOcr2ImageProcessorPil` as `InternVLProcessor` calls it.

    An image is stretched to a grid of `min_tiles` to `max_tiles` tiles of `tile_size` pixels a side; where that is more
    than one, a thumbnail, the whole image as one tile, follows. `patch_size` pixels a side make a patch of the tower,
    `downsample` patches a side one token.
    """

    min_tiles: int = 1
    max_tiles: int = 12
    tile_size: int = 448
    use_thumbnail: bool = True
    patch_size: int = 14
    downsample: int = 2
    image_mean: tuple[float, ...] = _IMAGENET_MEAN
    image_std: tuple[float, ...] = _IMAGENET_STD
    _values: np.ndarray = field(init=False, repr=False, compare=False)

    limit: ClassVar[str] = "max_tiles"  # what a user lowers for fewer tokens an image

    def __post_init__(self) -> None:
        if not 1 <= self.min_tiles <= self.max_tiles:
            raise InputError(
                f"image processor: min_tiles={self.min_tiles}, max_tiles={self.max_tiles}; "
                "they must be positive and in this order"
            )
        if min(self.tile_size, self.patch_size, self.downsample) < 1:
            raise InputError("image processor: tile_size, patch_size and downsample must be positive")
        if self.tile_size % (self.patch_size * self.downsample):
            raise InputError(
                f"image processor: tiles of {self.tile_size} pixels do not divide into tokens of "
                f"{self.patch_size * self.downsample} pixels; give a multiple"
            )
        if len(self.image_mean) != 3 or len(self.image_std) != 3:
            raise InputError("image processor: image_mean and image_std must have three numbers each")
        object.__setattr__(self, "_values", normalized_values(self.image_mean, self.image_std))

    @classmethod
    def from_pretrained(cls, folder: str | Path, max_tiles: int | None = None) -> TileImageProcessor:
        """Reads the settings of an InternVL folder of either layout.

        `-hf` folders: `processor_config.json` (nested form) or `preprocessor_config.json`; patches and pixel shuffle
        from `config.json`. OpenGVLab's folders: all from `config.json` (`min_dynamic_patch`, `max_dynamic_patch`,
        `use_thumbnail`, `force_image_size`), mean and standard deviation from `preprocessor_config.json`, if there.
        `max_tiles`, unless None or 0, replaces the folder's. Raises InputError for a folder without a processor, for a
        processor of another family and for settings that this class does not have.
        """
        folder = Path(folder)
        model = read_json(folder / "config.json")
        source = folder / "config.json"
        try:
            settings = _opengvlab_settings(model) if model.get("model_type") == "internvl_chat" else {}
            settings |= _model_settings(model)
            if not settings.get("tile_size") or any((folder / name).is_file() for name in PROCESSOR_FILES):
                source, config = read_processor_config(folder)
                settings |= _processor_settings(source, config, complete="tile_size" in settings)
            settings |= {"max_tiles": max_tiles} if max_tiles else {}
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise InputError(f"{source}: a field is missing or has the wrong type ({one_line(error)})") from error
        try:
            processor = cls(**settings)
        except InputError as error:
            raise InputError(f"{source}: {error}") from error
        expected = read_json(folder / "processor_config.json").get("image_seq_length")
        if expected not in (None, processor.tile_tokens):
            raise InputError(
                f"{folder / 'processor_config.json'}: image_seq_length is {expected}, and a tile of "
                f"{processor.tile_size} pixels makes {processor.tile_tokens} tokens; correct the one that is wrong"
            )
        return processor

    @property
    def tile_tokens(self) -> int:
        """Placeholder tokens of one tile."""
        return (self.tile_size // (self.patch_size * self.downsample)) ** 2

    def to_config(self) -> dict[str, Any]:
        """The content of a `preprocessor_config.json` that transformers' image processor reads."""
        config = {
            "image_processor_type": "GotOcr2ImageProcessor",
            "processor_class": "InternVLProcessor",
            **FIXED_STEPS,
            "crop_to_patches": True,
            "min_patches": self.min_tiles,
            "max_patches": self.max_tiles,
            "size": {"height": self.tile_size, "width": self.tile_size},
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
        }
        return config if self.use_thumbnail else config | {"use_thumbnail": False}

    def files(self) -> dict[str, dict[str, Any]]:
        """The files, by name, that make transformers process images as this does."""
        whole = {"processor_class": "InternVLProcessor", "image_seq_length": self.tile_tokens}
        return {"preprocessor_config.json": self.to_config(), "processor_config.json": whole}

    def __call__(self, image: Image.Image) -> TiledImage:
        """Stretches one image to its grid and cuts it into normalised tiles."""
        rows, columns = self.grid(image.height, image.width)
        if image.mode != "RGB":
            image = to_rgb(image, name="image")
        tiles = self._cut(image, rows, columns)
        if rows * columns > 1 and self.use_thumbnail:
            tiles = np.concatenate([tiles, self._cut(image, 1, 1)])
        return TiledImage(tiles, self._values, self.downsample**2)

    def _cut(self, image: Image.Image, rows: int, columns: int) -> np.ndarray:
        """uint8 [rows*columns, n, 3, patch*patch] of the whole image."""
        size, patch = self.tile_size, self.patch_size
        side = size // patch
        resized = image.resize((columns * size, rows * size), resample=Image.Resampling.BICUBIC)
        pixels = np.asarray(resized).reshape(rows, side, patch, columns, side, patch, 3)
        return pixels.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns, side * side, 3, patch * patch)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tiles of an image of that size, without touching pixels; the thumbnail is not counted.

        Raises InputError for a zero size.
        """
        if height < 1 or width < 1:
            raise InputError(f"the image has zero size ({width}x{height}); replace it or drop the row")
        return tile_grid(height, width, tile_size=self.tile_size, min_tiles=self.min_tiles, max_tiles=self.max_tiles)

    def num_tiles(self, height: int, width: int) -> int:
        """Tiles of an image of that size, thumbnail included."""
        rows, columns = self.grid(height, width)
        return rows * columns + (self.use_thumbnail and rows * columns > 1)

    def num_tokens(self, height: int, width: int) -> int:
        """Placeholder tokens of an image of that size, without the two brackets."""
        return self.num_tiles(height, width) * self.tile_tokens


@functools.lru_cache(maxsize=4096)
def tile_grid(height: int, width: int, *, tile_size: int, min_tiles: int, max_tiles: int) -> tuple[int, int]:
    """(rows, columns) whose aspect ratio is nearest to the image's (HF `get_optimal_tiled_canvas`).

    Of grids with the same ratio, a larger one is taken only if the image has more than half its pixels.
    """
    ratio, area = width / height, width * height
    nearest, best = float("inf"), (1, 1)
    for rows, columns in _grids(min_tiles, max_tiles):
        distance = abs(ratio - columns / rows)
        if distance < nearest:
            nearest, best = distance, (rows, columns)
        elif distance == nearest and area > 0.5 * tile_size * tile_size * columns * rows:
            best = (rows, columns)
    return best


@functools.lru_cache(maxsize=64)
def _grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """(rows, columns) of all grids allowed, by their number of tiles; the narrower first among equals."""
    sides = range(1, max_tiles + 1)
    grids = [(rows, columns) for columns in sides for rows in sides if min_tiles <= rows * columns <= max_tiles]
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


def _opengvlab_settings(model: dict[str, Any]) -> dict[str, Any]:
    """Tiling as OpenGVLab's `config.json` has it."""
    size = model.get("force_image_size") or model["vision_config"]["image_size"]
    dynamic = model.get("dynamic_image_size", True)
    return {
        "tile_size": _one_number(size),
        "min_tiles": int(model.get("min_dynamic_patch", 1)) if dynamic else 1,
        "max_tiles": int(model.get("max_dynamic_patch", 12)) if dynamic else 1,
        "use_thumbnail": bool(model.get("use_thumbnail", True)),
    }


def _model_settings(model: dict[str, Any]) -> dict[str, Any]:
    """Patches and pixel shuffle as `config.json` of either layout has them."""
    settings: dict[str, Any] = {}
    if (patch := (model.get("vision_config") or {}).get("patch_size")) is not None:
        settings["patch_size"] = _one_number(patch)
    if (ratio := model.get("downsample_ratio")) is not None:
        settings["downsample"] = round(1 / float(ratio))
    return settings


def _processor_settings(source: Path, config: dict[str, Any], *, complete: bool) -> dict[str, Any]:
    """What a processor file says; `complete`: the rest is known, so that a CLIP processor's colours may do."""
    kind = str(config.get("image_processor_type") or config.get("feature_extractor_type"))
    tiled = kind.startswith("GotOcr2")
    if not tiled and not (complete and kind.startswith("CLIP")):
        raise InputError(f"{source}: image_processor_type is {kind}, not InternVL's; give an InternVL folder")
    refuse_other_steps(source, config)
    settings: dict[str, Any] = {key: tuple(float(x) for x in config[key]) for key in ("image_mean", "image_std")}
    if not tiled:
        return settings
    size = config["size"]
    settings["tile_size"] = _one_number([size["height"], size["width"]])
    for key, name in (("min_patches", "min_tiles"), ("max_patches", "max_tiles")):
        if config.get(key) is not None:
            settings[name] = int(config[key])
    if "use_thumbnail" in config:
        settings["use_thumbnail"] = bool(config["use_thumbnail"])
    return settings


def _one_number(sides: Any) -> int:
    """The side of a square, given as one number or as two that are equal."""
    numbers = {int(side) for side in (sides if isinstance(sides, list | tuple) else [sides])}
    if len(numbers) != 1:
        raise ValueError(f"only squares are supported, and here is {sides}")
    return numbers.pop()
