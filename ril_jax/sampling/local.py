"""An engine from a checkpoint and a config, and its token stream as text."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ril_jax import processes, sharding
from ril_jax.compilation import CompileCounter
from ril_jax.data.chat import ChatTokenizer
from ril_jax.errors import InputError
from ril_jax.models import attention
from ril_jax.models.lanes import as_served, pad_feed_forward
from ril_jax.models.parameters import Params
from ril_jax.pretrained import Pretrained
from ril_jax.sampling.engine import Engine
from ril_jax.sampling.engine_programs import EnginePrograms, EngineShapes


def engine_shapes(config: ConfigDict, *, max_positions: int) -> EngineShapes:
    """`config` (`config.engine_config`) checked. Raises InputError with the field and the mend."""
    prefill = tuple(sorted((int(tokens), int(rows)) for tokens, rows in config.prefill))
    page, length = int(config.page_size), int(config.max_model_len)
    numbers = {name: int(config[name]) for name in ("slots", "max_model_len", "page_size", "decode_steps")}
    for name, value in numbers.items():
        if value < 1:
            raise InputError(f"config.engine.{name} is {value}; give 1 or more")
    if not prefill or min(min(pair) for pair in prefill) < 1:
        raise InputError("config.engine.prefill must name at least one (tokens, rows), both positive")
    if prefill[-1][0] % page and page % prefill[-1][0]:
        raise InputError(
            f"config.engine.prefill's largest chunk, {prefill[-1][0]} tokens, is no multiple of page_size, {page}, "
            f"nor a part of it"
        )
    if config.attention_block % page:
        raise InputError(
            f"config.engine.attention_block, {config.attention_block}, is no multiple of page_size, {page}"
        )
    if length > max_positions:
        raise InputError(
            f"config.engine.max_model_len is {length}, and the model has {max_positions} positions; lower it"
        )
    pages = int(config.num_pages) or int(config.slots) * (-(-length // page) + 1) + 1
    return EngineShapes(
        slots=int(config.slots),
        small_slots=int(config.small_slots),
        max_model_len=length,
        page_size=page,
        num_pages=pages,
        prefill=prefill,
        decode_steps=int(config.decode_steps),
        attention_block=int(config.attention_block),
        feature_rows=int(config.feature_rows),
    )


def make_engine(
    model: Pretrained,
    params: Params,
    config: ConfigDict,
    mesh: Mesh,
    *,
    dtype: Any,
    counter: CompileCounter | None = None,
) -> Engine:
    """An engine over `params` (not yet warmed up); `config` as of `config.engine_config`.

    Its programs are for this mesh, which is in use from here on.
    """
    sharding.use(mesh)
    shapes = engine_shapes(config, max_positions=model.config.text.max_position_embeddings)
    programs = EnginePrograms(
        model.network,
        model.config,
        shapes,
        mesh,
        model.chat.eos_token_ids,
        model.chat.vocab_size,
        jnp.dtype(dtype),
        unroll=sharding.platform() == "cpu",
    )
    return Engine(programs, params, image_token_id=model.chat.image_token_id, counter=counter)


def load_engine(
    config: ConfigDict,
    *,
    progress: Callable[[str, int, int], None] | None = None,
    loading: Callable[[int, int], None] | None = None,
) -> tuple[Pretrained, Engine]:
    """The model and warmed-up engine of a `config.serving_config`.

    `loading(done, total)` is told of bytes of weights, `progress(name, i, total)` of programs before they are compiled.
    """
    if not config.checkpoint:
        raise InputError("config.checkpoint is empty; name a Hugging Face folder or a hub id")
    limits = {name: config[name] or None for name in ("min_pixels", "max_pixels", "max_tiles")}
    model = Pretrained.open(config.checkpoint, **limits)
    mesh = _mesh_of_this_host(config)
    sharding.use(mesh)
    attention.use(config.attention)
    params = model.load_params(mesh, dtype=jnp.dtype(config.dtype), progress=loading)
    served = model.with_config(as_served(model.config, mesh))
    params = pad_feed_forward(params, served.config, mesh)
    engine = make_engine(served, params, config.engine, mesh, dtype=config.dtype)
    engine.warm_up(progress)
    return model, engine


def _mesh_of_this_host(config: ConfigDict) -> Mesh:
    """Every process of a run has an engine of its own: what it is asked, and when, the others do not know."""
    try:
        return sharding.mesh_of(jax.local_devices(), **config.mesh)
    except InputError as error:
        if processes.count() == 1:
            raise
        raise InputError(
            f"{error}; each of the {processes.count()} processes loads the model on its own devices: one that needs "
            "several hosts cannot be sampled here, so take one host with more memory, or an endpoint"
        ) from error


class TextStream:
    """The text of one sample as its tokens come, without special tokens, cut at the first stop string.

    Text is held back while it may still change (half a character) or become a stop string. A special token has no text;
    a stop string that is one ends the sample where the token comes.
    """

    def __init__(self, chat: ChatTokenizer, stop: Sequence[str] = ()):
        self._chat, self._stop = chat, [s for s in stop if s]
        specials = chat.tokenizer.added_tokens_decoder.items() if self._stop else ()
        self._stop_ids = {i for i, token in specials if token.special and token.content in self._stop}
        self.token_ids: list[int] = []  # up to the one that completed a stop string
        self.text = ""  # all of it that is certain
        self.stopped = False
        self._start = 0  # tokens before are in `_settled`
        self._settled = ""

    def push(self, token_ids: Sequence[int], *, last: bool = False) -> str:
        """Text that these tokens add; `last` gives what was held back. `stopped` says that a stop string ended it."""
        before = len(self.text)
        if not self._stop:
            self._push(token_ids, last)
        else:
            for i, token in enumerate(token_ids):
                if not self.stopped:
                    self._push([token], last and i == len(token_ids) - 1)
            if last and not token_ids and not self.stopped:
                self._push([], last)
        return self.text[before:]

    def _push(self, token_ids: Sequence[int], last: bool) -> None:
        self.token_ids += token_ids
        tail = self._chat.decode(self.token_ids[self._start :])
        whole = self._settled + tail
        ended = any(token in self._stop_ids for token in token_ids)
        sure = whole if last or ended else whole.rstrip("\ufffd")
        self._settle(tail, whole)
        ends = [at for s in self._stop if (at := whole.find(s, max(0, len(self.text) - len(s)))) >= 0]
        if ends or ended:
            sure, self.stopped = whole[: min(ends, default=len(whole))], True
        elif not last:
            sure = sure[: len(sure) - _held(sure, self._stop)]
        self.text = sure

    def _settle(self, tail: str, whole: str) -> None:
        """Long texts are not decoded from their beginning again and again."""
        if len(self.token_ids) - self._start <= 48 or tail.endswith("\ufffd"):
            return
        before, keep = self.token_ids[self._start : -16], self.token_ids[-16:]
        rest = self._chat.decode(keep)
        if self._chat.decode(before) + rest == tail:
            self._settled, self._start = whole[: len(whole) - len(rest)], len(self.token_ids) - 16


def _held(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a stop string."""
    return max((n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
