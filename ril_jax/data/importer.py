"""From a user's JSONL, parquet or TFDS questions to our data set: every row is checked, none is silently changed.

Reading a row, checking it (`check_row`) and writing it are three steps; the middle one runs in threads, because
decoding every image once is what takes the time. Rows keep the order of the input.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from ril_jax.data import records
from ril_jax.data.records import Question
from ril_jax.data.rows import Refusal, Row, check_row
from ril_jax.data.threads import map_in_threads
from ril_jax.errors import InputError

_SUFFIXES = {".jsonl": "JSONL", ".ndjson": "JSONL", ".parquet": "parquet"}


@dataclass(frozen=True)
class Summary:
    """What an import did: counts, and where it went."""

    output: Path
    written: int
    images: int
    refused: int
    seconds: float

    def __str__(self) -> str:
        text = f"wrote {self.written:,} questions with {self.images:,} images to {self.output} in {self.seconds:.1f} s"
        if self.refused:
            text += f"; refused {self.refused:,} rows, listed in {self.output / records.REFUSED_FILE}"
        return text


def import_questions(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    name: str | None = None,
    split: str = "train",
    strict: bool = False,
    overwrite: bool = False,
    num_threads: int | None = None,
    log: TextIO | None = None,
) -> Summary:
    """Check every row of `source` (a file, a folder of files, a TFDS folder) and write the good ones to `output`.

    Refused rows are listed on `log` (stderr by default) as they are met, and in `output`/refused.jsonl. `split`
    applies to TFDS input; `name` is the new data set's (default: the output folder's). Raises InputError, with nothing
    written, if the input is unusable, no row is good, or `strict` and one is refused.
    """
    log = log or sys.stderr
    start = time.monotonic()
    output = Path(output)
    rows = read_rows(source, split)
    progress = _Progress(log)
    first_seen: dict[str, str] = {}
    num_images = num_rows = num_refused = 0
    with records.DatasetWriter(output, name=name or output.name, overwrite=overwrite) as writer:
        for row, result in map_in_threads(check_row, rows, num_threads=num_threads or min(8, os.cpu_count() or 1)):
            num_rows += 1
            here = f"{row.file}:{row.number}"
            if isinstance(result, Question) and result.id in first_seen:
                reason = f"duplicate id, first used at {first_seen[result.id]}; give every row an id of its own"
                result = Refusal(result.id, row.file, row.number, reason)
            if isinstance(result, Question):
                first_seen[result.id] = here
                writer.add(result)
                num_images += len(result.images)
            else:
                num_refused += 1
                progress.print_line(f"refused {here} (id {result.id}): {result.reason}")
                with open(writer.staging / records.REFUSED_FILE, "a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(result), ensure_ascii=True) + "\n")
            progress.update(row.progress, num_rows, num_refused)
        progress.finish(num_rows, num_refused)
        if not num_rows:
            raise InputError(f"{source} holds no rows; nothing was written")
        if not writer.count:
            raise InputError(f"{source}: none of its {num_rows:,} rows can be used; nothing was written")
        if strict and num_refused:
            raise InputError(f"{source}: {num_refused:,} of {num_rows:,} rows are refused; strict: nothing was written")
    return Summary(output, writer.count, num_images, num_refused, time.monotonic() - start)


def read_rows(
    source: str | os.PathLike[str], split: str = "train", *, wanted: Callable[[int], bool] = lambda index: True
) -> Iterator[Row]:
    """The rows of a JSONL or parquet file, of a folder of them (its subfolders too, by name), or of a TFDS folder.

    Those at whose place among all rows, from 0, `wanted` is true; the others are passed over as cheaply as the form
    allows. What is wrong with one row becomes its `error`; InputError means that a file as a whole cannot be used.
    """
    source, files = _open(source)
    if not files:
        return _tfds_rows(source, split, wanted)
    return _file_rows(files, source if source.is_dir() else source.parent, wanted)


def count_rows(source: str | os.PathLike[str], split: str = "train") -> int:
    """How many rows `read_rows` gives; raises as it does."""
    source, files = _open(source)
    if not files:
        return len(records.RawExamples(source, split))
    return sum(_count_parquet(path) if _is_parquet(path) else sum(1 for _ in _jsonl_lines(path)) for path in files)


def repeated_ids(source: str | os.PathLike[str], split: str = "train") -> dict[int, str]:
    """Of rows whose id stands in an earlier row: their places among all rows, and the id.

    None of a TFDS data set, which was checked when it was written. Raises as `read_rows` does.
    """
    source, files = _open(source)
    seen: set[str] = set()
    repeated: dict[int, str] = {}
    root = source if source.is_dir() else source.parent
    for row in _file_rows(files, root, lambda index: True, only="id") if files else ():
        id_ = str((row.fields or {}).get("id", row.default_id))
        if id_ in seen:
            repeated[row.index] = id_
        seen.add(id_)
    return repeated


def input_files(source: str | os.PathLike[str]) -> list[Path]:
    """The files that `read_rows` reads, in its order; not the images that they name."""
    source, files = _open(source)
    return files or sorted(path for path in source.iterdir() if path.is_file() and ".array_record" in path.name)


# ---- reading


def _open(source: str | os.PathLike[str]) -> tuple[Path, list[Path]]:
    """The source, and its files; none where it is a TFDS data set."""
    source = Path(source)
    if not source.exists():
        raise InputError(f"{source} does not exist; name a .jsonl or .parquet file, or a folder of them")
    if source.is_dir() and records.is_tfds_folder(source):
        return source, []
    files = _files_of(source) if source.is_dir() else [source]
    if files[0].suffix.lower() not in _SUFFIXES:
        raise InputError(f"{source} is neither .jsonl nor .parquet; convert it, or give it the suffix of what it holds")
    return source, files


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def _files_of(folder: Path) -> list[Path]:
    def is_input(path: Path) -> bool:
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        return path.suffix.lower() in _SUFFIXES and path.is_file() and not hidden

    # Beside a TFDS data set lies its own list of refused rows, which is no input.
    files = sorted(p for p in folder.rglob("*") if is_input(p) and not records.is_tfds_folder(p.parent))
    if not files:
        raise InputError(f"{folder} holds no .jsonl and no .parquet file, and is no TFDS data set; name another folder")
    return files


def _file_rows(
    files: list[Path], root: Path, wanted: Callable[[int], bool], *, only: str | None = None
) -> Iterator[Row]:
    """only: a column; where the form allows it, the others are not read."""
    labels = [path.relative_to(root).with_suffix("").as_posix() for path in files]
    labels = [
        label if labels.count(label) == 1 else path.relative_to(root).as_posix()
        for label, path in zip(labels, files, strict=True)
    ]
    sizes = [path.stat().st_size for path in files]
    total = max(1, sum(sizes))
    index = -1
    for number, (path, label) in enumerate(zip(files, labels, strict=True)):
        reader = functools.partial(_parquet_values, only=only) if _is_parquet(path) else _jsonl_values
        file = path.relative_to(root).as_posix()
        for row_number, share, read in reader(path):
            index += 1
            if not wanted(index):
                continue
            value = read()
            yield Row(
                file=file,
                number=row_number,
                default_id=f"{label}-{row_number}",
                folder=path.parent,
                progress=(sum(sizes[:number]) + sizes[number] * share) / total,
                fields=value if isinstance(value, dict) else None,
                error=value if isinstance(value, str) else "",
                index=index,
            )


_Value = dict[str, Any] | str  # of a row: its fields, or what is wrong with it


def _jsonl_values(path: Path) -> Iterator[tuple[int, float, Callable[[], _Value]]]:
    size = max(1, path.stat().st_size)
    for number, done, line in _jsonl_lines(path):
        yield number, done / size, functools.partial(_parse_line, line)


def _jsonl_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(its number from 1, bytes read up to its end, the line) of every line that is not blank."""
    try:
        with open(path, "rb") as file:
            done = 0
            for number, line in enumerate(file, start=1):
                done += len(line)
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")  # the byte-order mark that some editors write
                if line.strip():
                    yield number, done, line
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def _parse_line(line: bytes) -> dict[str, Any] | str:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"the line is not UTF-8 (byte {error.start}); save the file as UTF-8"
    except json.JSONDecodeError as error:
        return f"not valid JSON: {error.msg} at column {error.colno}; write one JSON object a line"
    except RecursionError:
        return "not usable JSON: it is nested too deeply"
    if not isinstance(value, dict):
        return f"the line holds {_kind(value)} where a JSON object is needed; write one JSON object a line"
    return value


def _parquet_values(path: Path, only: str | None = None) -> Iterator[tuple[int, float, Callable[[], _Value]]]:
    with _parquet_file(path) as file:
        names = file.schema_arrow.names
        if "prompt" not in names:
            raise InputError(f"{path} has no column `prompt`, only {', '.join(names)}; rename the column that holds it")
        total = file.metadata.num_rows
        number = 0
        columns = None if only is None else [only if only in names else names[0]]
        for batch in file.iter_batches(batch_size=32, columns=columns):
            rows = functools.cache(batch.to_pylist)
            for i in range(batch.num_rows):
                number += 1
                yield number, number / total, functools.partial(_row_of, rows, i)


def _row_of(rows: Callable[[], list[dict[str, Any]]], i: int) -> dict[str, Any]:
    return rows()[i]


def _count_parquet(path: Path) -> int:
    with _parquet_file(path) as file:
        return file.metadata.num_rows


@contextlib.contextmanager
def _parquet_file(path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read as parquet ({_line(error)}); write or copy it again") from error


def _tfds_rows(folder: Path, split: str, wanted: Callable[[int], bool]) -> Iterator[Row]:
    examples = records.RawExamples(folder, split)
    for index in filter(wanted, range(len(examples))):
        fields = dict(examples[index])
        responses = fields.get("responses")
        if isinstance(responses, dict):  # TFDS keeps a sequence of structs as a struct of sequences
            fields["responses"] = [
                dict(zip(responses, values, strict=True)) for values in zip(*responses.values(), strict=True)
            ]
        yield Row(
            file=folder.name,
            number=index + 1,
            default_id=f"{folder.name}-{index + 1}",
            folder=folder,
            progress=(index + 1) / len(examples),
            fields=fields,
            index=index,
        )


# ---- running


class _Progress:
    """Rows, rate and ETA on a stream: a line that is drawn over on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, log: TextIO):
        self._log = log
        self._is_terminal = log.isatty()
        self._start = time.monotonic()
        self._next = self._start + (0.2 if self._is_terminal else 10.0)

    def update(self, share: float, num_rows: int, num_refused: int) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + (0.2 if self._is_terminal else 10.0)
        elapsed = now - self._start
        remaining = elapsed * (1 - share) / share if share else 0.0
        text = (
            f"{num_rows:,} rows checked ({share:.0%}), {num_refused:,} refused, {num_rows / elapsed:,.0f} rows/s, "
            f"ETA {int(remaining // 60)}:{int(remaining % 60):02d}"
        )
        self._log.write(f"\r\x1b[K{text}" if self._is_terminal else f"{text}\n")
        self._log.flush()

    def print_line(self, text: str) -> None:
        self._log.write(f"\r\x1b[K{text}\n" if self._is_terminal else f"{text}\n")

    def finish(self, num_rows: int, num_refused: int) -> None:
        elapsed = max(time.monotonic() - self._start, 1e-9)
        self.print_line(f"{num_rows:,} rows checked, {num_refused:,} refused, {num_rows / elapsed:,.0f} rows/s")


def _kind(value: Any) -> str:
    if value is None:
        return "nothing (null)"
    if isinstance(value, float) and value != value:
        return "not a number"
    names = {bool: "true or false", str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), f"of type {type(value).__name__}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
