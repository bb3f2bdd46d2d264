"""Continuous batching: requests join and leave a running batch at any step.

Prompts are cut into chunks; a step prefills some chunks, then draws a few tokens for every slot in one device call. A
request's tokens depend on the request alone: its chunks are always cut at the same places, each runs in the program
that its own length asks for, no row of a program reads another, and its random numbers come from its seed and its
tokens' places. What is left is rounding: how many others run decides which decode program draws, and programs of
several sizes differ in the last bits; `small_slots=0` makes one program of all, and a request's bits always the same.
"""

import dataclasses
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from ril_jax.compilation import CompileCounter
from ril_jax.data.packing import pack_prompts
from ril_jax.errors import InputError
from ril_jax.models.parameters import Params
from ril_jax.sampling.engine_programs import (
    COPIES,
    Chunk,
    EnginePrograms,
    EngineState,
    empty_chunk,
    empty_control,
)
from ril_jax.sampling.images import FeatureStore
from ril_jax.sampling.pages import PrefixCache, chunk_keys, content_ids
from ril_jax.sampling.requests import FinishReason, Job, Request, Sample, Scored, ScoreRequest, Tokens

logger = logging.getLogger("ril_jax.engine")


@dataclasses.dataclass
class EngineStats:
    """Counts since the start."""

    requests: int = 0
    prompt_tokens: int = 0
    prefilled_tokens: int = 0
    generated_tokens: int = 0
    images: int = 0
    images_encoded: int = 0
    decode_calls: int = 0
    decode_steps: int = 0
    prefill_calls: int = 0


class Engine:
    """Samples from one model for many callers; all compiled programs are built by `warm_up`.

    Thread-safe: `submit` and `cancel` may be called from any thread; `step` from one only (`start` makes a thread for
    it).
    """

    def __init__(
        self,
        programs: EnginePrograms,
        params: Params,
        *,
        image_token_id: int | None,
        counter: CompileCounter | None = None,
    ):
        self.programs, self.params, self.shapes = programs, params, programs.shapes
        self.stats = EngineStats()
        self.counter = counter or CompileCounter()
        self._owns_counter = counter is None
        self._image_token_id = image_token_id
        self._state: EngineState = programs.new_state()
        self._cache = PrefixCache(self.shapes.num_pages, self.shapes.page_size)
        self._features = FeatureStore(programs.config, self.shapes.feature_rows)
        self._control = empty_control(self.shapes.slots, self.shapes.table_width)
        self._slots: list[Sample | None] = [None] * self.shapes.slots
        self._inbox: deque[Callable[[], None]] = deque()
        self._queue: deque[Job] = deque()  # not begun
        self._prefilling: list[Job] = []
        self._ready: deque[Job] = deque()  # prompts in the cache, samples that wait for a slot
        self._numbers = itertools.count()
        self._reserved = 0  # pages that are kept for the first samples of requests that are begun
        self._short_of_pages = False
        self._any_cancelled = False
        self._asleep = False
        self._most_begun = 2 * self.shapes.slots
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = False
        self.failure: str = ""

    # --- what callers use ---

    def warm_up(self, progress: Callable[[str, int, int], None] | None = None) -> None:
        """Build every program; afterwards a compilation is reported as unexpected."""
        calls = list(self.programs.warm_up(self.params, self._features.examples()))
        for i, (name, call) in enumerate(calls):
            if progress is not None:
                progress(name, i, len(calls))
            self._state = call(self._state)
        jax.block_until_ready(self._state)
        self.counter.warm("engine")

    def submit(self, request: Request | ScoreRequest, notify: Callable[[Any], None]) -> Job:
        """Queue a request; `notify` gets its news, in the engine's thread.

        Raises InputError where it can never run, and RuntimeError where the engine has failed or is closed.
        """
        if self.failure or self._asleep:
            raise RuntimeError(self.failure or "the engine sleeps; give it weights with set_params")
        job = self._prepare(request, notify)
        self._post(lambda: self._queue.append(job), new=True)
        return job

    def room(self, length: int) -> int:
        """Tokens that a response to a prompt of that length may have at most; less than 1 where it has no room."""
        shapes = self.shapes
        return min(shapes.max_model_len, (shapes.num_pages - 2) * shapes.page_size) - length

    def cancel(self, job: Job, sample: int | None = None) -> None:
        """Stop a request, or one of its samples; it gets no more news than that it was cancelled."""

        def act():
            if sample is None:
                job.cancelled = True
            else:
                job.cancelled_samples.add(sample)
            self._any_cancelled = True

        self._post(act)

    def set_params(self, params: Params) -> None:
        """Take new weights (the arrays themselves, no copy) and forget everything that the old ones computed.

        An engine that sleeps wakes up. Raises RuntimeError while requests are running.
        """
        self._forget()
        self.params = params
        if self._asleep:
            self._state, self._asleep = self.programs.new_state(), False

    def sleep(self) -> None:
        """Give back the memory of the cache, and let go of the weights, until `set_params`.

        Raises RuntimeError while requests are running.
        """
        self._forget()
        self._asleep = True
        del self._state, self.params

    def _forget(self) -> None:
        if self.num_running or self.num_waiting:
            raise RuntimeError("the engine is busy; take or leave weights when its requests are done")
        self._cache.clear()
        self._features.clear()

    @property
    def num_waiting(self) -> int:
        """Requests that have no slot yet."""
        return len(self._queue) + len(self._inbox) + len(self._prefilling) + len(self._ready)

    @property
    def num_running(self) -> int:
        """Samples that are being decoded."""
        return sum(sample is not None for sample in self._slots)

    @property
    def cache_use(self) -> float:
        """The share of the pages that requests hold."""
        return 1 - self._cache.available / max(self.shapes.num_pages - 1, 1)

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of the weights, the cache's pages and the image features, over all devices."""
        if self._asleep:
            return {"weights": 0, "cache": 0, "image features": 0}
        parts = {"weights": self.params, "cache": self._state.pool, "image features": self._state.features}
        return {name: sum(leaf.nbytes for leaf in jax.tree.leaves(part)) for name, part in parts.items()}

    @property
    def prefix_hits(self) -> tuple[int, int]:
        """Chunks that were found in the cache, of those that were looked for."""
        return self._cache.hits, self._cache.lookups

    def start(self) -> None:
        """Run in a thread of its own until `close`."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Finish what was submitted, then stop the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join()
        if self._owns_counter:
            self.counter.close()

    def step(self) -> bool:
        """One turn: take news, start samples, prefill, decode. Returns whether anything is left to do."""
        while self._inbox:
            self._inbox.popleft()()
        if self._any_cancelled:
            self._drop_cancelled()
        self._begin()
        busy = self.num_running > 0
        # Prompts go first while nothing is being decoded; otherwise decoding never waits for more than a few calls.
        for _ in range(4 if busy else 16):
            if not self._prefill():
                break
            self._begin()
        self._fill_slots()
        if self.num_running:
            self._decode()
        return bool(self._inbox or self._queue or self._prefilling or self._ready or self.num_running)

    def run_until_idle(self) -> None:
        """Turns until nothing is left (for callers without a thread)."""
        while self.step():
            pass

    # --- requests ---

    def _prepare(self, request: Request | ScoreRequest, notify) -> Job:
        prompt, shapes = request.prompt, self.shapes
        length = len(prompt.token_ids)
        most = shapes.max_model_len if isinstance(request, ScoreRequest) else shapes.max_model_len - 1
        if not 0 < length <= most:
            raise InputError(
                f"the prompt takes {length} tokens, and the engine's context is {shapes.max_model_len}; shorten it, "
                f"use smaller images, or raise config.engine.max_model_len"
            )
        limit = 0
        if isinstance(request, Request):
            limit = min(request.max_tokens, shapes.max_model_len - length)
            if request.n < 1 or limit < 1:
                raise InputError(f"n is {request.n} and max_tokens {request.max_tokens}; give 1 or more")
        pages = -(-(length + limit) // shapes.page_size) + 1
        if pages > shapes.num_pages - 1:
            raise InputError(
                f"prompt and response take {pages} pages of {shapes.page_size} tokens, and the cache has "
                f"{shapes.num_pages - 1}; lower max_tokens, or raise config.engine.num_pages"
            )
        arrays = pack_prompts([prompt], self.programs.config, batch=1, prompt_len=length, rung=None)
        digests = self._features.digests(prompt.images)
        content = content_ids(np.asarray(prompt.token_ids), self._image_token_id, digests)
        keys, whole = chunk_keys(content, shapes.segment)
        rows, offset = [], 0
        for (digest, count), image in zip(digests, prompt.images, strict=True):
            rows.append((digest, offset, count, image))
            offset += count
        places = np.flatnonzero(arrays.feature_index[0] >= 0)
        self._features.check(
            [(image, places[at : at + count], digest) for digest, at, count, image in rows], shapes.chunk
        )
        job = Job(request, notify, next(self._numbers), arrays, limit, keys, whole, rows, submitted=time.monotonic())
        if isinstance(request, Request):
            job.samples = [Sample(job, i) for i in range(request.n)]
            job.waiting = deque(job.samples)
        return job

    def _post(self, act: Callable[[], None], *, new: bool = False) -> None:
        """Have `act` done at the next step. Raises RuntimeError where it brings something new and there may be none."""
        with self._wake:
            if new and (self.failure or self._closing):
                raise RuntimeError(self.failure or "the engine is closed")
            self._inbox.append(act)
            self._wake.notify_all()

    def _begin(self) -> None:
        """Take requests from the queue as long as their prompts and a first response have room in the cache."""
        # Samples that wait for pages go before requests that are not begun.
        while self._queue and not self._short_of_pages and len(self._prefilling) + len(self._ready) < self._most_begun:
            job = self._queue[0]
            if not self._admit(job):
                return
            self._queue.popleft()
            self.stats.requests += 1
            self.stats.prompt_tokens += job.length
            self.stats.images += len(job.image_rows)

    def _admit(self, job: Job) -> bool:
        page, segment, length = self.shapes.page_size, self.shapes.segment, job.length
        if job.scoring:
            need = -(-length // page)
            if self._cache.available - self._reserved < need:
                return False
            job.score_pages = self._cache.allocate(need)
            self._prefilling.append(job)
            return True
        found = self._cache.find([*job.keys, job.whole_key])
        whole = len(found) == len(job.keys) + 1 and found[-1].hidden is not None
        if not whole:
            found = found[: len(job.keys)]
            if len(found) * segment == length:  # the last token's hidden state is gone: compute its segment again
                found = found[:-1]
        for held in found:
            self._cache.acquire(held)
        own = self._own_pages(job)
        fresh = 0 if whole else -(-(length - len(found) * segment) // page)
        if self._cache.available - self._reserved < fresh + own:
            for held in reversed(found):
                self._cache.release(held)
            return False
        self._reserved += own
        job.reserved = own
        job.segments = found
        if whole:
            job.end, job.done_tokens = found[-1], length
            self._ready.append(job)
        else:
            job.done_tokens = len(found) * segment
            job.score_pages = self._cache.allocate(fresh)  # become segments one by one
            self._prefilling.append(job)
        return True

    def _own_pages(self, job: Job) -> int:
        """Pages that a sample needs for itself: the prompt's last page, where it is not full, and its response's."""
        page = self.shapes.page_size
        return -(-(job.length + job.limit) // page) - job.length // page

    def _prefill(self) -> bool:
        """One prefill call: its rows take the next pieces of prompts, in the order in which they came, several of one
        prompt as long as they are for the same program. Returns whether there was anything to do."""
        if not self._prefilling:
            return False
        first = self._prefilling[0]
        tokens, rows = bucket = self._bucket(first, first.done_tokens)
        self._features.unpin()
        if not self._hold_images(first, first.done_tokens, tokens):  # there is room, but not in one piece
            self._features.clear()
            held = self._hold_images(first, first.done_tokens, tokens)
            assert held, "the images of one chunk are more than the feature store holds"
        pieces = [(first, first.done_tokens)]  # of each row: whose, and where it starts
        for job in self._prefilling:
            at = job.done_tokens + (tokens if job is first else 0)
            while (
                len(pieces) < rows and at < job.length and job.scoring == first.scoring
                and self._bucket(job, at) == bucket and self._hold_images(job, at, tokens)
            ):  # fmt: skip
                pieces.append((job, at))
                at += tokens
            if len(pieces) == rows:
                break
        chunk = empty_chunk(tokens, rows, self.shapes.table_width)
        targets = np.zeros_like(chunk.token_ids)
        for r, (job, start) in enumerate(pieces):
            count = min(tokens, job.length - start)
            part = slice(start, start + count)
            chunk.token_ids[r, :count] = job.arrays.token_ids[0, part]
            chunk.positions[:, r, :count] = job.arrays.positions[:, 0, part]
            chunk.feature_index[r, :count] = self._feature_rows(job, part)
            table = self._prompt_pages(job)
            chunk.tables[r, : len(table)] = table
            chunk.start[r], chunk.length[r] = start, count
            after = job.arrays.token_ids[0, start + 1 : start + count + 1]
            targets[r, : len(after)] = after
        self.stats.prefill_calls += 1
        self.stats.prefilled_tokens += int(chunk.length.sum())
        jobs = [job for job, _ in pieces]
        if first.scoring:
            self._state, *scores = self.programs.score(self.params, self._state, chunk._replace(targets=targets))
            self._take_scores(jobs, chunk, [np.asarray(s) for s in jax.device_get(scores)])
        else:
            self._state, hidden = self.programs.prefill(self.params, self._state, chunk)
            self._take_prefilled(jobs, chunk, hidden)
        return True

    def _bucket(self, job: Job, start: int) -> tuple[int, int]:
        """The prefill program of the job's piece at `start`: by what is left of the prompt, and nothing else."""
        left = job.length - start
        fitting = [bucket for bucket in self.shapes.prefill if bucket[0] >= left]
        if job.scoring or not fitting:
            return max(self.shapes.prefill)
        return min(fitting)

    def _hold_images(self, job: Job, start: int, tokens: int) -> bool:
        """Get the images of the job's piece at `start` into the feature store; False if they do not fit beside those
        of the other pieces."""
        part = slice(start, min(start + tokens, job.length))
        index = job.arrays.feature_index[0, part]
        for digest, offset, count, image in job.image_rows:
            if not ((index >= offset) & (index < offset + count)).any():
                continue
            place = self._features.hold(digest, image)
            if place is None:
                return False
            row, inputs = place
            if inputs is not None:
                self.stats.images_encoded += 1
                self._state = self.programs.encode(self.params, self._state, inputs, np.int32(row))
        return True

    def _feature_rows(self, job: Job, part: slice) -> np.ndarray:
        """Rows of the feature store for the tokens of a chunk, -1 for text."""
        index = job.arrays.feature_index[0, part].copy()
        out = np.full_like(index, -1)
        for digest, offset, count, _ in job.image_rows:
            inside = (index >= offset) & (index < offset + count)
            if inside.any():
                out[inside] = index[inside] - offset + self._features.row(digest)
        return out

    def _prompt_pages(self, job: Job) -> list[int]:
        return [page for segment in job.segments for page in segment.pages] + job.score_pages

    def _take_prefilled(self, jobs: Sequence[Job], chunk: Chunk, hidden) -> None:
        """jobs: of each row. What fills a segment becomes one, and prompts that are whole are ready to be sampled."""
        size, page = self.shapes.segment, self.shapes.page_size
        for r, job in enumerate(jobs):
            job.done_tokens += int(chunk.length[r])
            parent = job.segments[-1] if job.segments else None
            if job.done_tokens == size * (len(job.segments) + 1):
                pages, job.score_pages = job.score_pages[: size // page], job.score_pages[size // page :]
                parent = self._cache.insert(job.keys[len(job.segments)], pages, parent)
                job.segments.append(parent)
            if job.done_tokens == job.length:
                rest, job.score_pages = job.score_pages, []
                job.end = self._cache.insert(job.whole_key, rest, parent)
                job.end.hidden = (hidden, r)
                job.segments.append(job.end)
                self._prefilling.remove(job)
                self._ready.append(job)

    def _take_scores(self, jobs: Sequence[Job], chunk: Chunk, scores: Sequence[np.ndarray]) -> None:
        logprobs, ids, top = scores
        for r, job in enumerate(jobs):
            count = int(chunk.length[r])
            job.scores.append((logprobs[r, :count], ids[r, :count], top[r, :count]))
            job.done_tokens += count
            if job.done_tokens == job.length:
                self._prefilling.remove(job)
                self._cache.free(job.score_pages)
                told, known, best = (np.concatenate(parts) for parts in zip(*job.scores, strict=True))
                part = slice(max(job.request.first, 1) - 1, job.length - 1)
                n = job.request.top_logprobs
                alternatives = [(i[:n], b[:n]) for i, b in zip(known[part], best[part], strict=True)] if n else []
                job.notify(Scored(told[part].tolist(), alternatives))

    # --- samples ---

    def _fill_slots(self) -> None:
        """Give free slots to samples whose prompts are in the cache, in the order in which they came."""
        placed: dict[int, tuple[Any, np.ndarray]] = {}  # an array of hidden states, and its row for each slot
        copies: list[tuple[int, int]] = []
        self._short_of_pages = False
        for job in list(self._ready):
            assert job.end is not None
            hidden, at = job.end.hidden
            while job.waiting:
                slot = next((i for i, sample in enumerate(self._slots) if sample is None), None)
                if slot is None:
                    break
                need = self._own_pages(job)
                if self._cache.available - (self._reserved - job.reserved) < need:  # a first sample's were kept for it
                    self._short_of_pages = True
                    break
                self._reserved -= job.reserved
                job.reserved = 0
                sample = job.waiting.popleft()
                sample.pages = self._cache.allocate(need)
                self._take_slot(sample, slot, copies)
                _, rows = placed.setdefault(id(hidden), (hidden, np.full((self.shapes.slots,), -1, np.int32)))
                rows[slot] = at
            if not job.waiting:
                self._ready.remove(job)
        if copies:
            self._copy(copies)
        for hidden, rows in placed.values():
            self._state = self.programs.place(self._state, hidden, rows)

    def _take_slot(self, sample: Sample, slot: int, copies: list[tuple[int, int]]) -> None:
        job, page = sample.job, self.shapes.page_size
        request, control = job.request, self._control
        shared = self._prompt_pages(job)
        table = shared[: job.length // page]
        if job.length % page:
            copies.append((shared[job.length // page], sample.pages[0]))
        table = [*table, *sample.pages]
        control.tables[slot] = 0
        control.tables[slot, : len(table)] = table
        control.length[slot] = job.length
        control.position[slot] = job.arrays.next_position[0]
        control.drawn[slot], control.limit[slot] = 0, job.limit
        control.active[slot], control.ignore_eos[slot] = True, request.ignore_eos
        control.keys[slot] = np.random.SeedSequence([request.seed, sample.index]).generate_state(2)
        s = request.sampling
        control.params.temperature[slot], control.params.top_p[slot] = s.temperature, s.top_p  # type: ignore[index]
        control.params.top_k[slot], control.params.repetition_penalty[slot] = s.top_k, s.repetition_penalty  # type: ignore[index]
        if s.repetition_penalty != 1.0:
            seen = np.zeros((self.programs.config.text.vocab_size,), bool)
            seen[request.prompt.token_ids] = True
            self._state = self.programs.mark_seen(self._state, np.int32(slot), seen)
        sample.slot, self._slots[slot] = slot, sample
        job.running += 1

    def _copy(self, copies: Sequence[tuple[int, int]]) -> None:
        for start in range(0, len(copies), COPIES):
            part = np.zeros((COPIES, 2), np.int32)
            part[: len(copies[start : start + COPIES])] = copies[start : start + COPIES]
            self._state = self.programs.copy(self._state, part[:, 0].copy(), part[:, 1].copy())

    def _decode(self) -> None:
        """A few tokens for every slot, and the news of them."""
        taken = [sample for sample in self._slots if sample is not None]
        slots = next(count for count in self.shapes.slot_counts() if count >= len(taken))
        full = any(sample.job.request.full for sample in taken)
        cut = self._control.of_slots([sample.slot for sample in taken], slots)
        cut = cut._replace(steps=np.int32(self.shapes.decode_steps))
        self._state, drawn = self.programs.decode(slots, full)(self.params, self._state, cut)
        drawn = jax.device_get(drawn)
        self.stats.decode_calls += 1
        self.stats.decode_steps += int(drawn.mask.sum(axis=1).max())
        for row, sample in enumerate(taken):
            self._take_drawn(sample, drawn, sample.slot if slots == self.shapes.slots else row)

    def _take_drawn(self, sample: Sample, drawn: Any, row: int) -> None:
        slot, job, control = sample.slot, sample.job, self._control
        mask = drawn.mask[row]
        count = int(mask.sum())
        sample.drawn += count
        self.stats.generated_tokens += count
        ended = bool(drawn.ended[row])
        finish: FinishReason | None = "stop" if ended else "length" if sample.drawn >= job.limit else None
        # The last token drawn is in no cache when the sample has ended, else all of them are.
        control.length[slot] += count
        control.position[slot] += count
        control.drawn[slot] = sample.drawn
        top = None
        wanted = job.request.top_logprobs
        if wanted and drawn.top_ids is not None and drawn.top_logprobs is not None:
            top = [(drawn.top_ids[row, t, :wanted], drawn.top_logprobs[row, t, :wanted]) for t in range(count)]
        if finish is not None:
            self._leave(sample)
        ids, logprobs = drawn.token_ids[row, :count].tolist(), drawn.logprobs[row, :count].tolist()
        job.notify(Tokens(sample.index, ids, logprobs, top, finish))

    def _leave(self, sample: Sample) -> None:
        """Free a sample's slot and pages, and the prompt's when it was the last sample."""
        job = sample.job
        sample.done = True
        if sample.slot >= 0:
            self._slots[sample.slot] = None
            self._control.active[sample.slot] = False
            sample.slot = -1
            job.running -= 1
            self._cache.free(sample.pages)
            sample.pages = []
        if all(s.done for s in job.samples):
            self._release(job)

    def _release(self, job: Job) -> None:
        self._reserved -= job.reserved
        job.reserved = 0
        for segment in reversed(job.segments):
            self._cache.release(segment)
        job.segments = []
        self._cache.free(job.score_pages)
        job.score_pages = []

    def _drop_cancelled(self) -> None:
        self._any_cancelled = False
        jobs = {job.number: job for job in (*self._queue, *self._prefilling, *self._ready)}
        jobs |= {s.job.number: s.job for s in self._slots if s is not None}
        for job in jobs.values():
            if not (job.cancelled or job.cancelled_samples):
                continue
            samples = [s for s in job.samples if not s.done and (job.cancelled or s.index in job.cancelled_samples)]
            for sample in samples:
                if sample in job.waiting:
                    job.waiting.remove(sample)
                self._leave(sample)
                job.notify(Tokens(sample.index, [], [], None, "cancelled"))
            if job.scoring and job.cancelled:
                self._release(job)
                job.notify(Scored([], [], "cancelled"))
            if job.cancelled or all(s.done for s in job.samples):
                for queue in (self._queue, self._prefilling, self._ready):
                    if job in queue:
                        queue.remove(job)

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._inbox or self._queue or self._prefilling or self._ready or self.num_running):
                    if self._closing:
                        return
                    self._wake.wait()
            try:
                self.step()
            except Exception as error:  # a device error: nobody waits for ever
                logger.exception("the engine has failed")
                self._fail(f"the engine has failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
                return

    def _fail(self, reason: str) -> None:
        with self._wake:  # what is posted before is told of the failure here, what comes later is refused
            self.failure = reason
        while self._inbox:
            self._inbox.popleft()()
        jobs = {job.number: job for job in (*self._queue, *self._prefilling, *self._ready)}
        jobs |= {s.job.number: s.job for s in self._slots if s is not None}
        for job in jobs.values():
            if job.scoring:
                job.notify(Scored([], [], reason))
            for sample in job.samples:
                if not sample.done:
                    job.notify(Tokens(sample.index, [], [], None, "error", reason))
