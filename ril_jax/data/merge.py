"""Several data sets of responses become one: every question once, by its id, with everybody's responses.

The parts of one job that ran on many hosts (`shard-00000-of-00004`, ...) count as one data set.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

from ril_jax.data.records import Question, QuestionDataset, Response, is_tfds_folder, read_dataset
from ril_jax.errors import InputError

MISSING = ("refuse", "keep", "drop")
_PART = re.compile(r"shard-(\d+)-of-(\d+)")
_FIELDS = ("prompt", "images", "solution")  # what must be the same wherever a question's id stands


class Concatenation(Sequence[Question]):
    """Data sets one after the other as one, `folder` its name in messages."""

    def __init__(self, folder: Path, parts: Sequence[Sequence[Question]]):
        self.folder = folder
        self._places = [(part, i) for part in parts for i in range(len(part))]

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Question: ...
    @overload
    def __getitem__(self, index: slice) -> list[Question]: ...
    def __getitem__(self, index: int | slice) -> Question | list[Question]:
        if isinstance(index, slice):
            return [part[i] for part, i in self._places[index]]
        part, i = self._places[index]
        return part[i]


def open_responses(folder: str | os.PathLike[str]) -> QuestionDataset | Concatenation:
    """A data set, or all parts of one that `python -m ril_jax.generate --shard=i/n` left in `folder`.

    Raises InputError where it is unfinished, or a part is missing.
    """
    folder = Path(folder)
    parts = {path: match for path in part_folders(folder) if (match := _PART.fullmatch(path.name))}
    if not parts or is_tfds_folder(folder):
        return _open_finished(folder)
    counts = sorted({int(match[2]) for match in parts.values()})
    if len(counts) > 1:
        raise InputError(f"{folder} holds parts of {counts[0]} and of {counts[1]}; keep those of one job")
    absent = sorted(set(range(counts[0])) - {int(match[1]) for match in parts.values()})
    if absent:
        raise InputError(
            f"{folder} lacks {len(absent)} of its {counts[0]} parts, such as shard-{absent[0]:05d}-of-{counts[0]:05d}; "
            f"run --shard={absent[0]}/{counts[0]}, or copy it here"
        )
    _check_one_job(list(parts))
    return Concatenation(folder, [_open_finished(path) for path in parts])


def part_folders(folder: str | os.PathLike[str]) -> list[Path]:
    """The folders of a job's parts in `folder`, in order."""
    folder = Path(folder)
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if path.is_dir() and _PART.fullmatch(path.name))


def part_name(number: int, count: int) -> str:
    """The folder of part `number` of `count`."""
    return f"shard-{number:05d}-of-{count:05d}"


def parse_shard(text: str | None) -> tuple[int, int]:
    """(i, n) of "i/n"; (0, 1) for none. Raises InputError for anything else."""
    if not text:
        return 0, 1
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise InputError(f"--shard={text} is no part: write i/n, with i from 0 to n - 1, such as 0/4")
    return int(match[1]), int(match[2])


def _check_one_job(parts: Sequence[Path]) -> None:
    """Raises InputError where the parts are of jobs that differ in more than which part they are."""
    jobs = [(path, json.loads((path / "job.json").read_text())) for path in parts if (path / "job.json").exists()]
    for path, job in jobs[1:]:
        first, expected = jobs[0]
        for field in sorted(expected.keys() | job.keys()):
            if field not in ("shard", "rows") and job.get(field) != expected.get(field):
                raise InputError(
                    f"{path} is of another job than {first}: {field} is {job.get(field)!r} and not "
                    f"{expected.get(field)!r}; keep the parts of one"
                )


def _open_finished(folder: Path) -> QuestionDataset:
    if (folder / "job.json").exists() and not is_tfds_folder(folder):
        raise InputError(f"{folder} is not finished; start its job again, with the command that began it")
    return read_dataset(folder)


class MergedResponses:
    """What `merge_responses` gives: its questions, read when they are iterated over, as often as one likes.

    Attributes: `models`, in the order in which they were met; `missing`: of every question that lacks responses, the
    models that gave it none; `num_overlong`: responses that were left out because they were cut off.
    """

    def __init__(self, datasets: Sequence[Sequence[Question]], *, missing: str = "refuse", drop_overlong: bool = False):
        self._datasets, self._drop_overlong = datasets, drop_overlong
        indices = [_index(dataset, number, drop_overlong) for number, dataset in enumerate(datasets)]
        ids = dict.fromkeys(id_ for index in indices for id_ in index)
        for id_ in ids:
            _check_same_question(id_, datasets, indices)
        _check_different_responses(datasets, indices)
        self.models = list(dict.fromkeys(m for index in indices for place in index.values() for m in place.all_models))
        self.num_overlong = sum(place.num_overlong for index in indices for place in index.values())
        self.missing: dict[str, list[str]] = {}
        for id_ in ids:
            given = {model for index in indices if id_ in index for model in index[id_].models}
            if lacking := [model for model in self.models if model not in given]:
                self.missing[id_] = lacking
        if self.missing and missing == "refuse":
            raise InputError(_words_of_missing(self.missing, len(ids)))
        kept = [id_ for id_ in ids if missing != "drop" or id_ not in self.missing]
        self._places = {id_: [index[id_].position if id_ in index else -1 for index in indices] for id_ in kept}

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Question]:
        for places in self._places.values():
            found = [dataset[i] for dataset, i in zip(self._datasets, places, strict=True) if i >= 0]
            responses = tuple(r for question in found for r in question.responses if self._keeps(r))
            yield replace(found[0], responses=responses, extra=_joined_extra(found))

    def _keeps(self, response: Response) -> bool:
        return not (self._drop_overlong and response.finish_reason == "length")


def merge_responses(
    datasets: Sequence[Sequence[Question]], *, missing: str = "refuse", drop_overlong: bool = False
) -> MergedResponses:
    """Join several teachers' data sets by id, in the order in which ids are first met.

    A data set may hold its questions in any order, and responses of several models. `missing` says what becomes of a
    question to which a model gave no response: "refuse" all, "keep" it, or "drop" it. With `drop_overlong` responses
    that were cut off are left out first. Everything is checked before the first question is returned; one question a
    data set is held at a time.

    Raises InputError if an id comes twice in one data set or stands for different questions, if two data sets hold the
    same responses, or if responses are missing.
    """
    if not datasets:
        raise InputError("merge_responses was given no data set; give at least one")
    if missing not in MISSING:
        raise InputError(f"missing={missing!r} is not known; use one of {', '.join(MISSING)}")
    return MergedResponses(datasets, missing=missing, drop_overlong=drop_overlong)


@dataclass(frozen=True)
class _Place:
    """What is known of a question in one data set; digests of each of _FIELDS, and of its responses."""

    position: int
    fields: tuple[bytes, ...]
    responses: bytes
    all_models: tuple[str, ...]
    models: tuple[str, ...]  # those with a response that is kept
    num_overlong: int


def _index(dataset: Sequence[Question], number: int, drop_overlong: bool) -> dict[str, _Place]:
    index: dict[str, _Place] = {}
    for position in range(len(dataset)):
        question = dataset[position]
        if question.id in index:
            raise InputError(
                f"{_label(dataset, number)}: question id {question.id!r} comes twice; "
                "write it again with an id of its own for every question"
            )
        cut = [r for r in question.responses if drop_overlong and r.finish_reason == "length"]
        index[question.id] = _Place(
            position,
            tuple(_digest(getattr(question, field)) for field in _FIELDS),
            _digest([(r.model, r.text) for r in question.responses]) if question.responses else b"",
            tuple(dict.fromkeys(r.model for r in question.responses)),
            tuple(dict.fromkeys(r.model for r in question.responses if r not in cut)),
            len(cut),
        )
    return index


def _check_same_question(id_: str, datasets: Sequence[Sequence[Question]], indices: list[dict[str, _Place]]) -> None:
    holders = [number for number, index in enumerate(indices) if id_ in index]
    first = holders[0]
    for other in holders[1:]:
        pairs = zip(_FIELDS, indices[first][id_].fields, indices[other][id_].fields, strict=True)
        if changed := [field for field, one, two in pairs if one != two]:
            raise InputError(
                f"{_label(datasets[other], other)} asks another question than {_label(datasets[first], first)} under "
                f"the id {id_!r} (it differs in {' and '.join(changed)}); collect both from the same questions"
            )


def _check_different_responses(datasets: Sequence[Sequence[Question]], indices: list[dict[str, _Place]]) -> None:
    """Two data sets with equal responses are one that is named twice (under another path, say)."""
    for two in range(len(indices)):
        for one in range(two):
            common = [id_ for id_ in indices[one].keys() & indices[two].keys() if indices[one][id_].responses]
            if common and all(indices[one][id_].responses == indices[two][id_].responses for id_ in common):
                raise InputError(
                    f"{_label(datasets[two], two)} holds the same responses as {_label(datasets[one], one)}; "
                    "name every data set once"
                )


def _words_of_missing(missing: dict[str, list[str]], total: int) -> str:
    model = next(iter(missing.values()))[0]
    ids = [id_ for id_, models in missing.items() if model in models]
    named = ", ".join(ids[:10]) + (", ..." if len(ids) > 10 else "")
    return (
        f"{model} has no response to {len(ids)} of the {total} questions: {named}; finish its collection, or leave "
        "such questions out by --missing=drop, or as they are by --missing=keep"
    )


def _joined_extra(questions: Sequence[Question]) -> str:
    """The further columns of all data sets; where they differ, those of the first."""
    if len({question.extra for question in questions}) == 1:
        return questions[0].extra
    joined: dict[str, Any] = {}
    for question in reversed(questions):
        joined |= json.loads(question.extra)
    return json.dumps(joined, ensure_ascii=False, sort_keys=True)


def _digest(value: Any) -> bytes:
    state = hashlib.blake2b(digest_size=12)
    for part in value if isinstance(value, tuple | list) else [value]:
        data = part if isinstance(part, bytes) else repr(part).encode("utf-8", "surrogatepass")
        state.update(len(data).to_bytes(8, "little") + data)
    return state.digest()


def _label(dataset: Sequence[Question], number: int) -> str:
    return str(getattr(dataset, "folder", f"data set {number}"))
