"""The grain pipeline: what is in a batch, who gets it, and that a restored iterator goes on as if nothing had been."""

import json
import threading
import time

import grain
import pytest

from ril_jax.data.pipeline import make_iterator
from ril_jax.errors import InputError


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def flat(batches):
    return [item for batch in batches for item in batch]


def test_every_epoch_holds_every_item_once_in_another_order():
    items = flat(take(make_iterator(range(100, 130), batch_size=5, seed=1), 18))
    epochs = [items[i : i + 30] for i in (0, 30, 60)]
    assert all(sorted(epoch) == list(range(100, 130)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] != sorted(epochs[0])


def test_batches_run_across_epochs_when_repeating():
    batches = take(make_iterator(range(7), batch_size=3, seed=5), 7)
    assert all(len(batch) == 3 for batch in batches)
    items = flat(batches)
    assert sorted(items[:7]) == sorted(items[7:14]) == sorted(items[14:]) == list(range(7))


def test_unshuffled_items_come_in_their_order():
    assert take(make_iterator(range(5), batch_size=2, seed=0, shuffle=False), 4) == [[0, 1], [2, 3], [4, 0], [1, 2]]


def test_the_seed_decides_the_order_and_neighbouring_seeds_share_no_epoch():
    def epochs(seed):
        return take(make_iterator(range(20), batch_size=20, seed=seed), 3)

    assert epochs(0) == epochs(0)
    assert not [epoch for epoch in epochs(0) if epoch in epochs(1)]


@pytest.mark.parametrize("drop_remainder", [True, False])
def test_without_repeat_the_source_is_gone_through_once(drop_remainder):
    batches = list(make_iterator(range(8), batch_size=3, seed=0, repeat=False, drop_remainder=drop_remainder))
    assert [len(batch) for batch in batches] == ([3, 3] if drop_remainder else [3, 3, 2])
    assert len(set(flat(batches))) == len(flat(batches))
    assert set(flat(batches)) <= set(range(8))


@pytest.mark.parametrize("shares", [[[0, 1, 2], [3, 4, 5]], [[0, 3], [1, 4], [2, 5]]])
def test_processes_have_the_rows_of_the_batch_of_one_process_and_read_no_other(shares):
    class Source(list):
        def __init__(self):
            super().__init__(range(50))
            self.read = set()

        def __getitem__(self, index):
            self.read.add(index)
            return super().__getitem__(index)

    alone = make_iterator(range(50), batch_size=6, seed=9)
    sources = [Source() for _ in shares]
    together = [
        make_iterator(source, batch_size=6, seed=9, rows=rows, prefetch=0)
        for source, rows in zip(sources, shares, strict=True)
    ]
    for _ in range(8):  # nearly an epoch
        whole = next(alone)
        assert [next(iterator) for iterator in together] == [[whole[row] for row in rows] for rows in shares]
    assert sum(len(source.read) for source in sources) == len(set.union(*(source.read for source in sources))) == 48
    for _ in range(20):  # and across the ends of epochs
        whole = next(alone)
        assert [next(iterator) for iterator in together] == [[whole[row] for row in rows] for rows in shares]


def test_processes_have_equally_many_batches_when_the_source_does_not_divide():
    counts = [len(list(make_iterator(range(11), batch_size=6, seed=0, repeat=False, rows=[p]))) for p in range(6)]
    assert counts == [1] * 6


def test_processes_together_see_everything_when_remainders_are_kept():
    def share(p):
        return make_iterator(
            range(11), batch_size=6, seed=0, repeat=False, drop_remainder=False, rows=[2 * p, 2 * p + 1]
        )

    assert sorted(flat(flat(list(share(p)) for p in range(3)))) == list(range(11))


@pytest.mark.parametrize("rows", [[], [1, 0], [0, 0], [4], [-1]])
def test_rows_that_are_none_of_the_batch_are_refused(rows):
    with pytest.raises(ValueError, match="rows"):
        make_iterator(range(10), batch_size=4, seed=0, rows=rows)


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("before", [0, 2, 3, 7])  # at the start, in mid-epoch, at an epoch's end, epochs later
def test_a_restored_iterator_gives_exactly_the_following_batches(prefetch, before):
    def fresh(rows):
        return make_iterator(
            range(24), batch_size=8, seed=3, prefetch=prefetch, rows=rows, transform=lambda item: item * 10
        )

    for rows in (None, [0, 1, 4, 5], [2, 3, 6, 7]):
        iterator = fresh(rows)
        take(iterator, before)
        state = json.dumps(iterator.get_state())
        expected = take(iterator, 5)
        restored = fresh(rows)
        take(restored, 1)  # whatever it had begun and prefetched is dropped
        restored.set_state(json.loads(state))
        assert take(restored, 5) == expected
        assert restored.get_state() == iterator.get_state()
        iterator.set_state(json.loads(state))  # backwards, in the same iterator
        assert take(iterator, 5) == expected


def test_the_state_does_not_count_batches_that_are_only_prefetched():
    iterator = make_iterator(range(64), batch_size=2, seed=0, prefetch=8)
    take(iterator, 3)
    time.sleep(0.05)
    assert iterator.get_state()["next_item"] == 6


def test_another_number_of_processes_goes_on_from_the_same_item():
    alone = make_iterator(range(30), batch_size=4, seed=2)
    take(alone, 5)
    pair = [make_iterator(range(30), batch_size=4, seed=2, rows=rows) for rows in ([0, 1], [2, 3])]
    for iterator in pair:
        iterator.set_state(alone.get_state())
    assert flat(next(iterator) for iterator in pair) == next(alone)
    four = [make_iterator(range(30), batch_size=4, seed=2, rows=[row]) for row in range(4)]
    for iterator in four:
        iterator.set_state(pair[0].get_state())
    assert flat(next(iterator) for iterator in four) == next(alone)


def test_another_batch_size_goes_on_where_batches_end_alike():
    state = make_iterator(range(30), batch_size=4, seed=2).get_state() | {"next_item": 12}
    larger = make_iterator(range(30), batch_size=6, seed=2, rows=[0, 1, 2])
    larger.set_state(state)
    assert larger.get_state() == state
    with pytest.raises(InputError, match="item 14, in the midst of a batch of 6"):
        larger.set_state(state | {"next_item": 14})


@pytest.mark.parametrize("change", [{"source": range(31)}, {"seed": 3}, {"shuffle": False}, {"repeat": False}])
def test_a_state_of_another_stream_is_refused(change):
    settings = {"source": range(30), "batch_size": 4, "seed": 2, **change}
    state = make_iterator(range(30), batch_size=4, seed=2).get_state()
    iterator = make_iterator(settings.pop("source"), **settings)
    with pytest.raises(InputError, match="saved data iterator"):
        iterator.set_state(state)


def test_order_is_kept_when_later_items_are_ready_first():
    def slow_first(item):
        time.sleep(0.02 if item % 4 == 0 else 0.0)
        return item

    iterator = make_iterator(range(32), batch_size=4, seed=0, shuffle=False, transform=slow_first, num_threads=8)
    assert flat(take(iterator, 8)) == list(range(32))


def test_the_transform_runs_in_threads_ahead_of_the_consumer():
    seen, all_seen = [], threading.Event()

    def transform(item):
        seen.append((item, threading.current_thread() is threading.main_thread()))
        if len(seen) >= 6:
            all_seen.set()
        return item

    iterator = make_iterator(range(10), batch_size=2, seed=0, shuffle=False, transform=transform, prefetch=3)
    assert next(iterator) == [0, 1]
    assert all_seen.wait(10), "two more batches are prepared though only one was asked for"
    assert not any(in_main for _, in_main in seen)


class RowError(Exception):
    pass


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_error_in_the_transform_surfaces_as_it_is_and_the_iterator_stays_before_its_batch(prefetch):
    error, broken = RowError("row 5"), True

    def transform(item):
        if item == 5 and broken:
            raise error
        return item

    iterator = make_iterator(range(12), batch_size=2, seed=0, shuffle=False, transform=transform, prefetch=prefetch)
    assert take(iterator, 2) == [[0, 1], [2, 3]]
    state = iterator.get_state()
    for _ in range(2):
        with pytest.raises(RowError) as caught:
            next(iterator)
        assert caught.value is error
        assert iterator.get_state() == state
    broken = False
    assert take(iterator, 2) == [[4, 5], [6, 7]]


def test_stop_iteration_in_the_transform_does_not_pass_for_the_end_of_the_data():
    iterator = make_iterator(range(4), batch_size=2, seed=0, transform=lambda item: next(iter([])))
    with pytest.raises(RuntimeError, match="StopIteration"):
        next(iterator)


def test_none_is_an_item_like_any_other():
    iterator = make_iterator(range(4), batch_size=2, seed=0, shuffle=False, transform=lambda i: None if i == 1 else i)
    assert next(iterator) == [0, None]


def test_it_is_a_grain_iterator_over_plain_lists():
    iterator = make_iterator([{"a": 1}, {"a": 2}], batch_size=2, seed=0, shuffle=False)
    assert isinstance(iterator, grain.DatasetIterator)
    assert next(iterator) == [{"a": 1}, {"a": 2}]


def test_a_source_smaller_than_a_batch_is_repeated_or_refused():
    assert next(make_iterator([7], batch_size=3, seed=0)) == [7, 7, 7]
    with pytest.raises(InputError, match="too few"):
        make_iterator([7], batch_size=3, seed=0, repeat=False)
    with pytest.raises(InputError, match="empty"):
        make_iterator([], batch_size=3, seed=0)
