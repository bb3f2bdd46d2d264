"""Batches from a data set with grain: shuffled anew each epoch, shared among processes, resumed exactly.

The stream is one sequence for the whole job: epoch after epoch of the source, each in an order that depends on `seed`
and the epoch alone. It is cut into batches, and each process takes its rows of every batch, and reads no other item.
So a batch holds the same items in the same places whatever the number of processes, and all processes have equally
many batches.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
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
    rows: Iterable[int] | None = None,
    prefetch: int = 2,
    drop_remainder: bool = True,
    num_threads: int | None = None,
) -> BatchIterator:
    """An iterator over lists of items of `source`, each passed through `transform` in a thread.

    A batch has `batch_size` items, of which this process gets those at the places `rows`, in increasing order (None:
    all). `prefetch` is how many batches are prepared ahead (0: none, no threads). With `repeat` batches run across the
    ends of epochs, and none is short; such a batch may hold an item twice. Without it the source is gone through once;
    `drop_remainder` leaves out the items that do not fill a batch (else the last one is short, and may be missing on
    some processes). `source` and `transform` must be thread-safe. An exception of theirs is raised by `next` as it is,
    and the iterator stays before the batch it came from. Raises InputError for a source that is too small to give a
    batch.
    """
    places = [int(row) for row in (range(batch_size) if rows is None else rows)]
    if not places or places != sorted({row for row in places if 0 <= row < batch_size}):
        raise ValueError(f"rows {places} of a batch of {batch_size}")
    length = len(source)
    if not length:
        raise InputError("the data set is empty; give it at least one question")
    if not repeat and drop_remainder and length < batch_size:
        raise InputError(
            f"the data set has {length} items, too few for one batch of {batch_size}; make the batch smaller"
        )
    dataset = grain.MapDataset.source(source)
    if shuffle:
        dataset = dataset.shuffle(seed=_spread(seed))
    if repeat:
        dataset = dataset.repeat()
    elif drop_remainder:
        dataset = dataset[: length - length % batch_size]
    if len(places) < batch_size:
        dataset = _Rows(dataset, places, batch_size)
    if transform is not None:
        dataset = dataset.map(_without_stop_iteration(transform))
    threads = (num_threads or min(16, os.cpu_count() or 1)) if prefetch else 0
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch * len(places))
    # Grain takes None for "filtered out"; here a None is an item like any other.
    batches = dataset.to_iter_dataset(options, allow_nones=True).batch(len(places), batch_fn=list)
    return BatchIterator(
        iter(batches),
        share=(len(places), batch_size),
        stream={"length": length, "seed": seed if shuffle else None, "repeat": repeat},
    )


class _Rows(grain.MapDataset):
    """Of every `batch_size` items of the parent those at the places `rows`."""

    def __init__(self, parent: grain.MapDataset, rows: Sequence[int], batch_size: int):
        super().__init__(parent)
        self._rows, self._batch_size = rows, batch_size

    def __len__(self) -> int:
        batches, rest = divmod(len(self._parent), self._batch_size)
        return batches * len(self._rows) + sum(row < rest for row in self._rows)

    def __getitem__(self, index):
        batch, place = divmod(index, len(self._rows))
        return self._parent[batch * self._batch_size + self._rows[place]]


class BatchIterator(grain.DatasetIterator):
    """Grain's iterator with a state that knows its stream; orbax and grain save and restore it as any of theirs.

    `get_state()` is a small JSON-able dict. It counts items of the job's whole stream, so it is the same on every
    process, and a job of another number of processes or another batch size can go on from it.
    """

    def __init__(self, batches: grain.DatasetIterator, *, share: tuple[int, int], stream: dict[str, Any]):
        """`share`: items of this process in a batch, and all items of it."""
        super().__init__(batches)
        self._stream = stream
        self._mine, self._all = share

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
        next_index = self._parent.get_state()["next_index"]
        if self._mine < self._all:  # a last batch that is short counts as a whole one
            next_index = -(-next_index // self._mine) * self._all
        return {"next_item": next_index, **self._stream}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to where `state` was taken; InputError if that was in another stream (data set size, seed or order)."""
        for field, value in self._stream.items():
            if state.get(field) != value:
                raise InputError(
                    f"the saved data iterator has {field}={state.get(field)!r}, and this run {field}={value!r}; "
                    "go on with the same data set and seed, or start in a new workdir"
                )
        batches, rest = divmod(state["next_item"], self._all)
        if rest and self._mine < self._all:
            raise InputError(
                f"the saved data iterator stands at item {state['next_item']}, in the midst of a batch of {self._all}, "
                "which several processes cannot share; go on with the former batch size, or in one process"
            )
        self._parent.set_state({"next_index": batches * self._mine + rest})

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
