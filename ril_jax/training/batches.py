"""From questions to the arrays of a step: encoded on the host, packed into the config's buckets, in micro-batches."""

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

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

    @classmethod
    def from_config(cls, model: ModelConfig, data: Any) -> "Buckets":
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
        return cls(model, tuple(data.prompt_buckets), tuple(data.response_buckets), rungs)

    def pack_prompts(
        self, prompts: Sequence[EncodedPrompt], *, batch: int, micro: int = 0, offset_features: bool = True
    ) -> PromptBatch:
        """Stacked micro-batches [M, micro, ...] of `batch` rows, all of one shape.

        With `offset_features` the feature indices count through the images of all micro-batches, for features that are
        encoded once for the whole batch; without, each micro-batch counts from its own first image.
        """
        micro = micro or batch
        groups = [prompts[i : i + micro] for i in range(0, batch, micro)]
        longest = max((len(prompt.token_ids) for prompt in prompts), default=1)
        length = pick_bucket(longest, self.prompts, name="a prompt")
        images = [[image for prompt in group for image in prompt.images] for group in groups]
        needed = [rung for group in images if (rung := pick_rung(group, self.rungs, self.model.vision)) is not None]  # type: ignore[arg-type]
        rung = max(needed, key=lambda rung: rung.size) if needed else None
        packed = [pack_prompts(group, self.model, batch=micro, prompt_len=length, rung=rung) for group in groups]
        if offset_features and rung is not None:
            assert self.model.vision is not None
            step = rung.num_features(self.model.vision)
            packed = [
                p._replace(feature_index=np.where(p.feature_index >= 0, p.feature_index + i * step, -1))
                for i, p in enumerate(packed)
            ]
        if len(packed) == 1:  # a view: the patches of all images are large
            return jax.tree.map(lambda leaf: leaf[None], packed[0])
        return jax.tree.map(lambda *leaves: np.stack(leaves), *packed)

    def pack_responses(
        self, responses: Sequence[Sequence[np.ndarray]], *, batch: int, micro: int = 0, slots: int = 0
    ) -> ResponseBatch:
        """Stacked micro-batches [M, micro, S, R]; S is the largest number of responses of a row, or `slots`."""
        micro = micro or batch
        longest = max((len(tokens) for row in responses for tokens in row), default=1)
        length = pick_bucket(min(longest, max(self.responses)), self.responses, name="a response")
        packed = pack_responses(responses, batch=batch, response_len=length, slots=slots)
        return jax.tree.map(lambda a: a.reshape(batch // micro, micro, *a.shape[1:]), packed)


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
