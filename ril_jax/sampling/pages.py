"""Which pages of the key-value cache hold what: allocation, sharing by content, and who has to go first (host only).

A prompt is cut into chunks of one size. The pages of a chunk are found again by the hash of all content up to its end,
so two prompts share the pages of their common chunks; the rest of a prompt, less than a chunk, is kept with the hidden
state that follows it, so that a prompt that came before needs no computing at all. Image tokens count by their image's
content, never by the placeholder's id.
"""

import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(eq=False)
class Segment:
    """The pages of one chunk (or of a prompt's rest) and how many rows read them.

    `hidden`: for a whole prompt's end, (array [b, D], row) of the hidden state that its first response token is drawn
    from.
    """

    key: bytes
    pages: list[int]
    parent: "Segment | None" = None
    readers: int = 0
    children: int = 0
    hidden: Any = None
    stale: bool = False


@dataclass(eq=False)
class PrefixCache:
    """The pages 1 .. num_pages - 1 of a pool: free, read by rows, or kept in case that a prompt comes again."""

    num_pages: int
    page_size: int
    hits: int = 0
    lookups: int = 0
    _free: list[int] = field(default_factory=list)
    _segments: dict[bytes, Segment] = field(default_factory=dict)
    _idle: "OrderedDict[bytes, Segment]" = field(default_factory=OrderedDict)  # unread leaves, oldest first
    _unread: int = 0  # pages of segments without readers

    def __post_init__(self):
        self._free = list(range(self.num_pages - 1, 0, -1))

    @property
    def available(self) -> int:
        """Pages that can be had: free, or of segments that nobody reads."""
        return len(self._free) + self._unread

    def find(self, keys: Sequence[bytes]) -> list[Segment]:
        """The segments of the longest cached beginning of a prompt whose chunks have these keys; not yet acquired."""
        found = list(itertools.takewhile(lambda s: s is not None, (self._segments.get(key) for key in keys)))
        self.lookups += len(keys)
        self.hits += len(found)
        return found  # type: ignore[return-value]

    def acquire(self, segment: Segment) -> None:
        """One more reader. Who reads a segment reads those before it, too."""
        if segment.readers == 0:
            self._unread -= len(segment.pages)
        segment.readers += 1
        self._in_use(segment)

    def release(self, segment: Segment) -> None:
        """One reader less; an unread segment stays until its pages are needed, or goes at once if it is stale."""
        segment.readers -= 1
        if segment.readers == 0:
            self._unread += len(segment.pages)
        if segment.readers == 0 and segment.children == 0:
            if segment.stale:
                self._drop(segment)
            else:
                self._idle[segment.key] = segment
                self._idle.move_to_end(segment.key)

    def allocate(self, count: int) -> list[int]:
        """`count` pages; forgets the longest unread segments for them. Call only where `available` is enough."""
        while len(self._free) < count:
            self._drop(next(iter(self._idle.values())))
        pages, self._free = self._free[len(self._free) - count :], self._free[: len(self._free) - count]
        return pages

    def free(self, pages: Sequence[int]) -> None:
        """Give back pages that no segment holds."""
        self._free.extend(pages)

    def insert(self, key: bytes, pages: list[int], parent: Segment | None) -> Segment:
        """A new segment, read once, over pages that were allocated.

        Where another request has put the same content in meanwhile, that stays the one that is found. What follows on
        a segment that is not found is not found either: its reader would not read its parent.
        """
        stale = key in self._segments or (parent is not None and parent.stale)
        segment = Segment(key, pages, parent, readers=1, stale=stale)
        if parent is not None:
            parent.children += 1
            self._in_use(parent)
        if not segment.stale:
            self._segments[key] = segment
        return segment

    def clear(self) -> None:
        """Forget everything (the weights have changed); what is being read goes when its readers do."""
        for segment in list(self._segments.values()):
            segment.stale = True
        self._segments.clear()
        while self._idle:
            self._drop(next(iter(self._idle.values())))

    def _in_use(self, segment: Segment) -> None:
        if self._idle.get(segment.key) is segment:  # and not another one of the same content
            del self._idle[segment.key]

    def _drop(self, segment: Segment) -> None:
        self._in_use(segment)
        if self._segments.get(segment.key) is segment:
            del self._segments[segment.key]
        self._unread -= len(segment.pages)
        self._free.extend(segment.pages)
        segment.pages, segment.hidden = [], None
        parent = segment.parent
        if parent is not None:
            parent.children -= 1
            if parent.children == 0 and parent.readers == 0:
                if parent.stale:
                    self._drop(parent)
                else:
                    self._idle[parent.key] = parent
                    self._idle.move_to_end(parent.key, last=False)


def content_ids(token_ids: np.ndarray, image_token_id: int | None, digests: Sequence[tuple[bytes, int]]) -> np.ndarray:
    """[P, 3] int64 that tell what a prompt's tokens stand for: (id, 0, 0), or (id, half a digest, place) in an image.

    digests: for each image its digest (at least 8 bytes) and its number of tokens.
    """
    out = np.zeros((len(token_ids), 3), np.int64)
    out[:, 0] = token_ids
    if image_token_id is not None and digests:
        where = np.flatnonzero(token_ids == image_token_id)
        halves = [np.frombuffer(digest[:8], np.int64)[0] for digest, _ in digests]
        out[where, 1] = np.repeat(halves, [count for _, count in digests])
        out[where, 2] = np.concatenate([np.arange(count) for _, count in digests])
    return out


def chunk_keys(content: np.ndarray, chunk: int) -> tuple[list[bytes], bytes]:
    """The keys of a prompt's full chunks, each of all content up to its end, and the key of the whole prompt."""
    state, keys = hashlib.blake2b(digest_size=16), []
    full = len(content) // chunk * chunk
    for start in range(0, full, chunk):
        state.update(np.ascontiguousarray(content[start : start + chunk]).tobytes())
        keys.append(state.digest())
    state.update(b"end" + np.ascontiguousarray(content[full:]).tobytes())
    return keys, state.digest()
