"""Work on items in threads, in their order: checking rows, decoding images, encoding prompts."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def map_in_threads(
    function: Callable[[T], R], items: Iterable[T], *, num_threads: int, ahead: int = 0
) -> Iterator[tuple[T, R]]:
    """(item, function(item)) of each, in order, with at most `ahead` (0: four a thread) of them in memory.

    What `function` or `items` raises is raised here.
    """
    pending: deque[tuple[T, Future[R]]] = deque()
    with ThreadPoolExecutor(num_threads, thread_name_prefix="map") as pool:
        try:
            for item in items:
                pending.append((item, pool.submit(function, item)))
                if len(pending) >= (ahead or 4 * num_threads):
                    done, future = pending.popleft()
                    yield done, future.result()
            while pending:
                done, future = pending.popleft()
                yield done, future.result()
        finally:
            for _, future in pending:
                future.cancel()
