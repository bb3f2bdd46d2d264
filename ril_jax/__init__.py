"""Unified Reinforcement and Imitation Learning for vision-language models, in JAX.

`load` gives a model that generates and scores; `objectives` holds the losses. Names are imported when they are first
used, so that `import ril_jax` is quick and starts no JAX backend.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ril_jax.errors import InputError

if TYPE_CHECKING:
    from ril_jax import objectives
    from ril_jax.api import Completion, Model, Score, load

    __version__: str

__all__ = ["Completion", "InputError", "Model", "Score", "__version__", "load", "objectives"]

_API = ("Completion", "Model", "Score", "load")


def __getattr__(name: str) -> Any:
    if name in _API:
        value = getattr(importlib.import_module("ril_jax.api"), name)
    elif name == "objectives":
        value = importlib.import_module("ril_jax.objectives")
    elif name == "__version__":
        value = importlib.import_module("importlib.metadata").version("ril_jax")
    else:
        raise AttributeError(f"module 'ril_jax' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
