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
from ril_jax.evaluation.statistics import bootstrap_interval
from ril_jax.evaluation.table import aligned


@dataclass(frozen=True)
class Side:
    """One folder: what it is called here, and its numbers by benchmark."""

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
    """Two or more result folders; their labels are the ends of their paths that tell them apart.

    Raises InputError where there are fewer, or one holds no results.
    """
    if len(folders) < 2:
        raise InputError("name two result folders or more: python -m ril_jax.compare A B")
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise InputError("one folder is named twice; name different ones")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return [
        Side("/".join(path.parts[-depth:]), folder, read_results(folder)["benchmarks"])
        for path, folder in zip(paths, folders, strict=True)
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


def terminal_text(sides: Sequence[Side], compared: Sequence[Compared], *, listed: int = 5) -> str:
    """Scores, differences with intervals, flips and lengths, and the first flipped questions of each benchmark."""
    first = sides[0].label
    head = ["benchmark", "questions", *(side.label for side in sides)]
    head += [text for side in sides[1:] for text in (f"{side.label} - {first}", "95 %", "gained", "lost")]
    head += [f"tokens {side.label}" for side in sides]
    rows = [head]
    for c in compared:
        row = [c.title, f"{c.questions:,}", *(f"{score:.1f}" for score in c.scores)]
        for d in c.differences:
            row += [
                f"{d.points:+.1f}",
                f"{d.interval[0]:+.1f} to {d.interval[1]:+.1f}",
                f"{len(d.gained)}",
                f"{len(d.lost)}",
            ]
        rows.append([*row, *(f"{np.mean(lengths):.1f}" for lengths in c.lengths)])
    if len(compared) > 1:
        means = [float(np.mean([c.scores[i] for c in compared])) for i in range(len(sides))]
        row = [f"average of {len(compared)}", "", *(f"{mean:.1f}" for mean in means)]
        for i, mean in enumerate(means[1:]):
            row += [f"{mean - means[0]:+.1f}", "", str(sum(len(c.differences[i].gained) for c in compared))]
            row += [str(sum(len(c.differences[i].lost) for c in compared))]
        rows.append([*row, *("" for _ in sides)])
    lines = aligned(rows)
    for c in compared:
        lines += [f"{c.title}: {note}" for note in c.notes]
        for side, d in zip(sides[1:], c.differences, strict=True):
            for word, flips in (("gained", d.gained), ("lost", d.lost)):
                shown = ", ".join(flip.samples[0].key for flip in flips[:listed])
                more = f" and {len(flips) - listed} more" if len(flips) > listed else ""
                if flips:
                    lines.append(f"{c.title}: {word} by {side.label}: {shown}{more}")
    return "\n".join(line.rstrip() for line in lines)
