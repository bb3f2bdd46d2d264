"""The compiled programs of the sampling engine: a fixed, small set, all of which are built before the first request.

encode    an image of one rung -> its rows of the feature store
prefill   the next pieces of prompts, a row each -> their pages, and the hidden state of each row's last token
score     the same, and the log-probability of given next tokens
place     hidden states -> the slots that draw from them
copy      pages -> pages
decode    a few tokens for every slot
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ril_jax import sharding
from ril_jax.models.config import ModelConfig
from ril_jax.models.layers import unstack, unstack_for_few_rows
from ril_jax.models.paged import PagePool, run_chunk
from ril_jax.models.parameters import Network, Params
from ril_jax.sampling.logits import RowParams, choose_row_tokens

TOP_LOGPROBS = 20  # alternatives that are told for a token, as many as OpenAI's interface may ask for


@dataclasses.dataclass(frozen=True)
class EngineShapes:
    """Everything that decides which programs there are.

    Attributes:
      slots: responses that are decoded at once. small_slots: the smallest number for which there is a decode program of
        its own, used while no more are taken (0: none); others follow, each for four times as many.
      max_model_len: tokens of prompt and response together. page_size: tokens a page. num_pages: of the pool, page 0
        included.
      prefill: (tokens, rows) of each prefill program. Prompts are cut into pieces of the largest tokens; the last one
        goes through the program with the fewest that hold it. A prompt takes as many rows of a call as it has pieces.
      decode_steps: tokens drawn between two looks of the host.
      attention_block: tokens that attention reads at a time.
      feature_rows: image features that are kept on the device.
    """

    slots: int
    small_slots: int
    max_model_len: int
    page_size: int
    num_pages: int
    prefill: tuple[tuple[int, int], ...]
    decode_steps: int
    attention_block: int
    feature_rows: int

    @property
    def chunk(self) -> int:
        """Tokens of the pieces that prompts are cut into."""
        return max(tokens for tokens, _ in self.prefill)

    @property
    def segment(self) -> int:
        """Tokens of which the cache keeps a prompt's beginning: whole pieces and whole pages."""
        return math.lcm(self.chunk, self.page_size)

    @property
    def table_width(self) -> int:
        return -(-self.max_model_len // self.page_size)

    def slot_counts(self) -> tuple[int, ...]:
        """Slots of each decode program, ascending."""
        small, count = [], self.small_slots
        while 0 < count < self.slots:
            small.append(count)
            count *= 4
        return (*small, self.slots)


class EngineState(NamedTuple):
    """What lives on the device between programs.

    The pages, every slot's hidden state [S, D] and tokens seen [S, V], and the image features [F, D].
    """

    pool: PagePool
    hidden: jax.Array
    seen: jax.Array
    features: jax.Array | None


class Chunk(NamedTuple):
    """One prefill call.

    token_ids, feature_index, targets [b, C]; positions [3, b, C]; tables [b, M]; start, length [b].
    """

    token_ids: np.ndarray
    feature_index: np.ndarray
    positions: np.ndarray
    tables: np.ndarray
    start: np.ndarray
    length: np.ndarray
    targets: np.ndarray | None = None


class Control(NamedTuple):
    """What a decode call is told of each slot, [S] unless said otherwise.

    tables [S, M]; length: tokens in the cache; position: rotary, of the next token; drawn: response tokens so far;
    limit: response tokens at most; active, ignore_eos bool; keys [S, 2] uint32; params: how to draw; slot: its number,
    or that of no slot; steps []: tokens at most.
    """

    tables: np.ndarray
    length: np.ndarray
    position: np.ndarray
    drawn: np.ndarray
    limit: np.ndarray
    active: np.ndarray
    ignore_eos: np.ndarray
    keys: np.ndarray
    params: RowParams
    slot: np.ndarray
    steps: np.ndarray | np.int32

    def of_slots(self, numbers: Sequence[int], count: int) -> "Control":
        """Of these slots only, in an array of `count` rows; what is beyond them does nothing."""
        missing = len(self.slot)
        rows: np.ndarray = np.full((count,), missing, np.int32)
        rows[: len(numbers)] = numbers
        if count == missing:  # all slots, each in its place
            rows = np.arange(count, dtype=np.int32)
        cut = jax.tree.map(lambda a: a[np.minimum(rows, missing - 1)] if np.ndim(a) else a, self)
        return cut._replace(slot=rows, active=cut.active & (rows < missing))


class Drawn(NamedTuple):
    """What a decode call gives back: token_ids, logprobs, mask [S, steps]; ended [S], by an end-of-sequence token;
    top_ids, top_logprobs [S, steps, TOP_LOGPROBS] or None."""

    token_ids: jax.Array
    logprobs: jax.Array
    mask: jax.Array
    ended: jax.Array
    top_ids: jax.Array | None
    top_logprobs: jax.Array | None


@dataclasses.dataclass(frozen=True, eq=False)
class EnginePrograms:
    """Jitted programs of one model and one set of shapes; all of them take the state and give it back, donated."""

    network: Network
    config: ModelConfig
    shapes: EngineShapes
    mesh: Mesh
    eos_token_ids: tuple[int, ...]
    token_limit: int
    dtype: Any
    unroll: bool = False

    def new_state(self) -> EngineState:
        """An empty cache."""
        return self._zeros()

    @functools.cached_property
    def _zeros(self):
        abstract = self.abstract_state()
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        make = lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract)  # noqa: E731
        return jax.jit(make, out_shardings=shardings)

    def abstract_state(self) -> Any:
        """Shapes and shardings of an `EngineState`: pages by key-value heads over `tensor`, the rest replicated."""
        text, shapes = self.config.text, self.shapes
        tensor = self.mesh.shape["tensor"]
        whole = sharding.replicated(self.mesh)
        pages = whole
        if tensor > 1 and text.num_key_value_heads % tensor == 0:
            pages = jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec("tensor"))
        make = lambda shape, dtype, where=whole: jax.ShapeDtypeStruct(shape, dtype, sharding=where)  # noqa: E731
        shape = PagePool.shape(text, shapes.num_pages, shapes.page_size)
        pool: Any = PagePool(make(shape, self.dtype, pages), make(shape, self.dtype, pages))  # type: ignore[arg-type]
        features: Any = None
        if self.config.vision is not None:
            features = make((shapes.feature_rows, text.hidden_size), self.dtype)
        hidden: Any = make((shapes.slots, text.hidden_size), self.dtype)
        seen: Any = make((shapes.slots, text.vocab_size), jnp.bool_)
        return EngineState(pool, hidden, seen, features)

    @functools.cached_property
    def encode(self):
        """(params, state, vision, offset []) -> state with the image's features from row `offset` on."""

        def encode(params: Params, state: Any, vision, offset):
            new = self.network.bind(params).encode(vision, dtype=self.dtype, unroll=self.unroll or 1)
            features = jax.lax.dynamic_update_slice_in_dim(state.features, new.astype(self.dtype), offset, 0)
            return state._replace(features=features)

        return self._jit(encode)

    @functools.cached_property
    def prefill(self):
        """(params, state, Chunk) -> (state, hidden [b, D] of each row's last token)."""

        def prefill(params: Params, state: EngineState, chunk: Chunk):
            _, hidden, state = self._run(params, state, chunk)
            last = jnp.maximum(chunk.length - 1, 0)[:, None, None]
            return state, jnp.take_along_axis(hidden, last, axis=1)[:, 0]

        return self._jit(prefill, results=1)

    @functools.cached_property
    def score(self):
        """(params, state, Chunk with targets) -> (state, logprobs [b, C], top ids and top logprobs [b, C, 20])."""

        def score(params: Params, state: EngineState, chunk: Chunk):
            model, hidden, state = self._run(params, state, chunk)

            def one(inputs):  # a row at a time, so that no [b, C, V] array is made
                hidden_cd, targets_c = inputs
                logprobs = jax.nn.log_softmax(model.text.logits(hidden_cd))
                top, ids = jax.lax.top_k(logprobs, min(TOP_LOGPROBS, logprobs.shape[-1]))
                return jnp.take_along_axis(logprobs, targets_c[:, None], axis=-1)[:, 0], ids, top

            return state, *jax.lax.map(one, (hidden, chunk.targets))

        return self._jit(score, results=3)

    @functools.cached_property
    def place(self):
        """(state, hidden [b, D], row [S] of `hidden` for each slot, -1 to leave it) -> state."""

        def place(state: EngineState, hidden, row):
            new = jnp.take(hidden, jnp.maximum(row, 0), axis=0).astype(state.hidden.dtype)
            return state._replace(hidden=jnp.where((row >= 0)[:, None], new, state.hidden))

        return self._jit(place, state_at=0)

    @functools.cached_property
    def mark_seen(self):
        """(state, slot [], seen [V] bool) -> state in which the slot has seen these tokens."""

        def mark_seen(state: EngineState, slot, seen):
            return state._replace(seen=jax.lax.dynamic_update_index_in_dim(state.seen, seen, slot, 0))

        return self._jit(mark_seen, state_at=0)

    @functools.cached_property
    def copy(self):
        """(state, source [n], target [n]) -> state with these pages copied in all layers; page 0 to itself is none."""

        def copy(state: EngineState, source, target):
            layers = jnp.arange(self.config.text.num_hidden_layers)[:, None] * self.shapes.num_pages
            source, target = (layers + source).reshape(-1), (layers + target).reshape(-1)
            return state._replace(
                pool=PagePool(*(p.at[:, target].set(jnp.take(p, source, axis=1)) for p in state.pool))
            )

        return self._jit(copy, state_at=0)

    @functools.cache  # noqa: B019 - lives as long as the engine
    def decode(self, slots: int, full: bool) -> Callable:
        """(params, state, Control of `slots` slots) -> (state, Drawn); `full` also filters and tells alternatives."""

        def decode(params: Params, state: EngineState, control: Control):
            return self._decode(params, state, control, slots, full)

        return self._jit(decode, results=1)

    def warm_up(self, params: Params, vision_inputs: Iterator[Any]) -> Iterator[tuple[str, Callable]]:
        """(name, call) of every program there is; `call(state) -> state` runs it once on nothing."""
        shapes = self.shapes
        for vision in vision_inputs:
            name = f"encode {vision[0].shape}"
            yield name, lambda state, v=vision: self.encode(params, state, v, np.int32(0))
        for tokens, rows in shapes.prefill:
            chunk = empty_chunk(tokens, rows, shapes.table_width)

            def prefill(state, chunk=chunk, rows=rows):
                state, hidden = self.prefill(params, state, chunk)
                return self.place(state, hidden, np.full((shapes.slots,), -1, np.int32))

            yield f"prefill {rows} x {tokens}", prefill
        scored = empty_chunk(*max(shapes.prefill), shapes.table_width)
        scored = scored._replace(targets=np.zeros_like(scored.token_ids))
        yield "score", lambda state: self.score(params, state, scored)[0]
        nothing = np.zeros((COPIES,), np.int32)
        yield "copy", lambda state: self.copy(state, nothing, nothing)
        seen = np.zeros((self.config.text.vocab_size,), bool)
        yield "mark_seen", lambda state: self.mark_seen(state, np.int32(0), seen)
        for slots in shapes.slot_counts():
            for full in (False, True):
                control = empty_control(slots, shapes.table_width)
                name = f"decode {slots}{' full' if full else ''}"
                yield name, lambda state, c=control, s=slots, f=full: self.decode(s, f)(params, state, c)[0]

    def _jit(self, function: Callable, state_at: int = 1, results: int = 0) -> Callable:
        """The state stays as it lies; so many `results` beside it are on every device, for every process to read."""
        state: Any = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state())
        whole = sharding.replicated(self.mesh)
        return jax.jit(
            function, donate_argnums=(state_at,), out_shardings=(state, *[whole] * results) if results else state
        )

    def _layers(self, model):
        return unstack_for_few_rows(model.text.layers) if self.unroll else None

    def _run(self, params: Params, state: EngineState, chunk: Chunk):
        model = self.network.bind(params)
        x = model.embed(chunk.token_ids, state.features, chunk.feature_index, dtype=self.dtype)
        layers = unstack(model.text.layers) if self.unroll else None
        hidden, pool = run_chunk(
            model.text, x, chunk.positions, state.pool, chunk.tables, chunk.start, chunk.length,
            layers=layers, block=self.shapes.attention_block,
            unit=math.gcd(self.shapes.chunk, self.shapes.page_size, chunk.token_ids.shape[1]),
        )  # fmt: skip
        return model, hidden, state._replace(pool=pool)

    def _decode(self, params: Params, state: EngineState, control: Any, S: int, full: bool):
        model = self.network.bind(params)
        layers = self._layers(model)
        V, R = self.config.text.vocab_size, self.shapes.decode_steps
        eos = jnp.asarray(self.eos_token_ids)
        known = jnp.arange(V) < self.token_limit

        class Loop(NamedTuple):
            t: jax.Array
            pool: PagePool
            hidden: jax.Array
            seen: jax.Array
            length: jax.Array
            position: jax.Array
            drawn: jax.Array
            done: jax.Array
            ended: jax.Array
            token_ids: jax.Array
            logprobs: jax.Array
            mask: jax.Array
            top: tuple[jax.Array, jax.Array] | None

        def step(s: Loop) -> Loop:
            logits = model.text.logits(s.hidden)
            normalised = jax.nn.log_softmax(logits)  # of the raw model, as in training
            tokens = choose_row_tokens(
                jnp.where(known, logits, -jnp.inf), s.seen, control.keys, s.drawn, control.params, filtered=full
            )
            logprobs = jnp.take_along_axis(normalised, tokens[:, None], axis=-1)[:, 0]
            live = ~s.done
            put = lambda array, new: jax.lax.dynamic_update_index_in_dim(array, new, s.t, 1)  # noqa: E731
            top = s.top
            if top is not None:
                best, ids = jax.lax.top_k(normalised, top[0].shape[-1])
                top = (put(top[0], ids), put(top[1], best))
            seen = s.seen.at[jnp.arange(S), tokens].max(live) if full else s.seen
            ended = s.ended | (live & jnp.isin(tokens, eos) & ~control.ignore_eos)
            drawn = s.drawn + live
            done = s.done | ended | (drawn >= control.limit)
            going = ~done
            x = model.text.embed(tokens)[:, None].astype(self.dtype)
            hidden, pool = run_chunk(
                model.text, x, s.position[:, None], s.pool, control.tables, s.length, going.astype(jnp.int32),
                layers=layers, block=self.shapes.attention_block,
            )  # fmt: skip
            return Loop(
                s.t + 1, pool, jnp.where(going[:, None], hidden[:, 0].astype(s.hidden.dtype), s.hidden), seen,
                s.length + going, s.position + going, drawn, done, ended,
                put(s.token_ids, tokens), put(s.logprobs, logprobs), put(s.mask, live), top,
            )  # fmt: skip

        width = min(TOP_LOGPROBS, V)
        top = (jnp.zeros((S, R, width), jnp.int32), jnp.zeros((S, R, width), jnp.float32)) if full else None
        # A program for all slots has them in their places; rows of a smaller one are of whatever slots are taken.
        every = self.shapes.slots == S
        pick = lambda array: array if every else jnp.take(array, control.slot, axis=0, mode="clip")  # noqa: E731
        loop = Loop(
            jnp.int32(0), state.pool, pick(state.hidden), pick(state.seen), control.length, control.position,
            control.drawn, ~control.active, jnp.zeros((S,), bool),
            jnp.zeros((S, R), jnp.int32), jnp.zeros((S, R), jnp.float32), jnp.zeros((S, R), bool), top,
        )  # fmt: skip
        loop = jax.lax.while_loop(lambda s: (s.t < control.steps) & ~jnp.all(s.done), step, loop)
        top_ids, top_logprobs = loop.top if loop.top is not None else (None, None)
        drawn = Drawn(loop.token_ids, loop.logprobs, loop.mask, loop.ended, top_ids, top_logprobs)
        back = lambda array, new: new if every else array.at[control.slot].set(new, mode="drop")  # noqa: E731
        seen = back(state.seen, loop.seen) if full else state.seen
        return state._replace(pool=loop.pool, hidden=back(state.hidden, loop.hidden), seen=seen), drawn


COPIES = 8  # pages that one copy call moves


def empty_chunk(tokens: int, rows: int, table_width: int) -> Chunk:
    """A prefill call of no rows, to be filled in."""
    return Chunk(
        np.zeros((rows, tokens), np.int32), np.full((rows, tokens), -1, np.int32),
        np.zeros((3, rows, tokens), np.int32), np.zeros((rows, table_width), np.int32),
        np.zeros((rows,), np.int32), np.zeros((rows,), np.int32),
    )  # fmt: skip


def empty_control(slots: int, table_width: int) -> Control:
    """The control of slots that are all free."""
    integers = lambda: np.zeros((slots,), np.int32)  # noqa: E731
    ones: Any = np.ones((slots,), np.float32)
    params = RowParams(0 * ones, ones, integers(), ones.copy())  # type: ignore[arg-type]
    return Control(
        np.zeros((slots, table_width), np.int32), integers(), integers(), integers(), integers(),
        np.zeros((slots,), bool), np.zeros((slots,), bool), np.zeros((slots, 2), np.uint32), params,
        np.arange(slots, dtype=np.int32), np.int32(0),
    )  # fmt: skip
