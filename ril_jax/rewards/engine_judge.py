"""The judge as a model in this process: Qwen2.5 in the sampling engine, on the devices of the run."""

import contextlib
import difflib
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ril_jax import sharding
from ril_jax.compilation import CompileCounter
from ril_jax.config import engine_config
from ril_jax.data.chat import ChatTokenizer
from ril_jax.errors import InputError
from ril_jax.models.digest import checkpoint_digest
from ril_jax.pretrained import Pretrained
from ril_jax.rewards.model_judge import JudgeInterrupted, ModelJudge
from ril_jax.rewards.verdict import JudgeItem, Verdict, judge_messages, parse_verdict
from ril_jax.sampling.endpoint import check_positive
from ril_jax.sampling.engine import Engine
from ril_jax.sampling.gather import run_each
from ril_jax.sampling.local import make_engine
from ril_jax.sampling.logits import SamplingParams
from ril_jax.sampling.requests import Request


@dataclass(frozen=True)
class EngineJudgeConfig:
    """Which model an `EngineJudge` asks, and how. Raises InputError for bad values."""

    checkpoint: str = ""  # a Hugging Face folder or a hub id
    dtype: str = "bfloat16"
    max_tokens: int = 256
    engine: Mapping[str, Any] = field(default_factory=dict)  # the fields of config.engine_config
    cache_path: str = ""  # as of OpenAIJudgeConfig, like the next
    cache_size: int = 100_000

    def __post_init__(self):
        if not self.checkpoint:
            raise InputError("judge.checkpoint is empty: name the Hugging Face folder or hub id of the judge.")
        if self.dtype not in ("bfloat16", "float32"):
            raise InputError(f"judge.dtype is {self.dtype!r}: use bfloat16 or float32.")
        for name in ("max_tokens", "cache_size"):
            check_positive("judge", name, getattr(self, name))
        for name in set(self.engine) - set(known := engine_config()):
            near = difflib.get_close_matches(name, known, n=1)
            raise InputError(
                f"judge.engine.{name} is no field of the engine" + (f": did you mean {near[0]}?" if near else ".")
            )


class EngineJudge(ModelJudge):
    """Asks a model in this process, greedily, with the prompt and the reading of verdicts of `OpenAIJudge`.

    mesh: where the model lies, by default all devices with their heads apart. counter: of the run's compilations.
    launching: a context in which device programs may be started; in a process with several threads that start them,
    all must use one lock, for devices that work together must be given their programs in one order.
    """

    def __init__(
        self,
        config: EngineJudgeConfig,
        *,
        notify: Callable[[str], None] | None = None,
        stop: Callable[[], bool] | None = None,
        mesh: Mesh | None = None,
        counter: CompileCounter | None = None,
        launching: Callable[[], AbstractContextManager] = contextlib.nullcontext,
    ):
        shapes = engine_config()
        shapes.update(config.engine)
        settings = json.dumps(shapes.to_dict(), sort_keys=True)
        mesh = mesh or sharding.make_mesh(data=1, fsdp=1, tensor=-1)
        self._chat, self._engine, digest = _load(config.checkpoint, config.dtype, settings, mesh, counter)
        super().__init__(
            ("engine", digest, config.dtype, config.max_tokens),
            cache_path=config.cache_path, cache_size=config.cache_size, notify=notify, stop=stop,
        )  # fmt: skip
        self._config, self._launching = config, launching

    @property
    def engine(self) -> Engine:
        """The engine that judges; `_ask_all` steps it."""
        return self._engine

    def _ask_all(self, items: dict[str, JudgeItem], answered: Callable[[str, Verdict], None]) -> None:
        self._counts["requests"] += len(items)
        slots = self._engine.shapes.slots
        with contextlib.closing(
            run_each(
                self._engine, self._chat, self._requests(items), in_flight=2 * slots,
                before_step=self._check, launching=self._launching,
                refused=lambda key, error: self._refuse(items[key], error),
            )
        ) as running:  # fmt: skip
            for key, results in running:
                answered(key, parse_verdict(results[0].text))

    def _requests(self, items: dict[str, JudgeItem]) -> Iterator[tuple[str, Request]]:
        greedy = SamplingParams(temperature=0.0)
        for key, item in items.items():
            prompt = self._chat.encode_prompt(judge_messages(item), [], name=f"question {item.id}")
            yield key, Request(prompt, max_tokens=self._config.max_tokens, sampling=greedy)

    def _refuse(self, item: JudgeItem, error: InputError) -> None:
        raise InputError(f"the judge cannot read question {item.id!r}: {_of_this_engine(error)}") from error

    def _check(self) -> None:
        if self._stop is not None and self._stop():
            raise JudgeInterrupted(f"stopped while {self._config.checkpoint} was judging.")


@functools.lru_cache(maxsize=1)
def _load(
    checkpoint: str, dtype: str, settings: str, mesh: Mesh, counter: CompileCounter | None
) -> tuple[ChatTokenizer, Engine, str]:
    """Loaded and warmed up; arms of a run that agree in their judge share it."""
    model = Pretrained.open(checkpoint)
    params = model.load_params(mesh, dtype=jnp.dtype(dtype))
    try:
        engine = make_engine(model, params, ConfigDict(json.loads(settings)), mesh, dtype=dtype, counter=counter)
    except InputError as error:
        raise InputError(_of_this_engine(error)) from error
    engine.warm_up()
    if counter is not None:
        counter.cold()  # the run's own programs are still to come
    return model.chat, engine, checkpoint_digest(model.folder)


def _of_this_engine(error: InputError) -> str:
    return str(error).replace("config.engine.", "config.reward.judge.engine.")
