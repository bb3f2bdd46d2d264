"""Choose the questions that are worth training on: neither too easy for the student nor too hard.

    python -m ril_jax.data select --input=DIR --output=NEW_DIR [--drop_overlong] \\
        [--student=DIR [--accuracy=0,1] [--config=configs/qwen7b.py]] \\
        [--gap=5%,95% --student_scores=FILE --teacher_scores=FILE] [--count=40000]

--student: the student's own responses to the same questions (python -m ril_jax.generate); those that nobody judged are
graded by rule, or by config.reward.judge of --config. The scores are those of python -m ril_jax.data score. What became
of every question, and why, is listed in selection.jsonl beside the data. docs/teacher_data.md tells of the rest.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from ril_jax import cli
from ril_jax.data.merge import open_responses
from ril_jax.data.records import SELECTION_FILE, DatasetWriter, Question, plain_prompt
from ril_jax.errors import InputError
from ril_jax.generation.scoring import Score, read_scores, response_key
from ril_jax.progress import Progress
from ril_jax.rewards.judge import Judge, JudgeItem, RulesJudge, open_judge

REQUIRED = ("input", "output")
FLAGS = (
    cli.Flag("input", help="a data set of teachers' responses (or of questions), or the folder of its parts"),
    cli.Flag("output", help="folder of the new data set"),
    cli.Flag("drop_overlong", bool, False, "drop questions with a response that was cut off"),
    cli.Flag("student", help="the student's own responses to these questions: a data set, or the folder of its parts"),
    cli.Flag("accuracy", list, ["0", "1"], "keep questions of which the student has a share right between these two"),
    cli.Flag("gap", list, None, "keep questions with a gap from the first to the second: numbers, or such as 5%"),
    cli.Flag("student_scores", list, None, "files of log-probabilities under the student, divided by commas"),
    cli.Flag("teacher_scores", list, None, "files of log-probabilities under the teachers that gave the responses"),
    cli.Flag("count", int, 0, "of those that are left, keep so many, drawn by --seed; 0 for all"),
    cli.Flag("seed", int, 0, "of the draw"),
    cli.Flag("name", help="name of the new data set; that of its folder where none is given"),
    cli.Flag("overwrite", bool, False, "replace the data set that is at --output"),
)
_GRADED = 256  # responses that go to the judge at a time


@dataclass
class Place:
    """A question of the input, and what is known of it; reason: why it was dropped, "" where it is kept."""

    id: str
    reason: str = ""
    accuracy: float | None = None
    gap: float | None = None


def main(args: SimpleNamespace) -> int:
    """Select, and say what was dropped and why."""
    _check(args)
    dataset = open_responses(args.input)
    places = [Place(question.id) for question in dataset]
    if args.drop_overlong:
        drop_overlong(dataset, places)
    if args.student:
        judge: Judge = RulesJudge()
        if args.config is not None:
            judge = open_judge(args.config, args.workdir) or judge
        low, high = _numbers("accuracy", args.accuracy)
        drop_by_accuracy(dataset, places, open_responses(args.student), judge, low, high)
    if args.gap:
        drop_by_gap(dataset, places, read_scores(args.student_scores), read_scores(args.teacher_scores), args.gap)
    if args.count:
        draw(places, args.count, args.seed)
    with DatasetWriter(args.output, name=args.name or Path(args.output).name, overwrite=args.overwrite) as writer:
        for question, place in zip(dataset, places, strict=True):
            if not place.reason:
                writer.add(question)
        if not writer.count:
            raise InputError(f"no question is left, and nothing was written: {_reasons(places)}")
        lines = [json.dumps({"kept": not place.reason} | vars(place), ensure_ascii=False) + "\n" for place in places]
        (writer.staging / SELECTION_FILE).write_text("".join(lines), encoding="utf-8")
    print(f"kept {writer.count:,} of {len(places):,} questions in {args.output}")
    if writer.count < len(places):
        print(f"dropped: {_reasons(places)}")
    for field, what in (("accuracy", "student's accuracy"), ("gap", "gap (nats a token)")):
        values = [value for place in places if (value := getattr(place, field)) is not None]
        if values:
            told = ", ".join(f"{share}% {np.percentile(values, share):.3g}" for share in (0, 5, 25, 50, 75, 95, 100))
            print(f"{what}, quantiles: {told}")
    print(f"every question is listed in {Path(args.output) / SELECTION_FILE}")
    return 0


def drop_overlong(dataset: Sequence[Question], places: Sequence[Place]) -> None:
    """Drop questions with a response that was cut off: the paper's overlong filtering."""
    for question, place in zip(dataset, places, strict=True):
        if any(response.finish_reason == "length" for response in question.responses):
            place.reason = "a response was cut off"


def drop_by_accuracy(
    dataset: Sequence[Question],
    places: Sequence[Place],
    student: Sequence[Question],
    judge: Judge,
    low: float,
    high: float,
) -> None:
    """Drop questions whose share of right answers by the student is not between `low` and `high`, both left out.

    Responses with a verdict keep it, the others are judged. Raises InputError where the student was asked another
    question under an id.
    """
    where = {question.id: i for i, question in enumerate(student)}
    progress = Progress("grade", sum(not place.reason for place in places))
    waiting: list[tuple[Place, Question]] = []
    unreadable = 0

    def grade() -> None:
        nonlocal unreadable
        open_ = [(i, r) for i, (_, q) in enumerate(waiting) for r in q.responses if r.judge < 0]
        items = [
            JudgeItem(plain_prompt(waiting[i][1]), waiting[i][1].solution, response.text, waiting[i][1].id)
            for i, response in open_
        ]
        verdicts = judge(items) if items else []
        unreadable += sum(verdict.error is not None for verdict in verdicts)
        for i, (place, question) in enumerate(waiting):
            scores = [response.judge for response in question.responses if response.judge >= 0]
            scores += [verdict.score for (j, _), verdict in zip(open_, verdicts, strict=True) if i == j]
            place.accuracy = float(np.mean(scores))
            if place.accuracy <= low:
                place.reason = "never right by the student" if low == 0 else f"right {low:g} of the time or less"
            elif place.accuracy >= high:
                place.reason = "always right by the student" if high == 1 else f"right {high:g} of the time or more"
        progress.advance(len(waiting))
        waiting.clear()

    for question, place in zip(dataset, places, strict=True):
        if place.reason:
            continue
        theirs = student[where[question.id]] if question.id in where else None
        if theirs is not None and (theirs.prompt, theirs.solution) != (question.prompt, question.solution):
            raise InputError(
                f"the student was asked another question under the id {question.id!r}; collect its responses to the "
                "questions of --input"
            )
        if theirs is None or not theirs.responses:
            place.reason = "no responses of the student"
            continue
        waiting.append((place, theirs))
        if sum(len(q.responses) for _, q in waiting) >= _GRADED:
            grade()
    grade()
    progress.close()
    if unreadable:
        print(f"the judge gave {unreadable:,} verdicts that cannot be read; they count as wrong")


def drop_by_gap(
    dataset: Sequence[Question],
    places: Sequence[Place],
    student: Mapping[str, Mapping[str, Score]],
    teachers: Mapping[str, Mapping[str, Score]],
    band: Sequence[str],
) -> None:
    """Drop questions whose gap lies outside `band`, two numbers or shares of the questions ("5%").

    The gap of a question: how much likelier its responses are to the teachers than to the student, mean log-probability
    a token, in the mean of those responses that both have scored. Near 0 there is nothing to learn.
    """
    for question, place in zip(dataset, places, strict=True):
        ours, theirs = student.get(question.id, {}), teachers.get(question.id, {})
        keys = dict.fromkeys(response_key(response) for response in question.responses)
        gaps = [_mean(theirs[key]) - _mean(ours[key]) for key in keys if key in ours and key in theirs]
        if gaps:
            place.gap = float(np.mean(gaps))
        elif not place.reason:
            place.reason = "not scored by both"
    known = [place.gap for place in places if place.gap is not None]
    if not known:
        raise InputError("no response is scored by both; give the scores of the responses in --input")
    low, high = (_bound(text, known) for text in band)
    for place in places:
        if place.reason or place.gap is None:
            continue
        if place.gap < low:
            place.reason = f"gap below {low:.3g}"
        elif place.gap > high:
            place.reason = f"gap above {high:.3g}"


def draw(places: Sequence[Place], count: int, seed: int) -> None:
    """Drop all but `count` of what is left."""
    left = [place for place in places if not place.reason]
    order = np.random.default_rng(seed).permutation(len(left))
    for i in order[count:]:
        left[i].reason = "not drawn"


def _check(args: SimpleNamespace) -> None:
    if not (args.drop_overlong or args.student or args.gap or args.count):
        raise InputError("nothing to select by: give --drop_overlong, --student=DIR, --gap=LOW,HIGH or --count=N")
    if args.gap:
        if not (args.student_scores and args.teacher_scores):
            raise InputError("--gap needs --student_scores=FILE and --teacher_scores=FILE")
        if len(args.gap) != 2 or not all(re.fullmatch(r"[-+]?\d*\.?\d+(e[-+]?\d+)?%?", text) for text in args.gap):
            raise InputError(f"--gap={','.join(args.gap)}: write two numbers or shares, such as 0.1,1.5 or 5%,95%")
    if args.count < 0:
        raise InputError(f"--count={args.count}: give 1 or more, or 0 for all")
    _numbers("accuracy", args.accuracy)


def _numbers(name: str, texts: Sequence[str]) -> tuple[float, float]:
    try:
        low, high = (float(text) for text in texts)
    except ValueError:
        raise InputError(f"--{name}={','.join(texts)}: write two numbers, such as 0,1") from None
    if not low < high:
        raise InputError(f"--{name}={','.join(texts)}: the first must be less than the second")
    return low, high


def _bound(text: str, values: Sequence[float]) -> float:
    return float(np.percentile(values, float(text[:-1]))) if text.endswith("%") else float(text)


def _mean(score: Score) -> float:
    return score[0] / score[1]


def _reasons(places: Sequence[Place]) -> str:
    counts = Counter(place.reason for place in places if place.reason)
    return ", ".join(f"{count:,} ({reason})" for reason, count in counts.most_common())
