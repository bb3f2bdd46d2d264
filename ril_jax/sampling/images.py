"""Image features on the device, by content: which rows of the feature store hold which image."""

import hashlib
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ril_jax.data.packing import Rung, TileRung, VisionRung, pack_images, pick_rung
from ril_jax.errors import InputError
from ril_jax.models.config import InternVisionConfig, ModelConfig


class FeatureStore:
    """A ring of `rows` feature rows; an image that comes again is not encoded again while it is still there.

    Every image is encoded alone, in the smallest rung that holds it, so its features depend on nothing else.
    """

    def __init__(self, config: ModelConfig, rows: int):
        self._config, self._rows = config, rows
        self._rungs = image_rungs(config, rows)
        self._held: OrderedDict[bytes, tuple[int, int]] = OrderedDict()  # digest -> (first row, rows)
        self._pinned: set[bytes] = set()
        self._cursor = 0

    def examples(self) -> Iterator[Any]:
        """The inputs of each encode program, of no image."""
        for rung in self._rungs:
            yield pack_images([], self._config.vision, rung)  # type: ignore[arg-type]

    def digests(self, images: Sequence[Any]) -> list[tuple[bytes, int]]:
        """Of each image its content's digest and the tokens it takes."""
        out = []
        for image in images:
            source = getattr(image, "source", None)
            source = np.ascontiguousarray(image.patches if source is None else source)
            state = hashlib.blake2b(repr((image.grid, source.shape, source.dtype)).encode(), digest_size=16)
            state.update(source.data)
            out.append((state.digest(), self._num_tokens(image)))
        return out

    def check(self, images: Sequence[tuple[Any, np.ndarray, bytes]], chunk: int) -> None:
        """Raises InputError for an image that no rung holds, and for more images in a chunk than there are rows for.

        images: each with the places of its tokens in the prompt, ascending, and its digest.
        """
        held: dict[int, dict[bytes, int]] = {}
        for image, places, digest in images:
            rung = self._rung(image)
            if rung is None:
                raise InputError(
                    f"an image takes {self._num_tokens(image)} tokens, more than the engine has room for; make it "
                    f"smaller, or raise config.engine.feature_rows"
                )
            for number in range(places[0] // chunk, places[-1] // chunk + 1):
                held.setdefault(number, {})[digest] = rung.num_features(self._config.vision)
        most = max((sum(rows.values()) for rows in held.values()), default=0)
        if most > self._rows:
            raise InputError(
                f"the images of {chunk} tokens of the prompt take {most} rows of features, and the engine keeps "
                f"{self._rows}; give fewer images, or raise config.engine.feature_rows"
            )

    def hold(self, digest: bytes, image: Any) -> tuple[int, Any] | None:
        """The image's first row, and the inputs to encode it with, None if it is there; None if there is no room.

        It stays until `unpin`, at the least.
        """
        if digest in self._held:
            self._held.move_to_end(digest)
            self._pinned.add(digest)
            return self._held[digest][0], None
        rung = self._rung(image)
        assert rung is not None
        row = self._make_room(rung.num_features(self._config.vision))
        if row is None:
            return None
        self._held[digest] = (row, rung.num_features(self._config.vision))
        self._pinned.add(digest)
        return row, pack_images([image], self._config.vision, rung)  # type: ignore[arg-type]

    def row(self, digest: bytes) -> int:
        """The first row of an image that is held."""
        return self._held[digest][0]

    def unpin(self) -> None:
        """What was held may go."""
        self._pinned.clear()

    def clear(self) -> None:
        """Forget all images (the weights have changed)."""
        self._held.clear()
        self._pinned.clear()
        self._cursor = 0

    def _num_tokens(self, image: Any) -> int:
        return math.prod(image.grid) // self._config.vision.merge_unit  # type: ignore[union-attr]

    def _rung(self, image: Any) -> Any:
        try:
            return pick_rung([image], self._rungs, self._config.vision)  # type: ignore[arg-type]
        except InputError:
            return None

    def _make_room(self, count: int) -> int | None:
        """A run of rows in which nothing is pinned; images that lay there are forgotten."""
        pinned = sorted(self._held[digest] for digest in self._pinned)
        for start in (self._cursor, 0):
            at = start
            for first, rows in pinned:
                if first + rows > at and first < at + count:
                    at = first + rows
            if at + count <= self._rows:
                for digest, (first, rows) in list(self._held.items()):
                    if first < at + count and first + rows > at:
                        del self._held[digest]
                self._cursor = at + count
                return at
        return None


def image_rungs(config: ModelConfig, rows: int) -> list[Rung]:
    """The buffers for one image each, every one twice the one before, up to what `rows` features hold."""
    if config.vision is None:
        return []
    rungs: list[Rung] = []
    if isinstance(config.vision, InternVisionConfig):
        rungs = [TileRung(2**i) for i in range(rows.bit_length())]
    else:
        # An image of so many patches has the most windows where it is as narrow as can be, one merge group wide.
        side = config.vision.window_size // config.vision.patch_size
        narrow = config.vision.spatial_merge_size * side
        sizes = [64 * 2**i for i in range(rows.bit_length())]
        rungs = [VisionRung(size, 1, size, windows=-(-size // narrow)) for size in sizes]
    return [rung for rung in rungs if rung.num_features(config.vision) <= rows]
