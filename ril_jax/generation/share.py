"""Several processes that share a command's questions: each has a model of its own, and one part of them."""

import contextlib
from collections.abc import Iterator

from ril_jax import distributed, processes
from ril_jax.data.merge import parse_shard
from ril_jax.errors import InputError


def own_part(shard: str | None) -> tuple[int, int]:
    """(i, n): this process answers part i of n. `--shard=i/n` says so; else it is its place in the run.

    Raises InputError for a shard that is none, and where the processes of one run do not have one each.
    """
    number, count = parse_shard(shard)
    if processes.count() == 1:
        return number, count
    given = processes.gather(shard or "", "--shard")
    if not any(given):
        return processes.index(), processes.count()
    if not all(given) or len({parse_shard(text) for text in given}) < len(given):
        told = ", ".join(text or "none" for text in given)
        raise InputError(
            f"the {len(given)} processes of this run were given --shard {told}; leave it out, and each takes its part"
        )
    return number, count


@contextlib.contextmanager
def stopping_together() -> Iterator[None]:
    """Where a signal ends the block, the other processes of the run end too: none waits for this one's part."""
    try:
        yield
    except SystemExit as stop:
        if isinstance(stop.code, int) and stop.code > 128 and distributed.joined():
            distributed.leave(stop.code, f"stopped by signal {stop.code - 128}")
        raise
