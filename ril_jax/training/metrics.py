"""What a run measures: scalars to JSONL, TensorBoard and (if asked) wandb, and tables of samples with their images.

    workdir/metrics/<stage>.jsonl              one JSON object a line: step, then the scalars by name
    workdir/tensorboard/<stage>/               the same for TensorBoard
    workdir/samples/<stage>/step_000010.json   a table of samples; its images stand once in workdir/samples/images/

`<stage>` may have an arm in it ("ril/both_teachers"). A resumed run calls `rewind(step)` first: what was written after
the checkpoint is dropped, so that files of a killed and resumed run equal those of one never killed, wall-clock fields
(`is_wall_clock`) apart.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from ril_jax import processes
from ril_jax.errors import InputError
from ril_jax.files import write_atomically

logger = logging.getLogger("ril_jax.metrics")

_FSYNC_EVERY_S = 30.0
_WALL_CLOCK_NAMES = {"step_time", "tokens_per_second", "mfu"}


def is_wall_clock(name: str) -> bool:
    """Whether a metric depends on the clock, and so differs between two otherwise equal runs."""
    return name in _WALL_CLOCK_NAMES or name.startswith("time/")


class MetricsWriter:
    """Writes the scalars of one stage. Only process 0 writes; the others may call everything.

    wandb: None, or the keyword arguments of wandb.init, such as {"project": "ril"}. Raises InputError if wandb is asked
    for and not installed, or if the folder cannot be written.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        stage: str,
        *,
        tensorboard: bool = True,
        wandb: Mapping[str, Any] | None = None,
    ) -> None:
        self.stage = stage
        self.path = metrics_file(workdir, stage)
        self._on = processes.is_first()
        self._file: int | None = None
        self._last_step = -1
        self._synced = time.monotonic()
        self._warned: set[str] = set()
        self._tensorboard_folder = Path(workdir) / "tensorboard" / stage if tensorboard and self._on else None
        self._tensorboard: Any = None
        self._wandb = _start_wandb(wandb, Path(workdir), stage) if wandb is not None and self._on else None
        if self._on:
            self._repair_and_open(keep_up_to=None)

    def write(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Append one line for `step` (non-decreasing): numbers, numpy or jax scalars, by the names of the metrics.

        A NaN or infinity is written as it is and announced by a warning the first time a name shows one.
        """
        values = {name: _number(name, value) for name, value in scalars.items()}
        if step < self._last_step:
            raise ValueError(f"metrics of {self.stage}: step {step} after step {self._last_step}; rewind() first")
        self._last_step = step
        for name, value in values.items():
            if not math.isfinite(value) and name not in self._warned:
                self._warned.add(name)
                logger.warning("METRIC %s of %s is %s at step %d", name, self.stage, value, step)
        if self._file is None:
            return
        line = json.dumps({"step": step, **values, "time/unix": round(time.time(), 3)}) + "\n"
        self._append(line.encode())
        if self._tensorboard is None and self._tensorboard_folder is not None:
            self._open_tensorboard(purge_step=None)
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({f"{self.stage}/{name}": value for name, value in values.items()}, step=step)
        if time.monotonic() - self._synced > _FSYNC_EVERY_S:
            self.flush()

    def rewind(self, step: int) -> None:
        """Drop everything written for steps after `step` (-1: everything), atomically, in JSONL and TensorBoard.

        wandb's history cannot be taken back: steps that it has seen keep their first values.
        """
        self._last_step = -1
        if self._on:
            self._repair_and_open(keep_up_to=step)
            if self._tensorboard_folder is not None and self._tensorboard_folder.exists():
                self._open_tensorboard(purge_step=step + 1)

    def flush(self) -> None:
        """Bring everything to the disk; called with each checkpoint, and by itself every half minute."""
        self._synced = time.monotonic()
        if self._file is not None:
            os.fsync(self._file)
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def close(self) -> None:
        """Flush and close; further writes are an error."""
        self.flush()
        if self._file is not None:
            os.close(self._file)
            self._file = None
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None
        self._tensorboard_folder = None
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, line: bytes) -> None:
        """One write() of a whole line into an O_APPEND file: a SIGKILL leaves at most one torn line, the last."""
        assert self._file is not None
        try:
            if os.write(self._file, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise InputError(
                f"cannot write {self.path}: {error.strerror or error}; free some space and start the same command again"
            ) from error

    def _repair_and_open(self, keep_up_to: int | None) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                lines, clean = _whole_lines(self.path)
                kept = [line for line, row in lines if keep_up_to is None or row["step"] <= keep_up_to]
                if not clean or len(kept) < len(lines):
                    write_atomically(self.path, "".join(kept).encode())
                if kept:
                    self._last_step = json.loads(kept[-1])["step"]
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            raise InputError(
                f"cannot write {self.path}: {error.strerror or error}; choose another --workdir"
            ) from error

    def _open_tensorboard(self, purge_step: int | None) -> None:
        from tensorboardX import SummaryWriter  # slow to import, and not everyone wants it

        if self._tensorboard is not None:
            self._tensorboard.close()
        # tensorboardX names its file by the second: a run resumed within that second would overwrite it.
        suffix = f".{os.getpid()}.{time.time_ns()}"
        self._tensorboard = SummaryWriter(str(self._tensorboard_folder), purge_step=purge_step, filename_suffix=suffix)


def metrics_file(workdir: str | os.PathLike[str], stage: str) -> Path:
    """Where the scalars of a stage stand."""
    return Path(workdir) / "metrics" / f"{stage}.jsonl"


def read_metrics(path: str | os.PathLike[str], *, wall_clock: bool = True) -> list[dict[str, Any]]:
    """The lines of a metrics file in order, without a torn last one, and without clock fields if not `wall_clock`.

    Raises InputError naming file and line if another line is damaged.
    """
    rows = [row for _, row in _whole_lines(Path(path))[0]]
    return rows if wall_clock else [{k: v for k, v in row.items() if not is_wall_clock(k)} for row in rows]


def _whole_lines(path: Path) -> tuple[list[tuple[str, dict[str, Any]]], bool]:
    """Every complete line with its content, and whether the file held nothing else."""
    content = path.read_bytes().decode("utf-8", errors="replace")
    lines = content.splitlines(keepends=True)
    whole: list[tuple[str, dict[str, Any]]] = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int) or not line.endswith("\n"):
                raise ValueError("not a line of metrics")
        except ValueError as error:
            if number == len(lines):
                return whole, False
            raise InputError(f"{path}, line {number} is damaged: delete that line and start again") from error
        whole.append((line, row))
    return whole, True


def _number(name: str, value: Any) -> int | float:
    if isinstance(value, bool | int | float) and not isinstance(value, np.generic):
        return int(value) if isinstance(value, bool) else value
    array = np.asarray(value)
    if array.size != 1 or (array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16"):
        raise ValueError(f"metric {name} is not a scalar: shape {array.shape}, dtype {array.dtype}")
    scalar = array.reshape(()).item() if array.dtype.kind in "biuf" else float(array.reshape(()))
    return int(scalar) if isinstance(scalar, bool) else scalar


def _start_wandb(settings: Mapping[str, Any], workdir: Path, stage: str) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise InputError(
            "the config asks for wandb, which is not installed: pip install wandb, or leave config.wandb empty"
        ) from error
    # One id for a workdir and stage: a resumed run goes on in the same wandb run.
    identity = hashlib.sha256(f"{workdir.absolute()}:{stage}".encode()).hexdigest()[:16]
    return wandb.init(**{"id": identity, "resume": "allow", "dir": str(workdir), "name": stage, **settings})


# --- samples ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SampleResponse:
    """One response of a group with its rewards. `model`: "student", or the teacher's name."""

    model: str
    text: str
    similarity: float | None = None
    answer: float | None = None
    judge: str = ""  # the judge's words
    advantage: float | None = None


@dataclass(frozen=True)
class Sample:
    """One question of a table of samples. `images`: encoded bytes (PNG, JPEG, ...) or PIL images."""

    id: str
    question: str
    solution: str
    images: Sequence[bytes | PIL.Image.Image] = ()
    responses: Sequence[SampleResponse] = field(default_factory=tuple)


class SampleTable:
    """Every `every` steps a table of samples of one stage; only process 0 writes."""

    def __init__(self, workdir: str | os.PathLike[str], stage: str, *, every: int) -> None:
        self.stage = stage
        self.every = every
        self._root = Path(workdir) / "samples"
        self._folder = self._root / stage
        self._on = processes.is_first()

    def due(self, step: int) -> bool:
        """Whether a table is wanted after this step; every=0 turns tables off."""
        return self.every > 0 and step % self.every == 0

    def write(self, step: int, samples: Sequence[Sample]) -> Path | None:
        """Write the table of `step` atomically and return its path; an image file is written once, named by content."""
        if not self._on:
            return None
        rows = []
        for sample in samples:
            images = [_store_image(self._root / "images", image) for image in sample.images]
            rows.append(
                {
                    "id": sample.id,
                    "question": sample.question,
                    "solution": sample.solution,
                    "images": [f"images/{name}" for name in images],
                    "responses": [asdict(response) for response in sample.responses],
                }
            )
        table = {"stage": self.stage, "step": step, "samples": rows}
        path = self._folder / f"step_{step:06d}.json"
        write_atomically(path, (json.dumps(table, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "replace"))
        return path

    def rewind(self, step: int) -> None:
        """Delete the tables of later steps, for a run that goes on from `step`."""
        for path in self._folder.glob("step_*.json") if self._on else ():
            if int(path.stem.removeprefix("step_")) > step:
                path.unlink()


def _store_image(folder: Path, image: bytes | PIL.Image.Image) -> str:
    if isinstance(image, bytes):
        data = image
        kind = {b"\x89P": "png", b"\xff\xd8": "jpg"}.get(image[:2])
        if kind is None:  # what not every browser shows is stored as PNG
            data, kind = _png(PIL.Image.open(io.BytesIO(image))), "png"
    else:
        data, kind = _png(image), "png"
    name = f"{hashlib.sha256(data).hexdigest()[:24]}.{kind}"
    if not (folder / name).exists():
        write_atomically(folder / name, data)
    return name


def _png(image: PIL.Image.Image) -> bytes:
    buffer = io.BytesIO()
    (image if image.mode in ("RGB", "L", "RGBA", "P", "1") else image.convert("RGB")).save(buffer, format="PNG")
    return buffer.getvalue()
