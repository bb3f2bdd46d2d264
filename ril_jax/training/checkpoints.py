"""Checkpoints of a run: saved asynchronously and atomically, verified when read.

`Checkpointer` keeps the arrays (parameters, optimiser states, PRNG keys) and the host state (data iterator, counters,
teacher-draw state) of one stage together, so that a run killed at any moment goes on as if it had not been.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from ril_jax import processes
from ril_jax.errors import InputError
from ril_jax.files import write_atomically
from ril_jax.training import disk
from ril_jax.training.workdir import claim_folder

logger = logging.getLogger("ril_jax.checkpoints")

_INTEGRITY = "integrity.json"
# Beyond this size a checkpoint is verified by its file sizes alone: reading it twice would cost more than it tells.
_CONTENT_CHECKED_BELOW = 8 << 30


class Restored(NamedTuple):
    """What `restore_latest` returns: the step after which it was saved, the arrays, the host state."""

    step: int
    arrays: Any
    host: dict[str, Any]


class Checkpointer:
    """The checkpoints of one stage in `folder`: one at every multiple of `every` steps, the newest `keep` of them kept.

    `fingerprint` holds the config fields that define the run; a folder written under another one is refused with an
    InputError unless `allow_config_change` (see `claim_folder`).
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep: int = 2,
        every: int = 100,
        fingerprint: Mapping[str, Any] | None = None,
        allow_config_change: bool = False,
    ) -> None:
        if keep < 1 or every < 1:
            raise InputError(f"checkpoints: keep={keep} and every={every} must both be at least 1")
        self.folder = Path(folder).absolute()
        self.every = every
        self._keep = keep
        if fingerprint is not None:
            claim_folder(self.folder, fingerprint, allow_change=allow_config_change)
        self._in_flight: int | None = None
        self._quiet = disk.NoTracebacks()
        logging.getLogger("absl").addFilter(self._quiet)
        with self._clear_errors("opening"):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._manager = self._open()

    def due(self, step: int) -> bool:
        """Whether the schedule asks for a checkpoint after this step."""
        return step % self.every == 0

    def steps(self) -> list[int]:
        """The steps of which a complete checkpoint lies on disk, oldest first."""
        # Listed here and not asked of orbax, whose list holds a step from the moment that its save begins.
        # The first process looks, since a network's file system may show the others an earlier state.
        return processes.decide(self._listed, "which checkpoints there are")

    def _listed(self) -> list[int]:
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdigit() and path.is_dir())

    def save(self, step: int, arrays: Any, host: Mapping[str, Any], *, force: bool = False) -> bool:
        """Start saving the state after `step` if it is due (or `force`), and return whether `step` has a checkpoint.

        arrays: pytree of jax arrays, typed PRNG keys included; they may be donated once this returns. host: nested
        dicts and lists of str, int, float, bool and None, one such state a process. A step that is there is not
        saved again. Raises InputError if the disk is full or not writable, also for the save before this one; the
        newest complete checkpoint stays.
        """
        if not force and not self.due(step):
            return False
        _require_json(host, "host")
        flat, described = _flatten(arrays)
        record = {"arrays": described, "hosts": processes.gather(dict(host), "host states")}
        with self._clear_errors(f"saving step {step}"):
            self._manager.wait_until_finished()
            if step in self.steps():
                return True
            self._check_free_space(step, flat)
            self._in_flight = step
            self._manager.save(
                step,
                args=ocp.args.Composite(arrays=ocp.args.PyTreeSave(flat), host=ocp.args.JsonSave(record)),
                force=True,
            )
        return True

    def restore_latest(self, abstract_arrays: Any, *, partial: bool = False) -> Restored | None:
        """Read the newest good checkpoint into the shapes, dtypes and shardings of `abstract_arrays`; None without one.

        abstract_arrays: pytree of jax.ShapeDtypeStruct (or arrays), whose shardings may be those of another mesh than
        the one that saved. With `partial` the checkpoint may hold more arrays than are asked for. A checkpoint that is
        corrupt or incomplete is reported, set aside as corrupt-STEP, and the one before it is taken. Raises InputError
        if arrays are missing or differ in shape or dtype (all of them listed), or if none of several is readable.
        """
        self.wait()
        for step in reversed(self.steps()):
            verified = False
            problems: list[str] = []
            restored, failure = None, None
            try:
                verified = self._verify(step)
                record = self._manager.restore(step, args=ocp.args.Composite(host=ocp.args.JsonRestore()))["host"]
                problems = _differences(record["arrays"], abstract_arrays, partial)
                restored = None if problems else self._read(step, record, abstract_arrays)
            except Exception as error:  # orbax and tensorstore raise many kinds for a damaged file
                if verified or isinstance(error, InputError | MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                    raise  # the files are as they were written: something else is wrong
                failure = error
            if problems:
                raise InputError(
                    f"checkpoint {self.folder / str(step)} does not fit this model: {'; '.join(problems)}; use the "
                    "config that wrote it, or another --workdir"
                )
            if _every_process(failure is None) and restored is not None:
                return restored
            words = " ".join(str(failure or "another process cannot read it").split())[:300]
            logger.warning("CHECKPOINT of step %d in %s is damaged and set aside: %s", step, self.folder, words)
            self._set_aside(step)
        broken = processes.decide(
            lambda: sorted(path.name for path in self.folder.glob("corrupt-*")), "what is corrupt"
        )
        if broken:  # also those of an earlier start: a stage never begins again from nothing unasked
            raise InputError(
                f"{self.folder} has no checkpoint that can be read, only {', '.join(broken)}: bring back a copy, or "
                "delete the folder to start this stage again"
            )
        return None

    def wait(self) -> None:
        """Block until the save in flight is complete; raises InputError if it failed for want of space."""
        with self._clear_errors(f"saving step {self._in_flight}"):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for the save in flight and let go of the folder."""
        try:
            self.wait()
            self._manager.close()
        finally:
            logging.getLogger("absl").removeFilter(self._quiet)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:  # the error that is on its way out matters more than one of the save in flight
            with contextlib.suppress(Exception):
                self.close()

    # --- saving ------------------------------------------------------------------------------------------------------

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep,
            cleanup_tmp_directories=True,  # what a killed save left behind
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_integrity),
        )
        return ocp.CheckpointManager(self.folder, options=options)

    def _check_free_space(self, step: int, flat: Mapping[str, jax.Array]) -> None:
        """Refuse at once what cannot fit: compression gains some 10 % on trained weights, never half."""
        needed = sum(
            shard.data.nbytes for x in flat.values() for shard in x.addressable_shards if shard.replica_id == 0
        )
        free = shutil.disk_usage(self.folder).free
        if free < 0.5 * needed:
            raise OSError(errno.ENOSPC, f"about {_mebibytes(needed)} are needed and {_mebibytes(free)} are free")

    @contextlib.contextmanager
    def _clear_errors(self, doing: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            reason = disk.reason(error)
            if reason is None:
                raise
            good = "no complete checkpoint is there yet"
            if hasattr(self, "_manager"):
                if processes.count() == 1:  # of several this one may be alone with its error
                    self._drop_unfinished()
                steps = self._listed()
                good = f"the last good checkpoint is step {steps[-1]}" if steps else good
            raise InputError(
                f"checkpoint folder {self.folder}: {doing} failed: {reason}; {good}; free some space or make the "
                "folder writable and start the same command again, or choose another --workdir"
            ) from error

    def _drop_unfinished(self) -> None:
        """Delete what a failed save left, which may hold the very space that is missing, and open the folder anew."""
        with contextlib.suppress(Exception):
            self._manager.close()
        for path in self.folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(path, ignore_errors=True)
        self._manager = self._open()

    def _write_integrity(self) -> None:
        """Note size and CRC of every file; orbax calls this in its thread when all is written, before the rename."""
        if not processes.is_first() or self._in_flight is None:
            return
        unfinished = sorted(self.folder.glob(f"{self._in_flight}.orbax-checkpoint-tmp*"))
        folder = unfinished[-1] if unfinished else self.folder / str(self._in_flight)
        files = _files_of(folder)
        with_content = sum(path.stat().st_size for path in files.values()) <= _CONTENT_CHECKED_BELOW
        notes = {name: [path.stat().st_size, _crc(path) if with_content else None] for name, path in files.items()}
        write_atomically(folder / _INTEGRITY, json.dumps(notes).encode())

    # --- restoring ---------------------------------------------------------------------------------------------------

    def _verify(self, step: int) -> bool:
        """Raise ValueError if a file differs from what was written; True if all contents were compared."""
        folder = self.folder / str(step)
        notes_file = folder / _INTEGRITY
        if not notes_file.exists():
            return False
        complete = True
        for name, (size, crc) in json.loads(notes_file.read_text()).items():
            path = folder / name
            if not path.is_file():
                raise ValueError(f"{path} is missing")
            if path.stat().st_size != size:
                raise ValueError(f"{path} has {path.stat().st_size} bytes instead of {size}")
            complete &= crc is not None
            if crc is not None and _crc(path) != crc:
                raise ValueError(f"the content of {path} has changed since it was written")
        return complete

    def _read(self, step: int, record: Mapping[str, Any], abstract_arrays: Any) -> Restored:
        leaves, treedef = jax.tree_util.tree_flatten_with_path(abstract_arrays)
        wanted = {}
        empty = {}
        for path, leaf in leaves:
            name = leaf_name(path)
            shape, dtype = record["arrays"][name]["shape"], record["arrays"][name]["stored"]
            if 0 in shape:
                empty[name] = jax.numpy.zeros(shape, dtype, device=leaf.sharding)
            else:
                wanted[name] = jax.ShapeDtypeStruct(tuple(shape), np.dtype(dtype), sharding=_sharding(leaf))
        flat = dict(empty)
        if wanted:
            arguments = ocp.args.PyTreeRestore(
                item=wanted,
                restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
                partial_restore=True,
            )
            flat |= self._manager.restore(step, args=ocp.args.Composite(arrays=arguments))["arrays"]
        arrays = []
        for path, _ in leaves:
            name = leaf_name(path)
            implementation = record["arrays"][name]["key"]
            x = flat[name]
            arrays.append(jax.random.wrap_key_data(x, impl=implementation) if implementation else x)
        return Restored(step, jax.tree_util.tree_unflatten(treedef, arrays), _own_host(record["hosts"], self.folder))

    def _set_aside(self, step: int) -> None:
        if processes.is_first():
            target = self.folder / f"corrupt-{step}"
            if target.exists():
                shutil.rmtree(target)
            (self.folder / str(step)).rename(target)
        _every_process(True)  # nobody goes on before the rename
        self._manager.reload()


# --- arrays and host state -------------------------------------------------------------------------------------------


def leaf_name(path: tuple[Any, ...]) -> str:
    """What a leaf at this path of a pytree is called: "text/layers/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/") or "array"


def is_key(x: Any) -> bool:
    """Whether an array, or its shape, is one of typed PRNG keys."""
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _flatten(arrays: Any) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """Name every leaf, unwrap PRNG keys, and describe all; orbax gets no empty arrays, which it refuses."""
    flat, described = {}, {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(arrays)[0]:
        name = leaf_name(path)
        if not isinstance(leaf, jax.Array):
            raise TypeError(f"checkpoint arrays: {name} is {type(leaf).__name__}, not a jax.Array; put it into host")
        if name in described:
            raise ValueError(f"checkpoint arrays: two leaves are called {name}")
        data = jax.random.key_data(leaf) if is_key(leaf) else leaf
        described[name] = {
            "shape": list(data.shape),
            "dtype": str(leaf.dtype),
            "stored": str(data.dtype),
            "key": str(jax.random.key_impl(leaf)) if is_key(leaf) else None,
        }
        if data.size:
            flat[name] = data
    if not flat:
        raise ValueError("a checkpoint needs at least one array that is not empty")
    return flat, described


def _differences(saved: Mapping[str, Any], abstract_arrays: Any, partial: bool) -> list[str]:
    wanted = {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(abstract_arrays)[0]}
    problems = [f"it lacks {name}" for name in wanted if name not in saved]
    if not partial:
        problems += [f"it holds {name}, which is unknown here" for name in saved if name not in wanted]
    for name, leaf in wanted.items():
        if name not in saved:
            continue
        shape = list(jax.eval_shape(jax.random.key_data, leaf).shape if is_key(leaf) else leaf.shape)
        if saved[name]["shape"] != shape or saved[name]["dtype"] != str(leaf.dtype):
            there = f"{saved[name]['dtype']}{saved[name]['shape']}"
            problems.append(f"{name} is {there} there and {leaf.dtype}{shape} here")
    return problems


def _sharding(leaf: Any) -> jax.sharding.Sharding:
    return leaf.sharding if leaf.sharding is not None else jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _require_json(value: Any, path: str) -> None:
    """Only what JSON gives back unchanged: a tuple or an integer key would come back as something else."""
    if value is None or isinstance(value, str | bool | int | float):
        return
    if isinstance(value, Mapping):
        for key, child in value.items():
            if not isinstance(key, str):
                raise TypeError(f"checkpoint {path}: the key {key!r} is not a str")
            _require_json(child, f"{path}.{key}")
    elif isinstance(value, list):
        for i, child in enumerate(value):
            _require_json(child, f"{path}[{i}]")
    else:
        raise TypeError(
            f"checkpoint {path} is {type(value).__name__}; host state is made of dict, list, str, int, float"
        )


def _own_host(hosts: list[Any], folder: Path) -> dict[str, Any]:
    if len(hosts) == processes.count():
        return hosts[processes.index()]
    if all(host == hosts[0] for host in hosts):
        return hosts[0]
    raise InputError(
        f"{folder} was saved by {len(hosts)} processes, each with its own state, and {processes.count()} run now: "
        f"start {len(hosts)} processes"
    )


def _every_process(good: bool) -> bool:
    """True if all processes say so; all wait for each other here."""
    return not processes.any_of(not good, "has a process failed")


# --- files -----------------------------------------------------------------------------------------------------------


def _files_of(folder: Path) -> dict[str, Path]:
    """The files of the items; those directly in the folder are orbax's own notes, which it still changes."""
    return {str(p.relative_to(folder)): p for p in sorted(folder.glob("*/**/*")) if p.is_file()}


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


def _mebibytes(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"
