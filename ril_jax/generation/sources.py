"""The source of responses that a config names: the engine in this process, or an endpoint."""

import contextlib
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from ril_jax.errors import InputError
from ril_jax.generation.outcomes import ResponseSource
from ril_jax.models.digest import checkpoint_digest


def open_source(
    config: ConfigDict, stack: contextlib.ExitStack, tell: Callable[[str], None]
) -> tuple[str, dict[str, Any], Callable[[], ResponseSource]]:
    """Name of the model, what its responses depend on besides the sampling, and how to begin.

    config: a serving_config; generate.base_url names an endpoint, else `checkpoint` is loaded when it begins. tell:
    gets lines for people. Raises InputError where there is neither, or the endpoint cannot be used.
    """
    if config.generate.base_url:
        from ril_jax.generation.endpoint_source import EndpointSource

        source = EndpointSource(config, notify=tell)
        stack.callback(source.close)
        return source.name, {"endpoint_model": source.model}, lambda: source
    if not config.checkpoint:
        raise InputError(
            "config.checkpoint is empty; name a Hugging Face folder or a hub id, or an endpoint in "
            "config.generate.base_url"
        )
    from ril_jax.generation.engine_source import EngineSource, engine_fields
    from ril_jax.models import hub

    folder = hub.resolve(config.checkpoint)
    name = config.generate.model_name or str(config.checkpoint).rstrip("/").rsplit("/", 1)[-1].partition("@")[0]

    def begin() -> ResponseSource:
        from ril_jax.compilation import enable_persistent_cache
        from ril_jax.progress import of_bytes
        from ril_jax.sampling.local import load_engine

        enable_persistent_cache()
        config.checkpoint = str(folder)

        def compiling(program: str, i: int, total: int) -> None:
            tell(f"program {i + 1} of {total}: {program}")

        model, engine = load_engine(config, progress=compiling, loading=of_bytes(f"load {name}"))
        source = EngineSource(engine, model.chat, config, name=name)
        stack.callback(source.close)
        return source

    return name, engine_fields(config, checkpoint_digest(folder)), begin
