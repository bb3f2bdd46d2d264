"""From questions to the arrays of a step: encoded on the host, packed into the config's buckets, in micro-batches."""

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from ril_jax import processes, sharding
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


class Layout(NamedTuple):
    """How this process's rows of a batch lie: [num micro-batches, groups, rows of a group], in this order.

    positions: their places in the batch. owned: for which of them this process answers (`sharding.Part`).
    """

    positions: np.ndarray
    owned: np.ndarray
    num: int
    groups: int

    @property
    def rows(self) -> int:
        """Rows of a group."""
        return len(self.positions) // (self.num * self.groups)

    def flat(self, values: np.ndarray) -> np.ndarray:
        """[n, ...] in this order, in that of `flatten_micro`."""
        return _groups_first(values.reshape(self.num, -1, *values.shape[1:]), self.groups)

    def in_order(self, values: np.ndarray) -> np.ndarray:
        """The inverse."""
        split = values.reshape(self.groups, self.num, -1, *values.shape[1:])
        return split.swapaxes(0, 1).reshape(values.shape)


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The padded shapes of a run: prompt lengths, response lengths, and rungs of the image buffer per micro-batch."""

    model: ModelConfig
    prompts: tuple[int, ...]
    responses: tuple[int, ...]
    rungs: tuple[Rung, ...]
    shards: int = 1  # groups of rows in a micro-batch, each with an image buffer of its own
    part: sharding.Part | None = None  # which of them this process packs; None: all

    @classmethod
    def from_config(
        cls, model: ModelConfig, data: Any, *, shards: int = 1, part: sharding.Part | None = None
    ) -> "Buckets":
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
        return cls(model, tuple(data.prompt_buckets), tuple(data.response_buckets), rungs, shards, part)

    def groups(self, micro: int) -> int:
        """Groups of rows in a micro-batch of that size."""
        return self.shards if micro % self.shards == 0 else 1

    def layout(self, batch: int, micro: int = 0) -> Layout:
        """This process's rows of a batch. Raises InputError where several processes cannot share it."""
        micro = micro or batch
        groups = self.groups(micro)
        held = owned = tuple(range(groups))
        if self.part is not None:
            if micro % self.shards:
                raise InputError(
                    f"a batch of {micro} questions cannot be spread over {self.shards} devices (mesh data x fsdp) of "
                    f"several processes; make batch_size a multiple of {self.shards}, or raise config.mesh.tensor"
                )
            held, owned = self.part
        places = np.arange(batch).reshape(batch // micro, groups, -1)[:, list(held)]
        mine = np.broadcast_to(np.isin(held, owned)[None, :, None], places.shape)
        return Layout(places.reshape(-1), mine.reshape(-1), batch // micro, len(held))

    def pack_prompts(self, prompts: Sequence[EncodedPrompt], *, batch: int, micro: int = 0) -> PromptBatch:
        """Stacked micro-batches [M, micro, ...] of `batch` rows, all of one shape.

        Images lie in [M, groups, ...] buffers, and feature indices count within a group: `shards` equal groups of rows
        where the micro-batch can be divided so, else one. Of several processes each packs its rows (those of `layout`)
        into its part of these arrays, in the shapes that all of them together need.
        """
        layout = self.layout(batch, micro)
        return self._pack_prompts(prompts, layout, self._agree(self._needs_of_prompts(prompts, layout)))

    def pack_responses(
        self, responses: Sequence[Sequence[np.ndarray]], *, batch: int, micro: int = 0, slots: int = 0
    ) -> ResponseBatch:
        """Stacked micro-batches [M, micro, S, R]; S is the largest number of responses of a row, or `slots`."""
        layout = self.layout(batch, micro)
        return self._pack_responses(responses, layout, self._agree(self._needs_of_responses(responses, layout)), slots)

    def pack(
        self,
        prompts: Sequence[EncodedPrompt],
        responses: Sequence[Sequence[np.ndarray]],
        *,
        batch: int,
        micro: int = 0,
        slots: int = 0,
    ) -> tuple[PromptBatch, ResponseBatch, int]:
        """Both, and the number of response tokens in the batch."""
        layout = self.layout(batch, micro)
        needs = self._agree(self._needs_of_prompts(prompts, layout) | self._needs_of_responses(responses, layout))
        return (
            self._pack_prompts(prompts, layout, needs),
            self._pack_responses(responses, layout, needs, slots),
            sum(needs["tokens"].values()),
        )

    def _needs_of_prompts(self, prompts: Sequence[EncodedPrompt], layout: Layout) -> dict[str, Any]:
        """The bucket and the rung that these need."""
        longest = max((len(prompt.token_ids) for prompt in prompts), default=1)
        images = [[image for prompt in group for image in prompt.images] for group in _in_groups(prompts, layout)]
        rungs = [rung for group in images if (rung := pick_rung(group, self.rungs, self.model.vision)) is not None]  # type: ignore[arg-type]
        return {
            "prompt": pick_bucket(longest, self.prompts, name="a prompt"),
            "rung": [dataclasses.astuple(rung) for rung in rungs],
        }

    def _needs_of_responses(self, responses: Sequence[Sequence[np.ndarray]], layout: Layout) -> dict[str, Any]:
        """The bucket and the slots that these need, and the number of tokens in each share of the batch."""
        most = max(self.responses)
        groups = [
            [[min(len(tokens), most) for tokens in row] for row in group] for group in _in_groups(responses, layout)
        ]
        longest = max((length for group in groups for row in group for length in row), default=1)
        held = range(layout.groups) if self.part is None else self.part.held
        tokens = dict.fromkeys(map(str, held), 0)
        for i, group in enumerate(groups):
            tokens[str(held[i % layout.groups])] += sum(map(sum, group))
        return {
            "response": pick_bucket(longest, self.responses, name="a response"),
            "slots": max((len(row) for row in responses), default=0),
            "tokens": tokens,
        }

    def _agree(self, needs: dict[str, Any]) -> dict[str, Any]:
        """What all processes together need: none may choose another shape, for their programs must be the same."""
        if self.part is None:
            return needs
        all_needs = processes.gather(needs, "shapes of a batch")
        together: dict[str, Any] = {name: max(n[name] for n in all_needs) for name in needs.keys() - {"rung", "tokens"}}
        if "rung" in needs:
            together["rung"] = [rung for n in all_needs for rung in n["rung"]]
        if "tokens" in needs:
            together["tokens"] = {share: count for n in all_needs for share, count in n["tokens"].items()}
        return together

    def _pack_prompts(self, prompts: Sequence[EncodedPrompt], layout: Layout, needs: dict[str, Any]) -> PromptBatch:
        kind = type(self.rungs[0]) if self.rungs else VisionRung
        rung = max((kind(*sizes) for sizes in needs["rung"]), key=lambda rung: rung.size, default=None)
        rows = layout.rows
        groups = _in_groups(prompts, layout)
        packed = [pack_prompts(g, self.model, batch=rows, prompt_len=needs["prompt"], rung=rung) for g in groups]
        return _stack_groups(packed, layout.num)

    def _pack_responses(
        self, responses: Sequence[Sequence[np.ndarray]], layout: Layout, needs: dict[str, Any], slots: int
    ) -> ResponseBatch:
        packed = pack_responses(
            responses, batch=len(layout.positions), response_len=needs["response"], slots=slots or needs["slots"]
        )
        return jax.tree.map(lambda a: _in_micro(a, layout.num), packed)


def _in_groups(items: Sequence[Any], layout: Layout) -> list[Sequence[Any]]:
    """The rows of each group of each micro-batch; the last ones may be short."""
    return [items[i : i + layout.rows] for i in range(0, len(layout.positions), layout.rows)]


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
    its axes of rotation before them. What has no rows, or a number that does not divide, is replicated. Of several
    processes each gives its own rows, as `Buckets` packs them.
    """

    axis = int(micro)

    def rows(leaf: np.ndarray, at: int = axis) -> jax.Array:
        return sharding.put_rows(leaf, mesh, at)

    def of(leaf: Any) -> Any:
        if not isinstance(leaf, PromptBatch):
            return rows(leaf)
        positions = rows(leaf.positions, axis + 1)
        others = leaf._replace(positions=None)  # type: ignore[arg-type]
        return jax.tree.map(rows, others)._replace(positions=positions)

    return jax.tree.map(of, tree, is_leaf=lambda node: isinstance(node, PromptBatch))


def flatten_features(features: jax.Array | None) -> jax.Array | None:
    """[M, groups, F, D] -> [groups * M, F, D], for rows as `flatten_micro` gives them."""
    if features is None:
        return None
    if min(features.shape[:2]) > 1:
        features = features.swapaxes(0, 1)
    return features.reshape(-1, *features.shape[2:])


def flatten_micro(prompts: PromptBatch, groups: int = 1) -> PromptBatch:
    """[M, b, ...] -> [M * b, ...] (positions [M, 3, b, P] -> [3, M * b, P]); images are left out.

    Groups of rows come first and micro-batches within them, so that every row stays on its device.
    """
    merge: Callable[[Any], Any] = lambda a: _groups_first(a, groups)  # noqa: E731
    positions = merge(np.moveaxis(prompts.positions, 1, 2))
    return PromptBatch(
        merge(prompts.token_ids),
        np.moveaxis(positions, 1, 0),
        merge(prompts.valid),
        merge(prompts.feature_index),
        merge(prompts.next_position),
        merge(prompts.row_valid),
        None,
    )


def _groups_first(leaf: np.ndarray, groups: int) -> np.ndarray:
    """[M, groups * rows, ...] -> [groups * M * rows, ...]."""
    split = leaf.reshape(leaf.shape[0], groups, -1, *leaf.shape[2:])
    return split.swapaxes(0, 1).reshape(-1, *leaf.shape[2:])


def _size(encoded: EncodedPrompt) -> int:
    return encoded.token_ids.nbytes + sum(image.nbytes for image in encoded.images)
