"""Batches from a data set with grain: shuffled anew each epoch, shared among processes, resumed exactly.

The stream is one sequence for the whole job: epoch after epoch of the source, each in an order that depends on `seed`
and the epoch alone. Of every `process_count` consecutive items, process p takes the p-th. So a global batch (the
processes' batches of one step together) holds the same items whatever the number of processes, no item goes to two of
them, and all processes have equally many batches.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from ril_jax.errors import InputError


def make_iterator(
    source: Sequence[Any],
    *,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    repeat: bool = True,
    transform: Callable[[Any], Any] | None = None,
    process_index: int = 0,
    process_count: int = 1,
    prefetch: int = 2,
    drop_remainder: bool = True,
    num_threads: int | None = None,
) -> BatchIterator:
    """An iterator over lists of `batch_size` items of `source`, each passed through `transform` in a thread.

    `batch_size` counts one process's items; `prefetch` is how many batches are prepared ahead (0: none, no threads).
    With `repeat` batches run across the ends of epochs, and none is short; such a batch may hold an item twice. Without
    it the source is gone through once; `drop_remainder` leaves out the items that do not fill a batch on every process
    (else the last batches are short, and may be fewer on some processes). `source` and `transform` must be thread-safe.
    An exception of theirs is raised by `next` as it is, and the iterator stays before the batch it came from. Raises
    InputError for a source that is too small to give a batch.
    """
    if batch_size < 1 or process_count < 1 or not 0 <= process_index < process_count:
        raise ValueError(f"batch_size {batch_size}, process {process_index} of {process_count}")
    length = len(source)
    if not length:
        raise InputError("the data set is empty; give it at least one question")
    if not repeat and drop_remainder and length < batch_size * process_count:
        raise InputError(
            f"the data set has {length} items, too few for one batch of {batch_size} on {process_count} process(es); "
            "make the batch smaller"
        )
    dataset = grain.MapDataset.source(source)
    if shuffle:
        dataset = dataset.shuffle(seed=_spread(seed))
    if repeat:
        dataset = dataset.repeat()
    elif drop_remainder:
        dataset = dataset[: length - length % (batch_size * process_count)]
    dataset = dataset[process_index::process_count]
    if transform is not None:
        dataset = dataset.map(_without_stop_iteration(transform))
    threads = (num_threads or min(16, os.cpu_count() or 1)) if prefetch else 0
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch * batch_size)
    # Grain takes None for "filtered out"; here a None is an item like any other.
    batches = dataset.to_iter_dataset(options, allow_nones=True).batch(batch_size, batch_fn=list)
    return BatchIterator(
        iter(batches),
        items_per_step=process_count,
        stream={"length": length, "seed": seed if shuffle else None, "repeat": repeat},
    )


class BatchIterator(grain.DatasetIterator):
    """Grain's iterator with a state that knows its stream; orbax and grain save and restore it as any of theirs.

    `get_state()` is a small JSON-able dict. It counts items of the job's whole stream, so it is the same on every
    process, and a job of another number of processes or another batch size can go on from it.
    """

    def __init__(self, batches: grain.DatasetIterator, *, items_per_step: int, stream: dict[str, Any]):
        super().__init__(batches)
        self._stream = stream
        self._items_per_step = items_per_step

    def __next__(self) -> list[Any]:
        before = self._parent.get_state()
        try:
            return next(self._parent)
        except StopIteration:
            raise
        except Exception:
            self._parent.set_state(before)
            raise

    def get_state(self) -> dict[str, Any]:
        """The place in the stream, as a dict of plain JSON values."""
        return {"next_item": self._parent.get_state()["next_index"] * self._items_per_step, **self._stream}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to where `state` was taken; InputError if that was in another stream (data set size, seed or order)."""
        for field, value in self._stream.items():
            if state.get(field) != value:
                raise InputError(
                    f"the saved data iterator has {field}={state.get(field)!r}, and this run {field}={value!r}; "
                    "go on with the same data set and seed, or start in a new workdir"
                )
        next_index, rest = divmod(state["next_item"], self._items_per_step)
        if rest:
            raise InputError(
                f"the saved data iterator stands at item {state['next_item']}, which {self._items_per_step} processes "
                "cannot share evenly; go on with the former number of processes"
            )
        self._parent.set_state({"next_index": next_index})

    def __str__(self) -> str:
        return f"BatchIterator({self.get_state()})"


def _without_stop_iteration(transform: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def call(item: Any) -> Any:
        try:
            return transform(item)
        except StopIteration as error:  # would pass for the end of the data
            raise RuntimeError("the transform raised StopIteration") from error

    return call


def _spread(seed: int) -> int:
    """32 bits of which neighbouring seeds share nothing: grain adds the epoch to the seed, so that its epoch 1 of seed
    0 would be epoch 0 of seed 1."""
    return int(np.random.SeedSequence(seed).generate_state(1)[0])
