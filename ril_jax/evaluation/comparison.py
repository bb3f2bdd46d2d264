"""Result folders side by side, over the questions that all of them answered: scores, flips, lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ril_jax.errors import InputError
from ril_jax.evaluation.benchmarks import BENCHMARKS
from ril_jax.evaluation.results import Sample, read_results, read_samples
from ril_jax.evaluation.rows import LETTERS
from ril_jax.evaluation.statistics import bootstrap_interval
from ril_jax.evaluation.table import aligned

_WIDTH = 100  # characters of a line in the terminal's tables


@dataclass(frozen=True)
class Side:
    """One folder: its letter in tables, what it is called where there is room, and its numbers by benchmark."""

    letter: str
    label: str
    folder: Path
    numbers: dict[str, Any]


@dataclass(frozen=True)
class Flip:
    """A question whose score differs between the first folder and another one; samples of all folders, of one row."""

    group: str
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class Difference:
    """Of a folder to the first one, in a benchmark: points, their 95 % interval, and what flipped."""

    points: float
    interval: tuple[float, float]
    gained: list[Flip]
    lost: list[Flip]


@dataclass(frozen=True)
class Compared:
    """One benchmark. scores: of each side over the shared questions, in percent; differences: to the first side.

    lengths: tokens of every shared response, a list a side. data: the files that have the questions' images.
    """

    name: str
    title: str
    questions: int
    scores: list[float]
    differences: list[Difference]
    lengths: list[list[int]]
    cut_off: list[int]
    data: list[Path]
    notes: list[str]


def open_sides(folders: Sequence[Path]) -> list[Side]:
    """Two to 26 result folders, A to Z; their labels are the ends of their paths that tell them apart.

    Raises InputError where there are fewer or more, or one holds no results.
    """
    if len(folders) < 2:
        raise InputError("name two result folders or more: python -m ril_jax.compare A B")
    if len(folders) > len(LETTERS):
        raise InputError(f"{len(folders)} folders are named; compare {len(LETTERS)} at most")
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise InputError("one folder is named twice; name different ones")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return [
        Side(letter, "/".join(path.parts[-depth:]), folder, read_results(folder)["benchmarks"])
        for letter, path, folder in zip(LETTERS, paths, folders, strict=False)
    ]


def compare(sides: Sequence[Side], *, resamples: int = 1000) -> list[Compared]:
    """Every benchmark that all folders have a score of. Raises InputError where there is none."""
    shared = [name for name in BENCHMARKS if all(name in side.numbers for side in sides)]
    scored = [name for name in shared if all(side.numbers[name]["score"] is not None for side in sides)]
    if not scored:
        raise InputError(f"{' and '.join(side.label for side in sides)} have no scored benchmark in common")
    return [_compare(name, sides, resamples) for name in scored]


def _compare(name: str, sides: Sequence[Side], resamples: int) -> Compared:
    by_key = [{sample.key: sample for sample in read_samples(side.folder / name)} for side in sides]
    keys = [key for key in by_key[0] if all(key in samples for samples in by_key)]
    if not keys:
        raise InputError(f"{' and '.join(side.label for side in sides)} share no question of {name}")
    groups: dict[str, list[str]] = {}
    for key in keys:
        groups.setdefault(by_key[0][key].group, []).append(key)
    scores = np.array(
        [[min(samples[key].score or 0.0 for key in members) for members in groups.values()] for samples in by_key]
    )
    parts = np.array([group.partition("/")[0] for group in groups])
    most = max(len(samples) for samples in by_key)
    notes = [f"{len(keys):,} of {most:,} questions are in all folders"] if len(keys) < most else []
    differences = []
    for i in range(1, len(sides)):
        change = scores[i] - scores[0]
        split = [change[parts == part].tolist() for part in dict.fromkeys(parts.tolist())]
        low, high = bootstrap_interval(split, resamples=resamples)
        flips = {
            sign: [
                Flip(group, tuple(samples[_telling(members, by_key[0], by_key[i])] for samples in by_key))
                for (group, members), step in zip(groups.items(), change, strict=True)
                if np.sign(step) == sign
            ]
            for sign in (1, -1)
        }
        points = 100 * float(np.mean([np.mean(part) for part in split]))
        differences.append(Difference(points, (100 * low, 100 * high), flips[1], flips[-1]))
    per_part = [[scores[i][parts == part].mean() for part in dict.fromkeys(parts.tolist())] for i in range(len(sides))]
    return Compared(
        name,
        BENCHMARKS[name].title,
        len(groups),
        [100 * float(np.mean(values)) for values in per_part],
        differences,
        [[samples[key].tokens for key in keys] for samples in by_key],
        [sum(samples[key].finish == "length" for key in keys) for samples in by_key],
        [Path(path) for path in sides[0].numbers[name]["data"]],
        notes,
    )


def _telling(keys: Sequence[str], a: dict[str, Sample], b: dict[str, Sample]) -> str:
    """The first row of a question that the two answered with different scores."""
    return next((key for key in keys if a[key].score != b[key].score), keys[0])


def averages(compared: Sequence[Compared]) -> list[float]:
    """The mean score of each side over these benchmarks, each counting once, in percent."""
    return [float(np.mean(scores)) for scores in zip(*(c.scores for c in compared), strict=True)]


def terminal_text(sides: Sequence[Side], compared: Sequence[Compared], *, listed: int = 5) -> str:
    """Scores, differences with intervals, flips and lengths, and the first flipped questions of each benchmark.

    A legend tells what the letters of the columns stand for. Columns that would pass 100 characters go into a further
    table below.
    """
    lines = [f"{side.letter}  {side.label}" for side in sides]
    for table in _tables(sides, compared):
        lines += ["", *table]
    lines.append("")
    for c in compared:
        lines += [f"{c.title}: {note}" for note in c.notes]
        for side, d in zip(sides[1:], c.differences, strict=True):
            for word, flips in (("gained", d.gained), ("lost", d.lost)):
                shown = ", ".join(flip.samples[0].key for flip in flips[:listed])
                more = f" and {len(flips) - listed} more" if len(flips) > listed else ""
                if flips:
                    lines.append(f"{c.title}: {word} by {side.letter}: {shown}{more}")
    return "\n".join(lines).rstrip()


def _tables(sides: Sequence[Side], compared: Sequence[Compared]) -> list[list[str]]:
    """The lines of each table: columns that belong together stay together, and each table names the benchmarks."""
    means = averages(compared) if len(compared) > 1 else []
    names = ["benchmark", *(c.title for c in compared), *([f"average of {len(compared)}"] if means else [])]
    end = [""] if means else []
    groups = [[["questions", *(f"{c.questions:,}" for c in compared), *end]]]
    for i, side in enumerate(sides):
        scores = [*(c.scores[i] for c in compared), *([means[i]] if means else [])]
        groups.append([[side.letter, *(f"{score:.1f}" for score in scores)]])
    for i, side in enumerate(sides[1:]):
        told = [c.differences[i] for c in compared]
        gained, lost = [len(d.gained) for d in told], [len(d.lost) for d in told]
        points = [*(d.points for d in told), *([means[i + 1] - means[0]] if means else [])]
        groups.append(
            [
                [f"{side.letter} - {sides[0].letter}", *(f"{value:+.1f}" for value in points)],
                ["95 %", *(f"{d.interval[0]:+.1f} to {d.interval[1]:+.1f}" for d in told), *end],
                ["gained", *map(str, gained), *([str(sum(gained))] if means else [])],
                ["lost", *map(str, lost), *([str(sum(lost))] if means else [])],
            ]
        )
    for i, side in enumerate(sides):
        groups.append([[f"tokens {side.letter}", *(f"{np.mean(c.lengths[i]):.1f}" for c in compared), *end]])
    tables, columns = [], [names]
    for group in groups:
        if len(columns) > 1 and sum(2 + max(map(len, column)) for column in [*columns, *group]) - 2 > _WIDTH:
            tables.append(columns)
            columns = [names]
        columns = [*columns, *group]
    return [aligned([list(row) for row in zip(*table, strict=True)]) for table in [*tables, columns]]
