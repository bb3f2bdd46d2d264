"""Users' own reward functions, given in the config by dotted path."""

import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ril_jax.errors import InputError
from ril_jax.rewards.coroutines import run_coroutine

# `solution` beside `solutions`: the name that functions written for TRL use for that column.
_CORE = ("prompts", "completions", "solutions", "solution")


class RewardFunction:
    """One user function, checked; `name`, its __name__, is the metric's name (rewards/<name>/mean)."""

    def __init__(self, function: Callable[..., Any], path: str):
        self.path = path
        self.name: str = getattr(function, "__name__", type(function).__name__)
        self._function = function
        if not callable(function):
            raise InputError(f"reward function {path!r} is a {type(function).__name__}, not a function.")
        try:
            self._parameters = inspect.signature(function).parameters
        except ValueError:
            raise InputError(f"reward function {path!r} does not tell its arguments: wrap it in a def.") from None
        for parameter in self._parameters.values():
            if parameter.kind is parameter.POSITIONAL_ONLY:
                raise InputError(f"reward function {path!r}: {parameter.name} must be usable as a keyword.")

    def __call__(
        self,
        *,
        prompts: Sequence[Any],
        completions: Sequence[str],
        solutions: Sequence[str],
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> list[float | None]:
        """A reward a completion, None where the function has no opinion; all lists are of one length.

        The function gets by keyword what its signature names, or everything if it takes **kwargs; it may be a
        coroutine function. Raises InputError, naming the function, if it wants a column that is not there, raises, or
        gives anything but one finite number or None a completion.
        """
        columns = columns or {}
        if clash := sorted({"prompts", "completions", "solutions"} & columns.keys()):
            raise InputError(f"column {clash[0]!r} has the name of an argument of reward functions: rename it.")
        core = zip(_CORE, (prompts, completions, solutions, solutions), strict=True)
        given = {name: list(values) for name, values in (dict(core) | dict(columns)).items()}
        for name, values in given.items():
            if len(values) != len(completions):
                raise InputError(f"column {name!r} has {len(values)} values for {len(completions)} completions.")
        return self._checked(self._run(self._chosen(given)), len(completions))

    def _chosen(self, given: dict[str, list]) -> dict[str, list]:
        parameters = self._parameters.values()
        for parameter in parameters:
            variadic = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
            if not variadic and parameter.default is parameter.empty and parameter.name not in given:
                raise InputError(
                    f"reward function {self.path!r} wants {parameter.name!r}, which the data does not have; "
                    f"there are {', '.join(given)}."
                )
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return given
        return {name: values for name, values in given.items() if name in self._parameters}

    def _run(self, arguments: dict[str, list]) -> Any:
        try:
            result = self._function(**arguments)
            return run_coroutine(_wait_for(result)) if inspect.isawaitable(result) else result
        except Exception as error:
            raise InputError(f"reward function {self.path!r} raised {_describe(error)}.") from error

    def _checked(self, rewards: Any, count: int) -> list[float | None]:
        try:
            if isinstance(rewards, str | bytes | Mapping):
                raise TypeError
            rewards = list(rewards)
        except TypeError:
            kind = type(rewards).__name__
            raise InputError(f"reward function {self.path!r} gave a {kind}, not a list of numbers.") from None
        if len(rewards) != count:
            raise InputError(f"reward function {self.path!r} gave {len(rewards)} rewards for {count} completions.")
        return [None if reward is None else self._number(reward, i) for i, reward in enumerate(rewards)]

    def _number(self, reward: Any, i: int) -> float:
        try:
            if isinstance(reward, str | bytes):
                raise TypeError
            value = float(reward)
        except (TypeError, ValueError):
            raise InputError(
                f"reward function {self.path!r} gave {reward!r} for completion {i}: give a number or None."
            ) from None
        if not math.isfinite(value):
            raise InputError(
                f"reward function {self.path!r} gave {value} for completion {i}: give a finite number, or None for "
                "no opinion."
            )
        return value


def load_reward_functions(paths: Sequence[str]) -> list[RewardFunction]:
    """Loads "package.module.function" or "path/to/file.py:function" each; raises InputError, also for equal names."""
    functions = [load_reward_function(path) for path in paths]
    seen: dict[str, str] = {}
    for function in functions:
        if function.name in seen:
            raise InputError(
                f"reward functions {seen[function.name]!r} and {function.path!r} are both named {function.name}, which "
                "is their metric's name: rename one."
            )
        seen[function.name] = function.path
    return functions


def load_reward_function(path: str) -> RewardFunction:
    """Loads one reward function by "package.module.function" or "path/to/file.py:function"; raises InputError."""
    module_name, colon, function_name = path.rpartition(":")
    if colon and module_name.endswith(".py"):
        module = _import_file(Path(module_name).expanduser(), path)
    elif not colon and "." in path.strip("."):
        module_name, _, function_name = path.rpartition(".")
        module = _import_module(module_name, path)
    else:
        raise InputError(f"reward function {path!r}: write package.module.function or path/to/file.py:function.")
    try:
        function = getattr(module, function_name)
    except AttributeError:
        raise InputError(f"reward function {path!r}: there is no {function_name!r} in {module_name}.") from None
    return RewardFunction(function, path)


def _import_module(name: str, path: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{name}.".startswith(f"{missing}."):  # and not a module that this one imports
            raise InputError(
                f"reward function {path!r}: there is no module {missing!r}; install it, put its folder in "
                "PYTHONPATH, or write path/to/file.py:function."
            ) from error
        raise InputError(f"reward function {path!r}: importing {name} raised {_describe(error)}.") from error


def _import_file(file: Path, path: str) -> ModuleType:
    if not file.is_file():
        raise InputError(f"reward function {path!r}: there is no file {file}.")
    # Named by its whole path, so that two files of one name do not meet in sys.modules; there at all for the sake of
    # dataclasses and pickle, which look their module up.
    name = f"reward_file_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise InputError(f"reward function {path!r}: running {file} raised {_describe(error)}.") from error
    return module


async def _wait_for(result: Awaitable[Any]) -> Any:
    return await result


def _describe(error: Exception) -> str:
    """The error on one line with the place where it arose, since an InputError is printed without its traceback."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    frames = traceback.extract_tb(error.__traceback__)
    return f"{text} ({frames[-1].filename}, line {frames[-1].lineno})" if frames else text
