"""From questions to the arrays of a step: encoded on the host, packed into the config's buckets, in micro-batches."""

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ril_jax import sharding
from ril_jax.data.chat import ChatTokenizer, EncodedPrompt
from ril_jax.data.images import decode_image
from ril_jax.data.packing import (
    PromptBatch,
    ResponseBatch,
    Rung,
    TileRung,
    VisionRung,
    pack_prompts,
    pack_responses,
    pick_bucket,
    pick_rung,
)
from ril_jax.data.records import Question, question_prompt
from ril_jax.errors import InputError
from ril_jax.models.config import InternVisionConfig, ModelConfig


class PromptEncoder:
    """Encodes questions' prompts and images, and keeps the latest results, up to `cache_bytes`; thread-safe."""

    def __init__(self, chat: ChatTokenizer, *, max_length: int, cache_bytes: int = 512 * 2**20):
        self.chat = chat
        self.max_length = max_length
        self._room = cache_bytes
        self._cache: OrderedDict[str, EncodedPrompt] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, question: Question) -> EncodedPrompt:
        """The prompt of a question; InputError, with the row's id, where it cannot be used."""
        with self._lock:
            if question.id in self._cache:
                self._cache.move_to_end(question.id)
                return self._cache[question.id]
        name = f"question {question.id}"
        images = [decode_image(data, name=f"{name}, image {i}") for i, data in enumerate(question.images)]
        messages = self.chat.messages(question_prompt(question), len(images), name=name)
        encoded = self.chat.encode_prompt(messages, images, name=name, max_length=self.max_length)
        with self._lock:
            if question.id not in self._cache:
                self._cache[question.id] = encoded
                self._room -= _size(encoded)
                while self._room < 0 and self._cache:
                    self._room += _size(self._cache.popitem(last=False)[1])
        return encoded


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The padded shapes of a run: prompt lengths, response lengths, and rungs of the image buffer per micro-batch."""

    model: ModelConfig
    prompts: tuple[int, ...]
    responses: tuple[int, ...]
    rungs: tuple[Rung, ...]
    shards: int = 1  # groups of rows in a micro-batch, each with an image buffer of its own

    @classmethod
    def from_config(cls, model: ModelConfig, data: Any, *, shards: int = 1) -> "Buckets":
        """Of the fields of config.data; rungs of another family than the model's are for other models of the run.

        Raises InputError where all of them are.
        """
        entries = [tuple(rung) if isinstance(rung, list | tuple) else (rung,) for rung in data.vision_rungs]
        rungs: tuple[Rung, ...] = ()
        if isinstance(model.vision, InternVisionConfig):
            rungs = tuple(TileRung(*entry) for entry in entries if len(entry) == 1)
        elif model.vision is not None:
            rungs = tuple(VisionRung(*entry) for entry in entries if len(entry) > 1)
        if model.vision is not None and entries and not rungs:
            tiled = isinstance(model.vision, InternVisionConfig)
            shape = "(tiles,) for InternVL" if tiled else "(patches, images, patches in the largest) for Qwen2.5-VL"
            raise InputError(f"config.data.vision_rungs has no rung of the form {shape}; add one that holds a batch")
        return cls(model, tuple(data.prompt_buckets), tuple(data.response_buckets), rungs, shards)

    def pack_prompts(self, prompts: Sequence[EncodedPrompt], *, batch: int, micro: int = 0) -> PromptBatch:
        """Stacked micro-batches [M, micro, ...] of `batch` rows, all of one shape.

        Images lie in [M, groups, ...] buffers, and feature indices count within a group: `shards` equal groups of rows
        where the micro-batch can be divided so, else one.
        """
        micro = micro or batch
        rows = micro // self.groups(micro)
        groups = [prompts[i : i + rows] for i in range(0, batch, rows)]
        longest = max((len(prompt.token_ids) for prompt in prompts), default=1)
        length = pick_bucket(longest, self.prompts, name="a prompt")
        images = [[image for prompt in group for image in prompt.images] for group in groups]
        needed = [rung for group in images if (rung := pick_rung(group, self.rungs, self.model.vision)) is not None]  # type: ignore[arg-type]
        rung = max(needed, key=lambda rung: rung.size) if needed else None
        packed = [pack_prompts(group, self.model, batch=rows, prompt_len=length, rung=rung) for group in groups]
        return _stack_groups(packed, batch // micro)

    def groups(self, micro: int) -> int:
        """Groups of rows in a micro-batch of that size."""
        return self.shards if micro % self.shards == 0 else 1

    def pack_responses(
        self, responses: Sequence[Sequence[np.ndarray]], *, batch: int, micro: int = 0, slots: int = 0
    ) -> ResponseBatch:
        """Stacked micro-batches [M, micro, S, R]; S is the largest number of responses of a row, or `slots`."""
        micro = micro or batch
        longest = max((len(tokens) for row in responses for tokens in row), default=1)
        length = pick_bucket(min(longest, max(self.responses)), self.responses, name="a response")
        packed = pack_responses(responses, batch=batch, response_len=length, slots=slots)
        return jax.tree.map(lambda a: a.reshape(batch // micro, micro, *a.shape[1:]), packed)


def micro_rows(batch: int, micro: int, shards: int) -> int:
    """Rows of a micro-batch: the fewest from `micro` (0: the batch) on that divide the batch and spread over `shards`.

    Where no number does, `micro` itself if it divides the batch, else the batch; its rows are then on every device.
    """
    micro = micro or batch
    fitting = [rows for rows in range(micro, batch + 1) if batch % rows == 0 and rows % shards == 0]
    return fitting[0] if fitting else micro if batch % micro == 0 else batch


def _stack_groups(groups: Sequence[PromptBatch], count: int) -> PromptBatch:
    """`count` micro-batches of equally many groups each: rows [M, b, ...], images [M, groups, ...]."""
    if len(groups) == 1:  # views: the patches of all images are large
        vision = groups[0].vision
        one = jax.tree.map(lambda leaf: leaf[None], groups[0]._replace(vision=None))
        return one._replace(vision=None if vision is None else jax.tree.map(lambda leaf: leaf[None, None], vision))
    vision = None
    if groups[0].vision is not None:
        vision = jax.tree.map(lambda *leaves: _in_micro(np.stack(leaves), count), *(g.vision for g in groups))
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *(g._replace(vision=None) for g in groups))
    positions = _in_micro(stacked.positions, count)  # [M, groups, 3, b / groups, P]
    positions = np.moveaxis(positions, 2, 1).reshape(count, 3, -1, positions.shape[-1])
    rows = jax.tree.map(
        lambda leaf: _in_micro(leaf, count).reshape(count, -1, *leaf.shape[2:]), stacked._replace(positions=None)
    )
    return rows._replace(positions=positions, vision=vision)


def _in_micro(leaf: np.ndarray, count: int) -> np.ndarray:
    return leaf.reshape(count, -1, *leaf.shape[1:])


def put(tree: Any, mesh: Mesh, *, micro: bool = True) -> Any:
    """Host arrays on the devices, their rows over the mesh's data and fsdp axes.

    Rows are axis 1 of micro-batches [M, b, ...] and axis 0 of flat batches (`micro=False`); `PromptBatch.positions` has
    its axes of rotation before them. What has no rows, or a number that does not divide, is replicated.
    """

    def of(path, leaf):
        name = getattr(path[-1], "name", "") if path else ""
        axis = int(micro) + (name == "positions" and leaf.ndim == 3 + int(micro))
        return jax.device_put(leaf, sharding.rows(mesh, leaf.shape, axis))

    return jax.tree_util.tree_map_with_path(of, tree)


def flatten_features(features: jax.Array | None) -> jax.Array | None:
    """[M, groups, F, D] -> [M * groups, F, D], for rows as `flatten_micro` gives them."""
    return None if features is None else features.reshape(-1, *features.shape[2:])


def flatten_micro(prompts: PromptBatch) -> PromptBatch:
    """[M, b, ...] -> [M * b, ...] (positions [M, 3, b, P] -> [3, M * b, P]); images are left out."""
    merge: Callable[[Any], Any] = lambda a: a.reshape(-1, *a.shape[2:])  # noqa: E731
    positions = np.moveaxis(prompts.positions, 1, 0)
    return PromptBatch(
        merge(prompts.token_ids),
        positions.reshape(3, -1, positions.shape[-1]),
        merge(prompts.valid),
        merge(prompts.feature_index),
        merge(prompts.next_position),
        merge(prompts.row_valid),
        None,
    )


def _size(encoded: EncodedPrompt) -> int:
    return encoded.token_ids.nbytes + sum(image.nbytes for image in encoded.images)
