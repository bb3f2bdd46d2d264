"""The files of benchmarks as they are published: VLMEvalKit's TSV, and MM-Vet v2's JSON with its folder of images.

A TSV has a row a question: `index`, `image` (base64, a list of such, or the index of the row that has it) or
`image_path`, `question`, `A` to `Z` where there are options, `answer`, and what else its benchmark knows (`hint`,
`category`, `l2-category`, `split`, ...). Images may fill many gigabytes, so they are read when a row is asked about.
"""

from __future__ import annotations

import ast
import base64
import binascii
import csv
import functools
import hashlib
import json
import string
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ril_jax.errors import InputError
from ril_jax.models.digest import file_ends

LETTERS = string.ascii_uppercase
_MOST_INDEX = 64  # characters: a longer `image` is an image, as VLMEvalKit has it
_EMPTY = ("", "nan", "NaN")  # what pandas reads and writes as no value


@dataclass(frozen=True)
class Row:
    """One question: its fields that are not empty, and the numbers of its images; `where` names file and row."""

    index: str
    fields: Mapping[str, str]
    where: str
    part: str = ""  # of which file of its benchmark: the name without its ending
    num_images: int = 1

    @property
    def key(self) -> str:
        return f"{self.part}/{self.index}"

    @property
    def options(self) -> dict[str, str]:
        """Letter -> text, in the order of letters."""
        return {letter: self.fields[letter] for letter in LETTERS if letter in self.fields}

    def get(self, name: str, default: str = "") -> str:
        return self.fields.get(name, default)

    def need(self, name: str) -> str:
        """A field that its benchmark cannot do without. Raises InputError where it is empty."""
        if name not in self.fields:
            raise InputError(f"{self.where} has no `{name}`; give the file as it is published")
        return self.fields[name]


@dataclass
class RowFile:
    """The questions of one file; `read` gives their images."""

    path: Path
    rows: list[Row]
    _refers: dict[str, str] = field(default_factory=dict)  # index -> the index that has its image

    @classmethod
    def open(cls, path: Path) -> RowFile:
        """Every row without its images. Raises InputError for a file that is not of the form."""
        if path.suffix == ".json":
            return cls(path, [row for row, _ in _read_json(path)])
        rows, refers, seen = [], {}, set()
        for number, record in _records(path):
            where = f"{path}, row {number}"
            index = record.get("index", "").strip()
            if not index:
                raise InputError(f"{where} has no `index`; give the file as it is published")
            if index in seen:
                raise InputError(f"{where}: the index {index} came before; give every row one of its own")
            seen.add(index)
            image = record.pop("image", "")
            if image and len(image) <= _MOST_INDEX and not image.startswith("["):
                refers[index] = image
            count = len(_texts(image)) if image else len(_texts(record.get("image_path", "")))
            rows.append(Row(index, record, where, path.stem, count))
        for index, other in refers.items():
            if other not in seen or other in refers:
                raise InputError(f"{path}: the image of {index} is that of {other}, which has none; download it again")
        if not rows:
            raise InputError(f"{path} holds no rows; download it again")
        counts = {row.index: row.num_images for row in rows}
        rows = [replace(row, num_images=counts[refers.get(row.index, row.index)]) for row in rows]
        return cls(path, rows, refers)

    def read(self, wanted: Callable[[Row], bool]) -> Iterator[tuple[Row, tuple[bytes, ...]]]:
        """(row, its encoded images) of the wanted rows, in order. Raises InputError where an image is not there."""
        asked = {row.index: row for row in self.rows if wanted(row)}
        if not asked:
            return
        if self.path.suffix == ".json":
            yield from ((row, images()) for row, images in _read_json(self.path) if row.index in asked)
            return
        lenders = {self._refers[index] for index in asked if index in self._refers}
        lent: dict[str, tuple[bytes, ...]] = {}
        if lenders:
            for number, record in _records(self.path):
                if record["index"].strip() in lenders:
                    lent[record["index"].strip()] = _images(record, self.path, number)
        for number, record in _records(self.path):
            index = record["index"].strip()
            if index in asked:
                other = self._refers.get(index)
                yield asked[index], lent[other] if other else _images(record, self.path, number)

    def digest(self) -> str:
        """What tells one file from another: size and both ends."""
        state = hashlib.blake2b(str(self.path.stat().st_size).encode(), digest_size=8)
        state.update(file_ends(self.path, 1 << 16))
        return state.hexdigest()


def _records(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(number from 1, fields that are not empty) of every row of a TSV."""
    csv.field_size_limit(sys.maxsize)
    try:
        with path.open(encoding="utf-8", errors="strict", newline="") as file:
            reader = csv.reader(file, delimiter="\t")
            names = next(reader, [])
            if "index" not in names or not {"image", "image_path"} & set(names):
                raise InputError(
                    f"{path} is no benchmark's TSV: its first line must name index and image (or image_path)"
                )
            for number, values in enumerate(reader, 1):
                if len(values) != len(names):
                    raise InputError(
                        f"{path}, row {number} has {len(values)} fields for {len(names)} names; download it again"
                    )
                yield number, {n: v for n, v in zip(names, values, strict=True) if v.strip() not in _EMPTY}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read ({' '.join(str(error).split())}); download it again") from error


def _images(record: Mapping[str, str], path: Path, number: int) -> tuple[bytes, ...]:
    where = f"{path}, row {number}"
    if "image" in record:
        return tuple(_decoded(text, where) for text in _texts(record["image"]))
    return tuple(_file_bytes(path.parent, name, where) for name in _texts(record.get("image_path", "")))


def _texts(value: str) -> list[str]:
    """A field that is one text, or a Python list of them."""
    value = value.strip()
    if not value.startswith("["):
        return [value] if value else []
    try:
        parts = ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError):
        return [value]
    return [str(part) for part in parts]


def _decoded(text: str, where: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{where}: `image` is not base64 ({error}); download the file again") from error


def _file_bytes(folder: Path, name: str, where: str) -> bytes:
    for path in (folder / name, folder / "images" / name):
        try:
            return path.read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise InputError(f"{where}: {path} cannot be read ({error.strerror})") from error
    raise InputError(f"{where}: there is no image {folder / name}; put the benchmark's images there")


def _read_json(path: Path) -> Iterator[tuple[Row, Callable[[], tuple[bytes, ...]]]]:
    """MM-Vet v2: {id: {question, answer, capability}}, where `<IMG>name.jpg` stands for an image of images/."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        for index, entry in content.items():
            parts = str(entry["question"]).split("<IMG>")
            names = [part for part in parts if part.lower().endswith((".jpg", ".jpeg", ".png"))]
            question = "".join("<image>" if part in names else part for part in parts)
            where = f"{path}, {index}"
            fields = {"question": question, "answer": str(entry["answer"]), "category": ",".join(entry["capability"])}
            row = Row(index, fields, where, path.stem, len(names))
            yield row, functools.partial(_all_files, path.parent, names, where)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not MM-Vet v2's mm-vet-v2.json ({' '.join(str(error).split())})") from error


def _all_files(folder: Path, names: list[str], where: str) -> tuple[bytes, ...]:
    return tuple(_file_bytes(folder, name, where) for name in names)
