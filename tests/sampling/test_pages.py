"""Claims about the pages of the key-value cache: what is said to be available can be had."""

from hypothesis import given, settings
from hypothesis import strategies as st

from ril_jax.sampling.pages import PrefixCache


def read(cache, keys, pages):
    """What the engine does for a prompt whose chunks have these keys: (segments read, how many were found)."""
    segments = cache.find(keys)
    for segment in segments:
        cache.acquire(segment)
    return segments, len(segments), cache.allocate(pages * (len(keys) - len(segments)))


def finish(cache, keys, pages, segments, found, own):
    """Its chunks are computed and become segments."""
    for key in keys[found:]:
        mine, own = own[:pages], own[pages:]
        segments.append(cache.insert(key, mine, segments[-1] if segments else None))


def leave(cache, segments):
    for segment in reversed(segments):
        cache.release(segment)


def test_two_prompts_with_one_beginning_that_come_together_leave_no_page_that_cannot_be_had():
    cache = PrefixCache(num_pages=20, page_size=8)
    one, two = [b"system", b"1"], [b"system", b"2"]
    first, second = read(cache, one, 3), read(cache, two, 3)
    finish(cache, one, 3, *first)
    finish(cache, two, 3, *second)
    leave(cache, first[0])
    leave(cache, second[0])
    again = read(cache, two, 3)
    assert len(cache.allocate(cache.available)) > 0
    assert again[1] >= 1


@settings(max_examples=200, deadline=None)
@given(
    turns=st.lists(
        st.tuples(st.sampled_from(["read", "finish", "leave", "clear"]), st.integers(0, 6)), min_size=5, max_size=60
    )
)
def test_available_pages_can_always_be_had(turns):
    """Requests over a few shared prompts come, are computed and leave in any order; now and then all is forgotten."""
    prompts = [[b"a", b"b", b"c"], [b"a", b"b", b"d"], [b"a", b"e"], [b"f"], [b"a"], [b"a", b"b"], [b"f", b"g"]]
    cache, begun, running = PrefixCache(num_pages=41, page_size=8), [], []
    for turn, number in turns:
        if turn == "read" and cache.available >= 2 * len(prompts[number]):
            keys = prompts[number]
            begun.append((keys, *read(cache, keys, 2)))
        elif turn == "finish" and begun:
            keys, *parts = begun.pop(number % len(begun))
            finish(cache, keys, 2, *parts)
            running.append(parts[0])
        elif turn == "leave" and running:
            leave(cache, running.pop(number % len(running)))
        elif turn == "clear" and not begun and not running:
            cache.clear()
        pages = cache.allocate(cache.available)
        assert len(set(pages)) == len(pages)
        cache.free(pages)
    for keys, *parts in begun:
        finish(cache, keys, 2, *parts)
        running.append(parts[0])
    for segments in running:
        leave(cache, segments)
    assert cache.available == 40
    assert sorted(cache.allocate(40)) == list(range(1, 41))
