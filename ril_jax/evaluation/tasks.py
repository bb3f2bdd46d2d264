"""A benchmark with its rows: which files were found, which rows count, and the questions that they become."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ril_jax.data.records import Question
from ril_jax.errors import InputError
from ril_jax.evaluation.benchmark import Benchmark, Part
from ril_jax.evaluation.rows import Row, RowFile


@dataclass(frozen=True)
class Task:
    """A benchmark and the rows that are asked, in the order of its files."""

    benchmark: Benchmark
    files: tuple[RowFile, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @classmethod
    def open(cls, benchmark: Benchmark, folder: Path, *, limit: int = 0) -> Task:
        """limit: the first so many questions of each file, with all their rotations; 0 for all.

        Raises InputError where a file is missing or wrong, or a row can be neither asked nor scored.
        """
        files, rows, notes = [], [], []
        for names in benchmark.files:
            found = next((folder / name for name in names if (folder / name).is_file()), None)
            if found is None and len(benchmark.files) == 1:
                raise InputError(
                    f"--data={folder} has no {' or '.join(names)}; put it there, or leave {benchmark.name} out of "
                    "--benchmarks"
                )
            if found is None:
                notes.append(f"without {names[0]}, which is not in {folder}")
                continue
            file = RowFile.open(found)
            counted = [row for row in file.rows if benchmark.counts(row)]
            groups = list(dict.fromkeys(benchmark.group(row) for row in counted))
            kept = set(groups[:limit] if limit else groups)
            files.append(file)
            rows += [row for row in counted if benchmark.group(row) in kept]
            if benchmark.split and len(counted) < len(file.rows):
                notes.append(f"split {benchmark.split} of {found.name}")
            if limit and limit < len(groups):
                notes.append(f"the first {limit:,} of {len(groups):,} questions of {found.name}")
        if not rows:
            needed = " and ".join(names[0] for names in benchmark.files)
            raise InputError(
                f"--data={folder} has no rows for {benchmark.name} ({needed}); put the file there, or leave "
                f"{benchmark.name} out of --benchmarks"
            )
        for row in rows:
            benchmark.prompt(row)
            benchmark.answer(row)
        return cls(benchmark, tuple(files), tuple(rows), tuple(notes))

    @property
    def name(self) -> str:
        return self.benchmark.name

    def key(self, row: Row) -> str:
        """Among the rows of all benchmarks."""
        return f"{self.name}/{row.key}"

    def digest(self) -> str:
        """Of the files, and of every prompt whatever the limit."""
        state = hashlib.blake2b(digest_size=8)
        for file in self.files:
            state.update(file.digest().encode())
            for row in file.rows:
                if self.benchmark.counts(row):
                    state.update(json.dumps([row.key, self.benchmark.prompt(row)]).encode())
        return state.hexdigest()

    def questions(self, wanted: Callable[[Row], bool]) -> Iterator[Question]:
        """The wanted rows as questions, with their images."""
        rows = {row.key for row in self.rows}
        for file in self.files:
            for row, images in file.read(lambda row: row.key in rows and wanted(row)):
                parts = self.benchmark.prompt(row)
                used = tuple(images[part] for part in parts if isinstance(part, int))
                yield Question(self.key(row), prompt_json(parts), used, self.benchmark.answer(row))


def prompt_json(parts: list[Part]) -> str:
    """A prompt as the JSON of one user message."""
    content = [{"type": "image"} if isinstance(part, int) else {"type": "text", "text": part} for part in parts]
    return json.dumps([{"role": "user", "content": content}], ensure_ascii=False)


def messages_json(messages: list[dict[str, str]]) -> str:
    """Messages of text as JSON, where `<image>` in a text is text."""
    turns: list[dict[str, Any]] = [
        {"role": message["role"], "content": [{"type": "text", "text": message["content"]}]} for message in messages
    ]
    return json.dumps(turns, ensure_ascii=False)


def prompt_text(parts: list[Part]) -> str:
    """A prompt for people."""
    return "".join(f"<image {part + 1}>" if isinstance(part, int) else part for part in parts)


def thumbnail(data: bytes, name: str, side: int = 360) -> str:
    """A data URL of an image, made small."""
    from ril_jax.data.images import decode_image

    image = decode_image(data, name=name)
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
