"""The launcher that every entry point shares: flags, a config file with overrides, one clear line for a mistake.

    python -m ril_jax.train --config=configs/tiny.py[:arg] --workdir=DIR --config.ril.learning_rate=1e-6

An entry point ends with `if __name__ == "__main__": cli.run(main)`, where `main` takes the parsed arguments
(`args.config`, `args.workdir` and one attribute for each further flag) and returns nothing or an exit status.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from absl import flags as absl_flags
from ml_collections import ConfigDict, config_flags

from ril_jax import distributed
from ril_jax.errors import InputError

USAGE_STATUS = 2
INTERRUPTED_STATUS = 130


@dataclass(frozen=True)
class Flag:
    """One further flag of an entry point, beside --config and --workdir."""

    name: str
    kind: type = str  # str, int, float, bool, or list for a comma-separated list of strings
    default: Any = None
    help: str = ""


PROCESS_FLAGS = (
    Flag("coordinator", help="HOST:PORT on which process 0 listens; found by itself on TPU VMs, GKE and SLURM"),
    Flag("num_processes", int, help="how many processes the run has; 1 keeps it alone wherever it is"),
    Flag("process_id", int, help="which of them this one is, from 0"),
)


def run(
    main: Callable[[SimpleNamespace], int | None],
    *,
    required: Sequence[str] = ("config", "workdir"),
    flags: Sequence[Flag] = (),
    processes: bool = False,
    argv: Sequence[str] | None = None,
) -> NoReturn:
    """Parse the command line, call `main(args)` and leave the process with its exit status.

    A mistake of the user (InputError, wherever it is raised) is printed as its one line and ends with status 2; Ctrl-C
    ends with 130; any other exception is a bug and keeps its traceback. With `processes` the program may run as one of
    many (ril_jax/distributed.py): it gets the flags for that, and has joined the others before `main` begins.
    """
    argv = list(sys.argv if argv is None else argv)
    flags = (*flags, *PROCESS_FLAGS) if processes else flags
    try:
        if any(word in ("--help", "-help", "-h", "--helpfull") for word in argv[1:]):
            print(_usage(argv, main, required, flags))
            sys.exit(0)
        args = parse_arguments(argv, required=required, flags=flags)
        look_for_no_absent_tpu()
        if processes:
            distributed.initialize(args)
        status = main(args)
    except InputError as error:
        distributed.leave(USAGE_STATUS, f"error: {_one_line(error)}")
    except KeyboardInterrupt:
        distributed.leave(INTERRUPTED_STATUS, "interrupted")
    except Exception as error:
        if not distributed.joined():
            raise
        distributed.leave_by_bug(error)
    sys.exit(status or 0)


def look_for_no_absent_tpu(env: MutableMapping[str, str] = os.environ, devices: Path = Path("/dev")) -> bool:
    """Keep JAX on the CPU where libtpu is installed for its compiler alone (`ril_jax.plan`). Returns whether it did so.

    JAX would find no TPU, after much noise, and hold a lock that other processes wait for. Nothing is done where a
    platform is chosen, or a TPU or GPU is attached.
    """
    told = [name for name in ("JAX_PLATFORMS", "TPU_NAME", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_ID") if env.get(name)]
    attached = [path for kind in ("accel[0-9]*", "vfio/[0-9]*", "nvidia[0-9]*", "kfd") for path in devices.glob(kind)]
    if told or attached or importlib.util.find_spec("libtpu") is None:
        return False
    env["JAX_PLATFORMS"] = "cpu"
    if env is os.environ and "jax" in sys.modules:  # it has read its environment
        sys.modules["jax"].config.update("jax_platforms", "cpu")
    return True


def parse_arguments(
    argv: Sequence[str], *, required: Sequence[str] = ("config", "workdir"), flags: Sequence[Flag] = ()
) -> SimpleNamespace:
    """Turn a command line (program first) into `config` (ConfigDict or None), `workdir` (Path or None) and `flags`.

    Raises InputError for an unknown flag or config field (with the nearest known name), a value of the wrong type, a
    missing required flag, a stray word, or a config file that is missing or broken.
    """
    config_files, rest = _take_config_flag(list(argv))
    if len(config_files) > 1:
        raise InputError(f"--config is given {len(config_files)} times ({', '.join(config_files)}): give it once")
    config = _load_config_file(config_files[0]) if config_files else None

    values = absl_flags.FlagValues()
    absl_flags.DEFINE_string("workdir", None, "folder that holds everything this run writes", flag_values=values)
    for flag in flags:
        _define(flag, values)
    names = ["config", *sorted(values)]
    overrides = [word for word in rest[1:] if _override_path(word) is not None]
    if config is None:
        if overrides:
            raise InputError(f"{overrides[0].split('=')[0]} changes a field of a config, but no --config=FILE is given")
    else:
        for word in overrides:
            _check_field(_override_path(word) or "", config)
        try:
            config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=rest)
        except (config_flags.UnsupportedOperationError, absl_flags.Error, ValueError, TypeError) as error:
            raise InputError(_one_line(error)) from error

    try:
        words = values(rest)
    except absl_flags.UnrecognizedFlagError as error:
        raise InputError(_unknown_flag(error.flagname, names, config)) from error
    except (absl_flags.Error, ValueError, TypeError, KeyError) as error:
        raise InputError(_illegal_value(error)) from error
    if len(words) > 1:
        raise InputError(f"unexpected word {words[1]!r} on the command line: every setting is written as --name=value")

    for name in ("workdir", "output"):  # gs://x would become a folder named gs: here
        folder = values[name].value if name in values else None
        if "://" in str(folder or ""):
            raise InputError(f"--{name}={folder}: give a folder; mount the bucket and name a folder in it")
    args = SimpleNamespace(config=config, workdir=Path(values.workdir).expanduser() if values.workdir else None)
    for flag in flags:
        setattr(args, flag.name, values[flag.name].value)
    for name in required:
        if getattr(args, name, None) in (None, ""):
            raise InputError(f"--{name}={_PLACEHOLDERS.get(name, 'VALUE')} is missing")
    # Libraries that read absl's own global flags (grain does) refuse to until those count as parsed.
    if not absl_flags.FLAGS.is_parsed():
        absl_flags.FLAGS.mark_as_parsed()
    return args


def load_config(file: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Load `configs/x.py` or `configs/x.py:arg` and apply overrides such as "ril.learning_rate=1e-6".

    Raises InputError as `parse_arguments` does.
    """
    words = ["load_config", f"--config={file}", *(f"--config.{override}" for override in overrides)]
    return parse_arguments(words, required=("config",)).config


_PLACEHOLDERS = {"config": "configs/NAME.py", "workdir": "DIR", "checkpoint": "DIR", "output": "DIR"}


def _define(flag: Flag, values: absl_flags.FlagValues) -> None:
    define: dict[type, Callable[..., Any]] = {
        str: absl_flags.DEFINE_string,
        int: absl_flags.DEFINE_integer,
        float: absl_flags.DEFINE_float,
        bool: absl_flags.DEFINE_boolean,
        list: absl_flags.DEFINE_list,
    }
    define[flag.kind](flag.name, flag.default, flag.help, flag_values=values)


# --- the config file --------------------------------------------------------------------------------------------------


def _take_config_flag(argv: list[str]) -> tuple[list[str], list[str]]:
    """Split `--config=FILE` and `--config FILE` off the command line."""
    files, rest, i = [], argv[:1], 1
    while i < len(argv):
        word = argv[i]
        if word in ("--config", "-config"):
            if i + 1 == len(argv) or argv[i + 1].startswith("-"):
                raise InputError("--config needs a file: --config=configs/NAME.py")
            files.append(argv[i + 1])
            i += 1
        elif word.startswith(("--config=", "-config=")):
            files.append(word.split("=", 1)[1])
        else:
            rest.append(word)
        i += 1
    return files, rest


def _load_config_file(text: str) -> ConfigDict:
    name, _, arg = text.partition(":")
    path = Path(name).expanduser()
    if not path.is_file():
        near = difflib.get_close_matches(path.name, _sibling_configs(path), n=1, cutoff=0.4)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise InputError(f"--config={text}: there is no file {path}{hint}")
    spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"--config={text}: {path} is not a Python file; a config is a .py file with get_config()")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses and pickling in the config look their module up by name
    try:
        spec.loader.exec_module(module)
        if not callable(getattr(module, "get_config", None)):
            raise InputError(f"{path} has no function get_config()")
        most = len(inspect.signature(module.get_config).parameters)
        if ":" in text and most == 0:
            raise InputError(f"--config={text}: get_config() of {path} takes no argument; leave out ':{arg}'")
        config = module.get_config(arg) if ":" in text else module.get_config()
    except (InputError, KeyboardInterrupt):
        raise
    except BaseException as error:  # SystemExit included: nothing that a config does may end the run without a line
        raise InputError(f"{path}{_line_of(error, path)}: {type(error).__name__}: {_one_line(error)}") from error
    if isinstance(config, dict):
        config = ConfigDict(config)
    if not isinstance(config, ConfigDict):
        raise InputError(f"{path}: get_config() returned {type(config).__name__}, not an ml_collections.ConfigDict")
    config.lock()
    return config


def _sibling_configs(path: Path) -> list[str]:
    return [other.name for other in path.parent.glob("*.py")] if path.parent.is_dir() else []


def _line_of(error: BaseException, path: Path) -> str:
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f", line {error.lineno}"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == path]
    return f", line {lines[-1]}" if lines else ""


# --- names and values -------------------------------------------------------------------------------------------------


def _override_path(word: str) -> str | None:
    """`a.b` of --config.a.b=1, --config.a.b 1 or --noconfig.a.b; None for any other word."""
    name = word.split("=", 1)[0].lstrip("-") if word.startswith("-") else ""
    for prefix in ("config.", "noconfig."):
        if name.startswith(prefix):
            return name[len(prefix) :]
    return None


def _check_field(path: str, config: ConfigDict) -> None:
    holder: Any = config
    parts = path.split(".")
    for depth, part in enumerate(parts):
        plain = part.split("[", 1)[0]
        if not isinstance(holder, ConfigDict):
            parent = ".".join(parts[:depth])
            raise InputError(f"--config.{path}: config.{parent} is {_kind(holder)} and has no fields")
        if plain not in holder:
            near = _nearest(path, list(_field_names(config)))
            raise InputError(f"unknown config field config.{path}; did you mean config.{near}?")
        if "[" in part:
            return  # an item of a tuple: config_flags checks the index itself
        try:
            holder = holder[plain]
        except Exception as error:  # a required placeholder has no value yet
            if depth + 1 == len(parts):
                return
            raise InputError(f"--config.{path}: {_one_line(error)}") from error
    if isinstance(holder, list):
        raise InputError(
            f"--config.{path}: a list cannot be set from the command line; make it a tuple in the config file"
        )
    if holder is None and _declared_type(config, parts) is type(None):
        raise InputError(
            f"--config.{path}: the config gives None and no type; use config_dict.placeholder(TYPE) in the config file"
        )


def _declared_type(config: ConfigDict, parts: list[str]) -> type:
    holder: Any = config
    for part in parts[:-1]:
        holder = holder[part]
    return holder.get_type(parts[-1])


def _field_names(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    """Every field's dotted name, sections before what they hold."""
    for key, child in config.items(preserve_field_references=True):
        yield prefix + key
        if isinstance(child, ConfigDict):
            yield from _field_names(child, f"{prefix}{key}.")


def _nearest(name: str, known: list[str]) -> str:
    """The known dotted name that is most like `name`, judged by the whole and by its last part."""

    def likeness(other: str) -> float:
        whole = difflib.SequenceMatcher(None, name, other).ratio()
        last = difflib.SequenceMatcher(None, name.rsplit(".", 1)[-1], other.rsplit(".", 1)[-1]).ratio()
        return whole + last

    return max(known, key=likeness)


def _unknown_flag(name: str, names: list[str], config: ConfigDict | None) -> str:
    fields = [f"config.{field}" for field in _field_names(config)] if config is not None else []
    known = fields if "." in name and fields else names
    return f"unknown flag --{name}; did you mean --{_nearest(name, known)}?"


def _illegal_value(error: Exception) -> str:
    text = _one_line(error)
    # absl says: flag --config.lr=abc: could not convert string to float: 'abc'
    return text if text.startswith(("flag", "--")) else f"the command line cannot be read: {text}"


def _kind(value: Any) -> str:
    return {bool: "a yes/no value", int: "a number", float: "a number", str: "a text"}.get(
        type(value), f"a {type(value).__name__}"
    )


def _one_line(error: BaseException) -> str:
    text = error.args[0] if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(str(text).split()) or type(error).__name__


def _usage(argv: list[str], main: Callable[..., Any], required: Sequence[str], flags: Sequence[Flag]) -> str:
    module = inspect.getmodule(main)
    shown = (
        [Flag("config", help="config file, with an optional argument: configs/NAME.py:arg")]
        if ("config" in required)
        else []
    )
    shown += [Flag("workdir", help="folder that holds everything this run writes")] if "workdir" in required else []
    lines = [inspect.getdoc(module) or "" if module else "", "", "flags:"]
    for flag in (*shown, *flags):
        default = "required" if flag.name in required else f"default: {flag.default}"
        lines.append(f"  --{flag.name}  {flag.help} ({default})")
    files, _ = _take_config_flag(argv)
    if files:
        lines += ["", f"fields of {files[0]}, each set with --config.FIELD=VALUE:", str(_load_config_file(files[0]))]
    elif shown:
        lines.append("  --config.FIELD=VALUE  changes a field; --config=FILE --help lists them")
    return "\n".join(lines).strip()
